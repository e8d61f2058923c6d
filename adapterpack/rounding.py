"""One tensor of a merged model against exact arithmetic: what honest rounding explains, and what it does not.

An honest merge ends with a rounding to the dtype of the base. Three kinds are told apart, each with its own bound
on every single weight, so that a coarse one is no excuse in a model that was merged with a fine one:
- `once`: f32 or better throughout, one rounding at the end. Within half a unit in the last place, and f32's noise.
- `twice`: the change is rounded to the dtype, then the sum (PEFT's `safe_merge=True`).
- `low-precision`: all of it in the dtype of the base. It moves many weights by a unit, or it was not that.
Below the rounding no single weight tells anything; all of them together do: honest differences do not lean along
the change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterpack import exactness, plan
from adapterpack.accuracy import TINY, Sums, ulp, xp_maximum
from adapterpack.adapter import Block, Effect
from adapterpack.tensor import DType, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend
    from adapterpack.base import Base

_UNIT = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""The largest relative error of one rounding."""
_F32 = 1.01 * 2.0**-24
_BIAS, _LOW_BIAS = 1e-3, 8e-3
"""Honest rounding is unbiased; the share of the change that may be missing on average all the same. In low precision
the factors themselves were rounded."""
_LEAN, _ROWS_LEAN = 6.0, 4.5
"""Standard deviations, of the sum over all weights and of that over rows, of which there are fewer."""
_MOST_F32 = 2.0**-18
"""Of the largest weight, more than f32 arithmetic ever loses: where our own merge is farther off, PEFT rounds to 16
bits on its way."""
_SPREAD = 0.5
"""Of the rows and columns that flipped weights would hit if they lay anywhere: faults lie in some place."""
_SHARE = 2e-3
"""Of the weights so near to a tie that low precision may tip them, at least this share is tipped if it was that."""


@dataclass(frozen=True)
class Grid:
    """What values a tensor can have, and so how coarse honest rounding may be.

    Attributes:
        dtype: Of the tensor.
        unit: Half a unit in the last place, relative.
        tiny: Half the smallest step, absolute.
        base: Is W itself rounded on the way, from the values that a quantised base stands for?
        coarse: Is it FP8? W lies on the grid then, so that small changes are lost one-sidedly.
    """

    dtype: DType
    unit: float
    tiny: float
    base: bool
    coarse: bool

    @classmethod
    def of(cls, dtype: DType, tensor: Tensor, base: Base, merged: Base, name: str) -> Grid:
        quantised = base.scheme is not None and name in base.scheme.consumed
        if merged.scheme is None or name not in merged.scheme.consumed:
            return cls(dtype, _UNIT[dtype.name], TINY[dtype.name], quantised, False)
        # 3 bits of mantissa; the smallest step is 2^-9 of a scale, and a scale at most twice amax / 448.
        rows, width = plan.as_matrix(tensor.shape)
        parts = (tensor.rows(*bounds).astype("float32") for bounds in exactness.cut(rows, width))
        amax = max((float(abs(part).max()) for part in parts), default=0.0)
        return cls(dtype, 2.0**-4, amax * 2 / 448 * 2.0**-10, quantised, True)


@dataclass(frozen=True)
class _Part:
    """Some rows of a tensor, all f64.

    Attributes:
        row: Of the tensor, the first one.
        base, theirs, exact, ours: Before, in the merged model, exactly, and as our own merge has it.
        noise: How far f32 arithmetic may stray.
        once: How far from `exact` a single rounding may end.
        rough: Does PEFT's own arithmetic end farther off, in `ours`?
        rounded: Sum of the magnitudes that are rounded on the way, change by change.
        effects: Of the changes.
    """

    row: int
    base: Array
    theirs: Array
    exact: Array
    ours: Array
    noise: Array
    once: Array
    rough: bool
    rounded: Array
    effects: tuple[Effect, ...]


def _parts(loaded: plan.LoadedSteps, block: Block, theirs: Array, grid: Grid) -> list[_Part]:
    """A block in pieces: each element takes a dozen f64 copies."""
    xp = loaded.xp
    base = loaded.base(block)
    chain = list(loaded.chain(base, block))
    noise, ours = loaded.noise(base, block), loaded.changed(base, block)
    found = []
    for first, last in exactness.cut(*plan.as_matrix(tuple(base.shape))):
        w, m, our, stray = (xp.f64(x[first:last]) for x in (base, theirs, ours, noise))
        before, rounded = w, abs(w) if grid.base else w * 0
        for changed, effect in chain:
            after = changed[first:last]
            rounded = rounded + abs(after)
            if effect is not Effect.REPLACE:
                rounded = rounded + abs(after - before)
            before = after
        top = xp_maximum(xp, abs(m), abs(before))
        once = ulp(xp, top, grid.dtype) * 0.5 + top * _F32
        rough = False
        if grid.dtype.bits == 16:
            most = _MOST_F32 * (float(abs(before).max()) + float(abs(w).max()))
            rough = bool((abs(our - before) > once + most).any())
            stray = stray.clip(None, most) if rough else stray
        effects = tuple(e for _, e in chain)
        row = block.rows.start + first
        found.append(_Part(row, w, m, before, our, stray, once + stray, rough, rounded, effects))
    return found


