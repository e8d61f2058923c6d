"""Changes that several methods share: low-rank products, replaced tensors, added vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Effect, Kind, Loaded, LowRank, Replaced
from adapterpack.errors import WrongBase
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

    Factors = Callable[[Backend], tuple[Array, Array]]


_EPS = 2.0**-24
"""Half a unit in the last place of float32, relative."""


def _transposed(kind: Kind) -> bool:
    return kind in (Kind.CONV1D, Kind.EMBEDDING)


@dataclass(frozen=True)
class LowRankChange:
    """W + scale * (B @ A), for every method that has exact factors.

    Attributes:
        module: Path of the module.
        factors: Reads the tensors and gives (B, A), f32, (out, r) and (r, in).
        shape: Logical (out, in).
        fan_in_fan_out: The config's word on how the weight lies, for square weights.
        layer: LINEAR (or Conv1D: the base decides) or EMBEDDING.
        round_delta: PEFT rounds the delta to the base dtype before it adds (embeddings).
        factor_noise: What computing the factors in f32 may lose, in half units in the last place of the sum
            of the terms; 0 where the file holds them as they are.
    """

    module: str
    factors: Factors
    shape: tuple[int, int]
    scale: float
    uses: frozenset[str]
    layer: Kind = Kind.LINEAR
    fan_in_fan_out: bool = False
    round_delta: bool = False
    factor_noise: float = 0.0

    effect = Effect.ADD

    @property
    def target(self) -> str:
        return f"{self.module}.weight"

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
        f = self.factors
        return (f.b[rows].double() @ f.a.double()) * f.scale

    def parts(self) -> Mapping[str, Array]:
        return {"B": self.factors.b * self.factors.scale, "A": self.factors.a}

    def stored_delta(self, kind: Kind) -> Array:
        """f32, as the weight lies: the product, then the transpose, then the scale, in PEFT's order."""
        product = self.factors.b @ self.factors.a
        return (product.T if _transposed(kind) else product) * self.factors.scale

    def apply(self, w: Array, kind: Kind) -> Array:
        delta = self.stored_delta(kind)
        if self.round_delta:
            delta = delta.to(w.dtype)
        return w.float() + delta.float()

    def exact(self, w: Array, kind: Kind) -> Array:
        delta = self.delta(slice(None))
        assert delta is not None
        return w.double() + (delta.T if _transposed(kind) else delta)

    def noise(self, w: Array, kind: Kind) -> Array:
        """A sum of r products: its r roundings are of partial sums, and do not all point one way."""
        f = self.factors
        units = 2 * (1 + math.sqrt(f.a.shape[0])) + self.factor_noise
        terms = (f.b.abs() @ f.a.abs()) * (abs(f.scale) * units * _EPS)
        return terms.T if _transposed(kind) else terms


@dataclass(frozen=True)
class VectorChange:
    """bias + scale * vector (`lora_bias`)."""

    module: str
    vector: Callable[[Backend], Array]
    shape: Shape
    scale: float
    uses: frozenset[str]

    effect = Effect.ADD

    @property
    def target(self) -> str:
        return f"{self.module}.bias"

    def place(self, shape: Shape, conv1d: bool | None) -> Kind:
        if shape != self.shape:
            raise WrongBase(f"{self.target} has shape {shape}, the adapter's change {self.shape}")
        return Kind.OTHER

    def load(self, xp: Backend) -> Loaded:
        return LoadedVector(self.vector(xp), self.scale)


@dataclass(frozen=True)
class LoadedVector:
    """Its vector at hand; see `adapter.Loaded`."""

    vector: Array
    scale: float

    def low_rank(self) -> LowRank | None:
        return None

    def delta(self, rows: slice) -> Array | None:
        return self.vector[rows].double() * self.scale

    def parts(self) -> Mapping[str, Array]:
        return {"vector": self.vector * self.scale}

    def apply(self, w: Array, kind: Kind) -> Array:
        return w.float() + self.vector * self.scale

    def exact(self, w: Array, kind: Kind) -> Array:
        return w.double() + self.vector.double() * self.scale

    def noise(self, w: Array, kind: Kind) -> Array:
        return self.vector.abs() * (abs(self.scale) * 2 * _EPS)


@dataclass(frozen=True)
class ReplaceChange:
    """A base tensor, or rows of it, gets new values."""

    target: str
    replaced: Replaced

    effect = Effect.REPLACE

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
        return LoadedReplacement(xp.native(self.replaced.param.tensor), self.replaced.rows)


@dataclass(frozen=True)
class LoadedReplacement:
    """Its values at hand; see `adapter.Loaded`."""

    values: Array
    rows: tuple[int, ...] | None

    def low_rank(self) -> LowRank | None:
        return None

    def delta(self, rows: slice) -> Array | None:
        return None

    def parts(self) -> Mapping[str, Array]:
        if self.rows is None:
            return {"values": self.values}
        # By row and not in the file's order; of a row that is named twice the last one stays.
        last = {row: n for n, row in enumerate(self.rows)}
        return {"values": self.values[[last[row] for row in sorted(last)]]}

    def apply(self, w: Array, kind: Kind) -> Array:
        return self._into(w.float())

    def exact(self, w: Array, kind: Kind) -> Array:
        return self._into(w.double())

    def noise(self, w: Array, kind: Kind) -> Array:
        return w.new_zeros(()).float()

    def _into(self, w: Array) -> Array:
        if self.rows is None:
            return self.values.to(w.dtype)
        w = w.clone()
        w[list(self.rows)] = self.values.to(w.dtype)
        return w


def replacements(a: Adapter) -> Iterator[ReplaceChange]:
    """One change for each replaced tensor; they come before the method's own changes."""
    for target, entries in a.replaced.items():
        for entry in entries:
            yield ReplaceChange(target, entry)
