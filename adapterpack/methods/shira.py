"""SHiRA (Bhardwaj et al. 2024): some elements of W change, the others stay.

    W'[i, j] = W[i, j] + weight[k],  (i, j) = indices[:, k]

The places stand in the file; of a random mask the seed gives them back: the first r (in + out) of a permutation,
sorted. There is no low-rank form. Linear layers only.
Reference: peft/tuners/shira/layer.py (`get_delta_weight`) and mask_functions.py (`random_mask`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from adapterpack import draws
from adapterpack.adapter import Adapter, Change, Edge, Finding, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import DenseChange, Maths
from adapterpack.methods._keys import KeyTable, flag, positive, require
from adapterpack.methods._scattered import matrix_shape, scattered, values
from adapterpack.methods._seeded import whole_seed
from adapterpack.methods._without import no_ranks
from adapterpack.recipes import Places, PlacesRecipe, Recipe
from adapterpack.tensor import DTYPES, F32, Shape, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "SHIRA"
keep_dtype: frozenset[str] = frozenset({"indices"})
ranks = no_ranks
keys = KeyTable("shira_", {"weight": "shira_weight", "indices": "shira_indices"})
edges: Mapping[str, tuple[Edge, ...]] = {"shira": ()}
_INTEGERS = (DTYPES["I32"], DTYPES["I64"], F32)
"""Of the indices; PEFT on Windows saves them as float32."""
_SHAPES = 16
"""Most shapes that are tried for one module."""


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "shira", "shira")


def _pair(a: Adapter, module: str) -> tuple[Tensor, Tensor]:
    """(weight, indices) of a module. Raises InvalidFile: they do not fit together."""
    params = a.modules[module]
    weight = values(module, params, "weight")
    (indices,) = require(module, params, ("indices",))
    if indices.shape != (2, *weight.shape) or indices.dtype not in _INTEGERS:
        raise InvalidFile(
            f"{module}: indices {indices.dtype} {indices.shape} do not fit {weight.shape[0]:,} weights: (2, n) of"
            " whole numbers are wanted"
        )
    return weight, indices


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    for module, params in a.modules.items():
        weight, _ = _pair(a, module)
        shape = matrix_shape(a, module, request, weight.shape[0])
        yield DenseChange(
            module=module,
            params=params,
            shape=shape,
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            delta=partial(_delta, module, shape),
        )


def _delta(module: str, shape: Shape, m: Maths) -> Array:
    rows, columns = m["indices"].long()
    inside = bool(((rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])).all())
    places = rows * shape[1] + columns
    if not inside or len(places.unique()) != len(places):
        raise InvalidFile(f"{module}: its indices lie outside of {shape}, or one stands twice")
    # What is not touched keeps its bits: 0 + -0 is 0, but x + -0 is x for every x.
    return scattered(m, shape, places, m["weight"], nothing=-0.0)


def recipes(a: Adapter) -> Iterator[Recipe]:
    """Those of a random mask, for the first module of each shape: others like it have the same places."""
    if a.config.get("mask_type", "random") != "random":
        return
    said, r = a.config.get("random_seed"), positive(a.config, "r", 32)
    seed = draws.DEFAULT_SEED if said is None else whole_seed(a.config, "random_seed", 0)
    known: set[tuple[int, int, int]] = set()
    for module, params in a.modules.items():
        indices = _pair(a, module)[1]
        count = indices.shape[1]
        if indices.dtype != DTYPES["I32"] or count % r:
            continue
        # in + out is known, and no more than a few last rows and columns can be without a place.
        last_row, last_column = (int(row.max()) for row in indices.numpy())
        sides = count // r
        for out in range(last_row + 1, min(last_row + 1 + _SHAPES, sides - last_column)):
            if (count, last_row, last_column) not in known and last_row >= 0 and last_column >= 0:
                yield PlacesRecipe(seed, (Places(params["indices"].key, (out, sides - out), count),))
        known.add((count, last_row, last_column))


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    for module in a.modules:
        try:
            _pair(a, module)
        except InvalidFile as e:
            yield Finding("half-pair", module, e.message, "train or save the adapter again")
