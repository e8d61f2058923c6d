"""From a pack the directory that it was made from, each file proven by its digest."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterpack import containers
from adapterpack.containers import apack
from adapterpack.containers.apack.manifest import Tensors
from adapterpack.containers.apack.reader import Stored
from adapterpack.conversion import inputs
from adapterpack.errors import InvalidFile, UsageError, WriteFailed
from adapterpack.io import atomic, cores
from adapterpack.io.files import OpenFile
from adapterpack.io.files import write as write_at
from adapterpack.tensor import Memory, Source, chunks, digest

if TYPE_CHECKING:
    from adapterpack.adapter import Progress


@dataclass(frozen=True)
class Unpacked:
    """What `unpack` restored.

    Attributes:
        output: The new directory.
        files: How many files.
        bytes: Of all files.
        grade: What was lost when the pack was made: `lossless`: the files are those that were packed.
        max_error: What was allowed then; None: nothing.
        dropped: What was left out then.
    """

    output: str
    files: int
    bytes: int
    grade: str
    max_error: float | None
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
    path, target = Path(source).expanduser(), Path(destination).expanduser()
    protected = inputs(path, base, parent)
    atomic.check_destination(target.absolute(), overwrite=overwrite, protected=protected)
    if not path.exists():
        raise InvalidFile(f"no such file: {path}")
    if not apack.is_pack(path):
        raise UsageError(f"{path} is no pack", hint="directories are copied by `convert` and `compress`")
    if expect_sha256 is not None:
        _expect(path, expect_sha256)
    with ExitStack() as stack:
        c = stack.enter_context(containers.open_checkpoint(path, parent=parent, base=base, opaque=True))
        assert c.pack is not None
        m = c.pack.manifest
        _check_space(target.absolute().parent, c.bytes)
        with (
            atomic.staged_directory(target, overwrite=overwrite, protected=protected) as stage,
            ThreadPoolExecutor(jobs or cores.usable()) as pool,
        ):
            _Restoring(c.pack, stage, pool, progress).run()
            c.still_same()
        return Unpacked(
            output=str(target),
            files=len(m.files),
            bytes=c.bytes,
            grade=m.grade,
            max_error=None if m.max_error is None else float(m.max_error),
            dropped=m.dropped,
        )


def _expect(path: Path, expected: str) -> None:
    with OpenFile(path) as file:
        found = digest(file.whole())
    if found != expected.strip().lower():
        raise InvalidFile(
            f"{path} has SHA-256 {found}, not the expected {expected:.80}",
            hint="it is another file than the one that was promised: fetch it again from a source that you trust",
        )


def _check_space(directory: Path, needed: int) -> None:
    try:
        found = os.statvfs(directory)
    except OSError:
        return
    free = found.f_bavail * found.f_frsize
    if free < needed:
        raise WriteFailed(f"{directory} has {free:,} bytes left, and {needed:,} are needed", hint="make room first")


class _Restoring:
    """Frames are decoded by several threads, each part written where it belongs; then every file is proven."""

    def __init__(self, pack: apack.Pack, stage: Path, pool: ThreadPoolExecutor, progress: Progress | None) -> None:
        self.pack = pack
        self.stage = stage
        self.pool = pool
        self.progress = progress
        self.done = 0
        self.total = sum(file.size for file in pack.manifest.files)

    def run(self) -> None:
        opened: dict[int, int] = {}
        try:
            for n, file in enumerate(self.pack.manifest.files):
                opened[n] = self._create(file.path)
            self._from_streams(opened)
            self._from_elsewhere(opened)
            for future in [self.pool.submit(self._finish, n, fd) for n, fd in opened.items()]:
                future.result()
        except BaseException:
            self.pool.shutdown(cancel_futures=True)
            raise
        finally:
            for fd in opened.values():
                os.close(fd)

    def _create(self, path: str) -> int:
        place = self.stage / path
        with atomic.explained(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            return os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def _targets(self) -> dict[int, list[tuple[int, int, int, int]]]:
        """For each stream (start, bytes, file, offset in it) of its items, in order."""
        found: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
        for n, offset, source in self._parts():
            if isinstance(source, Stored):
                found[source.piece.stream].append((source.piece.start, source.nbytes, n, offset))
        return {stream: sorted(items) for stream, items in found.items()}

    def _parts(self) -> Iterator[tuple[int, int, Source]]:
        """(file, offset, source) of everything that files consist of."""
        for n, file in enumerate(self.pack.manifest.files):
            if not isinstance(file.content, Tensors):
                yield n, 0, self.pack.files[file.path]
                continue
            header = self.pack.header(n)
            yield n, 0, Memory(header)
            offset = len(header)
            for tensor in self.pack.tensors.values():
                yield n, offset, tensor.source
                offset += tensor.nbytes

    def _from_streams(self, opened: dict[int, int]) -> None:
        waiting: list[Future[int]] = []
        for stream, items in self._targets().items():
            frames = len(self.pack.streams[stream].stream.frames)
            waiting += [self.pool.submit(self._frame, stream, n, items, opened) for n in range(frames)]
        for future in waiting:
            self._report(future.result())

    def _frame(self, stream: int, n: int, items: list[tuple[int, int, int, int]], opened: dict[int, int]) -> int:
        reader = self.pack.streams[stream]
        data, (first, last) = reader.decode(n).data, reader.span(n)
        for start, nbytes, file, offset in items:
            low, high = max(start, first), min(start + nbytes, last)
            if low < high:
                with atomic.explained(self.stage):
                    write_at(opened[file], data[low - first : high - first], offset + low - start)
        return last - first

    def _from_elsewhere(self, opened: dict[int, int]) -> None:
        """Whatever lies in no stream as it is: recipes, references, quantised tensors, small texts."""
        for n, offset, source in self._parts():
            if not isinstance(source, Stored):
                for chunk in chunks(source):
                    with atomic.explained(self.stage):
                        write_at(opened[n], chunk, offset)
                    offset += len(chunk)
                    self._report(len(chunk))

    def _finish(self, n: int, fd: int) -> None:
        """Make a file durable, and prove what lies there now."""
        file = self.pack.manifest.files[n]
        place = self.stage / file.path
        with atomic.explained(place):
            os.fsync(fd)
        with OpenFile(place) as restored:
            self.pack.check_file(file.path, hashlib.sha256(), chunks(restored.whole()))

    def _report(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress("unpack", min(self.done, self.total), self.total)
