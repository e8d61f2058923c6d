"""Where an input lies: a local path, or a repository of the Hub, of which what is needed is fetched.

A reference becomes a path into the Hub's cache before a job begins; jobs know paths alone. Where headers are enough,
they are read from the Hub, and nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from adapterpack import base_files, containers, hub, limits
from adapterpack.base import CONFIG, INDEX, SINGLE, Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.containers import apack, peft
from adapterpack.errors import InvalidFile, PickleRefused, UsageError
from adapterpack.io import json as strict_json
from adapterpack.io.files import Folder, OpenFile

_NOT_FETCHED = {".gitattributes"}


def here(source: str | Path, subfolder: str | None = None, *, cached: bool = False) -> Path:
    """The local path of an adapter; of a reference, that in the Hub's cache, once all that is needed is there.

    Args:
        subfolder: Which adapter of several; `open_checkpoint` wants it again.
        cached: Look in the Hub's cache only.

    Raises:
        HubError: it cannot be had.
        InvalidFile, PickleRefused, UsageError: no adapter is there, only a pickle, or several.
    """
    reference = hub.find(source)
    if reference is None:
        return Path(source).expanduser()
    snapshot = hub.look_up(reference, explicit=is_explicit(source), cached=cached)
    place = snapshot.reference.path
    folder = snapshot.reference.below(subfolder).path
    wanted = needed(snapshot, folder)
    top = snapshot.fetch([join(folder, name) for name in wanted])
    if any(name.endswith(apack.SUFFIX) for name in wanted):
        pack = next(name for name in wanted if name.endswith(apack.SUFFIX))
        fetch_parents(snapshot, top / join(folder, pack))
        return top / join(folder, pack)
    return top / place


def name_of(source: str | Path) -> str:
    """What a config calls a base: `org/name` of a reference, else the path."""
    reference = hub.find(source)
    return str(source) if reference is None else reference.repo


def is_explicit(source: str | Path) -> bool:
    """Does it say itself that it is on the Hub?"""
    return str(source).startswith("hf://")


def needed(snapshot: hub.Snapshot, folder: str) -> list[str]:
    """The files of an adapter in a folder of a repository; or the pack, where one is all that there is.

    Raises:
        InvalidFile: no adapter is there.
        PickleRefused: its weights are a pickle: that is not even fetched.
        UsageError: several are there.
    """
    where = hub.Reference(snapshot.reference.repo, snapshot.reference.revision, folder)
    if folder.endswith(apack.SUFFIX) and folder in snapshot.files:
        return [""]
    files = snapshot.inside(folder)
    packs = [name for name in files if name.endswith(apack.SUFFIX)]
    if peft.CONFIG in files:
        if peft.WEIGHTS in files:
            return [n for n, f in files.items() if n in (peft.CONFIG, peft.WEIGHTS) or _goes_along(n, f.size)]
        if peft.PICKLE in files:
            raise PickleRefused(
                f"{where} has its weights as a pickle alone, which can run code when it is loaded",
                hint="ask its author for safetensors; pickles are not fetched",
            )
        if not packs:
            raise InvalidFile(f"{where} has no {peft.WEIGHTS}")
    if len(packs) == 1:
        return packs
    start = f"{folder}/" if folder else ""
    below = sorted(n[len(start) :].rpartition("/")[0] for n in snapshot.files if _is_adapter(n, start))
    if packs or below:
        shown = ", ".join([*packs, *below][:20])
        raise UsageError(f"{where} holds {len(packs) + len(below)} adapters", hint=f"add one to the name: {shown}")
    hint = f"it is a model; name it where a base is wanted: {where}" if CONFIG in files else None
    raise InvalidFile(f"{where} is no adapter: it has no {peft.CONFIG} and no {apack.SUFFIX}", hint=hint)


def _is_adapter(path: str, start: str) -> bool:
    return path.startswith(start) and path.endswith(f"/{peft.CONFIG}") and path != f"{start}{peft.CONFIG}"


def _goes_along(name: str, size: int) -> bool:
    return name == peft.MANIFEST or (peft.is_carried(name, size) and name not in _NOT_FETCHED)


def join(folder: str, name: str) -> str:
    """A path in a repository; either part may be empty."""
    return "/".join(part for part in (folder, name) if part)


def fetch_parents(snapshot: hub.Snapshot, pack: Path) -> None:
    """Have the packs that one is a difference to beside it, as far as the repository has them there."""
    folder = pack.parent.relative_to(snapshot.folder).as_posix().removeprefix(".")
    for _ in range(limits.PARENTS):
        with OpenFile(pack) as file:
            parent = apack.Pack(file).manifest.parent
        if parent is None:
            return
        path = join(folder, parent.name)
        if path not in snapshot.files:
            return
        pack = snapshot.fetch([path]) / path


def headers(source: str | Path, subfolder: str | None = None, *, opaque: bool = False) -> Checkpoint | None:
    """An adapter on the Hub, opened from its headers: no values are fetched until one is read. None: it is local.

    Raises:
        As `here` does.
    """
    reference = hub.find(source)
    if reference is None:
        return None
    snapshot = hub.look_up(reference.below(subfolder), explicit=is_explicit(source))
    place = PurePosixPath(snapshot.reference.path)
    if place.suffix == apack.SUFFIX:
        inside = hub.Reference(reference.repo, snapshot.commit, "" if str(place.parent) == "." else str(place.parent))
        folder = hub.RemoteFolder(hub.Snapshot(inside, snapshot.files))
        return containers.open_remote(folder, {place.name: snapshot.files[str(place)].size}, opaque=opaque)
    needed(snapshot, snapshot.reference.path)
    folder = hub.RemoteFolder(snapshot)
    return containers.open_remote(folder, folder.sizes(), opaque=opaque)


# -- bases -------------------------------------------------------------------------------------------------


def base(reference: str | Path | None) -> Callable[[], Path] | None:
    """Finds the base that was named, when a pack needs it; None: none was."""
    return None if reference is None else lambda: base_here(reference)


def base_here(source: str | Path) -> Path:
    """The directory of a base with its weights: a local one, or that of a repository in the Hub's cache.

    What is missing there is fetched: configs, tokenizer, texts and the safetensors shards, nothing else.

    Raises:
        HubError: it cannot be had.
        InvalidFile: it has no safetensors file.
    """
    reference = hub.find(source)
    if reference is None:
        return _local(source)
    snapshot = hub.look_up(reference, explicit=is_explicit(source))
    folder = snapshot.reference.path
    files = snapshot.inside(folder)
    wanted = []
    if INDEX in files:
        at = snapshot.fetch([join(folder, INDEX)]) / join(folder, INDEX)
        listed = strict_json.read(at, limits.INDEX_BYTES).get("weight_map")
        names = set(listed.values()) if isinstance(listed, dict) else set()
        wanted = [name for name in files if name in names]
    elif SINGLE in files:
        wanted = [SINGLE]
    if not wanted and peft.CONFIG in files:
        raise InvalidFile(f"{snapshot.reference} is an adapter, not a base model")
    start = f"{folder}/" if folder else ""
    texts = [n for n in snapshot.files if n.startswith(start) and _goes_with_base(n[len(start) :])]
    # Files are proven as they arrive; to hash a whole model again and again would take longer than to merge it.
    top = snapshot.fetch([*texts, *(join(folder, name) for name in wanted)], prove=False)
    return top / folder


def _goes_with_base(path: str) -> bool:
    hidden = any(part.startswith(".") for part in path.split("/"))
    return not hidden and path != INDEX and not base_files.is_other_weights(path)


def base_at_hand(source: str, commit: str | None = None) -> Path:
    """The directory of a base that is local or in the Hub's cache already.

    Args:
        commit: Of its repository; None: the one that was fetched last.

    Raises:
        HubError, InvalidFile: it is not.
    """
    reference = hub.find(source)
    if reference is None:
        return _local(source)
    wanted = reference if commit is None else reference.at(commit)
    snapshot = hub.look_up(wanted, explicit=is_explicit(source), cached=True)
    return snapshot.folder / snapshot.reference.path


def _local(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        raise InvalidFile(f"no such directory: {path}", hint="a base is a directory, or org/name on the Hub")
    return path


def base_headers(source: str | Path) -> Path | Folder:
    """A base whose names and shapes are wanted: a local directory, or a repository whose headers are read.

    Raises:
        HubError: it cannot be had.
    """
    reference = hub.find(source)
    if reference is None:
        return _local(source)
    return hub.RemoteFolder(hub.look_up(reference, explicit=is_explicit(source)))


def open_base(source: str | Path | None, stack: ExitStack) -> Base | None:
    """A base with its weights at hand, opened; None: none was named."""
    return None if source is None else stack.enter_context(Base(base_here(source)))


def is_model(path: Path) -> bool:
    """Is it the directory of a model, with its config and weights?"""
    return (path / CONFIG).exists() and ((path / SINGLE).exists() or (path / INDEX).exists())


def model_here(source: str | Path) -> Path:
    """The local path of what may be a merged model or an adapter.

    Raises:
        As `here` and `base_here` do.
    """
    reference = hub.find(source)
    if reference is None:
        return Path(source).expanduser()
    files = hub.look_up(reference, explicit=is_explicit(source)).inside(reference.path)
    is_model = CONFIG in files and (SINGLE in files or INDEX in files)
    return base_here(source) if is_model else here(source)
