"""Sums of LoRA adapters, module by module: exact, or as PEFT's `add_weighted_adapter` makes them.

    exact:   sum_i w_i s_i B_i A_i  =  [c_1 B_1, c_2 B_2, ...] @ [A_1; A_2; ...],   c_i = w_i s_i

Reference: peft/tuners/lora/model.py (`add_weighted_adapter` and what it calls).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterpack import limits
from adapterpack.adapter import Adapter, LowRank, Progress
from adapterpack.architectures import CONV1D_NAMES
from adapterpack.errors import InvalidFile, Unsupported, WrongBase
from adapterpack.methods import _lora_resizing, _lowrank, _model_order, _task_arithmetic
from adapterpack.methods._keys import flag, positive
from adapterpack.methods._lora_modules import pattern_field
from adapterpack.methods._lora_resizing import Cut, Part
from adapterpack.tensor import F32, DType, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Types that sum A and B apart."""
DENSE = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
"""Types that prune the dense change."""
TYPES = ("exact", *FACTORS, "cat", "svd", *DENSE)
_CANCELLED = 1e-9
"""Where summands cancel beyond this, an error is relative to this part of them."""


@dataclass(frozen=True)
class Way:
    """How adapters are combined.

    Attributes:
        kind: One of `TYPES`.
        rank: Of the result, for `exact` and what ends in svd; None: as it comes.
        density: Fraction of the values that pruning keeps.
        majority: `total` or `frequency`, for ties.
        seed: Of torch's generator, for dare.
    """

    kind: str
    rank: int | None = None
    density: float = 1.0
    majority: str = "total"
    seed: int = 0


@dataclass(frozen=True)
class Summand:
    """One module of one adapter and its factor c = weight * scale."""

    part: Part
    weight: float

    @property
    def factor(self) -> float:
        return self.weight * self.part.scale


@dataclass(frozen=True)
class Sum:
    """What several adapters do to one module, in their order.

    Attributes:
        scale: That the result shall have.
        transposed: Does the weight lie as (in, out)?
    """

    name: str
    summands: Sequence[Summand]
    scale: float
    transposed: bool

    @property
    def part(self) -> Part:
        return self.summands[0].part

    @property
    def rank(self) -> int:
        return sum(s.part.rank for s in self.summands)

    def exact(self, xp: Backend) -> LowRank:
        """The weighted sum itself, f64, as one change of rank `rank`."""
        b, a = [], []
        for s in self.summands:
            f = s.part.low_rank(xp)
            b.append(xp.f64(f.b) * (s.factor / self.scale))
            a.append(xp.f64(f.a))
        return LowRank(xp.torch.cat(b, dim=1), xp.torch.cat(a, dim=0), self.scale)

    def error(self, xp: Backend, b: Tensor, a: Tensor) -> float:
        """How far factors of the result are from the exact sum: Frobenius, relative to the sum."""
        flat_b, flat_a = (xp.f32(t).reshape(t.shape[0], -1) for t in (b, a))
        exact = self.exact(xp)
        difference = _lowrank.distance(xp, exact, LowRank(flat_b, flat_a, self.scale))
        parts = [abs(s.weight) * _lowrank.norm(xp, s.part.low_rank(xp)) for s in self.summands]
        norm = max(_lowrank.norm(xp, exact), _CANCELLED * sum(parts))
        return difference / norm if norm else math.inf if difference else 0.0


def sums(adapters: Sequence[Adapter], weights: Sequence[float], kind: str) -> list[Sum]:
    """What is to be summed, in the order of the names.

    The scale of `exact` is the one that all summands have, so that nothing is rounded; else it is 1 and the
    factors go into B. PEFT's types have scale 1.

    Raises:
        WrongBase: a module has different shapes, or is of different kinds: the adapters are of different bases.
    """
    found: dict[str, list[Summand]] = {}
    for a, weight in zip(adapters, weights, strict=True):
        for part in _lora_resizing.parts(a):
            found.setdefault(part.name, []).append(Summand(part, weight))
    factors = {abs(s.factor) for own in found.values() for s in own}
    one = factors.pop() if kind == "exact" and len(factors) == 1 and 0 not in factors else 1.0
    for name, own in found.items():
        kinds = {(s.part.module.shape, s.part.module.embedding) for s in own}
        if len(kinds) > 1:
            shapes = " and ".join(str(s.part.module.shape) for s in own)
            raise WrongBase(f"{name} has shapes {shapes}: the adapters are for different bases")
    conv1d = any(flag(a.config, "fan_in_fan_out") for a in adapters)
    return [
        Sum(name, own, one, own[0].part.module.embedding or (conv1d and name.rpartition(".")[2] in CONV1D_NAMES))
        for name, own in sorted(found.items())
    ]


