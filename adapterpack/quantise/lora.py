"""LoRA factors in few bits: in the basis of their singular vectors, at steps that water-filling finds, measured."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, LowRank, Param, Progress
from adapterpack.codecs.lines import LARGEST, Quantised, classes, nearest_steps, step_value, step_values
from adapterpack.methods import _lora_resizing, _lowrank
from adapterpack.methods._lora_resizing import Cut, Part
from adapterpack.quantise.waterfilling import Lines, Search, Steps, single_steps, steps_for
from adapterpack.tensor import F32, Tensor, numpy_dtype

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

_ROUNDS = 8
_CLOSE = 0.995
"""A squared error of this much of what is allowed is close enough: it is worth 0.004 bits a value."""
_SAFE = 1 - 1e-6
"""Others measure in another order of sums."""
_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
"""Layers that PEFT joins for a base whose experts are fused: their ranks must be the same then, and so with bare
parameters, whose ranks PEFT tells from `r` alone."""


@dataclass(frozen=True)
class Made:
    """New factors of a module, and what the quantiser expects of them.

    Attributes:
        cut: A and B, their sources `Quantised`.
        nbytes: About what they take in a pack.
    """

    cut: Cut
    nbytes: int


def modules(a: Adapter, xp: Backend, max_error: float, progress: Progress | None) -> dict[str, Made]:
    """New factors of every module that gets smaller, each change within `max_error`.

    Raises:
        InvalidFile: a factor has NaN or infinite values.
    """
    parts, made = list(_lora_resizing.parts(a)), {}
    for n, part in enumerate(parts):
        if progress:
            progress("quantise", n, len(parts))
        new = module(xp, part, max_error, keep_rank=bool(a.parameters) or _EXPERT.search(part.name) is not None)
        if new is not None and new.nbytes < sum(stored_now(t) for t in part.module.pair):
            made[part.name] = new
    if progress:
        progress("quantise", len(parts), len(parts))
    return made


def rewritten(a: Adapter, made: dict[str, Made]) -> Adapter:
    """The adapter with these factors; the config changes only where a rank does."""
    cuts = {name: m.cut for name, m in made.items()}
    new = _lora_resizing.rewritten(a, cuts)
    if all(part.name not in cuts or cuts[part.name].rank == part.rank for part in _lora_resizing.parts(a)):
        return replace(new, config=a.config)
    return new


# -- one module --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Factors:
    """Factors in one of the bases that a product has, as lines, f64.

    Attributes:
        b: (r, out), the columns of B.
        a: (r, in), the rows of A.
    """

    xp: Backend
    b: Array
    a: Array

    @property
    def lines(self) -> Lines:
        squares = [(x * x).sum(1).cpu().numpy() for x in (self.b, self.a)]
        return Lines((squares[0], squares[1]), (self.b.shape[1], self.a.shape[1]))


@dataclass(frozen=True)
class Codes:
    """Factors of a change, quantised.

    Attributes:
        b, a: Codes, int32, (k, out) and (k, in).
        steps: Step codes of both.
        squared: Squared error of the product, measured.
    """

    b: Array
    a: Array
    steps: tuple[tuple[int, ...], tuple[int, ...]]
    squared: float

    @property
    def sources(self) -> tuple[Quantised, Quantised]:
        """Of A and of B."""
        return Quantised(self.a, self.steps[1]), Quantised(self.b, self.steps[0], axis=1)

    def padded(self, rank: int) -> Codes:
        """The same with lines of zeros up to a rank."""
        import numpy as np

        more = rank - len(self.a)
        b, a = (np.pad(x, ((0, more), (0, 0))) for x in (self.b, self.a))
        return Codes(b, a, (self.steps[0] + (0,) * more, self.steps[1] + (0,) * more), self.squared)

    @property
    def nbytes(self) -> int:
        return classes(self.sources).nbytes + sum(map(len, self.steps))


def module(xp: Backend, part: Part, max_error: float, *, keep_rank: bool = False) -> Made | None:
    """The fewest bits that keep the change within `max_error`; None where its codes would be too large.

    Args:
        keep_rank: Lines that get no bits stay, as zeros.
    """
    best = codes_of(xp, part.low_rank(xp), part.name, max_error)
    if best is None:
        return None
    if keep_rank:
        best = best.padded(part.rank)
    shape_a, shape_b = _lora_resizing.shapes(part, len(best.a))
    source_a, source_b = best.sources
    return Made(Cut(Tensor(F32, shape_a, source_a), Tensor(F32, shape_b, source_b)), best.nbytes)


def codes_of(xp: Backend, low: LowRank, name: str, max_error: float) -> Codes | None:
    """Codes of the factors of one change, of its rank or a lower one; see `module`.

    Raises:
        InvalidFile: a factor has NaN or infinite values.
    """
    full = _lowrank.decomposed(xp, low, name)
    squared = float((full.values**2).sum())
    if squared == 0:
        # Of a change that is nothing nothing may be lost, and of its factors all.
        return _zeros(low)
    allowed = (min(max_error, 0.999) * _SAFE) ** 2 * squared
    root = full.values.sqrt()[:, None]
    bases = [_Factors(xp, root * full.left.T, root * full.right)]
    if low.a.shape[0] > 1:
        # Where columns are sparse their own basis may be the better one.
        bases.append(_Factors(xp, xp.f64(low.b).T, xp.f64(low.a)))
    trials = [_first_trial(f, allowed) for f in bases]
    costs = [math.inf if t is None else _cost(t, allowed) for t in trials]
    for cost, factors in sorted(zip(costs, bases, strict=True), key=lambda pair: pair[0]):
        best = _fitted(factors, allowed) if math.isfinite(cost) else None
        if best is not None:
            return best
    return None


def _first_trial(factors: _Factors, allowed: float) -> Codes | None:
    return _quantised(factors, steps_for(factors.lines, allowed))


def _cost(trial: Codes, allowed: float) -> float:
    """Bits at the allowed error, from those at another one near it: a bit a value halves the error."""
    values: int = trial.b.size + trial.a.size
    return 8 * trial.nbytes + values * math.log2(trial.squared / allowed + 1e-12) / 2


def _fitted(factors: _Factors, allowed: float) -> Codes | None:
    """The coarsest steps whose measured error is within the allowed one; None: none are."""
    lines, goal, best, seen = factors.lines, allowed, None, set()
    for _ in range(_ROUNDS):
        steps = steps_for(lines, goal)
        trial = _quantised(factors, steps)
        if trial is None:
            return best
        if trial.squared <= allowed and (best is None or trial.squared > best.squared):
            best = trial
        if _CLOSE * allowed <= trial.squared <= allowed or (best is not None and trial.steps in seen):
            break
        seen.add(trial.steps)
        # Expectation and measure differ by a factor that hardly changes with the steps.
        goal *= min(max(allowed * (1 + _CLOSE) / 2 / max(trial.squared, 1e-300), 0.1), 10.0)
    return best


def _quantised(factors: _Factors, steps: Steps) -> Codes | None:
    """Quantise A, then the B that is best for it (least squares); measure. None for codes that are too large."""
    torch, kept = factors.xp.torch, torch_index(factors.xp, steps)
    widths = [torch.as_tensor(step_values(c), device=factors.xp.device)[:, None] for c in steps.codes]
    offsets = [torch.as_tensor(o, device=factors.xp.device)[:, None] for o in steps.offsets]
    codes_a = rounded(torch, factors.a[kept], widths[1], offsets[1])
    some = codes_a.any(1)
    if not bool(some.all()):
        kept, codes_a = kept[some], codes_a[some]
        widths, offsets = [w[some] for w in widths], [o[some] for o in offsets]
    a = codes_a * widths[1]
    best_b = factors.b[kept]
    if len(kept):
        gram = a @ a.T
        solved, failed = torch.linalg.solve_ex(gram, (a @ factors.a.T) @ factors.b)
        if not int(failed) and bool(torch.isfinite(solved).all()):
            best_b = solved
    codes_b = rounded(torch, best_b, widths[0], offsets[0])
    if any(c.numel() and float(c.abs().max()) > LARGEST for c in (codes_a, codes_b)):
        return None
    if not len(kept):
        # PEFT knows no rank of 0.
        return None
    b = codes_b * widths[0]
    # B A - b a = what was cut + kept B (A - a) + (B - b) a: no difference of large numbers.
    lost_a = factors.a.clone()
    lost_a[kept] -= a
    left = torch.cat([factors.b, factors.b[kept] - b])
    right = torch.cat([lost_a, a])
    squared = float(((left @ left.T) * (right @ right.T)).sum())
    chosen = kept.cpu().numpy()
    place = {int(line): n for n, line in enumerate(steps.kept)}
    own = [tuple(int(c[place[int(line)]]) for line in chosen) for c in steps.codes]
    return Codes(_int32(codes_b), _int32(codes_a), (own[0], own[1]), max(squared, 0.0))


def torch_index(xp: Backend, steps: Steps) -> Array:
    """The kept lines as an index on the device."""
    return xp.torch.as_tensor(steps.kept, device=xp.device)


def rounded(torch: Array, values: Array, steps: Array, offsets: Array) -> Array:
    """Codes, whole numbers in f64: to nearest, but for `offsets` steps towards zero."""
    return torch.copysign(torch.floor(values.abs() / steps + (0.5 - offsets)), values) + 0.0


def _int32(codes: Array) -> Array:
    import numpy as np

    return np.ascontiguousarray(codes.cpu().numpy().astype(np.int32))


def _zeros(low: LowRank) -> Codes:
    import numpy as np

    b, a = (np.zeros((1, n), np.int32) for n in (low.b.shape[0], low.a.shape[1]))
    return Codes(b, a, ((0,), (0,)), 0.0)


# -- what stands in no product -----------------------------------------------------------------------------


def matrix(xp: Backend, values: Array, max_error: float, axis: int) -> Quantised | None:
    """Lines of one step, or of two neighbouring ones, whose relative error as a whole is near `max_error`, not above.

    Args:
        values: (lines, length), f64.
        axis: Of the tensor that they become.

    Returns:
        None where the codes would be too large.
    """
    total = float((values * values).sum())
    if total == 0 or not math.isfinite(total):
        return None if total else equal(xp, values, 1.0, axis)
    allowed = (min(max_error, 0.999) * _SAFE) ** 2 * total
    best_ratio = 0.0
    search, best = Search(math.sqrt(12 * allowed / values.numel())), None
    for _ in range(_ROUNDS):
        made = equal(xp, values, search.knob, axis)
        if made is None:
            return best
        kept = xp.torch.as_tensor(made.values(), device=xp.device).double()
        ratio = math.sqrt(float((values - (kept if axis == 0 else kept.T)).square().sum()) / allowed)
        if ratio <= 1 and (best is None or ratio > best_ratio):
            best, best_ratio = made, ratio
        if _CLOSE <= ratio <= 1:
            break
        search.tell(ratio)
    return best


def equal(xp: Backend, values: Array, step: float, axis: int) -> Quantised | None:
    """Lines whose squared steps are `step` squared in the mean: the first ones the next coarser one on the grid.

    Args:
        values: (lines, length), f64.
    """
    torch, lines = xp.torch, values.shape[0]
    codes = steps_near(step, lines)
    spread = values.square().mean(1).sqrt().cpu().numpy() if values.shape[1] else [1.0] * lines
    offsets = torch.as_tensor(single_steps(spread, step)[1], device=xp.device)[:, None]
    widths = torch.as_tensor(step_values(codes), device=xp.device)[:, None]
    q = rounded(torch, values, widths, offsets)
    if q.numel() and not float(q.abs().max()) <= LARGEST:
        return None
    return Quantised(_int32(q), tuple(codes), axis)


def steps_near(step: float, lines: int) -> list[int]:
    """Step codes of many lines whose squares are as `step` squared in the mean, the coarser ones first."""
    j = int(nearest_steps([step])[0])
    fine = j if step_value(j) <= step else j - 1
    low, high = step_value(fine) ** 2, step_value(fine + 1) ** 2
    coarse = int(min(max((step**2 - low) / (high - low), 0.0), 1.0) * lines)
    return [fine + 1] * coarse + [fine] * (lines - coarse)


def vector(xp: Backend, old: Param, max_error: float) -> Param:
    """A parameter, as one line, within a relative error; the same one where that gains nothing."""
    t = old.tensor
    made = matrix(xp, xp.f64(t).reshape(1, -1), max_error, 0) if t.numel else None
    if made is None or classes([made]).nbytes + 2 >= stored_now(t):
        return old
    return replace(old, tensor=Tensor(F32, t.shape, made))


def stored_now(tensor: Tensor) -> float:
    """About how many bytes a float tensor takes without loss: its exponents are predictable, the rest is noise."""
    import numpy as np

    if tensor.dtype.name not in ("F32", "BF16", "F16") or not tensor.numel:
        return tensor.nbytes
    values = np.frombuffer(tensor.bytes(), numpy_dtype(tensor.dtype)).astype(np.float32)
    if not values.view(np.uint32).any():
        return 0
    counts = np.bincount(values.view(np.uint32) >> 23 & 255)
    p = counts[counts > 0] / values.size
    mantissa = {"F32": 23, "BF16": 7, "F16": 10}[tensor.dtype.name]
    return float((-(p * np.log2(p)).sum() + 1 + mantissa) * values.size / 8)


def biases(a: Adapter, xp: Backend, max_error: float) -> Iterator[tuple[str, Param]]:
    """Module and new `lora_bias`, where there is one."""
    for name, params in a.modules.items():
        if "lora_bias" in params and name not in a.parameters:
            yield name, vector(xp, params["lora_bias"], max_error)
