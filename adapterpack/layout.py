"""The weight files of a merged model, and its config and index where tied embeddings part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterpack import plan
from adapterpack.adapter import EQUIVALENT_ERROR
from adapterpack.backend import Backend
from adapterpack.base import CONFIG, INDEX, Base
from adapterpack.io import atomic, safetensors
from adapterpack.io import json as strict_json
from adapterpack.shards import Segment, Shard


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
        return [s for shard in self.shards for s in shard.segments if s.steps]


def make(base: Base, p: plan.Plan, parted: bool) -> Layout:
    """The shards: header bytes are the base's where nothing is added.

    Args:
        parted: Do input and output embeddings differ now, if they were tied?
    """
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
    return Layout(tuple(shards), head)


def parts(base: Base, p: plan.Plan, xp: Backend, *, once: bool) -> bool:
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


def untie(base: Base, layout: Layout, stage: Path) -> set[str]:
    """Write the config, and the index where a tensor was added, of a model whose embeddings part."""
    _write(stage, CONFIG, strict_json.dump(_untied(base.config)))
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
    _write(stage, INDEX, strict_json.dump(index))
    return {CONFIG, INDEX}


def _write(stage: Path, name: str, data: bytes) -> None:
    with atomic.create(stage / name) as out:
        out.write(data)


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    untied = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        untied["text_config"] = {**text, "tie_word_embeddings": False}
    return untied
