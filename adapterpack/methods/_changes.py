"""Changes that several methods share: low-rank products, replaced tensors, added vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Block, Effect, Kind, Loaded, LowRank, Product, Replaced, Shapes
from adapterpack.errors import WrongBase
from adapterpack.methods._keys import flag
from adapterpack.tensor import DType, Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

    Factors = Callable[[Backend], tuple[Array, Array]]


_EPS = 2.0**-24
"""Half a unit in the last place of float32, relative."""


def transposed(kind: Kind) -> bool:
    """Does the stored weight lie as (in, out)?"""
    return kind in (Kind.CONV1D, Kind.EMBEDDING)


@dataclass(frozen=True)
class LowRankChange:
    """W + scale * (B @ A), for every method that has exact factors.

    Attributes:
        module: Path of the module.
        factors: Reads the tensors and gives (B, A), f32, (out, r) and (r, in).
        shape: Logical (out, in).
        rank: Rows of A.
        fan_in_fan_out: The config's word on how the weight lies, for square weights.
        layer: LINEAR (or Conv1D: the base decides) or EMBEDDING.
        round_delta: PEFT rounds the delta to the base dtype before it adds (embeddings).
        torch: Do the factors take torch to compute?
        mixes: Do the factors take a `Mixture` to compute?
        factor_noise: What computing the factors in f32 may lose, in half units in the last place of the sum
            of the terms; 0 where the file holds them as they are.
    """

    module: str
    factors: Factors
    shape: tuple[int, int]
    rank: int
    scale: float
    uses: frozenset[str]
    layer: Kind = Kind.LINEAR
    fan_in_fan_out: bool = False
    round_delta: bool = False
    torch: bool = False
    mixes: bool = False
    factor_noise: float = 0.0

    effect = Effect.ADD

    @property
    def target(self) -> str:
        return f"{self.module}.weight"

    def whole(self, kind: Kind) -> bool:
        return False

    def products(self, kind: Kind) -> tuple[Product, ...]:
        return (Product(self.shape[0], self.rank, self.shape[1], transposed(kind)),)

    def place(self, shape: Shape, conv1d: bool | None) -> Kind:
        out, into = self.shape
        if self.layer is Kind.EMBEDDING:
            if shape != (into, out):
                raise WrongBase(f"{self.target} has shape {shape}, the adapter's change {(into, out)}")
            return Kind.EMBEDDING
        return linear_kind(self.target, shape, out, into, conv1d, self.fan_in_fan_out)

    def load(self, xp: Backend) -> Loaded:
        b, a = self.factors(xp)
        return LoadedLowRank(xp, LowRank(b, a, self.scale), self.round_delta, self.factor_noise)


def linear_kind(
    target: str, shape: Shape, out: int, into: int | None, conv1d: bool | None, fan_in_fan_out: bool
) -> Kind:
    """How a weight lies, from its shape where that tells, else from the base's model type, else the config.

    Args:
        into: Input features; None if the adapter does not know them.
        conv1d: What the base knows of it.

    Raises:
        WrongBase: the shape fits neither way.
    """
    fits = {
        kind: len(shape) == 2 and shape[at_out] == out and (into is None or shape[1 - at_out] == into)
        for kind, at_out in ((Kind.LINEAR, 0), (Kind.CONV1D, 1))
    }
    if all(fits.values()):
        return Kind.CONV1D if (fan_in_fan_out if conv1d is None else conv1d) else Kind.LINEAR
    for kind, fit in fits.items():
        if fit:
            return kind
    raise WrongBase(f"{target} has shape {shape}, the adapter's change (out, in) = ({out}, {into or 'any'})")


def logical_shape(
    a: Adapter, module: str, shapes: Shapes, *, out: int | None = None, into: int | None = None
) -> Shape:
    """(out, in) of a linear layer's weight in the base, (out, in, k...) of a convolution's.

    Args:
        out, into: What the adapter knows of it, for weights whose shape does not tell how they lie.

    Raises:
        WrongBase: the base has no such weight, or it does not fit.
    """
    target = f"{module}.weight"
    shape = shapes.shape(target)
    if len(shape) != 2:
        return shape
    conv1d, flagged = shapes.conv1d(module), flag(a.config, "fan_in_fan_out")
    if out is None and into is not None:
        kind = linear_kind(target, shape[::-1], into, None, conv1d, flagged)
        return shape if kind is Kind.LINEAR else shape[::-1]
    if out is None:
        crossed = flagged if conv1d is None else conv1d
        return shape[::-1] if crossed else shape
    kind = linear_kind(target, shape, out, into, conv1d, flagged)
    return shape if kind is Kind.LINEAR else shape[::-1]


def weight_shape(
    a: Adapter,
    module: str,
    shapes: Shapes | None,
    *,
    out: int | None = None,
    into: int | None = None,
    conv1d: bool = True,
) -> Shape:
    """The logical shape of a weight of which the adapter knows one side.

    Args:
        conv1d: Has the method a form for GPT-2's Conv1D?
        shapes: Of the base. None: what the adapter does not know is 0, which `_formula` takes for any size.
        out: Output features (channels).
        into: Input features; of a convolution those of one output with the kernel, `prod(shape[1:])`.

    Raises:
        WrongBase: the base has no such weight, or it does not fit.
    """
    if shapes is None:
        return (out or 0, into or 0)
    shape = logical_shape(a, module, shapes, out=out, into=into) if conv1d else shapes.shape(f"{module}.weight")
    fits = len(shape) > 1 and out in (None, shape[0]) and into in (None, math.prod(shape[1:]))
    if not fits:
        wanted = f"({out or 'any'}, {into or 'any'})"
        raise WrongBase(f"{module}.weight has shape {shape}, the adapter's change (out, in) = {wanted}")
    return shape


@dataclass(frozen=True)
class LoadedLowRank:
    """Its factors at hand; see `adapter.Loaded`."""

    xp: Backend
    factors: LowRank
    round_delta: bool = False
    factor_noise: float = 0.0

    def low_rank(self) -> LowRank | None:
        return self.factors

    def delta(self, rows: slice) -> Array | None:
        b, a = self._f64
        return (b[rows] @ a) * self.factors.scale

    @cached_property
    def _f64(self) -> tuple[Array, Array]:
        return self.xp.f64(self.factors.b), self.xp.f64(self.factors.a)

    def parts(self) -> Mapping[str, Array]:
        return {"B": self.factors.b * self.factors.scale, "A": self.factors.a}

    def stored_delta(self, block: Block) -> Array:
        """f32, as the weight lies: the product, then the transpose, then the scale, in PEFT's order."""
        delta = _product(self.factors.b, self.factors.a, block)
        if self.factors.scale != 1:
            delta *= self.factors.scale
        return delta

    def apply(self, w: Array, block: Block) -> Array:
        delta = self._added(block)
        if transposed(block.kind):
            # In the layout of W: DoRA's norms sum in the order of memory.
            return w + delta
        delta += w
        return delta

    def rounded(self, w: Array, block: Block, dtype: DType) -> Array:
        """`apply`, rounded to `dtype`: most merges are this and nothing else, so that it counts.

        Args:
            w: In its own dtype.
        """
        return self.xp.add(self._added(block), w, dtype)

    def _added(self, block: Block) -> Array:
        delta = self.stored_delta(block)
        return self.xp.f32(self.xp.round(delta, block.dtype)) if self.round_delta else delta

    def exact_delta(self, block: Block) -> Array:
        """f64, as the weight lies."""
        delta = _product(*self._f64, block)
        delta *= self.factors.scale
        return delta

    def exact(self, w: Array, block: Block) -> Array:
        return w + self.exact_delta(block)

    def noise(self, w: Array, block: Block) -> Array:
        """A sum of r products: its r roundings are of partial sums, and do not all point one way."""
        f = self.factors
        units = 2 * (1 + math.sqrt(f.a.shape[0])) + self.factor_noise
        return _product(abs(f.b), abs(f.a), block) * (abs(f.scale) * units * _EPS)


