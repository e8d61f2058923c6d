"""Lower the ranks of a LoRA adapter: optimal in every module, measured, without the dense change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from adapterpack import containers, methods, sources
from adapterpack.adapter import EQUIVALENT_ERROR, Adapter, Grade, Outcome, Progress
from adapterpack.backend import Backend, TorchBackend
from adapterpack.containers import size_of
from adapterpack.conversion import Conversion, inputs
from adapterpack.errors import Unsupported, UsageError
from adapterpack.measuring import Measured, publish, refuse_loss
from adapterpack.methods import _lora_resizing, _lowrank
from adapterpack.methods._keys import render
from adapterpack.methods._lora_resizing import Cut, Part
from adapterpack.tensor import F32, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array


@dataclass(frozen=True)
class ModuleRank:
    """What became of one module.

    Attributes:
        name: Its path in the base model.
        rank_before: Of the source; of all sources together when adapters were combined.
        rank: Of the result.
        rel_error: Of its change of W, Frobenius, measured; 0 where nothing was done.
    """

    name: str
    rank_before: int
    rank: int
    rel_error: float


@dataclass(frozen=True, kw_only=True)
class Resizing(Conversion):
    """What `resize` made, or would make; see `Conversion` for the rest.

    Attributes:
        total_rel_error: Of the changes of all modules taken together.
        modules: One entry for each.
    """

    total_rel_error: float
    modules: tuple[ModuleRank, ...]


def resize(
    source: str | Path,
    destination: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_bytes: int | None = None,
    one_level: bool = False,
    device: str = "cpu",
    subfolder: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Resizing:
    """Cut the ranks of a LoRA adapter. Exactly one of the four goals is given.

    Args:
        source: The adapter; only read.
        destination: The new directory.
        rank: A ceiling: modules of lower rank stay as they are. With `one_level`: the mean of all modules.
        energy: The fraction of the squared singular values to keep, in each module, or of all together.
        max_error: The largest relative Frobenius error, in each module, or of all together.
        max_bytes: Of all files of the result. One ceiling for all ranks, or one level.
        one_level: The singular values of all modules stand against one threshold, so that modules whose change
            is large keep more; else each module is treated alike.
        dry_run: Measure only; nothing is written.

    Raises:
        UsageError: not one goal, or one out of range.
        Unsupported: it is no plain LoRA, or cannot be made so small.
        See `convert` for the rest.
    """
    _check_goal(rank, energy, max_error, max_bytes)
    target = Path(destination).expanduser()
    source = sources.here(source, subfolder)
    protected = inputs(source)
    containers.check_target(target, overwrite=overwrite, sources=protected)
    with containers.open_checkpoint(source, subfolder=subfolder, allow_pickle=allow_pickle) as checkpoint:
        _, adapter = methods.parse(checkpoint)
        refuse_other_methods(adapter)
        xp = TorchBackend(device)
        work = _Work(adapter, list(_lora_resizing.parts(adapter)), xp, progress)
        if max_bytes is not None:
            new = work.cut(work.ranks_of_bytes(max_bytes, one_level))
        elif max_error is not None:
            new = work.within(max_error, one_level)
        elif energy is not None:
            new = work.cut(work.ranks_of_energy(energy, one_level))
        else:
            new = work.cut(work.ranks_of_rank(rank or 1, one_level))
        outcome = Outcome(adapter, Grade.LOSSLESS, notes=("no rank is lowered: the result is a copy",))
        if new:
            lowered = _lora_resizing.rewritten(adapter, new)
            outcome = Outcome(lowered, Grade.APPROXIMATE, ("small singular values",), _notes(work.parts, new))
        losses = _losses(work.parts, outcome.adapter, xp, progress)
        errors = {name: _lora_resizing.relative(loss) for name, loss in losses.items()}
        found, total = max(errors.values()), _total(losses.values())
        if max_error is not None:
            refuse_loss(Measured(outcome.grade, total if one_level else found), max_error)
        if max_bytes is not None and size_of(render(outcome.adapter)) > max_bytes:
            raise Unsupported(f"the result would not fit in {max_bytes:,} bytes: values leave the range of 16 bits")
        measured = Measured(_grade(outcome, found), found)
        done = publish(checkpoint, outcome, measured, target, protected, overwrite=overwrite, dry_run=dry_run)
        ranks = {p.name: new[p.name].rank if p.name in new else p.rank for p in work.parts}
        modules = tuple(ModuleRank(p.name, p.rank, ranks[p.name], errors[p.name]) for p in work.parts)
        return Resizing(**vars(done), total_rel_error=total, modules=modules)


def _check_goal(rank: int | None, energy: float | None, max_error: float | None, max_bytes: int | None) -> None:
    if sum(goal is not None for goal in (rank, energy, max_error, max_bytes)) != 1:
        raise UsageError("one goal is wanted", hint="--rank R, --energy E, --max-error E or --max-bytes N")
    if rank is not None and rank < 1:
        raise UsageError("--rank must be 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError("--energy is a fraction: more than 0, 1 at most")
    if max_error is not None and not 0 <= max_error < math.inf:
        raise UsageError("--max-error must be a number of 0 or more")


Loss = tuple[float, float]
"""Frobenius norms of the error of a module's change and of the change itself."""


