"""BEFT (2025): a learned vector is added to the bias of a linear layer.

    b' = b + v

Reference: peft/tuners/beft/layer.py (`merge`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Edge, Finding, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, WrongBase
from adapterpack.methods._changes import VectorChange, replacements
from adapterpack.methods._keys import KeyTable, floats
from adapterpack.methods._without import no_ranks, no_recipes
from adapterpack.tensor import Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

peft_type = "BEFT"
keep_dtype: frozenset[str] = frozenset()
ranks = no_ranks
recipes = no_recipes
keys = KeyTable("beft_", {"bias": "beft_bias"})
edges: Mapping[str, tuple[Edge, ...]] = {"beft": ()}


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "beft", "beft")


def _vector(module: str, params: Mapping[str, Param]) -> Param:
    (tensor,) = floats(module, params, ("bias",))
    if len(tensor.shape) != 2 or tensor.shape[0] != 1 or not tensor.shape[1]:
        raise InvalidFile(f"beft_bias of {module} has shape {tensor.shape}; (1, out) is wanted")
    return params["bias"]


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    for module, params in a.modules.items():
        param = _vector(module, params)
        if request.shapes is not None and not request.shapes.has(f"{module}.bias"):
            raise WrongBase(
                f"{module} has no bias in the base: there is nothing to add beft_bias to",
                hint="PEFT cannot merge it either; keep the adapter beside its base",
            )
        out = param.tensor.shape[1]
        yield VectorChange(module, partial(_values, param.tensor), (out,), 1.0, frozenset({param.key}))


def _values(tensor: Tensor, xp: Backend) -> Array:
    return xp.f32(tensor).reshape(-1)


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    for module, params in a.modules.items():
        try:
            _vector(module, params)
        except InvalidFile as e:
            yield Finding("other-shape", module, e.message, "train or save the adapter again")
