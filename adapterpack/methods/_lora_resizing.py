"""Plain LoRA at other ranks: factors cut at the singular values of each module, and the config that says so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, LowRank, Param
from adapterpack.methods import _lowrank
from adapterpack.methods._keys import flag
from adapterpack.methods._lora_modules import Module, Scaling, exactly, modules
from adapterpack.tensor import BF16, F16, F32, DType, Shape, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend


def obstacle(a: Adapter) -> str | None:
    """Why its changes are no sums of low-rank products of single modules; None if they are."""
    if flag(a.config, "use_dora"):
        return "its changes depend on the base weights (DoRA): they are no low-rank products"
    if a.parameters:
        return "it adapts bare parameters (target_parameters), whose ranks PEFT cannot tell apart from experts"
    return None


@dataclass(frozen=True)
class Part:
    """One module of one adapter."""

    module: Module
    scale: float

    @property
    def name(self) -> str:
        return self.module.name

    @property
    def rank(self) -> int:
        return self.module.rank

    def low_rank(self, xp: Backend) -> LowRank:
        """Its change, f32, (out, r) and (r, in); a convolution's kernel is part of the inputs."""
        a, b = (xp.f32(t) for t in self.module.pair)
        return LowRank(b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1), self.scale)

    def decomposed(self, xp: Backend) -> _lowrank.Decomposed:
        """Raises InvalidFile if a factor has NaN or infinite values."""
        return _lowrank.decomposed(xp, self.low_rank(xp), self.name)

    @property
    def most(self) -> int:
        """The number of its singular values: no rank above it adds anything."""
        out, into = self.module.shape[0], math.prod(self.module.shape[1:])
        return min(out, self.rank, into)


def parts(a: Adapter) -> Iterator[Part]:
    """Every adapted module with its factor. Raises InvalidFile for half a pair, or a scale that is none."""
    scaling = Scaling(a.config)
    for m in modules(a):
        yield Part(m, scaling(m.name, m.rank))


@dataclass(frozen=True)
class Cut:
    """New factors of a module.

    Attributes:
        a: (rank, in), or (rank, in, k...) of a convolution.
        b: (out, rank), or (out, rank, 1...).
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


def own_dtypes(part: Part) -> tuple[DType, DType]:
    """Of new factors A and B: 16 bits stay 16 bits."""
    a, b = (t.dtype if t.dtype in (BF16, F16) else F32 for t in part.module.pair)
    return a, b


def shapes(part: Part, rank: int) -> tuple[Shape, Shape]:
    """Of A and B at another rank."""
    a, b = part.module.pair
    return (rank, *a.shape[1:]), (b.shape[0], rank, *b.shape[2:])


def cut(xp: Backend, part: Part, rank: int) -> Cut:
    """The best factors of that rank (min(out, r, in) at most), in the dtypes and at the scale that the module has."""
    return stored(xp, part, *part.decomposed(xp).at(rank), own_dtypes(part))


def stored(xp: Backend, part: Part, b: Array, a: Array, dtypes: tuple[DType, DType]) -> Cut:
    """Factors as the file has them: rounded once, and with the kernel of a convolution.

    What leaves the range of 16 bits becomes float32.
    """
    new = []
    for values, shape, dtype in zip((a, b), shapes(part, a.shape[0]), dtypes, strict=True):
        rounded = xp.round(values.reshape(shape), dtype)
        new.append(xp.tensor(rounded if xp.finite(rounded) else xp.round(values.reshape(shape), F32)))
    return Cut(*new)


def loss(xp: Backend, x: LowRank, y: LowRank) -> tuple[float, float]:
    """Frobenius norms, f64: of the difference of a change y from x, and of x."""
    norm = _lowrank.norm(xp, x)
    return (0.0 if _lowrank.same(xp, x, y) else _lowrank.distance(xp, x, y)), norm


def loss_of(xp: Backend, part: Part, new: Cut) -> tuple[float, float]:
    """What new factors lose of a module's change, rounding counted in."""
    b, a = xp.f32(new.b), xp.f32(new.a)
    low = LowRank(b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1), part.scale)
    return loss(xp, part.low_rank(xp), low)


