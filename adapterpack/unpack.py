"""From a pack the directory that it was made from, each file proven by its digest."""

from __future__ import annotations

import heapq
import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from adapterpack import containers
from adapterpack.containers import apack
from adapterpack.containers.apack.manifest import Tensors
from adapterpack.containers.apack.reader import Stored, StreamReader
from adapterpack.conversion import inputs
from adapterpack.errors import ChangedWhileReading, InvalidFile, UsageError
from adapterpack.io import atomic, cores
from adapterpack.io.files import OpenFile, start_writeback
from adapterpack.io.files import write as write_at
from adapterpack.tensor import Source, chunks, digest

if TYPE_CHECKING:
    from adapterpack.adapter import Progress

_BEGUN = 24 << 20
"""So many bytes of frames, or a frame more a thread, are decoded by half before numpy is there."""


_READ = 1 << 20
"""Bytes that are hashed at once."""


@dataclass(frozen=True)
class Unpacked:
    """What `unpack` restored.

    Attributes:
        output: The new directory.
        files: How many files.
        bytes: Of all files.
        grade: What was lost when the pack was made: `lossless`: the files are those that were packed.
        error: The relative error that was measured then; None where nothing was lost.
        dropped: What was left out then.
    """

    output: str
    files: int
    bytes: int
    grade: str
    error: float | None
    dropped: tuple[str, ...]


