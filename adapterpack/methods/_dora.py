"""DoRA (Liu et al. 2024) of matrices: W' = m / ||W + delta W||_row * (W + delta W)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterpack.adapter import Block, Effect, Kind, Loaded, LowRank, Product
from adapterpack.methods._changes import LoadedLowRank, LowRankChange
from adapterpack.tensor import Shape, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend


@dataclass(frozen=True)
class DoraChange:
    """m / ||W + delta|| * (W + delta), the norm over the input features of each output."""

    low_rank: LowRankChange
    magnitude: Tensor

    effect = Effect.TRANSFORM
    # numpy sums the squares of a row in another order.
    torch = True

    def whole(self, kind: Kind) -> bool:
        return kind is not Kind.LINEAR

    def products(self, kind: Kind) -> tuple[Product, ...]:
        return tuple(replace(p, norms=True) for p in self.low_rank.products(kind))

    @property
    def module(self) -> str:
        return self.low_rank.module

    @property
    def target(self) -> str:
        return self.low_rank.target

    @property
    def shape(self) -> Shape:
        return self.low_rank.shape

    @property
    def uses(self) -> frozenset[str]:
        return self.low_rank.uses

    def place(self, shape: Shape, conv1d: bool | None) -> Kind:
        return self.low_rank.place(shape, conv1d)

    def load(self, xp: Backend) -> Loaded:
        b, a = self.low_rank.factors(xp)
        loaded = LoadedLowRank(xp, LowRank(b, a, self.low_rank.scale))
        return _LoadedDora(xp, loaded, xp.f32(self.magnitude))


@dataclass(frozen=True)
class _LoadedDora:
    xp: Backend
    plain: LoadedLowRank
    magnitude: Array

    def low_rank(self) -> LowRank | None:
        return None

    def delta(self, rows: slice) -> Array | None:
        return None

    def parts(self) -> Mapping[str, Array]:
        return {**self.plain.parts(), "magnitude": self.magnitude}

    def apply(self, w: Array, block: Block) -> Array:
        return self._scaled(self.plain.apply(w, block), self.magnitude, block)

    def exact(self, w: Array, block: Block) -> Array:
        return self._scaled(self.plain.exact(w, block), self.xp.f64(self.magnitude), block)

    def noise(self, w: Array, block: Block) -> Array:
        """That of W + delta times m / norm, and what the norm itself loses in summing a row of squares."""
        v = self.plain.apply(w, block)
        inputs = self.plain.factors.a.shape[1]
        own = abs(v) * ((8 + math.sqrt(inputs)) * 2.0**-24)
        return abs(self._gain(v, self.magnitude, block)) * (self.plain.noise(w, block) + own)

    def _gain(self, v: Array, magnitude: Array, block: Block) -> Array:
        """m / norm, as it is broadcast over W. In PEFT's order: the norm of the logical rows, then the quotient."""
        if block.kind is Kind.LINEAR:
            return (magnitude[block.rows] / self.xp.rows_norm(v)).reshape(-1, 1)
        return (magnitude / self.xp.rows_norm(v.T)).reshape(1, -1)

    def _scaled(self, v: Array, magnitude: Array, block: Block) -> Array:
        v *= self._gain(v, magnitude, block)
        return v
