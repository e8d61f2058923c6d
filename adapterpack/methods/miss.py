"""MiSS (Kang and Yin 2024): shards of W that share one trained block; see `_shards` for its three modes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Need, Outcome, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.methods import _shards
from adapterpack.methods._keys import KeyTable, positive
from adapterpack.methods._shards import BAT, MINI, STANDARD
from adapterpack.methods._without import no_recipes

peft_type = "MISS"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
keys = KeyTable("miss_", {"block": "miss_block"})


def parse(c: Checkpoint) -> Adapter:
    return replace(keys.parse(c, "miss", STANDARD), encoding=_shards.mode(c.config, (BAT, MINI)))


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    return _shards.changes(a, request, round_bat=False)


def ranks(a: Adapter) -> Mapping[str, int]:
    return {module: _shards.rank(a, module) for module in a.modules}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from _shards.findings(a)
    if a.encoding != MINI:
        return
    said = positive(a.config, "mini_r", 1)
    for module, params in a.modules.items():
        found = params["block"].tensor.shape[-1:]
        if found != (said,):
            message = f"mini_r is {said}, the block ends in {found}: PEFT refuses to load it"
            yield Finding("rank-mismatch", module, message, "take the config that was saved with these tensors")


def _fold(a: Adapter, request: Request) -> Outcome:
    return _shards.fold(a, request, changes(a, request))


_TO_LORA = Edge("lora", Grade.EQUIVALENT, _fold, needs=Need.SHAPES)
edges: Mapping[str, tuple[Edge, ...]] = {STANDARD: (_TO_LORA,), MINI: (_TO_LORA,), BAT: ()}