def combined(
    xp: Backend, adapters: Sequence[Adapter], every: Sequence[Sum], way: Way, progress: Progress | None
) -> Iterator[tuple[Sum, Cut]]:
    """The new factors of every module, at its `scale`. The global generator of torch is left as it was.

    Raises:
        Unsupported: PEFT could not combine them so either: ranks differ.
        InvalidFile: a factor has NaN or infinite values.
    """
    rank = _peft_rank(adapters, way)
    by_name = {s.name: s for s in every}
    order = list(by_name)
    random = way.kind.startswith("dare") and way.density < 1
    with xp.torch.random.fork_rng(devices=[]) if random else nullcontext():
        if random:
            order = _model_order.in_order(order)[0]
            xp.torch.manual_seed(way.seed)
            for name in order:
                _draw_as_initialised(xp.torch, by_name[name].part, rank, adapters[0].config)
        for n, name in enumerate(order):
            if progress:
                progress("combine", n, len(order))
            s = by_name[name]
            if not all(xp.finite(xp.f32(t)) for x in s.summands for t in x.part.module.pair):
                raise InvalidFile(f"{name} has NaN or infinite values")
            yield s, _factors(xp, s, way, rank)
    if progress:
        progress("combine", len(order), len(order))


def _factors(xp: Backend, s: Sum, way: Way, rank: int) -> Cut:
    if way.kind == "exact":
        return _exact(xp, s, way.rank)
    if way.kind == "cat":
        a = [xp.f32(x.part.module.pair[0]) * x.weight * x.part.scale for x in s.summands]
        b = [xp.f32(x.part.module.pair[1]) for x in s.summands]
        return _padded(xp, s.part, xp.torch.cat(b, dim=1), xp.torch.cat(a, dim=0), rank)
    if way.kind == "svd":
        full = _lowrank.decomposed(xp, s.exact(xp), s.name)
        return _padded(xp, s.part, full.left[:, :rank] * full.values[:rank], full.right[:rank], rank)
    if way.kind in FACTORS:
        return _by_factor(xp, s, way)
    return _by_dense_change(xp, s, way, rank)


def _exact(xp: Backend, s: Sum, rank: int | None) -> Cut:
    exact = s.exact(xp)
    dtypes = _common_dtypes(s)
    if rank is not None and rank < s.rank:
        return _lora_resizing.stored(xp, s.part, *_lowrank.decomposed(xp, exact, s.name).at(rank), dtypes)
    new = []
    for values, dtype in ((exact.a, dtypes[0]), (exact.b, dtypes[1])):
        # A factor that 16 bits do not hold exactly makes B float32.
        new.append(dtype if xp.torch.equal(xp.f64(xp.round(values, dtype)), values) else F32)
    return _lora_resizing.stored(xp, s.part, exact.b, exact.a, (new[0], new[1]))


def _common_dtypes(s: Sum) -> tuple[DType, DType]:
    pairs = {_lora_resizing.own_dtypes(x.part) for x in s.summands}
    return pairs.pop() if len(pairs) == 1 else (F32, F32)


def _padded(xp: Backend, part: Part, b: Array, a: Array, rank: int) -> Cut:
    """With zeros up to one rank for all modules, as PEFT has it."""
    flat_b, flat_a = b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)
    missing = rank - flat_a.shape[0]
    if missing > 0:
        flat_b = xp.torch.cat([flat_b, flat_b.new_zeros(flat_b.shape[0], missing)], dim=1)
        flat_a = xp.torch.cat([flat_a, flat_a.new_zeros(missing, flat_a.shape[1])], dim=0)
    return _lora_resizing.stored(xp, part, flat_b, flat_a, (F32, F32))


