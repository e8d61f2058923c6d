"""Which step each line of two factors gets, so that the bits that are spent buy the most accuracy.

The error of B @ A is that of its lines, columns of B and rows of A, each weighted by the norm of its partner. At one
price mu of squared error in bits every line takes the step at which a bit more buys as much as anywhere else: reverse
water-filling (Cover and Thomas 2006, 10.3.3) on the curve that a uniform quantiser with a Huffman code really has
(Gish and Pierce 1968; rounding towards zero: Sullivan 1996). A pair of lines that is not worth its bits is left out,
which is a lower rank; matrices thus get bits and ranks as Bayesian-LoRA (arXiv 2406.13046) learns them.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterpack.codecs.lines import nearest_steps, step_values

if TYPE_CHECKING:
    from adapterpack.tensor import Array

_RATIOS = 2.0 ** (np.arange(-40, 25) / 8)
"""Steps in standard deviations that are tried one by one; below them the formulas for small steps hold."""
_OFFSETS = (0.0, 0.04, 0.08, 0.12, 0.16, 0.2, 0.25)
"""By how much a value must come nearer to the next code than half way."""
_PRICES = np.arange(0, 129) / 8 - 4
"""log2 of the price of a normal line's relative squared error, in bits a value; the last one asks for steps above the
least of those tried."""
_CODED_ONE_BY_ONE = 80
"""Symbols up to which a Huffman code is built; beyond that it takes what the entropy says, and a little."""
_LITTLE = 0.03


@dataclass(frozen=True)
class _Curve:
    """A normal variable, quantised.

    Attributes:
        prices: log2 of the price.
        ratios: log2 of the step in standard deviations that is best at that price.
        offsets: And how far to round towards zero.
        rates: Bits a value then.
        errors: Mean squared error in variances then.
        by_ratio: log2 of steps, offsets and log2 of errors at them, for steps that were moved to the grid.
    """

    prices: Array
    ratios: Array
    offsets: Array
    rates: Array
    errors: Array
    by_ratio: tuple[Array, Array, Array]


@functools.cache
def _curve() -> _Curve:
    x = (np.arange(4096) + 0.5) / 512
    density = np.exp(-x * x / 2)
    density /= density.sum()
    tried = []
    for ratio in _RATIOS:
        for offset in _OFFSETS:
            q = np.floor(x / ratio + 0.5 - offset)
            error = float((density * (x - q * ratio) ** 2).sum())
            half = np.bincount(q.astype(np.int64), weights=density)
            # Both signs but for zero.
            p = np.concatenate([half[:1], half[1:] / 2, half[1:] / 2])
            tried.append((ratio, offset, _rate(p[p > 0]), error))
    ratios, offsets, rates, errors = (np.array(column) for column in zip(*tried, strict=True))
    best = [int(np.argmin(rates + 2.0**price * errors)) for price in _PRICES]
    # The best offset of each step: that of the price at which this step is best or nearly so.
    own = [_offset_at(ratio, ratios, offsets, rates, errors) for ratio in _RATIOS]
    return _Curve(
        _PRICES,
        np.log2(ratios[best]),
        offsets[best],
        rates[best],
        errors[best],
        (np.log2(_RATIOS), offsets[own], np.log2(errors[own])),
    )


def _offset_at(ratio: float, ratios: Array, offsets: Array, rates: Array, errors: Array) -> int:
    """Which entry with this step is best at the price where small steps would choose it."""
    price = 6 / (np.log(2) * min(ratio, 2.0) ** 2)
    costs = np.where(ratios == ratio, rates + price * errors, np.inf)
    return int(np.argmin(costs))


def _rate(p: Array) -> float:
    """Bits a symbol in a Huffman code."""
    if p.size > _CODED_ONE_BY_ONE:
        return float(-(p * np.log2(p)).sum()) + _LITTLE
    heap = sorted(p.tolist())
    bits = 0.0
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        bits += joined
        heapq.heappush(heap, joined)
    return bits


def _at(log_price: Array) -> tuple[Array, Array, Array]:
    """log2 of the step in standard deviations, bits a value and relative squared error at a price."""
    c = _curve()
    ratio = np.interp(log_price, c.prices, c.ratios)
    rate = np.interp(log_price, c.prices, c.rates)
    error = np.interp(log_price, c.prices, c.errors)
    # Beyond the table: a quarter of the error for each bit.
    more = np.maximum(log_price - c.prices[-1], 0)
    return ratio - more / 2, rate + more / 2, error * 2.0**-more


def _moved(log_ratio: Array) -> tuple[Array, Array]:
    """Offset and relative squared error at a step that is on the grid."""
    ratios, offsets, errors = _curve().by_ratio
    at = np.clip(np.rint((log_ratio - ratios[0]) * 8).astype(np.int64), 0, len(ratios) - 1)
    error = 2.0 ** np.interp(log_ratio, ratios, errors)
    small = log_ratio < ratios[0]
    return np.where(small, 0.0, offsets[at]), np.where(
        small, 2.0 ** (2 * np.minimum(log_ratio, ratios[0])) / 12, error
    )


@dataclass(frozen=True)
class Lines:
    """What is known of the lines of a pair of factors.

    Attributes:
        squares: Of each factor, the squared norm of each line, f64 (r,): columns of B, rows of A.
        lengths: Of a column of B, and of a row of A.
    """

    squares: tuple[Array, Array]
    lengths: tuple[int, int]

    @property
    def energies(self) -> Array:
        """Squared norm of the product of each pair of lines."""
        return self.squares[0] * self.squares[1]


@dataclass(frozen=True)
class Steps:
    """The steps of a pair of factors.

    Attributes:
        kept: The lines that get any bits, ascending.
        codes: Of each factor, the step codes of those lines.
        offsets: Of each factor, how far to round towards zero, in steps.
        error: Squared error that is to be expected.
        bits: About what they take.
    """

    kept: Array
    codes: tuple[Array, Array]
    offsets: tuple[Array, Array]
    error: float
    bits: float


def steps_at(lines: Lines, log_price: float) -> Steps:
    """The best steps where a squared error of 1 costs 2**log_price bits. One pair of lines stays in any case."""
    energies = np.maximum(lines.energies, 1e-300)
    worth = np.log2(energies) + log_price
    # A line whose partner is coarse is worth less: the part of the partner that is kept counts.
    errors = [np.zeros_like(energies), np.zeros_like(energies)]
    found = []
    for _ in range(4):
        left = [np.log2(np.maximum(1 - errors[1 - side], 1e-3)) for side in (0, 1)]
        found = [_at(worth + left[side] - np.log2(lines.lengths[side])) for side in (0, 1)]
        errors = [error for _, _, error in found]
    (_, rate_b, error_b), (_, rate_a, error_a) = found
    bits = rate_b * lines.lengths[0] + rate_a * lines.lengths[1]
    with np.errstate(over="ignore"):
        saved = 2.0**worth * (1 - error_b) * (1 - error_a) - bits
    kept = np.flatnonzero(saved > 0)
    if not kept.size:
        kept = np.array([int(np.argmax(energies))])
    codes, offsets, moved = [], [], []
    for side, (ratio, _, _) in enumerate(found):
        spread = np.log2(np.maximum(lines.squares[side][kept], 1e-300) / lines.lengths[side]) / 2
        code = nearest_steps(2.0 ** (ratio[kept] + spread))
        offset, error = _moved(np.log2(step_values(code)) - spread)
        codes.append(code)
        offsets.append(offset)
        moved.append(np.minimum(error, 1.0))
    lost = lines.energies[kept] * (moved[0] + moved[1] - moved[0] * moved[1])
    cut = float(lines.energies.sum() - lines.energies[kept].sum())
    return Steps(
        kept,
        (codes[0], codes[1]),
        (offsets[0], offsets[1]),
        float(lost.sum()) + max(cut, 0.0),
        float(bits[kept].sum()),
    )


def steps_for(lines: Lines, squared_error: float) -> Steps:
    """The coarsest steps whose expected squared error is no more than that, as far as the grid of steps goes."""
    total = float(lines.energies.sum())
    if total <= 0 or squared_error <= 0:
        return steps_at(lines, 1000.0)
    middle = float(np.log2(sum(lines.lengths) * len(lines.energies) / squared_error))
    low, high = middle - 60, middle + 30
    best = steps_at(lines, high)
    for _ in range(40):
        price = (low + high) / 2
        steps = steps_at(lines, price)
        if steps.error <= squared_error:
            best, high = steps, price
        else:
            low = price
    return best


def single_steps(deviations: Sequence[float] | Array, step: float) -> tuple[Array, Array]:
    """Step codes and offsets of lines that all get the same step, as equal weights want it.

    Args:
        deviations: Standard deviation of each line.
        step: Where it is small against the deviation; the code nearest to it is taken.
    """
    spread = np.log2(np.maximum(np.asarray(deviations, np.float64), 1e-300))
    code = nearest_steps(np.full(spread.shape, step))
    return code, _moved(np.log2(step_values(code)) - spread)[0]


class Search:
    """Looks for the largest knob whose error is within a bound, where the error grows about as the knob does.

    On a grid of steps it does so in jumps: what is known of the two sides bounds every next try.

    Attributes:
        knob: To be tried next.
    """

    def __init__(self, knob: float = 1.0) -> None:
        self.knob = knob
        self._low, self._high = 0.0, np.inf

    def tell(self, ratio: float) -> None:
        """What came of the knob. Args: ratio: the error in parts of the bound."""
        if ratio <= 1:
            self._low = max(self._low, self.knob)
        else:
            self._high = min(self._high, self.knob)
        knob = self.knob * min(max(_AIM / max(ratio, 1e-300), 0.25), 2.0)
        if self._low and self._high < np.inf:
            if not self._low < knob < self._high:
                knob = float(np.sqrt(self._low * self._high))
        elif self._low:
            knob = max(knob, self._low * 1.01)
        else:
            # A sixteenth of an octave: half a step of the grid at least.
            knob = min(knob, self._high * 0.957)
        self.knob = knob


_AIM = 0.9985
