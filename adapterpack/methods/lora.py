"""LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024).

    delta W = s * B @ A,   s = alpha / r, or alpha / sqrt(r) with rsLoRA; of a convolution, and of each expert too
    DoRA:  W' = m / ||W + delta W||_row * (W + delta W)

Reference: peft/tuners/lora/layer.py (`get_delta_weight`, `merge`) and variants.py (`merge_unsafe`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import (
    Adapter,
    Change,
    Edge,
    Finding,
    Grade,
    Kind,
    Outcome,
    Request,
    Shapes,
)
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.methods import _joined, _parameters
from adapterpack.methods._changes import LowRankChange, VectorChange, replacements
from adapterpack.methods._convolution import ConvolutionChange
from adapterpack.methods._dora import DoraChange
from adapterpack.methods._keys import flag
from adapterpack.methods._lora_modules import Module, Scaling, attention_of, modules, pattern_field, rank_findings
from adapterpack.methods._lora_variants import KEYS, refuse
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

peft_type = "LORA"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
keys = KEYS


def parse(c: Checkpoint) -> Adapter:
    refuse(c)
    return _parameters.unwrapped(keys.parse(c, "lora", "lora", nested=True))


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    scaling = Scaling(a.config)
    yield from _parameters.changes(a, scaling, request.shapes)
    joined = _joined.find(a, request.shapes)
    yield from _joined.changes(joined, scaling, a.config)
    apart = {m.name for layers in joined.values() for m in layers.values()}
    for m in modules(a):
        if m.name in apart:
            continue
        scale = scaling(m.known_as, m.rank)
        weight = _weight(m, scale, a.config)
        if attention_of(a, m.name) is not None and isinstance(weight, LowRankChange):
            # MultiheadAttention.merge adds the delta itself, then lets out_proj add it again; forward does the same.
            yield replace(weight, round_delta=True)
        yield weight
        yield from biases(m, m.shape[0], scale)


def biases(m: Module, out: int, scale: float) -> Iterator[VectorChange]:
    """The change of the module's bias, (out,), if B has one (`lora_bias`)."""
    if "lora_bias" in m.params:
        bias = m.params["lora_bias"]
        if bias.tensor.shape != (out,):
            raise InvalidFile(f"{bias.key} has shape {bias.tensor.shape}, not ({out},)")
        yield VectorChange(m.name, partial(_vector, bias.tensor), bias.tensor.shape, scale, frozenset({bias.key}))


def _weight(m: Module, scale: float, config: Mapping[str, Any]) -> Change:
    lora_a, lora_b = m.pair
    factors = partial(_factors, lora_a, lora_b)
    uses = frozenset(m.params[n].key for n in m.params if n != "lora_bias")
    magnitude = _magnitude(m, flag(config, "use_dora"))
    if m.convolution:
        return ConvolutionChange(m.name, factors, m.shape, m.rank, scale, uses, magnitude)
    low_rank = LowRankChange(
        module=m.name,
        factors=factors,
        shape=(m.shape[0], m.shape[1]),
        rank=m.rank,
        scale=scale,
        uses=uses,
        layer=Kind.EMBEDDING if m.embedding else Kind.LINEAR,
        fan_in_fan_out=flag(config, "fan_in_fan_out"),
        # lora/layer.py, Embedding.merge: `weight += delta.to(orig_dtype)`; Linear.merge has no cast, but MiCA's has.
        round_delta=m.embedding or config.get("init_lora_weights") == "mica",
    )
    return low_rank if magnitude is None else DoraChange(low_rank, magnitude)


def _magnitude(m: Module, use_dora: bool) -> Tensor | None:
    if m.magnitude is None:
        if use_dora:
            raise InvalidFile(f"use_dora is true but {m.name} has no lora_magnitude_vector")
        return None
    if not use_dora:
        raise InvalidFile(
            f"use_dora is false but {m.name} has a lora_magnitude_vector",
            hint="set use_dora to true in adapter_config.json: PEFT ignores the magnitudes as it stands",
        )
    tensor = m.magnitude.tensor
    wanted = (1, m.shape[0], *(1 for _ in m.shape[2:])) if m.convolution else (m.shape[0],)
    if tensor.shape != wanted:
        raise InvalidFile(f"{m.magnitude.key} has shape {tensor.shape}, not {wanted}")
    return tensor


def _factors(a: Tensor, b: Tensor, xp: Backend) -> tuple[Array, Array]:
    return xp.f32(b), xp.f32(a)


def _vector(v: Tensor, xp: Backend) -> Array:
    return xp.f32(v)


def ranks(a: Adapter) -> Mapping[str, int]:
    return {m.name: m.rank for m in modules(a)} | dict(_parameters.ranks(a))


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from pair_findings(a, lambda m: m.rank)
    yield from _parameters.findings(a, shapes)


def pair_findings(a: Adapter, rank_of: Callable[[Module], int]) -> Iterator[Finding]:
    """Half pairs, ranks that the config does not say, patterns that overlap.

    Args:
        rank_of: What the tensors have; it may raise InvalidFile.
    """
    found: dict[str, int] = {}
    for m in modules(a):
        try:
            found[m.known_as] = rank_of(m)
        except InvalidFile as e:
            yield Finding("half-pair", m.name, e.message, "train or save the adapter again")
    yield from rank_findings(a.config, found, 8)
    yield from _overlaps(a, "rank_pattern")
    yield from _overlaps(a, "alpha_pattern")


def _overlaps(a: Adapter, field: str) -> Iterator[Finding]:
    """PEFT writes patterns sorted, so what won in training may lose after loading (silently, for alpha)."""
    patterns, values = pattern_field(a.config, field)
    for module in a.modules:
        hits = [p.text for p in patterns if p.matches(module)]
        if len({values[h] for h in hits}) > 1:
            yield Finding(
                "overlapping-patterns",
                module,
                f"{field} has {', '.join(hits)}, which all match; the first one in the file counts,"
                " which may not be the one that counted in training",
                "leave only one pattern for each module",
                warning=True,
            )
            return


def _same(a: Adapter, request: Request) -> Outcome:
    return Outcome(a, Grade.LOSSLESS, notes=("it already is plain LoRA",))


edges: Mapping[str, tuple[Edge, ...]] = {"lora": (Edge("lora", Grade.LOSSLESS, _same),)}
