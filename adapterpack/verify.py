"""Do two adapters, or an adapter and a merged model, compute the same change of W?"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterpack import containers, lineage, merged_model, methods, plan, sources
from adapterpack.adapter import (
    EQUIVALENT_ERROR,
    Adapter,
    Change,
    Effect,
    Finding,
    Loaded,
    LowRank,
    Method,
    ModuleError,
    Progress,
    Request,
)
from adapterpack.backend import Backend, TorchBackend
from adapterpack.base import CONFIG, INDEX, SINGLE, Base
from adapterpack.errors import AdapterpackError, InvalidFile, UsageError, WrongBase
from adapterpack.methods import _lowrank
from adapterpack.methods._changes import ReplaceChange
from adapterpack.methods._formula import LoadedDense
from adapterpack.methods._parameters import LoadedStack
from adapterpack.tensor import DType, Shape, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array

_TILE_ROWS = 512


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        equal: Every error within the bound and no findings.
        max_error: The bound: largest rel_error allowed.
        modules: One entry for each changed base tensor, worst first.
        findings: Missing modules, other shapes, NaN.
        notes: How it was compared, where that is not plain.
    """

    equal: bool
    max_error: float
    max_abs_error: float
    max_rel_error: float
    modules: tuple[ModuleError, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def verify(
    a: str | Path,
    b: str | Path,
    *,
    base: str | Path | None = None,
    max_error: float | None = None,
    device: str = "auto",
    subfolder: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Compare adapter A, the reference, with adapter B, or with the merged model B of `base`.

    Args:
        a: The reference adapter.
        b: An adapter, or a model directory when `base` is given.
        base: The base model; needed for changes that depend on W (DoRA), and for a merged model that has no
            lineage.
        max_error: Largest relative error of a module that counts as equal. None: 5e-6 between adapters, and
            nothing beyond the rounding of the dtype for a merged model.
        device: Where the maths runs.
        subfolder: Which adapter of A, if there are several.

    Raises:
        UsageError: B is a model and no base is given.
        WrongBase, InvalidFile, Unsupported: one of them cannot be read.
    """
    xp = TorchBackend(device)
    with ExitStack() as stack:
        here = sources.base(base)
        a, b = sources.here(a, subfolder), sources.model_here(b)
        source = stack.enter_context(
            containers.open_checkpoint(a, subfolder=subfolder, allow_pickle=allow_pickle, base=here, foreign=True)
        )
        source.prove()
        method_a, adapter_a = methods.parse(source)
        model = _open_base(base, stack)
        if _is_model(b):
            return _against_model((method_a, adapter_a), b, model, xp, max_error, stack, progress)
        other = stack.enter_context(containers.open_checkpoint(b, allow_pickle=allow_pickle, base=here))
        other.prove()
        method_b, adapter_b = methods.parse(other)
        bound = EQUIVALENT_ERROR if max_error is None else max_error
        request = Request(xp=xp, shapes=model, max_error=bound)
        if model is not None:
            model.bind([*adapter_a.targets(), *adapter_b.targets()])
        errors, findings, notes = compare(
            (method_a, adapter_a), (method_b, adapter_b), request, model=model, progress=progress
        )
        return _verdict(errors, findings, notes, bound=bound)


def _against_model(
    a: tuple[Method, Adapter],
    path: Path,
    model: Base | None,
    xp: Backend,
    max_error: float | None,
    stack: ExitStack,
    progress: Progress | None,
) -> Verification:
    """Hold a merged model against what the adapter makes of the base, and against its own lineage."""
    merged = stack.enter_context(Base(path))
    story = lineage.read(path)
    notes = ["errors of a merged model hold the rounding of its dtype; findings are what goes beyond it"]
    if model is None and story is not None:
        # Named by a file, not by the user: nothing is fetched for it.
        model = stack.enter_context(Base(sources.base_at_hand(story.base, story.commit)))
        notes.append(f"base: {story.base}, as {lineage.NAME} says")
    if model is None:
        raise UsageError(f"{path} is a model: name what it was merged into", hint="--base BASE")
    adapters, weights = [a], [1.0]
    if story is not None:
        notes += _changes_since(story, merged, model)
        adapters, weights = _merged_with(a, story, stack)
        if a[1].source.digest() not in [s.sha256 for s in story.adapters]:
            said = ", ".join(s.reference for s in story.adapters)
            notes.append(f"{lineage.NAME} says that other files were merged: {said}")
        elif len(adapters) > 1:
            notes.append(f"merged from {len(adapters)} adapters, as {lineage.NAME} says; all were applied, in order")
    merge_plan = plan.make(adapters, model, weights=weights)
    errors, findings = merged_model.compare(
        merge_plan, model, merged, xp, max_error=max_error or 0.0, progress=progress
    )
    return _verdict(errors, findings, notes, bound=math.inf)


def _changes_since(story: lineage.Lineage, merged: Base, model: Base) -> list[str]:
    """Weight files that are not those of the merge any more. Their tensors may be: that is compared."""
    sides = (("the merged model", story.shards, merged), ("the base", story.base_shards, model))
    return [
        f"{name} of {side} has another size or header than the merge recorded"
        for side, recorded, now in sides
        for name in lineage.differences(recorded, now)
    ]


def _merged_with(
    a: tuple[Method, Adapter], story: lineage.Lineage, stack: ExitStack
) -> tuple[list[tuple[Method, Adapter]], list[float]]:
    """All adapters of a merge and their weights, if A is among them; else A alone."""
    sha256 = a[1].source.digest()
    if sha256 not in [s.sha256 for s in story.adapters]:
        return [a], [1.0]
    adapters = []
    for source in story.adapters:
        if source.sha256 == sha256:
            adapters.append(a)
            continue
        hint = f"the model was merged from {len(story.adapters)} adapters; put it where it was"
        try:
            checkpoint = stack.enter_context(containers.open_checkpoint(sources.here(source.reference, cached=True)))
        except AdapterpackError as e:
            raise InvalidFile(f"{source.reference}, merged too, cannot be read: {e.message}", hint=hint) from e
        found = lineage.Source.of(source.reference, checkpoint, source.weight)
        if found != source:
            raise InvalidFile(f"{source.reference} is not the adapter that was merged", hint=hint)
        adapters.append(methods.parse(checkpoint))
    return adapters, [s.weight for s in story.adapters]


def _open_base(base: str | Path | None, stack: ExitStack) -> Base | None:
    return sources.open_base(base, stack)


def _is_model(path: Path) -> bool:
    return (path / CONFIG).exists() and ((path / SINGLE).exists() or (path / INDEX).exists())


def _verdict(errors: list[ModuleError], findings: list[Finding], notes: list[str], *, bound: float) -> Verification:
    worst = sorted(errors, key=lambda e: -e.rel_error if e.rel_error == e.rel_error else -math.inf)
    max_rel = max((e.rel_error for e in errors), default=0.0)
    max_abs = max((e.max_abs_error for e in errors), default=0.0)
    return Verification(
        equal=not findings and max_rel <= bound,
        max_error=bound,
        max_abs_error=max_abs,
        max_rel_error=max_rel,
        modules=tuple(worst),
        findings=tuple(findings),
        notes=tuple(notes),
    )


# -- adapter against adapter ---------------------------------------------------------------------------


def compare(
    x: tuple[Method, Adapter],
    y: tuple[Method, Adapter],
    request: Request,
    *,
    model: Base | None = None,
    largest: bool = True,
    progress: Progress | None = None,
) -> tuple[list[ModuleError], list[Finding], list[str]]:
    """Errors of every base tensor that x (the reference) or y changes, findings, and notes.

    Args:
        model: Weights for changes that depend on W; without it those are compared by parameter.
        largest: Find the largest absolute difference too, which takes the dense change tile by tile.
    """
    ours, theirs = _grouped(*x, request), _grouped(*y, request)
    if request.shapes is None:
        # A file may not say how many inputs a module has, or how a kernel is shaped; the other side may.
        asks = methods.depends_on_shapes(*x), methods.depends_on_shapes(*y)
        if asks == (True, False):
            ours = _grouped(*x, replace(request, shapes=_ShapesOf(ours, theirs)))
        elif asks == (False, True):
            theirs = _grouped(*y, replace(request, shapes=_ShapesOf(theirs, ours)))
    errors: list[ModuleError] = []
    findings: list[Finding] = []
    by_parameter: list[str] = []
    targets = list(dict.fromkeys([*ours, *theirs]))
    for n, target in enumerate(targets):
        if progress:
            progress("compare", n, len(targets))
        if target not in ours or target not in theirs:
            side = "B" if target not in theirs else "A"
            findings.append(Finding("missing-module", target, f"{side} does not change it"))
            continue
        pair = _Pair(target, ours[target], theirs[target], request.xp)
        mismatch = pair.mismatch()
        if mismatch:
            findings.append(Finding("other-shape", target, mismatch))
            continue
        error = pair.error(model, largest)
        if pair.depends_on_weights and model is None:
            by_parameter.append(target)
        if error is None:
            findings.append(Finding("not-comparable", target, "takes the base weights to compare", "--base BASE"))
            continue
        if not math.isfinite(error.rel_error):
            infinite = error.rel_error == math.inf
            reason = "A does not change it, B does" if infinite else "has NaN or infinite values"
            findings.append(Finding("difference", target, reason))
        errors.append(error)
    if progress:
        progress("compare", len(targets), len(targets))
    notes = []
    if by_parameter:
        notes.append(
            f"{len(by_parameter)} modules depend on the base weights (DoRA, OFT and their like): without --base they"
            " were compared parameter by parameter"
        )
    return errors, findings, notes


class _ShapesOf:
    """The shapes that another adapter's changes have, as a base would tell them.

    A module that only one side changes is a finding, not an error: it keeps its own shape.
    """

    dtype: DType | None = None

    def __init__(self, own: Mapping[str, list[Change]], other: Mapping[str, list[Change]]) -> None:
        self._shapes = {t: c[-1].shape for t, c in {**own, **other}.items()}

    def shape(self, tensor: str) -> Shape:
        return self._shapes[tensor]

    def has(self, tensor: str) -> bool:
        return tensor in self._shapes

    def tensor(self, target: str) -> Tensor:
        raise WrongBase(f"the values of {target} are wanted, and there is no base", hint="--base BASE")

    def modules(self) -> list[str]:
        return []

    def conv1d(self, module: str) -> bool | None:
        # The changes of an adapter are logical, (out, in).
        return False

    def inside(self, tensor: str) -> None:
        return None


def _grouped(method: Method, adapter: Adapter, request: Request) -> dict[str, list[Change]]:
    grouped: dict[str, list[Change]] = {}
    for change in method.changes(adapter, request):
        grouped.setdefault(change.target, []).append(change)
    return grouped


@dataclass(frozen=True)
class _Pair:
    """The changes that two adapters make to one base tensor."""

    target: str
    x: list[Change]
    y: list[Change]
    xp: Backend

    def mismatch(self) -> str | None:
        x, y = self.x[-1].shape, self.y[-1].shape
        if x != y:
            return f"A changes {x}, B {y}"
        if [c.effect is Effect.REPLACE for c in self.x] != [c.effect is Effect.REPLACE for c in self.y]:
            return "one replaces the tensor, the other does not"
        if _replaced_rows(self.x) != _replaced_rows(self.y):
            return "the two replace different rows"
        return None

    @property
    def depends_on_weights(self) -> bool:
        return any(c.effect is Effect.TRANSFORM for c in (*self.x, *self.y))

    def error(self, model: Base | None, largest: bool) -> ModuleError | None:
        """How far the two lie apart; None if it takes W to know."""
        if all(c.effect is Effect.ADD for c in (*self.x, *self.y)):
            return self._additive(largest)
        return self._through(model) if model is not None else self._by_parts()

    def _additive(self, largest: bool) -> ModuleError:
        xs, ys = ([c.load(self.xp) for c in side] for side in (self.x, self.y))
        difference = reference = None
        if len(xs) == len(ys) == 1 and (pairs := _low_ranks(xs[0], ys[0])):
            if all(_lowrank.same(self.xp, x, y) for x, y in pairs):
                return ModuleError(self.target, 0.0, 0.0)
            difference = math.hypot(*(_lowrank.distance(self.xp, x, y) for x, y in pairs))
            reference = math.hypot(*(_lowrank.norm(self.xp, x) for x, _ in pairs))
            if not largest:
                return ModuleError(self.target, math.nan, _ratio(difference, reference))
        squares_d = squares_r = max_abs = 0.0
        for start in range(0, self.x[0].shape[0], _TILE_ROWS):
            rows = slice(start, start + _TILE_ROWS)
            dx, dy = _delta(xs, rows), _delta(ys, rows)
            d = dx - dy
            max_abs = _max(max_abs, float(d.abs().max()))
            squares_d += float((d * d).sum())
            squares_r += float((dx * dx).sum())
        if difference is None or reference is None:
            difference, reference = math.sqrt(squares_d), math.sqrt(squares_r)
        return ModuleError(self.target, max_abs, _ratio(difference, reference))

    def _by_parts(self) -> ModuleError | None:
        """The worst error of a parameter: all that can be said without W."""
        error = ModuleError(self.target, 0.0, 0.0)
        if len(self.x) != len(self.y):
            return None
        for x, y in zip(self.x, self.y, strict=True):
            ours, theirs = x.load(self.xp).parts(), y.load(self.xp).parts()
            if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
                return None
            for name, part in ours.items():
                e = _dense_error(self.target, part, theirs[name], part)
                error = ModuleError(
                    self.target,
                    _max(error.max_abs_error, e.max_abs_error),
                    _max(error.rel_error, e.rel_error),
                )
        return error

    def _through(self, model: Base) -> ModuleError:
        tensor = model.tensor(self.target)
        sides = []
        for side in (self.x, self.y):
            own = [step for c in side for _, step in plan.steps_of(c, model)]
            sides.append(plan.LoadedSteps.read(tensor, own, self.xp))
        squares_d = squares_r = max_abs = 0.0
        steps = [s for loaded in sides for _, s in loaded.steps]
        for block in plan.blocks(tensor, steps, self.xp, once=True):
            w = sides[0].base(block)
            x, y = (loaded.exact(w, block)[0] for loaded in sides)
            d, reference = x - y, x - self.xp.f64(w)
            max_abs = _max(max_abs, float(abs(d).max()))
            squares_d += float((d * d).sum())
            squares_r += float((reference * reference).sum())
        return ModuleError(self.target, max_abs, _ratio(math.sqrt(squares_d), math.sqrt(squares_r)))


def _low_ranks(x: Loaded, y: Loaded) -> list[tuple[LowRank, LowRank]]:
    """The factors of both, matrix by matrix; empty if one has none, or they are of other numbers."""
    if isinstance(x, LoadedStack) and isinstance(y, LoadedStack):
        same = x.stack.experts == y.stack.experts
        return list(zip(x.low_ranks(), y.low_ranks(), strict=True)) if same else []
    if isinstance(x, LoadedDense) is not isinstance(y, LoadedDense):
        # The factors of a formula are a claim, and this is where it is put to the test: what it adds is compared.
        return []
    low_x, low_y = x.low_rank(), y.low_rank()
    return [(low_x, low_y)] if low_x is not None and low_y is not None else []


def _delta(changes: list[Loaded], rows: slice) -> Array:
    """f64, the sum of what is added to these rows."""
    deltas = [c.delta(rows) for c in changes]
    return functools.reduce(operator.add, deltas)


def _replaced_rows(changes: list[Change]) -> list[frozenset[int] | None]:
    rows = [c.replaced.rows for c in changes if isinstance(c, ReplaceChange)]
    return [None if r is None else frozenset(r) for r in rows]


def _dense_error(target: str, x: Array, y: Array, reference: Array) -> ModuleError:
    d = x.double() - y.double()
    max_abs = float(d.abs().max()) if d.numel() else 0.0
    return ModuleError(target, max_abs, _ratio(float(d.norm()), float(reference.double().norm())))


def _ratio(difference: float, reference: float) -> float:
    if difference == 0:
        return 0.0
    return difference / reference if reference else math.inf


def _max(a: float, b: float) -> float:
    """The larger one; NaN wins, so that it is seen."""
    return b if b != b or b > a else a


def worst(errors: Iterable[ModuleError]) -> float:
    """The largest relative error; NaN if one is."""
    result = 0.0
    for e in errors:
        result = _max(result, e.rel_error)
    return result
