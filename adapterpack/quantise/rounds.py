"""Quantised parameters whose effect on the change of W is best seen by trying: VB-LoRA, VeRA, DoRA.

Each kind of parameter of a unit (a module; all of VB-LoRA, whose modules share the bank) is first quantised alone, to
see what its step costs in error. Then the squared error is shared out by the number of values, since at small steps
every value should buy the same accuracy for its next bit, and all steps are scaled until the measured error fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Param, Progress
from adapterpack.codecs.lines import LARGEST, Quantised, classes, line_shape, step_values
from adapterpack.errors import InvalidFile
from adapterpack.methods import _lora_resizing, vblora
from adapterpack.quantise import lora
from adapterpack.quantise.lora import Made, equal, matrix, stored_now
from adapterpack.quantise.waterfilling import Search
from adapterpack.tensor import F32, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

_ROUNDS = 7
_CLOSE = 0.997
_SAFE = 0.9999
"""Top-k itself moves a change by a millionth, and others measure in another order of sums."""
_SHARED = ""
"""Stands for the module of a shared parameter."""

Errors = Callable[[Adapter], Mapping[str, float]]
"""Relative error of each base tensor's change."""


@dataclass(frozen=True)
class New:
    """New parameters.

    Attributes:
        tensors: (module, name) to its tensor.
        made: Module to new LoRA factors.
    """

    tensors: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    made: Mapping[str, Made] = field(default_factory=dict)

    def and_(self, other: New) -> New:
        """Both; of what both have the other's."""
        return New({**self.tensors, **other.tensors}, {**self.made, **other.made})

    def sources(self) -> list[Quantised]:
        """All that is quantised in them."""
        tensors = [*self.tensors.values(), *(t for m in self.made.values() for t in (m.cut.a, m.cut.b))]
        return [t.source for t in tensors if isinstance(t.source, Quantised)]

    def into(self, a: Adapter) -> Adapter:
        """The adapter with them."""
        if self.made:
            a = lora.rewritten(a, dict(self.made))
        modules = {m: dict(params) for m, params in a.modules.items()}
        shared = dict(a.shared)
        for (module, name), tensor in self.tensors.items():
            own = shared if module == _SHARED else modules[module]
            own[name] = replace(own[name], tensor=tensor)
        return replace(a, modules=modules, shared=shared, changed=True)


@dataclass(frozen=True)
class Piece:
    """Parameters of one kind.

    Attributes:
        values: How many numbers they are.
        at: Them at a coarseness, to which their error is about proportional; None: not possible.
    """

    values: int
    at: Callable[[float], New | None]


@dataclass(frozen=True)
class Unit:
    """What is fitted together.

    Attributes:
        targets: The base tensors whose errors count.
        pieces: Its parameters, kind by kind.
    """

    targets: frozenset[str]
    pieces: tuple[Piece, ...]


def fitted(
    a: Adapter, units: Sequence[Unit], max_error: float, errors: Errors, progress: Progress | None
) -> tuple[New, int]:
    """The coarsest parameters found that keep every unit within the error.

    Returns:
        Them, and how many units were left as they are.
    """
    allowed = min(max_error, 0.999) * _SAFE
    kinds = max((len(u.pieces) for u in units), default=0)
    total = kinds + _ROUNDS

    def measured(round_: int, tried: Sequence[New | None]) -> list[float]:
        if progress:
            progress("quantise", round_, total)
        new = New()
        for one in tried:
            new = new if one is None else new.and_(one)
        found = errors(new.into(a))
        return [max((_number(found.get(t, 0.0)) for t in u.targets), default=0.0) for u in units]

    costs = [[1.0] * len(u.pieces) for u in units]
    for kind in range(kinds):
        alone = [u.pieces[kind].at(allowed) if kind < len(u.pieces) else None for u in units]
        for n, error in enumerate(measured(kind, alone)):
            if alone[n] is not None and 0 < error < math.inf:
                costs[n][kind] = error / allowed
    searches = [Search() for _ in units]
    best: list[tuple[float, New] | None] = [None] * len(units)
    for round_ in range(_ROUNDS):
        tried = [_at(u, c, allowed * s.knob) for u, c, s in zip(units, costs, searches, strict=True)]
        found = measured(kinds + round_, tried)
        for n, (one, error) in enumerate(zip(tried, found, strict=True)):
            before = best[n]
            if one is not None and error <= allowed and (before is None or error > before[0]):
                best[n] = error, one
            searches[n].tell(error / allowed)
        if all(b is not None and b[0] >= _CLOSE * allowed for b in best):
            break
    if progress:
        progress("quantise", total, total)
    new = New()
    for b in best:
        new = new if b is None else new.and_(b[1])
    return new, sum(b is None for b in best)


