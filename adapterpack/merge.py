"""W' = change(W), shard by shard, into a new directory that is there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapterpack import containers, hub, merged_model, methods, plan
from adapterpack.adapter import Progress
from adapterpack.backend import Backend
from adapterpack.base import CONFIG, INDEX, Base
from adapterpack.errors import AdapterpackError, InvalidFile, NothingChanged, UsageError
from adapterpack.io import atomic, safetensors
from adapterpack.io import json as strict_json
from adapterpack.io.files import WholeFile
from adapterpack.tensor import Tensor, chunks

_OTHER_WEIGHTS = {
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".keras",
    ".msgpack",
    ".npz",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pb",
    ".pkl",
    ".pickle",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
    ".xml",
}
"""Weights in other forms would be those of the base: they are left out and named."""
_NEVER_CARRIED = {".git", ".cache", "__pycache__"}


@dataclass(frozen=True)
class Merge:
    """What `merge` did, or would do.

    Attributes:
        output: The new model directory.
        modules_merged: How many modules were changed.
        tensors_changed: Tensors whose bytes are others now.
        tensors_copied: Tensors that are the base's, byte for byte.
        bytes_written: Sum of all files.
        unmatched: Always empty: modules that the base lacks are refused.
        left: Files of the base that were not carried: weights in other forms.
        notes: What the user should know.
    """

    output: str
    modules_merged: int
    tensors_changed: int
    tensors_copied: int
    bytes_written: int
    unmatched: tuple[str, ...]
    left: tuple[str, ...]
    notes: tuple[str, ...]


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
    subfolder: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Merge:
    """Merge adapters into the weights of a base model.

    Args:
        adapters: One or several; several are merged one after the other, in this order.
        into: The base model's directory. It is only read.
        output: The new model's directory: same shards, same index, same other files.
        weights: One factor for each adapter.
        rounding: `peft`: bit for bit what `merge_and_unload` gives on this machine; `once`: f64, one rounding.
        verify: `sample` reads three merged tensors back and compares them on another path; `full` all of them;
            `off` none.
        device: Where the maths runs.
        jobs: CPU threads for it; None leaves it to torch.
        dry_run: Plan only; nothing is written.

    Raises:
        WrongBase: the base lacks modules or has other shapes.
        LossRefused: parameters of an adapter would go unused.
        NothingChanged: every tensor would stay what it is.
        DestinationExists, UsageError, WriteFailed: see `io.atomic`.
    """
    sources = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    if weights is not None and len(weights) != len(sources):
        raise UsageError(f"{len(weights)} weights for {len(sources)} adapters")
    if rounding not in ("peft", "once") or verify not in ("sample", "full", "off"):
        raise UsageError(f"rounding {rounding!r}, verify {verify!r}: peft or once, and sample, full or off")
    base_path, target = hub.resolve_base(str(into)), Path(output).expanduser()
    protected = (base_path, *(Path(s).expanduser() for s in sources))
    containers.check_target(target, overwrite=overwrite, sources=protected)
    with ExitStack() as stack:
        base = stack.enter_context(Base(base_path))
        parsed = []
        for source in sources:
            checkpoint = containers.open_checkpoint(source, subfolder=subfolder, allow_pickle=allow_pickle)
            parsed.append(methods.parse(stack.enter_context(checkpoint)))
        xp = Backend(device, jobs)
        p = plan.make(parsed, base, xp, weights=weights)
        job = _Job(base, p, xp, once=rounding == "once", progress=progress)
        carried, left = _other_files(base)
        notes = [base.prefix_note] if base.prefix_note else []
        if dry_run:
            return _planned(target, p, base, sum(f.nbytes for f in carried.values()), left, notes)
        with atomic.staged_directory(target, overwrite=overwrite, protected=protected) as stage:
            job.write(stage)
            _carry(carried, stage, skip=job.written)
            for _, adapter in parsed:
                adapter.source.still_same()
            base.check_unchanged()
            if not job.changed:
                raise NothingChanged(
                    "the merge would change nothing: every touched weight stays what it is",
                    hint="is B all zero, or the change too small for the base's dtype? see adapterpack check",
                )
            if verify != "off":
                _verify(p, base, stage, xp, None if verify == "full" else _sample(job.changed))
            size = sum(f.stat().st_size for f in stage.rglob("*") if f.is_file())
        notes += job.notes
        return _result(target, p, len(job.changed), job.total - len(job.changed), size, left, notes)


def _planned(target: Path, p: plan.Plan, base: Base, carried: int, left: list[str], notes: list[str]) -> Merge:
    size = carried + sum(len(h.raw) for h in base.shards.values()) + sum(t.nbytes for t in base.tensors.values())
    if p.head is not None:
        notes = [*notes, f"{p.head.name} may part from {base.embedding}, which takes that many bytes again"]
    touched = len(p.steps)
    return _result(target, p, touched, len(base.tensors) - touched, size, left, notes)


def _result(
    target: Path, p: plan.Plan, changed: int, copied: int, size: int, left: list[str], notes: list[str]
) -> Merge:
    return Merge(str(target), p.modules, changed, copied, size, (), tuple(left), tuple(notes))


class _Job:
    """One merge: writes the shards, the index and the config, and counts."""

    def __init__(self, base: Base, p: plan.Plan, xp: Backend, *, once: bool, progress: Progress | None) -> None:
        self._base, self._plan, self._xp, self._once = base, p, xp, once
        self._progress = progress
        self._done = 0
        self._bytes = sum(t.nbytes for t in base.tensors.values())
        self.changed: list[str] = []
        self.total = len(base.tensors)
        self.written: set[str] = set()
        self.notes: list[str] = []
        self._untied = False

    def write(self, stage: Path) -> None:
        parted, home = self._part(), self._home()
        idle = [n for n in self._plan.steps if n not in parted]
        for shard, header in self._base.shards.items():
            added = {n: t for n, t in parted.items() if n not in self._base.tensors and shard == home}
            raw = header.raw
            if added:
                raw = safetensors.header_bytes([*header.tensors.items(), *added.items()], header.metadata)
            with atomic.create(stage / shard) as out:
                out.write(raw)
                for name, tensor in header.tensors.items():
                    self._tensor(out, name, tensor, parted)
                for name, tensor in added.items():
                    self._copy(out, tensor)
                    self.changed.append(name)
            self.written.add(shard)
        quiet = len([n for n in idle if n not in self.changed])
        if quiet and self.changed:
            self.notes.append(f"{quiet} of {len(idle)} touched tensors stay what they are: their change is too small")
        if self._untied:
            self._untie(stage, parted)

    def _home(self) -> str | None:
        """The shard of the input embeddings, where an untied head goes too."""
        return next((s for s, h in self._base.shards.items() if self._base.embedding in h.tensors), None)

    def _part(self) -> dict[str, Tensor]:
        """Input and output embeddings that were tied and really differ now, computed ahead of the header."""
        if self._plan.head is None:
            return {}
        base, head = self._base, self._plan.head.name
        embedding = base.embedding
        assert embedding is not None
        source = base.tensors[embedding]
        ours_steps, head_steps = self._plan.steps.get(embedding, ()), self._plan.head.steps
        ours = self._computed(source, ours_steps)
        theirs = self._computed(source, head_steps)
        if self._plan.head.one:
            (exact, _), (other, _) = (plan.exact(source, s, self._xp) for s in (ours_steps, head_steps))
            if plan.rounding_apart(exact, other, self._xp.native(source)):
                theirs = ours
        if ours.equals(theirs):
            return {embedding: ours} | ({head: theirs} if head in base.tensors else {})
        self._untied = True
        self.total += head not in base.tensors
        self.notes.append(
            f"{embedding} and {head} were tied and differ now: both are written, and tie_word_embeddings is false"
        )
        return {embedding: ours, head: theirs}

    def _computed(self, tensor: Tensor, steps: tuple[plan.Step, ...]) -> Tensor:
        if not steps:
            return tensor
        return self._xp.tensor(plan.compute(tensor, steps, self._xp, once=self._once))

    def _tensor(self, out: BinaryIO, name: str, tensor: Tensor, parted: Mapping[str, Tensor]) -> None:
        steps = self._plan.steps.get(name, ())
        new = parted[name] if name in parted else self._computed(tensor, steps)
        if new is not tensor and not new.equals(tensor):
            self.changed.append(name)
        self._copy(out, new)

    def _copy(self, out: BinaryIO, tensor: Tensor) -> None:
        for chunk in chunks(tensor.source):
            out.write(chunk)
            self._done += len(chunk)
            if self._progress:
                self._progress("merge", min(self._done, self._bytes), self._bytes)

    def _untie(self, stage: Path, parted: Mapping[str, Tensor]) -> None:
        config = _untied_config(self._base.config)
        self._file(stage, CONFIG, strict_json.dump(config))
        home = self._home()
        added = {n: t for n, t in parted.items() if n not in self._base.tensors}
        if self._base.index is not None and added:
            index = dict(self._base.index)
            index["weight_map"] = dict(sorted({**index["weight_map"], **dict.fromkeys(added, home)}.items()))
            metadata = dict(index.get("metadata") or {})
            for field, more in (("total_size", "nbytes"), ("total_parameters", "numel")):
                if type(metadata.get(field)) is int:
                    metadata[field] += sum(getattr(t, more) for t in added.values())
            index["metadata"] = metadata
            self._file(stage, INDEX, strict_json.dump(index))

    def _file(self, stage: Path, name: str, data: bytes) -> None:
        with atomic.create(stage / name) as out:
            out.write(data)
        self.written.add(name)


def _untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    untied = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        untied["text_config"] = {**text, "tie_word_embeddings": False}
    return untied


def _other_files(base: Base) -> tuple[dict[str, WholeFile], list[str]]:
    """Every file that is carried, by path below the base, and the names of those that are not."""
    carried: dict[str, WholeFile] = {}
    left: list[str] = []
    for path in _walk(base.path, (base.path.resolve(),)):
        name = path.relative_to(base.path).as_posix()
        if name in base.shards:
            continue
        if not path.exists():
            raise InvalidFile(f"{path} is a link that leads nowhere", hint="remove it from the base")
        other_index = name.endswith(".index.json") and name != INDEX
        if path.suffix in _OTHER_WEIGHTS or other_index:
            left.append(name)
        else:
            if not path.is_file():
                raise InvalidFile(f"{path} is not a regular file")
            carried[name] = WholeFile(path, path.stat().st_size)
    return carried, left


def _walk(directory: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """All files below a directory; links are followed, but never round in a circle."""
    for entry in sorted(directory.iterdir()):
        if entry.name in _NEVER_CARRIED:
            continue
        if not entry.is_dir():
            yield entry
        elif entry.resolve() not in above:
            yield from _walk(entry, (*above, entry.resolve()))


def _carry(files: Mapping[str, WholeFile], stage: Path, *, skip: set[str]) -> None:
    for name, source in files.items():
        if name in skip:
            continue
        target = stage / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic.create(target) as out:
            for chunk in chunks(source):
                out.write(chunk)


def _sample(changed: list[str]) -> list[str]:
    """First, middle and last: cheap, and a slip in offsets or order shows in one of them."""
    return sorted({changed[0], changed[len(changed) // 2], changed[-1]})


def _verify(p: plan.Plan, base: Base, stage: Path, xp: Backend, only: list[str] | None) -> None:
    """Read merged tensors back and compare them with f64 arithmetic: another path than the one that made them."""
    with Base(stage) as merged:
        _, findings = merged_model.compare(p, base, merged, xp, max_error=0.0, only=only)
    if findings:
        f = findings[0]
        raise AdapterpackError(
            f"the merge did not verify: {f.key}: {f.message}", hint="nothing was written; please report this"
        )
