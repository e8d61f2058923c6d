"""How two adapters change each base tensor: the sizes of both changes, of their difference, and the angle between."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adapterpack import plan
from adapterpack.adapter import Adapter, Change, Effect, Loaded, LowRank, Method, Progress, Request
from adapterpack.backend import Array, Backend
from adapterpack.base import Base
from adapterpack.errors import AdapterpackError, Unsupported, WrongBase
from adapterpack.methods import _lowrank
from adapterpack.methods._parameters import LoadedStack

_TILE_ROWS = 512
_CANCELS = 1e-6
CHANGE, VALUES, PARAMETERS = "change of W", "new values", "parameters"
Side = tuple[Method, Adapter]


@dataclass(frozen=True)
class ModuleMove:
    """One base tensor that A or B changes. Norms are Frobenius norms in f64; NaN where values are not finite.

    Attributes:
        name: The base tensor.
        measure: What the norms are of: the change of W, the new values of a tensor that is replaced, or, where the
            change depends on a W that is not at hand, all parameters of the module.
        norm_a, norm_b: Of each side; None where that side does not change it.
        norm_difference: Of their difference; None where one does not change it, or their shapes differ.
        relative: norm_difference / norm_a; 0/0 is 0.
        cosine: Of the angle between the two; None where there is none.
        note: Why something is None.
    """

    name: str
    measure: str
    norm_a: float | None
    norm_b: float | None
    norm_difference: float | None
    relative: float | None
    cosine: float | None
    note: str | None = None


def movements(
    a: Side, b: Side, xp: Backend, model: Base | None, progress: Progress | None = None
) -> tuple[list[ModuleMove], list[str]]:
    """One entry for each base tensor that one of them changes, the one that moved most first; and notes.

    Args:
        model: The base with its weights, bound to the names of both; None: none was named.
    """
    notes: list[str] = []
    request = Request(xp, model)
    sides: list[dict[str, list[Change]]] = []
    for name, (method, adapter) in zip("AB", (a, b), strict=True):
        try:
            sides.append(_grouped(method, adapter, request))
        except AdapterpackError as e:
            return [], [f"what {name} does to its modules was not compared: {e.message}"]
    ours, theirs = sides
    targets = list(dict.fromkeys([*ours, *theirs]))
    moves = []
    for n, target in enumerate(targets):
        if progress:
            progress("modules", n, len(targets))
        moves.append(_move(target, ours.get(target, []), theirs.get(target, []), xp, model))
    if progress:
        progress("modules", len(targets), len(targets))
    if any(m.measure == PARAMETERS for m in moves):
        notes.append("some changes depend on W: without --base their parameters were compared")
    return sorted(moves, key=_rank, reverse=True), notes


def _grouped(method: Method, adapter: Adapter, request: Request) -> dict[str, list[Change]]:
    grouped: dict[str, list[Change]] = {}
    for change in method.changes(adapter, request):
        grouped.setdefault(change.target, []).append(change)
    return grouped


def _rank(m: ModuleMove) -> tuple[int, float]:
    """What one side alone changes first, then what has no number, then by how far it moved."""
    if m.norm_a is None or m.norm_b is None:
        return 3, m.norm_a or m.norm_b or 0.0
    if m.relative is None or m.relative != m.relative:
        return 2, 0.0
    return 1, m.relative


def _move(target: str, xs: list[Change], ys: list[Change], xp: Backend, model: Base | None) -> ModuleMove:
    both = [*xs, *ys]
    measure = CHANGE
    if any(c.effect is not Effect.ADD for c in both) and model is None:
        measure = VALUES if all(c.effect is Effect.REPLACE for c in both) else PARAMETERS
    if xs and ys and xs[-1].shape != ys[-1].shape:
        note = f"A changes {xs[-1].shape}, B {ys[-1].shape}"
        return ModuleMove(target, measure, None, None, None, None, None, note)
    try:
        if measure != CHANGE:
            sums = _by_parts(xs, ys, xp)
        elif all(c.effect is Effect.ADD for c in both):
            sums = _additive(xs, ys, xp)
        else:
            assert model is not None
            sums = _through(target, xs, ys, xp, model)
    except (Unsupported, WrongBase) as e:
        return ModuleMove(target, measure, None, None, None, None, None, e.message)
    return sums.move(target, measure, bool(xs), bool(ys))


class _Sums:
    """Squares of norms, and the inner product.

    Attributes:
        alike: Can the two be subtracted?
    """

    def __init__(self) -> None:
        self.a = self.b = self.d = self.ab = 0.0
        self.alike = True

    def add(self, x: Array | None, y: Array | None) -> None:
        """Two blocks of f64, one None where that side has none."""
        if x is not None:
            self.a += float((x * x).sum())
        if y is not None:
            self.b += float((y * y).sum())
        if x is not None and y is not None:
            d = x - y
            self.d += float((d * d).sum())
            self.ab += float((x * y).sum())

    def add_low_rank(self, xp: Backend, x: LowRank | None, y: LowRank | None) -> None:
        """The same of two products, from their factors alone."""
        if x is not None and y is not None and _lowrank.same(xp, x, y):
            square = _square(xp, x)
            self.a, self.b, self.ab = self.a + square, self.b + square, self.ab + square
            return
        self.a += 0.0 if x is None else _square(xp, x)
        self.b += 0.0 if y is None else _square(xp, y)
        if x is not None and y is not None:
            self.d += _lowrank.distance(xp, x, y) ** 2
            self.ab += _inner(x, y)

    def move(self, target: str, measure: str, has_a: bool, has_b: bool) -> ModuleMove:
        """The numbers; what only one side has is not subtracted."""
        norm_a, norm_b = (math.sqrt(n) if has else None for n, has in ((self.a, has_a), (self.b, has_b)))
        if norm_a is None or norm_b is None:
            note = f"only {'A' if has_a else 'B'} changes it"
            return ModuleMove(target, measure, norm_a, norm_b, None, None, None, note)
        if not self.alike:
            note = "their parameters have other shapes"
            return ModuleMove(target, measure, norm_a, norm_b, None, None, None, note)
        difference = math.sqrt(self.d)
        relative = 0.0 if difference == 0 else difference / norm_a if norm_a else math.inf
        cosine = None
        if norm_a and norm_b:
            cosine = self.ab / (norm_a * norm_b)
            cosine = max(-1.0, min(1.0, cosine)) if cosine == cosine else cosine
        return ModuleMove(target, measure, norm_a, norm_b, difference, relative, cosine)


def _inner(x: LowRank, y: LowRank) -> float:
    """<B1 A1, B2 A2> in f64: the sum of (B1^T B2) * (A1 A2^T), r by r."""
    grams = (x.b.double().T @ y.b.double()) * (x.a.double() @ y.a.double().T)
    return float(grams.sum()) * x.scale * y.scale


def _square(xp: Backend, f: LowRank) -> float:
    """The squared norm of a product, by its inner product with itself, a fraction of the work of two QR."""
    square = _inner(f, f)
    largest = (float(f.b.double().norm()) * float(f.a.double().norm()) * f.scale) ** 2
    # Where much cancels the sum would lose its digits.
    return square if square > _CANCELS * largest else _lowrank.norm(xp, f) ** 2


def _additive(xs: list[Change], ys: list[Change], xp: Backend) -> _Sums:
    sums = _Sums()
    loaded_x, loaded_y = ([c.load(xp) for c in side] for side in (xs, ys))
    factors = _factors(loaded_x, loaded_y)
    if factors is not None:
        for x, y in factors:
            sums.add_low_rank(xp, x, y)
        return sums
    for start in range(0, (xs or ys)[0].shape[0], _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        sums.add(*(_delta(side, rows) if side else None for side in (loaded_x, loaded_y)))
    return sums


def _factors(xs: list[Loaded], ys: list[Loaded]) -> list[tuple[LowRank | None, LowRank | None]] | None:
    """The factors of both sides, matrix by matrix; None if one has none, or they are of other numbers."""
    if len(xs) > 1 or len(ys) > 1:
        return None
    sides = [list(_low_ranks(side[0])) if side else None for side in (xs, ys)]
    if any(side == [] for side in sides):
        return None
    x, y = sides
    if x is None or y is None:
        return [(f, None) for f in x or ()] + [(None, f) for f in y or ()]
    return list(zip(x, y, strict=True)) if len(x) == len(y) else None


def _low_ranks(change: Loaded) -> Iterator[LowRank]:
    if isinstance(change, LoadedStack):
        yield from change.low_ranks()
    elif (low := change.low_rank()) is not None:
        yield low


def _delta(changes: list[Loaded], rows: slice) -> Array:
    return functools.reduce(operator.add, (c.delta(rows) for c in changes))


def _by_parts(xs: list[Change], ys: list[Change], xp: Backend) -> _Sums:
    """Over all parameters as one vector: what can be said without W."""
    sums = _Sums()
    ours, theirs = (_parts(side, xp) for side in (xs, ys))
    if xs and ys:
        sums.alike = {n: tuple(p.shape) for n, p in ours.items()} == {n: tuple(p.shape) for n, p in theirs.items()}
    for name in dict.fromkeys([*ours, *theirs]):
        x, y = (xp.f64(side[name]) if name in side else None for side in (ours, theirs))
        if sums.alike:
            sums.add(x, y)
        else:
            sums.add(x, None)
            sums.add(None, y)
    return sums


def _parts(changes: list[Change], xp: Backend) -> Mapping[str, Array]:
    return {f"{n}.{name}": part for n, c in enumerate(changes) for name, part in c.load(xp).parts().items()}


def _through(target: str, xs: list[Change], ys: list[Change], xp: Backend, model: Base) -> _Sums:
    """W' - W of both, block by block."""
    sums = _Sums()
    tensor = model.tensor(target)
    sides = []
    for side in (xs, ys):
        steps = [step for c in side for _, step in plan.steps_of(c, model)]
        sides.append(plan.LoadedSteps.read(tensor, steps, xp))
    every = [s for loaded in sides for _, s in loaded.steps]
    for block in plan.blocks(tensor, every, xp, once=True):
        w = sides[0].base(block)
        reference = xp.f64(w)
        x, y = (loaded.exact(w, block) - reference if loaded.steps else None for loaded in sides)
        sums.add(x, y)
    return sums
