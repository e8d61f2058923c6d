"""W' = change(W), shard by shard, into a new directory that is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from adapterpack import base_files, containers, lineage, merged_model, methods, plan
from adapterpack import layout as layouts
from adapterpack.adapter import Adapter, Method, Progress
from adapterpack.arithmetic import Arithmetic, Disproved
from adapterpack.backend import Backend, TorchBackend
from adapterpack.base import CONFIG, Base
from adapterpack.containers import apack
from adapterpack.errors import AdapterpackError, NothingChanged, UsageError
from adapterpack.io import atomic, cores
from adapterpack.io.files import WholeFile
from adapterpack.io.resumable import Part, resumable_directory
from adapterpack.layout import Layout, Shard, peak_memory
from adapterpack.shards import write_shards
from adapterpack.sources import base_here, here
from adapterpack.tensor import digest as sha256
from adapterpack.version import __version__

_SAMPLES = 16
"""Blocks that are read back and computed again after a merge."""


@dataclass(frozen=True)
class Merge:
    """What `merge` did, or would do.

    Attributes:
        output: The new model directory.
        modules_merged: How many modules were changed.
        tensors_changed: Tensors whose bytes are others now.
        tensors_copied: Tensors that are the base's, byte for byte.
        bytes_written: Sum of all files.
        bytes_computed: Bytes of the tensors that adapters touch; the rest is copied.
        memory: Peak memory in bytes, about; a dry run's estimate is an upper bound.
        arithmetic: Where it is computed: `numpy`, `torch cpu`, `torch cuda:0`.
        touched: Names on disk of the tensors that adapters touch.
        unmatched: Always empty: modules that the base lacks are refused.
        reused: Shards that an interrupted run had finished.
        left: Files of the base that were not carried: weights in other forms.
        notes: What the user should know.
    """

    output: str
    modules_merged: int
    tensors_changed: int
    tensors_copied: int
    bytes_written: int
    bytes_computed: int
    memory: int
    arithmetic: str
    touched: tuple[str, ...]
    unmatched: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How to merge; see `merge`."""

    weights: tuple[float, ...]
    rounding: str
    verify: str
    device: str
    jobs: int
    digest: bool
    requantize: bool

    def check(self, adapters: int) -> None:
        """Raise UsageError for what makes no sense."""
        if len(self.weights) != adapters:
            raise UsageError(f"{len(self.weights)} weights for {adapters} adapters")
        if self.rounding not in ("peft", "once") or self.verify not in ("sample", "full", "off"):
            raise UsageError(
                f"rounding {self.rounding!r}, verify {self.verify!r}: peft or once, and sample, full or off"
            )
        if self.once and self.device == "mps":
            raise UsageError("--rounding once takes float64, which mps does not have", hint="--device cpu")
        if self.jobs < 1:
            raise UsageError(f"{self.jobs} jobs: at least one is needed")

    @property
    def once(self) -> bool:
        return self.rounding == "once"


