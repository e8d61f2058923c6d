"""MonteCLoRA (Das et al. 2024): LoRA whose A is sampled around its mean in training.

    delta W = s * B @ A, that of plain LoRA; the sampler's distribution is for training

Reference: peft/tuners/lora/variants.py (`MontecloraLinearVariant`) and monteclora.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from adapterpack.adapter import Adapter, Edge, Finding, Grade, Outcome, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.methods import _lora_variants, lora
from adapterpack.methods._keys import KeyTable, positive
from adapterpack.methods._lora_modules import modules
from adapterpack.methods._without import no_recipes

name = "monteclora"
peft_type = "LORA"
keep_dtype: frozenset[str] = frozenset()
# Its delta weight is plain LoRA's.
changes = lora.changes
ranks = lora.ranks
recipes = no_recipes
_SWITCH, _SAMPLER = "monteclora_config", "lora_monteclora"
_STATE = ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")
keys = KeyTable("lora_", {**_lora_variants.KEYS.params, **{n: f"lora_monteclora_sampler.{n}" for n in _STATE}})


def claims(c: Checkpoint) -> bool:
    """Does the config turn it on, or do its tensors? Without the config PEFT drops them; the change is the same."""
    return bool(c.config.get(_SWITCH)) or any(_SAMPLER in key for key in c.tensors)


def parse(c: Checkpoint) -> Adapter:
    return _lora_variants.parse(c, name, keys, _SWITCH, _SAMPLER)


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from lora.findings(a, shapes)
    if not a.config.get(_SWITCH):
        return
    samples = positive(_lora_variants.sub_config(a.config, _SWITCH), "num_samples", 8)
    for m in modules(a):
        if "lora_A" in m.params:
            rank = m.params["lora_A"].tensor.shape[0]
            wanted = {"std_prior": (rank,), "gaussian_var_prior": (rank, rank)}
            per_sample = dict.fromkeys(("expert_weights_prior", "expert_weights"), (samples,))
            yield from _lora_variants.odd_shapes(m, wanted | per_sample)


def _plain(a: Adapter, request: Request) -> Outcome:
    return _lora_variants.without_training_state(a, _SWITCH, "the distribution that A was sampled from in training")


edges: Mapping[str, tuple[Edge, ...]] = {name: (Edge("lora", Grade.EQUIVALENT, _plain),)}
