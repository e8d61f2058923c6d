"""W' = change(W), shard by shard, into a new directory that is there whole or not at all."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterpack import base_files, containers, exactness, hub, merged_model, methods, plan
from adapterpack.adapter import EQUIVALENT_ERROR, Progress
from adapterpack.backend import Backend, NumpyBackend, TorchBackend
from adapterpack.base import CONFIG, INDEX, Base
from adapterpack.errors import AdapterpackError, NothingChanged, UsageError
from adapterpack.io import atomic, safetensors
from adapterpack.io import json as strict_json
from adapterpack.shards import Segment, Shard, write_shards


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
        p = plan.make(parsed, base, weights=weights)
        once = rounding == "once"
        carried, left = base_files.others(base)
        notes = [base.prefix_note] if base.prefix_note else []
        if dry_run:
            return _planned(target, p, base, sum(f.nbytes for f in carried.values()), left, notes)
        backend = _backend(p, device, once, stack)
        workers = jobs or _cores()
        changed: list[str] = []
        with atomic.staged_directory(target, overwrite=overwrite, protected=protected) as stage:
            layout = _layout(base, p, p.head is not None and _parts(base, p, backend.result(), once=once))
            write_shards(
                stage,
                layout.shards,
                backend,
                jobs=workers,
                once=once,
                finished=lambda _, names: changed.extend(names),
                progress=progress,
            )
            written = {s.name for s in layout.shards}
            if layout.parted is not None:
                written |= _untie(base, layout, stage)
                changed += [layout.parted] if layout.parted not in changed else []
                notes.append(
                    f"{base.embedding} and {layout.parted} were tied and differ now: both are written, and"
                    " tie_word_embeddings is false"
                )
            base_files.carry(carried, stage, skip=written)
            for _, adapter in parsed:
                adapter.source.still_same()
            base.check_unchanged()
            if not changed:
                raise NothingChanged(
                    "the merge would change nothing: every touched weight stays what it is",
                    hint="is B all zero, or the change too small for the base's dtype? see adapterpack check",
                )
            if verify != "off":
                _verify(p, base, stage, backend.result(), None if verify == "full" else _sample(changed))
            size = sum(f.stat().st_size for f in stage.rglob("*") if f.is_file())
        if backend.result().name == "torch cpu" and not p.torch:
            exactness.prove_numpy(backend.result(), p.products())
        touched = [s for shard in layout.shards for s in shard.segments if s.steps]
        quiet = len(touched) - len(changed)
        if quiet > 0:
            notes.append(f"{quiet} of {len(touched)} touched tensors stay what they are: their change is too small")
        total = sum(len(shard.segments) for shard in layout.shards)
        return _result(target, p, len(changed), total - len(changed), size, left, notes)


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _backend(p: plan.Plan, device: str, once: bool, stack: ExitStack) -> Future[Backend]:
    """numpy where it is known to give PEFT's bits; else torch, imported while other work goes on."""
    products = p.products()
    ready: Future[Backend] = Future()
    portable = not p.torch and (once or exactness.numpy_proven(products))
    if portable and device in ("auto", "cpu"):
        numpy = NumpyBackend()
        stack.enter_context(numpy.one_thread())
        ready.set_result(numpy)
        return ready

    def load() -> None:
        try:
            torch = TorchBackend("cpu" if device == "auto" else device)
            stack.enter_context(torch.one_thread())
            ready.set_result(torch)
        except BaseException as e:
            ready.set_exception(e)

    threading.Thread(target=load, daemon=True).start()
    return ready


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


@dataclass(frozen=True)
class _Layout:
    """The files that hold the weights of the merged model.

    Attributes:
        shards: As they will be written.
        parted: Name of output embeddings that part from the input embeddings; None: nothing parts.
    """

    shards: tuple[Shard, ...]
    parted: str | None


