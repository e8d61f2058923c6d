"""What went wrong in a merged model, in plain words: each fault that can be told apart has a stable code.

A tensor that rounding does not explain is held against what people and tools do wrong: the scale lost, the sign, a
merge done twice or not at all, another module's change, the transpose. Least squares says how much of the change is
in it; a hypothesis counts only if it leaves nothing but rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterpack import plan
from adapterpack.adapter import Block, Finding, Kind, LowRank
from adapterpack.methods._changes import transposed
from adapterpack.methods._dora import DoraChange

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend
    from adapterpack.base import Base
    from adapterpack.rounding import Tally

NOT_MERGED = "not-merged"
OUTSIDE = "changed-outside"
_FITS = 1e-3
"""Of the squares of a hypothesis, what it may leave unexplained beside rounding."""
_CANDIDATES = 64
"""Other modules of one shape that a tensor is held against."""
_SAMPLE = 1 << 20
"""Weights that hypotheses are tried on."""
_MERGE_AGAIN = "merge again: adapterpack merge ADAPTER --into BASE --output DIR"


@dataclass(frozen=True)
class Known:
    """A factor that has a name.

    Attributes:
        factor: Of the change.
        code: Of the finding.
        words: What it looks like.
    """

    factor: float
    code: str
    words: str


def known_factors(scale: float | None, rank: int | None, rslora: bool) -> Iterator[Known]:
    """What a change is multiplied with by mistake.

    Args:
        scale: alpha/r, or alpha/sqrt(r) with rsLoRA; None: the change has no scale of its own.
    """
    yield Known(2.0, "merged-twice", "the adapter was merged twice")
    yield Known(3.0, "merged-twice", "the adapter was merged three times")
    yield Known(-1.0, "wrong-sign", "the change was subtracted, not added")
    if scale is not None and rank is not None and scale not in (0.0, 1.0):
        name, divisor = ("alpha/sqrt(r)", math.sqrt(rank)) if rslora else ("alpha/r", float(rank))
        yield Known(1 / scale, "wrong-scale", f"{name} was dropped")
        yield Known(scale, "wrong-scale", f"{name} was applied twice")
        yield Known(-1 / scale, "wrong-sign", f"{name} was dropped, and the change subtracted")
    if scale and rank is not None and rank > 1:
        divisor = math.sqrt(rank) if rslora else float(rank)
        alpha = scale * divisor
        yield Known(divisor, "wrong-scale", "alpha was not divided by r")
        if alpha != 1:
            yield Known(1 / alpha, "wrong-scale", "alpha was lost, and taken for 1")
        if rslora:
            yield Known(
                1 / math.sqrt(rank), "wrong-scale", "use_rslora was ignored: alpha/r in place of alpha/sqrt(r)"
            )
        else:
            yield Known(
                math.sqrt(rank), "wrong-scale", "it was scaled as by rsLoRA: alpha/sqrt(r) in place of alpha/r"
            )
        yield Known(1 / divisor, "wrong-scale", "it was divided by r once more")
    yield Known(0.5, "wrong-scale", "half of the change was merged, as an average with the base has it")


@dataclass(frozen=True)
class Suspect:
    """A tensor that rounding does not explain, and what it takes to find out why.

    Attributes:
        name: On disk.
        tally: Its statistics.
        loaded: Its changes.
        theirs: The tensor of the merged model, without changes.
        blocks: That were looked at.
        rslora: Does the adapter say `use_rslora`?
    """

    name: str
    tally: Tally
    loaded: plan.LoadedSteps
    theirs: plan.LoadedSteps
    blocks: Sequence[Block]
    rslora: bool

    def finding(self, others: Mapping[str, Sequence[plan.Step]]) -> Finding:
        """The fault, by its name if it has one.

        Args:
            others: The changes of all tensors, by name on disk.
        """
        t = self.tally
        if t.moved == 0:
            return Finding(NOT_MERGED, self.name, "it still is the base's: nothing was merged into it", _MERGE_AGAIN)
        by_factor = self._by_factor()
        if by_factor is not None:
            return by_factor
        for code, words in self._hypotheses(others):
            return Finding(code, self.name, f"{words}; {self._outside()}", _MERGE_AGAIN)
        return self._unexplained()

    def _outside(self) -> str:
        t = self.tally
        if not t.outside:
            return "each value lies within the rounding of the dtype, but all of them together lean along the change"
        text = f"{t.outside:,} of {t.count:,} values lie outside the rounding of the dtype"
        height = plan.as_matrix(self.loaded.tensor.shape)[0]
        if t.rows is not None and t.rows != (0, height - 1) and height > 1:
            first, last = t.rows
            text += f", all of them in row {first}" if first == last else f", all of them in rows {first} to {last}"
        return text

    def _explained(self, left: float, hypothesis2: float) -> bool:
        return left <= 4 * self.tally.floor2 + _FITS * hypothesis2

    def _by_factor(self) -> Finding | None:
        """Is it the change, so many times over?"""
        t = self.tally
        factor = t.factor
        if factor is None or not math.isfinite(factor):
            return None
        size2 = t.sums.norm2
        if not self._explained(t.left(factor), factor**2 * size2):
            return None
        # How well least squares knows the factor: the noise of rounding, over the change.
        spread = math.sqrt(t.floor2 / t.count / size2) if size2 else math.inf
        tolerance = 0.01 + 3 * spread
        if abs(factor - 1) <= tolerance or tolerance > 0.25:
            return None
        low = self._low_rank()
        named = known_factors(low.scale if low else None, low.a.shape[0] if low else None, self.rslora)
        near = [k for k in named if abs(factor - k.factor) <= tolerance * max(1.0, abs(k.factor))]
        text = f"it looks like the change was applied with the factor {factor:.3g}; {self._outside()}"
        if not near:
            code = "wrong-sign" if factor < -tolerance else "wrong-scale"
            return Finding(code, self.name, text, _MERGE_AGAIN)
        words = " or ".join(dict.fromkeys(k.words for k in near[:2]))
        return Finding(
            near[0].code, self.name, f"it looks like {words}: factor {factor:.3g}; {self._outside()}", _MERGE_AGAIN
        )

    def _low_rank(self) -> LowRank | None:
        return self.loaded.steps[0][0].low_rank() if len(self.loaded.steps) == 1 else None

    # -- hypotheses: what else could have been added? -------------------------------------------------------

    def _hypotheses(self, others: Mapping[str, Sequence[plan.Step]]) -> Iterator[tuple[str, str]]:
        """Those that explain what is there, the first of which is named."""
        if len(self.loaded.steps) != 1:
            return
        change, step = self.loaded.steps[0]
        shape = self.loaded.tensor.shape
        square = len(shape) == 2 and shape[0] == shape[1]
        low = change.low_rank()
        if low is not None and square and self._fits(_Product(LowRank(low.a.T, low.b.T, low.scale), step.kind)):
            yield "transposed-merge", "it holds the transpose of its change"
        if isinstance(step.change, DoraChange):
            plain = step.change.low_rank.load(self.loaded.xp).low_rank()
            if plain is not None and self._fits(_Product(plain, step.kind)):
                yield "magnitude-lost", "DoRA's magnitude was left out: it holds W + scale * B @ A"
        for name in _likely(self.name, others):
            other = others[name]
            if len(other) != 1 or other[0].change.shape != step.change.shape or other[0].kind is not step.kind:
                continue
            theirs = other[0].change.load(self.loaded.xp).low_rank()
            if theirs is not None and self._fits(_Product(theirs, step.kind)):
                yield "swapped-modules", f"it holds the change of {name}"
                return

    def _fits(self, product: _Product) -> bool:
        """Does what was added to a sample of rows look like this product, and nothing else?"""
        xp = self.loaded.xp
        taken = left = size = floor = 0.0
        for block in self.blocks:
            w, m = (xp.f64(side.base(block)) for side in (self.loaded, self.theirs))
            h = product.rows(xp, block.rows)
            left += float(((m - w - h) ** 2).sum())
            size += float((h * h).sum())
            taken += math.prod(w.shape)
            if taken >= _SAMPLE:
                break
        floor = self.tally.floor2 * taken / self.tally.count
        # Rounding alone would hide anything: then nothing is said.
        return size > 8 * floor and left <= 4 * floor + _FITS * size

    def _unexplained(self) -> Finding:
        t = self.tally
        rel = f"off by {t.sums.rel_error:.2g} of the change"
        few = t.outside and t.outside <= 0.01 * t.count
        if few:
            return Finding(
                "wrong-values",
                self.name,
                f"{self._outside()}: they were changed after the merge, or not merged",
                _MERGE_AGAIN,
            )
        text = f"{self._outside()}; {rel}"
        factor = t.factor
        if factor is not None and abs(factor - 1) > 0.005:
            text += f"; it looks like the change was applied with the factor {factor:.3g}, among other things"
        return Finding("wrong-merge", self.name, text, _MERGE_AGAIN)


@dataclass(frozen=True)
class _Product:
    """A hypothetical change, as the weight lies."""

    factors: LowRank
    kind: Kind

    def rows(self, xp: Backend, rows: slice) -> Array:
        b, a = xp.f64(self.factors.b), xp.f64(self.factors.a)
        if transposed(self.kind):
            return (b @ a[:, rows]).T * self.factors.scale
        return (b[rows] @ a) * self.factors.scale


def _likely(name: str, others: Mapping[str, object]) -> list[str]:
    """Other tensors, those of the same layer or of the same name first."""
    stem, leaf = name.rsplit(".", 2)[0], name.rsplit(".", 2)[-2:]

    def far(other: str) -> int:
        return int(not (other.startswith(stem) or other.rsplit(".", 2)[-2:] == leaf))

    return sorted((o for o in others if o != name), key=far)[:_CANDIDATES]


# -- what many tensors have in common ------------------------------------------------------------------------


def in_common(
    findings: Sequence[Finding], base: Base, merged: Base, wanted: Mapping[str, object]
) -> Iterator[Finding]:
    """What explains many findings at once: to be read first.

    Args:
        wanted: Names of the tensors that the adapter changes.
    """
    untouched = [n for n in base.tensors if n not in wanted and base.tensors[n].dtype.kind == "float"]
    foreign = {f.key for f in findings if f.code == OUTSIDE}
    if len(foreign) >= 2 and len(foreign) * 2 >= len(untouched):
        yield Finding(
            "wrong-base",
            str(base.path.name),
            f"{len(foreign)} of the {len(untouched)} tensors that the adapter does not touch differ from the base: it"
            " was merged into another base, or trained on after the merge",
            "name the base that it was merged into",
        )
    still = {f.key for f in findings if f.code == NOT_MERGED}
    if still and len(still) == len(wanted):
        yield Finding(
            "nothing-merged",
            str(merged.path.name),
            "every tensor still is the base's: no adapter is in it",
            _MERGE_AGAIN,
        )
        return
    stale = [s for s, header in merged.shards.items() if len(merged.shards) > 1 and still & header.tensors.keys()]
    for shard in stale:
        own = wanted.keys() & merged.shards[shard].tensors.keys()
        if own <= still:
            yield Finding(
                "stale-shard",
                shard,
                f"none of its {len(own)} tensors that the adapter changes was merged: it is a shard of the base",
                "write this shard again",
            )
    if len(still) >= 2:
        missing = ", ".join(itertools.islice(sorted(still), 3))
        yield Finding(
            "partial-merge",
            str(merged.path.name),
            f"{len(still)} of the {len(wanted)} tensors that the adapter changes were left as they were: {missing}"
            + (", ..." if len(still) > 3 else ""),
            _MERGE_AGAIN,
        )


def follows(head: str, embedding: str) -> Finding:
    """The output embeddings went along with the input embeddings, to which they were tied."""
    return Finding(
        "tied-head-drift",
        head,
        f"it equals {embedding} in the merged model, where only one of the two was adapted: the merge went into the"
        " tensor that both shared",
        "adapterpack merge writes both and sets tie_word_embeddings to false",
    )
