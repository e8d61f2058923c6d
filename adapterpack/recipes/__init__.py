"""Tensors that a seed gives back, drawn in our own numpy code (an SVD of the base: scikit-learn's), proven by digest.

A `Recipe` names the generator, the order of the draws, shapes, bounds, how the arithmetic rounds, and the
dtype that the values went through, so that it means the same on every machine and torch version. Its kinds are the
ways in which PEFT draws: `formats/peft/SPEC.md` section 8 describes each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.io import json as strict_json
from adapterpack.recipes._base import METADATA_KEY, TOGETHER, VERSION, Recipe
from adapterpack.recipes._kinds import (
    FUSED,
    TERNARY,
    TWO_ROUNDINGS,
    UNIFORM,
    BalancedRecipe,
    BasesRecipe,
    Basis,
    Indices,
    Normal,
    NormalRecipe,
    Places,
    PlacesRecipe,
    Uniform,
    UniformRecipe,
)
from adapterpack.recipes._svd import INPUTS, OUTPUTS, Factored, SvdRecipe, ways
from adapterpack.tensor import BF16, F16, F32

__all__ = [
    "FUSED",
    "INPUTS",
    "METADATA_KEY",
    "OUTPUTS",
    "TERNARY",
    "TWO_ROUNDINGS",
    "UNIFORM",
    "BalancedRecipe",
    "BasesRecipe",
    "Basis",
    "Factored",
    "Indices",
    "Normal",
    "NormalRecipe",
    "Places",
    "PlacesRecipe",
    "Recipe",
    "SvdRecipe",
    "Uniform",
    "UniformRecipe",
    "from_metadata",
    "ways",
]

_KINDS: dict[str, type[Recipe]] = {
    kind.name: kind for kind in (UniformRecipe, BasesRecipe, PlacesRecipe, BalancedRecipe, NormalRecipe, SvdRecipe)
}


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
        kind = _KINDS.get(r["name"])
        if kind is None or r["generator"] != kind.generator:
            raise Unsupported(f"{where} has an unknown recipe {r['name']!r:.40}", hint="update adapterpack")
        read = kind.read(r)
        recipe = replace(
            read,
            digests={str(k): str(v) for k, v in r["sha256"].items()},
            keys={str(k): str(v) for k, v in r["keys"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise InvalidFile(f"{where} is not a recipe: {e}") from e
    _check(recipe, where)
    return recipe


def _check(recipe: Recipe, where: str) -> None:
    floats = {F32, BF16, F16}
    dtypes = {getattr(recipe, field, F32) for field in ("through", "stored")}
    if getattr(recipe, "arithmetic", FUSED) not in (FUSED, TWO_ROUNDINGS) or not dtypes <= floats:
        raise InvalidFile(f"{where} has an unknown arithmetic or dtype")
    names = [name for name, _, _ in recipe.outputs]
    if len(set(names)) != len(names) or sorted(recipe.digests) != ([TOGETHER] if recipe.together else sorted(names)):
        raise InvalidFile(f"{where} does not have one digest for each tensor")
