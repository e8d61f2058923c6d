"""What an adapter replaces beside its LoRA (modules, embeddings, token rows, biases): put aside, or made LoRA of.

A row with new values is a LoRA of rank 1: a unit vector and the difference to the base's row. So tensors in which few
rows changed become LoRA exactly (within the rounding of float32); those that equal the base's are not needed at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterpack import architectures
from adapterpack.adapter import Adapter, Param, Replaced
from adapterpack.base import Base
from adapterpack.engine_rules import is_copy, kind_of
from adapterpack.errors import Unsupported, WrongBase
from adapterpack.io import safetensors
from adapterpack.methods import lora
from adapterpack.onescale import OneScale, padded
from adapterpack.tensor import Memory, Source, Tensor, from_numpy

if TYPE_CHECKING:
    from adapterpack.tensor import Array

DIRECTORY = "extra"
_MOST_ROWS = 512
"""No engine takes a higher rank."""
_BLOCK_ROWS = 4096

Entries = Mapping[str, tuple[Replaced, ...]]
"""Base tensor to its new values."""


def take(a: Adapter, keeps: Callable[[str, Replaced], bool]) -> tuple[Adapter, Entries]:
    """The adapter with what is kept of `replaced`, and what was taken out."""
    kept: dict[str, tuple[Replaced, ...]] = {}
    taken: dict[str, tuple[Replaced, ...]] = {}
    for target, entries in a.replaced.items():
        for where, own in (
            (kept, tuple(e for e in entries if keeps(target, e))),
            (taken, tuple(e for e in entries if not keeps(target, e))),
        ):
            if own:
                where[target] = own
    if not taken:
        return a, taken
    said = a.config.get("modules_to_save")
    modules = [m for m in said if any(f".{m}." in f".{t}" for t in kept)] if isinstance(said, list) else []
    config = {**a.config, "modules_to_save": modules or None}
    if not any(e.rows is not None for own in kept.values() for e in own):
        config["trainable_token_indices"] = None
    if not any(t.endswith(".bias") for t in kept):
        config["bias"] = "none"
    return replace(a, replaced=kept, config=config, changed=True), taken


def without_copies(a: Adapter, base: Base | None) -> tuple[Adapter, list[str]]:
    """The adapter without saved embeddings that are the base's own, byte for byte, and their names."""
    if base is None or not base.tensors:
        return a, []
    base.bind(a.targets())
    copies = [t for t, e in a.replaced.items() if kind_of(t, e[0], a.config) == "embeddings" and is_copy(a, t, base)]
    if not copies:
        return a, []
    return replace(a, replaced={t: e for t, e in a.replaced.items() if t not in copies}, changed=True), copies


# -- beside ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Written:
    """A safetensors file that does not exist yet, as a source."""

    header: bytes
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(t.nbytes for t in self.tensors)

    def read(self, start: int, stop: int) -> bytes:
        parts, at = [], 0
        for source in (Memory(self.header), *(t.source for t in self.tensors)):
            first, last = max(start - at, 0), min(stop - at, source.nbytes)
            if first < last:
                parts.append(source.read(first, last))
            at += source.nbytes
        return b"".join(parts)


def files(taken: Entries) -> dict[str, Source]:
    """Two files: the new values under the base tensors' names, and which rows they are."""
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    for target, entries in taken.items():
        for e in entries:
            name = target if e.rows is None else f"{target}.rows"
            tensors[name] = e.param.tensor
            said[name] = {"target": target, "rows": None if e.rows is None else list(e.rows), "key": e.param.key}
    names = safetensors.order(tensors)
    header = safetensors.header_bytes(((n, tensors[n]) for n in names), {"format": "pt"})
    text = json.dumps({"schema": "adapterpack.extra/1", "tensors": said}, indent=2, sort_keys=True)
    return {
        f"{DIRECTORY}/model.safetensors": _Written(header, tuple(tensors[n] for n in names)),
        f"{DIRECTORY}/extra.json": Memory(f"{text}\n".encode()),
    }


# -- as LoRA -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folded:
    """An adapter whose replaced tensors became LoRA.

    Attributes:
        one: The adapter, at one scale and rank again.
        error: The largest relative error of a tensor's change.
        notes: What became what.
    """

    one: OneScale
    error: float
    notes: tuple[str, ...]


def fold(one: OneScale, taken: Entries, base: Base | None) -> Folded:
    """Say with LoRA what `taken` says.

    Raises:
        WrongBase: there is no base with weights to take the difference to.
        Unsupported: it cannot be said, with the reason.
    """
    if base is None or not base.tensors:
        raise WrongBase("to fold replaced tensors takes the base's weights", hint="--base BASE")
    base.bind([*(f"{m}.weight" for m in one.adapter.modules), *taken])
    pairs: dict[str, tuple[Array, Array]] = {}
    notes: list[str] = []
    worst = 0.0
    for target, entries in taken.items():
        rows, delta = _difference(target, entries, base)
        if not rows:
            notes.append(f"{target}: equal to the base's, left out")
            continue
        _check_foldable(target, base)
        share = (delta / one.scale).astype("float32")
        error = _relative(share.astype("float64") * one.scale, delta)
        worst = max(worst, error)
        pairs[target.removesuffix(".weight")] = _factors(target, rows, share, base.tensor(target).shape[0])
        notes.append(f"{target}: {len(rows)} changed rows became LoRA of rank {len(rows)}")
    return Folded(_with(one, pairs) if pairs else one, worst, tuple(notes))


