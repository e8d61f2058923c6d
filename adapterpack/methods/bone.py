"""Bone (Kang 2024), MiSS as PEFT called it before 0.19, with which it was removed: PEFT cannot load it any more.

The tensors are MiSS's under other names. In the mode `bat` Bone rounded what it adds to the base's dtype first.
Reference: PEFT 0.17.1, peft/tuners/bone/layer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Need, Outcome, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.methods import _shards, miss
from adapterpack.methods._keys import KeyTable
from adapterpack.methods._shards import BAT, STANDARD
from adapterpack.methods._without import no_recipes

peft_type = "BONE"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
keys = KeyTable("bone_", {"block": "bone_block"})


def parse(c: Checkpoint) -> Adapter:
    return replace(keys.parse(c, "bone", STANDARD), encoding=_shards.mode(c.config, (BAT,)))


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    return _shards.changes(a, request, round_bat=True)


def ranks(a: Adapter) -> Mapping[str, int]:
    return {module: _shards.rank(a, module) for module in a.modules}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from _shards.findings(a)
    yield Finding(
        "removed-from-peft",
        "peft_type",
        "PEFT 0.19 and later cannot load Bone",
        "adapterpack convert --to miss gives the same adapter under the name that PEFT reads",
        warning=True,
    )


def _to_miss(a: Adapter, request: Request) -> Outcome:
    config = {**a.config, "peft_type": miss.peft_type}
    if str(config.get("bias", "")).lower() == "bone_only":
        config["bias"] = "miss_only"
    modules = {
        module: {name: Param(miss.keys.key(module, name), p.tensor) for name, p in params.items()}
        for module, params in a.modules.items()
    }
    renamed = replace(a, method="miss", config=config, modules=modules, changed=True)
    note = "the same tensors under the names of MiSS"
    if a.encoding == BAT:
        note += "; on a base of 16 bits PEFT merges MiSS with one rounding, where it merged Bone with two"
    return Outcome(renamed, Grade.EQUIVALENT, notes=(note,))


def _fold(a: Adapter, request: Request) -> Outcome:
    return _shards.fold(a, request, changes(a, request))


_TO_MISS = Edge("miss", Grade.EQUIVALENT, _to_miss)
edges: Mapping[str, tuple[Edge, ...]] = {
    STANDARD: (_TO_MISS, Edge("lora", Grade.EQUIVALENT, _fold, needs=Need.SHAPES)),
    BAT: (_TO_MISS,),
}
