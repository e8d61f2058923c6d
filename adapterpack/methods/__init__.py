"""The methods that we read, convert and merge: one file and one row each."""

from __future__ import annotations

from adapterpack.adapter import Adapter, Method
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import Unsupported
from adapterpack.methods import (
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
METHODS: dict[str, Method] = {m.peft_type: m for m in _TABLE}


def method_of(c: Checkpoint) -> Method:
    """The method of a checkpoint.

    Raises:
        Unsupported: none that we know: it can be inspected and checked, not converted or merged.
    """
    found = METHODS.get(c.peft_type)
    if found is None:
        raise Unsupported(
            f"{c.name} is {c.peft_type}; this version reads {', '.join(METHODS)}",
            hint="inspect and check work on every method",
        )
    return found


def parse(c: Checkpoint) -> tuple[Method, Adapter]:
    """The method of a checkpoint and the adapter that it makes of it; see `Method.parse`."""
    method = method_of(c)
    return method, method.parse(c)