def merge(
    adapters: str | Path | Sequence[str | Path],
    into: str | Path,
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    rounding: str = "peft",
    verify: str = "sample",
    device: str = "auto",
    jobs: int | None = None,
    digest: bool = False,
    requantize: bool = False,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Merge:
    """Merge adapters into the weights of a base model.

    A run that was killed or interrupted is taken up again by the same call: shards that were finished are
    kept, if adapters, options and base are still the same.

    Args:
        adapters: One or several; several are merged one after the other, in this order.
        into: The base model's directory. It is only read.
        output: The new model's directory: same shards, same index, same other files.
        weights: One factor for each adapter.
        rounding: `peft`: bit for bit what `merge_and_unload` gives on this machine; `once`: f64, one rounding.
        verify: `sample` reads at most 16 blocks of rows back and compares them on another path; `full` every
            tensor; `off` none.
        device: Where the maths runs; `auto` is the CPU, whose bits are PEFT's there.
        jobs: Workers; None: one for each core, four at most.
        requantize: Write an FP8 base as FP8 again, instead of as the 16-bit model that it stands for.
        digest: Put the SHA-256 of every file that was read or written into the lineage.
        dry_run: Plan only; nothing is written.

    Raises:
        WrongBase: the base lacks modules or has other shapes.
        LossRefused: parameters of an adapter would go unused.
        NothingChanged: every tensor would stay what it is.
        DestinationExists, UsageError, WriteFailed: see `io.atomic`.
    """
    sources = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    factors = tuple(weights) if weights is not None else (1.0,) * len(sources)
    options = Options(factors, rounding, verify, device, cores.usable() if jobs is None else jobs, digest, requantize)
    options.check(len(sources))
    target = Path(output).expanduser()
    if target.suffix == apack.SUFFIX:
        raise UsageError(f"{target}: a merged model is a directory, packs hold adapters", hint="name a directory")
    base_path, places = _fetched(into, sources, target, subfolder, overwrite)
    protected = (base_path, *places)
    with ExitStack() as stack:
        base = stack.enter_context(Base(base_path))
        parsed = []
        for place in places:
            checkpoint = containers.open_checkpoint(
                place, subfolder=subfolder, allow_pickle=allow_pickle, base=base_path
            )
            parsed.append(methods.parse(stack.enter_context(checkpoint)))
        if requantize and base.scheme is None:
            raise UsageError(f"--requantize: {base_path} is not quantised")
        p = plan.make(parsed, base, weights=factors)
        arithmetic = Arithmetic(p, device, once=options.once)
        job = _Job(base, parsed, p, options, arithmetic, str(into), tuple(map(str, sources)))
        if dry_run:
            return job.planned(target)
        backend = job.arithmetic.start(stack)
        # Digests of the adapters are at hand by the time when the first shard is done.
        aside = stack.enter_context(ThreadPoolExecutor(1))
        work = aside.submit(lambda: job.work)
        with resumable_directory(target, work.result, overwrite=overwrite, protected=protected) as part:
            try:
                result = job.run(part, backend, progress)
            except Disproved:
                part.clear()
                result = job.run(part, job.arithmetic.torch(stack), progress)
        return replace(result, output=str(target))


def _fetched(
    into: str | Path, sources: Sequence[str | Path], target: Path, subfolder: str | None, overwrite: bool
) -> tuple[Path, list[Path]]:
    """Where base and adapters lie on this machine; what is missing is fetched. The target is none of them."""
    # Checked before anything is fetched, which may take hours, and again once it is known where everything lies.
    containers.check_target(target, overwrite=overwrite, sources=())
    places = [here(source, subfolder) for source in sources]
    base_path = base_here(into)
    containers.check_target(target, overwrite=overwrite, sources=(base_path, *places))
    return base_path, places


@dataclass
class _Job:
    """One merge: what goes into it, and its steps."""

    base: Base
    adapters: Sequence[tuple[Method, Adapter]]
    plan: plan.Plan
    options: Options
    arithmetic: Arithmetic
    base_reference: str
    references: tuple[str, ...]

    # -- what it will be -----------------------------------------------------------------------------------

    def planned(self, target: Path) -> Merge:
        layout = layouts.make(self.base, self.plan, parted=False, requantise=self.options.requantize)
        carried, left = base_files.others(self.base, requantise=self.options.requantize)
        notes = self._base_notes()
        if self.plan.head is not None:
            more = f"{self.plan.head.name} may part from {self.base.embedding}, which takes that many bytes again"
            notes.append(more)
        size = sum(s.size for s in layout.shards) + sum(f.nbytes for f in carried.values())
        size += len(self._lineage(layout, {}))
        return self._result(
            target, layout, [s.name for s in layout.touched()], size, self.arithmetic.name, left, (), notes
        )

    def _base_notes(self) -> list[str]:
        """What differs from what one would take for granted of a base."""
        notes = list(self.base.name_notes)
        if len(self.references) > 1:
            notes.append(f"merged one after the other: {', '.join(self.references)}")
        scheme = self.base.scheme
        if scheme is not None:
            how = f"written in {scheme.dtype}, without its quantization_config"
            if self.options.requantize:
                how = "changed tensors are quantised again, all else stays as it is"
            notes.append(f"the base is {scheme.name}: {how}")
        return notes

    @cached_property
    def before(self) -> Any:
        """The lineage of the base, if it is a merged model itself. Raises InvalidFile if it is malformed."""
        lineage.read(self.base.path)
        return lineage.raw(self.base.path)

    @cached_property
    def sources(self) -> tuple[lineage.Source, ...]:
        """The adapters by digest."""
        named = zip(self.references, self.adapters, self.options.weights, strict=True)
        return tuple(lineage.Source.of(r, a.source, w) for r, (_, a), w in named)

    @cached_property
    def work(self) -> str:
        """Names this merge: what decides the bytes of its shards."""
        config = self.base.path / CONFIG
        facts = {
            "adapterpack": __version__,
            "libraries": [metadata.version(name) for name in ("torch", "numpy")],
            "adapters": [[s.sha256, s.config_sha256, s.weight] for s in self.sources],
            "rounding": self.options.rounding,
            "requantize": self.options.requantize,
            "device": self.arithmetic.device,
            "base": str(self.base.path.resolve()),
            "config": hashlib.sha256(config.read_bytes()).hexdigest() if config.exists() else None,
            "stamps": self.base.stamps(),
            "shards": lineage.of_headers(self.base.shards),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    # -- doing it ------------------------------------------------------------------------------------------

    def run(self, part: Part, backend: Future[Backend], progress: Progress | None) -> Merge:
        """Write everything into the part, and check it."""
        o = self.options
        may_part = self.plan.head is not None and layouts.parts(self.base, self.plan, backend.result(), once=o.once)
        _ = self.before
        layout = layouts.make(self.base, self.plan, may_part, requantise=o.requantize)
        carried, left = base_files.others(self.base, requantise=self.options.requantize)
        reused = _reusable(part, layout)
        self._check_space(part.path, layout, carried, reused)
        changed = [name for entry in reused.values() for name in entry["changed"]]

        def finished(shard: Shard, names: list[str]) -> None:
            self.arithmetic.believe()
            changed.extend(names)
            written = (part.path / shard.name).stat()
            facts = lineage.shard_facts(shard.header, shard.size)
            part.record({"shard": shard.name, **facts, "mtime_ns": written.st_mtime_ns, "changed": names})

        todo = [s for s in layout.shards if s.name not in reused]
        write_shards(part.path, todo, backend, jobs=o.jobs, once=o.once, finished=finished, progress=progress)
        written = {s.name for s in layout.shards}
        written |= layouts.write_documents(self.base, layout, part.path, requantise=o.requantize)
        base_files.carry(carried, part.path, skip=written)
        for _, adapter in self.adapters:
            adapter.source.still_same()
        self.base.check_unchanged()
        if not changed and layout.parted is None:
            raise NothingChanged(
                "the merge would change nothing: every touched weight stays what it is",
                hint="is B all zero, or the change too small for the base's dtype? see adapterpack check",
            )
        error = None if o.verify == "off" else self._verify(part.path, backend.result(), changed)
        # Digests come before the file that holds them is there to be digested.
        story = self._lineage(layout, self._digests(part.path, layout, carried))
        atomic.write(part.path / lineage.NAME, story)
        size = sum(f.stat().st_size for f in part.path.rglob("*") if f.is_file())
        notes = [*self._base_notes(), *self._told(layout, changed, reused)]
        if o.requantize and error is not None:
            notes.append(
                f"rounding to FP8 again costs {error:.1%} of the change (relative error of the tensors checked)"
            )
        return self._result(part.path, layout, changed, size, backend.result().name, left, tuple(reused), notes)

    def _check_space(
        self, stage: Path, layout: Layout, carried: Mapping[str, WholeFile], reused: Mapping[str, object]
    ) -> None:
        needed = sum(s.size for s in layout.shards if s.name not in reused) + sum(f.nbytes for f in carried.values())
        atomic.check_space(stage.parent.parent, needed, "the merged model")

    def _verify(self, stage: Path, xp: Backend, changed: Sequence[str]) -> float:
        """Read merged tensors back and compare them with f64 arithmetic: another path than the one that made them.

        Returns:
            The largest relative error of a tensor's change; the rounding of its dtype is a part of that.
        """
        # On the CPU, wherever the merge ran: not every device has f64, and it is another path.
        xp = xp if xp.name in ("numpy", "torch cpu") else TorchBackend("cpu")
        only = None if self.options.verify == "full" else _sample([n for n in changed if n in self.plan.targets()])
        with Base(stage) as merged:
            errors, findings = merged_model.compare(self.plan, self.base, merged, xp, max_error=0.0, only=only)
        if findings:
            f = findings[0]
            raise AdapterpackError(
                f"the merge did not verify: {f.key}: {f.message}", hint="nothing was written; please report this"
            )
        return max((e.rel_error for e in errors), default=0.0)

    # -- telling of it -------------------------------------------------------------------------------------

    def _lineage(self, layout: Layout, files: Mapping[str, Mapping[str, str]]) -> bytes:
        shards = {s.name: lineage.shard_facts(s.header, s.size) for s in layout.shards}
        base_shards = lineage.of_headers(self.base.shards)
        options: dict[str, Any] = {"rounding": self.options.rounding}
        if self.base.scheme is not None:
            options |= {"base_is": self.base.scheme.name, "requantize": self.options.requantize}
        if self.arithmetic.device != "cpu":
            options["device"] = self.arithmetic.device
        made = lineage.Lineage(
            self.base_reference, lineage.commit_of(self.base.path), self.sources, options, shards, base_shards
        )
        return lineage.render(made, files, self.before)

    def _digests(self, stage: Path, layout: Layout, carried: Mapping[str, WholeFile]) -> dict[str, dict[str, str]]:
        """SHA-256 of every file read and written; empty unless asked for."""
        if not self.options.digest:
            return {}
        names = sorted({*self.base.shards, *carried, *([CONFIG] if self.base.config else [])})
        written = sorted(f.relative_to(stage).as_posix() for f in stage.rglob("*") if f.is_file())
        places = {"read": (self.base.path, names), "written": (stage, written)}
        with ThreadPoolExecutor(self.options.jobs) as pool:
            return {
                kind: dict(zip(found, pool.map(_sha256, [at / name for name in found]), strict=True))
                for kind, (at, found) in places.items()
            }

    def _told(self, layout: Layout, changed: Sequence[str], reused: Mapping[str, object]) -> list[str]:
        notes = []
        if reused:
            notes.append(f"{len(reused)} of {len(layout.shards)} shards were finished by an earlier run and kept")
        touched = len(layout.touched())
        if touched > len(changed):
            quiet = touched - len(changed)
            notes.append(f"{quiet} of {touched} touched tensors stay what they are: their change is too small")
        if layout.parted is not None:
            notes.append(
                f"{self.base.embedding} and {layout.parted} were tied and differ now: both are written, and"
                " tie_word_embeddings is false"
            )
        return notes

    def _result(
        self,
        target: Path,
        layout: Layout,
        changed: Sequence[str],
        size: int,
        arithmetic: str,
        left: Sequence[str],
        reused: tuple[str, ...],
        notes: Sequence[str],
    ) -> Merge:
        touched = layout.touched()
        total = sum(len(shard.segments) for shard in layout.shards)
        return Merge(
            output=str(target),
            modules_merged=self.plan.modules,
            tensors_changed=len(changed),
            tensors_copied=total - len(changed),
            bytes_written=size,
            bytes_computed=sum(s.tensor.nbytes for s in touched),
            memory=peak_memory(touched, self.options.jobs, torch=arithmetic != "numpy", mixes=self.plan.mixes),
            arithmetic=arithmetic,
            touched=tuple(s.name for s in touched),
            reused=reused,
            left=tuple(left),
            notes=tuple(notes),
        )


def _reusable(part: Part, layout: Layout) -> dict[str, Mapping[str, Any]]:
    """Shards that an earlier run has finished and that are still what it wrote; all else is removed."""
    wanted = {s.name: s for s in layout.shards}
    found: dict[str, Mapping[str, Any]] = {}
    for entry in part.done:
        shard = wanted.get(str(entry.get("shard")))
        path = part.path / str(entry.get("shard"))
        if shard is None or not path.is_file():
            continue
        facts = {**lineage.shard_facts(shard.header, shard.size), "mtime_ns": path.stat().st_mtime_ns}
        if path.stat().st_size == shard.size and all(entry.get(k) == v for k, v in facts.items()):
            found[shard.name] = entry
    for path in part.path.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in found:
            path.unlink()
    return found


def _sha256(path: Path) -> str:
    return sha256(WholeFile(path, path.stat().st_size))


def _sample(changed: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """A few blocks over all changed tensors: a slip in offsets, order or scale shows in one of them."""
    names = sorted(changed)
    spread = [names[i * len(names) // _SAMPLES] for i in range(_SAMPLES if names else 0)]
    chosen: dict[str, tuple[int, ...]] = {}
    for n, name in enumerate(spread):
        # Not always the same rows: first, last, and in between.
        chosen[name] = (*chosen.get(name, ()), n * 0x9E3779B1 % (1 << 32))
    return chosen