@dataclass
class _Lean:
    """A sum of terms of either sign, and whether that is more than chance."""

    total: float = 0.0
    squares: float = 0.0

    def add(self, terms: Array) -> None:
        self.total += float(terms.sum())
        self.squares += float((terms * terms).sum())

    def leans(self, deviations: float, slack: float = 0.0) -> bool:
        return abs(self.total) > deviations * math.sqrt(self.squares) + slack


@dataclass
class Tally:
    """Statistics of one tensor, gathered block by block.

    Attributes:
        sums: Distances from the exact tensor.
        nonfinite, made_nonfinite: Has the merged tensor NaN or infinite values, and the exact one?
        outside: Weights that no honest rounding of the kind explains.
        rows: The first and the last row that has one.
        moved2: Sum of squares of what the merged model moved the base by.
        theirs, ours_dot: Of what theirs and ours moved it by, times the change.
        floor2: Expected sum of squares of one rounding.
        allowed2: Sum of squares of what was allowed.
    """

    xp: Backend
    grid: Grid
    sums: Sums = field(default_factory=Sums)
    nonfinite: bool = False
    made_nonfinite: bool = False
    count: int = 0
    outside: int = 0
    not_once: int = 0
    rows: tuple[int, int] | None = None
    moved: int = 0
    meant_to_move: int = 0
    moved2: float = 0.0
    theirs: float = 0.0
    ours_dot: float = 0.0
    floor2: float = 0.0
    allowed2: float = 0.0
    loose: bool = False
    _lean: _Lean = field(default_factory=lambda: _Lean())
    _lean_once: _Lean = field(default_factory=lambda: _Lean())

    def add(self, loaded: plan.LoadedSteps, block: Block, theirs: Array) -> None:
        """One block: `theirs` as the merged model has it."""
        for part in _parts(loaded, block, theirs, self.grid):
            self._add(part)

    def _add(self, p: _Part) -> None:
        xp = self.xp
        delta, error = p.exact - p.base, abs(p.theirs - p.exact)
        half = ulp(xp, xp_maximum(xp, abs(p.theirs), abs(p.exact)), self.grid.dtype) * 0.5
        # Where W was rounded before, or each of several changes, no single rounding is the only honest one.
        loose = self.grid.base or self.grid.coarse or len(p.effects) > 1
        self.loose |= loose
        allowed = p.rounded * (self.grid.unit * 1.01) + p.noise + self.grid.tiny if loose else p.once
        outside = error > allowed
        self.not_once += int(outside.sum())
        # PEFT's own bits are honest, however coarse its arithmetic is.
        outside &= p.theirs != p.ours
        if hit := int(outside.sum()):
            self.outside += hit
            self._note_rows(p.row, outside)
        self.nonfinite |= not xp.finite(p.theirs)
        self.made_nonfinite |= not xp.finite(p.exact)
        self.count += math.prod(error.shape)
        self.sums.add(delta, p.theirs - p.base)
        self.sums.add_ulps(xp, error, p.base, p.exact, self.grid.dtype)
        moved = p.theirs - p.base
        self.moved += int((moved != 0).sum())
        self.meant_to_move += int((p.ours != p.base).sum())
        self.moved2 += float((moved * moved).sum())
        self.theirs += float((moved * delta).sum())
        self.ours_dot += float(((p.ours - p.base) * delta).sum())
        self.floor2 += float((half * half).sum()) / 3
        self.allowed2 += float((allowed * allowed).sum())
        self._lean.add((p.theirs - p.ours) * delta)
        # Where PEFT rounds on its way its own merge may lean: one that was rounded once need not lean with it.
        plain = xp.f64(xp.round(p.exact, self.grid.dtype)) if p.rough else p.ours
        self._lean_once.add((p.theirs - plain) * delta)

    def _note_rows(self, row: int, outside: Array) -> None:
        flags = outside.reshape(outside.shape[0], -1).any(1)
        hit = [row + n for n, flag in enumerate(flags.tolist()) if flag]
        first, last = self.rows or (hit[0], hit[-1])
        self.rows = min(first, hit[0]), max(last, hit[-1])

    def leans(self, bias: float = _BIAS) -> bool:
        """Do the differences from our own merge lean along the change, or against it?"""
        slack = bias * self.sums.norm2
        return self._lean.leans(_LEAN, slack) and self._lean_once.leans(_LEAN, slack)

    @property
    def wrong(self) -> bool:
        if self.grid.coarse:
            return self.outside > 0
        return self.outside > 0 or self.leans()

    @property
    def arithmetic(self) -> str | None:
        """How an honest one was rounded; None where that is not told apart."""
        if self.loose:
            return None
        return "once" if self.not_once == 0 else "ours"

    @property
    def factor(self) -> float | None:
        """How many times the change is in it, against what our own merge keeps of it; None if that is nothing."""
        return self.theirs / self.ours_dot if self.ours_dot > 0 else None

    def left(self, factor: float) -> float:
        """Sum of squares of what so many times the change does not explain."""
        return max(0.0, self.moved2 - 2 * factor * self.theirs + factor**2 * self.sums.norm2)


