"""Convert an adapter to another encoding, method or dtype, and measure what that did to the change of W."""

from __future__ import annotations

import collections
import contextlib
import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from adapterpack import card, casting, containers, engines, hub, initial, methods, projections, serving
from adapterpack.adapter import (
    EQUIVALENT_ERROR,
    Adapter,
    Edge,
    Grade,
    Method,
    Need,
    Outcome,
    Progress,
    Request,
)
from adapterpack.backend import TorchBackend
from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.conversion import Conversion, inputs
from adapterpack.errors import LossRefused, Unsupported, UsageError, WrongBase
from adapterpack.methods._keys import render
from adapterpack.methods._lora_variants import moved_base
from adapterpack.tensor import CASTABLE, DType
from adapterpack.verify import compare, worst


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    engine: str | None = None,
    extra: str = "refuse",
    layout: str | None = None,
    base: str | Path | None = None,
    base_dtype: str | None = None,
    init: str | Path | None = None,
    max_error: float | None = None,
    warm_start: bool = False,
    device: str = "cpu",
    subfolder: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert an adapter.

    Args:
        source: A PEFT directory, or one safetensors file with its config beside it. It is only read.
        destination: The new PEFT directory.
        to: Encoding (`full-logits`, `topk`, `projection`, `seed`) or method (`lora`).
        dtype: `float32`, `bfloat16` or `float16` for the parameters.
        engine: Plain LoRA that this engine reads as PEFT does, `vllm`, `peft==0.10`; the others are in `engines`.
        extra: What becomes of that which the engine has no place for: `refuse` the adapter, `split` it off into files
            of its own, `fold` it into LoRA where that is exact (with `base`).
        layout: `split` or `fused` projections: q, k, v; gate, up.
        base: Where the base's shapes are to be had; its weights are read only where the change depends on them
            (a cast of DoRA, `fold`).
        base_dtype: The dtype of the base in training, where `base` does not tell.
        init: With `lora`: the adapter as it was before training, for PiSSA, OLoRA, CorDA and LoRA-GA.
        max_error: The largest relative error allowed; None: nothing beyond `equivalent`.
        warm_start: With `full-logits`: make up the logits that a top-k file lacks.
        dry_run: Measure only; nothing is written.

    Raises:
        LossRefused: it would lose more than was allowed.
        Unsupported: there is no such conversion.
        WrongBase: it needs the base's shapes, or they do not fit.
        DestinationExists, UsageError, WriteFailed: see `io.atomic`.
    """
    _check_wishes(to, dtype, engine, extra, layout, warm_start, init)
    reader = None if engine is None else engines.named(engine)
    target = Path(destination).expanduser()
    protected = inputs(source, base, init)
    containers.check_target(target, overwrite=overwrite, sources=protected)
    with ExitStack() as stack:
        here = hub.named_base(base)
        opened = containers.open_checkpoint(source, subfolder=subfolder, allow_pickle=allow_pickle, base=here)
        checkpoint = stack.enter_context(opened)
        if init is not None or (to == "lora" and not (engine or layout) and moved_base(checkpoint.config)):
            outcome, measured = _without_start(checkpoint, init, base, dtype, device, stack)
            refuse_loss(measured, max_error)
            return publish(checkpoint, outcome, measured, target, protected, overwrite=overwrite, dry_run=dry_run)
        method, adapter = methods.parse(checkpoint)
        if to is None and (reader or layout) and adapter.method != "lora":
            to = "lora"
        edge = None if to is None else find_edge(method, adapter, to)
        request, model, base_notes = _request(
            method, adapter, edge, base, base_dtype, max_error, warm_start, device, stack, strict=layout is None
        )
        outcome = Outcome(adapter, Grade.LOSSLESS)
        if edge is not None:
            if progress:
                progress("convert", 0, 1)
            outcome = edge.run(adapter, request)
        steps = _Steps(method, adapter, outcome, request, model, progress)
        if layout is not None:
            steps.relay(layout)
        if reader is not None:
            steps.serve(reader, extra)
        outcome, measured = steps.end(None if dtype is None else named_dtype(dtype))
        refuse_loss(measured, max_error)
        outcome = replace(outcome, notes=(*base_notes, *outcome.notes, *measured.notes))
        result = publish(checkpoint, outcome, measured, target, protected, overwrite=overwrite, dry_run=dry_run)
        return result if reader is None else replace(result, serve=serving.command(reader, outcome.adapter, target))


def _check_wishes(
    to: str | None,
    dtype: str | None,
    engine: str | None,
    extra: str,
    layout: str | None,
    warm_start: bool,
    init: str | Path | None,
) -> None:
    """Raise UsageError for wishes that do not go together."""
    if to is None and dtype is None and engine is None and layout is None:
        raise UsageError(
            "nothing to convert to", hint="--to ENCODING, --for ENGINE, --layout LAYOUT or --dtype DTYPE"
        )
    if warm_start and to != "full-logits":
        raise UsageError("--warm-start goes with --to full-logits")
    if init is not None and to != "lora":
        raise UsageError("--init goes with --to lora")
    if init is not None and (engine is not None or layout is not None):
        raise UsageError("--init does not go with --for and --layout", hint="first --to lora --init")
    if to not in (None, "lora") and (engine is not None or layout is not None):
        raise UsageError(f"--to {to} does not go with --for and --layout: they write plain LoRA")
    if extra != "refuse" and engine is None:
        raise UsageError("--extra goes with --for")
    if layout not in (None, *projections.LAYOUTS):
        raise UsageError(f"no layout {layout!r:.20}", hint=f"one of {', '.join(projections.LAYOUTS)}")


class _Steps:
    """Conversions one after the other, each measured against what it was made of."""

    def __init__(
        self,
        method: Method,
        source: Adapter,
        outcome: Outcome,
        request: Request,
        model: Base | None,
        progress: Progress | None,
    ) -> None:
        self._before = (method, source)
        self._outcome, self._comparable = outcome, outcome.adapter
        self._request, self._model, self._progress = request, model, progress
        self._error, self._notes = 0.0, tuple[str, ...]()

    def relay(self, layout: str) -> None:
        """Split or fuse projections; measured on the way back, where the modules are the same again."""
        now = self._outcome
        relaid = projections.relay(now.adapter, layout, self._model)
        self._measure(Outcome(relaid.back, Grade.EQUIVALENT))
        self._before = (methods.METHODS["LORA"], relaid.adapter)
        grade = min(now.grade, Grade.EQUIVALENT)
        self._outcome = Outcome(relaid.adapter, grade, now.dropped, (*now.notes, *relaid.notes))
        self._comparable = relaid.adapter
        self._request = replace(self._request, shapes=None)

    def serve(self, reader: engines.Engine, extra: str) -> None:
        """Make it fit an engine."""
        prepared = serving.prepare(reader, self._before[1], self._outcome, extra, self._model)
        self._before = (self._before[0], prepared.reference)
        self._outcome, self._comparable = prepared.outcome, prepared.comparable
        self._error += prepared.error
        self._notes = (*self._notes, *serving.advice(reader, prepared.outcome.adapter))

    def end(self, dtype: DType | None) -> tuple[Outcome, Measured]:
        """What came of it, and how far it is from the source."""
        if dtype is not None:
            comparable = cast_outcome(replace(self._outcome, adapter=self._comparable), dtype).adapter
            self._outcome, self._comparable = cast_outcome(self._outcome, dtype), comparable
        last = self._measure(replace(self._outcome, adapter=self._comparable))
        equivalent = last.grade is not Grade.APPROXIMATE and self._error <= EQUIVALENT_ERROR
        grade = last.grade if equivalent else Grade.APPROXIMATE
        return self._outcome, Measured(grade, self._error, (*self._notes, *last.notes))

    def _measure(self, outcome: Outcome) -> Measured:
        measured = measure(self._before, outcome, self._request, self._model, self._progress)
        self._error += measured.error
        return measured


def _without_start(
    trained: Checkpoint,
    init: str | Path | None,
    base: str | Path | None,
    dtype: str | None,
    device: str,
    stack: ExitStack,
) -> tuple[Outcome, Measured]:
    """Plain LoRA of an adapter that began with a part of the base; see `initial`."""
    model = None if base is None else stack.enter_context(Base(hub.resolve_base(str(base))))
    if init is None and model is None:
        raise initial.refuse(trained)
    xp, error = TorchBackend(device), 0.0
    if init is not None:
        start = stack.enter_context(containers.open_checkpoint(init))
        outcome = initial.without_start(trained, start, xp, model)
    else:
        assert model is not None
        outcome, error = initial.without_own_start(trained, model, xp)
    plain = outcome.adapter
    if dtype is not None:
        outcome = cast_outcome(outcome, named_dtype(dtype))
    cast = measure((methods.METHODS["LORA"], plain), outcome, Request(xp))
    grade = cast.grade if error <= EQUIVALENT_ERROR else Grade.APPROXIMATE
    return outcome, Measured(grade, max(error, cast.error), cast.notes)


def find_edge(method: Method, a: Adapter, to: str) -> Edge:
    """The conversion from the adapter's encoding to `to`.

    Raises:
        Unsupported: there is none; the ones that there are are named.
    """
    edges = method.edges.get(a.encoding, ())
    for edge in edges:
        if edge.to == to:
            return edge
    ways = ", ".join(sorted({e.to for e in edges}))
    raise Unsupported(
        f"{a.method} in the {a.encoding} encoding cannot become {to!r}", hint=f"--to takes {ways} for it"
    )


def named_dtype(name: str) -> DType:
    """The dtype that a user names.

    Raises:
        UsageError: it is none that an adapter can be cast to.
    """
    if name not in CASTABLE:
        raise UsageError(f"no dtype {name!r:.40}", hint=f"one of {', '.join(CASTABLE)}")
    return CASTABLE[name]


def _request(
    method: Method,
    a: Adapter,
    edge: Edge | None,
    base: str | Path | None,
    base_dtype: str | None,
    max_error: float | None,
    warm_start: bool,
    device: str,
    stack: ExitStack,
    *,
    strict: bool = True,
) -> tuple[Request, Base | None, tuple[str, ...]]:
    """What the conversion may use, and the base; a base that the adapter names itself is used where one is needed."""
    wanted = Need.SHAPES in edge.needs if edge is not None else depends_on_shapes(method, a)
    shapes, notes = open_shapes(a, base, stack, wanted=wanted, strict=strict)
    known = None if base_dtype is None else named_dtype(base_dtype)
    return Request(TorchBackend(device), shapes, known, max_error, warm_start), shapes, notes


def depends_on_shapes(method: Method, a: Adapter) -> bool:
    """May it take the base's shapes to know what the adapter changes?"""
    return any(Need.SHAPES in edge.needs for edge in method.edges.get(a.encoding, ()))


