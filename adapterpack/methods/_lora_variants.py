"""What calls itself LoRA and is not plain LoRA: by `peft_type` and key names all of it looks alike.

Read as plain LoRA it would be silently wrong. Variants that are read have a file each (`bdlora.py` ...), and what
they have in common stands here; the others, and every mixture of two, are recognised so as to be refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from adapterpack import limits
from adapterpack.adapter import Adapter, Finding, Grade, Method, Outcome, Param
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, NoMergedWeight, Unsupported
from adapterpack.methods import _parameters
from adapterpack.methods._keys import KeyTable, flag
from adapterpack.methods._lora_modules import Module, modules
from adapterpack.tensor import Shape, Tensor

_KEEPS_BASE = {"true", "false", "gaussian", "orthogonal", "mica", "eva", "none"}
"""`init_lora_weights` that leave the base as it is, so that file and base give the trained model."""
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_SWITCHES = {
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron LoRA, whose layers are cut over several devices",
}
"""Fields of the config to what they turn on."""
_UNMERGED = {
    "alora_invocation_tokens": "aLoRA: it acts on the tokens from its invocation on, and not on those before",
    "arrow_config": "Arrow: a router chooses among several adapters anew for every token",
    "layer_replication": "layer replication: its model has more layers than the base, and they share weights",
}
"""The same for what no single weight of the base does."""
_MARKS = {
    "lora_diag": "KaSA",
    "lora_velora_embed": "VeLoRA",
    "lora_latent": "LoRA-XS",
    "lora_arrow": "Arrow",
    "lora_monteclora": "MonteCLoRA",
}
"""Parts of keys, to what has them."""
_KNOWN = {"use_dora", "use_rslora", "eva_config", "corda_config", "loftq_config", "lora_ga_config"}
KEYS = KeyTable(
    "lora_",
    {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_bias": "lora_B.bias",
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
        "magnitude": "lora_magnitude_vector",
        "magnitude.weight": "lora_magnitude_vector.weight",
    },
)
"""Of plain LoRA and DoRA."""


class Variant(Method, Protocol):
    """A method whose config says LORA too.

    Attributes:
        name: Of the method, in lower case: what `inspect` calls it.
    """

    @property
    def name(self) -> str: ...
    def claims(self, c: Checkpoint) -> bool:
        """Is a checkpoint with the same `peft_type` of this variant?"""
        ...


def moved_base(config: Mapping[str, Any]) -> str | None:
    """The initialisation that took a part of the base into the adapter, `pissa`; None if none did."""
    init = str(config.get("init_lora_weights", True)).lower()
    return next((kind for kind in _MOVES_BASE if init.startswith(kind)), None)


def refuse(c: Checkpoint, own: tuple[str, ...] = ()) -> None:
    """Refuse what is not the LoRA that we know: by its config, then by the names of its tensors.

    Args:
        own: The fields and parts of keys that tell the variant which asks.

    Raises:
        NoMergedWeight: no single weight does what it does.
        Unsupported: another variant, a mixture, an initialisation that moved the base, a switch of tomorrow.
    """
    for field, name in _UNMERGED.items():
        if c.config.get(field):
            raise NoMergedWeight(
                f"{c.name} is {name}: no single weight does that, so there is nothing to merge",
                hint="keep it beside its base",
            )
    reason = refused_variant(c.config, c.tensors, own)
    if reason is not None:
        hint = "merge it with PEFT"
        if moved_base(c.config) not in (None, "loftq"):
            hint = "adapterpack convert SRC DST --to lora --init INIT_ADAPTER makes plain LoRA of it; then go on"
        raise Unsupported(f"{c.name} is not plain LoRA: {reason}", hint=hint)


def refused_variant(config: Mapping[str, Any], names: Iterable[str], own: tuple[str, ...] = ()) -> str | None:
    """Why this is not the LoRA that we know, None if it is: by config, then by the names of its tensors."""
    init = str(config.get("init_lora_weights", True)).lower()
    if moved_base(config):
        return (
            f"it was trained with init_lora_weights={config['init_lora_weights']!r}, which changes the base"
            " weights: B @ A is not what it learned"
        )
    if init not in _KEEPS_BASE:
        return f"init_lora_weights={config['init_lora_weights']!r:.60} is unknown"
    for field, name in {**_SWITCHES, **_UNMERGED}.items():
        if field not in own and config.get(field):
            return f"it is {name}"
    for field, value in config.items():
        # Tomorrow's variants will be switches like today's: better refused than read as plain LoRA.
        if field.startswith("use_") and field not in _KNOWN.union(own) and value:
            return f"{field} is unknown"
    if own and (flag(config, "use_dora") or init == "mica"):
        return f"DoRA and MiCA do not go with {own[0]}: PEFT does not load that"
    for key in names:
        for mark, name in _MARKS.items():
            if mark in key and mark not in own:
                return f"it is {name} ({key})"
    return None


def parse(c: Checkpoint, name: str, table: KeyTable, *own: str) -> Adapter:
    """A checkpoint of a variant that adapts linear layers alone.

    Args:
        name: Of the method.
        own: See `refuse`.

    Raises:
        Unsupported: it adapts something else, too; PEFT loads no such thing.
    """
    refuse(c, own)
    a = table.parse(c, name, name, nested=True)
    if _parameters.named(a.modules, a.config):
        raise Unsupported(f"{name} on bare parameters or attention: PEFT does not load that")
    for m in modules(a):
        if m.embedding or any(len(p.tensor.shape) > 2 for n, p in m.params.items() if n in ("lora_A", "lora_B")):
            raise Unsupported(f"{m.name} is no linear layer: PEFT does not load {name} on others")
    return a


def bounded(module: str, *shapes: tuple[int, int]) -> None:
    """Raise InvalidFile if a factor would be larger, written out, than any layer has it."""
    if any(rows * columns > limits.RECIPE_ELEMENTS for rows, columns in shapes):
        raise InvalidFile(f"{module}: its factors, written out, would be {' and '.join(map(str, shapes))}")


def odd_shapes(m: Module, wanted: Mapping[str, Shape]) -> Iterator[Finding]:
    """Tensors of a module that PEFT makes in another shape, so that it refuses to load them."""
    for name, shape in wanted.items():
        if name in m.params and m.params[name].tensor.shape != shape:
            found = m.params[name]
            yield Finding(
                "shape-mismatch",
                found.key,
                f"it has shape {found.tensor.shape}, the config wants {shape}: PEFT refuses to load it",
                "correct the config, or leave the tensor out: it is for training alone",
            )


def plain(
    a: Adapter,
    switch: str,
    pairs: Mapping[str, Mapping[str, Tensor]],
    *,
    dropped: str,
) -> Outcome:
    """Plain LoRA of the same ranks and scales.

    Args:
        switch: The field that turned the variant on.
        pairs: Module to `lora_A`, (r, in), and `lora_B`, (out, r), dense; biases of B stay what they are.
        dropped: What is gone, in words.
    """
    made: dict[str, dict[str, Param]] = {}
    for module, params in a.modules.items():
        made[module] = {n: Param(KEYS.key(module, n), t) for n, t in pairs[module].items()}
        made[module] |= {n: p for n, p in params.items() if n == "lora_bias"}
    off = False if a.config.get(switch) is True else None
    config = {**a.config, **({switch: off} if switch in a.config else {})}
    new = replace(a, method="lora", encoding="lora", config=config, modules=made, changed=True)
    return Outcome(new, Grade.EQUIVALENT, dropped=(dropped,))


def without_training_state(a: Adapter, switch: str, what: str) -> Outcome:
    """Plain LoRA of a variant that differs from it in training alone: the same A and B."""
    kept = {m: {n: p.tensor for n, p in own.items() if n in ("lora_A", "lora_B")} for m, own in a.modules.items()}
    return plain(a, switch, kept, dropped=f"{what}: training cannot resume from the result as it was")


def sub_config(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """The fields of a variant's own config. Raises InvalidFile if it is no object."""
    value = config.get(field)
    if not isinstance(value, dict):
        raise InvalidFile(f"{field} in adapter_config.json is {value!r:.60}; an object is wanted")
    return value
