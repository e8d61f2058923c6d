"""The plain LoRA nearest to what any adapter does to W: the best factors of the measured change, module by module.

Where a method has exact factors, those are cut and the base is not needed. Else the change is computed whole, in f64,
W' - W where it depends on W, and factored (Eckart and Young 1936). Biases get their new values.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterpack import plan, svd
from adapterpack.adapter import (
    EQUIVALENT_ERROR,
    Adapter,
    Block,
    Change,
    Effect,
    Grade,
    Kind,
    LowRank,
    Method,
    Outcome,
    Param,
    Progress,
    Replaced,
    Request,
)
from adapterpack.backend import Backend
from adapterpack.base import Base
from adapterpack.conversion import FactoredModule
from adapterpack.errors import InvalidFile, LossRefused, Unsupported, UsageError, WrongBase
from adapterpack.limits import LORA_RANK
from adapterpack.methods import _lowrank, _to_lora
from adapterpack.methods._changes import ReplaceChange, transposed
from adapterpack.methods._keys import PREFIX
from adapterpack.methods._parameters import ParameterChange
from adapterpack.tensor import Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array

_CAREFUL = 0.98
"""Of the error allowed, so much is spent on rank: the rest is for rounding to f32."""


@dataclass(frozen=True)
class Wish:
    """How near it has to be; one at least is given.

    Attributes:
        rank: Of every module, at most.
        energy: The least rank that keeps this fraction of the squared singular values.
        max_error: The least rank with no larger relative Frobenius error, of each module.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None

    def check(self) -> None:
        """Raise UsageError for what makes no sense."""
        if self.rank is not None and self.energy is not None:
            raise UsageError("--rank and --energy do not go together")
        if self.rank is not None and not 0 < self.rank <= LORA_RANK:
            raise UsageError(f"rank {self.rank}: a whole number from 1 to {LORA_RANK} is wanted")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy {self.energy}: a fraction above 0, at most 1, is wanted")

    @property
    def given(self) -> bool:
        return any(x is not None for x in (self.rank, self.energy, self.max_error))

    @property
    def lost(self) -> float:
        """The fraction of the squared singular values that may go, where no rank says so."""
        if self.energy is not None:
            return 1 - self.energy
        return (_CAREFUL * (EQUIVALENT_ERROR if self.max_error is None else self.max_error)) ** 2


@dataclass(frozen=True)
class Nearest:
    """What was found.

    Attributes:
        outcome: The LoRA; its grade is by the worst module.
        modules: Rank and error of each, worst first.
    """

    outcome: Outcome
    modules: tuple[FactoredModule, ...]

    @property
    def error(self) -> float:
        return max((m.rel_error or 0.0 for m in self.modules), default=0.0)


def is_exact(method: Method, a: Adapter, request: Request) -> bool:
    """Does every change of it have exact factors, so that the method's own conversion serves?

    Raises:
        WrongBase, InvalidFile, Unsupported: see `Method.changes`.
    """
    edge = any(e.to == "lora" for e in method.edges.get(a.encoding, ()))
    return edge and all(c.effect is not Effect.TRANSFORM for c in method.changes(a, request))


def lora(
    method: Method,
    a: Adapter,
    wish: Wish,
    request: Request,
    *,
    progress: Progress | None = None,
) -> Nearest:
    """Factor the change of every module.

    Args:
        request: Its `shapes` is a `Base` with weights where a change depends on W.

    Raises:
        LossRefused: no loss was allowed, and the change has no exact factors.
        WrongBase: the base's weights are needed, or do not fit.
        Unsupported: a change that LoRA has no place for.
        InvalidFile: a change is not finite.
    """
    if not wish.given:
        raise LossRefused(
            f"what {a.config.get('peft_type', a.method)} does to W has no exact low-rank form",
            hint="the nearest LoRA: --max-error E, --energy F or --rank R"
            + ("" if _has_weights(request) else ", and --base BASE where the change depends on W"),
        )
    grouped: dict[str, list[Change]] = {}
    for change in method.changes(a, request):
        grouped.setdefault(change.target, []).append(change)
    own = {t: c for t, c in grouped.items() if not all(isinstance(x, ReplaceChange) for x in c)}
    factors: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    found: list[FactoredModule] = []
    for n, (target, changes) in enumerate(own.items()):
        if progress:
            progress("factor", n, len(own))
        module = changes[-1].module
        if target == f"{module}.bias":
            biases[target] = _new_values(target, changes, request)
            continue
        if target != f"{module}.weight" or isinstance(changes[-1], ParameterChange):
            raise Unsupported(f"{target} is a bare parameter: it is not factored", hint="adapterpack merge takes it")
        pair, error = _factor(target, changes, wish, request)
        factors[module] = pair
        rank = next(t.shape[0] for name, t in pair.items() if name.endswith("_A"))
        found.append(FactoredModule(module, rank, error))
    if progress:
        progress("factor", len(own), len(own))
    if not factors:
        raise Unsupported(f"{a.source.name} changes no matrix: there is nothing to make LoRA of")
    return _result(a, factors, biases, found)