def relative(lost: tuple[float, float]) -> float:
    """The first of them in parts of the second; 0 of 0 is 0."""
    difference, norm = lost
    return difference / norm if norm else math.inf if difference else 0.0


def within(xp: Backend, part: Part, max_error: float) -> Cut | None:
    """The smallest factors that keep the change within this relative error; None: those that it has.

    Rounding to 16 bits counts: where it alone is too much, float32 at the least rank may still be smaller.
    """
    full = part.decomposed(xp)
    least = _lowrank.least_rank(full.values, max_error**2)
    best: Cut | None = None
    for dtypes in dict.fromkeys((own_dtypes(part), (F32, F32))):

        def at(rank: int, dtypes: tuple[DType, DType] = dtypes) -> Cut:
            return stored(xp, part, *full.at(rank), dtypes)

        rank = first(
            least, min(part.rank - 1, len(full.values)), lambda r: relative(loss_of(xp, part, at(r))) <= max_error
        )
        if rank is not None:
            bound = sum(t.nbytes for t in part.module.pair) if best is None else best.nbytes
            made = at(rank)
            best = made if made.nbytes < bound else best
    return best


def first(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The least number in [low, high] that fits, where all above one that fits do; None: there is none.

    Where that is not quite so, the answer fits all the same. `low` is asked first: mostly it does.
    """
    if low > high:
        return None
    if fits(low):
        return low
    if not fits(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def truncated(a: Adapter, xp: Backend, max_error: float) -> Adapter | None:
    """Every module at the least size that keeps its change within `max_error`; None where none gets smaller."""
    if obstacle(a) is not None:
        return None
    found = {part.name: within(xp, part, max_error) for part in parts(a)}
    new = {name: made for name, made in found.items() if made is not None}
    return rewritten(a, new) if new else None


def rewritten(a: Adapter, new: Mapping[str, Cut]) -> Adapter:
    """The adapter with new factors of some modules, and a config that states every rank and scale."""
    params = {name: dict(own) for name, own in a.modules.items()}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for part in parts(a):
        ranks[part.name], scales[part.name] = part.rank, part.scale
        if part.name in new:
            made, own = new[part.name], params[part.name]
            names = ("lora_embedding_A", "lora_embedding_B") if part.module.embedding else ("lora_A", "lora_B")
            for name, tensor in zip(names, (made.a, made.b), strict=True):
                own[name] = Param(own[name].key, tensor)
            ranks[part.name] = made.rank
    return replace(a, config={**a.config, **stated(ranks, scales, a.config)}, modules=params, changed=True)


def stated(ranks: Mapping[str, int], scales: Mapping[str, float], config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the config that say these ranks and scales, module by module.

    `r` is the largest rank, and `lora_alpha / r` the scale that most modules have, for readers that know no
    patterns. rsLoRA becomes plain. What the factors were once initialised with is gone with them: PEFT would
    draw it again when it loads, and some of it takes even ranks.
    """
    most = max(ranks.values())
    scale = Counter(scales.values()).most_common(1)[0][0]
    fields: dict[str, Any] = {
        "r": most,
        "lora_alpha": _number(scale * most),
        "use_rslora": False,
        "rank_pattern": {exactly(m): rank for m, rank in ranks.items() if rank != most},
        "alpha_pattern": {
            exactly(m): _number(scales[m] * rank) for m, rank in ranks.items() if (scales[m], rank) != (scale, most)
        },
    }
    if config.get("init_lora_weights", True) not in (True, False, None):
        fields["init_lora_weights"] = True
        fields |= {name: None for name in ("eva_config",) if config.get(name)}
    return fields


def _number(x: float) -> float | int:
    return int(x) if x == int(x) else x
