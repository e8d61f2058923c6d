"""Packs, opened: any byte of any file or tensor on demand, each frame checked before it is decoded.

Frames are decoded as they are asked for and two of each stream are kept, so that a pack of any size is
read in little memory, by several threads at once.
"""

from __future__ import annotations

import bisect
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from adapterpack import limits
from adapterpack.codecs import chain as chains
from adapterpack.containers.apack import file as outer
from adapterpack.containers.apack import layout
from adapterpack.containers.apack.layout import Layout, Piece
from adapterpack.containers.apack.manifest import (
    Drawn,
    Entry,
    FromBase,
    FromParent,
    InStream,
    Lines,
    Manifest,
    Place,
    Same,
    Stream,
    Tensors,
    Text,
)
from adapterpack.containers.apack.parsing import parse
from adapterpack.errors import AdapterpackError, InvalidFile
from adapterpack.io.files import OpenFile
from adapterpack.tensor import Joined, Memory, Source, Tensor, chunks

if TYPE_CHECKING:
    from adapterpack.tensor import Array

_KEPT = 2
"""Decoded frames of each stream that are kept: readers go forward, and two tensors may share one."""

Lookup = Callable[[str], Tensor]
"""From a tensor's name to the tensor, elsewhere."""


class Pack:
    """One pack, its manifest read. Use it as a context manager."""

    def __init__(self, file: OpenFile, *, parent: Lookup | None = None, base: Lookup | None = None) -> None:
        """Read and check the manifest; frames are read later.

        Args:
            file: The pack. Closing is the caller's.
            parent: Gives the parent's tensors; asked only when one is needed.
            base: Gives the base's tensors, as they are called on disk.

        Raises:
            InvalidFile: damaged, or the manifest makes no sense.
            Unsupported: of another version.
        """
        self.file = file
        self.name = str(file.path)
        self._outer = outer.read(file)
        self.manifest: Manifest = parse(self._outer.manifest, self.name)
        self.layout: Layout = layout.account(self.manifest, self.name, self._outer.frames)
        frames = sum(1 for _ in self.manifest.frames())
        if frames * outer.DIGEST_BYTES != len(self._outer.digests):
            raise InvalidFile(f"{self.name}: {frames:,} frames, and another number of digests")
        self._parent = parent
        self._base = base
        self._streams = list(self._open_streams())
        self._drawn: dict[int, dict[str, Tensor]] = {}
        self._lock = threading.Lock()

    def _open_streams(self) -> Iterator[StreamReader]:
        offset, digest = outer.HEAD_BYTES, 0
        for n, stream in enumerate(self.manifest.streams):
            before = self._before(n) if stream.chain.from_parent else None
            yield StreamReader(self, n, stream, offset, digest, before)
            offset += sum(frame.stored for frame in stream.frames)
            digest += len(stream.frames)

    def stored(self, start: int, stop: int, frame: int) -> bytes:
        """The bytes [start, stop) of the file, which are those of a frame, once its digest agrees.

        Raises:
            InvalidFile: they are damaged.
        """
        data = self.file.read(start, stop)
        at = frame * outer.DIGEST_BYTES
        if hashlib.sha256(data).digest() != self._outer.digests[at : at + outer.DIGEST_BYTES]:
            raise InvalidFile(
                f"{self.name} is damaged between bytes {start:,} and {stop:,}",
                hint="fetch it again, or restore it from a copy; the disk may be failing",
            )
        return data

    @property
    def streams(self) -> list[StreamReader]:
        return self._streams

    def _before(self, stream: int) -> Source:
        """What the parent has where a stream has its items."""
        parts: list[tuple[Piece, Source]] = []
        for n, piece in self.layout.tensors.items():
            if piece.stream == stream:
                parts.append((piece, _Late(piece.nbytes, self._parents(self.manifest.tensors[n]))))
        if sum(piece.nbytes for piece, _ in parts) != self.manifest.streams[stream].size:
            raise InvalidFile(f"{self.name}: something that is no tensor is stored as a difference to the parent")
        return Joined(source for _, source in parts)

    def _parents(self, entry: Entry) -> Callable[[], Source]:
        def find() -> Source:
            assert self._parent is not None
            tensor = self._parent(entry.name)
            if tensor.dtype != entry.dtype or tensor.shape != entry.shape:
                raise InvalidFile(f"{self.name}: its parent has another shape or dtype of {entry.name!r:.100}")
            return tensor.source

        return find

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor, in file order."""
        found: list[Tensor] = []
        for n, entry in enumerate(self.manifest.tensors):
            found.append(Tensor(entry.dtype, entry.shape, self._source(n, entry, found)))
        return {e.name: t for e, t in zip(self.manifest.tensors, found, strict=True)}

    def _source(self, n: int, entry: Entry, earlier: list[Tensor]) -> Source:
        place: Place = entry.place
        match place:
            case InStream():
                return Stored(self._streams, self.layout.tensors[n])
            case Same(tensor):
                return earlier[tensor].source
            case Drawn(recipe, name):
                return _Late(entry.nbytes, lambda: self._draw(recipe)[name].source)
            case FromBase(name, sha256):
                return _Late(entry.nbytes, lambda: self._from_base(name, sha256))
            case FromParent():
                return _Late(entry.nbytes, self._parents(entry))
            case Lines():
                return _Late(entry.nbytes, lambda: self._lines(n, entry, place))

    def _draw(self, recipe: int) -> dict[str, Tensor]:
        with self._lock:
            if recipe not in self._drawn:
                try:
                    self._drawn[recipe] = self.manifest.recipes[recipe].draw()
                except AdapterpackError as e:
                    raise type(e)(f"{self.name}: {e.message}", hint=e.hint) from e
            return self._drawn[recipe]

    def _from_base(self, name: str, sha256: str) -> Source:
        assert self._base is not None
        tensor = self._base(name)
        if tensor.digest() != sha256:
            raise InvalidFile(
                f"{self.name} takes {name!r:.100} from its base, and this base has other values",
                hint=f"name the base it was packed with: {self.manifest.base}",
            )
        return tensor.source

    def _lines(self, n: int, entry: Entry, place: Lines) -> Source:
        import numpy as np

        from adapterpack.codecs.lines import Quantised, join, line_shape

        _, length = line_shape(entry.shape, place.axis)
        codes = np.empty((len(place.classes), length), np.int32)
        for row, line in enumerate(self.layout.lines[n]):
            high, low = (Stored(self._streams, piece) for piece in (line.high_part, line.low_part))
            try:
                codes[row] = join(high.read(0, high.nbytes), low.read(0, low.nbytes), line.low)
            except InvalidFile as e:
                raise InvalidFile(f"{self.name}: {entry.name!r:.100}: {e.message}") from e
        try:
            return Quantised(codes, place.steps, place.axis)
        except InvalidFile as e:
            raise InvalidFile(f"{self.name}: {entry.name!r:.100}: {e.message}") from e

    @cached_property
    def files(self) -> Mapping[str, Source]:
        """Every file, byte for byte, by path."""
        return {file.path: self._file(n) for n, file in enumerate(self.manifest.files)}

    def _file(self, n: int) -> Source:
        match self.manifest.files[n].content:
            case Text(text):
                return Memory(text.encode())
            case InStream():
                return Stored(self._streams, self.layout.files[n])
            case Tensors():
                return Joined([self.header(n), *(t.source for t in self.tensors.values())])

    def header(self, n: int) -> Source:
        """The header of a safetensors file, length bytes included."""
        content = self.manifest.files[n].content
        assert isinstance(content, Tensors)
        if content.header is None:
            return Memory(layout.header_of(content, self.manifest.tensors))
        return Stored(self._streams, self.layout.headers[n])

    def prove(self) -> None:
        """Read every frame and every file, and compare with the digests.

        Raises:
            InvalidFile: something does not agree.
        """
        for file in self.manifest.files:
            self.check_file(file.path, chunks(self.files[file.path]))
        for stream in self._streams:
            stream.prove()

    def check_file(self, path: str, parts: Iterator[bytes | memoryview]) -> None:
        """Hash a restored file and compare. Raises InvalidFile."""
        h = hashlib.sha256()
        for part in parts:
            h.update(part)
        wanted = next(f.sha256 for f in self.manifest.files if f.path == path)
        if h.hexdigest() != wanted:
            raise InvalidFile(f"{self.name} gives {path!r:.100} back with other bytes than it was packed with")


def parents(pack: Pack) -> Iterator[str]:
    """Names of the packs and directories that a pack needs, the nearest first, as far as they lie beside it."""
    wanted, directory = pack.manifest.parent, pack.file.path.parent
    for _ in range(limits.PARENTS):
        # No longer than any chain may be: a pack can name itself.
        if wanted is None:
            return
        yield wanted.name
        path = directory / wanted.name
        if not path.is_file():
            return
        with OpenFile(path) as file:
            wanted = Pack(file).manifest.parent


class StreamReader:
    """One stream, decoded frame by frame."""

    def __init__(self, pack: Pack, number: int, stream: Stream, offset: int, digest: int, before: Source | None):
        self.stream = stream
        self._pack = pack
        self._number = number
        self._digest = digest
        self._before = before
        self._starts, self._offsets = [0], [offset]
        for frame in stream.frames:
            self._starts.append(self._starts[-1] + frame.size)
            self._offsets.append(self._offsets[-1] + frame.stored)
        self._kept: OrderedDict[int, Array] = OrderedDict()
        self._proven: set[int] = set()
        self._lock = threading.Lock()

    def span(self, n: int) -> tuple[int, int]:
        """[start, stop) of the stream's bytes that frame `n` gives."""
        return self._starts[n], self._starts[n + 1]

    def decode(self, n: int) -> Array:
        """The bytes of frame `n`, uint8, read-only.

        Raises:
            InvalidFile: damaged.
        """
        return self.join(n, self.segments(n))

    def segments(self, n: int) -> list[bytes | memoryview]:
        """The first half of `decode`, which needs no numpy: the segments of frame `n`, its digest compared."""
        frame, where = self.stream.frames[n], self._where(n)
        data = self._pack.stored(self._offsets[n], self._offsets[n + 1], self._digest + n)
        dictionary = outer.dictionary_of(self.stream.chain)
        # Without copies of what is stored as it is.
        view, at = memoryview(data), 0
        segments: list[bytes | memoryview] = []
        for decoded, stored in frame.segments:
            segments.append(chains.restore(view[at : at + stored], decoded, where, dictionary))
            at += stored
        return segments

    def _where(self, n: int) -> str:
        return f"{self._pack.name}: frame {n} of stream {self._number}"

    def join(self, n: int, segments: Sequence[bytes | memoryview]) -> Array:
        """The second half of `decode`."""
        before = None
        if self._before is not None:
            import numpy as np

            before = np.frombuffer(self._before.read(*self.span(n)), np.uint8)
        try:
            found = self.stream.chain.join(segments, self.stream.frames[n].size, before)
        except InvalidFile as e:
            raise InvalidFile(f"{self._where(n)}: {e.message}") from e
        self._proven.add(n)
        return found

    def prove(self) -> None:
        """Decode the frames that nobody has asked for yet. Raises InvalidFile."""
        for n in range(len(self.stream.frames)):
            if n not in self._proven:
                self.decode(n)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of the stream. Raises InvalidFile: damaged."""
        found: list[bytes] = []
        n = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            first, last = self._starts[n], min(stop, self._starts[n + 1])
            found.append(self._frame(n)[start - first : last - first].tobytes())
            start, n = last, n + 1
        return found[0] if len(found) == 1 else b"".join(found)

    def _frame(self, n: int) -> Array:
        # Held while decoding: two readers of one stream mostly want the same frame.
        with self._lock:
            if n not in self._kept:
                self._kept[n] = self.decode(n)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(n)
            return self._kept[n]


class Stored:
    """A part of a stream, as a source."""

    def __init__(self, streams: list[StreamReader], piece: Piece) -> None:
        self.streams = streams
        self.piece = piece

    @property
    def nbytes(self) -> int:
        return self.piece.nbytes

    def read(self, start: int, stop: int) -> bytes:
        at = self.piece.start
        return self.streams[self.piece.stream].read(at + start, at + min(stop, self.nbytes))


class _Late:
    """A source that is found when it is first read: a drawn tensor, the base's, the parent's."""

    def __init__(self, nbytes: int, find: Callable[[], Source]) -> None:
        self.nbytes = nbytes
        self._find = find
        self._source: Source | None = None

    def read(self, start: int, stop: int) -> bytes:
        # Several threads may find it at once; all of them find the same.
        found = self._source
        if found is None:
            found = self._find()
            if found.nbytes != self.nbytes:
                raise InvalidFile(f"{found.nbytes:,} bytes of a tensor were found where {self.nbytes:,} belong")
            self._source = found
        return found.read(start, stop)
