"""Is a merged model what an adapter makes of a base, within the rounding of its dtype and nothing more?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from adapterpack import diagnosis, plan
from adapterpack.accuracy import ModuleError, ratio
from adapterpack.adapter import Finding, Progress
from adapterpack.backend import Backend
from adapterpack.base import Base
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
            job = _Changed(name, base.tensors[source], found, steps, xp, rslora)
            error, finding = job.compare(
                base, merged, source, max_error, None if only is None else only[name], p.steps
            )
            errors += [error] if error else []
            if finding and p.head is not None and name == p.head.name and _follows(merged, name):
                finding = diagnosis.follows(name, merged.embedding or "")
        else:
            finding = _untouched(name, base.tensors[name], found)
        findings += [finding] if finding else []
    if only is None:
        if _parted_but_tied(merged) and not _parted_but_tied(base):
            findings.append(
                Finding(
                    "tied-config",
                    "tie_word_embeddings",
                    f"{merged.head} and {merged.embedding} differ, but config.json ties them: a loader drops one",
                )
            )
        findings = [*diagnosis.in_common(findings, base, merged, wanted), *findings]
    if progress:
        progress("compare", len(names), len(names))
    return errors, findings


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


class _Changed:
    """One tensor that an adapter changes."""

    def __init__(
        self, name: str, before: Tensor, after: Tensor, steps: Sequence[plan.Step], xp: Backend, rslora: bool
    ) -> None:
        self._name, self._before, self._after = name, before, after
        self._steps, self._xp, self._rslora = steps, xp, rslora

    def compare(
        self,
        base: Base,
        merged: Base,
        source: str,
        max_error: float,
        picks: Sequence[int] | None,
        all_steps: Mapping[str, Sequence[plan.Step]],
    ) -> tuple[ModuleError | None, Finding | None]:
        """Its figures, and what is wrong with it.

        Args:
            source: Where its values come from: a head that was tied begins as the embeddings.
            picks: Numbers that pick blocks; None: all.
            all_steps: The changes of all tensors.
        """
        before, after, xp = self._before, self._after, self._xp
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            return None, _untouched(self._name, before, after)
        loaded = plan.LoadedSteps.read(before, self._steps, xp, base.origin(source))
        theirs = plan.LoadedSteps.read(after, (), xp)
        grid = Grid.of(before.dtype, after, base, merged, self._name)
        # Cut small in any case: the bits of our own merge need not be PEFT's here.
        found = plan.blocks(before, [s for _, s in loaded.steps], xp, once=True)
        pieces = [part for block in found for part in plan.parts(block, before.shape)]
        chosen = [pieces[n] for n in sorted({n % len(pieces) for n in picks})] if picks is not None else pieces
        tally = Tally(xp, grid)
        for block in chosen:
            tally.add(loaded, block, theirs.base(block))
        error = self._error(tally)
        if tally.nonfinite:
            return error, Finding("nan", self._name, "the merged tensor has NaN or infinite values")
        if tally.sums.rel_error <= max_error or not tally.wrong:
            return replace(error, arithmetic=tally.arithmetic), None
        if not tally.loose and tally.moved:
            coarser = Coarser(xp, grid)
            for block in chosen:
                coarser.add(loaded, block, theirs.base(block))
            if (kind := coarser.verdict(tally)) is not None:
                return replace(error, arithmetic=kind), None
        suspect = diagnosis.Suspect(self._name, tally, loaded, theirs, chosen, self._rslora)
        return error, suspect.finding(all_steps)

    def _error(self, tally: Tally) -> ModuleError:
        norm = math.sqrt(tally.sums.norm2)
        error = tally.sums.error(self._name, self._before.shape, dtype=self._before.dtype)
        return replace(
            error,
            rank_a=self._rank(),
            bound=ratio(math.sqrt(tally.allowed2), norm),
            floor=ratio(math.sqrt(tally.floor2), norm),
            factor=tally.factor,
        )

    def _rank(self) -> int | None:
        ranks = [step.change.products(step.kind) for step in self._steps]
        return max((p.rank for products in ranks for p in products), default=None)
