"""The PEFT directory: adapter_config.json beside adapter_model.safetensors (`formats/peft/SPEC.md`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from adapterpack import limits
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, PickleRefused, UsageError
from adapterpack.io import atomic, safetensors
from adapterpack.io import json as strict_json
from adapterpack.io.files import FileIn, Folder, WholeFile
from adapterpack.tensor import Source, chunks

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_CARRIED_SUFFIXES = frozenset(
    (".json", ".jsonl", ".jinja", ".md", ".model", ".spm", ".tiktoken", ".toml", ".txt", ".vocab", ".yaml", ".yml")
)
_CARRIED_NAMES = {"LICENSE", "NOTICE", ".gitattributes"}
MANIFEST = "adapterpack_manifest.json"
"""What `push` says of the files of a repository: true of them alone, so no conversion carries it."""
_NOT_CARRIED = {"trainer_state.json", MANIFEST}
_TRAINER_STEP = re.compile(r"checkpoint-\d+")


def open_adapter(
    path: Path, *, subfolder: str | None = None, allow_pickle: bool = False, opaque: bool = False
) -> Checkpoint:
    """Open a PEFT directory, or one `.safetensors` file with its config beside it.

    Args:
        path: The directory or file.
        subfolder: Which adapter of several; `.` is the one at the top.
        allow_pickle: Read adapter_model.bin, tensors only, where no safetensors file is.
        opaque: Without a safetensors file the files are enough: no tensors, and pickles are bytes like others.

    Raises:
        InvalidFile: it is not there, malformed, or no regular file.
        UsageError: several adapters and no `subfolder`.
        PickleRefused: the weights are a pickle and that was not allowed.
    """
    weights_name = WEIGHTS
    if path.suffix == ".safetensors" and path.is_file():
        path, weights_name = path.parent, path.name
        if subfolder is not None:
            raise UsageError("--subfolder goes with a directory, not with a file")
    elif not path.is_dir():
        raise InvalidFile(_absent(path))
    else:
        path = _choose(path, subfolder)
    return _open(
        Folder(path),
        weights_name,
        lambda c: _with_others(c, path, weights_name),
        allow_pickle=allow_pickle,
        opaque=opaque,
    )


def open_remote(folder: Folder, sizes: Mapping[str, int], *, opaque: bool = False) -> Checkpoint:
    """Open an adapter whose directory cannot be listed: a folder of a repository on the Hub.

    Args:
        folder: Gives its files by name.
        sizes: Name of each file that is directly in it, to its bytes.
        opaque: As in `open_adapter`.

    Raises:
        As `open_adapter` does.
    """
    files: dict[str, Source] = {}
    state: dict[str, Source] = {}
    for name, size in sorted(sizes.items()):
        if name not in (CONFIG, WEIGHTS):
            (files if is_carried(name, size) else state)[name] = FileIn(folder, name, size)
    total = sum(sizes.values())

    def beside(c: Checkpoint) -> Checkpoint:
        return replace(c, files=files, state=state, left=tuple(state), bytes=total)

    return _open(folder, WEIGHTS, beside, allow_pickle=False, opaque=opaque)


def _open(
    folder: Folder,
    weights_name: str,
    beside: Callable[[Checkpoint], Checkpoint],
    *,
    allow_pickle: bool,
    opaque: bool,
) -> Checkpoint:
    path = folder.path
    config_path = path / CONFIG
    if not folder.has(CONFIG):
        raise InvalidFile(
            f"{path} is no adapter: it has no {CONFIG}",
            hint="name the directory that PEFT's save_pretrained wrote",
        )
    config_bytes = folder.read_small(CONFIG, limits.CONFIG_BYTES)
    config = strict_json.parse(config_bytes, str(config_path))
    if not isinstance(config.get("peft_type"), str):
        raise InvalidFile(f"{config_path} does not say its peft_type", hint="PEFT writes it; restore the file")
    found = beside(Checkpoint(str(path), config, {}, config_bytes=config_bytes))
    if not folder.has(weights_name):
        return found if opaque and found.state else _pickle(folder, found, allow_pickle)
    file = folder.open(weights_name)
    try:
        header = safetensors.read(file)
    except BaseException:
        file.close()
        raise
    return replace(
        found,
        tensors=header.tensors,
        metadata=header.metadata,
        weights=file.whole(),
        on_close=(file.close,),
        still_same=file.check_unchanged,
    )


def _absent(path: Path) -> str:
    if path.exists():
        return f"{path} is no directory and no .safetensors file"
    return f"no such file or directory: {path}"


def _choose(path: Path, subfolder: str | None) -> Path:
    if subfolder is not None:
        chosen = path / subfolder
        if not chosen.resolve().is_relative_to(path.resolve()):
            raise UsageError(f"--subfolder {subfolder} leads out of {path}")
        if not chosen.is_dir():
            raise UsageError(f"{path} has no subfolder {subfolder}", hint=_list(_adapters(path)))
        return chosen
    below = _adapters(path)
    if not below:
        return path
    # The Trainer writes its steps below the final adapter: those are history, not other adapters.
    here = (path / CONFIG).exists()
    others = [name for name in below if not (here and _TRAINER_STEP.fullmatch(name))]
    if not others:
        return path
    found = (["."] if here else []) + others
    raise UsageError(f"{path} holds {len(found)} adapters", hint=_list(found))


def _list(names: list[str]) -> str | None:
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"choose one with --subfolder: {shown}" if names else None


def _adapters(path: Path) -> list[str]:
    return [d.name for d in _entries(path) if d.is_dir() and (d / CONFIG).is_file()]


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError as e:
        raise InvalidFile(f"cannot read {directory}: {e.strerror}") from e


def is_carried(path: str, size: int) -> bool:
    """Is this a card, a tokenizer or a text, which conversions carry along?"""
    name, suffix = path.rpartition("/")[2], Path(path).suffix
    text = suffix in _CARRIED_SUFFIXES or name in _CARRIED_NAMES
    index = name.endswith(".safetensors.index.json")
    nested = "/" in path
    return text and not index and not nested and size <= limits.CARRIED_BYTES and name not in _NOT_CARRIED


def _with_others(c: Checkpoint, path: Path, weights_name: str) -> Checkpoint:
    """The checkpoint with what lies beside its config and its weights."""
    files: dict[str, Source] = {}
    state: dict[str, Source] = {}
    left: list[str] = []
    lost: list[str] = []
    total = 0
    for entry in _entries(path):
        if entry.is_dir():
            left.append(entry.name + "/")
            state.update(_nested(entry, entry.name, lost))
            continue
        if not entry.is_file():
            left.append(entry.name)
            continue
        found = WholeFile.seen(entry)
        size = found.nbytes
        total += size
        if entry.name in (CONFIG, weights_name):
            continue
        if is_carried(entry.name, size):
            files[entry.name] = found
        else:
            state[entry.name] = found
            left.append(entry.name)
    return replace(c, files=files, state=state, left=tuple(left), lost=tuple(lost), bytes=total)


def _nested(directory: Path, name: str, lost: list[str]) -> Iterator[tuple[str, Source]]:
    """The files of a folder, unless it is another adapter or leads elsewhere; `lost` gets what is not."""
    entries = [] if directory.is_symlink() or (directory / CONFIG).exists() else _entries(directory)
    if not entries:
        lost.append(name + "/")
    for entry in entries:
        if entry.is_dir():
            yield from _nested(entry, f"{name}/{entry.name}", lost)
        elif entry.is_file():
            yield f"{name}/{entry.name}", WholeFile.seen(entry)
        else:
            lost.append(f"{name}/{entry.name}")


def _pickle(folder: Folder, found: Checkpoint, allow: bool) -> Checkpoint:
    path = folder.path
    source = path / PICKLE
    if not folder.has(PICKLE):
        raise InvalidFile(f"{path} has no {WEIGHTS}", hint="name the directory that PEFT's save_pretrained wrote")
    if not allow:
        raise PickleRefused(
            f"{source} is a pickle, which can run code when it is loaded",
            hint="ask its author for safetensors, or read the tensors alone with --allow-pickle",
        )
    # Late: what starts processes takes long to load, and few need it.
    from adapterpack.containers import pickled

    return replace(
        found,
        tensors=pickled.read(source),
        state={name: kept for name, kept in found.state.items() if name != PICKLE},
        left=tuple(name for name in found.left if name != PICKLE),
    )


def _config(c: Checkpoint) -> bytes:
    return c.config_bytes if c.config_bytes is not None else strict_json.dump(dict(c.config))


def _metadata(c: Checkpoint) -> dict[str, str]:
    return {"format": "pt", **c.metadata}


def size_of(c: Checkpoint) -> int:
    """The bytes of all files that `write_adapter` would write."""
    if c.weights is not None:
        weights = c.weights.nbytes
    else:
        ordered = [(name, c.tensors[name]) for name in safetensors.order(c.tensors)]
        weights = len(safetensors.header_bytes(ordered, _metadata(c))) + sum(t.nbytes for _, t in ordered)
    return weights + len(_config(c)) + sum(source.nbytes for source in c.files.values())


def write_adapter(c: Checkpoint, directory: Path) -> int:
    """Write a checkpoint into a staged directory, byte for byte where nothing changed.

    Returns:
        The bytes of all files.

    Raises:
        ChangedWhileReading: an input changed meanwhile; nothing of it may be published.
        WriteFailed: the system refuses.
    """
    atomic.write(directory / CONFIG, _config(c))
    with atomic.create(directory / WEIGHTS) as out:
        if c.weights is not None:
            for chunk in chunks(c.weights):
                out.write(chunk)
        else:
            safetensors.write(out, c.tensors, _metadata(c))
    for name, source in c.files.items():
        with atomic.explained(directory / name):
            (directory / name).parent.mkdir(exist_ok=True)
        with atomic.create(directory / name) as out:
            for chunk in chunks(source):
                out.write(chunk)
    c.still_same()
    return sum(entry.stat().st_size for entry in directory.rglob("*") if entry.is_file())
