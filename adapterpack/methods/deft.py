"""DEFT (Decompositional Efficient Fine-Tuning), and PaRa, which is its first half.

    delta W = Q (s R - P'^T W),   s = alpha / r, or 1 without alpha;   PaRa: delta W = -Q P'^T W
    relu: Q = P, P' = relu(P);  qr: Q = P' = the first factor of P's QR

With `qr` the signs of Q's columns matter where R is: they are Householder's, as LAPACK computes them.
Reference: peft/tuners/deft/layer.py (`_project`, `_merge_factor`, `_delta_from_factor`, `merge`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Edge, Finding, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, flag, floats, positive
from adapterpack.methods._of_base import choice, linear_shape, number, pair_findings, signs
from adapterpack.methods._without import no_recipes

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "DEFT"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
keys = KeyTable("deft_", {"P": "deft_P", "R": "deft_R"})


@dataclass(frozen=True)
class _Settings:
    """The config's word on the formula.

    Attributes:
        alpha: None: R counts as it is.
        para: Is nothing put in the place of what is taken away?
    """

    alpha: float | None
    para: bool
    qr: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Settings:
        """Raises InvalidFile for what PEFT refuses too."""
        # PEFT takes 0 for none, too.
        alpha = number(config, "alpha", 1) if config.get("alpha") else None
        qr = choice(config, "decomposition_method", "relu", ("relu", "qr")) == "qr"
        return cls(alpha, flag(config, "para"), qr)

    def scale(self, rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / rank


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "deft", "deft")


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    s = _Settings.of(a.config)
    for module, params in a.modules.items():
        out, rank, into = _sizes(module, params, s)
        yield TransformChange(
            module=module,
            params=params,
            shape=linear_shape(a, module, request, out=out, into=into, conv1d=True),
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            transform=partial(_changed, s, s.scale(rank)),
            settings={"scale": s.scale(rank), "qr": s.qr},
        )


def _sizes(module: str, params: Mapping[str, Param], s: _Settings) -> tuple[int, int, int]:
    """out, r and in; in is 0 where nothing says it (PaRa)."""
    names = ("P",) if s.para else ("P", "R")
    p, *r = (t.shape for t in floats(module, params, names))
    if "R" in params and s.para:
        raise InvalidFile(
            f"{params['R'].key} is there, and para is true: PEFT would ignore it",
            hint="set para to false in adapter_config.json if it was trained so",
        )
    fits = len(p) == 2 and 0 < p[1] <= p[0] and (not r or (len(r[0]) == 2 and r[0][0] == p[1]))
    if not fits:
        shapes = ", ".join(f"{n} {params[n].tensor.shape}" for n in names)
        raise InvalidFile(f"{module}: these shapes do not fit together: {shapes}")
    return p[0], p[1], r[0][1] if r else 0


def _changed(s: _Settings, scale: float, m: Maths, w: Array) -> Array:
    p = m["P"]
    q = right = p
    if s.qr:
        q = right = _orthonormal(m, p)
    else:
        right = m.torch.relu(p)
    removed = right.T @ w
    delta = -(q @ removed) if s.para else q @ (m["R"] * scale - removed)
    return w + m.lift(m.rounded(delta))


def _orthonormal(m: Maths, p: Array) -> Array:
    q = m.torch.linalg.qr(p).Q
    return q * signs(q, m.torch.linalg.qr(m.xp.f32(p)).Q) if m.exact else q


def ranks(a: Adapter) -> Mapping[str, int]:
    s = _Settings.of(a.config)
    return {module: _sizes(module, params, s)[1] for module, params in a.modules.items()}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    s, r = _Settings.of(a.config), positive(a.config, "r", 8)

    def rank(module: str, params: Mapping[str, Param]) -> int:
        out, found, _ = _sizes(module, params, s)
        # PEFT cuts the rank to the outputs.
        return r if found == min(r, out) else found

    yield from pair_findings(a, rank, 8)


edges: Mapping[str, tuple[Edge, ...]] = {"deft": ()}
