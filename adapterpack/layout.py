"""The weight files of a merged model, and its config and index where tied embeddings part."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from adapterpack import exactness, plan, vectormath
from adapterpack.adapter import EQUIVALENT_ERROR
from adapterpack.backend import Backend
from adapterpack.base import CONFIG, INDEX, Base
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.io import atomic, safetensors
from adapterpack.io import json as strict_json
from adapterpack.tensor import Tensor


@dataclass(frozen=True)
class Segment:
    """One tensor of a shard that is to be written.

    Attributes:
        name: On disk.
        tensor: As the base has it.
        steps: Its changes; none: its bytes are copied.
        at: Where it begins in the new file.
        origin: Where the values are read from that it stands for; None: from the tensor.
        encoding: What it becomes a part of, if it is written in the base's own quantised form.
    """

    name: str
    tensor: Tensor
    steps: tuple[plan.Step, ...]
    at: int
    origin: Tensor | None = None
    encoding: Encoding | None = None

    @property
    def touched(self) -> bool:
        return bool(self.steps) or self.encoding is not None


class Encoding:
    """A changed tensor that is quantised again: computed as a whole, then written as several stored tensors.

    Args:
        tensor: What the stored tensors stand for, in 16 bits.
        origin: The same in f32.
        steps: Its changes.
        encode: f32 values to stored name to array.
    """

    def __init__(
        self,
        tensor: Tensor,
        origin: Tensor,
        steps: tuple[plan.Step, ...],
        encode: Callable[[Any], Mapping[str, Any]],
    ) -> None:
        self.tensor, self.origin, self.steps, self._encode = tensor, origin, steps, encode
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def take(self, name: str, xp: Backend, once: bool) -> Any:
        """One stored tensor's bytes, flat uint8; the others wait until they are asked for."""
        import numpy as np

        with self._lock:
            if name not in self._made:
                loaded = plan.LoadedSteps.read(self.tensor, self.steps, xp, self.origin)
                values = np.empty(self.tensor.shape, np.float32)
                flat = values.reshape(plan.as_matrix(self.tensor.shape))
                for block in plan.blocks(self.tensor, self.steps, xp, once=once):
                    data = xp.buffer(loaded.values(loaded.base(block), block, once=once))
                    flat[block.rows] = data.view(np.float32).reshape(-1, flat.shape[1])
                if not np.isfinite(values).all():
                    raise not_finite(self.steps, self.tensor)
                self._made = {n: np.ascontiguousarray(a) for n, a in self._encode(values).items()}
            return self._made.pop(name).reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class Shard:
    """A file that is to be written: header, then segments without gaps.

    Attributes:
        name: Of the file.
        header: The 8 length bytes and the JSON.
    """

    name: str
    header: bytes
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(s.tensor.nbytes for s in self.segments)


def not_finite(steps: Sequence[plan.Step], tensor: Tensor) -> InvalidFile:
    """The error of a merge that gives what must not be written."""
    return InvalidFile(
        f"merging {steps[0].change.module} gives values that are NaN, infinite or too large for {tensor.dtype}",
        hint="adapterpack check names the broken tensors",
    )


@dataclass(frozen=True)
class Layout:
    """The files that hold the weights of the merged model.

    Attributes:
        shards: As they will be written.
        parted: Name of output embeddings that part from the input embeddings; None: nothing parts.
    """

    shards: tuple[Shard, ...]
    parted: str | None

    def touched(self) -> list[Segment]:
        return [s for shard in self.shards for s in shard.segments if s.touched]


_PROCESS = {False: 60 << 20, True: 258 << 20}
"""Bytes of an interpreter with numpy, and with torch."""
_PER_ELEMENT = 48
"""Bytes for each element of a block, at the worst: a handful of f64 and f32 copies while it is checked."""


def peak_memory(touched: Sequence[Segment], jobs: int, *, torch: bool, mixes: bool) -> int:
    """About how much memory a merge takes at its peak, in bytes.

    What can be cut takes some blocks for each worker, however large the model. A tensor that takes all of
    itself to compute (DoRA on Conv1D and embeddings) is held as a whole, 12 times as f32, one at a time.

    Args:
        mixes: Is a `Mixture` computed? Without torch it takes one of its libraries.
    """
    blocks, whole, factors = exactness.BLOCK * jobs, 0, 0
    for segment in touched:
        if segment.encoding is not None or any(s.change.whole(s.kind) for s in segment.steps):
            whole = max(whole, segment.tensor.numel)
        sizes = [(p.out + p.into) * p.rank for s in segment.steps for p in s.change.products(s.kind)]
        factors = max(factors, sum(sizes) * 12)
    process = _PROCESS[torch] + (vectormath.RESIDENT if mixes and not torch else 0)
    return process + (blocks + whole) * _PER_ELEMENT + factors * jobs


