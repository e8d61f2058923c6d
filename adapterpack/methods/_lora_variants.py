"""What calls itself LoRA and is not: variants that change the base or the maths, recognised so as to be refused.

By `peft_type` and key names all of them look like plain LoRA; read as such they would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_KEEPS_BASE = {"true", "false", "gaussian", "orthogonal", "mica", "eva", "none"}
"""`init_lora_weights` that leave the base as it is, so that file and base give the trained model."""
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_VARIANTS = {
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron LoRA",
}
_VARIANT_MARKS = {
    "lora_diag": "KaSA",
    "lora_velora_embed": "VeLoRA",
    "lora_latent": "LoRA-XS",
    "lora_arrow": "Arrow",
    "lora_monteclora": "MonteCLoRA",
}
_KNOWN = {"use_dora", "use_rslora", "eva_config", "corda_config", "loftq_config", "lora_ga_config"}


def moved_base(config: Mapping[str, Any]) -> str | None:
    """The initialisation that took a part of the base into the adapter, `pissa`; None if none did."""
    init = str(config.get("init_lora_weights", True)).lower()
    return next((kind for kind in _MOVES_BASE if init.startswith(kind)), None)


def refused_variant(config: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Why this is not the LoRA that we know, None if it is: by config, then by the names of its tensors."""
    init = str(config.get("init_lora_weights", True)).lower()
    if moved_base(config):
        return (
            f"it was trained with init_lora_weights={config['init_lora_weights']!r}, which changes the base"
            " weights: B @ A is not what it learned"
        )
    if init not in _KEEPS_BASE:
        return f"init_lora_weights={config['init_lora_weights']!r:.60} is unknown"
    for field, name in _VARIANTS.items():
        if config.get(field):
            return f"it is {name}"
    for field, value in config.items():
        # Tomorrow's variants will be switches like today's: better refused than read as plain LoRA.
        if field.startswith("use_") and field not in _KNOWN and value:
            return f"{field} is unknown"
    for key in names:
        for mark, name in _VARIANT_MARKS.items():
            if mark in key:
                return f"it is {name} ({key})"
    return None
