"""What all recipes have in common, and how their JSON is read strictly."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adapterpack import limits
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.tensor import DType, Shape, Tensor, from_numpy, numpy_dtype

if TYPE_CHECKING:
    from adapterpack.tensor import Array

METADATA_KEY = "adapterpack"
VERSION = 1
TOGETHER = "*"
"""The one name under `sha256` of a recipe whose tensors have one digest together."""


@dataclass(frozen=True)
class Recipe:
    """How some tensors are drawn; its kinds are the classes below.

    Attributes:
        digests: Name to SHA-256 of its bytes, or `*` to that of all of them in order; empty: nothing was recorded.
        keys: Name to the key under which the file had the tensor; empty where the names are the keys.
    """

    digests: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    keys: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    name: ClassVar[str]
    generator: ClassVar[str] = "mt19937"
    together: ClassVar[bool] = False
    """Have its tensors one digest together?"""
    takes_torch: ClassVar[bool] = False
    """Are its bits torch's own, and of the build of torch that draws them?"""
    takes_base: ClassVar[bool] = False
    """Are they made of the base's weights? Then its kind says how, and `draw` refuses."""

    @property
    def outputs(self) -> list[tuple[str, DType, Shape]]:
        """Name, dtype and shape of each tensor, in order."""
        raise NotImplementedError

    @cached_property
    def shapes(self) -> Mapping[str, tuple[DType, Shape]]:
        """dtype and shape by name."""
        return {name: (dtype, shape) for name, dtype, shape in self.outputs}

    @property
    def cost(self) -> int:
        """How many numbers must be drawn, about."""
        return sum(math.prod(shape) for _, _, shape in self.outputs)

    def _values(self, torch: Any) -> Iterator[Array]:
        """The values of each output."""
        raise NotImplementedError

    def _fields(self) -> dict[str, Any]:
        """What the JSON says beside name, generator, digests and keys."""
        raise NotImplementedError

    @classmethod
    def read(cls, r: Mapping[str, Any]) -> Self:
        """From its JSON. Raises KeyError, TypeError or ValueError for what makes no sense."""
        raise NotImplementedError

    def draw(self, torch: Any = None) -> dict[str, Tensor]:
        """The tensors, by name.

        Args:
            torch: The module, for kinds that take it.

        Raises:
            Unsupported: too large, or it takes torch, or the base.
            InvalidFile: a recorded digest does not agree.
        """
        if self.takes_base:
            raise Unsupported(f"a {self.name} recipe takes the base's weights")
        if self.cost > limits.RECIPE_ELEMENTS:
            raise Unsupported(f"the recipe would draw more than {limits.RECIPE_ELEMENTS:,} numbers")
        if self.takes_torch and torch is None:
            raise Unsupported(f"a {self.name} recipe is drawn by torch alone")
        values = zip(self.outputs, self._values(torch), strict=True)
        drawn = {name: from_numpy(v.astype(numpy_dtype(dtype), copy=False)) for (name, dtype, _), v in values}
        for name, digest in self.digests.items():
            found = _digest_of_all(drawn) if name == TOGETHER else drawn[name].digest()
            if found != digest:
                what = "set of tensors" if name == TOGETHER else name
                hint = "the recipe or the seed in the config was changed; restore the original files"
                if self.takes_torch:
                    hint += ". Or it is another build of torch: convert where the recipe was made"
                raise InvalidFile(f"the recipe gives another {what} than the one recorded", hint=hint)
        return drawn

    def proven(self, drawn: Mapping[str, Tensor], keys: Mapping[str, str] | None = None) -> Self:
        """This recipe with the digests of what it drew."""
        each = {name: tensor.digest() for name, tensor in drawn.items()} if not self.together else {}
        return replace(self, digests=each or {TOGETHER: _digest_of_all(drawn)}, keys=keys or {})

    def to_metadata(self) -> str:
        """JSON for `__metadata__["adapterpack"]`; PEFT ignores it."""
        recipe = {
            "name": self.name,
            "generator": self.generator,
            **self._fields(),
            "sha256": dict(self.digests),
            "keys": dict(self.keys),
        }
        return json.dumps({"version": VERSION, "recipe": recipe}, separators=(",", ":"), sort_keys=True)


def _digest_of_all(drawn: Mapping[str, Tensor]) -> str:
    h = hashlib.sha256()
    for tensor in drawn.values():
        h.update(tensor.bytes())
    return h.hexdigest()


def only(r: Mapping[str, Any], *own: str) -> None:
    """A recipe has these fields, no other, and a list of draws whose names are keys."""
    if set(r) != {"name", "generator", "sha256", "keys", *own} or not isinstance(r["draws"], list) or r["keys"]:
        raise ValueError("other fields than it should have")


def text(value: object) -> str:
    """A string. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no name")
    return value


def integer(value: object) -> int:
    """A whole number of 64 bits. Raises TypeError."""
    if type(value) is not int or not -(1 << 64) < value < 1 << 64:
        raise TypeError(f"{value!r:.40} is not a whole number of 64 bits")
    return value


def shape(value: object, rank: int) -> Shape:
    """A shape of so many dimensions, none of them 0. Raises TypeError or ValueError."""
    if not isinstance(value, list) or len(value) != rank:
        raise TypeError(f"{value!r:.40} is not a shape")
    found = tuple(integer(n) for n in value)
    if not all(0 < n <= limits.DIMENSION for n in found):
        raise ValueError(f"{value!r:.60} is not a shape")
    return found


def positive(value: str) -> float:
    """A double in hexadecimal, > 0 and no absurd one. Raises TypeError or ValueError."""
    number = float.fromhex(value)
    if not 0 < number < 1e30:
        raise ValueError(f"{value!r:.40} is no bound")
    return number
