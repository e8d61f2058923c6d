"""LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024).

    delta W = s * B @ A,   s = alpha / r, or alpha / sqrt(r) with rsLoRA
    DoRA:  W' = m / ||W + delta W||_row * (W + delta W)

Reference: peft/tuners/lora/layer.py (`get_delta_weight`, `merge`) and variants.py (`merge_unsafe`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import (
    Adapter,
    Block,
    Change,
    Edge,
    Effect,
    Finding,
    Grade,
    Kind,
    Loaded,
    LowRank,
    Outcome,
    Param,
    Product,
    Request,
    Shapes,
)
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.io.patterns import Pattern, peft_patterns
from adapterpack.methods import _lowrank
from adapterpack.methods._changes import LoadedLowRank, LowRankChange, VectorChange, replacements
from adapterpack.methods._keys import KeyTable, flag, positive, require
from adapterpack.methods._lora_variants import refused_variant
from adapterpack.recipes import Recipe
from adapterpack.tensor import Shape, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

peft_type = "LORA"
keep_dtype: frozenset[str] = frozenset()
keys = KeyTable(
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


def parse(c: Checkpoint) -> Adapter:
    reason = refused_variant(c.config, c.tensors)
    if reason is not None:
        hint = "merge it with PEFT"
        if "changes the base" in reason:
            hint = "save it again with PEFT's path_initial_model_for_weight_conversion; that is plain LoRA"
        raise Unsupported(f"{c.name} is not plain LoRA: {reason}", hint=hint)
    return keys.parse(c, "lora", "lora")


@dataclass(frozen=True)
class _Module:
    """One adapted module, its tensors sorted out and checked against each other."""

    name: str
    params: Mapping[str, Param]
    embedding: bool

    @cached_property
    def pair(self) -> tuple[Tensor, Tensor]:
        names = ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A", "lora_B")
        a, b = require(self.name, self.params, names)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise InvalidFile(f"{self.name}: A {a.shape} and B {b.shape} are not (r, in) and (out, r)")
        return a, b

    @property
    def rank(self) -> int:
        return self.pair[0].shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        a, b = self.pair
        return b.shape[0], a.shape[1]

    @property
    def magnitude(self) -> Param | None:
        return self.params.get("magnitude") or self.params.get("magnitude.weight")


def _modules(a: Adapter) -> Iterator[_Module]:
    for name, params in a.modules.items():
        embedding = "lora_embedding_A" in params or "lora_embedding_B" in params
        if embedding and ("lora_A" in params or "lora_B" in params):
            raise InvalidFile(f"{name} is adapted as an embedding and as a linear layer")
        yield _Module(name, params, embedding)


def first_match(patterns: list[Pattern], values: Mapping[str, Any], module: str) -> Any:
    """PEFT takes the first pattern in file order that matches; None if none does."""
    for pattern in patterns:
        if pattern.matches(module):
            return values[pattern.text]
    return None


def _pattern_field(config: Mapping[str, Any], field: str) -> tuple[list[Pattern], Mapping[str, Any]]:
    values = config.get(field) or {}
    if not isinstance(values, dict):
        raise InvalidFile(f"{field} in adapter_config.json is not an object")
    return list(peft_patterns(values, field)), values


class Scaling:
    """The factor of each module, from the config and the rank that its tensors have.

    The rank comes from the tensors: `rank_pattern` was written with sorted keys, so overlapping patterns
    may say something else now than in training.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._alpha = config.get("lora_alpha", 8)
        self._rslora = flag(config, "use_rslora")
        self._patterns, self._values = _pattern_field(config, "alpha_pattern")

    def __call__(self, module: str, rank: int) -> float:
        alpha = first_match(self._patterns, self._values, module)
        if alpha is None:
            alpha = self._alpha
        number = type(alpha) in (int, float) and math.isfinite(alpha) and 0 < abs(alpha) < 1e9
        if not number:
            raise InvalidFile(f"lora_alpha of {module} is {alpha!r:.60}; a finite number other than 0 is wanted")
        return float(alpha / (math.sqrt(rank) if self._rslora else rank))


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    scaling = Scaling(a.config)
    fan_in_fan_out = flag(a.config, "fan_in_fan_out")
    for m in _modules(a):
        lora_a, lora_b = m.pair
        scale = scaling(m.name, m.rank)
        uses = {m.params[n].key for n in m.params if n != "lora_bias"}
        low_rank = LowRankChange(
            module=m.name,
            factors=partial(_factors, lora_a, lora_b),
            shape=m.shape,
            rank=m.rank,
            scale=scale,
            uses=frozenset(uses),
            layer=Kind.EMBEDDING if m.embedding else Kind.LINEAR,
            fan_in_fan_out=fan_in_fan_out,
            # lora/layer.py, Embedding.merge: `weight += delta.to(orig_dtype)`; Linear.merge has no cast.
            round_delta=m.embedding,
        )
        if m.magnitude is None:
            if flag(a.config, "use_dora"):
                raise InvalidFile(f"use_dora is true but {m.name} has no lora_magnitude_vector")
            yield low_rank
        else:
            if not flag(a.config, "use_dora"):
                raise InvalidFile(
                    f"use_dora is false but {m.name} has a lora_magnitude_vector",
                    hint="set use_dora to true in adapter_config.json: PEFT ignores the magnitudes as it stands",
                )
            if m.magnitude.tensor.shape != (m.shape[0],):
                raise InvalidFile(f"{m.magnitude.key} has shape {m.magnitude.tensor.shape}, not ({m.shape[0]},)")
            yield DoraChange(low_rank, m.magnitude.tensor)
        if "lora_bias" in m.params:
            bias = m.params["lora_bias"]
            if bias.tensor.shape != (m.shape[0],):
                raise InvalidFile(f"{bias.key} has shape {bias.tensor.shape}, not ({m.shape[0]},)")
            yield VectorChange(m.name, partial(_vector, bias.tensor), bias.tensor.shape, scale, frozenset({bias.key}))


