"""Old or new, never torn: a result is built aside, made durable, then renamed into place.

After a crash at any point the destination is the old thing or the whole new one. What may be left
over is a `.adapterpack-*.tmp` beside it, which a later run removes once its writer is gone.
A failure of the last directory fsync means: the new thing is in place, and an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from adapterpack.errors import DestinationExists, UsageError, WriteFailed

_PREFIX, _SUFFIX = ".adapterpack-", ".tmp"
_STALE_SECONDS = 3600


@contextlib.contextmanager
def staged_directory(
    destination: Path, *, overwrite: bool = False, protected: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """Yield a fresh directory beside `destination`; when the block ends well, it becomes `destination`.

    Args:
        destination: Where the result shall be. Its parent must exist.
        overwrite: Replace a directory that is there.
        protected: Inputs. A destination that is, contains or lies inside one of them is refused.

    Raises:
        DestinationExists: it is there and `overwrite` is false, or it is no directory.
        UsageError: overwriting would destroy an input, the working directory, HOME or a repository.
        WriteFailed: the system refuses a write; the destination is as it was before.
    """
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 - keep symlinks: they are refused below
    with _explained(destination):
        _recover(destination)
        check_destination(destination, overwrite=overwrite, protected=protected)
        stage = _stage_name(destination)
        stage.mkdir()
    try:
        yield stage
        with _explained(destination):
            _sync_tree(stage)
            if _present(destination):
                check_destination(destination, overwrite=overwrite, protected=protected)
                _replace_directory(stage, destination)
            else:
                _rename_new(stage, destination)
            _sync_directory(destination.parent)
    except OSError as e:
        raise _write_failed(destination, e) from e
    finally:
        # After a plain rename there is nothing left; after an exchange the old directory lies here.
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """A new file inside a staged directory, durable when the block ends.

    Raises:
        WriteFailed: the system refuses.
    """
    try:
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        raise _write_failed(path, e) from e


def check_destination(destination: Path, *, overwrite: bool, protected: tuple[Path, ...] = ()) -> None:
    """Refuse a destination before any work is done; see `staged_directory`."""
    parent = destination.parent
    if not parent.is_dir():
        raise WriteFailed(f"{parent} is not a directory", hint=f"mkdir -p {parent}")
    here = destination.resolve()
    for path in (p.resolve() for p in protected):
        if here == path or here in path.parents:
            raise UsageError(f"{destination} is, or holds, the input {path}", hint="write somewhere else")
        if path.is_dir() and path in here.parents:
            raise UsageError(f"{destination} lies inside the input {path}", hint="write somewhere else")
    if not _present(destination):
        return
    if destination.is_symlink() or not destination.is_dir():
        raise DestinationExists(f"{destination} exists and is no directory", hint="remove it, or name another")
    if not overwrite:
        raise DestinationExists(f"{destination} exists", hint="add --overwrite to replace it")
    precious = {Path.cwd().resolve(), Path.home().resolve()}
    if any(here == p or here in p.parents for p in precious) or (destination / ".git").exists():
        raise UsageError(
            f"--overwrite would replace {destination}: the working directory, HOME or a repository",
            hint="write somewhere else",
        )


def _write_failed(path: Path, e: OSError) -> WriteFailed:
    return WriteFailed(f"cannot write {path}: {e.strerror or e}", hint="nothing was changed")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise _write_failed(path, e) from e


def _present(path: Path) -> bool:
    return os.path.lexists(path)


def _stage_name(destination: Path, kind: str = "new") -> Path:
    # The name is cut so that even a 255-byte destination leaves room.
    name = destination.name.encode()[:120].decode(errors="ignore")
    return destination.with_name(f"{_PREFIX}{kind}-{os.getpid()}-{secrets.token_hex(4)}-{name}{_SUFFIX}")


def _old_name(destination: Path) -> Path:
    """Where the old directory waits while systems without an exchange put the new one in its place."""
    return destination.with_name(f"{_PREFIX}old-{destination.name}{_SUFFIX}")


def _replace_directory(stage: Path, destination: Path) -> None:
    if _exchange(stage, destination):
        return
    old = _old_name(destination)
    destination.rename(old)
    stage.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def _recover(destination: Path) -> None:
    """Put back an old directory that a killed run had set aside, and sweep away what dead runs left."""
    old = _old_name(destination)
    if old.is_dir():
        if _present(destination):
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(destination)
    if not destination.parent.is_dir():
        return
    for path in destination.parent.glob(f"{_PREFIX}new-*{_SUFFIX}"):
        pid = path.name.removeprefix(f"{_PREFIX}new-").partition("-")[0]
        with contextlib.suppress(OSError):
            stale = time.time() - path.stat().st_mtime > _STALE_SECONDS
            if stale and pid.isdigit() and not _alive(int(pid)):
                shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_tree(top: Path) -> None:
    # Files were synced by `create`; what is missing is the names.
    for directory, _, _ in os.walk(top, topdown=False):
        _sync_directory(Path(directory))


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2


def _renameat2() -> Callable[[bytes, bytes, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return None
    return lambda a, b, flags: int(call(_AT_FDCWD, a, _AT_FDCWD, b, ctypes.c_uint(flags)))


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    call = _renameat2()
    return call is not None and call(os.fsencode(a), os.fsencode(b), _EXCHANGE) == 0


def _rename_new(stage: Path, destination: Path) -> None:
    """Rename onto a name that nobody has; a plain rename would replace an empty directory silently."""
    call = _renameat2()
    if call is not None and call(os.fsencode(stage), os.fsencode(destination), _NOREPLACE) == 0:
        return
    if _present(destination):
        raise DestinationExists(f"{destination} was created by somebody else meanwhile")
    stage.rename(destination)
