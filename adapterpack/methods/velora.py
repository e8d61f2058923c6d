"""VeLoRA (Miles et al. 2024): LoRA whose training keeps its activations compressed.

    delta W = s * B @ A, that of plain LoRA; `lora_velora_embed`, what activations are projected on, is for training

Reference: peft/tuners/lora/variants.py (`VeloraLinearVariant`) and velora.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from adapterpack.adapter import Adapter, Edge, Finding, Grade, Outcome, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.methods import _lora_variants, lora
from adapterpack.methods._keys import KeyTable, positive
from adapterpack.methods._lora_modules import modules
from adapterpack.methods._without import no_recipes

name = "velora"
peft_type = "LORA"
keep_dtype: frozenset[str] = frozenset()
# Its delta weight is plain LoRA's.
changes = lora.changes
ranks = lora.ranks
recipes = no_recipes
_SWITCH, _EMBED = "velora_config", "lora_velora_embed"
keys = KeyTable("lora_", {**_lora_variants.KEYS.params, _EMBED: _EMBED})


def claims(c: Checkpoint) -> bool:
    """Does the config turn it on, or do its tensors? Without the config PEFT drops them; the change is the same."""
    return bool(c.config.get(_SWITCH)) or any(_EMBED in key for key in c.tensors)


def parse(c: Checkpoint) -> Adapter:
    return _lora_variants.parse(c, name, keys, _SWITCH, _EMBED)


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from lora.findings(a, shapes)
    if not a.config.get(_SWITCH):
        return
    groups = positive(_lora_variants.sub_config(a.config, _SWITCH), "num_groups", 32)
    for m in modules(a):
        if "lora_A" in m.params:
            inputs = m.params["lora_A"].tensor.shape[-1]
            yield from _lora_variants.odd_shapes(m, {_EMBED: (-(-inputs // groups),)})


def _plain(a: Adapter, request: Request) -> Outcome:
    return _lora_variants.without_training_state(a, _SWITCH, "what activations are projected on in training")


edges: Mapping[str, tuple[Edge, ...]] = {name: (Edge("lora", Grade.EQUIVALENT, _plain),)}
