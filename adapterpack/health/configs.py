"""adapter_config.json against PEFT's table of fields, against the tensors beside it, and against the world.

What PEFT 0.21.2 does with each fault was tried: null numbers and patterns are a TypeError or an AttributeError in its
layers, unknown fields a warning (a TypeError before 0.14), a switch that is off makes it drop the tensors that it is
for without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from adapterpack import hub
from adapterpack.adapter import Finding
from adapterpack.checkpoint import Checkpoint
from adapterpack.health import fields
from adapterpack.health.naming import MENDED
from adapterpack.methods._lora_variants import moved_base

ALPHA = {"LORA": "lora_alpha", "ADALORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
"""Methods that scale by alpha / r, and their word for alpha."""
_ALPHA_IN_METADATA = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")
"""Where trainers outside PEFT leave it, in the metadata of the safetensors file."""
_HARMLESS = {"qalora_group_size", "random_seed", "orth_reg_weight", "beta1", "beta2", "tinit", "tfinal", "deltaT"}
"""Numbers that nothing asks for when an adapter is loaded."""
_NOT_IN_FILE = {
    "ADAMSS": "the clusters of rows (they are drawn anew from the base's weights)",
    "PSOFT": "the singular vectors of the base's weights",
    "FROD": "the rotations of the base's weights",
    "OSF": "the frozen part of the base's singular vectors",
}
"""Methods whose file does not hold all that the change is made of (`peft-formats`, fact 9)."""
_DRAWN = {
    "FOURIERFT": ("the places of the frequencies", "random_loc_seed"),
    "WAVEFT": ("the places of the coefficients", "random_loc_seed"),
}


def config_findings(c: Checkpoint) -> Iterator[Finding]:
    """Everything that a config alone, or with the names and shapes of the tensors, tells."""
    known = fields.known(c.peft_type)
    if known is not None:
        yield from _nulls(c.config, known)
        yield from _unknown(c.config, known)
    yield from _alpha(c)
    yield from _reference(c.config)
    yield from _switches(c)
    yield from _incomplete(c)


# -- nulls and versions ---------------------------------------------------------------------------------------


def nulls(config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that are null where PEFT computes with the value, to PEFT's default."""
    return {
        name: known[name]
        for name, value in config.items()
        if value is None and name in known and name not in _HARMLESS and _counts(name, known[name])
    }


def _counts(name: str, default: Any) -> bool:
    if isinstance(default, bool):
        # Null is false to PEFT: of a switch that is on by default it says the opposite of what is left out.
        return default and not name.startswith("init_")
    return isinstance(default, int | float) or name == "bias" or (name.endswith("_pattern") and default == {})


