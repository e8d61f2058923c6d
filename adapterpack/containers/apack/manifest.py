"""The manifest of a pack: what it restores, where each part lies, and how it is coded (`formats/apack/SPEC.md`).

Everything that a reader allocates is stated here and bounded before any work begins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterpack.codecs.chain import Chain
from adapterpack.tensor import DType, Shape

if TYPE_CHECKING:
    from adapterpack import recipes

VERSION = 1


@dataclass(frozen=True)
class Frame:
    """A part of a stream that is decoded on its own.

    Attributes:
        size: Bytes of the stream that it gives.
        segments: (decoded, stored) bytes of each segment.
    """

    size: int
    segments: tuple[tuple[int, int], ...]

    @property
    def stored(self) -> int:
        return sum(stored for _, stored in self.segments)


@dataclass(frozen=True)
class Stream:
    """Bytes of items one behind the other, coded by one chain, cut into frames."""

    chain: Chain
    frames: tuple[Frame, ...]

    @property
    def size(self) -> int:
        return sum(frame.size for frame in self.frames)


@dataclass(frozen=True)
class InStream:
    """The next bytes of a stream."""

    stream: int


@dataclass(frozen=True)
class Same:
    """The bytes of an earlier tensor."""

    tensor: int


@dataclass(frozen=True)
class Drawn:
    """A draw of a recipe, which has its digest."""

    recipe: int
    name: str


@dataclass(frozen=True)
class FromBase:
    """A tensor of the base model, under the name that it has on disk there."""

    name: str
    sha256: str


@dataclass(frozen=True)
class FromParent:
    """The parent's tensor of the same name."""


@dataclass(frozen=True)
class Lines:
    """Quantised rows or columns: the next bytes of the streams of each line's class.

    Attributes:
        axis: 0: lines are rows; 1: columns.
        steps: Step code of each line.
        classes: Class of each line.
    """

    axis: int
    steps: tuple[int, ...]
    classes: tuple[int, ...]


Place = InStream | Same | Drawn | FromBase | FromParent | Lines


def place_name(place: Place) -> str | None:
    """Where a tensor is taken from, in a word; None: it is stored here."""
    match place:
        case Same():
            return "equal"
        case Drawn():
            return "recipe"
        case FromBase():
            return "base"
        case FromParent():
            return "parent"
    return None


@dataclass(frozen=True)
class Entry:
    """One tensor.

    Attributes:
        name: Its key in the file.
    """

    name: str
    dtype: DType
    shape: Shape
    place: Place

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.bits // 8


@dataclass(frozen=True)
class Text:
    """A small file that stands in the manifest itself."""

    text: str


@dataclass(frozen=True)
class Tensors:
    """A safetensors file.

    Attributes:
        count: It consists of the next so many tensors.
        metadata: (name, value) pairs in file order; None where the header has no `__metadata__`.
        header: (stream, bytes): its header where canonical writing does not reproduce it, length bytes included.
    """

    count: int
    metadata: tuple[tuple[str, str], ...] | None = None
    header: tuple[int, int] | None = None


@dataclass(frozen=True)
class File:
    """One file to restore.

    Attributes:
        path: Relative, `/` between its parts.
        sha256: Of all its bytes.
    """

    path: str
    size: int
    sha256: str
    content: Text | InStream | Tensors


@dataclass(frozen=True)
class Class:
    """How lines of one class are stored.

    Attributes:
        low: How many low bits of each code go to the low stream.
        high_stream: One byte for each code: what is above them.
        low_stream: The low bits, padded to whole bytes per line.
    """

    low: int
    high_stream: int
    low_stream: int


@dataclass(frozen=True)
class Parent:
    """The checkpoint that this one is a difference to.

    Attributes:
        name: What its directory or file was called.
        sha256: Of its tensor file.
        depth: How many packs one behind the other lead to one that stands alone.
    """

    name: str
    sha256: str
    depth: int


@dataclass(frozen=True)
class Manifest:
    """Everything but the bytes; each field as `formats/apack/SPEC.md` has it."""

    producer: str
    method: str
    encoding: str | None
    grade: str
    files: tuple[File, ...]
    tensors: tuple[Entry, ...] = ()
    streams: tuple[Stream, ...] = ()
    recipes: tuple[recipes.Recipe, ...] = ()
    classes: tuple[Class, ...] = ()
    parent: Parent | None = None
    base: str | None = None
    max_error: str | None = None
    error: str | None = None
    source_bytes: int = 0
    dropped: tuple[str, ...] = ()

    def weights(self) -> int | None:
        """Index of the file whose tensors the adapter consists of: the only one that is taken apart."""
        return next((n for n, file in enumerate(self.files) if isinstance(file.content, Tensors)), None)

    def frames(self) -> Iterator[Frame]:
        for stream in self.streams:
            yield from stream.frames


def dump(m: Manifest) -> bytes:
    """Canonical JSON: sorted keys, no spaces, whole numbers, UTF-8."""
    record = {
        "apack": VERSION,
        "producer": m.producer,
        "method": m.method,
        "encoding": m.encoding,
        "grade": m.grade,
        "files": [_file_record(file) for file in m.files],
        "tensors": [[t.name, t.dtype.name, list(t.shape), _place_record(t.place)] for t in m.tensors],
        "streams": [
            {
                "width": s.chain.width,
                "steps": list(s.chain.steps),
                "frames": [[f.size, *(n for pair in f.segments for n in pair)] for f in s.frames],
            }
            for s in m.streams
        ],
        "recipes": [json.loads(r.to_metadata()) for r in m.recipes],
        "classes": [[c.low, c.high_stream, c.low_stream] for c in m.classes],
        "parent": m.parent and {"name": m.parent.name, "sha256": m.parent.sha256, "depth": m.parent.depth},
        "base": m.base,
        "max_error": m.max_error,
        "error": m.error,
        "source_bytes": m.source_bytes,
        "dropped": list(m.dropped),
    }
    return canonical(record)


def canonical(record: Any) -> bytes:
    """The one way to write a JSON value."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _file_record(file: File) -> dict[str, Any]:
    record: dict[str, Any] = {"path": file.path, "size": file.size, "sha256": file.sha256}
    match file.content:
        case Text(text):
            record["text"] = text
        case InStream(stream):
            record["stream"] = stream
        case Tensors(count, metadata, header):
            record["tensors"] = count
            record["metadata"] = metadata and [list(pair) for pair in metadata]
            record["header"] = header and list(header)
            if metadata is not None and not metadata:
                record["metadata"] = []
    return record


def _place_record(place: Place) -> Any:
    match place:
        case InStream(stream):
            return stream
        case Same(tensor):
            return ["same", tensor]
        case Drawn(recipe, name):
            return ["recipe", recipe, name]
        case FromBase(name, sha256):
            return ["base", name, sha256]
        case FromParent():
            return ["parent"]
        case Lines(axis, steps, classes):
            return ["lines", axis, list(steps), list(classes)]
