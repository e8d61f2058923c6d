"""The pack, `.apack`: one file that gives an adapter back (`formats/apack/SPEC.md`).

`file` is the outer shape, `manifest` and `layout` say what lies where, `reader` and `opening` read,
`placing`, `choosing` and `writer` write.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterpack.checkpoint import Checkpoint
from adapterpack.containers.apack.file import SUFFIX, is_pack
from adapterpack.io import cores
from adapterpack.io.files import OpenFile
from adapterpack.tensor import Source

if TYPE_CHECKING:
    from adapterpack.adapter import Progress
    from adapterpack.containers.apack.facts import Facts, References
    from adapterpack.containers.apack.manifest import Manifest, place_name
    from adapterpack.containers.apack.opening import OpenAdapter, Where, base_tensors
    from adapterpack.containers.apack.reader import Pack, parents

__all__ = [
    "SUFFIX",
    "Facts",
    "Manifest",
    "Pack",
    "References",
    "Where",
    "base_tensors",
    "is_pack",
    "parents",
    "place_name",
]

_HOMES = {
    "Facts": "facts",
    "Manifest": "manifest",
    "Pack": "reader",
    "References": "facts",
    "Where": "opening",
    "base_tensors": "opening",
    "parents": "reader",
    "place_name": "manifest",
}
"""Loaded when they are asked for: they bring numpy along, and who looks at a directory needs none of it."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def open_pack(
    place: Path | OpenFile,
    *,
    parent: Path | None = None,
    base: Where = None,
    depth: int = 0,
    opaque: bool = False,
    opener: OpenAdapter,
) -> Checkpoint:
    """Open a pack as the checkpoint that it restores; its `pack` is the pack itself. See `opening` for the errors."""
    from adapterpack.containers.apack import opening

    # Parent and base are opened when they are needed: they go onto this stack, which the checkpoint closes.
    stack = ExitStack()
    try:
        pack = opening.open_pack(place, stack, parent=parent, base=base, depth=depth, opener=opener)
        return replace(opening.checkpoint(pack, stack, opaque=opaque), pack=pack)
    except BaseException:
        stack.close()
        raise


def write_pack(
    c: Checkpoint,
    destination: Path,
    files: Mapping[str, Source],
    facts: Facts,
    references: References,
    *,
    overwrite: bool,
    protected: tuple[Path, ...],
    jobs: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> tuple[Manifest, int]:
    """Write an adapter as a pack; see `writer.write`. `jobs` None: one for each core."""
    # Later still: who only reads packs needs no methods.
    from adapterpack.containers.apack import writer

    return writer.write(
        c,
        destination,
        dict(files),
        facts,
        references,
        overwrite=overwrite,
        protected=protected,
        jobs=jobs or cores.usable(),
        dry_run=dry_run,
        progress=progress,
    )
