"""The files of a base that go with the merged model as they are: configs, tokenizers, texts, code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from adapterpack import lineage
from adapterpack.base import INDEX, MODELOPT, Base
from adapterpack.errors import InvalidFile
from adapterpack.io import atomic
from adapterpack.io.files import WholeFile
from adapterpack.tensor import chunks

_OTHER_WEIGHTS = {
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".keras",
    ".msgpack",
    ".npz",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pb",
    ".pkl",
    ".pickle",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
    ".xml",
}
"""Weights in other forms would be those of the base: they are left out and named."""
_NEVER_CARRIED = {".git", ".cache", "__pycache__", lineage.NAME}
"""Of a base's own lineage the new one tells."""


def is_other_weights(path: str) -> bool:
    """Does a file hold weights, by its name?"""
    return Path(path).suffix in _OTHER_WEIGHTS


def others(base: Base, *, requantise: bool = False) -> tuple[dict[str, WholeFile], list[str]]:
    """Every file that is carried, by path below the base, and the names of those that are not."""
    carried: dict[str, WholeFile] = {}
    left: list[str] = []
    for path in _walk(base.path, (base.path.resolve(),)):
        name = path.relative_to(base.path).as_posix()
        if name in base.shards:
            continue
        if not path.exists():
            raise InvalidFile(f"{path} is a link that leads nowhere", hint="remove it from the base")
        other_index = name.endswith(".index.json") and name != INDEX
        if is_other_weights(name) or other_index or (name == MODELOPT and not requantise):
            left.append(name)
        else:
            if not path.is_file():
                raise InvalidFile(f"{path} is not a regular file")
            carried[name] = WholeFile(path, path.stat().st_size)
    return carried, left


def _walk(directory: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """All files below a directory; links are followed, but never round in a circle."""
    for entry in sorted(directory.iterdir()):
        if entry.name in _NEVER_CARRIED:
            continue
        if not entry.is_dir():
            yield entry
        elif entry.resolve() not in above:
            yield from _walk(entry, (*above, entry.resolve()))


def carry(files: Mapping[str, WholeFile], stage: Path, *, skip: set[str]) -> None:
    """Copy files into a staged directory, but for those that are written anew."""
    for name, source in files.items():
        if name in skip:
            continue
        target = stage / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic.create(target) as out:
            for chunk in chunks(source):
                out.write(chunk)