def _losses(before: Sequence[Part], after: Adapter, xp: Backend, progress: Progress | None) -> dict[str, Loss]:
    """Measured on what is written: its factors, and the scale as stated."""
    losses = {}
    for n, (old, new) in enumerate(zip(before, _lora_resizing.parts(after), strict=True)):
        if progress:
            progress("compare", n, len(before))
        losses[old.name] = _lora_resizing.loss(xp, old.low_rank(xp), new.low_rank(xp))
    if progress:
        progress("compare", len(before), len(before))
    return losses


def _total(losses: Iterable[Loss]) -> float:
    """Relative error of all changes together."""
    lost, norms = zip(*losses, strict=True)
    return _lora_resizing.relative((math.hypot(*lost), math.hypot(*norms)))


def _notes(parts: Sequence[Part], new: Mapping[str, Cut]) -> tuple[str, ...]:
    narrow = {str(d) for p in parts if p.name in new for d in _lora_resizing.own_dtypes(p) if d != F32}
    if not narrow:
        return ()
    return (
        f"new factors are rounded to {', '.join(sorted(narrow))}, as the old ones were; the error counts that in",
    )


def _grade(outcome: Outcome, error: float) -> Grade:
    if outcome.grade is Grade.LOSSLESS:
        return Grade.LOSSLESS
    return Grade.EQUIVALENT if error <= EQUIVALENT_ERROR else Grade.APPROXIMATE


