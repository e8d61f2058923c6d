"""Trainable tokens: rows of an embedding, for the tokens of `token_indices`, get new values.

The tensor is called a delta and holds the rows themselves. Output embeddings that are tied to the input follow.
Reference: peft/tuners/trainable_tokens/layer.py (`merge`) and model.py (`inject_adapter`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from adapterpack.adapter import Adapter, Change, Edge, Finding, Param, Replaced, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.methods._changes import ReplaceChange, replacements
from adapterpack.methods._keys import KeyTable, require, token_rows
from adapterpack.methods._without import no_ranks, no_recipes

peft_type = "TRAINABLE_TOKENS"
keep_dtype: frozenset[str] = frozenset()
ranks = no_ranks
recipes = no_recipes
keys = KeyTable("trainable_tokens_", {"delta": "trainable_tokens_delta"})
edges: Mapping[str, tuple[Edge, ...]] = {"trainable_tokens": ()}
_FIELD = "token_indices"


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "trainable_tokens", "trainable_tokens")


def _rows(a: Adapter, module: str, params: Mapping[str, Param]) -> Replaced:
    (tensor,) = require(module, params, ("delta",))
    param = params["delta"]
    # One list for all layers that are targeted.
    rows = token_rows(param.key, tensor, a.config.get(_FIELD), _FIELD)
    if not tensor.numel:
        raise InvalidFile(f"{param.key} has shape {tensor.shape}: it holds no rows")
    return Replaced(param, rows)


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    for module, params in a.modules.items():
        yield ReplaceChange(f"{module}.weight", _rows(a, module, params))


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    for module, params in a.modules.items():
        try:
            _rows(a, module, params)
        except InvalidFile as e:
            yield Finding("token-rows", module, e.message, f"{_FIELD} must be the list that it was trained with")