def unpack(
    source: str | Path,
    destination: str | Path,
    *,
    parent: str | Path | None = None,
    base: str | Path | None = None,
    expect_sha256: str | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Unpacked:
    """Restore every file of a pack into a directory.

    Args:
        source: The pack; only read.
        destination: The new directory.
        parent: Where its parent is, or a directory where all its parents are; None: beside the pack.
        base: The base model, where the pack takes tensors from it; None: as the pack says.
        expect_sha256: SHA-256 of the pack itself. A digest inside a file tells accidents, not tampering.
        jobs: Threads; None: one for each core, four at most.

    Raises:
        InvalidFile: damaged, or not the expected file.
        MissingReference: its parent or base is not at hand.
        UsageError: it is no pack.
        WriteFailed: the system refuses, or the disk is too full.
    """
    path, target = _here(source), Path(destination).expanduser()
    parent = None if parent is None else _here(parent)
    protected = inputs(path, base, parent)
    atomic.check_destination(target.absolute(), overwrite=overwrite, protected=protected)
    if not path.exists():
        raise InvalidFile(f"no such file: {path}")
    if not apack.is_pack(path):
        raise UsageError(f"{path} is no pack", hint="directories are copied by `convert` and `compress`")
    if expect_sha256 is not None:
        _expect(path, expect_sha256)
    with ExitStack() as stack:
        c = stack.enter_context(containers.open_checkpoint(path, parent=parent, base=_base(base), opaque=True))
        assert c.pack is not None
        m = c.pack.manifest
        atomic.check_space(target.absolute().parent, c.bytes, f"what {path} holds")
        with atomic.staged_directory(target, overwrite=overwrite, protected=protected) as stage:
            _Restoring(c.pack, stage, jobs or cores.usable(), progress).run()
            c.still_same()
        return Unpacked(
            output=str(target),
            files=len(m.files),
            bytes=c.bytes,
            grade=m.grade,
            error=None if m.error is None else float(m.error),
            dropped=m.dropped,
        )


def _here(source: str | Path) -> Path:
    """See `sources.here`, which is loaded for what is not simply there: it takes longer than small packs do."""
    path = Path(source).expanduser()
    if path.exists() and not str(source).startswith("hf://"):
        return path
    from adapterpack import sources

    return sources.here(source)


def _base(named: str | Path | None) -> Callable[[], Path] | None:
    """Finds the base when a pack needs it, which few do; None: none was named."""
    if named is None:
        return None

    def find() -> Path:
        from adapterpack import sources

        return sources.base_here(named)

    return find


def _expect(path: Path, expected: str) -> None:
    with OpenFile(path) as file:
        found = digest(file.whole())
    if found != expected.strip().lower():
        raise InvalidFile(
            f"{path} has SHA-256 {found}, not the expected {expected:.80}",
            hint="it is another file than the one that was promised: fetch it again from a source that you trust",
        )


class _Item(NamedTuple):
    """Where bytes of a stream belong: [start, start + nbytes) of it at `offset` of a file."""

    start: int
    nbytes: int
    file: int
    offset: int


class _Frame(NamedTuple):
    """A frame of a stream, and what in it belongs where."""

    stream: StreamReader
    number: int
    items: list[_Item]

    @property
    def size(self) -> int:
        start, stop = self.stream.span(self.number)
        return stop - start


T = TypeVar("T")


def _next(left: deque[T]) -> T | None:
    """Taken from the left, by one of several threads."""
    try:
        return left.popleft()
    except IndexError:
        return None


class _Progress:
    """How far each file is whole from its beginning on, while parts of it come in any order."""

    def __init__(self, sizes: list[int], report: Progress | None) -> None:
        self._whole = [0] * len(sizes)
        self._parts: list[list[tuple[int, int]]] = [[] for _ in sizes]
        self._changed = threading.Condition()
        self._failed = False
        self._report, self._done, self._total = report, 0, sum(sizes)

    def wrote(self, file: int, start: int, stop: int) -> None:
        with self._changed:
            heapq.heappush(self._parts[file], (start, stop))
            before = self._whole[file]
            while self._parts[file] and self._parts[file][0][0] <= self._whole[file]:
                self._whole[file] = max(self._whole[file], heapq.heappop(self._parts[file])[1])
            if self._whole[file] > before:
                self._changed.notify_all()
            self._done += stop - start
            if self._report is not None:
                self._report("unpack", self._done, self._total)

    def fail(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def whole(self, file: int, beyond: int) -> int:
        """How far a file is whole, once that is further than `beyond`; `beyond` itself if nothing more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._whole[file] > beyond or self._failed)
            return self._whole[file]


class _Restoring:
    """Frames are decoded by several threads, each part written where it belongs, each file proven as it grows."""

    def __init__(self, pack: apack.Pack, stage: Path, jobs: int, report: Progress | None) -> None:
        self.pack = pack
        self.stage = stage
        self.jobs = jobs
        self.files = pack.manifest.files
        self.progress = _Progress([file.size for file in self.files], report)
        self.opened: list[int] = []
        self._frames: deque[_Frame] = deque()
        self._begun: deque[tuple[_Frame, list[bytes | memoryview]]] = deque()
        self._begun_bytes = 0
        self._loaded = threading.Event()

    def run(self) -> None:
        """Restore everything, durably. Raises what `unpack` raises."""
        # The prover is a thread of its own, that mostly waits.
        with ThreadPoolExecutor(self.jobs) as pool, ThreadPoolExecutor(1) as prover:
            try:
                for file in self.files:
                    self.opened.append(self._create(file.path))
                self._frames.extend(self._all_frames())
                # Meanwhile numpy, which takes as long as all the rest of a pack of 40 MB: this thread counts as one.
                written = [pool.submit(self._decode) for _ in range(max(self.jobs - 1, 1))]
                import_module("adapterpack.codecs.coding")
                self._loaded.set()
                written += [pool.submit(self._decode) for _ in range(self.jobs - len(written))]
                proofs = [prover.submit(self._prove, n) for n in range(len(self.files))]
                self._from_elsewhere()
                for future in written:
                    future.result()
                # The disk finishes while the last bytes are hashed.
                for n in range(len(self.files)):
                    self._sync(n)
                for proof in proofs:
                    proof.result()
            except BaseException:
                self._give_up()
                raise
            finally:
                pool.shutdown()
                prover.shutdown()
                for fd in self.opened:
                    os.close(fd)

    def _create(self, path: str) -> int:
        place = self.stage / path
        with atomic.explained(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            return os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def _parts(self) -> Iterator[tuple[int, int, Source]]:
        """(file, offset, source) of everything that files consist of."""
        for n, file in enumerate(self.files):
            if not isinstance(file.content, Tensors):
                yield n, 0, self.pack.files[file.path]
                continue
            header = self.pack.header(n)
            yield n, 0, header
            offset = header.nbytes
            for tensor in self.pack.tensors.values():
                yield n, offset, tensor.source
                offset += tensor.nbytes

    def _all_frames(self) -> list[_Frame]:
        """In the order in which files need them."""
        items: dict[int, list[_Item]] = defaultdict(list)
        for n, offset, source in self._parts():
            if isinstance(source, Stored) and source.nbytes:
                items[source.piece.stream].append(_Item(source.piece.start, source.nbytes, n, offset))
        found = []
        for stream, own in items.items():
            reader = self.pack.streams[stream]
            own.sort()
            for number in range(len(reader.stream.frames)):
                first, last = reader.span(number)
                inside = [i for i in own if i.start < last and i.start + i.nbytes > first]
                if inside:
                    needed = min((i.file, i.offset + max(first - i.start, 0)) for i in inside)
                    found.append((needed, _Frame(reader, number, inside)))
        found.sort(key=lambda frame: frame[0])
        return [frame for _, frame in found]

    def _give_up(self) -> None:
        self._frames.clear()
        self._begun.clear()
        self._loaded.set()
        self.progress.fail()

    def _decode(self) -> None:
        """Decode frames until there are no more. While numpy is not there yet, a few of them by half."""
        try:
            self._decode_all()
        except BaseException:
            self._give_up()
            raise

    def _decode_all(self) -> None:
        while (frame := _next(self._frames)) is not None:
            segments = frame.stream.segments(frame.number)
            if not self._loaded.is_set() and self._begun_bytes < _BEGUN:
                self._begun_bytes += frame.size
                self._begun.append((frame, segments))
                continue
            self._loaded.wait()
            self._decode_begun()
            self._restore(frame, segments)
        self._loaded.wait()
        self._decode_begun()

    def _decode_begun(self) -> None:
        while (begun := _next(self._begun)) is not None:
            self._restore(*begun)

    def _restore(self, frame: _Frame, segments: list[bytes | memoryview]) -> None:
        data, (first, last) = frame.stream.join(frame.number, segments).data, frame.stream.span(frame.number)
        for item in frame.items:
            low, high = max(item.start, first), min(item.start + item.nbytes, last)
            self._write(item.file, data[low - first : high - first], item.offset + low - item.start)

    def _from_elsewhere(self) -> None:
        """Whatever lies in no stream as it is: recipes, references, quantised tensors, small texts."""
        for n, offset, source in self._parts():
            if not isinstance(source, Stored):
                for chunk in chunks(source):
                    self._write(n, chunk, offset)
                    offset += len(chunk)

    def _write(self, file: int, data: Any, at: int) -> None:
        with atomic.explained(self.stage / self.files[file].path):
            write_at(self.opened[file], data, at)
        self.progress.wrote(file, at, at + len(data))

    def _prove(self, n: int) -> None:
        """Hash a file as it becomes whole, as it lies there."""
        self.pack.check_file(self.files[n].path, self._grown(n))

    def _sync(self, n: int) -> None:
        with atomic.explained(self.stage / self.files[n].path):
            os.fsync(self.opened[n])

    def _grown(self, n: int) -> Iterator[memoryview]:
        done, size = 0, self.files[n].size
        # One buffer that stays in the cache.
        buffer = memoryview(bytearray(min(size, _READ)))
        while done < size:
            whole = self.progress.whole(n, done)
            if whole == done:
                return
            # The disk may begin: less is left for the end.
            start_writeback(self.opened[n])
            while done < whole:
                with atomic.explained(self.stage / self.files[n].path):
                    got = os.preadv(self.opened[n], [buffer[: whole - done]], done)
                if not got:
                    raise ChangedWhileReading(f"{self.stage / self.files[n].path} became shorter than it was written")
                yield buffer[:got]
                done += got
