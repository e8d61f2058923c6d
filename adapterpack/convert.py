"""Convert an adapter to another encoding, method or dtype, and measure what that did to the change of W."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from adapterpack import (
    casting,
    containers,
    engines,
    hub,
    initial,
    methods,
    nearest,
    projections,
    serving,
    sources,
)
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
from adapterpack.containers import open_checkpoint
from adapterpack.conversion import Conversion, FactoredModule, inputs
from adapterpack.errors import Unsupported, UsageError
from adapterpack.measuring import Measured, measure, publish, refuse_loss
from adapterpack.methods._lora_variants import moved_base
from adapterpack.tensor import CASTABLE, DType


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
    rank: int | None = None,
    energy: float | None = None,
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
        base: Where the base's shapes are to be had; weights are read only where the change depends on them.
        base_dtype: The dtype of the base in training, where `base` does not tell.
        init: With `lora`: the adapter as it was before training, for PiSSA, OLoRA, CorDA and LoRA-GA.
        rank, energy: With `lora`: the nearest of this rank, or of the least rank that keeps this fraction of the
            squared singular values. They allow what they lose.
        max_error: The largest relative error allowed; None: nothing beyond `equivalent`. With `lora`, where none is
            exact, each module gets the least rank that keeps within.
        warm_start: With `full-logits`: make up the logits that a top-k file lacks.
        dry_run: Measure only; nothing is written.

    Raises:
        LossRefused: it would lose more than was allowed.
        Unsupported: there is no such conversion.
        WrongBase: it needs the base's shapes, or they do not fit.
        DestinationExists, UsageError, WriteFailed: see `io.atomic`.
    """
    wish = nearest.Wish(rank, energy, max_error)
    _check_wishes(to, dtype, engine, extra, layout, warm_start, init, wish)
    reader = None if engine is None else engines.named(engine)
    source, init = sources.here(source, subfolder), None if init is None else sources.here(init)
    target, protected = Path(destination).expanduser(), inputs(source, base, init)
    containers.check_target(target, overwrite=overwrite, sources=protected)
    with ExitStack() as stack:
        here = sources.base(base)
        opened = open_checkpoint(source, subfolder=subfolder, allow_pickle=allow_pickle, base=here, foreign=True)
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
            method, adapter, edge, base, base_dtype, wish, warm_start, device, stack, strict=layout is None
        )
        steps = _first(method, adapter, to, edge, wish, request, model, progress)
        if layout is not None:
            steps.relay(layout)
        if reader is not None:
            steps.serve(reader, extra)
        outcome, measured = steps.end(None if dtype is None else named_dtype(dtype))
        if max_error is not None or not (rank or energy):
            refuse_loss(measured, max_error)
        outcome = replace(outcome, notes=base_notes + outcome.notes + measured.notes)
        result = publish(checkpoint, outcome, measured, target, protected, overwrite=overwrite, dry_run=dry_run)
        serve = None if reader is None else serving.command(reader, outcome.adapter, target)
        return replace(result, serve=serve, factored=steps.factored)


def _check_wishes(
    to: str | None,
    dtype: str | None,
    engine: str | None,
    extra: str,
    layout: str | None,
    warm_start: bool,
    init: str | Path | None,
    wish: nearest.Wish,
) -> None:
    """Raise UsageError for wishes that do not go together."""
    wish.check()
    if (wish.rank or wish.energy) and to != "lora":
        raise UsageError("--rank and --energy go with --to lora")
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


def _first(
    method: Method,
    a: Adapter,
    to: str | None,
    edge: Edge | None,
    wish: nearest.Wish,
    request: Request,
    model: Base | None,
    progress: Progress | None,
) -> _Steps:
    """To the encoding or method that was named: by the method's own conversion, or to the nearest LoRA."""
    if to == "lora" and (wish.rank or wish.energy or not nearest.is_exact(method, a, request)):
        found = nearest.lora(method, a, wish, request, progress=progress)
        made = found.outcome
        steps = _Steps((methods.METHODS["LORA"], made.adapter), made, request, model, progress)
        steps.error, steps.factored = found.error, found.modules
        return steps
    outcome = Outcome(a, Grade.LOSSLESS)
    if edge is not None:
        if progress:
            progress("convert", 0, 1)
        outcome = edge.run(a, request)
    return _Steps((method, a), outcome, request, model, progress)


class _Steps:
    """Conversions one after the other, each measured against what it was made of.

    Attributes:
        error: The sum of what they lost, each by its worst module.
        factored: The modules of a nearest LoRA.
    """

    def __init__(
        self,
        before: tuple[Method, Adapter],
        outcome: Outcome,
        request: Request,
        model: Base | None,
        progress: Progress | None,
    ) -> None:
        self._before = before
        self._outcome, self._comparable = outcome, outcome.adapter
        self._request, self._model, self._progress = request, model, progress
        self.error, self._notes = 0.0, tuple[str, ...]()
        self.factored: tuple[FactoredModule, ...] = ()

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
        self.error += prepared.error
        self._notes = (*self._notes, *serving.advice(reader, prepared.outcome.adapter))

    def end(self, dtype: DType | None) -> tuple[Outcome, Measured]:
        """What came of it, and how far it is from the source."""
        if dtype is not None:
            comparable = cast_outcome(replace(self._outcome, adapter=self._comparable), dtype).adapter
            self._outcome, self._comparable = cast_outcome(self._outcome, dtype), comparable
        last = self._measure(replace(self._outcome, adapter=self._comparable))
        equivalent = last.grade is not Grade.APPROXIMATE and self.error <= EQUIVALENT_ERROR
        grade = last.grade if equivalent else Grade.APPROXIMATE
        return self._outcome, Measured(grade, self.error, (*self._notes, *last.notes))

    def _measure(self, outcome: Outcome) -> Measured:
        measured = measure(self._before, outcome, self._request, self._model, self._progress)
        self.error += measured.error
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
    model = sources.open_base(base, stack)
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


def find_edge(method: Method, a: Adapter, to: str) -> Edge | None:
    """The conversion from the adapter's encoding to `to`; None for the nearest LoRA, which all have.

    Raises:
        Unsupported: there is none; the ones that there are are named.
    """
    edges = method.edges.get(a.encoding, ())
    for edge in edges:
        if edge.to == to:
            return edge
    if to == "lora":
        return None
    ways = ", ".join(sorted({"lora", *(e.to for e in edges)}))
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
    wish: nearest.Wish,
    warm_start: bool,
    device: str,
    stack: ExitStack,
    *,
    strict: bool = True,
) -> tuple[Request, Base | None, tuple[str, ...]]:
    """What the conversion may use, and the base; a base that the adapter names itself is used where one is needed."""
    wanted = Need.SHAPES in edge.needs if edge is not None else methods.depends_on_shapes(method, a)
    shapes, notes = open_shapes(a, base, stack, wanted=wanted, strict=strict)
    known = None if base_dtype is None else named_dtype(base_dtype)
    return Request(TorchBackend(device), shapes, known, wish.max_error, warm_start), shapes, notes


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
    place = None if base is None else sources.base_headers(base)
    notes: tuple[str, ...] = ()
    if place is None and wanted:
        place = hub.implied_base(a.config)
        notes = () if place is None else (f"base: {place}, as the adapter names it",)
    if place is None:
        return None, notes
    shapes = stack.enter_context(Base(place, weights=False))
    if strict:
        shapes.require([t for t in a.targets() if t not in a.replaced], a.config)
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
