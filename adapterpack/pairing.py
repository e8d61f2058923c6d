"""Two models of one shape, tensor by tensor: what pairs with what, what kind it is, and does it differ.

Names and shapes come first and cost headers only; values are compared in chunks, and no further than the first
difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from adapterpack import architectures
from adapterpack.base import Base, Memory
from adapterpack.errors import WrongBase
from adapterpack.tensor import Tensor, numpy_dtype

_SHOWN = 5
_BLOCK = 1 << 20
"""Elements that are compared at a time."""
_BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|position_ids|inv_freq|original_inv_freq)$")
"""What older transformers saved though it is computed: either model may lack it."""
_EMBEDDINGS = re.compile(
    r"(^|\.)(wte|wpe|shared|tok_embeddings|embed_in|embed_tokens|embed_positions|tokens_embed|positions_embed"
    r"|relative_attention_bias|\w*embeddings?)$"
)
_ROUTERS = ("gate", "router", "classifier")
_EXPERT = re.compile(r"(^|\.)experts\.(\d+\.|\w+$)")


class Role(Enum):
    """What a tensor is, as far as its name and shape tell."""

    LINEAR = "linear"
    """The matrix of a linear layer (or of GPT-2's Conv1D)."""
    EMBEDDING = "embedding"
    """Input embeddings, positions, token types."""
    HEAD = "head"
    """The output embeddings: a linear layer too."""
    EXPERT = "expert"
    """A mixture's experts, fused or one by one: no layer of its own in memory."""
    OTHER = "other"
    """Norms, biases, convolutions, routers, bare parameters, buffers."""


@dataclass(frozen=True)
class Pair:
    """One tensor of both models.

    Attributes:
        name: As PEFT calls it, in memory: `model.layers.0.mlp.up_proj.weight`.
        role: What it is.
        conv1d: Does it lie as (in, out)?
        base: The base's values; of a quantised one those that it stands for, unrounded.
        tuned: The tuned model's.
    """

    name: str
    role: Role
    conv1d: bool
    base: Tensor
    tuned: Tensor

    @property
    def module(self) -> str:
        """Path of the module that holds it; empty for a parameter of the model itself."""
        return self.name.rpartition(".")[0]

    def differs(self) -> bool:
        """Is any value another one? -0 is 0; NaN is always another one."""
        import numpy as np

        if self.base is self.tuned or not self.base.numel:
            return False
        same_dtype = self.base.dtype == self.tuned.dtype
        for a, b in zip(_blocks(self.base), _blocks(self.tuned), strict=True):
            if same_dtype and a == b:
                continue
            x, y = (np.frombuffer(d, numpy_dtype(t.dtype)) for d, t in ((a, self.base), (b, self.tuned)))
            if (_wide(x) != _wide(y)).any():
                return True
        return False


def _blocks(t: Tensor) -> Iterator[bytes]:
    size = t.dtype.bits // 8 * _BLOCK
    for start in range(0, t.nbytes, size):
        yield t.source.read(start, min(start + size, t.nbytes))


def _wide(values: Any) -> Any:
    return values if values.dtype.kind in "biuc" else values.astype("float64")


def pairs(base: Base, tuned: Base) -> list[Pair]:
    """Every tensor of the tuned model with the base's.

    Raises:
        WrongBase: one model has tensors or shapes that the other has not; they are named.
        Unsupported: one is quantised in a way that is not read.
    """
    base.need_weights()
    tuned.need_weights()
    wanted = [t for t in tuned.tensors if not _BUFFERS.search(t)]
    base.bind(wanted)
    found = {t: name for t in wanted if (name := _on_disk(base, tuned, t)) is not None}
    missing = [t for t in wanted if t not in found]
    # A tied head may lie on disk on one side alone.
    used = set(found.values())
    left = [t for t in base.tensors if t not in used and not _BUFFERS.search(t)]
    tied = base.head if base.head in left and tuned.tied and tuned.embedding else None
    left = [t for t in left if t != tied]
    if missing or left:
        said = [_named("the base lacks {}", missing), _named("the tuned model lacks {}", left)]
        hint = "a tensor that the base has not cannot be a change of it"
        raise WrongBase("; ".join(s for s in said if s), hint=hint if missing else "is it a model of another kind?")
    plain = [name for t, name in found.items() if t != tuned.head]
    if len(set(plain)) < len(plain):
        twice = next(name for name in plain if plain.count(name) > 1)
        raise WrongBase(f"two tensors of the tuned model would be {twice} of the base")
    memory = Memory(tuned)
    chosen = [(memory(t), base.origin(found[t]), tuned.origin(t)) for t in wanted]
    if tied is not None and tuned.embedding is not None:
        chosen.append((memory(tuned.head), base.origin(tied), tuned.origin(tuned.embedding)))
    other = [f"{n} {b.shape} and {t.shape}" for n, b, t in chosen if b.shape != t.shape]
    if other:
        hint = "were tokens added? then resize the base's embeddings first and save it"
        raise WrongBase(_named("shapes differ in base and tuned model: {}", other), hint=hint)
    head = memory(tuned.head)
    modules = {n.rpartition(".")[0] for n, _, _ in chosen}
    return [_pair(n, b, t, tuned, head, modules) for n, b, t in chosen]


def _on_disk(base: Base, tuned: Base, name: str) -> str | None:
    found = base.on_disk(name)
    return base.embedding if found is None and name == tuned.head and base.tied else found


def _named(text: str, said: list[str]) -> str:
    more = f" and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    return text.format(", ".join(sorted(said)[:_SHOWN]) + more) if said else ""


def _pair(name: str, base: Tensor, tuned: Tensor, model: Base, head: str, modules: set[str]) -> Pair:
    module = name.rpartition(".")[0]
    role = Role.OTHER
    if _EXPERT.search(name):
        role = Role.EXPERT
    elif len(base.shape) == 2 and name.endswith(".weight") and base.dtype.kind == tuned.dtype.kind == "float":
        routes = module.rpartition(".")[2] in _ROUTERS and _has_experts(module, modules)
        if name == head:
            role = Role.HEAD
        elif _EMBEDDINGS.search(module):
            role = Role.EMBEDDING
        elif not routes:
            role = Role.LINEAR
    return Pair(name, role, bool(architectures.is_conv1d(model.config, module)), base, tuned)


def _has_experts(module: str, modules: set[str]) -> bool:
    """Do experts stand beside this module?"""
    beside = f"{module.rpartition('.')[0]}.experts"
    return any(m == beside or m.startswith(f"{beside}.") for m in modules)
