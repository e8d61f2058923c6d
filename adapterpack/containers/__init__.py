"""Where the bytes lie and what the keys are called: one file per container.

What an adapter lies in is found here, and what it shall be written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from adapterpack.checkpoint import Checkpoint
from adapterpack.containers import apack, peft, vblora_original
from adapterpack.errors import Unsupported, UsageError
from adapterpack.io import atomic
from adapterpack.io.files import Folder

_NO_CONTAINER = (".safetensors", ".bin", ".gguf", ".npz", ".pt", ".pth", ".ckpt")


def open_checkpoint(
    source: str | Path,
    *,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    parent: str | Path | None = None,
    base: apack.Where = None,
    opaque: bool = False,
    foreign: bool = False,
) -> Checkpoint:
    """Open whatever `source` is.

    Args:
        source: A PEFT directory, a `.safetensors` file with its config beside it, or a pack.
        subfolder: Which adapter of several.
        allow_pickle: Read adapter_model.bin, tensors only, where no safetensors file is.
        parent: Where a pack finds the one that it is a difference to; None: beside it.
        base: Where a pack finds tensors of its base, or what finds that when it is needed; None: where it says.
        opaque: The files are enough, without any tensors.
        foreign: May it be what other code than PEFT wrote? Its files are not those that PEFT would read.

    Raises:
        Unsupported: it is foreign, and may not be.
        See `peft.open_adapter` and `apack.open_pack`.
    """
    path = Path(source).expanduser()
    if apack.is_pack(path):
        if subfolder is not None:
            raise UsageError("--subfolder goes with a directory, not with a pack")
        given = None if parent is None else Path(parent).expanduser()
        return _open(path, parent=given, base=base, opaque=opaque)
    if subfolder is None and vblora_original.is_one(path):
        if not foreign:
            raise Unsupported(
                f"{path} is a whole model of VB-LoRA's own code",
                hint="adapterpack convert SRC DST --to full-logits makes a PEFT directory of what was trained",
            )
        return vblora_original.open_original(path, allow_pickle=allow_pickle)
    return peft.open_adapter(path, subfolder=subfolder, allow_pickle=allow_pickle, opaque=opaque)


def _open(path: Path, *, parent: Path | None, base: apack.Where, depth: int = 0, opaque: bool = False) -> Checkpoint:
    """A pack, or the directory that is a pack's parent."""
    if not apack.is_pack(path):
        return peft.open_adapter(path)
    return apack.open_pack(path, parent=parent, base=base, depth=depth, opaque=opaque, opener=_open)


def open_remote(folder: Folder, sizes: Mapping[str, int], *, opaque: bool = False) -> Checkpoint:
    """Open an adapter of a repository from its headers: the pack in that folder, or the files as PEFT wrote them.

    Args:
        folder: Gives its files by name.
        sizes: Name of each file that is directly in it, to its bytes.
        opaque: The files are enough, without any tensors.

    Raises:
        See `peft.open_remote` and `apack.open_pack`.
    """
    packs = [name for name in sizes if name.endswith(apack.SUFFIX)]
    if peft.CONFIG not in sizes and len(packs) == 1:
        return replace(apack.open_pack(folder.open(packs[0]), opaque=opaque, opener=_open), at_hand=False)
    return replace(peft.open_remote(folder, sizes, opaque=opaque), at_hand=False)


def check_target(destination: Path, *, overwrite: bool, sources: Iterable[Path]) -> None:
    """Refuse a destination before any work is done.

    Raises:
        UsageError: its form cannot be written, or it would harm an input.
        DestinationExists: it is there.
    """
    if destination.suffix in _NO_CONTAINER:
        raise UsageError(
            f"{destination}: {destination.suffix} files cannot be written yet",
            hint="name a directory, which becomes a PEFT directory, or a .apack, which becomes a pack",
        )
    packed = destination.suffix == apack.SUFFIX
    atomic.check_destination(destination.absolute(), overwrite=overwrite, protected=tuple(sources), file=packed)


def write_checkpoint(
    c: Checkpoint,
    destination: Path,
    *,
    overwrite: bool,
    sources: Iterable[Path],
    facts: apack.Facts | None = None,
    dry_run: bool = False,
) -> int:
    """Write a checkpoint atomically, as a PEFT directory or as a pack.

    Args:
        c: With the files that it carries.
        facts: What a pack shall say of its making; None: that nothing was lost.
        dry_run: Write nothing.

    Returns:
        The bytes of all files written, or of those that would be.
    """
    protected = tuple(sources)
    if destination.suffix == apack.SUFFIX:
        said = facts or apack.Facts(c.peft_type.lower(), None, "lossless", c.bytes)
        none = apack.References()
        _, size = apack.write_pack(
            c, destination, c.files, said, none, overwrite=overwrite, protected=protected, dry_run=dry_run
        )
        return size
    if dry_run:
        return peft.size_of(c)
    with atomic.staged_directory(destination, overwrite=overwrite, protected=protected) as stage:
        return peft.write_adapter(c, stage)


def size_of(c: Checkpoint) -> int:
    """The bytes of all files that `write_checkpoint` would write as a PEFT directory."""
    return peft.size_of(c)
