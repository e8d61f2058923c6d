"""LN tuning (Zhao et al. 2024): norm layers, or any others that are named, trained and stored whole.

    the tensors of the layer get new values

Reference: peft/tuners/ln_tuning/layer.py (`merge` exchanges the layer with its trained copy).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from adapterpack.adapter import Adapter, Change, Edge, Finding, Replaced, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import Unsupported
from adapterpack.methods._changes import ReplaceChange, replacements
from adapterpack.methods._keys import KeyTable
from adapterpack.methods._without import no_ranks, no_recipes

peft_type = "LN_TUNING"
keep_dtype: frozenset[str] = frozenset()
ranks = no_ranks
recipes = no_recipes
_COUNT = "num_batches_tracked"
_PARTS = ("weight", "bias", "running_mean", "running_var", _COUNT)
keys = KeyTable("ln_tuning_", {part: f"ln_tuning_layers.{part}" for part in _PARTS})
edges: Mapping[str, tuple[Edge, ...]] = {"ln_tuning": ()}


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "ln_tuning", "ln_tuning")


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    for module, params in a.modules.items():
        if _COUNT in params:
            raise Unsupported(
                f"{module} is a batch norm: its {_COUNT} is a whole number, which no merge writes",
                hint="merge it with PEFT",
            )
        for part, param in params.items():
            yield ReplaceChange(f"{module}.{part}", Replaced(param))


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    for module, params in a.modules.items():
        if "weight" not in params:
            yield Finding(
                "half-pair", module, f"{module} lacks its weight: PEFT keeps the base's", "save the adapter again"
            )
