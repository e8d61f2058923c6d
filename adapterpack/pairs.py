"""Adapter against adapter: pairs of changes of one base tensor, and how far they lie apart."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterpack import methods, plan
from adapterpack.accuracy import ModuleError, Sums, larger, ratio
from adapterpack.adapter import (
    Adapter,
    Change,
    Effect,
    Finding,
    Loaded,
    LowRank,
    Method,
    Progress,
    Request,
)
from adapterpack.backend import Backend
from adapterpack.base import Base
from adapterpack.errors import Unsupported, WrongBase
from adapterpack.methods import _lowrank
from adapterpack.methods._changes import ReplaceChange
from adapterpack.methods._formula import LoadedDense
from adapterpack.methods._parameters import LoadedStack
from adapterpack.tensor import DType, Shape, Tensor
from adapterpack.tiles import Lot

if TYPE_CHECKING:
    from adapterpack.backend import Array

_TILE = 1 << 20
"""Elements of a dense tile: 8 MiB of f64, and a few of them at a time."""


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
        model: Weights for changes that depend on W; without it those are compared by parameter. With it, errors are
            told in units in the last place too, if `largest` is wanted.
        largest: Find the largest absolute difference too, which takes the dense change tile by tile.
    """
    ours, theirs = _grouped_alike(x, y, request)
    comparison = _Comparison(request, model, largest)
    targets = list(dict.fromkeys([*ours, *theirs]))

    def done(n: int) -> None:
        if progress:
            progress("compare", n, len(targets))

    lot = Lot(request.xp, largest)
    for n, target in enumerate(targets):
        done(n)
        if target not in ours or target not in theirs:
            side = "B" if target not in theirs else "A"
            comparison.find("missing-module", target, f"{side} does not change it")
            continue
        comparison.add(_Pair(target, ours[target], theirs[target], request.xp), lot)
    lot.finish()
    done(len(targets))
    return comparison.results()


@dataclass
class _Comparison:
    """What was found so far. Figures of pairs in a `Lot` come last, so that errors are made of them at the end."""

    request: Request
    model: Base | None
    largest: bool

    def __post_init__(self) -> None:
        self._errors: dict[str, ModuleError | _Additive] = {}
        self._findings: list[Finding] = []
        self._by_parameter = self._without_ulps = 0

    def find(self, code: str, target: str, message: str, fix: str | None = None) -> None:
        self._findings.append(Finding(code, target, message, fix))

    def add(self, pair: _Pair, lot: Lot) -> None:
        mismatch = pair.mismatch()
        if mismatch:
            self.find("other-shape", pair.target, mismatch)
        elif pair.additive:
            self._errors[pair.target] = self._additive(pair, lot)
        elif self.model is not None:
            sums, dtype = pair.through(self.model)
            self._errors[pair.target] = sums.error(pair.target, pair.shape, dtype=dtype)
        else:
            error = pair.by_parts()
            self._by_parameter += pair.depends_on_weights
            if error is None:
                self.find("not-comparable", pair.target, "takes the base weights to compare", "--base BASE")
            else:
                self._errors[pair.target] = error

    def _additive(self, pair: _Pair, lot: Lot) -> _Additive:
        found = pair.deltas(lot)
        if self.model is not None and self.largest:
            try:
                # Weights alone: the norms were found without them, and better so.
                if found.same:
                    found.ulps = Sums(counted=math.prod(pair.shape)), self.model.tensor(pair.target).dtype
                else:
                    found.ulps = pair.through(self.model)
            except (WrongBase, Unsupported):
                self._without_ulps += 1
        return found

    def results(self) -> tuple[list[ModuleError], list[Finding], list[str]]:
        errors = [e.error() if isinstance(e, _Additive) else e for e in self._errors.values()]
        for error in errors:
            if not math.isfinite(error.rel_error):
                infinite = error.rel_error == math.inf
                reason = "A does not change it, B does" if infinite else "has NaN or infinite values"
                self.find("difference", error.name, reason)
        notes = []
        if self._by_parameter:
            notes.append(
                f"{self._by_parameter} modules depend on the base weights (DoRA, OFT and their like): without --base"
                " they were compared parameter by parameter"
            )
        if self._without_ulps:
            notes.append(
                f"{self._without_ulps} modules have no weights of 32 or 16 bits in the base: no units in the last"
                " place are told of them"
            )
        return errors, self._findings, notes


