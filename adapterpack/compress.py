"""An adapter as small as it goes: as a pack, or as a PEFT directory. Here is decided which; each has its own file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterpack.containers import apack
from adapterpack.conversion import Conversion
from adapterpack.errors import UsageError
from adapterpack.pack import pack

if TYPE_CHECKING:
    from adapterpack.adapter import Progress


def compress(
    source: str | Path,
    destination: str | Path,
    *,
    lossless: bool = False,
    equivalent: bool = False,
    max_error: float | None = None,
    parent: str | Path | None = None,
    base: str | Path | None = None,
    adapter_only: bool = False,
    jobs: int | None = None,
    device: str = "cpu",
    subfolder: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the most compact PEFT directory of an adapter, or a pack.

    Args:
        source: The adapter; only read.
        destination: The new directory, or a file that ends in `.apack`.
        lossless: Keep every tensor and file as it is; a pack does so unless told otherwise.
        equivalent: The same change of W in the most compact encoding; a directory does so unless told otherwise.
        max_error: Go on to lower ranks and 16-bit casts, in a pack to quantised values, as far as this allows.
        parent: Of a lossless pack: the checkpoint before this one; see `pack`.
        base: Saved embeddings that equal this base's are left out; a lossless pack refers to them.
        adapter_only: Of a lossless pack: leave the training state out.
        jobs: Of a pack: threads; None: one for each core, four at most.
        dry_run: Measure only; nothing is written.

    Raises:
        UsageError: options that exclude each other.
        See `convert` and `pack` for the rest.
    """
    target = Path(destination).expanduser()
    _check_options(target, lossless, equivalent, max_error, parent, adapter_only)
    if target.suffix == apack.SUFFIX and not equivalent and max_error is None:
        return pack(
            source,
            target,
            parent=parent,
            base=base,
            adapter_only=adapter_only,
            subfolder=subfolder,
            jobs=jobs,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    # Late: a pack of files needs none of the maths.
    from adapterpack.shrink import shrink

    return shrink(
        source,
        target,
        lossless=lossless,
        max_error=max_error,
        base=base,
        device=device,
        subfolder=subfolder,
        allow_pickle=allow_pickle,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
    )


def _check_options(
    target: Path,
    lossless: bool,
    equivalent: bool,
    max_error: float | None,
    parent: str | Path | None,
    adapter_only: bool,
) -> None:
    if lossless + equivalent + (max_error is not None) > 1:
        raise UsageError("--lossless, --equivalent and --max-error exclude each other")
    lossless_pack = target.suffix == apack.SUFFIX and not equivalent and max_error is None
    if (parent is not None or adapter_only) and not lossless_pack:
        raise UsageError(
            "--parent and --adapter-only go with a lossless pack",
            hint="name a DST that ends in .apack, without --equivalent and --max-error",
        )
