"""The safetensors format, read strictly and in ranges, written in a canonical order.

Own code with reasons: the library gives no byte ranges, no bf16 without torch, needs all tensors in
memory, writes metadata in random order, mode 0600 and without fsync, and lets the last of two equal
keys win. What it refuses we refuse; what we write it reads (tested against it in both directions).
`formats/safetensors/SPEC.md` says what else is refused here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from adapterpack import limits
from adapterpack.errors import InvalidFile
from adapterpack.io import json as strict_json
from adapterpack.io.files import FileSpan, OpenFile
from adapterpack.tensor import DTYPES, DType, Shape, Tensor, chunks

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
METADATA = "__metadata__"
_STRUCTURE = limits.TENSORS * (8 + limits.RANK) + limits.METADATA_BYTES
"""More brackets and commas than this no legal header has; counted before parsing, which costs memory."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        raw: The 8 length bytes and the JSON, as they lie in the file.
        metadata: `__metadata__`, empty if there is none.
        tensors: Name to tensor, in the order in which the data lies.
    """

    raw: bytes
    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]


def read(file: OpenFile) -> Header:
    """Read and check the header of an open file; no tensor data is read.

    Raises:
        InvalidFile: anything that the format or `limits` forbids.
    """

    def bad(reason: str) -> NoReturn:
        raise InvalidFile(f"{file.path} is not a valid safetensors file: {reason}")

    if file.size < 8:
        bad(f"{file.size} bytes are too few")
    prefix = file.read(0, 8)
    length = int.from_bytes(prefix, "little")
    if length > limits.HEADER_BYTES:
        if prefix.startswith((b"PK\x03\x04", b"\x80")):
            bad("it looks like a pickle or a ZIP archive")
        bad(f"its header claims {length:,} bytes; at most {limits.HEADER_BYTES:,} are read")
    if length == 0 or 8 + length > file.size:
        bad(f"its header claims {length:,} bytes of a file of {file.size:,}")
    raw = file.read(8, 8 + length)
    if sum(raw.count(mark) for mark in (b"[", b"{", b",")) > _STRUCTURE:
        bad(f"its header lists more than {limits.TENSORS:,} tensors could need")
    entries = strict_json.parse(raw, f"header of {file.path}", natural=True)
    metadata = _metadata(entries.pop(METADATA, {}), bad)
    if len(entries) > limits.TENSORS:
        bad(f"{len(entries):,} tensors; at most {limits.TENSORS:,} are read")
    spans = sorted((*_entry(name, entry, bad), name) for name, entry in entries.items())
    start, end = 8 + length, 0
    tensors: dict[str, Tensor] = {}
    for begin, stop, dtype, shape, name in spans:
        if begin != end:
            bad(f"tensor {name!r} begins at byte {begin:,} of the data, the one before ends at {end:,}")
        end = stop
        tensors[name] = Tensor(DTYPES[dtype], shape, FileSpan(file, start + begin, stop - begin))
    if start + end != file.size:
        bad(f"it has {file.size:,} bytes where its header accounts for {start + end:,}")
    return Header(prefix + raw, metadata, tensors)


class _Bad(Protocol):
    def __call__(self, reason: str) -> NoReturn: ...


def _metadata(value: Any, bad: _Bad) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        bad("__metadata__ must map names to strings")
    if sum(len(k.encode()) + len(v.encode()) for k, v in value.items()) > limits.METADATA_BYTES:
        bad(f"__metadata__ is longer than {limits.METADATA_BYTES:,} bytes")
    return value


def fault_of_name(name: str) -> str | None:
    """Why this cannot be the name of a tensor; None if it can."""
    if not name or len(name.encode()) > limits.NAME_BYTES:
        return f"tensor {name!r:.100}: its name is empty or longer than {limits.NAME_BYTES} bytes"
    if _CONTROL.search(name) or name == METADATA:
        return f"tensor {name!r:.100}: its name has control characters, or means something else"
    return None


def _entry(name: str, entry: Any, bad: _Bad) -> tuple[int, int, str, tuple[int, ...]]:
    shown = f"tensor {name!r:.100}"
    if fault := fault_of_name(name):
        bad(fault)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        bad(f"{shown}: exactly dtype, shape and data_offsets are wanted")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        bad(f"{shown}: unknown dtype {dtype!r:.40}")
    for field in (shape, offsets):
        # `type is`, because True is an int for isinstance.
        if not isinstance(field, list) or not all(type(n) is int for n in field):
            bad(f"{shown}: shape and data_offsets are lists of whole numbers")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        bad(f"{shown}: data_offsets are [begin, end]")
    if len(shape) > limits.RANK or any(n > limits.DIMENSION for n in shape):
        bad(f"{shown}: the shape {shape!r:.100} is absurd")
    bits = math.prod(shape) * DTYPES[dtype].bits
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        bad(f"{shown}: {dtype} {shape} does not take {offsets[1] - offsets[0]:,} bytes")
    return offsets[0], offsets[1], dtype, tuple(shape)


class Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


def order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in canonical order: wide elements first, so that all are aligned, then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.bits, name))


class Sized(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def nbytes(self) -> int: ...


def header_bytes(tensors: Iterable[tuple[str, Sized]], metadata: Mapping[str, str]) -> bytes:
    """The 8 length bytes and the JSON header for tensors that follow in this order.

    Metadata is sorted: the same content gives the same bytes.
    """
    return header_text(tensors, dict(sorted(metadata.items())) or None)


def header_text(tensors: Iterable[tuple[str, Sized]], metadata: Mapping[str, str] | None) -> bytes:
    """The same with metadata in the order given; None: no `__metadata__`."""
    entries: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
    end = 0
    for name, tensor in tensors:
        entries[name] = {
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(sink: Sink, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Stream a canonical safetensors file, one chunk in memory at a time."""
    names = order(tensors)
    sink.write(header_bytes(((name, tensors[name]) for name in names), metadata))
    for name in names:
        for chunk in chunks(tensors[name].source):
            sink.write(chunk)