def make(base: Base, p: plan.Plan, parted: bool, *, requantise: bool = False) -> Layout:
    """The shards: header bytes are the base's where nothing is added and nothing dequantised.

    Args:
        parted: Do input and output embeddings differ now, if they were tied?
        requantise: Write a quantised base in its own form again?

    Raises:
        Unsupported: the base cannot be quantised again.
    """
    steps, head = dict(p.steps), None
    embedding = base.embedding
    if p.head is not None and embedding is not None:
        if parted:
            head = p.head.name
            steps[head] = p.head.steps
        elif p.head.name in base.tensors:
            steps[p.head.name] = steps.get(embedding, ())
    if base.scheme is not None and requantise:
        return _requantised(base, steps, head)
    shards = []
    for name, header in base.shards.items():
        tensors = base.plain_shard(name)
        raw = header.raw
        if head is not None and head not in base.tensors and embedding in tensors:
            # A head that had no tensor of its own begins as the embedding does, and lies beside it.
            tensors[head] = base.tensors[embedding]
        if tensors.keys() != header.tensors.keys() or base.scheme is not None:
            raw = safetensors.header_bytes(tensors.items(), header.metadata)
        at, segments = len(raw), []
        for key, tensor in tensors.items():
            origin = None
            if base.scheme is not None:
                origin = base.origin(key if key in base.tensors or embedding is None else embedding)
            segments.append(Segment(key, tensor, steps.get(key, ()), at, origin))
            at += tensor.nbytes
        shards.append(Shard(name, raw, tuple(segments)))
    return Layout(tuple(shards), head)


def _requantised(base: Base, steps: Mapping[str, tuple[plan.Step, ...]], head: str | None) -> Layout:
    """The shards of a base that is quantised again: every header as it was."""
    scheme = base.scheme
    assert scheme is not None
    if head is not None:
        raise Unsupported(
            f"{head} parts from {base.embedding}: that is not done in a quantised model",
            hint="leave out --requantize",
        )
    encodings: dict[str, Encoding] = {}
    for name in steps.keys() & scheme.consumed.keys():
        scheme.need_encoder(name)
        made = Encoding(base.tensors[name], base.origin(name), steps[name], partial(scheme.requantise, name))
        encodings |= dict.fromkeys(scheme.consumed[name], made)
    shards = []
    for name, header in base.shards.items():
        at, segments = len(header.raw), []
        for key, tensor in header.tensors.items():
            own = () if key in encodings else steps.get(key, ())
            segments.append(Segment(key, tensor, own, at, None, encodings.get(key)))
            at += tensor.nbytes
        shards.append(Shard(name, header.raw, tuple(segments)))
    return Layout(tuple(shards), None)


def parts(base: Base, p: plan.Plan, xp: Backend, *, once: bool) -> bool:
    """Do input and output embeddings that were tied really differ now?"""
    if p.head is None or base.embedding is None:
        return False
    source, origin = base.tensors[base.embedding], base.origin(base.embedding)
    sides = [plan.LoadedSteps.read(source, s, xp, origin) for s in (p.steps.get(base.embedding, ()), p.head.steps)]
    differ, apart, change = False, 0.0, 0.0
    for block in plan.blocks(source, [s for side in sides for _, s in side.steps], xp, once=once):
        w = sides[0].base(block)
        ours, theirs = (xp.buffer(side.changed(w, block, once=once)) for side in sides)
        if (ours == theirs).all():
            continue
        differ = True
        if not p.head.one:
            return True
        x, y = (side.exact(w, block) for side in sides)
        apart += float(((x - y) ** 2).sum())
        change += float(((x - xp.f64(w)) ** 2).sum())
    # Both were trained as one: what differs is the order of f32 sums, unless it is more than that.
    return differ and math.sqrt(apart) > EQUIVALENT_ERROR * math.sqrt(change)


def write_documents(base: Base, layout: Layout, stage: Path, *, requantise: bool = False) -> set[str]:
    """Write the config and the index, where they are not the base's any more; their names."""
    config = dict(base.config)
    if base.scheme is not None and not requantise:
        config = base.scheme.plain_config(config)
    if layout.parted is not None:
        config = _untied(config)
    written = set()
    if config != base.config:
        atomic.write(stage / CONFIG, strict_json.dump(config))
        written.add(CONFIG)
    homes = {s.name: shard.name for shard in layout.shards for s in shard.segments}
    if base.index is None or homes == base.index["weight_map"]:
        return written
    metadata = dict(base.index.get("metadata") or {})
    tensors = [s.tensor for shard in layout.shards for s in shard.segments]
    for field, more in (("total_size", "nbytes"), ("total_parameters", "numel")):
        if type(metadata.get(field)) is int:
            metadata[field] = sum(getattr(t, more) for t in tensors)
    index = {**base.index, "metadata": metadata, "weight_map": dict(sorted(homes.items()))}
    atomic.write(stage / INDEX, strict_json.dump(index))
    return {*written, INDEX}


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    untied = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        untied["text_config"] = {**text, "tie_word_embeddings": False}
    return untied