def _at(unit: Unit, costs: Sequence[float], error: float) -> New | None:
    """All pieces of a unit, the squared error shared out by the number of their values."""
    values, new = sum(p.values for p in unit.pieces), New()
    for piece, cost in zip(unit.pieces, costs, strict=True):
        made = piece.at(error * math.sqrt(piece.values / values) / cost)
        if made is None:
            return None
        new = new.and_(made)
    return new


def _finite(xp: Backend, param: Param) -> Array:
    """Its values, f64. Raises InvalidFile for NaN and infinities: no step comes near them."""
    values = xp.f64(param.tensor)
    if not xp.finite(values):
        raise InvalidFile(f"{param.key} has NaN or infinite values")
    return values


def _number(error: float) -> float:
    return error if error == error else math.inf


def smaller(a: Adapter, new: New) -> bool:
    """Do these parameters take less room than the ones that they stand for?"""
    own = {(m, n): p.tensor for m, params in a.modules.items() for n, p in params.items()}
    own |= {(_SHARED, n): p.tensor for n, p in a.shared.items()}
    before = sum(stored_now(own[place]) for place in new.tensors)
    for module in new.made:
        before += sum(stored_now(t) for (m, n), t in own.items() if m == module and n in _FACTORS)
    sources = new.sources()
    return bool(sources) and classes(sources).nbytes + sum(len(s.steps) for s in sources) < before


_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


# -- VB-LoRA -----------------------------------------------------------------------------------------------


def vblora_units(a: Adapter, xp: Backend) -> list[Unit]:
    """One unit: the bank, and all weights. The adapter is in the top-k encoding; its indices stay as they are.

    Raises:
        InvalidFile: a value is NaN or infinite.
    """
    bank = a.shared[vblora.BANK].tensor
    values = _finite(xp, a.shared[vblora.BANK])
    places = [(m, f"weights_{side}") for m in a.modules for side in "AB"]
    weights = {(m, n): a.modules[m][n].tensor for m, n in places if a.modules[m][n].tensor.numel}
    for module, name in weights:
        _finite(xp, a.modules[module][name])
    longest = max((t.shape[-1] + 1 for t in weights.values()), default=1)
    # What no sub-vector names adds nothing to any change.
    used = xp.torch.zeros(bank.shape[0], dtype=xp.torch.bool, device=xp.device)
    for params in a.modules.values():
        for side in "AB":
            used[xp.native(params[f"indices_{side}"].tensor).long().reshape(-1)] = True
    values = values * used[:, None]
    deviation = float(values.square().sum().sqrt()) / math.sqrt(max(int(used.sum()) * bank.shape[1], 1))

    def bank_at(error: float) -> New | None:
        made = equal(xp, values, math.sqrt(12) * error * deviation, 0) if deviation else None
        return None if made is None else New({(_SHARED, vblora.BANK): Tensor(F32, bank.shape, made)})

    def weights_at(step: float) -> New | None:
        made = {}
        # Coarser ones could leave no weight at all to a sub-vector.
        steps = lora.steps_near(min(step, 0.25 / longest), len(weights))
        for (place, tensor), j in zip(weights.items(), steps, strict=True):
            source = _weights(tensor, j)
            if source is None:
                return None
            made[place] = Tensor(F32, tensor.shape, source)
        return New(made)

    pieces = [Piece(int(used.sum()) * bank.shape[1], bank_at)]
    if weights:
        pieces.append(Piece(sum(t.numel for t in weights.values()), weights_at))
    return [Unit(frozenset(f"{m}.weight" for m in a.modules), tuple(pieces))]


