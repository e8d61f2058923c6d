"""A full fine-tune as LoRA: the low-rank part of what it did to each matrix, measured; the rest on request."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterpack import containers, pairing, rest, sources, svd
from adapterpack.adapter import Progress
from adapterpack.backend import Backend, TorchBackend
from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.conversion import FactoredModule
from adapterpack.convert import named_dtype
from adapterpack.errors import InvalidFile, LossRefused, NothingChanged, Unsupported, UsageError
from adapterpack.limits import LORA_RANK
from adapterpack.methods import lora
from adapterpack.methods._keys import PREFIX
from adapterpack.methods._lora_modules import exactly
from adapterpack.pairing import Pair, Role
from adapterpack.tensor import DType, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array

_BLOCK = 1 << 22
"""Elements that are read and measured at a time."""
_EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class Extraction:
    """What `extract` made, or would make.

    Attributes:
        output: The new directory.
        modules: What became LoRA, worst first.
        max_rel_error: Of the worst module; None in a dry run.
        unchanged: Matrices of linear layers that both models share: they are left out.
        kept: Tensors that changed and are kept whole, in `modules_to_save` or `bias`.
        dropped: Tensors that changed and are not in the adapter.
        bytes_out: Of all files; 0 where a dry run cannot know it.
        notes: What the user should know.
    """

    output: str
    modules: tuple[FactoredModule, ...]
    max_rel_error: float | None
    unchanged: int
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    bytes_out: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _How:
    """What to keep; see `extract`."""

    rank: int | None
    energy: float | None
    max_rank: int | None
    dtype: DType
    embeddings: bool
    rest: str

    def check(self) -> None:
        """Raise UsageError for what makes no sense."""
        if (self.rank is None) == (self.energy is None):
            raise UsageError("either a rank or an energy is needed", hint="--rank 16, or --energy 0.9")
        for name, value in (("rank", self.rank), ("max rank", self.max_rank)):
            if value is not None and not 0 < value <= LORA_RANK:
                raise UsageError(f"{name} {value}: a whole number from 1 to {LORA_RANK} is wanted")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy {self.energy}: a fraction above 0, at most 1, is wanted")
        if self.max_rank is not None and self.energy is None:
            raise UsageError("--max-rank goes with --energy")
        if self.rest not in ("refuse", "keep", "drop"):
            raise UsageError(f"rest {self.rest!r:.40}: refuse, keep or drop")


def extract(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    dtype: str = "float32",
    embeddings: bool = False,
    rest: str = "refuse",
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Make a LoRA adapter of the difference of two models.

    Names and shapes are compared before anything is read, values before anything is computed. Then one matrix at a
    time: memory is 4 bytes for each element of the largest matrix whose SVD is sketched, or 40 of the largest whose
    SVD is exact (a side of at most 512, or a rank near the smaller side), some 200 MB of blocks, and the adapter.

    Args:
        base: The model that was tuned; it may be quantised in a way that `merge` reads.
        tuned: The model that became of it.
        output: The new PEFT directory. Its scale is 1 in every module.
        rank: Of every module, or the smaller side of its matrix.
        energy: Instead of `rank`: the least rank that keeps this fraction of the squared singular values.
        max_rank: With `energy`: no larger rank than this.
        dtype: Of the factors: `float32`, `bfloat16`, `float16`.
        embeddings: LoRA for embeddings and the head too, where they are not tied; else they are part of the rest.
        rest: What to do with changed tensors that are no matrices of linear layers: `refuse`, `keep` them whole in
            `modules_to_save` and `bias`, or `drop` them.
        device: Where the maths runs.
        dry_run: Compare only; nothing is computed or written.

    Raises:
        WrongBase: other tensors or shapes.
        LossRefused: changed tensors would be lost, and `rest` does not say that they may.
        NothingChanged: the models are the same.
        InvalidFile: a model is malformed, or has NaN or infinities.
        Unsupported: no linear layer changed, or what changed cannot be kept.
        DestinationExists, UsageError, WriteFailed: see `io.atomic`.
    """
    how = _How(rank, energy, max_rank, named_dtype(dtype), embeddings, rest)
    how.check()
    places = sources.base_here(base), sources.base_here(tuned)
    target = Path(output).expanduser()
    containers.check_target(target, overwrite=overwrite, sources=places)
    with ExitStack() as stack:
        models = tuple(stack.enter_context(Base(p)) for p in places)
        job = _Job.compare(models[0], models[1], sources.name_of(base), how, progress)
        if dry_run:
            return job.planned(target)
        modules, made = job.run(TorchBackend(device), progress)

        def still_same() -> None:
            for model in models:
                model.check_unchanged()

        checkpoint = Checkpoint(str(target), job.config(made), job.tensors(made), still_same=still_same)
        size = containers.write_checkpoint(checkpoint, target, overwrite=overwrite, sources=places)
        return job.result(target, modules, size)