def _factors(a: Tensor, b: Tensor, xp: Backend) -> tuple[Array, Array]:
    return xp.f32(b), xp.f32(a)


def _vector(v: Tensor, xp: Backend) -> Array:
    return xp.f32(v)


@dataclass(frozen=True)
class DoraChange:
    """m / ||W + delta|| * (W + delta), the norm over the input features of each output."""

    low_rank: LowRankChange
    magnitude: Tensor

    effect = Effect.TRANSFORM
    # numpy sums the squares of a row in another order.
    torch = True

    def whole(self, kind: Kind) -> bool:
        return kind is not Kind.LINEAR

    def products(self, kind: Kind) -> tuple[Product, ...]:
        return tuple(replace(p, norms=True) for p in self.low_rank.products(kind))

    @property
    def module(self) -> str:
        return self.low_rank.module

    @property
    def target(self) -> str:
        return self.low_rank.target

    @property
    def shape(self) -> Shape:
        return self.low_rank.shape

    @property
    def uses(self) -> frozenset[str]:
        return self.low_rank.uses

    def place(self, shape: Shape, conv1d: bool | None) -> Kind:
        return self.low_rank.place(shape, conv1d)

    def load(self, xp: Backend) -> Loaded:
        b, a = self.low_rank.factors(xp)
        loaded = LoadedLowRank(xp, LowRank(b, a, self.low_rank.scale))
        return _LoadedDora(xp, loaded, xp.f32(self.magnitude))


@dataclass(frozen=True)
class _LoadedDora:
    xp: Backend
    plain: LoadedLowRank
    magnitude: Array

    def low_rank(self) -> LowRank | None:
        return None

    def delta(self, rows: slice) -> Array | None:
        return None

    def parts(self) -> Mapping[str, Array]:
        return {**self.plain.parts(), "magnitude": self.magnitude}

    def apply(self, w: Array, block: Block) -> Array:
        return self._scaled(self.plain.apply(w, block), self.magnitude, block)

    def exact(self, w: Array, block: Block) -> Array:
        return self._scaled(self.plain.exact(w, block), self.xp.f64(self.magnitude), block)

    def noise(self, w: Array, block: Block) -> Array:
        """That of W + delta times m / norm, and what the norm itself loses in summing a row of squares."""
        v = self.plain.apply(w, block)
        inputs = self.plain.factors.a.shape[1]
        own = abs(v) * ((8 + math.sqrt(inputs)) * 2.0**-24)
        return abs(self._gain(v, self.magnitude, block)) * (self.plain.noise(w, block) + own)

    def _gain(self, v: Array, magnitude: Array, block: Block) -> Array:
        """m / norm, as it is broadcast over W. In PEFT's order: the norm of the logical rows, then the quotient."""
        if block.kind is Kind.LINEAR:
            return (magnitude[block.rows] / self.xp.rows_norm(v)).reshape(-1, 1)
        return (magnitude / self.xp.rows_norm(v.T)).reshape(1, -1)

    def _scaled(self, v: Array, magnitude: Array, block: Block) -> Array:
        return self._gain(v, magnitude, block) * v


def ranks(a: Adapter) -> Mapping[str, int]:
    return {m.name: m.rank for m in _modules(a)}