def _weights(tensor: Tensor, j: int) -> Quantised | None:
    """The first k - 1 of k weights; None for a step that is too small.

    PEFT computes the last weight as 1 - sum and takes its logarithm: the sum of whole numbers of steps is exact in
    f32, and never above 1.
    """
    import numpy as np

    step = float(step_values([j])[0])
    most = math.floor(1 / step)
    if most > LARGEST:
        return None
    old = tensor.numpy().astype(np.float64).reshape(-1, tensor.shape[-1])
    codes = np.rint(old / step).astype(np.int32)
    largest = codes.argmax(axis=1)
    codes[np.arange(len(codes)), largest] -= np.maximum(codes.sum(axis=1) - most, 0).astype(np.int32)
    rows = line_shape(tensor.shape, 0)
    return Quantised(np.ascontiguousarray(codes.reshape(rows)), (j,) * rows[0])


# -- VeRA --------------------------------------------------------------------------------------------------


def vera_units(a: Adapter, xp: Backend) -> list[Unit]:
    """A unit for each module: its two vectors. The projections stay as they are. Raises InvalidFile as above."""
    return [
        Unit(
            frozenset({f"{module}.weight"}),
            tuple(_vector(xp, module, name, params[name]) for name in ("lambda_b", "lambda_d") if name in params),
        )
        for module, params in a.modules.items()
    ]


def _vector(xp: Backend, module: str, name: str, param: Param) -> Piece:
    """A vector as one line, at a step in parts of its root mean square."""
    values = _finite(xp, param).reshape(1, -1)
    mean = float(values.square().mean().sqrt()) if values.numel() else 0.0

    def at(error: float) -> New | None:
        made = equal(xp, values, math.sqrt(12) * error * mean if mean else 1.0, 0)
        return None if made is None else New({(module, name): Tensor(F32, param.tensor.shape, made)})

    return Piece(values.numel(), at)


# -- DoRA --------------------------------------------------------------------------------------------------


def dora_units(a: Adapter, xp: Backend) -> list[Unit]:
    """A unit for each module: its factors, and its magnitudes. For where the base's weights are at hand."""
    units = []
    for part in _lora_resizing.parts(a):
        name = part.name

        def factors(error: float, part: _lora_resizing.Part = part) -> New | None:
            made = lora.module(xp, part, error)
            return None if made is None else New(made={part.name: made})

        pieces = [Piece(sum(t.numel for t in part.module.pair), factors)]
        pieces += [_vector(xp, name, n, part.module.params[n]) for n in _MAGNITUDES if n in part.module.params]
        units.append(Unit(frozenset({f"{name}.weight"}), tuple(pieces)))
    return units


_MAGNITUDES = ("magnitude", "magnitude.weight")


def dora_by_parameter(a: Adapter, xp: Backend, max_error: float) -> New:
    """Every parameter of DoRA within the error by itself: all that can be said without the base's weights."""
    tensors: dict[tuple[str, str], Tensor] = {}
    for part in _lora_resizing.parts(a):
        for name, param in part.module.params.items():
            old = param.tensor
            if name in _MAGNITUDES:
                new = lora.vector(xp, param, max_error).tensor
            elif name in _FACTORS:
                axis = int(name.endswith("B"))
                made = matrix(xp, _lines(xp, old, axis), max_error, axis)
                smaller_ = made is not None and classes([made]).nbytes + len(made.steps) < stored_now(old)
                new = Tensor(F32, old.shape, made) if made is not None and smaller_ else old
            else:
                continue
            if new is not old:
                tensors[part.name, name] = new
    return New(tensors)


def _lines(xp: Backend, tensor: Tensor, axis: int) -> Array:
    values = xp.f64(tensor).reshape(tensor.shape[0], -1)
    return values if axis == 0 else values.T


def vectors(a: Adapter, xp: Backend, max_error: float) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """`lora_bias` of the modules that have one, each within the error."""
    for name, new in lora.biases(a, xp, max_error):
        if new is not a.modules[name]["lora_bias"]:
            yield (name, "lora_bias"), new.tensor
