"""Tensors that a seed gives back, drawn in our own numpy code and proven by digest.

A `Recipe` names the generator, the order of the draws, shapes, bounds, how the arithmetic rounds, and the
dtype that the values went through, so that it means the same on every machine and torch version.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterpack import limits
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.io import json as strict_json
from adapterpack.tensor import CASTABLE, DTYPES, DType, Tensor, from_numpy, numpy_dtype

if TYPE_CHECKING:
    import numpy as np

    from adapterpack.tensor import Array

METADATA_KEY = "adapterpack"
VERSION = 1
FUSED, TWO_ROUNDINGS = "fused", "two-roundings"


@dataclass(frozen=True)
class Uniform:
    """One uniform draw of a recipe: float32 in [-bound, bound], filled row by row."""

    name: str
    shape: tuple[int, int]
    bound: float


@dataclass(frozen=True)
class Recipe:
    """`torch.empty(shape).uniform_(-bound, bound, generator=g)`, once per draw, from one CPU generator.

    Attributes:
        seed: `torch.Generator("cpu").manual_seed(seed)`.
        draws: In this order from one stream.
        arithmetic: `fused` (torch on x86 with AVX2 or better: one rounding) or `two-roundings`.
        through: The float32 draws are rounded through this dtype: that of the base in training.
        stored: dtype of the tensors that come out.
        digests: Name to SHA-256 of its bytes; empty where nothing was recorded.
        keys: Name to the key under which the file had the tensor.
    """

    seed: int
    draws: tuple[Uniform, ...]
    arithmetic: str = FUSED
    through: DType = DTYPES["F32"]
    stored: DType = DTYPES["F32"]
    digests: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    def draw(self) -> dict[str, Tensor]:
        """The tensors, by name.

        Raises:
            Unsupported: too large.
            InvalidFile: a recorded digest does not agree.
        """
        if sum(math.prod(d.shape) for d in self.draws) > limits.RECIPE_ELEMENTS:
            raise Unsupported(f"the recipe would draw more than {limits.RECIPE_ELEMENTS:,} numbers")
        generator = mt19937(self.seed)
        drawn = {}
        for d in self.draws:
            values = uniform(generator, d.shape, d.bound, fused=self.arithmetic == FUSED)
            through = values.astype(numpy_dtype(self.through))
            drawn[d.name] = from_numpy(through.astype(numpy_dtype(self.stored)))
        for name, tensor in drawn.items():
            if name in self.digests and tensor.digest() != self.digests[name]:
                raise InvalidFile(
                    f"the recipe gives another {name} than the one recorded",
                    hint="the recipe or the seed in the config was changed; restore the original files",
                )
        return drawn

    def to_metadata(self) -> str:
        """JSON for `__metadata__["adapterpack"]`; PEFT ignores it."""
        recipe = {
            "name": "uniform",
            "generator": "mt19937",
            "seed": self.seed,
            "draws": [{"name": d.name, "shape": list(d.shape), "bound": d.bound.hex()} for d in self.draws],
            "order": "row-major, one 32-bit draw per element, low 24 bits",
            "arithmetic": self.arithmetic,
            "through": self.through.name,
            "stored": self.stored.name,
            "sha256": dict(self.digests),
            "keys": dict(self.keys),
        }
        return json.dumps({"version": VERSION, "recipe": recipe}, separators=(",", ":"), sort_keys=True)


def from_metadata(metadata: Mapping[str, str]) -> Recipe | None:
    """The recipe that travels in a file's metadata, None if there is none.

    Raises:
        InvalidFile: there is one that makes no sense.
        Unsupported: it is of a later version.
    """
    if METADATA_KEY not in metadata:
        return None
    where = f'__metadata__["{METADATA_KEY}"]'
    record = strict_json.parse(metadata[METADATA_KEY].encode(), where)
    if record.get("version") != VERSION:
        raise Unsupported(
            f"{where} has version {record.get('version')!r:.40}; this adapterpack reads version {VERSION}",
            hint="update adapterpack",
        )
    try:
        r: dict[str, Any] = record["recipe"]
        if r["name"] != "uniform" or r["generator"] != "mt19937":
            raise Unsupported(f"{where} has an unknown recipe {r['name']!r:.40}", hint="update adapterpack")
        draws = tuple(Uniform(str(d["name"]), _shape(d["shape"]), _bound(d["bound"])) for d in r["draws"])
        recipe = Recipe(
            seed=_integer(r["seed"]),
            draws=draws,
            arithmetic=r["arithmetic"],
            through=DTYPES[r["through"]],
            stored=DTYPES[r["stored"]],
            digests={str(k): str(v) for k, v in r["sha256"].items()},
            keys={str(k): str(v) for k, v in r["keys"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise InvalidFile(f"{where} is not a recipe: {e}") from e
    floats = set(CASTABLE.values())
    if recipe.arithmetic not in (FUSED, TWO_ROUNDINGS) or not {recipe.through, recipe.stored} <= floats:
        raise InvalidFile(f"{where} has an unknown arithmetic or dtype")
    if sorted(recipe.digests) != sorted(d.name for d in draws):
        raise InvalidFile(f"{where} does not have one digest for each tensor")
    return recipe


def _integer(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r:.40} is not a whole number")
    return value


def _shape(value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise TypeError(f"{value!r:.40} is not a shape")
    rows, columns = (_integer(n) for n in value)
    if not (0 < rows <= limits.DIMENSION and 0 < columns <= limits.DIMENSION):
        raise ValueError(f"{value!r} is not a shape")
    return rows, columns


def _bound(value: str) -> float:
    bound = float.fromhex(value)
    if not 0 < bound < 1e30:
        raise ValueError(f"{value!r:.40} is no bound")
    return bound


def mt19937(seed: int) -> np.random.MT19937:
    """The state of `torch.Generator("cpu").manual_seed(seed)`: init_genrand of the low 32 bits.

    numpy seeds its own generators through another function, so the 624 words are written out here
    (Matsumoto and Nishimura 1998; multiplier 1812433253).
    """
    import numpy as np

    words = [seed & 0xFFFFFFFF]
    for i in range(1, 624):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + i) & 0xFFFFFFFF)
    generator = np.random.MT19937()
    generator.state = {
        "bit_generator": "MT19937",
        "state": {"key": np.array(words, dtype=np.uint32), "pos": 624},
    }
    return generator


def uniform(generator: np.random.MT19937, shape: tuple[int, int], bound: float, *, fused: bool) -> Array:
    """`torch.empty(shape).uniform_(-bound, bound)` on a CPU, bit for bit, float32.

    `u * (to - from) + from` with u of 24 bits. Fused: product and sum fit in the 53 bits of a double, so
    one rounding at the end is what a fused multiply-add gives. Else: each of the two operations rounds.
    """
    import numpy as np

    out = np.empty(math.prod(shape), dtype=np.float32)
    low, high = np.float32(-bound), np.float32(bound)
    span = np.float32(high - low)
    step = 1 << 20
    for start in range(0, out.size, step):
        part = out[start : start + step]
        raw = generator.random_raw(part.size) & np.uint64(0xFFFFFF)
        if fused:
            part[:] = raw.astype(np.float64) * 2.0**-24 * np.float64(span) + np.float64(low)
        else:
            part[:] = raw.astype(np.float32) * np.float32(2.0**-24) * span + low
    return out.reshape(shape)
