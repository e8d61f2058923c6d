"""Is a merged model what an adapter makes of a base, within the rounding of its dtype and nothing more?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapterpack import exactness, plan
from adapterpack.adapter import Block, Finding, ModuleError, Progress
from adapterpack.backend import Array, Backend
from adapterpack.base import Base
from adapterpack.tensor import DType, Tensor

_UNIT = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Half a unit in the last place, relative."""
_TINY = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
"""The smallest subnormal."""
_BIAS = 1e-3
"""Honest rounding is unbiased; the share of the delta that may be missing on average all the same."""


def compare(
    p: plan.Plan,
    base: Base,
    merged: Base,
    xp: Backend,
    *,
    max_error: float,
    only: Mapping[str, Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> tuple[list[ModuleError], list[Finding]]:
    """Hold every tensor of `merged` against what a plan makes of `base`.

    A changed tensor agrees if each element lies within rounding of the exact value and the differences
    from our own merge do not lean along the delta: so a lost scale cannot hide below the noise.

    Args:
        max_error: A tensor whose relative error is at most this agrees in any case.
        only: Names on disk to look at, and numbers that pick blocks of each; None for all of everything.

    Returns:
        Errors of the changed tensors, and findings.
    """
    base.need_weights()
    merged.need_weights()
    wanted = {name: (name, steps) for name, steps in p.steps.items()}
    if p.head is not None:
        assert base.embedding is not None
        wanted[p.head.name] = (base.embedding, p.head.steps)
    findings: list[Finding] = []
    errors: list[ModuleError] = []
    names = [n for n in dict.fromkeys([*base.tensors, *wanted, *merged.tensors]) if only is None or n in only]
    for n, name in enumerate(names):
        if progress:
            progress("compare", n, len(names))
        if name not in base.tensors and name not in wanted:
            if not (name == base.head and _is_tied_copy(merged, name)):
                findings.append(Finding("unexpected-tensor", name, "the base has no such tensor"))
            continue
        found = merged.tensors.get(name)
        if found is None:
            # A head that stayed equal may be left out of a tied model.
            if not (name == base.head and merged.tied):
                findings.append(Finding("missing-tensor", name, "the merged model lacks it"))
                continue
            found = merged.tensors[merged.embedding or name]
        if name in wanted:
            source, steps = wanted[name]
            before = plan.LoadedSteps.read(base.tensors[source], steps, xp, base.origin(source))
            rounding = _Rounding.of(before.tensor.dtype, found, base, merged, name)
            picks = None if only is None else only[name]
            error, finding = _changed(name, before, found, rounding, max_error, picks)
            errors += [error] if error else []
        else:
            finding = _untouched(name, base.tensors[name], found)
        findings += [finding] if finding else []
    if only is None and _parted_but_tied(merged) and not _parted_but_tied(base):
        findings.append(
            Finding(
                "tied-config",
                "tie_word_embeddings",
                f"{merged.head} and {merged.embedding} differ, but config.json ties them: a loader drops one",
            )
        )
    if progress:
        progress("compare", len(names), len(names))
    return errors, findings


def _parted_but_tied(model: Base) -> bool:
    """Does the config tie two tensors that differ?"""
    return model.says_tied and model.head in model.tensors and not _is_tied_copy(model, model.head)


def _is_tied_copy(merged: Base, head: str) -> bool:
    return merged.embedding is not None and merged.tensors[head].equals(merged.tensors[merged.embedding])


def _untouched(name: str, before: Tensor, after: Tensor) -> Finding | None:
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return Finding(
            "other-tensor", name, f"{after.dtype} {after.shape}, in the base {before.dtype} {before.shape}"
        )
    if not before.equals(after):
        return Finding("changed-outside", name, "it differs from the base, and the adapter does not change it")
    return None


@dataclass(frozen=True)
class _Rounding:
    """How coarse honest rounding may be.

    Attributes:
        unit: Half a unit in the last place, relative.
        tiny: Half the smallest step, absolute.
        base: Is W itself rounded on the way, from the values that a quantised base stands for?
        coarse: Is it FP8? W lies on the grid then, so that small changes are lost one-sidedly.
    """

    unit: float
    tiny: float
    base: bool
    coarse: bool

    @classmethod
    def of(cls, dtype: DType, tensor: Tensor, base: Base, merged: Base, name: str) -> _Rounding:
        quantised = base.scheme is not None and name in base.scheme.consumed
        if merged.scheme is None or name not in merged.scheme.consumed:
            return cls(_UNIT[dtype.name], _TINY[dtype.name], quantised, False)
        # 3 bits of mantissa; the smallest step is 2^-9 of a scale, and a scale at most twice amax / 448.
        rows, width = plan.as_matrix(tensor.shape)
        parts = (tensor.rows(*bounds).astype("float32") for bounds in exactness.cut(rows, width))
        amax = max((float(abs(part).max()) for part in parts), default=0.0)
        return cls(2.0**-4, amax * 2 / 448 * 2.0**-10, quantised, True)


def _changed(
    name: str,
    loaded: plan.LoadedSteps,
    after: Tensor,
    rounding: _Rounding,
    max_error: float,
    picks: Sequence[int] | None,
) -> tuple[ModuleError | None, Finding | None]:
    before, xp = loaded.tensor, loaded.xp
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return None, _untouched(name, before, after)
    theirs = plan.LoadedSteps.read(after, (), xp)
    sums = _Sums(xp, rounding)
    blocks = plan.blocks(before, [s for _, s in loaded.steps], xp)
    pieces = [part for block in blocks for part in plan.parts(block, before.shape)]
    for n in range(len(pieces)) if picks is None else sorted({n % len(pieces) for n in picks}):
        sums.add(loaded, pieces[n], theirs.base(pieces[n]))
    error = ModuleError(name, sums.max_abs, sums.rel_error)
    if sums.nonfinite:
        return error, Finding("nan", name, "the merged tensor has NaN or infinite values")
    if sums.rel_error <= max_error or not sums.wrong:
        return error, None
    return error, Finding("wrong-merge", name, sums.describe())


class _Sums:
    """Statistics of one tensor, gathered block by block in f64."""

    def __init__(self, xp: Backend, rounding: _Rounding) -> None:
        self._xp, self._rounding = xp, rounding
        self.max_abs = 0.0
        self.nonfinite = False
        self._outside = self._count = 0
        self._error2 = self._delta2 = 0.0
        self._theirs = self._ours = self._lean = self._lean2 = 0.0

    def add(self, loaded: plan.LoadedSteps, block: Block, theirs: Array) -> None:
        base = loaded.base(block)
        exact, rounded = loaded.exact(base, block)
        noise, ours = loaded.noise(base, block), loaded.changed(base, block)
        if self._rounding.base:
            rounded = rounded + abs(self._xp.f64(base))
        # A tensor that cannot be cut is summed up in parts all the same: each needs a dozen f64 copies.
        for first, last in exactness.cut(*plan.as_matrix(tuple(base.shape))):
            self._add(*(x[first:last] for x in (base, theirs, exact, rounded, noise, ours)))

    def _add(self, base: Array, theirs: Array, exact: Array, rounded: Array, noise: Array, ours: Array) -> None:
        f64 = self._xp.f64
        allowed = rounded * (self._rounding.unit * 1.01) + f64(noise) + self._rounding.tiny
        w, m, ours = f64(base), f64(theirs), f64(ours)
        delta, error = exact - w, abs(m - exact)
        self.nonfinite |= not self._xp.finite(m)
        self._outside += int((error > allowed).sum())
        self._count += math.prod(error.shape)
        self.max_abs = max(self.max_abs, float(error.max()))
        self._error2 += float((error * error).sum())
        self._delta2 += float((delta * delta).sum())
        self._theirs += float(((m - w) * delta).sum())
        self._ours += float(((ours - w) * delta).sum())
        lean = (m - ours) * delta
        self._lean += float(lean.sum())
        self._lean2 += float((lean * lean).sum())

    @property
    def rel_error(self) -> float:
        if self._error2 == 0:
            return 0.0
        return math.sqrt(self._error2 / self._delta2) if self._delta2 else math.inf

    @property
    def wrong(self) -> bool:
        if self._rounding.coarse:
            return self._outside > 0
        leaning = abs(self._lean) > 6 * math.sqrt(self._lean2) + _BIAS * self._delta2
        return self._outside > 0 or leaning

    def describe(self) -> str:
        text = f"{self._outside:,} of {self._count:,} values lie outside the rounding of the dtype"
        if self._ours > 0:
            factor = self._theirs / self._ours
            if abs(factor - 1) > 0.005:
                text += f"; it looks like the change was applied with the factor {factor:.3g}"
        return text
