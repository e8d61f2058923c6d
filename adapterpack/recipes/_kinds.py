"""The ways in which PEFT draws what it does not train."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from adapterpack import draws, limits
from adapterpack.recipes._base import Recipe
from adapterpack.recipes._base import integer as json_integer
from adapterpack.recipes._base import only as json_only
from adapterpack.recipes._base import positive as json_positive
from adapterpack.recipes._base import shape as json_shape
from adapterpack.recipes._base import text as json_text
from adapterpack.tensor import DTYPES, F32, DType, Shape, numpy_dtype

if TYPE_CHECKING:
    from adapterpack.tensor import Array

FUSED, TWO_ROUNDINGS = "fused", "two-roundings"
UNIFORM, TERNARY = "uniform", "ternary"


@dataclass(frozen=True)
class Uniform:
    """One uniform draw of a recipe: float32 in [-bound, bound], filled row by row."""

    name: str
    shape: Shape
    bound: float


@dataclass(frozen=True)
class UniformRecipe(Recipe):
    """`torch.empty(shape).uniform_(-bound, bound, generator=g)`, once per draw, from one CPU generator (VeRA, PVeRA).

    Attributes:
        seed: `torch.Generator("cpu").manual_seed(seed)`.
        draws: In this order from one stream.
        arithmetic: `fused` (torch on x86 with AVX2 or better: one rounding) or `two-roundings`.
        through: The float32 draws are rounded through this dtype: that of the base in training.
        stored: dtype of the tensors that come out.
    """

    seed: int
    draws: tuple[Uniform, ...]
    arithmetic: str = FUSED
    through: DType = F32
    stored: DType = F32

    name = "uniform"

    @property
    def outputs(self) -> list[tuple[str, DType, Shape]]:
        return [(d.name, self.stored, d.shape) for d in self.draws]

    def _values(self, torch: Any) -> Iterator[Array]:
        generator = draws.mt19937(self.seed)
        for d in self.draws:
            values = draws.uniform(generator, d.shape, d.bound, fused=self.arithmetic == FUSED)
            yield values.astype(numpy_dtype(self.through))

    def _fields(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "draws": [{"name": d.name, "shape": list(d.shape), "bound": d.bound.hex()} for d in self.draws],
            "order": "row-major, one 32-bit draw per element, low 24 bits",
            "arithmetic": self.arithmetic,
            "through": self.through.name,
            "stored": self.stored.name,
        }

    @classmethod
    def read(cls, r: Mapping[str, Any]) -> Self:
        drawn = tuple(
            Uniform(str(d["name"]), json_shape(d["shape"], 2), json_positive(d["bound"])) for d in r["draws"]
        )
        return cls(json_integer(r["seed"]), drawn, r["arithmetic"], DTYPES[r["through"]], DTYPES[r["stored"]])


@dataclass(frozen=True)
class Basis:
    """One matrix of bases: (rows, bases, columns).

    Attributes:
        bound: Of the uniform draw, both ways; of a ternary one the share of each sign.
        std: What the values are divided by: their own standard deviation, as torch rounded it.
    """

    name: str
    shape: Shape
    bound: float
    std: float


@dataclass(frozen=True)
class BasesRecipe(Recipe):
    """RandLoRA's bases (peft/tuners/randlora/model.py), from one CPU generator, divided by their deviation.

    Attributes:
        law: `uniform`: each base a draw of its own, in `drawn`; `ternary`: -1, 0 and 1 from one draw in [0, 1).
        drawn: BF16 or F16, as the GPU of the training had it; of a ternary law F32.
        arithmetic, through, stored: As of `UniformRecipe`.
    """

    seed: int
    draws: tuple[Basis, ...]
    law: str
    drawn: DType
    arithmetic: str = FUSED
    through: DType = F32
    stored: DType = F32

    name = "bases"

    @property
    def outputs(self) -> list[tuple[str, DType, Shape]]:
        return [(d.name, self.stored, d.shape) for d in self.draws]

    def bare(self) -> Iterator[Array]:
        """The values of each draw before they are divided, in the dtype that they are drawn in."""
        import numpy as np

        generator, own = draws.mt19937(self.seed), numpy_dtype(self.drawn)
        for d in self.draws:
            rows, bases, columns = d.shape
            if self.law == TERNARY:
                u = draws.unit(generator, d.shape)
                low, high = np.float32(d.bound), np.float32(1 - d.bound)
                yield (u > high).astype(own) - (u < low).astype(own)
                continue
            one, fused = (rows, 1, columns), self.arithmetic == FUSED
            each = (draws.narrow_uniform(generator, one, d.bound, self.drawn, fused=fused) for _ in range(bases))
            yield np.concatenate(list(each), axis=1)

    def _values(self, torch: Any) -> Iterator[Array]:
        import numpy as np

        for d, bare in zip(self.draws, self.bare(), strict=True):
            divided = (bare.astype(np.float32) / np.float32(d.std)).astype(numpy_dtype(self.drawn))
            yield divided.astype(numpy_dtype(self.through))

    def _fields(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "draws": [
                {"name": d.name, "shape": list(d.shape), "bound": d.bound.hex(), "std": d.std.hex()}
                for d in self.draws
            ],
            "law": self.law,
            "drawn": self.drawn.name,
            "arithmetic": self.arithmetic,
            "through": self.through.name,
            "stored": self.stored.name,
        }

    @classmethod
    def read(cls, r: Mapping[str, Any]) -> Self:
        json_only(r, "seed", "draws", "law", "drawn", "arithmetic", "through", "stored")
        if r["drawn"] not in {UNIFORM: ("BF16", "F16"), TERNARY: ("F32",)}.get(r["law"], ()):
            raise ValueError("an unknown law or dtype")
        drawn = []
        for d in r["draws"]:
            bound, std = json_positive(d["bound"]), json_positive(d["std"])
            if r["law"] == TERNARY and bound >= 0.5:
                raise ValueError("a share of signs of more than all")
            drawn.append(Basis(json_text(d["name"]), json_shape(d["shape"], 3), bound, std))
        names = (DTYPES[r[field]] for field in ("through", "stored"))
        return cls(json_integer(r["seed"]), tuple(drawn), r["law"], DTYPES[r["drawn"]], r["arithmetic"], *names)


@dataclass(frozen=True)
class Places:
    """Places in a weight of that shape, (out, in)."""

    name: str
    shape: Shape
    count: int


@dataclass(frozen=True)
class PlacesRecipe(Recipe):
    """SHiRA's indices (peft/tuners/shira/mask_functions.py): the first of a permutation, sorted; int32 (2, count).

    Attributes:
        seed: Each draw begins with a generator of its own.
    """

    seed: int
    draws: tuple[Places, ...]

    name = "places"

    @property
    def outputs(self) -> list[tuple[str, DType, Shape]]:
        return [(d.name, DTYPES["I32"], (2, d.count)) for d in self.draws]

    @property
    def cost(self) -> int:
        # A step of a permutation is one of Python's; a large one draws for every element.
        sizes = ((d.count, math.prod(d.shape)) for d in self.draws)
        return sum(16 * count + (2 * size if draws.large(size) else 0) for count, size in sizes)

    def _values(self, torch: Any) -> Iterator[Array]:
        import numpy as np

        for d in self.draws:
            flat = np.sort(draws.permutation(math.prod(d.shape), d.count, self.seed))
            yield np.stack([flat // d.shape[1], flat % d.shape[1]])

    def _fields(self) -> dict[str, Any]:
        made = [{"name": d.name, "shape": list(d.shape), "count": d.count} for d in self.draws]
        return {"seed": self.seed, "draws": made}

    @classmethod
    def read(cls, r: Mapping[str, Any]) -> Self:
        json_only(r, "seed", "draws")
        drawn = []
        for d in r["draws"]:
            shape, count = json_shape(d["shape"], 2), json_integer(d["count"])
            if not 0 < count <= math.prod(shape):
                raise ValueError(f"{count} places of {shape}")
            drawn.append(Places(json_text(d["name"]), shape, count))
        return cls(json_integer(r["seed"]), tuple(drawn))


@dataclass(frozen=True)
class Indices:
    """A matrix of indices and the name of the one with their scales."""

    name: str
    scales: str
    shape: Shape


@dataclass(frozen=True)
class BalancedRecipe(Recipe):
    """UniLoRA's indices, int64, and scales (peft/tuners/unilora/model.py), for all matrices in one shuffle.

    Attributes:
        length: Of the vector that is pointed into.
        through: dtype of the base, that the scales are rounded to.
        stored: dtype of the scales.
    """

    seed: int
    draws: tuple[Indices, ...]
    length: int
    through: DType = F32
    stored: DType = F32

    name = "balanced"
    generator = "pcg64"
    together = True

    @property
    def outputs(self) -> list[tuple[str, DType, Shape]]:
        pairs = ([(d.name, DTYPES["I64"], d.shape), (d.scales, self.stored, d.shape)] for d in self.draws)
        return [output for pair in pairs for output in pair]

    @property
    def cost(self) -> int:
        return 2 * (self.length + sum(math.prod(d.shape) for d in self.draws))

    def _values(self, torch: Any) -> Iterator[Array]:
        import numpy as np

        data = draws.balanced(self.length, sum(math.prod(d.shape) for d in self.draws), self.seed)
        counts = np.bincount(data, minlength=self.length).astype(np.float32)
        with np.errstate(divide="ignore"):
            scale = (np.float32(1) / np.sqrt(counts)).astype(numpy_dtype(self.through))
        at = 0
        for d in self.draws:
            indices = data[at : at + math.prod(d.shape)].reshape(d.shape)
            at += math.prod(d.shape)
            yield indices
            yield scale[indices]

    def _fields(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "draws": [{"name": d.name, "scales": d.scales, "shape": list(d.shape)} for d in self.draws],
            "length": self.length,
            "through": self.through.name,
            "stored": self.stored.name,
        }

    @classmethod
    def read(cls, r: Mapping[str, Any]) -> Self:
        json_only(r, "seed", "draws", "length", "through", "stored")
        length, seed = json_integer(r["length"]), json_integer(r["seed"])
        if not 0 < length <= limits.RECIPE_ELEMENTS or seed < 0:
            raise ValueError("a length or seed out of bounds")
        drawn = tuple(
            Indices(json_text(d["name"]), json_text(d["scales"]), json_shape(d["shape"], 2)) for d in r["draws"]
        )
        return cls(seed, drawn, length, DTYPES[r["through"]], DTYPES[r["stored"]])


@dataclass(frozen=True)
class Normal:
    """One normal draw, from a generator of its own."""

    name: str
    shape: Shape
    seed: int
    std: float


@dataclass(frozen=True)
class NormalRecipe(Recipe):
    """`torch.normal(0, std, shape)`: TinyLoRA's projections. Its last bits are those of torch's build."""

    draws: tuple[Normal, ...]
    through: DType = F32
    stored: DType = F32

    name = "gaussian"
    together = True
    takes_torch = True

    @property
    def outputs(self) -> list[tuple[str, DType, Shape]]:
        return [(d.name, self.stored, d.shape) for d in self.draws]

    def _values(self, torch: Any) -> Iterator[Array]:
        for d in self.draws:
            # All that the generator takes of a seed; torch refuses to be given more than 64 bits.
            generator = torch.Generator("cpu").manual_seed(d.seed & 0xFFFFFFFF)
            drawn = torch.normal(mean=0.0, std=d.std, size=d.shape, generator=generator, dtype=torch.float32)
            yield drawn.numpy().astype(numpy_dtype(self.through))

    def _fields(self) -> dict[str, Any]:
        made = [{"name": d.name, "shape": list(d.shape), "seed": d.seed, "std": d.std.hex()} for d in self.draws]
        return {"draws": made, "through": self.through.name, "stored": self.stored.name}

    @classmethod
    def read(cls, r: Mapping[str, Any]) -> Self:
        json_only(r, "draws", "through", "stored")
        drawn = (
            Normal(json_text(d["name"]), json_shape(d["shape"], 3), json_integer(d["seed"]), json_positive(d["std"]))
            for d in r["draws"]
        )
        return cls(tuple(drawn), DTYPES[r["through"]], DTYPES[r["stored"]])
