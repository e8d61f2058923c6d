"""LoRA and DoRA on convolutions (Conv1d, Conv2d, Conv3d of torch), whose weight is (out, in, k...).

    delta W = s * conv(A^T, B)^T: (B as (out, r) @ A as (r, in * k...)), in the order of sums of a convolution

Reference: peft/tuners/lora/layer.py (`_ConvNd.get_delta_weight`), variants.py (`_DoraConvNdVariant.merge_unsafe`)
and dora.py (`_DoraConvNdLayer.get_weight_norm`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from adapterpack.adapter import Block, Effect, Kind, Loaded, LowRank, Product
from adapterpack.errors import WrongBase
from adapterpack.tensor import Shape, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

_EPS = 2.0**-24


@dataclass(frozen=True)
class ConvolutionChange:
    """W + delta, or with magnitudes m / ||W + delta|| * (W + delta), the norm over all inputs of an output.

    Attributes:
        module: Path of the module.
        factors: Reads (B, A), f32, (out, r, 1...) and (r, in, k...).
        shape: (out, in, k...).
        rank: Rows of A.
        magnitude: (1, out, 1...); None without DoRA.
    """

    module: str
    factors: Callable[[Backend], tuple[Array, Array]]
    shape: Shape
    rank: int
    scale: float
    uses: frozenset[str]
    magnitude: Tensor | None = None

    # Its sums are those of torch's convolution.
    torch = True

    @property
    def effect(self) -> Effect:
        return Effect.ADD if self.magnitude is None else Effect.TRANSFORM

    @property
    def target(self) -> str:
        return f"{self.module}.weight"

    def whole(self, kind: Kind) -> bool:
        return True

    def products(self, kind: Kind) -> tuple[Product, ...]:
        return ()

    def place(self, shape: Shape, conv1d: bool | None) -> Kind:
        if shape != self.shape:
            raise WrongBase(f"{self.target} has shape {shape}, the adapter's change {self.shape}")
        return Kind.CONVOLUTION

    def load(self, xp: Backend) -> Loaded:
        b, a = self.factors(xp)
        return _LoadedConvolution(xp, b, a, self.scale, None if self.magnitude is None else xp.f32(self.magnitude))


@dataclass(frozen=True)
class _LoadedConvolution:
    """Its tensors at hand, f32; see `adapter.Loaded`."""

    xp: Backend
    b: Array
    a: Array
    scale: float
    magnitude: Array | None

    @cached_property
    def _flat(self) -> LowRank:
        return LowRank(self.b.reshape(self.b.shape[0], -1), self.a.reshape(self.a.shape[0], -1), self.scale)

    @cached_property
    def _f64(self) -> tuple[Array, Array]:
        return self.xp.f64(self._flat.b), self.xp.f64(self._flat.a)

    def low_rank(self) -> LowRank | None:
        """(out, r) and (r, in * k...)."""
        return self._flat if self.magnitude is None else None

    def delta(self, rows: slice) -> Array | None:
        if self.magnitude is not None:
            return None
        b, a = self._f64
        return (b[rows] @ a) * self.scale

    def parts(self) -> Mapping[str, Array]:
        parts = {"B": self.b * self.scale, "A": self.a}
        return parts if self.magnitude is None else {**parts, "magnitude": self.magnitude}

    @property
    def _shape(self) -> Shape:
        return (self.b.shape[0], *self.a.shape[1:])

    def _product(self) -> Array:
        """PEFT's delta, (out, in, k...), by the same operation for each kernel."""
        kernel = self.a.ndim - 2
        if all(k == 1 for k in self.a.shape[2:]) and kernel > 1:
            # Where PEFT multiplies matrices: kernel 1x1. (1x1x1 fails in PEFT 0.21.)
            return (self._flat.b @ self._flat.a).reshape(self._shape) * self.scale
        functional = self.xp.torch.nn.functional
        convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[kernel - 1]
        return convolution(self.a.transpose(0, 1), self.b).transpose(0, 1) * self.scale

    def apply(self, w: Array, block: Block) -> Array:
        v = w.reshape(self._shape) + self._product()
        if self.magnitude is not None:
            inputs = tuple(range(1, v.ndim))
            norm = v.norm(p=2, dim=inputs, keepdim=True).transpose(1, 0)
            v = (self.magnitude / norm).reshape(-1, *(1 for _ in inputs)) * v
        return v.reshape(w.shape)

    def exact(self, w: Array, block: Block) -> Array:
        b, a = self._f64
        v = w.reshape(self.b.shape[0], -1) + (b @ a) * self.scale
        return (self._gain(v) * v).reshape(w.shape)

    def _gain(self, v: Array) -> Array | float:
        if self.magnitude is None:
            return 1.0
        return self.magnitude.to(v.dtype).reshape(-1, 1) / self.xp.rows_norm(v).reshape(-1, 1)

    def noise(self, w: Array, block: Block) -> Array:
        """That of a sum of r products; with magnitudes times m / norm, and what the norm loses."""
        f = self._flat
        units = 2 * (1 + math.sqrt(f.a.shape[0]))
        lost = (abs(f.b) @ abs(f.a)) * (abs(f.scale) * units * _EPS)
        if self.magnitude is not None:
            v = w.reshape(lost.shape) + f.b @ f.a * f.scale
            lost = abs(self._gain(v)) * (lost + abs(v) * ((8 + math.sqrt(v.shape[1])) * _EPS))
        return lost.reshape(w.shape)
