"""Where the bytes lie and what the keys are called: one file per container.

What an adapter lies in is found here, and what it shall be written to.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adapterpack.checkpoint import Checkpoint
from adapterpack.containers import peft
from adapterpack.errors import UsageError
from adapterpack.io import atomic

_NO_CONTAINER = (".apack", ".safetensors", ".bin", ".gguf", ".npz", ".pt", ".pth", ".ckpt")


def open_checkpoint(source: str | Path, *, subfolder: str | None = None, allow_pickle: bool = False) -> Checkpoint:
    """Open whatever `source` is; see `peft.open_adapter` for the errors."""
    return peft.open_adapter(Path(source).expanduser(), subfolder=subfolder, allow_pickle=allow_pickle)


def check_target(destination: Path, *, overwrite: bool, sources: Iterable[Path]) -> None:
    """Refuse a destination before any work is done.

    Raises:
        UsageError: its form cannot be written, or it would harm an input.
        DestinationExists: it is there.
    """
    if destination.suffix in _NO_CONTAINER:
        raise UsageError(
            f"{destination}: {destination.suffix} files cannot be written yet",
            hint="name a directory; it becomes a PEFT directory",
        )
    atomic.check_destination(destination.absolute(), overwrite=overwrite, protected=tuple(sources))


def write_checkpoint(c: Checkpoint, destination: Path, *, overwrite: bool, sources: Iterable[Path]) -> int:
    """Write a checkpoint atomically as a PEFT directory.

    Returns:
        The bytes of all files written.
    """
    with atomic.staged_directory(destination, overwrite=overwrite, protected=tuple(sources)) as stage:
        return peft.write_adapter(c, stage)


def size_of(c: Checkpoint) -> int:
    """The bytes of all files that `write_checkpoint` would write."""
    return peft.size_of(c)