def _layout(base: Base, p: plan.Plan, parted: bool) -> _Layout:
    """The shards: header bytes are the base's where nothing is added."""
    steps, head = dict(p.steps), None
    embedding = base.embedding
    if p.head is not None and embedding is not None:
        if parted:
            head = p.head.name
            steps[head] = p.head.steps
        elif p.head.name in base.tensors:
            steps[p.head.name] = steps.get(embedding, ())
    shards = []
    for name, header in base.shards.items():
        tensors = dict(header.tensors)
        raw = header.raw
        if head is not None and head not in base.tensors and embedding in tensors:
            # A head that had no tensor of its own begins as the embedding does, and lies beside it.
            tensors[head] = base.tensors[embedding]
            raw = safetensors.header_bytes(tensors.items(), header.metadata)
        at, segments = len(raw), []
        for key, tensor in tensors.items():
            segments.append(Segment(key, tensor, steps.get(key, ()), at))
            at += tensor.nbytes
        shards.append(Shard(name, raw, tuple(segments)))
    return _Layout(tuple(shards), head)


def _parts(base: Base, p: plan.Plan, xp: Backend, *, once: bool) -> bool:
    """Do input and output embeddings that were tied really differ now?"""
    if p.head is None or base.embedding is None:
        return False
    source = base.tensors[base.embedding]
    sides = [plan.LoadedSteps.read(source, s, xp) for s in (p.steps.get(base.embedding, ()), p.head.steps)]
    differ, apart, change = False, 0.0, 0.0
    for block in plan.blocks(source, [s for side in sides for _, s in side.steps], xp, once=once):
        w = sides[0].base(block)
        ours, theirs = (xp.buffer(side.changed(w, block, once=once)) for side in sides)
        if (ours == theirs).all():
            continue
        differ = True
        if not p.head.one:
            return True
        x, y = (side.exact(w, block)[0] for side in sides)
        apart += float(((x - y) ** 2).sum())
        change += float(((x - xp.f64(w)) ** 2).sum())
    # Both were trained as one: what differs is the order of f32 sums, unless it is more than that.
    return differ and math.sqrt(apart) > EQUIVALENT_ERROR * math.sqrt(change)


def _untie(base: Base, layout: _Layout, stage: Path) -> set[str]:
    """Write the config, and the index where a tensor was added, of a model whose embeddings part."""
    _file(stage, CONFIG, strict_json.dump(_untied_config(base.config)))
    added = {s.name: (s.tensor, shard.name) for shard in layout.shards for s in shard.segments}
    added = {name: where for name, where in added.items() if name not in base.tensors}
    if base.index is None or not added:
        return {CONFIG}
    index = dict(base.index)
    homes = {name: shard for name, (_, shard) in added.items()}
    index["weight_map"] = dict(sorted({**index["weight_map"], **homes}.items()))
    metadata = dict(index.get("metadata") or {})
    for field, more in (("total_size", "nbytes"), ("total_parameters", "numel")):
        if type(metadata.get(field)) is int:
            metadata[field] += sum(getattr(t, more) for t, _ in added.values())
    index["metadata"] = metadata
    _file(stage, INDEX, strict_json.dump(index))
    return {CONFIG, INDEX}


def _file(stage: Path, name: str, data: bytes) -> None:
    with atomic.create(stage / name) as out:
        out.write(data)


def _untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    untied = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        untied["text_config"] = {**text, "tie_word_embeddings": False}
    return untied


_SAMPLES = 16


def _sample(changed: list[str]) -> dict[str, tuple[int, ...]]:
    """A few blocks over all changed tensors: a slip in offsets, order or scale shows in one of them."""
    names = sorted(changed)
    spread = [names[i * len(names) // _SAMPLES] for i in range(_SAMPLES)]
    chosen: dict[str, tuple[int, ...]] = {}
    for n, name in enumerate(spread):
        # Not always the same rows: first, last, and in between.
        chosen[name] = (*chosen.get(name, ()), n * 0x9E3779B1 % (1 << 32))
    return chosen


def _verify(p: plan.Plan, base: Base, stage: Path, xp: Backend, only: Mapping[str, tuple[int, ...]] | None) -> None:
    """Read merged tensors back and compare them with f64 arithmetic: another path than the one that made them."""
    with Base(stage) as merged:
        _, findings = merged_model.compare(p, base, merged, xp, max_error=0.0, only=only)
    if findings:
        f = findings[0]
        raise AdapterpackError(
            f"the merge did not verify: {f.key}: {f.message}", hint="nothing was written; please report this"
        )
