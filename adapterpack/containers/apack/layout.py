"""Where each part of a pack lies in its streams, and whether the manifest's numbers agree with each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from adapterpack import limits
from adapterpack.containers.apack.manifest import (
    Drawn,
    Entry,
    File,
    FromBase,
    FromParent,
    InStream,
    Lines,
    Manifest,
    Same,
    Tensors,
    Text,
)
from adapterpack.errors import InvalidFile
from adapterpack.io import json as strict_json
from adapterpack.io import safetensors
from adapterpack.tensor import F32, DType, Shape


@dataclass(frozen=True)
class Piece:
    """The bytes [start, start + nbytes) of a stream."""

    stream: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class LinePieces:
    """Where one quantised line lies.

    Attributes:
        low: Low bits of each code.
        high_part: One byte for each code.
        low_part: The low bits.
    """

    low: int
    high_part: Piece
    low_part: Piece


@dataclass
class Layout:
    """Where everything lies.

    Attributes:
        files: For each file that lies in a stream as a whole.
        headers: For each file whose header is stored.
        tensors: For each tensor that lies in a stream.
        lines: For each quantised tensor, line by line.
        totals: Bytes that the items take of each stream.
    """

    files: dict[int, Piece] = field(default_factory=dict)
    headers: dict[int, Piece] = field(default_factory=dict)
    tensors: dict[int, Piece] = field(default_factory=dict)
    lines: dict[int, list[LinePieces]] = field(default_factory=dict)
    totals: Counter[int] = field(default_factory=Counter)

    def take(self, stream: int, nbytes: int) -> Piece:
        """The next bytes of a stream."""
        piece = Piece(stream, self.totals[stream], nbytes)
        self.totals[stream] += nbytes
        return piece


def lay_out(m: Manifest) -> Layout:
    """Hand out the bytes of the streams: file by file, header first, then tensor by tensor, line by line."""
    layout = Layout()
    entries = iter(enumerate(m.tensors))
    for n, file in enumerate(m.files):
        match file.content:
            case InStream(stream):
                layout.files[n] = layout.take(stream, file.size)
            case Tensors(count, _, header):
                if header is not None:
                    layout.headers[n] = layout.take(*header)
                for _ in range(count):
                    index, entry = next(entries)
                    _place(layout, m, index, entry)
    return layout


def _place(layout: Layout, m: Manifest, index: int, entry: Entry) -> None:
    match entry.place:
        case InStream(stream):
            layout.tensors[index] = layout.take(stream, entry.nbytes)
        case Lines(axis, _, classes):
            # Late, here and below: few packs have lines, and these bring numpy along.
            from adapterpack.codecs.lines import line_shape

            _, length = line_shape(entry.shape, axis)
            layout.lines[index] = [
                LinePieces(
                    m.classes[c].low,
                    layout.take(m.classes[c].high_stream, length),
                    layout.take(m.classes[c].low_stream, -(-length * m.classes[c].low // 8)),
                )
                for c in classes
            ]


@dataclass(frozen=True)
class _Sized:
    """A tensor as far as a header names it."""

    dtype: DType
    shape: Shape
    nbytes: int


def header_of(content: Tensors, entries: Iterable[Entry]) -> bytes:
    """The canonical header of a file: metadata and tensors in the order of the manifest."""
    named = ((e.name, _Sized(e.dtype, e.shape, e.nbytes)) for e in entries)
    metadata = None if content.metadata is None else dict(content.metadata)
    return safetensors.header_text(named, metadata)


def header_lists(header: bytes, entries: Iterable[Entry], where: str) -> bool:
    """Does a stored header list these tensors, one behind the other? Raises InvalidFile: it is no header."""
    found = strict_json.parse(header[8:], where)
    found.pop(safetensors.METADATA, None)
    wanted, end = {}, 0
    for e in entries:
        span = [end, end + e.nbytes]
        wanted[e.name] = {"data_offsets": span, "dtype": e.dtype.name, "shape": list(e.shape)}
        end = span[1]
    length = int.from_bytes(header[:8], "little")
    # As text, where true is not 1.
    return length == len(header) - 8 and json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def account(m: Manifest, where: str, stored: int) -> Layout:
    """Check a manifest against itself and the size of the frames; nothing is decoded.

    Args:
        m: As it was parsed.
        where: The pack, for errors.
        stored: Bytes of all frames.

    Raises:
        InvalidFile: two parts of it do not agree.
    """

    def check(good: bool, reason: str) -> None:
        if not good:
            raise InvalidFile(f"{where}: its manifest {reason}")

    paths = [file.path.casefold() for file in m.files]
    check(len(set(paths)) == len(paths), "restores one file twice")
    inner = {path[: i + 1] for path in paths for i in range(len(path)) if path[i + 1 : i + 2] == "/"}
    check(not inner & set(paths), "has a file where it has a directory")
    check(sum(isinstance(f.content, Tensors) for f in m.files) <= 1, "takes more than one file apart")
    counts = sum(f.content.count for f in m.files if isinstance(f.content, Tensors))
    check(counts == len(m.tensors), "has tensors that belong to no file")
    check(len({t.name for t in m.tensors}) == len(m.tensors), "has two tensors of one name")
    check(sum(f.size for f in m.files) <= limits.PACK_BYTES, "restores more than packs may")
    for n, entry in enumerate(m.tensors):
        check(_place_fits(m, n, entry), f"cannot place the tensor {entry.name!r:.100}")
    for klass in m.classes:
        check(max(klass.high_stream, klass.low_stream) < len(m.streams), "names a stream that is not there")
    for file in m.files:
        if isinstance(file.content, InStream):
            check(file.content.stream < len(m.streams), "names a stream that is not there")
        if isinstance(file.content, Tensors) and file.content.header is not None:
            check(file.content.header[0] < len(m.streams), "names a stream that is not there")
    layout = lay_out(m)
    for n, stream in enumerate(m.streams):
        check(layout.totals[n] == stream.size, f"fills stream {n} with {layout.totals[n]:,} of {stream.size:,} bytes")
        check(m.parent is not None or not stream.chain.from_parent, "has a difference to a parent that it lacks")
        check(all(f.size % stream.chain.width == 0 for f in stream.frames[:-1]), "cuts a word into two frames")
    check(sum(frame.stored for frame in m.frames()) == stored, "accounts for another number of bytes than there are")
    for file in m.files:
        check(_size_of(m, file) == file.size, f"gives {file.path!r:.100} another size than its parts have")
    return layout


def _place_fits(m: Manifest, n: int, entry: Entry) -> bool:
    match entry.place:
        case InStream(stream):
            return stream < len(m.streams)
        case Same(tensor):
            return tensor < n and m.tensors[tensor].nbytes == entry.nbytes
        case Drawn(recipe, name):
            return recipe < len(m.recipes) and m.recipes[recipe].shapes.get(name) == (entry.dtype, entry.shape)
        case Lines(axis, steps, classes):
            from adapterpack.codecs.lines import line_shape

            lines, _ = line_shape(entry.shape, axis)
            good = entry.dtype == F32 and len(steps) == len(classes) == lines
            return good and all(c < len(m.classes) for c in classes)
        case FromParent():
            return m.parent is not None
        case FromBase():
            return m.base is not None


def _size_of(m: Manifest, file: File) -> int:
    match file.content:
        case Text(text):
            return len(text.encode())
        case InStream():
            return file.size
        case Tensors(_, _, header):
            length = header[1] if header is not None else len(header_of(file.content, m.tensors))
            return length + sum(t.nbytes for t in m.tensors)
