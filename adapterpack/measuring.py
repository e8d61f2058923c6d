"""What a conversion did to the change of W, measured, and held against what was allowed; then it is written."""

from __future__ import annotations

import collections
import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

from adapterpack import card, casting, containers, methods
from adapterpack.adapter import EQUIVALENT_ERROR, Adapter, Grade, Method, Outcome, Progress, Request
from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.conversion import Conversion
from adapterpack.errors import LossRefused, WrongBase
from adapterpack.methods._keys import render
from adapterpack.pairs import compare, worst

_SCALES = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""What a LoRA's scales come from."""


@dataclass(frozen=True)
class Measured:
    """What a conversion did to the change of W.

    Attributes:
        grade: The one that it really reached.
        error: The largest relative error of a module.
        notes: How it was compared, where that is not plain.
    """

    grade: Grade
    error: float
    notes: tuple[str, ...] = ()


def measure(
    before: tuple[Method, Adapter],
    outcome: Outcome,
    request: Request,
    model: Base | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Compare an outcome with what it was made of.

    A lossless one gives back the same tensors and is not measured; nor is one whose values are all the same.

    Args:
        model: The base, for changes that depend on W.
    """
    if outcome.grade is Grade.LOSSLESS:
        return Measured(Grade.LOSSLESS, 0.0)
    # What would be refused by merge is not handed on either: this reads no values.
    with contextlib.suppress(WrongBase):
        collections.deque(before[0].changes(before[1], request), maxlen=0)
    same_scales = all(before[1].config.get(f) == outcome.adapter.config.get(f) for f in _SCALES)
    if outcome.grade is Grade.EQUIVALENT and same_scales and casting.same_values(before[1], outcome.adapter):
        return Measured(Grade.EQUIVALENT, 0.0)
    after = (methods.METHODS[outcome.adapter.method.upper()], outcome.adapter)
    weights = model if model is not None and model.tensors else None
    errors, findings, notes = compare(before, after, request, model=weights, largest=False, progress=progress)
    error = math.inf if any(f.code != "difference" for f in findings) else worst(errors)
    equivalent = outcome.grade is Grade.EQUIVALENT and error <= EQUIVALENT_ERROR
    return Measured(Grade.EQUIVALENT if equivalent else Grade.APPROXIMATE, error, tuple(notes))


def refuse_loss(measured: Measured, max_error: float | None) -> None:
    """Raise LossRefused if the measured error is more than was allowed."""
    allowed = EQUIVALENT_ERROR if max_error is None else max_error
    error = measured.error
    if measured.grade is Grade.APPROXIMATE and not error <= allowed:
        hint = "the values leave the dtype's range"
        if math.isfinite(error):
            hint = f"allow it with --max-error {_round_up(error):.2g}"
        raise LossRefused(
            f"the change of W would move by {error:.2g} (relative, worst module); allowed is {allowed:.2g}", hint=hint
        )


def _round_up(x: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(x)) - 1)
    return math.ceil(x / unit) * unit


def publish(
    checkpoint: Checkpoint,
    outcome: Outcome,
    measured: Measured,
    target: Path,
    protected: tuple[Path, ...],
    *,
    overwrite: bool,
    dry_run: bool,
    max_error: float | None = None,
) -> Conversion:
    """Write the result, its card mended, and say what it is."""
    a = outcome.adapter
    dropped = (*outcome.dropped, *(f"file {name}" for name in checkpoint.left))
    grade = measured.grade
    if checkpoint.foreign is not None:
        # Its files do not come back.
        dropped, grade = (*dropped, checkpoint.foreign), min(grade, Grade.EQUIVALENT)
    rendered = render(a)
    if a.changed:
        rendered = replace(rendered, files=card.mended(rendered.files, checkpoint, a))
    facts = containers.apack.Facts.after(checkpoint, a, grade, measured.error, max_error, dropped)
    size = containers.write_checkpoint(
        rendered, target, overwrite=overwrite, sources=protected, facts=facts, dry_run=dry_run
    )
    return Conversion(
        output=str(target),
        method=a.method,
        encoding=a.encoding,
        bytes_in=checkpoint.bytes,
        bytes_out=size,
        grade=str(grade),
        dropped=dropped,
        max_rel_error=measured.error,
        notes=outcome.notes,
    )
