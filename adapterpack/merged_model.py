"""Is a merged model what an adapter makes of a base, within the rounding of its dtype and nothing more?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from adapterpack import diagnosis, plan
from adapterpack.accuracy import ModuleError, ratio
from adapterpack.adapter import Finding, Progress
from adapterpack.backend import Backend
from adapterpack.base import Base
from adapterpack.methods._changes import LoadedLowRank
from adapterpack.rounding import Coarser, Grid, Tally
from adapterpack.tensor import Tensor


def compare(
    p: plan.Plan,
    base: Base,
    merged: Base,
    xp: Backend,
    *,
    max_error: float,
    only: Mapping[str, Sequence[int]] | None = None,
    rslora: bool = False,
    progress: Progress | None = None,
) -> tuple[list[ModuleError], list[Finding]]:
    """Hold every tensor of `merged` against what a plan makes of `base`, one after the other, block by block.

    A changed tensor agrees if each element lies within rounding of the exact value and the differences
    from our own merge do not lean along the delta: so a lost scale cannot hide below the noise.

    Args:
        xp: A backend that has f64.
        max_error: A tensor whose relative error is at most this agrees in any case.
        only: Names on disk to look at, and numbers that pick blocks of each; None for all of everything.
        rslora: Does the adapter say `use_rslora`? For the words of a finding.

    Returns:
        Errors of the changed tensors, and findings: what many have in common first.
    """
    base.need_weights()
    merged.need_weights()
    job = _Job(p, base, merged, xp, max_error, only, rslora)
    wanted = job.wanted
    names = [n for n in dict.fromkeys([*base.tensors, *wanted, *merged.tensors]) if only is None or n in only]
    errors: list[ModuleError] = []
    findings: list[Finding] = []
    for n, name in enumerate(names):
        if progress:
            progress("compare", n, len(names))
        error, finding = job.tensor(name)
        errors += [error] if error else []
        findings += [finding] if finding else []
    if only is None:
        if _parted_but_tied(merged) and not _parted_but_tied(base):
            said = f"{merged.head} and {merged.embedding} differ, but config.json ties them: a loader drops one"
            findings.append(Finding("tied-config", "tie_word_embeddings", said, "set tie_word_embeddings to false"))
        findings = [*diagnosis.in_common(findings, base, merged, wanted), *findings]
    if progress:
        progress("compare", len(names), len(names))
    return errors, findings


@dataclass(frozen=True)
class _Job:
    """What `compare` was asked for."""

    made: plan.Plan
    base: Base
    merged: Base
    xp: Backend
    max_error: float
    only: Mapping[str, Sequence[int]] | None
    rslora: bool

    @cached_property
    def wanted(self) -> dict[str, tuple[str, Sequence[plan.Step]]]:
        """Name of each tensor that changes to that of the base tensor that it begins as, and its changes."""
        found: dict[str, tuple[str, Sequence[plan.Step]]] = {name: (name, s) for name, s in self.made.steps.items()}
        if self.made.head is not None:
            assert self.base.embedding is not None
            found[self.made.head.name] = (self.base.embedding, self.made.head.steps)
        return found

    def tensor(self, name: str) -> tuple[ModuleError | None, Finding | None]:
        """The figures of one tensor, if it was to change, and what is wrong with it."""
        base, merged = self.base, self.merged
        if name not in base.tensors and name not in self.wanted:
            if name == base.head and _is_tied_copy(merged, name):
                return None, None
            return None, Finding("unexpected-tensor", name, "the base has no such tensor")
        found = merged.tensors.get(name)
        if found is None:
            # A head that stayed equal may be left out of a tied model.
            if not (name == base.head and merged.tied):
                return None, Finding("missing-tensor", name, "the merged model lacks it")
            found = merged.tensors[merged.embedding or name]
        if name not in self.wanted:
            return None, _untouched(name, base.tensors[name], found)
        error, finding = self._changed(name, found)
        head = self.made.head
        if finding and head is not None and name == head.name and _follows(merged, name):
            finding = diagnosis.follows(name, merged.embedding or "")
        return error, finding

    def _changed(self, name: str, after: Tensor) -> tuple[ModuleError | None, Finding | None]:
        source, steps = self.wanted[name]
        before, xp = self.base.tensors[source], self.xp
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            return None, _untouched(name, before, after)
        loaded = plan.LoadedSteps.read(before, steps, xp, self.base.origin(source))
        theirs = plan.LoadedSteps.read(after, (), xp)
        grid = Grid.of(before.dtype, after, self.base, self.merged, name)
        # Cut small in any case: the bits of our own merge need not be PEFT's here.
        found = plan.blocks(before, [s for _, s in loaded.steps], xp, once=True)
        pieces = [part for block in found for part in plan.parts(block, before.shape)]
        if self.only is not None:
            pieces = [pieces[n] for n in sorted({n % len(pieces) for n in self.only[name]})]
        tally = Tally(xp, grid)
        for block in pieces:
            tally.add(loaded, block, theirs.base(block))
        error = _error(name, tally, loaded)
        if tally.nonfinite:
            return error, Finding("nan", name, "the merged tensor has NaN or infinite values")
        if tally.made_nonfinite:
            return error, Finding(
                "nan", name, "the adapter makes NaN or infinite values of it, the merged model has none"
            )
        if tally.sums.rel_error <= self.max_error or not tally.wrong:
            return replace(error, arithmetic=tally.arithmetic), None
        if not tally.loose and tally.moved:
            coarser = Coarser(xp, grid, all(isinstance(change, LoadedLowRank) for change, _ in loaded.steps))
            for block in pieces:
                coarser.add(loaded, block, theirs.base(block))
            if (kind := coarser.verdict(tally)) is not None:
                return replace(error, arithmetic=kind), None
        suspect = diagnosis.Suspect(name, tally, loaded, theirs, pieces, self.rslora)
        return error, suspect.finding(self.made.steps)


def _error(name: str, tally: Tally, loaded: plan.LoadedSteps) -> ModuleError:
    norm = math.sqrt(tally.sums.norm2)
    error = tally.sums.error(name, loaded.tensor.shape, dtype=loaded.tensor.dtype)
    ranks = [p.rank for _, step in loaded.steps for p in step.change.products(step.kind)]
    return replace(
        error,
        rank_a=max(ranks, default=None),
        bound=ratio(math.sqrt(tally.allowed2), norm),
        floor=ratio(math.sqrt(tally.floor2), norm),
        factor=tally.factor,
    )


def told(errors: Sequence[ModuleError]) -> list[str]:
    """How the merge was rounded, as far as its bits tell."""
    kinds = Counter(e.arithmetic for e in errors if e.arithmetic is not None)
    words = {
        "once": "rounded once, as PEFT does by default",
        "ours": "computed as PEFT does, rounding on the way",
        "twice": "rounded twice, as PEFT does with safe_merge=True",
        "low-precision": "computed in the dtype of the base throughout: many weights are a unit off",
    }
    return [f"{n} of {len(errors)} tensors were {words[kind]}" for kind, n in kinds.most_common()]


def _parted_but_tied(model: Base) -> bool:
    """Does the config tie two tensors that differ?"""
    return model.says_tied and model.head in model.tensors and not _is_tied_copy(model, model.head)


def _is_tied_copy(merged: Base, head: str) -> bool:
    return merged.embedding is not None and merged.tensors[head].equals(merged.tensors[merged.embedding])


def _follows(merged: Base, head: str) -> bool:
    return merged.embedding is not None and (head not in merged.tensors or _is_tied_copy(merged, head))


def _untouched(name: str, before: Tensor, after: Tensor) -> Finding | None:
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return Finding(
            "other-tensor", name, f"{after.dtype} {after.shape}, in the base {before.dtype} {before.shape}"
        )
    if not before.equals(after):
        return Finding(diagnosis.OUTSIDE, name, "it differs from the base, and the adapter does not change it")
    return None