def open_shapes(
    a: Adapter, base: str | Path | None, stack: ExitStack, *, wanted: bool, strict: bool = True
) -> tuple[Base | None, tuple[str, ...]]:
    """The base that was named; where one is wanted and none was, the one that the adapter names, if it is here.

    Args:
        strict: Must it have the adapter's modules under their names?

    Returns:
        The base, None if there is none, and notes.

    Raises:
        WrongBase: it lacks modules of the adapter.
    """
    path = hub.named_base(base)
    notes: tuple[str, ...] = ()
    if path is None and wanted:
        path = hub.implied_base(a.config)
        notes = () if path is None else (f"base: {path}, as the adapter names it",)
    if path is None:
        return None, notes
    shapes = stack.enter_context(Base(path, weights=False))
    if strict:
        shapes.require([f"{m}.weight" for m in a.modules], a.config)
    return shapes, notes


def cast_outcome(outcome: Outcome, dtype: DType) -> Outcome:
    """The outcome with its parameters in another dtype."""
    a = outcome.adapter
    method = methods.METHODS[a.method.upper()]
    new = casting.cast_to(method, a, dtype)
    notes = outcome.notes
    kept = sorted(method.keep_dtype & {n for params in new.modules.values() for n in params})
    if kept and dtype.name != "F32":
        notes = (*notes, f"{', '.join(kept)} stay F32: PEFT cannot load them in {dtype}")
    if new is a:
        return replace(outcome, notes=notes)
    return Outcome(new, min(outcome.grade, Grade.EQUIVALENT), outcome.dropped, notes)


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
    rendered = render(a)
    if a.changed:
        rendered = replace(rendered, files=card.mended(rendered.files, checkpoint, a))
    facts = containers.apack.Facts.after(checkpoint, a, measured.grade, measured.error, max_error, dropped)
    size = containers.write_checkpoint(
        rendered, target, overwrite=overwrite, sources=protected, facts=facts, dry_run=dry_run
    )
    return Conversion(
        output=str(target),
        method=a.method,
        encoding=a.encoding,
        bytes_in=checkpoint.bytes,
        bytes_out=size,
        grade=str(measured.grade),
        dropped=dropped,
        max_rel_error=measured.error,
        notes=outcome.notes,
    )