def _last(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number in [low, high] that fits, where all below one that fits do; `low` does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class _Unread:
    """Bytes of which only the number is known yet."""

    nbytes: int

    def read(self, start: int, stop: int) -> bytes:
        raise NotImplementedError


def refuse_other_methods(a: Adapter) -> None:
    """Raise Unsupported for what is no plain LoRA, with what to do first."""
    if a.method != "lora":
        raise Unsupported(
            f"{a.source.name} is {a.method}, and no plain LoRA",
            hint="make it plain LoRA first, exactly: adapterpack convert SRC DST --to lora",
        )
    reason = _lora_resizing.obstacle(a)
    if reason is not None:
        raise Unsupported(f"{a.source.name}: {reason}")


@dataclass(frozen=True)
class _Work:
    """The modules of an adapter, and the singular values of their changes where a goal asks for them."""

    adapter: Adapter
    parts: Sequence[Part]
    xp: Backend
    progress: Progress | None

    @cached_property
    def spectra(self) -> list[Array]:
        """f64, descending, on the CPU; of each module."""
        pairs = ((p, p.low_rank(self.xp)) for p in self._watched("decompose"))
        return [_lowrank.singular_values(self.xp, f, p.name).cpu() for p, f in pairs]

    def ranks_of_rank(self, rank: int, one_level: bool) -> list[int]:
        if not one_level:
            return [p.rank if rank >= p.rank else min(rank, p.most) for p in self.parts]
        total = rank * len(self.parts)
        return self._at(_last(0, self._most, lambda n: sum(self._at(n)) <= total))

    def ranks_of_energy(self, energy: float, one_level: bool) -> list[int]:
        if one_level:
            return self._at(_lowrank.least_rank(self._level[0], 1 - energy))
        return [_lowrank.least_rank(values, 1 - energy) for values in self.spectra]

    def ranks_of_bytes(self, most: int, one_level: bool) -> list[int]:
        """The largest ceiling, or the lowest level, whose result has no more bytes than that.

        Raises:
            Unsupported: rank 1 everywhere takes more.
        """
        full = [p.rank for p in self.parts]
        if self._size(full) <= most:
            return full
        least = self._size([1] * len(full))
        if least > most:
            raise Unsupported(
                f"{most:,} bytes are too few: rank 1 in every module takes {least:,}",
                hint="16 bits take half of float32: adapterpack convert SRC DST --dtype bfloat16 --max-error E",
            )
        if one_level:
            return self._at(_last(0, self._most, lambda n: self._size(self._at(n)) <= most))
        ceiling = _last(1, max(full), lambda r: self._size(self.ranks_of_rank(r, False)) <= most)
        return self.ranks_of_rank(ceiling, False)

    def within(self, max_error: float, one_level: bool) -> dict[str, Cut]:
        """New factors whose error, rounding counted in, is no more than that."""
        if not one_level:
            found = {p.name: _lora_resizing.within(self.xp, p, max_error) for p in self._watched("cut")}
            return {name: new for name, new in found.items() if new is not None}

        def fits(n: int) -> bool:
            new = self.cut(self._at(n))
            lost = [_lora_resizing.loss_of(self.xp, p, new[p.name]) for p in self.parts if p.name in new]
            norms = math.hypot(*(float(values.norm()) for values in self.spectra))
            return _lora_resizing.relative((math.hypot(*(x for x, _ in lost)), norms)) <= max_error

        least = _lowrank.least_rank(self._level[0], max_error**2)
        n = _lora_resizing.first(least, self._most, fits)
        return {} if n is None else self.cut(self._at(n))

    def cut(self, ranks: Sequence[int]) -> dict[str, Cut]:
        """New factors of every module whose rank is lowered. The others stay as they are, bit for bit."""
        lowered = {p.name: rank for p, rank in zip(self.parts, ranks, strict=True) if rank < p.rank}
        return {
            p.name: _lora_resizing.cut(self.xp, p, lowered[p.name]) for p in self._watched("cut") if p.name in lowered
        }

    def _watched(self, what: str) -> Iterator[Part]:
        for n, part in enumerate(self.parts):
            if self.progress:
                self.progress(what, n, len(self.parts))
            yield part
        if self.progress:
            self.progress(what, len(self.parts), len(self.parts))

    @property
    def _most(self) -> int:
        return sum(p.most for p in self.parts)

    @cached_property
    def _level(self) -> tuple[Array, Array]:
        """The singular values of all modules, descending, and whose each one is."""
        torch = self.xp.torch
        values, order = torch.sort(torch.cat(list(self.spectra)), descending=True, stable=True)
        counts = torch.tensor([p.most for p in self.parts])
        return values, torch.repeat_interleave(torch.arange(len(self.spectra)), counts)[order]

    def _at(self, n: int) -> list[int]:
        """The ranks when the n largest of all singular values are kept; PEFT knows no rank of 0."""
        kept = self.xp.torch.bincount(self._level[1][:n], minlength=len(self.parts))
        return [max(1, int(k)) for k in kept]

    def _size(self, ranks: Sequence[int]) -> int:
        """The bytes of all files of the result, from shapes alone."""
        new = {}
        for part, rank in zip(self.parts, ranks, strict=True):
            if rank < part.rank:
                dtypes, shapes = _lora_resizing.own_dtypes(part), _lora_resizing.shapes(part, rank)
                pairs = zip(dtypes, shapes, strict=True)
                new[part.name] = Cut(*(Tensor(d, s, _Unread(math.prod(s) * d.bits // 8)) for d, s in pairs))
        return size_of(render(_lora_resizing.rewritten(self.adapter, new) if new else self.adapter))