def _product(b: Array, a: Array, block: Block) -> Array:
    """b @ a, of the rows that the block of the stored weight has."""
    if transposed(block.kind):
        return (b @ a[:, block.rows]).T
    return b[block.rows] @ a


@dataclass(frozen=True)
class VectorChange:
    """bias + scale * vector (`lora_bias`)."""

    module: str
    vector: Callable[[Backend], Array]
    shape: Shape
    scale: float
    uses: frozenset[str]

    effect = Effect.ADD
    torch = False

    @property
    def target(self) -> str:
        return f"{self.module}.bias"

    def whole(self, kind: Kind) -> bool:
        return False

    def products(self, kind: Kind) -> tuple[Product, ...]:
        return ()

    def place(self, shape: Shape, conv1d: bool | None) -> Kind:
        if shape != self.shape:
            raise WrongBase(f"{self.target} has shape {shape}, the adapter's change {self.shape}")
        return Kind.OTHER

    def load(self, xp: Backend) -> Loaded:
        return LoadedVector(xp, self.vector(xp), self.scale)


@dataclass(frozen=True)
class LoadedVector:
    """Its vector at hand; see `adapter.Loaded`."""

    xp: Backend
    vector: Array
    scale: float

    def low_rank(self) -> LowRank | None:
        return None

    def delta(self, rows: slice) -> Array | None:
        return self.xp.f64(self.vector[rows]) * self.scale

    def parts(self) -> Mapping[str, Array]:
        return {"vector": self.vector * self.scale}

    def apply(self, w: Array, block: Block) -> Array:
        return w + self.vector[block.rows] * self.scale

    def exact(self, w: Array, block: Block) -> Array:
        return w + self.delta(block.rows)

    def noise(self, w: Array, block: Block) -> Array:
        return abs(self.vector[block.rows]) * (abs(self.scale) * 2 * _EPS)


