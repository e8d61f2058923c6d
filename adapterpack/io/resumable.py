"""A staged directory that a killed run leaves for the next one, and the journal that says what of it is done.

Beside the destination lies `.adapterpack-part-*.tmp` with `model/`, which becomes the destination, a `journal`
of JSON lines, and a `lock` that the system lets go when its holder dies. A line is written once what it names
is durable; the first line names the work, and other work starts clean.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adapterpack.errors import WriteFailed
from adapterpack.io import atomic

_SCHEMA = "adapterpack.journal/1"
_STALE_SECONDS = 7 * 24 * 3600
"""A part that nobody came back for in a week is removed by whoever writes beside it."""


class Part:
    """A directory on its way to become the destination.

    Attributes:
        path: The directory to write into.
        done: What an earlier run of the same work has recorded; empty if there was none.
    """

    def __init__(self, work: Path, key: Callable[[], str]) -> None:
        self.path = work / "model"
        self._journal, self._key = work / "journal", key
        self._lock = threading.Lock()
        self.done: list[dict[str, Any]] = self._resume()

    def _resume(self) -> list[dict[str, Any]]:
        lines = _lines(self._journal)
        if lines and lines[0] == {"journal": _SCHEMA, "work": self._key()} and self.path.is_dir():
            return lines[1:]
        self.clear()
        return []

    def clear(self) -> None:
        """Start clean."""
        self._journal.unlink(missing_ok=True)
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir()
        self.done = []

    def record(self, entry: dict[str, Any]) -> None:
        """Note that something is done and durable. Any thread may."""
        key = self._key()
        # The names of new files must be durable before the journal counts on them.
        atomic.sync_directory(self.path)
        with self._lock, self._journal.open("ab") as journal:
            lines = [entry] if journal.tell() else [{"journal": _SCHEMA, "work": key}, entry]
            journal.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            journal.flush()
            os.fsync(journal.fileno())


def _lines(journal: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a torn last one was never written."""
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError):
        for line in journal.read_bytes().split(b"\n")[:-1]:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                break
            lines.append(entry)
    return lines


@contextlib.contextmanager
def resumable_directory(
    destination: Path, key: Callable[[], str], *, overwrite: bool = False, protected: tuple[Path, ...] = ()
) -> Iterator[Part]:
    """Yield a part of the destination; when the block ends well, it becomes the destination.

    If the process dies, or is interrupted, what was recorded stays for the next run of the same work. An
    error removes it.

    Args:
        key: Names the work: inputs, options and whatever else decides the bytes. Asked for only when needed.
        destination, overwrite, protected: As for `atomic.staged_directory`, which says what it raises.

    Raises:
        WriteFailed: another process writes this destination, or the system refuses.
    """
    destination = atomic.prepare(destination, overwrite=overwrite, protected=protected)
    with atomic.explained(destination):
        _sweep(destination.parent)
        work = atomic.fixed_name(destination, "part")
        lock = _lock(work, destination)
    try:
        with atomic.explained(destination):
            part = Part(work, key)
            yield part
        atomic.publish(part.path, destination, overwrite=overwrite, protected=protected)
    except BaseException as e:
        # Interrupted: somebody may want to go on. Anything else would only happen again.
        if isinstance(e, Exception) or not (work / "journal").exists():
            _remove(work)
        else:
            e.add_note(f"what was finished waits in {work} for the same command to go on; or remove it")
        raise
    else:
        _remove(work)
    finally:
        os.close(lock)


def _remove(work: Path) -> None:
    """Remove a part, the lock last: whoever takes it next must not lose what it has begun to write."""
    with contextlib.suppress(OSError):
        shutil.rmtree(work / "model", ignore_errors=True)
        (work / "journal").unlink(missing_ok=True)
        (work / "lock").unlink(missing_ok=True)
        work.rmdir()


def _lock(work: Path, destination: Path) -> int:
    """A descriptor that holds the work; the lock goes with it."""
    while True:
        work.mkdir(exist_ok=True)
        try:
            fd = os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue
        except OSError:
            _remove_empty(work)
            raise
        if not _locked(fd):
            os.close(fd)
            raise WriteFailed(f"another process is writing {destination}", hint="wait for it, or name another output")
        # A run that has just ended may have removed the file that we waited for.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), (work / "lock").stat()):
                with contextlib.suppress(OSError):
                    os.utime(fd)
                return fd
        os.close(fd)


def _remove_empty(work: Path) -> None:
    """A directory without a lock is nobody's: who has just made it will make it again."""
    with contextlib.suppress(OSError):
        work.rmdir()


def _locked(fd: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        # File systems of clusters may know no locks: nobody is kept out then.
        if e.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    return True


def _sweep(directory: Path) -> None:
    """Remove parts that nobody holds and nobody came back for."""
    for work in directory.glob(".adapterpack-part-*.tmp"):
        _remove_empty(work)
        with contextlib.suppress(OSError):
            if time.time() - (work / "lock").stat().st_mtime < _STALE_SECONDS:
                continue
            fd = os.open(work / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                if _locked(fd):
                    _remove(work)
            finally:
                os.close(fd)