def recipes(a: Adapter) -> Iterator[Recipe]:
    return iter(())


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    config = a.config
    patterns, values = _pattern_field(config, "rank_pattern")
    r = positive(config, "r", 8)
    for m in _modules(a):
        try:
            rank = m.rank
        except InvalidFile as e:
            yield Finding("half-pair", m.name, e.message, "train or save the adapter again")
            continue
        said = first_match(patterns, values, m.name)
        said = r if said is None else said
        if said != rank:
            yield Finding(
                "rank-mismatch",
                m.name,
                f"the config says rank {said!r:.20}, the tensors have {rank}: PEFT refuses to load it",
                f'put "{m.name}": {rank} first in rank_pattern',
            )
    if values and len(patterns) > 1:
        yield from _overlaps(a, "rank_pattern")
    yield from _overlaps(a, "alpha_pattern")


def _overlaps(a: Adapter, field: str) -> Iterator[Finding]:
    """PEFT writes patterns sorted, so what won in training may lose after loading (silently, for alpha)."""
    patterns, values = _pattern_field(a.config, field)
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


def from_factors(
    a: Adapter,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    rank: int,
    rename_bias: str,
) -> Adapter:
    """A plain LoRA adapter with scale 1 (alpha = r) from exact factors of another method.

    Args:
        a: The source: its targeting fields, replaced tensors and extra keys are kept.
        factors: Module to (A, B), (r, in) and (out, r).
        rename_bias: The source's word for "bias of adapted layers only", `vera_only`.
    """
    source = a.config
    carried = (
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "fan_in_fan_out",
        "peft_version",
    )
    config: dict[str, Any] = {"peft_type": peft_type}
    config |= {field: source[field] for field in carried if field in source}
    if not config.get("target_modules"):
        # Without a list PEFT takes the architecture's default, and each method has its own.
        config["target_modules"] = sorted(factors)
    bias = source.get("bias", "none")
    config |= {
        "bias": "lora_only" if bias == rename_bias else bias,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    modules = {
        module: {
            "lora_A": Param(keys.key(module, "lora_A"), lora_a),
            "lora_B": Param(keys.key(module, "lora_B"), lora_b),
        }
        for module, (lora_a, lora_b) in factors.items()
    }
    return Adapter(
        method="lora",
        encoding="lora",
        config=config,
        modules=modules,
        shared={},
        replaced=a.replaced,
        extra=a.extra,
        source=a.source,
        metadata={k: v for k, v in a.metadata.items() if k != "adapterpack"},
        changed=True,
    )


def truncated(a: Adapter, request: Request, max_error: float) -> Adapter | None:
    """Every module at the least rank that keeps its change within `max_error` (relative, Frobenius).

    None for DoRA, whose change is no product, and where no rank can be lowered.
    """
    if flag(a.config, "use_dora"):
        return None
    modules = {name: dict(params) for name, params in a.modules.items()}
    made: dict[str, tuple[int, float]] = {}
    for change in changes(a, request):
        if not isinstance(change, LowRankChange):
            continue
        factors = change.load(request.xp).low_rank()
        assert factors is not None
        b, a_factor = _lowrank.truncate(request.xp, factors, max_error)
        made[change.module] = b.shape[1], change.scale
        names = ("lora_embedding_A", "lora_embedding_B") if change.layer is Kind.EMBEDDING else ("lora_A", "lora_B")
        for name, values in zip(names, (a_factor, b), strict=True):
            old = modules[change.module][name]
            modules[change.module][name] = Param(old.key, request.xp.tensor(values))
    if all(rank >= old for (rank, _), old in zip(made.values(), ranks(a).values(), strict=True)):
        return None
    most = max(rank for rank, _ in made.values())
    scale = next(iter(made.values()))[1]
    config = {
        **a.config,
        "r": most,
        "lora_alpha": scale * most,
        "use_rslora": False,
        # Anchored: `(.*\.)?(^path)$` matches this module and none that merely ends like it.
        "rank_pattern": {f"^{m}": rank for m, (rank, _) in made.items() if rank != most},
        "alpha_pattern": {f"^{m}": s * rank for m, (rank, s) in made.items() if (s, rank) != (scale, most)},
    }
    return replace(a, config=config, modules=modules, changed=True)


def _same(a: Adapter, request: Request) -> Outcome:
    return Outcome(a, Grade.LOSSLESS, notes=("it already is plain LoRA",))


edges: Mapping[str, tuple[Edge, ...]] = {"lora": (Edge("lora", Grade.LOSSLESS, _same),)}