@dataclass(frozen=True)
class ReplaceChange:
    """A base tensor, or rows of it, gets new values."""

    target: str
    replaced: Replaced

    effect = Effect.REPLACE
    torch = False

    def whole(self, kind: Kind) -> bool:
        return False

    def products(self, kind: Kind) -> tuple[Product, ...]:
        return ()

    @property
    def module(self) -> str:
        return self.target.rpartition(".")[0]

    @property
    def shape(self) -> Shape:
        return self.replaced.param.tensor.shape

    @property
    def uses(self) -> frozenset[str]:
        return frozenset({self.replaced.param.key})

    def place(self, shape: Shape, conv1d: bool | None) -> Kind:
        new, rows = self.replaced.param.tensor.shape, self.replaced.rows
        if rows is None and new != shape:
            raise WrongBase(
                f"{self.target} has shape {shape} in the base and {new} in the adapter",
                hint="if tokens were added in training, resize the base's embeddings first and save it",
            )
        if rows is not None and (len(shape) != 2 or new[1:] != shape[1:] or max(rows) >= shape[0]):
            raise WrongBase(f"{self.target} has shape {shape}: the adapter's rows {new} do not fit")
        return Kind.OTHER

    def load(self, xp: Backend) -> Loaded:
        values = xp.native(self.replaced.param.tensor)
        # max: a width of 0 leaves the number of rows open.
        flat = values.reshape(-1, max(1, values.shape[-1])) if len(values.shape) > 1 else values.reshape(-1)
        return LoadedReplacement(xp, flat, self.replaced.rows)


@dataclass(frozen=True)
class LoadedReplacement:
    """Its values at hand; see `adapter.Loaded`."""

    xp: Backend
    values: Array
    rows: tuple[int, ...] | None

    def low_rank(self) -> LowRank | None:
        return None

    def delta(self, rows: slice) -> Array | None:
        return None

    @cached_property
    def _last(self) -> dict[int, int]:
        """Row of the base to row of the values; of a row that is named twice the last one stays."""
        return {row: n for n, row in enumerate(self.rows or ())}

    def parts(self) -> Mapping[str, Array]:
        if self.rows is None:
            return {"values": self.values}
        # By row and not in the file's order.
        return {"values": self.values[[self._last[row] for row in sorted(self._last)]]}

    def apply(self, w: Array, block: Block) -> Array:
        return self._into(w, block, self.xp.f32)

    def exact(self, w: Array, block: Block) -> Array:
        return self._into(w, block, self.xp.f64)

    def noise(self, w: Array, block: Block) -> Array:
        return w * 0

    def _into(self, w: Array, block: Block, lift: Callable[[Array], Array]) -> Array:
        if self.rows is None:
            return lift(self.values[block.rows])
        first, last = block.rows.start, block.rows.stop
        hit = [row for row in self._last if first <= row < last]
        if not hit:
            return w
        # A copy, spelled alike in both libraries; adding 0 would lose the sign of -0.
        w = w * 1
        w[[row - first for row in hit]] = lift(self.values[[self._last[row] for row in hit]])
        return w


def replacements(a: Adapter) -> Iterator[ReplaceChange]:
    """One change for each replaced tensor; they come before the method's own changes."""
    for target, entries in a.replaced.items():
        for entry in entries:
            yield ReplaceChange(target, entry)
