"""The methods that we read, convert and merge: one file and one row each."""

from __future__ import annotations

from adapterpack.adapter import Adapter, Method, Need
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import NoMergedWeight, Unsupported
from adapterpack.methods import (
    adalora,
    adamss,
    bdlora,
    beft,
    boft,
    bone,
    c3a,
    deft,
    delora,
    fourierft,
    frod,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    kasa,
    ln_tuning,
    loha,
    lokr,
    lora,
    loraxs,
    miss,
    monteclora,
    oft,
    osf,
    peanut,
    psoft,
    pvera,
    qalora,
    randlora,
    road,
    shira,
    supertuning,
    tinylora,
    trainable_tokens,
    unilora,
    vblora,
    velora,
    vera,
    waveft,
)
from adapterpack.methods._lora_variants import Variant

_TABLE: tuple[Method, ...] = (
    adalora,
    adamss,
    beft,
    boft,
    bone,
    c3a,
    deft,
    delora,
    fourierft,
    frod,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    miss,
    oft,
    osf,
    peanut,
    psoft,
    pvera,
    randlora,
    road,
    shira,
    supertuning,
    tinylora,
    trainable_tokens,
    unilora,
    vblora,
    vera,
    waveft,
)
_VARIANTS: tuple[Variant, ...] = (
    bdlora,
    kasa,
    loraxs,
    monteclora,
    qalora,
    velora,
)
"""Methods whose config says LORA as well: each knows its own."""
_BY_TYPE: dict[str, Method] = {m.peft_type: m for m in _TABLE}
METHODS: dict[str, Method] = {**_BY_TYPE, **{m.name.upper(): m for m in _VARIANTS}}
"""Name of a method in upper case, which is its `peft_type` but for variants, to the method."""

_PROMPT = "trained vectors stand before the input, and no weight of the base changes"
UNMERGED: dict[str, str] = {
    "ADAPTION_PROMPT": f"LLaMA-Adapter: {_PROMPT}: gated attention reads them",
    "CARTRIDGE": f"a cartridge: {_PROMPT}: they are keys and values of the attention",
    "CPT": f"context-aware prompt tuning: {_PROMPT}",
    "LILY": "Lily: a router mixes shared factors anew for every input",
    "MULTITASK_PROMPT_TUNING": f"multitask prompt tuning: {_PROMPT}",
    "P_TUNING": f"p-tuning: {_PROMPT}",
    "POLY": "Poly: a router mixes its factors by the task of each input",
    "PREFIX_TUNING": f"prefix tuning: {_PROMPT}: they are keys and values of the attention",
    "PROMPT_TUNING": f"prompt tuning: {_PROMPT}",
    "SHADOW": "Shadow: a small network beside the model adds to the hidden states",
    "XLORA": "X-LoRA: a router weighs several LoRA adapters anew for every token",
}
"""`peft_type` to why no single weight does what it does."""


def method_of(c: Checkpoint) -> Method:
    """The method of a checkpoint.

    Raises:
        NoMergedWeight: a method that no weight of the base can take in.
        Unsupported: none that we know: it can be inspected and checked, not converted or merged.
    """
    for variant in _VARIANTS:
        if c.peft_type == variant.peft_type and variant.claims(c):
            return variant
    found = _BY_TYPE.get(c.peft_type)
    if found is not None:
        return found
    if c.peft_type in UNMERGED:
        raise NoMergedWeight(
            f"{c.name} is {c.peft_type}, {UNMERGED[c.peft_type]}: there is nothing to convert or merge",
            hint="keep it beside its base; inspect, check, compress and push work on every method",
        )
    raise Unsupported(
        f"{c.name} is {c.peft_type}; this version reads {', '.join(_BY_TYPE)}",
        hint="inspect and check work on every method",
    )


def parse(c: Checkpoint) -> tuple[Method, Adapter]:
    """The method of a checkpoint and the adapter that it makes of it; see `Method.parse`."""
    method = method_of(c)
    return method, method.parse(c)


def depends_on_shapes(method: Method, a: Adapter) -> bool:
    """May it take the base's shapes to know what the adapter changes?"""
    return any(Need.SHAPES in edge.needs for edge in method.edges.get(a.encoding, ()))
