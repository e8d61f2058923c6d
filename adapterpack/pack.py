"""An adapter directory as one file, byte for byte: what `compress` does where the destination is a pack."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterpack import containers, limits, methods, sources
from adapterpack.checkpoint import Checkpoint
from adapterpack.containers import apack, peft
from adapterpack.containers.apack.manifest import Parent
from adapterpack.conversion import Conversion, inputs
from adapterpack.errors import AdapterpackError, UsageError
from adapterpack.io.paths import plain_name
from adapterpack.tensor import Source

if TYPE_CHECKING:
    from adapterpack.adapter import Progress

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def pack(
    source: str | Path,
    destination: str | Path,
    *,
    parent: str | Path | None = None,
    base: str | Path | None = None,
    adapter_only: bool = False,
    subfolder: str | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write a pack from which `unpack` restores every file of an adapter directory byte for byte.

    Args:
        source: The adapter, of any method; only read. A pack is packed anew.
        destination: The new file.
        parent: An earlier checkpoint of the same run, or a sibling, directory or pack: what equals it is not stored,
            what is near to it is stored as the difference. Unpacking needs it again.
        base: A base model: tensors that equal one of its own are not stored. Unpacking needs it again.
        adapter_only: Leave the training state out.
        jobs: Threads; None: one for each core, four at most.
        dry_run: Code everything, write nothing.

    Raises:
        UsageError: too long a chain of parents, or a destination that would harm an input.
        See `containers.open_checkpoint` and `containers.apack.write_pack` for the rest.
    """
    target = Path(destination).expanduser()
    source, parent = sources.here(source, subfolder), None if parent is None else sources.here(parent)
    protected = inputs(source, base, parent)
    containers.check_target(target, overwrite=overwrite, sources=protected)
    with ExitStack() as stack:
        c = stack.enter_context(
            containers.open_checkpoint(
                source, subfolder=subfolder, parent=parent, base=sources.base(base), opaque=True
            )
        )
        references = find_references(stack, parent, base)
        files, dropped = _files(c, adapter_only)
        method, encoding = _names(c)
        facts = _facts(c, method, encoding, dropped)
        manifest, size = apack.write_pack(
            c,
            target,
            files,
            facts,
            references,
            overwrite=overwrite,
            protected=protected,
            jobs=jobs,
            dry_run=dry_run,
            progress=progress,
        )
        return Conversion(
            output=str(target),
            method=method,
            encoding=encoding,
            bytes_in=c.bytes,
            bytes_out=size,
            grade=facts.grade,
            dropped=facts.dropped,
            max_rel_error=float(facts.error or 0),
            notes=(*_warnings(files), *reference_notes(manifest, references)),
        )


def find_references(stack: ExitStack, parent: str | Path | None, base: str | Path | None) -> apack.References:
    """What was named as parent and base, opened.

    Raises:
        UsageError: the parent is the last of too long a chain.
    """
    found = apack.References()
    if parent is not None:
        before = stack.enter_context(containers.open_checkpoint(parent, base=sources.base(base)))
        packed = before.pack
        own = packed.manifest.parent if packed is not None else None
        depth = 1 if own is None else own.depth + 1
        if depth > limits.PARENTS:
            raise UsageError(
                f"{parent} is the last of {limits.PARENTS} packs, each the parent of another",
                hint="pack this one without --parent, and go on from it",
            )
        name = plain_name(Path(parent).expanduser().resolve().name, "--parent")
        found = replace(found, parent=Parent(name, before.digest(), depth), parent_tensors=before.tensors)
    if base is not None:
        tensors = apack.base_tensors(sources.base_here(base), stack)
        found = replace(found, base=str(base), base_tensors=tensors)
    return found


def _files(c: Checkpoint, adapter_only: bool) -> tuple[dict[str, Source], tuple[str, ...]]:
    """The files to carry, and in words what is left out."""
    state = {} if adapter_only else dict(c.state)
    if c.tensors and peft.WEIGHTS in state:
        # The source was named as one file: another adapter's weights lie beside it.
        del state[peft.WEIGHTS]
    inside = {path.partition("/")[0] + "/" for path in state if "/" in path}
    left = [name for name in c.left if name not in state and name not in inside]
    # Of a folder that is left as a whole nothing else need be said.
    left += [name for name in c.lost if name.partition("/")[0] + "/" not in left]
    return {**c.files, **state}, tuple(f"{'folder' if n.endswith('/') else 'file'} {n}" for n in left)


def _names(c: Checkpoint) -> tuple[str, str | None]:
    """Method and encoding, as far as they are known."""
    try:
        _, adapter = methods.parse(c)
    except AdapterpackError:
        return c.peft_type.lower(), None
    return adapter.method, adapter.encoding


def _facts(c: Checkpoint, method: str, encoding: str | None, dropped: tuple[str, ...]) -> apack.Facts:
    """What was lost so far: nothing, unless the source is a pack that says so."""
    facts = apack.Facts(method, encoding, "lossless", c.bytes, dropped=dropped)
    return facts if c.pack is None else facts.following(c.pack.manifest)


def _warnings(files: dict[str, Source]) -> tuple[str, ...]:
    pickles = [path for path in files if Path(path).suffix in _PICKLES]
    if not pickles:
        return ()
    return (f"pickles, packed as bytes and never opened: {', '.join(pickles)}",)


def reference_notes(manifest: apack.Manifest, references: apack.References) -> tuple[str, ...]:
    """What unpacking will need; and what was named in vain."""
    notes = []
    if manifest.parent is not None:
        notes.append(f"unpacking needs the parent {manifest.parent.name}, beside the pack or named with --parent")
    elif references.parent is not None:
        notes.append("nothing was gained by --parent: the pack stands alone")
    if manifest.base is not None:
        notes.append(f"unpacking needs the base {manifest.base}")
    elif references.base is not None:
        notes.append("no tensor equals one of the base's: the pack stands without it")
    return tuple(notes)