# -- what is compared with what ----------------------------------------------------------------------------


def _grouped_alike(
    x: tuple[Method, Adapter], y: tuple[Method, Adapter], request: Request
) -> tuple[dict[str, list[Change]], dict[str, list[Change]]]:
    """The changes of both by base tensor."""
    ours, theirs = _grouped(*x, request), _grouped(*y, request)
    if request.shapes is None:
        # A file may not say how many inputs a module has, or how a kernel is shaped; the other side may.
        asks = methods.depends_on_shapes(*x), methods.depends_on_shapes(*y)
        if asks == (True, False):
            ours = _grouped(*x, replace(request, shapes=_ShapesOf(ours, theirs)))
        elif asks == (False, True):
            theirs = _grouped(*y, replace(request, shapes=_ShapesOf(theirs, ours)))
    return ours, theirs


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

    def conv1d(self, module: str) -> bool | None:
        # The changes of an adapter are logical, (out, in).
        return False

    def inside(self, tensor: str) -> None:
        return None

    def modules(self) -> list[str]:
        return []


def _grouped(method: Method, adapter: Adapter, request: Request) -> dict[str, list[Change]]:
    grouped: dict[str, list[Change]] = {}
    for change in method.changes(adapter, request):
        grouped.setdefault(change.target, []).append(change)
    return grouped


# -- one base tensor ---------------------------------------------------------------------------------------


@dataclass
class _Additive:
    """What two sums of deltas differ by; complete when the `Lot` is finished.

    Attributes:
        ulps: The same through the weights, and their dtype; None without weights.
        same: Are they the very same factors?
    """

    target: str
    shape: Shape
    sums: Sums
    ranks: tuple[int | None, int | None]
    same: bool = False
    ulps: tuple[Sums, DType] | None = None

    def error(self) -> ModuleError:
        if self.ulps is None:
            return self.sums.error(self.target, self.shape, ranks=self.ranks)
        through, dtype = self.ulps
        self.sums.ulps, self.sums.max_ulp, self.sums.counted = through.ulps, through.max_ulp, through.counted
        return self.sums.error(self.target, self.shape, ranks=self.ranks, dtype=dtype)


