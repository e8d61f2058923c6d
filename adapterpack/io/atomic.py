"""Old or new, never torn: a result is built aside, made durable, then renamed into place.

After a crash at any point the destination is the old thing or the whole new one. What may be left
over is a `.adapterpack-*.tmp` beside it, which a later run removes once its writer is gone.
(`resumable` leaves one on purpose, for the same run to go on with.)
A failure of the last directory fsync means: the new thing is in place, and an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
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
    destination = prepare(destination, overwrite=overwrite, protected=protected)
    with explained(destination):
        stage = _stage_name(destination)
        stage.mkdir()
    try:
        with explained(destination):
            yield stage
        publish(stage, destination, overwrite=overwrite, protected=protected)
    finally:
        # After a plain rename there is nothing left; after an exchange the old directory lies here.
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def staged_file(destination: Path, *, overwrite: bool = False, protected: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield a fresh name beside `destination`; the file that the block made durable there becomes `destination`.

    Args:
        destination: Where the result shall be. Its directory must exist.
        overwrite: Replace a file that is there.
        protected: Inputs; see `staged_directory`.

    Raises:
        DestinationExists: it is there and `overwrite` is false, or it is no plain file.
        UsageError: it is an input, or lies inside one.
        WriteFailed: the system refuses a write; the destination is as it was before.
    """
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 - keep symlinks: they are refused below
    with explained(destination):
        check_destination(destination, overwrite=overwrite, protected=protected, file=True)
        _sweep(destination.parent)
    stage = _stage_name(destination)
    try:
        with explained(destination):
            yield stage
            if _present(destination):
                check_destination(destination, overwrite=overwrite, protected=protected, file=True)
                stage.replace(destination)
            else:
                _rename_new(stage, destination)
        _sync_published(destination)
    finally:
        # Mostly there is nothing left; and a leftover that cannot be removed is no reason to call it a failure.
        with contextlib.suppress(OSError):
            stage.unlink()


def prepare(destination: Path, *, overwrite: bool, protected: tuple[Path, ...]) -> Path:
    """Check a destination, mend what a killed run left of it, and give its absolute path."""
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 - keep symlinks: they are refused below
    with explained(destination):
        check_destination(destination, overwrite=overwrite, protected=protected)
        if _recover(destination):
            check_destination(destination, overwrite=overwrite, protected=protected)
        _sweep(destination.parent)
    return destination


def publish(stage: Path, destination: Path, *, overwrite: bool, protected: tuple[Path, ...]) -> None:
    """Let a finished directory beside the destination become the destination; what was there lies at `stage` then."""
    with explained(destination):
        _sync_tree(stage)
        if _present(destination):
            check_destination(destination, overwrite=overwrite, protected=protected)
            _replace_directory(stage, destination)
        else:
            _rename_new(stage, destination)
    _sync_published(destination)
    # The old one goes only when the new name is sure to be there after a power cut.
    shutil.rmtree(_old_name(destination), ignore_errors=True)


def _sync_published(destination: Path) -> None:
    try:
        sync_directory(destination.parent)
    except OSError as e:
        raise WriteFailed(
            f"{destination} is in place, but a power cut may undo that: {e.strerror}",
            hint="check the disk, then run again with --overwrite",
        ) from e


