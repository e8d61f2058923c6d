"""What changed between two checkpoints: config, tensors, files, the modules that moved most. A report, no verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterpack import containers, limits, methods, movement, sources
from adapterpack.adapter import Adapter, Method, Progress
from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import AdapterpackError, WrongBase
from adapterpack.movement import ModuleMove
from adapterpack.tensor import Shape, Source, Tensor, chunks, numpy_dtype

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_BASE = "base_model_name_or_path"
_METADATA = "__metadata__"
_ELEMENTS = limits.CHUNK_BYTES // 8


@dataclass(frozen=True)
class FieldChange:
    """A field of adapter_config.json, or of the tensor file's metadata, that differs.

    Attributes:
        name: `r`; `rank_pattern.q_proj` of a field in a field; `__metadata__.format`.
        kind: `added`, `removed` or `changed`.
        before, after: The values; None where there is none. Lists of names are compared as sets.
    """

    name: str
    kind: str
    before: Any
    after: Any


@dataclass(frozen=True)
class TensorChange:
    """A tensor that differs, or that only one side has.

    Attributes:
        key: As A spells it; as B does where A has none.
        kind: `added`, `removed`, `shape`, `dtype` (the same values in another), or `values`.
        dtype_a, dtype_b: As the format spells them; None where there is none.
        shape_a, shape_b: Likewise.
        norm_a, norm_b: Frobenius norms in f64; None where the dtype has no numbers that can be read one by one.
        norm_difference: Of B - A; None where they cannot be subtracted.
        relative: norm_difference / norm_a; 0/0 is 0.
        max_abs: Largest difference of an element.
    """

    key: str
    kind: str
    dtype_a: str | None
    dtype_b: str | None
    shape_a: Shape | None
    shape_b: Shape | None
    norm_a: float | None = None
    norm_b: float | None = None
    norm_difference: float | None = None
    relative: float | None = None
    max_abs: float | None = None


@dataclass(frozen=True)
class FileChange:
    """A file beside config and tensors that differs: kind `added`, `removed` or `changed`, and sizes in bytes."""

    name: str
    kind: str
    bytes_a: int | None
    bytes_b: int | None


@dataclass(frozen=True)
class Checkpointed:
    """One side.

    Attributes:
        name: Path.
        method: `peft_type` in lower case.
        encoding: None for methods that are not read.
        base_model: As the config names it.
        tensors: How many.
        bytes: Of all files.
    """

    name: str
    method: str
    encoding: str | None
    base_model: str | None
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Difference:
    """What `diff` found.

    Attributes:
        same: Nothing differs but spelling: config, metadata, tensors bit for bit, files.
        a, b: The two sides.
        config: Fields that differ.
        tensors: Tensors that differ: added and removed ones, other shapes, then by how far they moved.
        equal_tensors: How many are the same, bit for bit.
        modules: Every base tensor that one of them changes, the one that moved most first; empty for methods that
            are not read.
        files: Files that differ.
        notes: How it was compared, where that is not plain.
    """

    same: bool
    a: Checkpointed
    b: Checkpointed
    config: tuple[FieldChange, ...]
    tensors: tuple[TensorChange, ...]
    equal_tensors: int
    modules: tuple[ModuleMove, ...]
    files: tuple[FileChange, ...]
    notes: tuple[str, ...]


def diff(
    a: str | Path,
    b: str | Path,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    subfolder: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Difference:
    """Say what changed from checkpoint A to checkpoint B, of whatever methods.

    Args:
        a, b: Directories or packs.
        base: The base model, for changes that depend on W (DoRA) and for tensors that are replaced.
        device: Where norms of changes are computed.
        subfolder: Which adapter of A, if there are several.

    Raises:
        InvalidFile: one of them cannot be read at all.
        WrongBase: the base lacks what they change.
    """
    with ExitStack() as stack:
        here = sources.base(base)
        pair = []
        for place, below in ((a, subfolder), (b, None)):
            path = sources.here(place, below)
            c = containers.open_checkpoint(path, subfolder=below, allow_pickle=allow_pickle, base=here)
            pair.append(stack.enter_context(c))
            c.prove()
        x, y = pair
        parsed = [_parsed(c) for c in pair]
        config = tuple(_config_changes(x, y))
        tensors, equal, notes = _tensor_changes(x, y, parsed, progress)
        files = tuple(_file_changes(x, y))
        modules, said = _modules(parsed, sources.open_base(base, stack), device, progress)
        for c in pair:
            c.still_same()
    return Difference(
        same=not config and not tensors and not files,
        a=_side(x, parsed[0][1]),
        b=_side(y, parsed[1][1]),
        config=config,
        tensors=tensors,
        equal_tensors=equal,
        modules=tuple(modules),
        files=files,
        notes=(*notes, *said),
    )


def _parsed(c: Checkpoint) -> tuple[Method | None, Adapter | None]:
    try:
        return methods.parse(c)
    except AdapterpackError:
        return None, None


def _side(c: Checkpoint, a: Adapter | None) -> Checkpointed:
    base = c.config.get(_BASE)
    return Checkpointed(
        c.name,
        c.peft_type.lower(),
        None if a is None else a.encoding,
        base if isinstance(base, str) and base else None,
        len(c.tensors),
        c.bytes if c.pack is None else c.pack.file.size,
    )


def _modules(
    parsed: list[tuple[Method | None, Adapter | None]], model: Base | None, device: str, progress: Progress | None
) -> tuple[list[ModuleMove], list[str]]:
    (method_a, a), (method_b, b) = parsed
    if method_a is None or method_b is None or a is None or b is None:
        return [], ["what they do to their modules is not known: they were compared tensor by tensor"]
    if model is not None:
        missing = model.bind([*a.targets(), *b.targets()])
        if missing:
            raise WrongBase(f"the base {model.path} lacks {len(missing)} tensors that they change: {missing[0]}")
    # Late: who compares what he cannot read pays for no torch.
    from adapterpack.backend import TorchBackend

    return movement.movements((method_a, a), (method_b, b), TorchBackend(device), model, progress)


# -- config and files -----------------------------------------------------------------------------------------


def _config_changes(x: Checkpoint, y: Checkpoint) -> Iterator[FieldChange]:
    yield from _field_changes(x.config, y.config, "")
    yield from _field_changes(x.metadata, y.metadata, f"{_METADATA}.")


def _field_changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> Iterator[FieldChange]:
    for name in dict.fromkeys([*before, *after]):
        path = f"{prefix}{name}"
        if name not in after:
            yield FieldChange(path, "removed", before[name], None)
        elif name not in before:
            yield FieldChange(path, "added", None, after[name])
        elif isinstance(before[name], dict) and isinstance(after[name], dict):
            yield from _field_changes(before[name], after[name], f"{path}.")
            # Of patterns the first that matches counts.
            old, new = ([k for k in side[name] if k in before[name] and k in after[name]] for side in (before, after))
            if old != new and name.endswith("_pattern"):
                yield FieldChange(f"{path} (order)", "changed", old, new)
        elif _as_set(before[name]) != _as_set(after[name]):
            yield FieldChange(path, "changed", before[name], after[name])


def _as_set(value: Any) -> Any:
    """PEFT writes sets of names as lists in any order. And 1 is not true, nor 1.0."""
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return sorted(value)
    return type(value).__name__, value


def _file_changes(x: Checkpoint, y: Checkpoint) -> Iterator[FileChange]:
    ours, theirs = {**x.state, **x.files}, {**y.state, **y.files}
    for name in sorted({*ours, *theirs}):
        if name not in theirs:
            yield FileChange(name, "removed", ours[name].nbytes, None)
        elif name not in ours:
            yield FileChange(name, "added", None, theirs[name].nbytes)
        elif not _same_bytes(ours[name], theirs[name]):
            yield FileChange(name, "changed", ours[name].nbytes, theirs[name].nbytes)


def _same_bytes(x: Source, y: Source) -> bool:
    return x.nbytes == y.nbytes and all(p == q for p, q in zip(chunks(x), chunks(y), strict=True))


# -- tensors ------------------------------------------------------------------------------------------------


def _tensor_changes(
    x: Checkpoint, y: Checkpoint, parsed: list[tuple[Method | None, Adapter | None]], progress: Progress | None
) -> tuple[tuple[TensorChange, ...], int, list[str]]:
    ours, theirs = (_spelled(c, *p) for c, p in zip((x, y), parsed, strict=True))
    total, done, equal = sum(t.nbytes for t in x.tensors.values()), 0, 0
    changes: list[TensorChange] = []
    respelled = 0
    for name in dict.fromkeys([*ours, *theirs]):
        mine, other = ours.get(name), theirs.get(name)
        if mine is None or other is None:
            changes.append(_one_side(mine, other))
            continue
        respelled += mine[0] != other[0]
        if mine[1].equals(other[1]):
            equal += 1
        else:
            changes.append(_changed(mine[0], mine[1], other[1]))
        done += mine[1].nbytes
        if progress:
            progress("tensors", done, total)
    notes = [f"{respelled} keys are spelled otherwise, and mean the same"] if respelled else []
    return tuple(sorted(changes, key=_rank, reverse=True)), equal, notes


def _spelled(c: Checkpoint, method: Method | None, a: Adapter | None) -> dict[str, tuple[str, Tensor]]:
    """PEFT's key of each parameter to the file's and the tensor; keys as they are where nothing is known."""
    known = {}
    if method is not None and a is not None:
        known = {p.key: method.keys.key(m, name) for m, params in a.modules.items() for name, p in params.items()}
        known |= {p.key: f"base_model.{name}" for name, p in a.shared.items()}
    return {known.get(key, key): (key, tensor) for key, tensor in c.tensors.items()}


def _one_side(mine: tuple[str, Tensor] | None, other: tuple[str, Tensor] | None) -> TensorChange:
    found = mine or other
    assert found is not None
    key, tensor = found
    norm = _numbers(tensor, None)
    said = (tensor.dtype.name, tensor.shape, None if norm is None else norm[0])
    if mine is not None:
        return TensorChange(key, "removed", said[0], None, said[1], None, norm_a=said[2])
    return TensorChange(key, "added", None, said[0], None, said[1], norm_b=said[2])


def _changed(key: str, x: Tensor, y: Tensor) -> TensorChange:
    heads = (x.dtype.name, y.dtype.name, x.shape, y.shape)
    if x.shape != y.shape:
        norms = [_numbers(t, None) for t in (x, y)]
        return TensorChange(key, "shape", *heads, *(None if n is None else n[0] for n in norms))
    found = _numbers(x, y)
    if found is None:
        return TensorChange(key, "values", *heads)
    norm_a, norm_b, difference, max_abs = found
    kind = "dtype" if x.dtype != y.dtype and difference == 0 else "values"
    relative = 0.0 if difference == 0 else difference / norm_a if norm_a else math.inf
    return TensorChange(key, kind, *heads, norm_a, norm_b, difference, relative, max_abs)


def _rank(t: TensorChange) -> tuple[int, float]:
    """Added and removed ones first, then other shapes, then what has no number, then by how far it moved."""
    order = {"removed": 5, "added": 5, "shape": 4}.get(t.kind)
    if order is not None:
        return order, t.norm_a or t.norm_b or 0.0
    if t.relative is None or t.relative != t.relative:
        return 3, 0.0
    return (2 if t.kind == "values" else 1), t.relative


def _numbers(x: Tensor, y: Tensor | None) -> tuple[float, float, float, float] | None:
    """Norms of x, y and y - x, and the largest difference, f64, a few MiB at a time; None: no such numbers."""
    import numpy as np

    if any(t is not None and (t.dtype.numpy is None or t.dtype.kind == "complex") for t in (x, y)):
        return None
    squares = [0.0, 0.0, 0.0]
    largest = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, x.numel, _ELEMENTS):
            stop = min(start + _ELEMENTS, x.numel)
            p = _values(x, start, stop)
            squares[0] += float(p @ p)
            if y is not None:
                q = _values(y, start, stop)
                d = q - p
                squares[1] += float(q @ q)
                squares[2] += float(d @ d)
                # NaN wins, so that it is seen.
                largest = float(np.maximum(largest, np.abs(d).max()))
    a, b, d_norm = (math.sqrt(s) for s in squares)
    return a, b, d_norm, largest


def _values(t: Tensor, start: int, stop: int) -> Array:
    import numpy as np

    width = t.dtype.bits // 8
    data = t.source.read(start * width, stop * width)
    return np.frombuffer(data, dtype=numpy_dtype(t.dtype)).astype(np.float64)
