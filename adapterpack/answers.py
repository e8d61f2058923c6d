"""How far the answers of two models are from each other, in figures, added up in f64."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adapterpack.backend import Array, Backend

_PIECE = 1 << 22
"""Numbers that are looked at at a time: each takes a few f64 copies."""


@dataclass(frozen=True)
class Figures:
    """Two models' answers: logits, or hidden states.

    Attributes:
        max_abs: The largest difference of two numbers.
        mean_abs: The mean of their magnitudes.
        rms: Root of the mean of their squares.
        scale: The same of the reference's own numbers.
        kl_mean, kl_max: KL(reference || other) in nats, of the softmax of each row; None where rows are no logits.
        top1: Part of the rows whose largest logit is the same one; None where rows are no logits.
        cosine: Mean cosine of the rows of hidden states; None for logits.
        positions: How many rows.
    """

    max_abs: float
    mean_abs: float
    rms: float
    scale: float
    kl_mean: float | None
    kl_max: float | None
    top1: float | None
    cosine: float | None
    positions: int


class Sums:
    """What figures are made of; sums of several prompts can be joined.

    Args:
        xp: A backend that has f64.
        classes: Are the rows logits of two classes or more? Else they are hidden states, or one number each.
    """

    def __init__(self, xp: Backend, classes: bool) -> None:
        self.how = (xp, classes)
        self._xp, self._classes = xp, classes
        self._max = self._abs = self._square = self._reference = self._kl = self._kl_max = self._cosine = 0.0
        self._numbers = self._rows = self._same = 0

    def add(self, reference: Array, other: Array) -> None:
        """Add rows.

        Args:
            reference, other: (positions, classes or width), float.
        """
        step = max(1, _PIECE // max(1, reference.shape[-1]))
        for start in range(0, len(reference), step):
            self._piece(*(self._xp.f64(x[start : start + step].to(self._xp.device)) for x in (reference, other)))

    def _piece(self, x: Array, y: Array) -> None:
        torch = self._xp.torch
        d = (y - x).abs()
        # torch's maximum gives NaN if there is one; Python's may not.
        self._max = float(torch.maximum(d.max(), d.new_tensor(self._max)))
        self._abs += float(d.sum())
        self._square += float((d * d).sum())
        self._reference += float((x * x).sum())
        self._numbers += d.numel()
        self._rows += len(d)
        if self._classes:
            # In f64, each row less its maximum: logarithms of small probabilities stay exact.
            p, q = torch.log_softmax(x, dim=-1), torch.log_softmax(y, dim=-1)
            kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
            self._kl += float(kl.sum())
            self._kl_max = float(torch.maximum(kl.max(), kl.new_tensor(self._kl_max)))
            self._same += int((x.argmax(-1) == y.argmax(-1)).sum())
        else:
            norms = x.norm(dim=-1) * y.norm(dim=-1)
            self._cosine += float(((x * y).sum(-1) / norms.clamp_min(1e-300)).clamp(-1, 1).sum())

    def join(self, other: Sums) -> None:
        """Add what another has added up."""
        self._max = math.nan if math.isnan(self._max + other._max) else max(self._max, other._max)
        self._kl_max = math.nan if math.isnan(self._kl_max + other._kl_max) else max(self._kl_max, other._kl_max)
        for name in ("_abs", "_square", "_reference", "_kl", "_cosine", "_numbers", "_rows", "_same"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self) -> Figures:
        rows, numbers, classes = max(1, self._rows), max(1, self._numbers), self._classes
        return Figures(
            max_abs=self._max,
            mean_abs=self._abs / numbers,
            rms=math.sqrt(self._square / numbers),
            scale=math.sqrt(self._reference / numbers),
            kl_mean=self._kl / rows if classes else None,
            kl_max=self._kl_max if classes else None,
            top1=self._same / rows if classes else None,
            cosine=None if classes else self._cosine / rows,
            positions=self._rows,
        )
