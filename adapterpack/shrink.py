"""The smallest PEFT directory that stock PEFT reads back as the same adapter, or one within a named error."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from adapterpack import casting, containers, methods, sources
from adapterpack.adapter import Adapter, Grade, Method, Outcome, Progress, Request
from adapterpack.backend import TorchBackend
from adapterpack.base import Base
from adapterpack.containers import apack, size_of
from adapterpack.conversion import Conversion, inputs
from adapterpack.convert import cast_outcome, open_shapes
from adapterpack.measuring import Measured, measure, publish, refuse_loss
from adapterpack.methods import _lora_resizing
from adapterpack.methods._keys import render
from adapterpack.quantise import quantised
from adapterpack.tensor import BF16, F16


def shrink(
    source: str | Path,
    target: Path,
    *,
    lossless: bool,
    max_error: float | None,
    base: str | Path | None,
    device: str,
    subfolder: str | None,
    allow_pickle: bool,
    overwrite: bool,
    dry_run: bool,
    progress: Progress | None,
) -> Conversion:
    """The smallest form of the same change of W, or of one within `max_error`; see `compress`."""
    source = sources.here(source, subfolder)
    protected = inputs(source, base)
    containers.check_target(target, overwrite=overwrite, sources=protected)
    with ExitStack() as stack:
        opened = containers.open_checkpoint(
            source, subfolder=subfolder, allow_pickle=allow_pickle, base=sources.base(base)
        )
        checkpoint = stack.enter_context(opened)
        method, adapter = methods.parse(checkpoint)
        wanted = max_error is not None and methods.depends_on_shapes(method, adapter)
        model, notes = open_shapes(adapter, base, stack, wanted=wanted)
        request = Request(TorchBackend(device), model, max_error=max_error)
        outcome, measured = _compressed(method, adapter, request, model, target, lossless, base, progress)
        outcome = replace(outcome, notes=(*notes, *outcome.notes))
        return publish(
            checkpoint,
            outcome,
            measured,
            target,
            protected,
            overwrite=overwrite,
            dry_run=dry_run,
            max_error=max_error,
        )


def _compressed(
    method: Method,
    adapter: Adapter,
    request: Request,
    model: Base | None,
    target: Path,
    lossless: bool,
    base: str | Path | None,
    progress: Progress | None,
) -> tuple[Outcome, Measured]:
    """The smallest form that is allowed, and how far it is from the adapter."""
    outcome = Outcome(adapter, Grade.LOSSLESS)
    reference = adapter
    if not lossless:
        if base is not None and model is not None and model.tensors:
            outcome = _without_copies(adapter, model)
            reference = outcome.adapter
        outcome = _equivalent(method, outcome, request)
    if request.max_error is not None and target.suffix == apack.SUFFIX:
        outcome = _quantised(method, outcome, request, model, progress)
    elif request.max_error is not None:
        outcome = _smallest((method, reference), outcome, request, model, progress)
    measured = measure((method, reference), outcome, request, model, progress)
    refuse_loss(measured, request.max_error)
    outcome = replace(outcome, notes=(*outcome.notes, *measured.notes))
    before, after = size_of(render(adapter)), size_of(render(outcome.adapter))
    if after >= before and target.suffix != apack.SUFFIX:
        hint = "nothing to gain here: the result is a copy"
        ways = "a DST that ends in .apack, --dtype bfloat16 with convert, or --max-error make it smaller"
        return Outcome(adapter, Grade.LOSSLESS, notes=(f"{hint}; {ways}",)), Measured(Grade.LOSSLESS, 0.0)
    return outcome, measured


def _equivalent(method: Method, start: Outcome, request: Request) -> Outcome:
    """The compact encoding, and every value in the narrowest dtype that holds it."""
    outcome = start
    for edge in method.edges.get(start.adapter.encoding, ()):
        if edge.compact:
            made = edge.run(start.adapter, request)
            outcome = replace(made, grade=min(start.grade, made.grade), dropped=(*start.dropped, *made.dropped))
    narrowed = casting.narrow(method, outcome.adapter)
    if narrowed is not outcome.adapter:
        note = "values that 16 bits hold exactly are stored in 16 bits; PEFT lifts them to float32 again"
        grade = min(outcome.grade, Grade.EQUIVALENT)
        outcome = Outcome(narrowed, grade, outcome.dropped, (*outcome.notes, note))
    return outcome


def _without_copies(a: Adapter, model: Base) -> Outcome:
    """Saved embeddings (`base_layer.weight`) that are the base's own, byte for byte, are not needed."""
    model.bind(a.targets())
    copies = {
        target: entries[0].param.key
        for target, entries in a.replaced.items()
        if len(entries) == 1
        and entries[0].rows is None
        and ".base_layer." in entries[0].param.key
        and model.has(target)
        and model.tensor(target).equals(entries[0].param.tensor)
    }
    if not copies:
        return Outcome(a, Grade.LOSSLESS)
    kept = {t: e for t, e in a.replaced.items() if t not in copies}
    dropped = tuple(f"{key}: equal to the base's" for key in copies.values())
    return Outcome(replace(a, replaced=kept, changed=True), Grade.EQUIVALENT, dropped)


def _quantised(
    method: Method, start: Outcome, request: Request, model: Base | None, progress: Progress | None
) -> Outcome:
    """Whole numbers of steps in place of values: only packs store them small."""
    assert request.max_error is not None
    made = quantised(method, start.adapter, request, model, request.max_error, progress)
    grade = min(start.grade, made.grade)
    return Outcome(made.adapter, grade, (*start.dropped, *made.dropped), (*start.notes, *made.notes))


def _smallest(
    original: tuple[Method, Adapter],
    start: Outcome,
    request: Request,
    model: Base | None,
    progress: Progress | None,
) -> Outcome:
    """The smallest of a few lossy forms that keeps every module within the error; `start` if none is smaller."""
    best, best_size = start, size_of(render(start.adapter))
    for candidate in _candidates(start, request):
        size = size_of(render(candidate.adapter))
        if size >= best_size:
            continue
        error = measure(original, candidate, request, model, progress).error
        if request.max_error is not None and error <= request.max_error:
            best, best_size = candidate, size
    return best


def _candidates(start: Outcome, request: Request) -> Iterator[Outcome]:
    assert request.max_error is not None
    # A cast adds its own error on top of a cut: half of the bound squared is left for it.
    for share, dtype in itertools.product((None, 1.0, 0.7, 0.3), (None, BF16, F16)):
        outcome = start
        if share is not None:
            cut = _lower_rank(start.adapter, request, request.max_error * share)
            if cut is None:
                continue
            outcome = Outcome(cut, Grade.APPROXIMATE, (*start.dropped, "small singular values"), start.notes)
        if dtype is not None:
            outcome = replace(cast_outcome(outcome, dtype), grade=Grade.APPROXIMATE)
        yield outcome


def _lower_rank(a: Adapter, request: Request, max_error: float) -> Adapter | None:
    """Plain LoRA with each module at the least rank that keeps it within `max_error`."""
    return _lora_resizing.truncated(a, request.xp, max_error) if a.method == "lora" else None
