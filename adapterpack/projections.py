"""Projections that one model has apart and another fused: q, k, v and qkv; gate, up and gate_up.

Splitting takes rows of B and keeps A, fusing stacks A and sets B on a diagonal, so that ranks add up (where the parts
share one A, as after a split, it stays one). Both are exact. Which rows of a fused matrix are whose depends on the
architecture: stacked in most, by heads in GPT-NeoX and BLOOM; what is not listed here is refused.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterpack import architectures
from adapterpack.adapter import Adapter, Param
from adapterpack.base import Base
from adapterpack.errors import Unsupported, WrongBase
from adapterpack.methods import lora
from adapterpack.methods._lora_modules import Module, Scaling, exactly, modules
from adapterpack.onescale import named_targets, scaled
from adapterpack.tensor import Tensor, from_numpy

if TYPE_CHECKING:
    from adapterpack.tensor import Array

LAYOUTS = ("split", "fused")
_QKV, _GATES = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": _QKV,
    "c_attn": _QKV,
    "query_key_value": _QKV,
    "gate_up_proj": _GATES,
}
"""Fused layer to its parts, in the order of their rows."""

_STACKED = {"phi3", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"}
_TYPES: Mapping[str, set[str]] = {
    "qkv_proj": _STACKED,
    "c_attn": {"gpt2"},
    "query_key_value": {"gpt_neox", "bloom"},
    "gate_up_proj": _STACKED | {"glm", "glm4"},
}
"""Fused layer to the model types whose rows are known to lie so: of the fused model, or of the one with parts."""
_BY_HEADS = {"gpt_neox", "bloom"}
"""Whose query_key_value has for each head its rows of q, k and v: (heads, 3, head size)."""


_MOST_ROWS = 2**22
"""More than any layer has: what a config.json says is not believed beyond it."""


@dataclass(frozen=True)
class Relaid:
    """An adapter in another layout.

    Attributes:
        adapter: It.
        back: Laid out as before again, by the opposite way: to hold the two against each other.
        notes: What became what.
    """

    adapter: Adapter
    back: Adapter
    notes: tuple[str, ...]


def relay(a: Adapter, layout: str, base: Base | None) -> Relaid:
    """Split or fuse every projection that can be.

    Raises:
        WrongBase: it takes the base's config.json to know which rows are whose, or the shapes do not fit.
        Unsupported: this architecture, or what is adapted there, is not known to be exact.
    """
    if base is None or not base.config:
        raise WrongBase("which rows are whose depends on the base", hint="--base BASE; its config.json is enough")
    rows = _Rows(architectures.text_config(base.config), base)
    there, back = (_split, _fuse) if layout == "split" else (_fuse, _split)
    new, count = there(a, rows)
    if not count:
        wanted = PARTS if layout == "split" else dict.fromkeys((*_QKV, *_GATES))
        raise Unsupported(f"there is nothing to do: no module is {', '.join(wanted)}")
    done = f"{count} fused projections were split" if layout == "split" else f"{count} projections were fused"
    return Relaid(new, _same_modules(back(new, rows)[0], a), (done,))


def _same_modules(back: Adapter, a: Adapter) -> Adapter:
    """Without the parts that `a` does not adapt: on the way back they have zeros in B, and change nothing."""
    params = {m: p for m, p in back.modules.items() if m in a.modules or p["lora_B"].tensor.numpy().any()}
    return replace(back, modules=params)


@dataclass(frozen=True)
class _Rows:
    """Which rows of a fused matrix belong to which part.

    Attributes:
        config: Of the language model.
        base: Its headers, if it has any, tell what the fused layer is called.
    """

    config: Mapping[str, Any]
    base: Base

    def of(self, fused: str) -> list[Array]:
        """The rows of each part, in the order that the part has them."""
        import numpy as np

        model_type = str(self.config.get("model_type"))
        if model_type not in _TYPES[fused]:
            raise Unsupported(f"how the rows of {fused} lie in a {model_type!r:.40} model is not known")
        if fused == "gate_up_proj":
            half = self._number("intermediate_size", "ffn_hidden_size")
            return [np.arange(half), np.arange(half, 2 * half)]
        heads = self._number("num_attention_heads", "n_head")
        hidden = self._number("hidden_size", "n_embd")
        size = self._number("head_dim") if self.config.get("head_dim") else hidden // heads
        if heads * size > _MOST_ROWS:
            raise WrongBase(f"config.json of the base says {heads} heads of {size}")
        if model_type in _BY_HEADS:
            by_head = np.arange(heads * 3 * size).reshape(heads, 3, size)
            return [by_head[:, part].reshape(-1) for part in range(3)]
        kv = (self._number("num_key_value_heads") if self.config.get("num_key_value_heads") else heads) * size
        ends = np.cumsum([0, heads * size, kv, kv])
        return [np.arange(ends[n], ends[n + 1]) for n in range(3)]

    def _number(self, *names: str) -> int:
        for name in names:
            value = self.config.get(name)
            if type(value) is int and 0 < value <= _MOST_ROWS:
                return value
        raise WrongBase(f"config.json of the base does not say {' or '.join(names)}")

    def fused_name(self, parent: str, parts: tuple[str, ...]) -> str:
        """What the layer that holds these parts is called: as the base has it, else as its type does."""
        names = [fused for fused, own in PARTS.items() if own == parts]
        there = [n for n in names if self.base.tensors and self.base.has(f"{parent}{n}.weight")]
        known = [n for n in names if str(self.config.get("model_type")) in _TYPES[n]]
        return (there or known or names)[0]


def _split(a: Adapter, rows: _Rows) -> tuple[Adapter, int]:
    scaling, told = Scaling(a.config), {m.name: m for m in modules(a)}
    params = {m: dict(p) for m, p in a.modules.items() if m not in told}
    form: dict[str, tuple[int, float]] = {}
    renamed: dict[str, list[str]] = {}
    for m in told.values():
        parent, leaf = _names(m.name)
        if leaf not in PARTS:
            params[m.name], form[m.name] = dict(m.params), (m.rank, scaling(m.name, m.rank))
            continue
        _check(m, a)
        whose = rows.of(leaf)
        lora_a, lora_b = m.pair
        if lora_b.shape[0] != sum(map(len, whose)):
            raise WrongBase(f"{m.name} has {lora_b.shape[0]} rows, by the base {sum(map(len, whose))}")
        values = lora_b.numpy()
        for part, own in zip(PARTS[leaf], whose, strict=True):
            name = f"{parent}{part}"
            if name in a.modules:
                raise Unsupported(f"the adapter has {name} and {m.name}")
            params[name] = _pair(name, lora_a, from_numpy(values[own]))
            form[name] = m.rank, scaling(m.name, m.rank)
        renamed[leaf] = list(PARTS[leaf])
    return _with(a, params, form, renamed), sum(_names(m)[1] in PARTS for m in told)


def _fuse(a: Adapter, rows: _Rows) -> tuple[Adapter, int]:
    scaling, told = Scaling(a.config), {m.name: m for m in modules(a)}
    params = {m: dict(p) for m, p in a.modules.items() if m not in told}
    form: dict[str, tuple[int, float]] = {}
    renamed: dict[str, list[str]] = {}
    groups: defaultdict[tuple[str, tuple[str, ...]], dict[str, Module]] = defaultdict(dict)
    for m in told.values():
        parent, leaf = _names(m.name)
        parts = next((p for p in PARTS.values() if leaf in p), None)
        if parts is None:
            params[m.name], form[m.name] = dict(m.params), (m.rank, scaling(m.name, m.rank))
        else:
            _check(m, a)
            groups[parent, parts][leaf] = m
    for (parent, parts), group in groups.items():
        fused = rows.fused_name(parent, parts)
        name = f"{parent}{fused}"
        scale = scaling(next(iter(group.values())).name, next(iter(group.values())).rank)
        factors = {leaf: scaling(m.name, m.rank) / scale for leaf, m in group.items()}
        lora_a, lora_b = _joined(name, [group.get(p) for p in parts], rows.of(fused), factors)
        params[name] = _pair(name, lora_a, lora_b)
        form[name] = lora_a.shape[0], scale
        renamed |= {part: [fused] for part in parts}
    return _with(a, params, form, renamed), len(groups)


def _joined(
    name: str, group: list[Module | None], whose: list[Array], factors: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """A and B of the fused layer. Parts that are not adapted have zeros in B."""
    import numpy as np

    there = [m for m in group if m is not None]
    if len({m.pair[0].shape[1] for m in there}) != 1:
        raise Unsupported(f"the parts of {name} have other inputs: they are not one layer")
    b_of: dict[str, Array] = {}
    for m, own in zip(group, whose, strict=True):
        if m is None:
            continue
        leaf = _names(m.name)[1]
        b = m.pair[1] if factors[leaf] == 1 else scaled(m.pair[1], factors[leaf])[0]
        if b.shape[0] != len(own):
            raise WrongBase(f"{m.name} has {b.shape[0]} rows, by the base {len(own)}")
        b_of[leaf] = b.numpy()
    shared = all(m.pair[0].equals(there[0].pair[0]) for m in there)
    ranks = [m.rank for m in there]
    dtypes = {b.dtype for b in b_of.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    total = np.zeros((sum(map(len, whose)), ranks[0] if shared else sum(ranks)), dtype)
    at = 0
    for m, own in zip(group, whose, strict=True):
        if m is not None:
            total[own, at : at + m.rank] = b_of[_leaf(m)]
            at += 0 if shared else m.rank
    if shared:
        return there[0].pair[0], from_numpy(total)
    stacks = [m.pair[0].numpy() for m in there]
    if len({s.dtype for s in stacks}) > 1:
        stacks = [s.astype(np.float32) for s in stacks]
    return from_numpy(np.concatenate(stacks)), from_numpy(total)


def _leaf(m: Module) -> str:
    return _names(m.name)[1]


def _names(module: str) -> tuple[str, str]:
    parent, dot, leaf = module.rpartition(".")
    return f"{parent}{dot}", leaf


def _pair(module: str, a: Tensor, b: Tensor) -> dict[str, Param]:
    return {n: Param(lora.keys.key(module, n), t) for n, t in (("lora_A", a), ("lora_B", b))}


def _check(m: Module, a: Adapter) -> None:
    """Only A and B of a linear layer can be cut by rows here."""
    if m.params.keys() != {"lora_A", "lora_B"} or m.convolution:
        raise Unsupported(
            f"{m.name} has more than A and B of a linear layer", hint="adapterpack merge it into the base"
        )
    beside = [t for t in a.replaced if t.rpartition(".")[0] == m.name]
    if beside:
        raise Unsupported(f"{beside[0]} has new values", hint="adapterpack merge it into the base")


def _with(
    a: Adapter,
    params: Mapping[str, Mapping[str, Param]],
    form: Mapping[str, tuple[int, float]],
    renamed: dict[str, list[str]],
) -> Adapter:
    """The adapter with other modules, their ranks and scales in its config."""
    if not renamed:
        return a
    rank, scale = Counter(form.values()).most_common(1)[0][0]
    targets = []
    for name in named_targets(a):
        parent, leaf = _names(name)
        targets += [f"{parent}{new}" for new in renamed.get(leaf, [leaf])]
    config = {
        **{
            k: v for k, v in a.config.items() if k not in ("exclude_modules", "layers_to_transform", "layers_pattern")
        },
        "target_modules": list(dict.fromkeys(targets)),
        "r": rank,
        "lora_alpha": scale * rank,
        "use_rslora": False,
        "rank_pattern": {exactly(m): r for m, (r, _) in form.items() if r != rank},
        "alpha_pattern": {exactly(m): s * r for m, (r, s) in form.items() if (r, s) != (rank, scale)},
    }
    return replace(a, config=config, modules=params, changed=True)