@dataclass(frozen=True)
class _Factors:
    """What a module's change became."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class _Job:
    """Two models compared: what becomes of each tensor that differs."""

    reference: str
    tuned: Base
    pairs: Sequence[Pair]
    targets: Sequence[Pair]
    left: Sequence[Pair]
    kept: rest.Kept
    how: _How
    notes: tuple[str, ...]

    @classmethod
    def compare(cls, base: Base, tuned: Base, reference: str, how: _How, progress: Progress | None) -> _Job:
        pairs = pairing.pairs(base, tuned)
        changed = []
        for n, p in enumerate(pairs):
            if progress:
                progress("compare", n, len(pairs))
            if p.differs():
                changed.append(p)
        if not changed:
            raise NothingChanged(
                "the two models have the same values in all tensors", hint="is --tuned really the fine-tuned model?"
            )
        adapted = {Role.LINEAR}
        if how.embeddings and not tuned.tied:
            adapted |= {Role.EMBEDDING, Role.HEAD}
        targets = [p for p in changed if p.role in adapted]
        left = [p for p in changed if p.role not in adapted]
        if not targets:
            raise Unsupported(
                "no matrix of a linear layer differs: there is nothing to make LoRA of",
                hint=f"changed: {_shown(left)}",
            )
        if left and how.rest == "refuse":
            raise LossRefused(
                f"{len(left)} changed tensors are no matrices of linear layers and would be lost: {_shown(left)}",
                hint="--rest keep stores them whole (modules_to_save, bias); --rest drop leaves them out",
            )
        kept = rest.keep(pairs, targets, left, tuned) if how.rest == "keep" else rest.Kept()
        return cls(reference, tuned, pairs, targets, left, kept, how, _notes(base, tuned, pairs, how))

    def run(self, xp: Backend, progress: Progress | None) -> tuple[list[FactoredModule], dict[str, _Factors]]:
        """Factor one change after the other."""
        self.kept.check_finite()
        modules, made = [], {}
        for n, p in enumerate(self.targets):
            if progress:
                progress("extract", n, len(self.targets))
            factors, error = self._factor(xp, p)
            if not math.isfinite(error):
                raise InvalidFile(
                    f"{p.name}: its factors leave the range of {self.how.dtype}", hint="--dtype float32"
                )
            made[p.module] = factors
            modules.append(FactoredModule(p.module, factors.rank, error))
        if progress:
            progress("extract", len(self.targets), len(self.targets))
        return modules, made

    def _factor(self, xp: Backend, p: Pair) -> tuple[_Factors, float]:
        d = _difference(xp, p)
        how = self.how
        if how.rank is not None:
            b, a = svd.at_rank(xp, d, min(how.rank, *d.shape))
        else:
            b, a = svd.at_energy(xp, d, how.energy or 1.0, how.max_rank)
        b, a = (xp.round(x.contiguous().cpu(), how.dtype) for x in (b, a))
        return _Factors(xp.tensor(a), xp.tensor(b)), svd.lost(d, b, a)

    def result(self, target: Path, modules: Sequence[FactoredModule], size: int) -> Extraction:
        worst = sorted(modules, key=lambda m: (-(m.rel_error or 0.0), m.name))
        linear = sum(p.role is Role.LINEAR for p in self.pairs)
        errors = [m.rel_error for m in modules if m.rel_error is not None]
        keeps = self.how.rest == "keep"
        changed = tuple(p.name for p in self.left)
        notes = list(self.notes)
        held = self.how.max_rank
        if held is not None and (cut := [m for m in modules if m.rank == held and self._short(m)]):
            notes.append(f"{len(cut)} modules end at rank {held}, below the energy that was asked for")
        return Extraction(
            output=str(target),
            modules=tuple(worst),
            max_rel_error=max(errors) if errors else None,
            unchanged=linear - sum(p.role is Role.LINEAR for p in self.targets),
            kept=changed if keeps else (),
            dropped=() if keeps else changed,
            bytes_out=size,
            notes=tuple(notes),
        )

    def _short(self, m: FactoredModule) -> bool:
        return m.rel_error is not None and m.rel_error**2 > (1 - (self.how.energy or 1.0)) * (1 + 1e-3) + 1e-12

    def planned(self, target: Path) -> Extraction:
        """What is known without an SVD."""
        rank = self.how.rank
        modules = [FactoredModule(p.module, min(rank or 0, *p.base.shape), None) for p in self.targets]
        size = 0
        if rank is not None:
            made = {p.module: _unmade(p, m.rank, self.how.dtype) for p, m in zip(self.targets, modules, strict=True)}
            size = containers.size_of(Checkpoint(str(target), self.config(made), self.tensors(made)))
        return self.result(target, modules, size)

    # -- what is written -----------------------------------------------------------------------------------

    def tensors(self, made: Mapping[str, _Factors]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for p in self.targets:
            names = _EMBEDDING_FACTORS if p.role is Role.EMBEDDING else ("lora_A", "lora_B")
            factors = made[p.module]
            found |= {lora.keys.key(p.module, n): t for n, t in zip(names, (factors.a, factors.b), strict=True)}
        return found | {PREFIX + name: t for name, t in self.kept.tensors.items()}

    def config(self, made: Mapping[str, _Factors]) -> dict[str, Any]:
        """adapter_config.json: every module by its full path, so that no pattern can match another one."""
        ranks = Counter({m: f.rank for m, f in made.items()})
        most = max(ranks.values())
        patterns = {exactly(m): rank for m, rank in sorted(ranks.items()) if rank != most}
        return {
            "peft_type": lora.peft_type,
            "task_type": _task(self.tuned),
            "base_model_name_or_path": self.reference,
            "inference_mode": True,
            "r": most,
            "lora_alpha": most,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": sorted(made),
            "exclude_modules": self._like(made) or None,
            "modules_to_save": list(self.kept.modules) or None,
            "bias": "lora_only" if self.kept.biases else "none",
            "fan_in_fan_out": any(p.conv1d for p in self.targets),
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
        }

    def _like(self, made: Mapping[str, _Factors]) -> list[str]:
        """Modules that PEFT would take for targets too, as their paths end like one: they are excluded by name."""
        others = {p.module for p in self.pairs} - made.keys()
        split = ((m, m.split(".")) for m in others)
        return sorted(m for m, parts in split if any(".".join(parts[i:]) in made for i in range(1, len(parts))))


def _shown(pairs: Sequence[Pair]) -> str:
    names = [p.name for p in pairs]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _notes(base: Base, tuned: Base, pairs: Sequence[Pair], how: _How) -> tuple[str, ...]:
    notes = [*base.name_notes]
    for what, model in (("base", base), ("tuned model", tuned)):
        if model.scheme is not None:
            notes.append(f"the {what} is {model.scheme.name}: its rounding is part of the change")
    if base.dtype != tuned.dtype:
        notes.append(f"the base is {base.dtype}, the tuned model {tuned.dtype}: rounding may be part of the change")
    if how.embeddings and tuned.tied:
        notes.append("input and output embeddings are tied: no LoRA is made of them")
    if any(p.name not in tuned.tensors and p.role is not Role.HEAD for p in pairs):
        notes.append("modules are named as transformers 5 calls them in memory, not as on disk")
    return tuple(notes)


def _task(model: Base) -> str | None:
    said = model.config.get("architectures")
    name = str(said[0]) if isinstance(said, list) and said else ""
    return "CAUSAL_LM" if "ForCausalLM" in name or "LMHead" in name else None


def _unmade(p: Pair, rank: int, dtype: DType) -> _Factors:
    """Factors of the right size that nobody reads."""
    into, out = p.base.shape if _transposed(p) else p.base.shape[::-1]
    a, b = ((rank, into), (out, rank))
    return _Factors(*(Tensor(dtype, shape, _Unread(math.prod(shape) * dtype.bits // 8)) for shape in (a, b)))


@dataclass(frozen=True)
class _Unread:
    """Bytes that are counted only."""

    nbytes: int

    def read(self, start: int, stop: int) -> bytes:
        raise NotImplementedError


# -- arithmetic --------------------------------------------------------------------------------------------


def _transposed(p: Pair) -> bool:
    return p.conv1d or p.role is Role.EMBEDDING


def _difference(xp: Backend, p: Pair) -> Array:
    """Tuned minus base as (out, in), read in blocks: f64 where the SVD will be, else f32 (24 bits of every element).

    Raises:
        InvalidFile: it has NaN or infinities.
    """
    torch = xp.torch
    rows, width = p.base.shape
    wide = torch.float64 if min(rows, width) <= svd.EXACT and xp.device.type != "mps" else torch.float32
    d = torch.empty((rows, width), dtype=wide, device=xp.device)
    step = max(1, _BLOCK // max(width, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        new, old = (_rows(xp, t, start, stop).to(wide) for t in (p.tuned, p.base))
        d[start:stop] = new - old
        if not xp.finite(d[start:stop]):
            which = "tuned model" if not xp.finite(new) else "base"
            raise InvalidFile(f"{p.name} has NaN or infinite values in the {which}")
    return d.T if _transposed(p) else d


def _rows(xp: Backend, t: Tensor, start: int, stop: int) -> Array:
    size = t.shape[1] * t.dtype.bits // 8
    data = t.source.read(start * size, stop * size)
    return xp.array(data, t.dtype, (stop - start, t.shape[1]))