def _sum(xp: Backend, tensors: Sequence[Array], weights: Sequence[float], way: Way) -> Array:
    torch = xp.torch
    prune = _task_arithmetic.keep_largest(torch, way.density)
    if way.kind.startswith("dare"):
        prune = _task_arithmetic.keep_some(torch, way.density)
    elif way.kind == "linear":
        prune = _task_arithmetic.keep_largest(torch, 1)
    majority = way.majority if "ties" in way.kind else None
    return _task_arithmetic.weighted_sum(torch, tensors, weights, prune, majority)


def _by_factor(xp: Backend, s: Sum, way: Way) -> Cut:
    """The roots of the factors go to both sides, a sign to A: cross terms come in, and the sum is another one."""
    roots = [math.sqrt(abs(x.factor)) for x in s.summands]
    signed = [r if x.factor >= 0 else -r for r, x in zip(roots, s.summands, strict=True)]
    if len({x.part.rank for x in s.summands}) > 1:
        ranks = " and ".join(str(x.part.rank) for x in s.summands)
        raise Unsupported(f"{s.name} has ranks {ranks}: {way.kind} takes equal ranks", hint="--type exact or svd")
    a = _sum(xp, [xp.f32(x.part.module.pair[0]) for x in s.summands], signed, way)
    b = _sum(xp, [xp.f32(x.part.module.pair[1]) for x in s.summands], roots, way)
    return _lora_resizing.stored(xp, s.part, b, a, (F32, F32))


def _by_dense_change(xp: Backend, s: Sum, way: Way, rank: int) -> Cut:
    deltas = []
    for x in s.summands:
        f = x.part.low_rank(xp)
        delta = ((f.b @ f.a) * f.scale).reshape(x.part.module.shape)
        # As the weight lies, for random numbers are drawn in its order.
        deltas.append(delta.T if s.transposed else delta)
    dense = _sum(xp, deltas, [x.weight for x in s.summands], way)
    dense = dense.T if s.transposed else dense.flatten(start_dim=1)
    u, values, vh = xp.torch.linalg.svd(dense, full_matrices=False)
    return _padded(xp, s.part, u[:, :rank] * values[:rank], vh[:rank], rank)


def _peft_rank(adapters: Sequence[Adapter], way: Way) -> int:
    """The rank that PEFT gives the new adapter, from the configs; 0 for `exact`.

    Raises:
        Unsupported: it takes adapters of one rank.
    """
    if way.kind == "exact":
        return 0
    ranks = []
    for a in adapters:
        values: Mapping[str, Any] = pattern_field(a.config, "rank_pattern")[1]
        ranks.append(max(positive({"r": r}, "r", 8) for r in (a.config.get("r", 8), *values.values())))
    if way.kind in FACTORS:
        if len(set(ranks)) > 1:
            said = ", ".join(map(str, ranks))
            raise Unsupported(f"the adapters have ranks {said}: {way.kind} takes equal ranks", hint="--type exact")
        return ranks[0]
    total = sum(ranks) if way.kind == "cat" else way.rank or max(ranks)
    return min(total, limits.LORA_RANK)


def _draw_as_initialised(torch: Any, part: Part, rank: int, config: Mapping[str, Any]) -> None:
    """Draw the random numbers that PEFT draws when it makes the new adapter's layer, before it combines anything."""
    a, b = _lora_resizing.shapes(part, rank)
    init = config.get("init_lora_weights", True)
    if part.module.embedding:
        torch.randn(a)
        torch.randn(b)
        if init:
            torch.empty(b).normal_()
        return
    torch.empty(a).uniform_()
    torch.empty(b).uniform_()
    if str(init).lower() == "gaussian":
        torch.empty(a).normal_()
    elif init:
        torch.empty(a).uniform_()


def draws_like_peft(every: Sequence[Sum], adapters: Sequence[Adapter], way: Way) -> bool:
    """Are PEFT's random numbers for these modules known?"""
    init = str(adapters[0].config.get("init_lora_weights", True)).lower()
    known = _model_order.in_order([s.name for s in every])[1] and init in ("true", "false", "gaussian")
    # One flag stands in a file for all layers; where it is false, it may hide a Conv1D behind a linear layer.
    leaves = {s.name.rpartition(".")[2] in CONV1D_NAMES for s in every}
    mixed = len(leaves) == 2 and not all(flag(a.config, "fan_in_fan_out") for a in adapters)
    return known and not (mixed and way.kind in DENSE)
