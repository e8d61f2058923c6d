"""An adapter in as few bits as a named error allows: for packs, since only they store such tensors small."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Grade, Method, Outcome, Progress, Request
from adapterpack.codecs.lines import Quantised
from adapterpack.methods import vblora
from adapterpack.methods._keys import flag
from adapterpack.pairs import compare
from adapterpack.quantise import experts, lora, rounds

if TYPE_CHECKING:
    from adapterpack.base import Base


def quantised(
    method: Method,
    adapter: Adapter,
    request: Request,
    model: Base | None,
    max_error: float,
    progress: Progress | None = None,
) -> Outcome:
    """The adapter with quantised parameters, every module's change within `max_error` as `verify` measures it.

    The sources of its new tensors are `codecs.lines.Quantised`; they read as F32. `replaced` and `extra` stay.

    Args:
        method: Of the adapter.
        adapter: In any encoding; VB-LoRA becomes top-k first.
        request: Backend, and shapes where the changes take them.
        model: The base, for changes that depend on its weights (DoRA); without it each parameter of those is held to
            the error by itself.
        max_error: Relative Frobenius error.

    Returns:
        Grade `approximate`; the adapter as it was, `lossless`, where nothing gets smaller within the error.

    Raises:
        InvalidFile: a parameter has NaN or infinite values.
        WrongBase: see the method's `changes`.
    """
    start = Outcome(adapter, Grade.LOSSLESS)
    if not 0 < max_error < math.inf:
        return start
    before = start
    if adapter.method == "vblora":
        before = _topk(method, start, request)
    errors = functools.partial(_errors, method, adapter, request, model, progress=None)
    new, notes = _made(before.adapter, request, model, max_error, errors, progress)
    if not new.sources():
        return start
    made = new.into(before.adapter)
    worst = max(errors(made).values(), default=0.0)
    if not worst <= max_error:
        # Each module was measured by itself; that all are measured so again is not left to hope.
        return start
    dropped = (*before.dropped, *_dropped(before.adapter, made))
    return Outcome(made, Grade.APPROXIMATE, dropped, (*before.notes, *notes))


def is_quantised(adapter: Adapter) -> bool:
    """Does any of its tensors come from codes?"""
    return any(isinstance(p.tensor.source, Quantised) for p in adapter.params())


def _topk(method: Method, start: Outcome, request: Request) -> Outcome:
    """VB-LoRA as top-k, with weights that PEFT can load."""
    for edge in method.edges.get(start.adapter.encoding, ()):
        if edge.to == vblora.TOPK:
            made = edge.run(start.adapter, request)
            return start if made.grade is Grade.LOSSLESS else made
    return start


def _made(
    a: Adapter,
    request: Request,
    model: Base | None,
    max_error: float,
    errors: rounds.Errors,
    progress: Progress | None,
) -> tuple[rounds.New, tuple[str, ...]]:
    """New parameters, and notes."""
    xp = request.xp
    if a.method == "lora" and not flag(a.config, "use_dora"):
        made = lora.modules(a, xp, max_error, progress)
        tensors = experts.tensors(a, xp, request.shapes, max_error, progress)
        return rounds.New(tensors | dict(rounds.vectors(a, xp, max_error)), made), ()
    if a.method == "lora":
        biases = rounds.New(dict(rounds.vectors(a, xp, max_error)))
        if model is None or not model.tensors:
            return rounds.dora_by_parameter(a, xp, max_error).and_(biases), ()
        units = rounds.dora_units(a, xp)
    else:
        biases = rounds.New()
        units = rounds.vblora_units(a, xp) if a.method == "vblora" else rounds.vera_units(a, xp)
    new, left = rounds.fitted(a, units, max_error, errors, progress)
    if not rounds.smaller(a, new):
        return rounds.New(), ()
    return new.and_(biases), (f"{left} of {len(units)} modules stay as they are",) if left else ()


def _errors(
    method: Method, adapter: Adapter, request: Request, model: Base | None, new: Adapter, *, progress: Progress | None
) -> dict[str, float]:
    """Relative error of each base tensor's change; infinite where `compare` finds a fault."""
    weights = model if model is not None and model.tensors else None
    errors, findings, _ = compare(
        (method, adapter), (method, new), request, model=weights, largest=False, progress=progress
    )
    found = {e.name: e.rel_error if e.rel_error == e.rel_error else math.inf for e in errors}
    return found | {f.key: math.inf for f in findings}


def _dropped(before: Adapter, after: Adapter) -> tuple[str, ...]:
    codes = sum(isinstance(p.tensor.source, Quantised) for p in after.params())
    dropped = [f"the last digits of {codes} tensors: what is left are whole numbers of steps"]
    if before.method == "lora" and before.config != after.config:
        dropped.append("small singular values")
    return tuple(dropped)
