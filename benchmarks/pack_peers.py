"""What others make of an adapter's tensors, and the size that the entropy of its values allows: for `pack.py`.

Every peer gets the form that suits it best, one thread, and must give back what it was given. Beside the weights'
file an adapter has small ones: for every peer they count as one zstd -19 frame of all of them.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import re
import struct
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

WEIGHTS = "adapter_model.safetensors"
PER_TENSOR, FIXED = 48, 2048
"""What a container may add to the entropy: a digest and an entry for each tensor, a manifest's frame."""
SLOW = 100_000_000
"""Above this, codecs of a few MB/s are not run: a slice of the same file stands for it."""
NOT_INSTALLED, NOT_RUN, NOT_LOSSLESS = "not installed", "not run", "NOT LOSSLESS"


class Part(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class Adapter(NamedTuple):
    """A directory: its weights' file, split, and its other files in one buffer."""

    raw: bytes
    header: bytes
    parts: dict[str, Part]
    small: bytes
    bytes_of_all: int

    def by_dtype(self) -> dict[str, bytearray]:
        joined: dict[str, bytearray] = {}
        for part in self.parts.values():
            joined.setdefault(part.dtype, bytearray()).extend(part.data)
        return joined


def read(directory: Path) -> Adapter:
    raw = (directory / WEIGHTS).read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    entries = json.loads(raw[8:start])
    entries.pop("__metadata__", None)
    view = memoryview(raw)[start:]
    parts = {
        name: Part(entry["dtype"], tuple(entry["shape"]), view[slice(*entry["data_offsets"])])
        for name, entry in entries.items()
    }
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    small = b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in files if path.name != WEIGHTS)
    return Adapter(raw, raw[:start], parts, small, sum(path.stat().st_size for path in files))


def zstd19(data: bytes) -> int:
    return len(zstandard.ZstdCompressor(level=19).compress(data))


# ---- Peers: bytes for the weights' file


class Lossy(Exception):
    pass


def same(ours: Any, theirs: Any) -> None:
    if bytes(ours) != bytes(theirs):
        raise Lossy


def zstd(adapter: Adapter) -> int:
    return zstd19(adapter.raw)


def xz(adapter: Adapter) -> int:
    return len(lzma.compress(adapter.raw, preset=9 | lzma.PRESET_EXTREME))


def zipnn_tensors(adapter: Adapter) -> int:
    """As its own script writes them: a safetensors file of blobs, dtypes and shapes in the metadata.

    ZipNN works on float tensors, changes them in place, and makes small ones larger: those stay as they are here.
    """
    import torch
    from safetensors.numpy import save
    from zipnn import ZipNN

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    blobs, infos = {}, {}
    for name, part in adapter.parts.items():
        blobs[name] = np.array(part.data)
        if part.dtype not in dtypes or not len(part.data):
            continue
        tensor = torch.frombuffer(bytearray(part.data), dtype=dtypes[part.dtype]).reshape(part.shape)
        done = ZipNN(method="HUFFMAN", input_format="torch", threads=1).compress(tensor)
        back = ZipNN(method="HUFFMAN", input_format="torch", threads=1).decompress(done)
        same(part.data, back.contiguous().flatten().view(torch.uint8).numpy().data)
        if len(done) < len(part.data):
            blobs[name] = np.frombuffer(done, np.uint8)
            infos[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": str(list(part.shape))}
    return len(save(blobs, metadata={"format": "pt", "znn_compressed_vectors": json.dumps(infos)}))


def zipnn_whole(adapter: Adapter) -> int:
    """All tensors of a dtype in one buffer, the header under zstd -19."""
    from zipnn import ZipNN

    dtypes = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    size = zstd19(adapter.header)
    for dtype, data in adapter.by_dtype().items():
        if dtype not in dtypes:
            size += min(len(data), zstd19(bytes(data)))
            continue
        codec = ZipNN(input_format="byte", bytearray_dtype=dtypes[dtype], threads=1)
        done = codec.compress(bytearray(data))
        same(data, codec.decompress(done))
        size += len(done)
    return size


def z4ai(adapter: Adapter) -> int:
    """The smaller of its own file format and its codec over all tensors of a dtype, the header under zstd -19."""
    import z4ai
    import z4ai.safetensors

    file = z4ai.safetensors.compress_bytes(adapter.raw, threads=1, workers=1)
    same(adapter.raw, z4ai.safetensors.decompress_bytes(file, workers=1))
    whole = zstd19(adapter.header)
    for dtype, data in adapter.by_dtype().items():
        code = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}.get(dtype)
        done = z4ai.compress(bytes(data), dtype=code, threads=1)
        same(data, z4ai.decompress(done))
        whole += len(done)
    return min(len(file), whole)