@dataclass(frozen=True)
class _Pair:
    """The changes that two adapters make to one base tensor."""

    target: str
    x: list[Change]
    y: list[Change]
    xp: Backend

    @property
    def shape(self) -> Shape:
        return self.x[-1].shape

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
    def additive(self) -> bool:
        return all(c.effect is Effect.ADD for c in (*self.x, *self.y))

    @property
    def depends_on_weights(self) -> bool:
        return any(c.effect is Effect.TRANSFORM for c in (*self.x, *self.y))

    def deltas(self, lot: Lot) -> _Additive:
        """Two sums of deltas: by their factors in the lot where both have exact ones, else tile by tile, now."""
        xs, ys = ([c.load(self.xp) for c in side] for side in (self.x, self.y))
        pairs = _low_ranks(xs[0], ys[0]) if len(xs) == len(ys) == 1 else []
        ranks = (pairs[0][0].a.shape[0], pairs[0][1].a.shape[0]) if pairs else (None, None)
        found = _Additive(self.target, self.shape, Sums(), ranks)
        proofs = self.xp.for_proofs()
        if pairs and all(_lowrank.same(proofs, x, y) for x, y in pairs):
            found.same = True
            for x, _ in pairs:
                norm = _lowrank.norm(proofs, x)
                found.sums.add_norms(0.0, norm, norm, norm**2, 0.0)
            return found
        for x, y in pairs:
            lot.add(found.sums, x, y)
        if not pairs:
            if proofs.name != self.xp.name:
                xs, ys = ([c.load(proofs) for c in side] for side in (self.x, self.y))
            for rows in _tiles(self.shape):
                found.sums.add(_delta(xs, rows), _delta(ys, rows))
        return found

    def by_parts(self) -> ModuleError | None:
        """The worst error of a parameter: all that can be said without W."""
        error = ModuleError(self.target, 0.0, 0.0, shape=self.shape)
        if len(self.x) != len(self.y):
            return None
        proofs = self.xp.for_proofs()
        for x, y in zip(self.x, self.y, strict=True):
            ours, theirs = x.load(proofs).parts(), y.load(proofs).parts()
            if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
                return None
            for name, part in ours.items():
                max_abs, rel = _part_error(part, theirs[name])
                error = replace(
                    error,
                    max_abs_error=larger(error.max_abs_error, max_abs),
                    rel_error=larger(error.rel_error, rel),
                )
        return error

    def through(self, model: Base) -> tuple[Sums, DType]:
        """What both make of W, compared; and its dtype.

        Raises:
            WrongBase, Unsupported: there is no such W.
        """
        proofs = self.xp.for_proofs()
        sides: list[dict[str, list[plan.Step]]] = []
        for side in (self.x, self.y):
            steps: dict[str, list[plan.Step]] = {}
            for change in side:
                for name, step in plan.steps_of(change, model):
                    steps.setdefault(name, []).append(step)
            sides.append(steps)
        sums, dtype = Sums(), None
        for name in sides[0]:
            # A tied head is the embeddings, under a name that no file has.
            tensor = model.tensors[name if name in model.tensors else model.embedding or name]
            dtype = tensor.dtype
            x, y = (plan.LoadedSteps.read(tensor, side[name], proofs) for side in sides)
            for block in plan.blocks(tensor, [s for _, s in (*x.steps, *y.steps)], proofs, once=True):
                w = x.base(block)
                w64, after, other = proofs.f64(w), x.exact(w, block), y.exact(w, block)
                sums.add(after - w64, other - w64)
                sums.add_ulps(proofs, after - other, w64, after, dtype)
        assert dtype is not None
        return sums, dtype


def _tiles(shape: Shape) -> Iterator[slice]:
    """Rows of a logical change that are computed at a time."""
    height = max(1, _TILE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], height):
        yield slice(start, min(start + height, shape[0]))


def _low_ranks(x: Loaded, y: Loaded) -> list[tuple[LowRank, LowRank]]:
    """The factors of both, matrix by matrix; empty if one has none, or they are of other numbers."""
    if isinstance(x, LoadedDense) is not isinstance(y, LoadedDense):
        # The factors of a formula are a claim, and this is where it is put to the test: what it adds is compared.
        return []
    if isinstance(x, LoadedStack) and isinstance(y, LoadedStack):
        same = x.stack.experts == y.stack.experts
        return list(zip(x.low_ranks(), y.low_ranks(), strict=True)) if same else []
    low_x, low_y = x.low_rank(), y.low_rank()
    return [(low_x, low_y)] if low_x is not None and low_y is not None else []


def _delta(changes: list[Loaded], rows: slice) -> Array:
    """f64, the sum of what is added to these rows."""
    deltas = [c.delta(rows) for c in changes]
    return functools.reduce(operator.add, deltas)


def _replaced_rows(changes: list[Change]) -> list[frozenset[int] | None]:
    rows = [c.replaced.rows for c in changes if isinstance(c, ReplaceChange)]
    return [None if r is None else frozenset(r) for r in rows]


def _part_error(x: Array, y: Array) -> tuple[float, float]:
    """Largest absolute and relative difference of two parameters of one shape."""
    d = x.double() - y.double()
    max_abs = float(d.abs().max()) if d.numel() else 0.0
    return max_abs, ratio(float(d.norm()), float(x.double().norm()))


def worst(errors: Iterable[ModuleError]) -> float:
    """The largest relative error; NaN if one is."""
    return functools.reduce(larger, (e.rel_error for e in errors), 0.0)