def check_space(directory: Path, needed: int, what: str) -> None:
    """Refuse what the disk has no room for, before any of it is written. Raises WriteFailed."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise WriteFailed(
            f"{what} takes {needed:,} bytes, and {directory} has {free:,} left",
            hint="make room, or name an output on another disk",
        )


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


def write(path: Path, data: bytes) -> None:
    """A new file with these bytes; see `create`."""
    with create(path) as file:
        file.write(data)


def check_destination(
    destination: Path, *, overwrite: bool, protected: tuple[Path, ...] = (), file: bool = False
) -> None:
    """Refuse a destination before any work is done; see `staged_directory`, and `staged_file` for a `file`."""
    parent = destination.parent
    if not parent.is_dir():
        raise WriteFailed(f"{parent} is not a directory", hint=f"mkdir -p {parent}")
    here = destination.resolve()
    if any(part.startswith("models--") for part in here.parts):
        raise UsageError(
            f"{destination} lies in the Hub's cache, whose files others share by links", hint="write somewhere else"
        )
    for path in (place for p in protected for place in _places(p)):
        if here == path or here in path.parents:
            raise UsageError(f"{destination} is, or holds, the input {path}", hint="write somewhere else")
        if path.is_dir() and path in here.parents:
            raise UsageError(f"{destination} lies inside the input {path}", hint="write somewhere else")
    if not _present(destination):
        return
    if destination.is_symlink() or not (destination.is_file() if file else destination.is_dir()):
        kind = "plain file" if file else "directory"
        raise DestinationExists(f"{destination} exists and is no {kind}", hint="remove it, or name another")
    if not overwrite:
        raise DestinationExists(f"{destination} exists", hint="add --overwrite to replace it")
    if file:
        return
    precious = {Path.cwd().resolve(), Path.home().resolve()}
    inside = any(here == p or here in p.parents for p in precious)
    if inside or _holds_repository(destination):
        raise UsageError(
            f"--overwrite would replace {destination}: the working directory, HOME or a repository",
            hint="write somewhere else",
        )


def _holds_repository(directory: Path) -> bool:
    def fail(e: OSError) -> None:
        # What cannot be listed may hold one.
        raise e

    return any(".git" in (*names, *files) for _, names, files in os.walk(directory, onerror=fail))


def _places(path: Path) -> Iterator[Path]:
    """Where an input really lies: the Hub's cache, for one, holds links to files that are elsewhere."""
    yield path.resolve()
    if path.is_dir():
        yield from (entry.resolve() for entry in path.iterdir() if entry.is_symlink())


def _write_failed(path: Path, e: OSError) -> WriteFailed:
    return WriteFailed(f"cannot write {path}: {e.strerror or e}", hint="nothing was changed")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system refuses into a WriteFailed that names the destination."""
    try:
        yield
    except OSError as e:
        raise _write_failed(path, e) from e


def _present(path: Path) -> bool:
    return os.path.lexists(path)


def _short(destination: Path) -> str:
    """The name, cut so that even one of 255 bytes leaves room for a prefix."""
    return os.fsencode(destination.name)[:120].decode(errors="ignore")


def _stage_name(destination: Path) -> Path:
    return destination.with_name(f"{_PREFIX}new-{os.getpid()}-{secrets.token_hex(4)}-{_short(destination)}{_SUFFIX}")


def fixed_name(destination: Path, kind: str) -> Path:
    """A temporary name beside the destination that the next run finds again."""
    tag = hashlib.sha256(os.fsencode(destination.name)).hexdigest()[:16]
    return destination.with_name(f"{_PREFIX}{kind}-{tag}-{_short(destination)}{_SUFFIX}")


def _old_name(destination: Path) -> Path:
    """Where the old directory waits while systems without an exchange put the new one in its place."""
    return fixed_name(destination, "old")


def _replace_directory(stage: Path, destination: Path) -> None:
    if _exchange(stage, destination):
        return
    old = _old_name(destination)
    destination.rename(old)
    try:
        stage.rename(destination)
    except OSError:
        old.rename(destination)
        raise


def _recover(destination: Path) -> bool:
    """Put back an old directory that a killed run had set aside. Was there one to put back?"""
    old = _old_name(destination)
    if not old.is_dir():
        return False
    if _present(destination):
        shutil.rmtree(old, ignore_errors=True)
        return False
    old.rename(destination)
    return True


def _sweep(directory: Path) -> None:
    """Remove what writers left that are dead and have written nothing for long."""
    for path in directory.glob(f"{_PREFIX}new-*{_SUFFIX}"):
        pid = path.name.removeprefix(f"{_PREFIX}new-").partition("-")[0]
        with contextlib.suppress(OSError):
            # Files too: a writer on another machine has another set of process numbers.
            newest = max(p.stat().st_mtime for p in (path, *path.rglob("*")))
            if time.time() - newest > _STALE_SECONDS and pid.isdigit() and not _alive(int(pid)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


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
        sync_directory(Path(directory))


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
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
