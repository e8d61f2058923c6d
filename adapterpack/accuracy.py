"""How far two versions of a change lie apart, in numbers: norms, units in the last place, and all modules pooled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterpack.tensor import DType, Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

DIGITS = {"F32": 23, "F16": 10, "BF16": 7}
"""Bits of the significand behind its leading one."""
TINY = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
"""The smallest subnormal: the least unit in the last place."""


def ulp(xp: Backend, values: Array, dtype: DType) -> Array:
    """The unit in the last place of `dtype` at each of these f64 values: the gap to the next larger magnitude."""
    unit = xp.binade(values) * 2.0 ** -DIGITS[dtype.name]
    return unit.clip(TINY[dtype.name], None)


@dataclass(frozen=True)
class ModuleError:
    """How far two versions of one base tensor, or of its change, lie apart.

    Attributes:
        name: The base tensor.
        max_abs_error: Largest absolute difference of an element.
        rel_error: Frobenius norm of the difference over that of the reference's change, in f64; 0/0 is 0.
        shape: Logical (out, in) of a change; as stored where weights were compared.
        rank_a, rank_b: Of the factors; None: there are none of that side.
        norm, norm_b: Frobenius norms of the reference's change and of the other one; None: they are not of a change
            of W, for without it parameters were compared.
        difference: Frobenius norm of the difference.
        cosine: Of the angle between both changes; None where one is zero, or not a change of W.
        dtype: Of the base tensor; None without its weights.
        mean_ulp, max_ulp: Absolute difference of the changed weights in units in the last place of that dtype, at the
            larger of |W| and |W'| of the reference, element by element.
        bound: Largest `rel_error` that counts as equal; for a merged model: what honest rounding may leave at most.
        floor: What honest rounding to the dtype is expected to leave (root mean square), as a `rel_error`.
        factor: Of a merged model: how many times the change is in it, by least squares, against what an honest
            merge leaves of it.
        arithmetic: Of a merged model, if it is equal: `once` (one rounding), `twice` (the change was rounded before
            it was added), `ours` (bit by bit what PEFT computes), `low-precision`.
    """

    name: str
    max_abs_error: float
    rel_error: float
    shape: Shape = ()
    rank_a: int | None = None
    rank_b: int | None = None
    norm: float | None = None
    norm_b: float | None = None
    difference: float | None = None
    cosine: float | None = None
    dtype: str | None = None
    mean_ulp: float | None = None
    max_ulp: float | None = None
    bound: float | None = None
    floor: float | None = None
    factor: float | None = None
    arithmetic: str | None = None


@dataclass(frozen=True)
class Pooled:
    """All modules of a comparison as one.

    Attributes:
        modules: How many; those that were compared by their parameters alone do not count.
        elements: How many weights they have together.
        rel_error: Root of the summed squares of all differences over that of all reference changes; 0/0 is 0.
        max_abs_error: The largest of all.
        norm, norm_b: Frobenius norms of all reference changes together, and of the others.
        cosine: Of the angle between both, all modules taken as one vector; None where one is zero.
        mean_ulp, max_ulp: As of `ModuleError`, over all weights; None without a base.
    """

    modules: int
    elements: int
    rel_error: float
    max_abs_error: float
    norm: float
    norm_b: float
    cosine: float | None
    mean_ulp: float | None
    max_ulp: float | None


def _dot(x: Array, y: Array) -> float:
    """The sum of products, without an array for them: half the time of the sum that needs one."""
    return float(x.reshape(-1) @ y.reshape(-1))


@dataclass
class Sums:
    """What is gathered of one tensor, tile by tile, in f64.

    Attributes:
        difference2, norm2, norm_b2, inner: Sums of squares of x - y, x and y, and of the products of x and y.
        max_abs: Largest |x - y|; NaN if one is.
        ulps, max_ulp, counted: The sum and the largest of the differences in units in the last place, and their
            number.
    """

    difference2: float = 0.0
    norm2: float = 0.0
    norm_b2: float = 0.0
    inner: float = 0.0
    max_abs: float = 0.0
    ulps: float = 0.0
    max_ulp: float = 0.0
    counted: int = 0

    def add(self, x: Array, y: Array) -> None:
        """Two tiles of the same f64 values."""
        d = x - y
        self.difference2 += _dot(d, d)
        self.norm2 += _dot(x, x)
        self.norm_b2 += _dot(y, y)
        self.inner += _dot(x, y)
        self.max_abs = larger(self.max_abs, float(abs(d).max()) if math.prod(d.shape) else 0.0)

    def add_norms(self, difference: float, norm_x: float, norm_y: float, inner: float, max_abs: float) -> None:
        """What was found of a tile by other means."""
        self.difference2 += difference**2
        self.norm2 += norm_x**2
        self.norm_b2 += norm_y**2
        self.inner += inner
        self.max_abs = larger(self.max_abs, max_abs)

    def add_ulps(self, xp: Backend, error: Array, before: Array, after: Array, dtype: DType) -> None:
        """f64: the differences, and the weights before and after the reference's change.

        Of the larger of both the unit is taken: where W and its change cancel, what remains is as uncertain as W was.
        """
        units = abs(error) / ulp(xp, xp_maximum(xp, abs(before), abs(after)), dtype)
        self.ulps += float(units.sum())
        self.max_ulp = larger(self.max_ulp, float(units.max()) if math.prod(units.shape) else 0.0)
        self.counted += math.prod(units.shape)

    @property
    def rel_error(self) -> float:
        return ratio(math.sqrt(self.difference2), math.sqrt(self.norm2))

    def error(
        self,
        name: str,
        shape: Shape,
        *,
        ranks: tuple[int | None, int | None] = (None, None),
        dtype: DType | None = None,
    ) -> ModuleError:
        """The figures of the tensor."""
        norm, norm_b = math.sqrt(self.norm2), math.sqrt(self.norm_b2)
        return ModuleError(
            name,
            self.max_abs,
            self.rel_error,
            shape=shape,
            rank_a=ranks[0],
            rank_b=ranks[1],
            norm=norm,
            norm_b=norm_b,
            difference=math.sqrt(self.difference2),
            cosine=cosine(self.inner, norm, norm_b),
            dtype=dtype.name if dtype and self.counted else None,
            mean_ulp=self.ulps / self.counted if self.counted else None,
            max_ulp=self.max_ulp if self.counted else None,
        )


def xp_maximum(xp: Backend, a: Array, b: Array) -> Array:
    """The larger of each two values; both libraries have it, under two roofs."""
    if xp.name == "numpy":
        import numpy as np

        return np.maximum(a, b)
    return xp.torch.maximum(a, b)


def cosine(inner: float, norm: float, norm_b: float) -> float | None:
    """Of the angle between two changes; None where one is zero or not finite."""
    if not (norm > 0 and norm_b > 0 and math.isfinite(norm) and math.isfinite(norm_b)):
        return None
    return max(-1.0, min(1.0, inner / norm / norm_b))


def ratio(difference: float, reference: float) -> float:
    """Their quotient; 0/0 is 0 and x/0 infinite."""
    if difference == 0:
        return 0.0
    return difference / reference if reference else math.inf


def larger(a: float, b: float) -> float:
    """The larger one; NaN wins, so that it is seen."""
    return b if b != b or b > a else a


def pooled(errors: Sequence[ModuleError]) -> Pooled:
    """All modules as one."""
    known = [e for e in errors if e.norm is not None and e.norm_b is not None and e.difference is not None]
    difference = math.hypot(*(e.difference or 0.0 for e in known))
    norm, norm_b = (
        (math.hypot(*values) for values in zip(*((e.norm or 0.0, e.norm_b or 0.0) for e in known), strict=True))
        if known
        else (0.0, 0.0)
    )
    inner = math.fsum((e.cosine or 0.0) * (e.norm or 0.0) * (e.norm_b or 0.0) for e in known)
    in_ulps = [e for e in known if e.mean_ulp is not None and e.max_ulp is not None]
    counted = sum(math.prod(e.shape) for e in in_ulps)
    max_abs = max_ulp = 0.0
    for e in errors:
        max_abs = larger(max_abs, e.max_abs_error)
        max_ulp = larger(max_ulp, e.max_ulp or 0.0)
    return Pooled(
        modules=len(known),
        elements=sum(math.prod(e.shape) for e in known),
        rel_error=ratio(difference, norm),
        max_abs_error=max_abs,
        norm=norm,
        norm_b=norm_b,
        cosine=cosine(inner, norm, norm_b),
        mean_ulp=math.fsum((e.mean_ulp or 0.0) * math.prod(e.shape) for e in in_ulps) / counted if counted else None,
        max_ulp=max_ulp if in_ulps else None,
    )
