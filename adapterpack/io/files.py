"""Regular files, read by position, and found out when they change underneath us."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from adapterpack.errors import ChangedWhileReading, InvalidFile

_PAGE, _CHUNK = 4096, 4 << 20
_CANNOT_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


def write(fd: int, data: Any, at: int) -> None:
    """Write all bytes of a buffer at a position of a file. Raises OSError."""
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, at)
        view, at = view[n:], at + n


def start_writeback(fd: int) -> None:
    """Let the disk begin with what was written so far, so that fsync finds less to do. Linux; elsewhere nothing."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


_SYNC_FILE_RANGE_WRITE = 2


def _changed(path: Path) -> ChangedWhileReading:
    return ChangedWhileReading(f"{path} changed while it was read", hint="let its writer finish, then run again")


class OpenFile:
    """One descriptor on one regular file, and what it looked like when it was opened.

    `stamp` is its size in bytes and the time of its last change in nanoseconds.

    `pread`, not mmap: a file that another process truncates would kill us with SIGBUS.

    Raises:
        InvalidFile: it does not exist, cannot be read, or is no regular file (a FIFO would block for ever).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            raise InvalidFile(f"cannot open {path}: {e.strerror}") from e
        seen = os.fstat(self._fd)
        if not stat.S_ISREG(seen.st_mode):
            os.close(self._fd)
            kind = "a directory" if stat.S_ISDIR(seen.st_mode) else "not a regular file"
            raise InvalidFile(f"{path} is {kind}")
        self.size = seen.st_size
        self.stamp = (seen.st_size, seen.st_mtime_ns)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop).

        Raises:
            ChangedWhileReading: the file is shorter than it was.
            InvalidFile: the disk does not give them.
        """
        parts: list[bytes] = []
        while start < stop:
            try:
                part = os.pread(self._fd, min(stop - start, 1 << 30), start)
            except OSError as e:
                raise InvalidFile(f"cannot read {self.path} at byte {start}: {e.strerror}") from e
            if not part:
                raise _changed(self.path)
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def whole(self, size: int | None = None) -> FileSpan:
        """All of its bytes, as a source; or as many as it has by now, where it grows."""
        return FileSpan(self, 0, self.size if size is None else size)

    def copy(self, start: int, stop: int, fd: int, at: int) -> None:
        """Copy the bytes [start, stop) to position `at` of another file, inside the kernel where it can.

        Raises:
            ChangedWhileReading: the file is shorter than it was.
            OSError: the other file cannot be written.
        """
        edges = [start, stop]
        if start % _PAGE == at % _PAGE and stop - start > 2 * _PAGE:
            # File systems that share extents do so for whole blocks only.
            edges = [start, -(-start // _PAGE) * _PAGE, stop // _PAGE * _PAGE, stop]
        for first, last in itertools.pairwise(edges):
            self._copy(first, last, fd, at + first - start)

    def _copy(self, start: int, stop: int, fd: int, at: int) -> None:
        while start < stop:
            try:
                n = os.copy_file_range(self._fd, fd, stop - start, start, at)
            except (AttributeError, OSError) as e:
                if isinstance(e, OSError) and e.errno not in _CANNOT_COPY:
                    raise
                for first in range(start, stop, _CHUNK):
                    write(fd, self.read(first, min(first + _CHUNK, stop)), at + first - start)
                return
            if not n:
                raise _changed(self.path)
            start, at = start + n, at + n

    def check_unchanged(self) -> None:
        """Raise ChangedWhileReading if somebody has written to the file since it was opened."""
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != self.stamp:
            raise _changed(self.path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class FileSpan:
    """The bytes [offset, offset + nbytes) of an open file, as a tensor's source."""

    file: OpenFile
    offset: int
    nbytes: int

    def read(self, start: int, stop: int) -> bytes:
        return self.file.read(self.offset + start, self.offset + min(stop, self.nbytes))


@dataclass(frozen=True)
class WholeFile:
    """A file by name, opened only while it is read: for files that are merely carried along.

    Attributes:
        modified: When it was changed last, in nanoseconds: it is read more than once, and must be the same each time.
    """

    path: Path
    nbytes: int
    modified: int | None = None

    @classmethod
    def seen(cls, path: Path) -> WholeFile:
        """A file as it is now."""
        found = path.stat()
        return cls(path, found.st_size, found.st_mtime_ns)

    def read(self, start: int, stop: int) -> bytes:
        with OpenFile(self.path) as file:
            if file.size != self.nbytes or self.modified not in (None, file.stamp[1]):
                raise _changed(self.path)
            data = file.read(start, min(stop, self.nbytes))
            file.check_unchanged()
            return data


class Folder:
    """A directory whose files are opened by name; those of a repository lie elsewhere, and are read as well.

    `path` is what to call it in messages, and where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_there(self) -> bool:
        """Is it a directory?"""
        return self.path.is_dir()

    def has(self, name: str) -> bool:
        """Is there such a file?"""
        return (self.path / name).exists()

    def names(self) -> list[str]:
        """The names of all that is directly in it."""
        return sorted(entry.name for entry in self.path.iterdir())

    def open(self, name: str) -> OpenFile:
        """Open one of its files. Raises InvalidFile."""
        return OpenFile(self.path / name)

    def expect(self, names: Iterable[str]) -> None:
        """These will be opened: what takes a while can be done for all of them at once."""

    def read_small(self, name: str, limit: int) -> bytes:
        """All bytes of a file that should be small; see `read_small`."""
        with self.open(name) as file:
            return _all(file, limit)


@dataclass(frozen=True)
class FileIn:
    """A file of a folder, opened only while it is read."""

    folder: Folder
    name: str
    nbytes: int

    def read(self, start: int, stop: int) -> bytes:
        with self.folder.open(self.name) as file:
            if file.size != self.nbytes:
                raise _changed(file.path)
            return file.read(start, min(stop, self.nbytes))


def read_small(path: Path, limit: int) -> bytes:
    """All bytes of a file that should be small.

    Raises:
        InvalidFile: it is larger than `limit` bytes, no regular file, or cannot be read.
    """
    with OpenFile(path) as file:
        return _all(file, limit)


def _all(file: OpenFile, limit: int) -> bytes:
    if file.size > limit:
        raise InvalidFile(f"{file.path} has {file.size:,} bytes; at most {limit:,} are read")
    return file.read(0, file.size)
