"""One scale and one rank for a whole LoRA adapter: the form that no reader of `alpha / r` can get wrong.

Where modules have different scales s, one of them is stated in the config and the others go into B as s / stated:
without loss for powers of two and wherever every product is a value of B's dtype, else in float32. Ranks that
differ are filled with zeros: rows of A, columns of B.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Param
from adapterpack.methods import lora
from adapterpack.methods._lora_modules import Module, Scaling, modules
from adapterpack.tensor import F32, Tensor, from_numpy, round_values

if TYPE_CHECKING:
    from adapterpack.tensor import Array

_SCALED = ("lora_B", "lora_embedding_B", "lora_bias")
_PADDED = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}
"""Which dimension of a factor is the rank."""


@dataclass(frozen=True)
class OneScale:
    """An adapter with one scale and one rank.

    Attributes:
        adapter: Its config says `r`, `lora_alpha`, and nothing else about scales.
        scale: The one.
        rank: The one.
        notes: What was done to get there.
    """

    adapter: Adapter
    scale: float
    rank: int
    notes: tuple[str, ...]


def scales(a: Adapter) -> dict[str, float]:
    """The factor of each module of a LoRA adapter."""
    scaling = Scaling(a.config)
    return {m.name: scaling(m.name, m.rank) for m in modules(a)}


def unify(a: Adapter) -> OneScale:
    """Give every module the same scale and rank; the change of W stays what it is.

    Bare parameters (`target_parameters`) are none of these modules: an adapter that has them is not for this.
    """
    own = list(modules(a))
    scaling = Scaling(a.config)
    scale_of = {m.name: scaling(m.name, m.rank) for m in own}
    rank = max(m.rank for m in own)
    stated = _stated(own, scale_of)
    made: dict[str, Mapping[str, Param]] = {}
    folded: Counter[str] = Counter()
    for m in own:
        made[m.name], how = _module(m, scale_of[m.name] / stated, rank)
        folded[how] += 1
    notes = []
    if len(set(scale_of.values())) > 1:
        exact, wide = folded["exact"], folded["widened"] + folded["rounded"]
        notes.append(
            f"{len(set(scale_of.values()))} scales became one, {stated:g}: folded into B of {exact + wide} modules"
        )
        if folded["widened"]:
            notes.append(
                f"B of {folded['widened']} modules became F32: their scales are no values of 16 bits times the common"
                " one; an engine that serves in 16 bits rounds them when it loads them"
            )
    padded = sum(m.rank != rank for m in own)
    if padded:
        notes.append(f"{padded} modules of lower rank were filled with zeros to rank {rank}")
    config = {
        **{k: v for k, v in a.config.items() if k not in ("rank_pattern", "alpha_pattern", "use_rslora")},
        "r": rank,
        "lora_alpha": _number(stated * rank),
    }
    return OneScale(replace(a, config=config, modules=made, changed=True), stated, rank, tuple(notes))


def _number(x: float) -> float | int:
    """A whole number as one: some readers declare lora_alpha as int."""
    return int(x) if x == int(x) else x


def _stated(own: list[Module], scale_of: Mapping[str, float]) -> float:
    """The scale for which the fewest values of B must be rounded; among equals the one that most values have."""
    sizes: Counter[float] = Counter()
    for m in own:
        sizes[scale_of[m.name]] += m.pair[1].numel

    def cost(candidate: float) -> tuple[int, int, float]:
        rounded = sum(n for s, n in sizes.items() if not _power_of_two(s / candidate))
        return rounded, -sizes[candidate], candidate

    return min(sizes, key=cost)


def _power_of_two(x: float) -> bool:
    return math.frexp(abs(x))[0] == 0.5


def _module(m: Module, factor: float, rank: int) -> tuple[dict[str, Param], str]:
    """Its parameters under the keys that PEFT writes, and what the fold was: none, exact, widened or rounded."""
    params: dict[str, Param] = {}
    how = "none"
    for name, p in m.params.items():
        tensor = p.tensor
        if name in _SCALED and factor != 1:
            tensor, own = scaled(tensor, factor)
            how = own if name != "lora_bias" else how
        if name in _PADDED and m.rank != rank:
            tensor = padded(tensor, _PADDED[name], rank)
        params[name] = Param(lora.keys.key(m.name, name), tensor)
    return params, how


def scaled(tensor: Tensor, factor: float) -> tuple[Tensor, str]:
    """The tensor times a factor: in its own dtype where every product is a value of it, else in float32.

    Returns:
        The tensor, and `exact`, `widened` or `rounded` (float32 it was, and is).
    """
    import numpy as np

    values = tensor.numpy()
    product = values.astype(np.float64) * factor
    same: Array = round_values(product, tensor.dtype)
    if np.array_equal(same.astype(np.float64), product, equal_nan=True):
        return from_numpy(same), "exact"
    wide = round_values(product, F32) if tensor.dtype.bits < 32 else same
    return from_numpy(wide), "widened" if tensor.dtype.bits < 32 else "rounded"


def padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """The tensor with zeros behind it along one dimension."""
    import numpy as np

    values = tensor.numpy()
    shape = list(values.shape)
    shape[axis] = size - shape[axis]
    return from_numpy(np.concatenate([values, np.zeros(shape, values.dtype)], axis=axis))


def plain_keys(a: Adapter) -> Adapter:
    """The adapter under the keys that PEFT writes: without `.default`, which engines do not know."""
    params: dict[str, dict[str, Param]] = {
        m: {n: Param(lora.keys.key(m, n), p.tensor) for n, p in own.items()} for m, own in a.modules.items()
    }
    same = all(p.key == params[m][n].key for m, own in a.modules.items() for n, p in own.items())
    return a if same else replace(a, modules=params, changed=True)


def named_targets(a: Adapter) -> list[str]:
    """`target_modules` as a list that names this adapter's modules and no others: engines run no patterns."""
    config: Mapping[str, Any] = a.config
    said = config.get("target_modules")
    narrowed = any(config.get(f) for f in ("exclude_modules", "layers_to_transform"))
    if isinstance(said, list) and said and not narrowed and all(isinstance(t, str) for t in said):
        names = sorted(said)
        missing = [m for m in a.modules if not any(m == t or m.endswith(f".{t}") for t in names)]
        return names + sorted(missing)
    return sorted(a.modules)