def blosc2(adapter: Adapter, shuffle: str) -> int:
    """zstd at level 5 behind a filter, all tensors of a dtype in one buffer, the header under zstd -19."""
    import blosc2

    size = zstd19(adapter.header)
    for dtype, data in adapter.by_dtype().items():
        width = {"F32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1}[dtype]
        filters = [blosc2.Filter[shuffle]]
        done = blosc2.compress2(
            bytes(data), typesize=width, codec=blosc2.Codec.ZSTD, clevel=5, filters=filters, nthreads=1
        )
        same(data, blosc2.decompress2(done))
        size += len(done)
    return size


PEERS: dict[str, tuple[str, Callable[[Adapter], int]]] = {
    "zstd -19": ("zstandard", zstd),
    "xz -9e": ("", xz),
    "ZipNN, tensors": ("zipnn", zipnn_tensors),
    "ZipNN, whole": ("zipnn", zipnn_whole),
    "z4ai": ("z4ai", z4ai),
    "blosc2 shuffle": ("blosc2", lambda adapter: blosc2(adapter, "SHUFFLE")),
    "blosc2 bitshuffle": ("blosc2", lambda adapter: blosc2(adapter, "BITSHUFFLE")),
}


def versions() -> list[str]:
    found = []
    for package in ("zstandard", "zipnn", "z4ai", "blosc2"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} {NOT_INSTALLED}")
    return found


def peer_size(adapter: Adapter, peer: str, cache: dict[str, int | str]) -> int | str:
    """Bytes with the small files, or why there is no figure. Kept by digest and version: some take a minute."""
    package, measure = PEERS[peer]
    if peer in ("zstd -19", "xz -9e") and len(adapter.raw) > SLOW:
        return NOT_RUN
    try:
        key = f"{hashlib.sha256(adapter.raw).hexdigest()} {peer} {version(package) if package else ''}"
        if key not in cache:
            cache[key] = measure(adapter)
    except (ImportError, PackageNotFoundError):
        return NOT_INSTALLED
    except Lossy:
        cache[key] = NOT_LOSSLESS
    size = cache[key]
    return size if isinstance(size, str) else size + zstd19(adapter.small)


def with_parent(adapter: Adapter, parent: Adapter) -> dict[str, int | str]:
    """What others make of the weights' file where the one before it is known."""
    dictionary = zstandard.ZstdCompressionDict(parent.raw, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    level = zstandard.ZstdCompressionParameters.from_level(19, window_log=27, enable_ldm=True)
    patch = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=level).compress(adapter.raw)
    sizes: dict[str, int | str] = {"zstd -19 --patch-from": len(patch) + zstd19(adapter.small)}
    try:
        import z4ai
    except ImportError:
        sizes["z4ai delta"] = NOT_INSTALLED
        return sizes
    done = z4ai.compress_delta(adapter.raw, parent.raw, dtype="fp32", threads=1)
    same(adapter.raw, z4ai.decompress_delta(done, parent.raw))
    sizes["z4ai delta"] = len(done) + zstd19(adapter.small)
    return sizes


# ---- The limit

FIELDS = {"F32": (1, 8, 7, 8, 8), "BF16": (1, 8, 7), "F16": (1, 5, 10)}


def fields(dtype: str, data: bytes) -> Iterator[np.ndarray]:
    """Sign, exponent and mantissa as small integers; a float32's mantissa in 7 + 8 + 8 bits; integers by bytes."""
    if dtype not in FIELDS:
        size = {"I64": 8, "I32": 4, "I16": 2, "U8": 1, "I8": 1}[dtype]
        planes = np.frombuffer(data, np.uint8).reshape(-1, size)
        yield from (planes[:, i] for i in range(size))
        return
    total = sum(FIELDS[dtype])
    words = np.frombuffer(data, f"<u{total // 8}")
    for width in FIELDS[dtype]:
        total -= width
        yield (words >> total) & ((1 << width) - 1)


def entropy(symbols: np.ndarray) -> float:
    """Order-0 bits of all symbols together, with Miller and Madow's correction for a sample's own entropy."""
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    n = int(counts.sum())
    bits = n * math.log2(n) - float((counts * np.log2(counts)).sum())
    return min(bits + (len(counts) - 1) / (2 * math.log(2)), n * math.log2(len(counts)))


def role(name: str) -> str:
    found = re.search(r"(lora_|vblora_|vera_|hada_|ia3_).*", name)
    return found[0] if found else "other"


def group_entropy(dtype: str, data: bytes) -> float:
    """Bits: of all values, or of a mask of the zeros and of the values that are none, whichever is less."""
    every = sum(entropy(field) for field in fields(dtype, data))
    if dtype not in FIELDS:
        return every
    words = np.frombuffer(data, f"<u{sum(FIELDS[dtype]) // 8}")
    others = words[words != 0]
    if not 0 < len(others) < len(words):
        return every
    mask = entropy((words != 0).astype(np.uint8))
    return min(every, mask + sum(entropy(field) for field in fields(dtype, others.tobytes())))


def values_entropy(adapter: Adapter, *, unique: bool = False) -> float:
    """Bytes; counted apart per dtype, role and shape. With `unique`, tensors of the same bytes count once."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[memoryview]] = {}
    seen = set()
    for name, part in adapter.parts.items():
        digest = hashlib.sha256(part.data).digest()
        if len(part.data) and not (unique and digest in seen):
            groups.setdefault((part.dtype, role(name), part.shape), []).append(part.data)
        seen.add(digest)
    return sum(group_entropy(dtype, b"".join(views)) for (dtype, _, _), views in groups.items()) / 8


def overhead(adapter: Adapter) -> int:
    """Names and small files under zstd -19, and what a container may add."""
    return zstd19(adapter.header + adapter.small) + PER_TENSOR * len(adapter.parts) + FIXED


def limit(adapter: Adapter, *, unique: bool = False) -> float:
    return values_entropy(adapter, unique=unique) + overhead(adapter)
