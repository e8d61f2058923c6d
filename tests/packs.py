"""Packs put together and taken apart by hand, to be sealed whatever they say. Nothing here is adapterpack's.

What the packs mean is in formats/apack/SPEC.md.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import apack_decoder
import numpy as np
import zstandard

Manifest = dict[str, Any]
CONFIG = b'{"peft_type": "OTHER", "r": 4}'
LORA = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"]}'
CARD = b"# A card\nof a few words, of a few words\n"
NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def zstd(data: bytes, dictionary: bool = False, level: int = 19, **more: Any) -> bytes:
    raw = zstandard.ZstdCompressionDict(apack_decoder.DICTIONARY, zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdCompressor(level=level, dict_data=raw if dictionary else None, **more).compress(data)


def seal(manifest: Manifest | bytes, frames: Iterable[bytes], **parts: bytes) -> bytes:
    """A pack whose seal and digests are right, whatever it says. `parts` replace what is computed.

    Args:
        manifest: Not canonical if given as bytes that are not.
        parts: `packed`, the manifest as stored; `digests`.
    """
    text = manifest if isinstance(manifest, bytes) else apack_decoder.canonical(manifest)
    stored = list(frames)
    packed = parts.get("packed", zstd(text, dictionary=True))
    digests = parts.get("digests", b"".join(hashlib.sha256(frame).digest() for frame in stored))
    blob = b"".join(stored)
    header = apack_decoder.frame_header(len(blob), len(digests), len(packed))
    return header + blob + digests + packed + hashlib.sha256(header + digests + packed).digest()


def take_apart(data: bytes) -> tuple[Manifest, list[bytes]]:
    """The manifest and the frames as stored."""
    manifest, blob, _ = apack_decoder.manifest_of(data)
    frames, at = [], 0
    for stream in manifest["streams"]:
        for _, *pairs in stream["frames"]:
            frames.append(blob[at : at + sum(pairs[1::2])])
            at += sum(pairs[1::2])
    return manifest, frames


class Maker:
    """A pack in the making: streams first, then tensors and files in their order."""

    def __init__(self, **fields: Any) -> None:
        self.frames: list[bytes] = []
        self.weights = b""
        self.manifest: Manifest = {
            "apack": 1,
            "producer": "by hand",
            "method": "other",
            "encoding": None,
            "grade": "lossless",
            "max_error": None,
            "error": None,
            "source_bytes": 0,
            "dropped": [],
            "files": [],
            "tensors": [],
            "streams": [],
            "recipes": [],
            "classes": [],
            "parent": None,
            "base": None,
            **fields,
        }

    def stream(self, width: int, steps: list[str], frames: Iterable[tuple[int, list[bytes]]]) -> int:
        """A stream of frames: (size, decoded segments) each."""
        listed = []
        for size, segments in frames:
            numbers, stored = [size], []
            for segment in segments:
                stored.append(min(segment, zstd(segment, dictionary=not steps), key=len))
                numbers += [len(segment), len(stored[-1])]
            listed.append(numbers)
            self.frames.append(b"".join(stored))
        self.manifest["streams"].append({"frames": listed, "steps": steps, "width": width})
        return len(self.manifest["streams"]) - 1

    def bytes(self, data: bytes) -> int:
        """A stream of bytes as they are."""
        return self.stream(1, [], [(len(data), [data])] if data else [])

    def tensor(self, name: str, dtype: str, shape: Iterable[int], data: bytes, place: Any) -> None:
        self.manifest["tensors"].append([name, dtype, list(shape), place])
        self.weights += data

    def file(self, path: str, data: bytes, **kind: Any) -> None:
        self.manifest["files"].append({"path": path, "sha256": sha(data), "size": len(data), **kind})

    def config(self, data: bytes = CONFIG) -> None:
        self.file("adapter_config.json", data, text=data.decode())

    def model(self, metadata: Mapping[str, str] | None = None, header: bytes | None = None) -> bytes:
        """The safetensors file of all tensors, with its canonical header or a stored one."""
        pairs = None if metadata is None else [list(pair) for pair in metadata.items()]
        tensors = self.manifest["tensors"]
        sizes = [apack_decoder.entry_size(entry) for entry in tensors]
        place = None
        if header is not None:
            place = [self.bytes(header), len(header)]
        data = (header or apack_decoder.weights_header(pairs, tensors, sizes)) + self.weights
        self.file("adapter_model.safetensors", data, tensors=len(tensors), metadata=pairs, header=place)
        return data

    def pack(self) -> bytes:
        self.manifest["source_bytes"] = sum(file["size"] for file in self.manifest["files"])
        return seal(self.manifest, self.frames)


def planes(data: bytes, width: int) -> list[bytes]:
    return [data[place::width] for place in reversed(range(width))]


def ramp(*shape: int) -> np.ndarray:
    """float32 values that are neither zero nor alike."""
    n = int(np.prod(shape))
    return ((np.arange(n) % 13 - 6) / 16 + 1 / 64).astype(np.float32).reshape(shape)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
K = Q.replace("q_proj", "k_proj")


def small() -> Maker:
    """A LoRA with a bit of everything that needs nothing else: a text, two files of bytes, four tensors."""
    maker = Maker(method="lora", encoding="plain")
    a, b = ramp(4, 8).tobytes(), ramp(32)[::-1].tobytes()
    words = maker.stream(4, ["planes"], [(64, planes(a[:64], 4)), (64, planes(a[64:], 4))])
    more, text = maker.bytes(b), maker.bytes(CARD + b"notes" * 9)
    maker.config(LORA)
    maker.tensor(Q.format("A"), "F32", (4, 8), a, words)
    maker.tensor(Q.format("B"), "F32", (8, 4), a, ["same", 0])
    maker.tensor(K.format("A"), "F32", (4, 8), b, more)
    maker.tensor(K.format("B"), "F32", (8, 4), b, ["same", 2])
    maker.model({"format": "pt"})
    maker.file("README.md", CARD, stream=text)
    maker.file("runs/notes.txt", b"notes" * 9, stream=text)
    return maker


def changed(maker: Maker, change: Callable[[Manifest], object]) -> bytes:
    """The pack with another manifest, sealed again."""
    manifest = copy.deepcopy(maker.manifest)
    manifest["source_bytes"] = sum(file["size"] for file in manifest["files"])
    result = change(manifest)
    return seal(result if isinstance(result, (dict, bytes)) else manifest, maker.frames)


# ---------------------------------------------------------------- directories


def tree(directory: Path) -> dict[str, bytes]:
    """Path to content of all files."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def write_tree(directory: Path, files: Mapping[str, bytes]) -> Path:
    for path, data in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)
    return directory


def safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of arrays, in their order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    body = b""
    for name, array in arrays.items():
        span = [len(body), len(body) + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": span}
        body += np.ascontiguousarray(array).tobytes()
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def adapter(directory: Path, arrays: Mapping[str, np.ndarray], files: Mapping[str, bytes] | None = None) -> Path:
    """An adapter directory of a method that nobody reads."""
    own = {"adapter_config.json": CONFIG, "adapter_model.safetensors": safetensors(arrays, {"format": "pt"})}
    return write_tree(directory, own | dict(files or {}))


def read_case(files: Mapping[str, bytes]) -> tuple[dict[str, bytes], bytes]:
    """What the independent reader makes of `pack.apack` with `parent/` and `base/` beside it: files and manifest."""
    manifest, _, _ = apack_decoder.manifest_of(files["pack.apack"])
    base: dict[str, bytes] = {}
    for path, data in files.items():
        if path.startswith("base/"):
            base |= apack_decoder.tensors_of(data)
    before = manifest["parent"] and _parent(files, manifest["parent"]["name"])
    return apack_decoder.decode(files["pack.apack"], before, base), apack_decoder.canonical(manifest)


def _parent(files: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    """The files of a parent, which is a directory or a pack, that may have a parent itself."""
    whole = files.get(f"parent/{name}")
    if whole is None:
        return {path: data for path, data in files.items() if path.startswith(f"parent/{name}/")}
    return read_case({**files, "pack.apack": whole})[0]
