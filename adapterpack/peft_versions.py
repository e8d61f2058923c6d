"""Which fields of a LoRA's adapter_config.json each version of PEFT knows, and the least config that says it all.

Until 0.13 PEFT passed every key of the file to the constructor of its class, so that an unknown one was a TypeError
("unexpected keyword argument"); from 0.14 on it warns and goes on (PEFT #2038). TGI and LoRAX read the config
through whichever PEFT they have installed.

The table was read from the sources of each tagged release, v0.4.0 to v0.20.0 (`peft/tuners/lora/config.py`, earlier
`lora.py`, and `peft/config.py`), and from the package of 0.21.2; nothing here is from changelogs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapterpack.errors import UsageError

Version = tuple[int, int, int]

OLDEST: Version = (0, 4, 0)
"""The first release that reads adapter_model.safetensors (`peft_model.py`, load_adapter)."""
FORGIVING: Version = (0, 14, 0)
"""The first one that drops keys which it does not know, instead of failing."""

_OLD = {
    "peft_type": None,
    "base_model_name_or_path": None,
    "task_type": None,
    "inference_mode": False,
    "r": 8,
    "target_modules": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "auto_mapping": None,
    "revision": None,
}
"""Known to 0.4.0 already, with the defaults of the class."""

_SINCE: Mapping[str, tuple[Version, Any]] = {
    "rank_pattern": ((0, 6, 0), {}),
    "alpha_pattern": ((0, 6, 0), {}),
    "megatron_config": ((0, 7, 0), None),
    "megatron_core": ((0, 7, 0), "megatron.core"),
    "loftq_config": ((0, 7, 0), {}),
    "use_rslora": ((0, 8, 0), False),
    "use_dora": ((0, 9, 0), False),
    "layer_replication": ((0, 10, 0), None),
    "exclude_modules": ((0, 14, 0), None),
    "eva_config": ((0, 14, 0), None),
    "lora_bias": ((0, 14, 0), False),
    "trainable_token_indices": ((0, 15, 0), None),
    "corda_config": ((0, 15, 0), None),
    "use_qalora": ((0, 16, 0), False),
    "qalora_group_size": ((0, 16, 0), 16),
    "target_parameters": ((0, 17, 0), None),
    "alora_invocation_tokens": ((0, 18, 0), None),
    "arrow_config": ((0, 18, 0), None),
    "ensure_weight_tying": ((0, 18, 0), False),
    "peft_version": ((0, 18, 0), None),
    "lora_ga_config": ((0, 19, 0), None),
    "use_bdlora": ((0, 19, 0), None),
    "velora_config": ((0, 20, 0), None),
    "monteclora_config": ((0, 20, 0), None),
    "kasa_config": ((0, 21, 0), None),
}
"""Field to the first release that knows it, and its default there."""

_ALWAYS = ("peft_type", "base_model_name_or_path", "task_type", "r", "lora_alpha", "target_modules", "bias")
"""Written whatever their values: vLLM wants three of them, its resolvers the base, people the rest."""
_NO_MEANING = {"peft_version", "megatron_core", "qalora_group_size", "eva_config", "lora_ga_config", "auto_mapping"}
"""Of no effect on a saved adapter: left out for a version that lacks them."""


def parse(text: str) -> Version:
    """The version that a user names, `0.10` or `0.10.0`.

    Raises:
        UsageError: it is none, or one that cannot read safetensors files.
    """
    found = re.fullmatch(r"(\d{1,3})\.(\d{1,3})(?:\.(\d{1,3}))?", text)
    if found is None:
        raise UsageError(f"no version of PEFT: {text!r:.40}", hint="--for peft==0.10")
    version = int(found[1]), int(found[2]), int(found[3] or 0)
    if version < OLDEST:
        raise UsageError(f"PEFT {text} cannot read safetensors files", hint="peft==0.4 is the oldest that can")
    return version


def knows(version: Version | None, field: str) -> bool:
    """Does that version know the field? None: the newest, which knows all that we do."""
    if field in _OLD:
        return True
    return field in _SINCE and (version is None or version >= _SINCE[field][0])


def first_with(field: str) -> str:
    """The first release that knows a field, `0.8.0`."""
    return ".".join(map(str, _SINCE[field][0] if field in _SINCE else OLDEST))


def unknown(config: Mapping[str, Any], version: Version) -> list[str]:
    """Fields of a config that a version does not know, whatever their values: it may fail on each."""
    return [field for field in config if not knows(version, field)]


def lost(config: Mapping[str, Any], version: Version) -> list[str]:
    """Fields that a version does not know and whose values mean something."""
    return [
        field
        for field, value in config.items()
        if not knows(version, field) and field not in _NO_MEANING and value and value != _default(field)
    ]


def minimal(config: Mapping[str, Any], version: Version | None = None) -> dict[str, Any]:
    """The fields that say something, in the file's order: known to the version, and not at their defaults."""
    return {
        field: value
        for field, value in config.items()
        if field in _ALWAYS or (knows(version, field) and value is not None and value != _default(field))
    }


def _default(field: str) -> Any:
    return _OLD[field] if field in _OLD else _SINCE[field][1] if field in _SINCE else None