def _difference(target: str, entries: tuple[Replaced, ...], base: Base) -> tuple[list[int], Array]:
    """The rows that really changed, and by how much, f64."""
    import numpy as np

    old = base.tensor(target)
    deltas: dict[int, Array] = {}
    for e in entries:
        new = e.param.tensor
        if new.shape[1:] != old.shape[1:] or (e.rows is None and new.shape != old.shape):
            raise Unsupported(f"{target} has shape {new.shape}, the base's {old.shape}: no LoRA resizes a tensor")
        for row, delta in _row_differences(e, old, target):
            deltas.pop(row, None)
            if delta.any():
                deltas[row] = delta
            if len(deltas) > _MOST_ROWS:
                raise Unsupported(
                    f"{target} differs from the base's in more than {_MOST_ROWS} rows: no served LoRA can say it",
                    hint="--extra split, or adapterpack merge it into the base",
                )
    rows = sorted(deltas)
    return rows, np.stack([deltas[r] for r in rows]) if rows else np.zeros((0, 0))


def _row_differences(e: Replaced, old: Tensor, target: str) -> Iterator[tuple[int, Array]]:
    """Row and difference, f64; of a whole tensor only the rows that differ."""
    import numpy as np

    new = e.param.tensor
    if e.rows is not None:
        for n, row in enumerate(e.rows):
            if row >= old.shape[0]:
                raise WrongBase(f"{target} has {old.shape[0]} rows in the base, the adapter replaces row {row}")
            yield row, _f64(new, n, n + 1)[0] - _f64(old, row, row + 1)[0]
        return
    total = new.numel // new.shape[-1]
    for start in range(0, total, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, total)
        difference = _f64(new, start, stop) - _f64(old, start, stop)
        for hit in np.flatnonzero(difference.any(axis=1)):
            yield start + int(hit), difference[hit]


def _f64(tensor: Tensor, start: int, stop: int) -> Array:
    return tensor.rows(start, stop).astype("float64")


def _check_foldable(target: str, base: Base) -> None:
    module = target.removesuffix(".weight")
    if not target.endswith(".weight") or len(base.tensor(target).shape) != 2:
        raise Unsupported(f"{target} is no matrix: LoRA has no place for it", hint="--extra split, or merge it")
    if base.conv1d(module):
        raise Unsupported(f"{module} is a Conv1D: its rows are inputs", hint="--extra split, or merge it")
    if base.tied and module.rpartition(".")[2] in (*architectures.EMBEDDING_NAMES, *architectures.HEAD_NAMES):
        raise Unsupported(
            f"the base ties its embeddings: new rows of {target} change inputs and outputs at once, LoRA only one",
            hint="--extra split, or adapterpack merge it into the base",
        )


def _factors(target: str, rows: list[int], share: Array, size: int) -> tuple[Array, Array]:
    """A and B whose product has `share` in those rows, and zeros; of an embedding (r, entries) and (dim, r)."""
    import numpy as np

    units = np.zeros((len(rows), size), np.float32)
    units[np.arange(len(rows)), rows] = 1
    if target.removesuffix(".weight").rpartition(".")[2] in architectures.EMBEDDING_NAMES:
        return units, share.T
    return share, units.T


def _with(one: OneScale, pairs: Mapping[str, tuple[Array, Array]]) -> OneScale:
    """The adapter with more factors: beside those of a module, or as a new one; all at one rank again."""
    import numpy as np

    a = one.adapter
    params = {m: dict(own) for m, own in a.modules.items()}
    rank = max(one.rank * (m in params) + pair[0].shape[0] for m, pair in pairs.items())
    rank = max(rank, one.rank)
    for module, factors in pairs.items():
        embedding = module.rpartition(".")[2] in architectures.EMBEDDING_NAMES
        own = params.setdefault(module, {})
        for axis, (name, values) in enumerate(zip(_NAMES[embedding], factors, strict=True)):
            if name in own:
                values = np.concatenate([own[name].tensor.numpy().astype(np.float32), values], axis=axis)
            own[name] = Param(lora.keys.key(module, name), from_numpy(np.ascontiguousarray(values)))
    for own in params.values():
        for names in _NAMES.values():
            for axis, name in enumerate(names):
                if name in own and own[name].tensor.shape[axis] != rank:
                    own[name] = replace(own[name], tensor=padded(own[name].tensor, axis, rank))
    alpha = one.scale * rank
    config = {**a.config, "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
    return replace(one, adapter=replace(a, config=config, modules=params, changed=True), rank=rank)


_NAMES = {False: ("lora_A", "lora_B"), True: ("lora_embedding_A", "lora_embedding_B")}


def _relative(x: Array, y: Array) -> float:
    import numpy as np

    return float(np.linalg.norm(x - y) / np.linalg.norm(y))