def _nulls(config: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[Finding]:
    for name, default in nulls(config, known).items():
        if name == ALPHA.get(str(config["peft_type"])):
            continue
        does = "takes it for false" if default is True else "fails on it"
        said = f"{name} is null, PEFT {does}; its default is {default!r}"
        yield Finding("null-field", name, said, MENDED if _can_fill(name, default) else f"write the value of {name}")


def _can_fill(name: str, default: Any) -> bool:
    return filled(name, default) is not None or name in ("r", "num_vectors", "vector_length", "topk")


def filled(name: str, default: Any) -> Any:
    """What a null field of no effect on W can only have meant; None: it may have been anything."""
    if "dropout" in name or name == "bias" or (name.endswith("_pattern") and default == {}):
        return default
    return False if default is True else None


def _unknown(config: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[Finding]:
    strange = [name for name in config if name not in known]
    version = config.get("peft_version")
    newer = isinstance(version, str) and _version(version) > _version(fields.VERSION)
    if strange:
        whose = f"written by PEFT {version:.40}, which is newer" if newer else "of another tool, or of an older PEFT"
        yield Finding(
            "unknown-fields",
            strange[0],
            f"PEFT {fields.VERSION} does not know {', '.join(strange[:10])}: {whose}; it warns and goes on without,"
            " before 0.14 it is an error",
            "adapterpack convert SRC DST --for peft==VERSION writes what that one knows, where it can be said",
            warning=True,
        )
    elif newer:
        yield Finding(
            "newer-peft",
            "peft_version",
            f"it was written by PEFT {version:.40}; what is known here is PEFT {fields.VERSION}",
            "its defaults may have changed: verify after converting",
            warning=True,
        )


def _version(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


# -- scale --------------------------------------------------------------------------------------------------


def metadata_alpha(c: Checkpoint) -> float | None:
    """The one alpha that the metadata of the tensor file has; None if there is none, or several."""
    found = set()
    for name in _ALPHA_IN_METADATA:
        try:
            found.add(float(c.metadata[name]))
        except (KeyError, ValueError):
            continue
    return found.pop() if len(found) == 1 else None


def _alpha(c: Checkpoint) -> Iterator[Finding]:
    name = ALPHA.get(c.peft_type)
    if name is None:
        return
    known = fields.known(c.peft_type) or {}
    recorded = metadata_alpha(c)
    said = c.config.get(name)
    if said is None:
        there = name in c.config
        does = "PEFT fails on it" if there else f"PEFT takes {known[name]}, other engines refuse it"
        where = "" if recorded is None else f"; the metadata of the tensor file says {recorded:g}, which PEFT ignores"
        can = (recorded is not None) if there else recorded is None
        fix = MENDED if can else f"write the {name} of the training into adapter_config.json"
        yield Finding("alpha-missing", name, f"{name} is {'null' if there else 'missing'}: {does}{where}", fix)
    elif recorded is not None and isinstance(said, int | float) and float(said) != recorded:
        yield Finding(
            "alpha-elsewhere",
            name,
            f"the config says {said:g}, the metadata of the tensor file {recorded:g}: PEFT takes the config's, other"
            f" loaders the other, with which the change is {recorded / (said or 1):.4g} times as large",
            "find out which one it was trained with, and remove the other",
            warning=True,
        )


# -- the base -----------------------------------------------------------------------------------------------


def is_local_path(name: str) -> bool:
    """Is it a path of somebody's machine rather than a name on the Hub?"""
    if name.startswith((".", "~")) or PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute():
        return True
    return "\\" in name or not (hub.is_repo(name) or re.fullmatch(r"[\w.-]+", name))


def _reference(config: Mapping[str, Any]) -> Iterator[Finding]:
    field = "base_model_name_or_path"
    name = config.get(field)
    if not isinstance(name, str) or not name:
        said = "the base model is not named: nobody can load it by the adapter alone, and the Hub refuses its card"
    elif is_local_path(name):
        said = f"{name:.200} is a path of one machine: others will not find the base"
    else:
        return
    fix = "adapterpack check SRC --base ORG/NAME --fix DST writes the name"
    yield Finding("base-reference", field, said, fix, warning=True)


# -- switches -----------------------------------------------------------------------------------------------


def switches(c: Checkpoint) -> dict[str, tuple[bool, str, bool]]:
    """LoRA's switches that contradict the tensors: field to (its right value, what is wrong, is that only a warning).

    Methods find those of their own; these are found here because `parse` takes what is there.
    """
    if c.peft_type != "LORA":
        return {}
    found: dict[str, tuple[bool, str, bool]] = {}
    biased = any(key.endswith((".lora_B.bias", ".lora_B.default.bias")) for key in c.tensors)
    magnitudes = any(".lora_magnitude_vector" in key for key in c.tensors)
    for field, has, what in (("use_dora", magnitudes, "magnitudes"), ("lora_bias", biased, "biases of B")):
        if has and not c.config.get(field):
            said = f"the file has {what}, and the config does not say {field}: PEFT drops them silently"
            found[field] = True, said, False
    if c.config.get("lora_bias") is True and not biased and c.tensors:
        found["lora_bias"] = False, "lora_bias is true and the file has no biases of B: PEFT adds zeros", True
    return found


def _switches(c: Checkpoint) -> Iterator[Finding]:
    for field, (_, said, warning) in switches(c).items():
        yield Finding("wrong-flag", field, said, MENDED, warning=warning)
    if c.peft_type == "LORA" and c.config.get("use_dora") is True:
        with_b = {k.partition(".lora_B.")[0] for k in c.tensors if ".lora_B." in k and k.endswith(".weight")}
        lacking = sorted(m for m in with_b if not any(k.startswith(f"{m}.lora_magnitude_vector") for k in c.tensors))
        if lacking:
            yield Finding(
                "missing-magnitude",
                lacking[0],
                f"use_dora is true and {len(lacking)} modules have no magnitudes: PEFT takes the base's norms",
                "save it again; or set use_dora to false, if it was trained as plain LoRA",
            )


# -- what is not in the file ------------------------------------------------------------------------------


def _incomplete(c: Checkpoint) -> Iterator[Finding]:
    config = c.config
    if c.peft_type == "LORA" and (kind := moved_base(config)):
        yield Finding(
            "changes-the-base",
            "init_lora_weights",
            f"{kind} took a part of the base's weights into the adapter: B @ A is not what it learned, and PEFT"
            " computes that part anew from the base each time it loads",
            "adapterpack convert SRC DST --to lora --init INIT_ADAPTER makes plain LoRA of it",
            warning=True,
        )
    lacks = _NOT_IN_FILE.get(c.peft_type)
    if lacks:
        yield Finding(
            "not-self-contained",
            "peft_type",
            f"a file of {c.peft_type} does not hold {lacks}: another base dtype, device or library may give others",
            "merge it where it was trained, or convert it to lora there",
            warning=True,
        )
    drawn, seed = _DRAWN.get(c.peft_type, ("", ""))
    if drawn:
        yield Finding(
            "not-self-contained",
            seed,
            f"{drawn} are not in the file: {seed}={config.get(seed)!r:.30} gives them back, with torch's generator",
            "keep the seed with the file",
            warning=True,
        )