def _result(
    a: Adapter,
    factors: Mapping[str, Mapping[str, Tensor]],
    biases: Mapping[str, Tensor],
    found: Sequence[FactoredModule],
) -> Nearest:
    made = _to_lora.from_factors(a, factors)
    # A whole weight that was saved stays beside its LoRA, as PEFT saves embeddings; a bias has its last value only.
    replaced = {t: r for t, r in made.replaced.items() if t not in biases}
    for target, values in biases.items():
        module = target.removesuffix(".bias")
        replaced[target] = (Replaced(Param(f"{PREFIX}{module}.base_layer.bias", values)),)
    bias = made.config["bias"]
    config = {**made.config, "bias": "lora_only" if biases and bias == "none" else bias}
    modules = tuple(sorted(found, key=lambda m: (-(m.rel_error or 0.0), m.name)))
    worst = modules[0].rel_error or 0.0
    ranks = sorted({m.rank for m in modules})
    notes = [f"ranks {ranks[0]} to {ranks[-1]}, by module" if len(ranks) > 1 else f"rank {ranks[0]}"]
    if biases:
        notes.append(f"{len(biases)} biases have their new values (bias: {config['bias']})")
    outcome = Outcome(
        replace(made, replaced=replaced, config=config),
        Grade.EQUIVALENT if worst <= EQUIVALENT_ERROR else Grade.APPROXIMATE,
        dropped=(f"the parameters of {a.config.get('peft_type', a.method)}: training as such cannot resume",),
        notes=tuple(notes),
    )
    return Nearest(outcome, modules)


def _factor(target: str, changes: list[Change], wish: Wish, request: Request) -> tuple[dict[str, Tensor], float]:
    """Parameters under LoRA's names, and their error."""
    xp, last = request.xp, changes[-1]
    embedding = getattr(last, "layer", None) is Kind.EMBEDDING
    low = _exact_factors(xp, changes)
    if low is not None:
        whole = _lowrank.decomposed(xp, low, target)
        rank = wish.rank or _lowrank.least_rank(whole.values, wish.lost)
        b, a = (xp.f32(f).contiguous() for f in whole.at(min(rank, len(whole.values))))
        b = b * low.scale
        error = _error(_lowrank.distance(xp, low, LowRank(b, a, 1.0)), _lowrank.norm(xp, low))
        return _to_lora.parameters(xp, b, a, last.shape, embedding=embedding), error
    delta, embedding = _delta(target, changes, request)
    shape = delta.shape
    flat = delta.reshape(shape[0], -1)
    if not xp.finite(flat):
        raise InvalidFile(f"the change of {target} has NaN or infinite values")
    if wish.rank is not None:
        b, a = svd.at_rank(xp, flat, min(wish.rank, *flat.shape))
    else:
        b, a = svd.at_energy(xp, flat, 1 - wish.lost)
    b, a = (xp.f32(f).contiguous() for f in (b, a))
    return _to_lora.parameters(xp, b, a, tuple(shape), embedding=embedding), svd.lost(flat, b, a)


def _error(difference: float, whole: float) -> float:
    return difference / whole if whole else (math.inf if difference else 0.0)


def _exact_factors(xp: Backend, changes: Iterable[Change]) -> LowRank | None:
    own = [c for c in changes if not isinstance(c, ReplaceChange)]
    return own[0].load(xp).low_rank() if len(own) == 1 and own[0].effect is Effect.ADD else None


def _has_weights(request: Request) -> bool:
    return isinstance(request.shapes, Base) and bool(request.shapes.tensors)


def _loaded(target: str, changes: list[Change], request: Request) -> tuple[plan.LoadedSteps, Block]:
    """The changes of a tensor of the base, and the whole of it as one block."""
    model = request.shapes
    if not isinstance(model, Base) or not model.tensors:
        raise WrongBase(f"what {target} becomes depends on the base's weights", hint="--base BASE")
    steps = [step for change in changes for _, step in plan.steps_of(change, model)]
    loaded = plan.LoadedSteps.read(model.tensor(target), steps, request.xp)
    rows, _ = plan.as_matrix(loaded.tensor.shape)
    return loaded, Block(Kind.OTHER, slice(0, rows), True, loaded.tensor.dtype)


def _delta(target: str, changes: list[Change], request: Request) -> tuple[Array, bool]:
    """f64, logical (out, in) or (out, in, k...): what is done to W; and whether W is an embedding."""
    own = [c for c in changes if not isinstance(c, ReplaceChange)]
    if all(c.effect is Effect.ADD for c in own):
        shape = own[-1].shape
        deltas: list[Array] = [c.load(request.xp).delta(slice(0, shape[0])) for c in own]
        return functools.reduce(operator.add, deltas).reshape(shape), getattr(
            own[-1], "layer", None
        ) is Kind.EMBEDDING
    loaded, block = _loaded(target, changes, request)
    before = after = request.xp.f64(loaded.base(block))
    for change, step in loaded.steps:
        after = change.exact(after * 1, step.block(block))
        if step.change.effect is Effect.REPLACE:
            before = after
    kind = loaded.steps[-1][1].kind
    delta = after - before
    if transposed(kind):
        return delta.T, kind is Kind.EMBEDDING
    return delta.reshape(loaded.tensor.shape), False


def _new_values(target: str, changes: list[Change], request: Request) -> Tensor:
    """A bias as it becomes, f32."""
    loaded, block = _loaded(target, changes, request)
    return request.xp.tensor(request.xp.f32(loaded.exact(loaded.base(block), block)))
