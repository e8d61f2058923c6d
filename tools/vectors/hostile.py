"""Hostile input, written by hand: what the `invalid` functions of the methods use.

Each case is a folder with the bad input and `expect.json`:
  formats/safetensors/invalid/<case>   `model.safetensors`; expect.json says error code, a part of the message, and
                                       whether the safetensors library rejects the file too
  formats/<other>/invalid/<case>       a PEFT directory; expect.json says which verb to call with which options
                                       (`base` is a folder of the case), and either `error` and `message` (a part of
                                       it) or the `finding` of `check`

`files` lists what lies in the folder beside expect.json. All is written by hand, from the formats' prose: no case is
made with adapterpack, PEFT or torch, and two runs give the same bytes.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from typing import Any

import numpy as np

import vectors

Files = dict[str, bytes]
NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "uint8": "U8",
}
PFX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def framed(header: bytes | str, body: bytes = b"", length: int | None = None) -> bytes:
    """The length, the header and the data of a safetensors file; `length` may lie."""
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def tensors(arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """A proper safetensors file."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    body = b""
    for name, array in arrays.items():
        span = [len(body), len(body) + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": span}
        body += np.ascontiguousarray(array).tobytes()
    return framed(json.dumps(header), body)


def ramp(*shape: int, dtype: str = "float32") -> np.ndarray:
    """Values that are neither zero nor alike."""
    n = math.prod(shape)
    return ((np.arange(n) % 13 - 6) / 16 + 1 / 64).astype(dtype).reshape(shape)


def text(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def directory(config: dict[str, Any], arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Files:
    """A PEFT directory."""
    return {CONFIG: text(config), WEIGHTS: tensors(arrays, metadata)}


class Cases:
    """The cases of one format, written under their names.

    Attributes:
        where: formats/<id>/invalid.
        wanted: Only cases whose "<id>/<case>" contains it are written.
    """

    def __init__(self, format_id: str, wanted: str = "") -> None:
        self.format_id, self.wanted = format_id, wanted
        self.where = vectors.FORMATS / format_id / "invalid"
        self._names: set[str] = set()

    def add(
        self,
        case: str,
        files: Files,
        verb: str,
        *,
        error: str | None = None,
        message: str | None = None,
        finding: str | None = None,
        **options: Any,
    ) -> None:
        """A directory, and what `verb` with these options must give: an error code and a part of its message, or a
        finding of `check`."""
        assert (error is None) != (finding is None)
        expect: dict[str, Any] = {"verb": verb, "options": options}
        expect |= {"finding": finding} if finding else {"error": error, "message": message}
        self.write(case, files, expect)

    def both(self, case: str, files: Files, finding: str, message: str, **options: Any) -> None:
        """A fault that `check` finds and that stops a conversion."""
        self.add(case, files, "check", finding=finding)
        self.add(f"{case}-convert", files, "convert", error="invalid", message=message, **options)

    def write(self, case: str, files: Files, expect: dict[str, Any]) -> None:
        """Any files, and what expect.json says of them."""
        assert case not in self._names, f"{self.format_id}/{case} stands twice"
        self._names.add(case)
        if self.wanted not in f"{self.format_id}/{case}":
            return
        where = self.where / case
        if where.exists():
            shutil.rmtree(where)
        for name, data in {**files, "expect.json": text({**expect, "files": sorted(files)})}.items():
            path = where / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def main(wanted: str = "") -> None:
    """Write the hostile cases whose "<id>/<case>" contains `wanted`; without it all, and the old ones are removed."""
    sources = [m for m in vectors.modules() if hasattr(m, "invalid")]
    cases = {m.FORMAT: Cases(m.FORMAT, wanted) for m in sources}
    if not wanted:
        for each in cases.values():
            shutil.rmtree(each.where, ignore_errors=True)
    for m in sources:
        m.invalid(cases[m.FORMAT])
    folders = [
        d
        for c in cases.values()
        if c.where.is_dir()
        for d in c.where.iterdir()
        if wanted in f"{c.format_id}/{d.name}"
    ]
    files = [p for d in folders for p in d.rglob("*") if p.is_file()]
    print(f"{len(folders)} cases, {sum(p.stat().st_size for p in files):,} bytes in {len(files)} files")