@dataclass
class Coarser:
    """Is a tensor explained by one of the coarser kinds of rounding? A second look, at those that need it.

    Attributes:
        products: Is its change a low-rank product, whose noise is a bound on the sum of its terms?
    """

    xp: Backend
    grid: Grid
    products: bool
    twice: bool = True
    not_twice: int = 0
    not_low: int = 0
    near: int = 0
    flipped: int = 0
    height: int = 0
    rows_hit: int = 0
    _columns: Any = None
    _along: _Lean = field(default_factory=_Lean)

    def add(self, loaded: plan.LoadedSteps, block: Block, theirs: Array) -> None:
        """One block."""
        for part in _parts(loaded, block, theirs, self.grid):
            self._add(part)

    def _add(self, p: _Part) -> None:
        xp, dtype = self.xp, self.grid.dtype

        def half(values: Array) -> Array:
            return ulp(xp, values, dtype) * 0.5

        delta, error = p.exact - p.base, abs(p.theirs - p.exact)
        self._spread_of((error > p.once) & (p.theirs != p.ours))
        if p.effects == (Effect.ADD,):
            rounded = xp.f64(xp.round(delta, dtype))
            # Near a tie the change may have been rounded the other way.
            to_tie = half(delta) - abs(delta - rounded)
            other = (to_tie <= p.noise) * (2 * half(delta))
            value = p.base + rounded
            top = xp_maximum(xp, abs(p.theirs), abs(value))
            bound = half(top) + top * _F32 + other
            self.not_twice += int((abs(p.theirs - value) > bound).sum())
        else:
            self.twice = False
        if self.products:
            # The factors rounded, their product, the scaled one: relative to the terms, as f32's noise, only coarser.
            low = p.noise * (self.grid.unit * 2.0**24 / 4) + abs(delta) * (self.grid.unit * 2)
        else:
            # Of W, its change and what both make.
            low = (abs(p.exact) + abs(p.base) + abs(delta)) * (self.grid.unit * 2)
        low = low + self.grid.tiny * 8
        self.not_low += int((error > p.once + low).sum())
        ours = xp.f64(xp.round(p.exact, dtype))
        self.near += int((half(p.exact) - abs(p.exact - ours) <= low).sum())
        self._along.add(((p.theirs - ours) * p.exact).reshape(p.exact.shape[0], -1).sum(1))

    def _spread_of(self, flipped: Array) -> None:
        flags = flipped.reshape(flipped.shape[0], -1)
        self.flipped += int(flags.sum())
        self.height += flags.shape[0]
        self.rows_hit += int(flags.any(1).sum())
        hit = flags.any(0)
        self._columns = hit if self._columns is None else self._columns | hit

    @property
    def _everywhere(self) -> bool:
        """Do the flipped weights lie in as many rows and columns as such a number would by chance?"""
        width = self._columns.shape[0]
        hits = ((self.rows_hit, self.height), (int(self._columns.sum()), width))
        return all(hit >= _SPREAD * n * -math.expm1(-self.flipped / n) for hit, n in hits)

    @property
    def _shrinks(self) -> bool:
        """Do weights lean towards zero, or away from it, row after row? Bits that are cut off do that."""
        return self._along.leans(_ROWS_LEAN)

    def verdict(self, tally: Tally) -> str | None:
        """`twice` or `low-precision`; None: neither explains it."""
        if self.twice and self.not_twice == 0 and not tally.leans():
            return "twice"
        plausible = self.flipped >= _SHARE * self.near
        honest = plausible and self._everywhere and not tally.leans(_LOW_BIAS) and not self._shrinks
        return "low-precision" if self.grid.unit > _UNIT["F32"] and self.not_low == 0 and honest else None
