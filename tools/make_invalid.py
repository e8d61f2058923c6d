"""Write the malformed inputs under formats/*/invalid/, and what each of them must give.

usage: python tools/make_invalid.py        rewrites every case (formats/*/invalid is removed first)

Each case is a folder with the bad input and `expect.json`:
  formats/safetensors/invalid/<case>   `model.safetensors`; expect.json says error code, a part of the message, and
                                       whether the safetensors library rejects the file too
  formats/<other>/invalid/<case>       a PEFT directory; expect.json says which verb to call with which options
                                       (`base` is a folder of the case), and either `error` and `message` (a part of
                                       it) or the `finding` of `check`

`files` lists what lies in the folder beside expect.json. All is written by hand, from the formats' prose: nothing
here imports adapterpack, PEFT or torch, and two runs give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent / "formats"
Files = dict[str, bytes]

# ---------------------------------------------------------------- files by hand

NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int16": "I16", "uint8": "U8"}


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


def write(where: Path, files: Files, expect: dict[str, Any]) -> None:
    assert not where.exists(), where
    for name, data in files.items():
        path = where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (where / "expect.json").write_bytes(text({**expect, "files": sorted(files)}))


# ---------------------------------------------------------------- headers


def entry(name: str = "a", dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]", more: str = "") -> str:
    return f'"{name}":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def one(**fields: str) -> str:
    return "{" + entry(**fields) + "}"


def headers() -> dict[str, tuple[bytes, str, str]]:
    """Case to (file, part of the message, what the library does)."""
    b8 = bytes(8)
    good = one()
    rejected: dict[str, tuple[bytes, str]] = {
        # the frame
        "empty-file": (b"", "too few"),
        "seven-bytes": (bytes(7), "too few"),
        "header-length-zero": (bytes(8) + b"{}", "claims 0 bytes"),
        "header-longer-than-file": (framed(good, b8, 4096), "claims 4,096 bytes"),
        "header-over-100-mb": (framed(good, b8, 100_000_001), "claims 100,000,001 bytes"),
        "header-length-2-63": (framed(good, b8, 1 << 63), "claims 9,223,372,036,854,775,808 bytes"),
        "header-length-2-64": (framed(good, b8, (1 << 64) - 1), "claims 18,446,744,073,709,551,615 bytes"),
        "zip-prefix": (b"PK\x03\x04\x14\x00\x00\x00" + framed(good, b8), "pickle or a ZIP"),
        # the text
        "not-utf8": (framed(b'{"\xff":1}'), "utf-8"),
        "bom": (framed("\ufeff" + good, b8), "BOM"),
        "not-json": (framed("hello"), "header of"),
        "not-closed": (framed(good[:-1], b8), "header of"),
        "json-array": (framed("[]"), "object is wanted"),
        "json-null": (framed("null"), "object is wanted"),
        "json-string": (framed('"abc"'), "object is wanted"),
        "trailing-nul": (framed(good + "\0", b8), "header of"),
        "trailing-garbage": (framed(good + "x", b8), "header of"),
        "trailing-comma": (framed(good[:-1] + ",}", b8), "header of"),
        "comment": (framed("/* a */" + good, b8), "header of"),
        "nan-literal": (framed('{"a":NaN}'), "NaN is not JSON"),
        "infinity-literal": (framed('{"a":-Infinity}'), "Infinity is not JSON"),
        "number-too-large": (framed('{"a":1e999}'), "too large a number"),
        "leading-zero": (framed(one(shape="[02]"), b8), "header of"),
        "raw-newline-in-name": (framed(one(name="a\nb"), b8), "header of"),
        "deep-nesting": (framed('{"a":' + "[" * 200 + "]" * 200 + "}"), "nested deeper"),
        "lone-surrogate": (framed(one(name=r"\ud800"), b8), "surrogates"),
        # the entries
        "entry-not-object": (framed('{"a":[]}'), "exactly dtype, shape and data_offsets"),
        "duplicate-dtype": (framed(one(more=',"dtype":"F32"'), b8), "'dtype' stands twice"),
        "duplicate-metadata": (
            framed('{"__metadata__":{},"__metadata__":{},' + entry() + "}", b8),
            "'__metadata__' stands twice",
        ),
        "metadata-number": (framed('{"__metadata__":{"k":1},' + entry() + "}", b8), "names to strings"),
        "metadata-nested": (framed('{"__metadata__":{"k":{}},' + entry() + "}", b8), "names to strings"),
        "metadata-array": (framed('{"__metadata__":["k"],' + entry() + "}", b8), "names to strings"),
        "missing-dtype": (framed('{"a":{"shape":[2],"data_offsets":[0,8]}}', b8), "exactly dtype"),
        "missing-shape": (framed('{"a":{"dtype":"F32","data_offsets":[0,8]}}', b8), "exactly dtype"),
        "missing-offsets": (framed('{"a":{"dtype":"F32","shape":[2]}}', b8), "exactly dtype"),
        "unknown-dtype": (framed(one(dtype='"F31"'), b8), "unknown dtype"),
        "lower-case-dtype": (framed(one(dtype='"f32"'), b8), "unknown dtype"),
        "dtype-number": (framed(one(dtype="32"), b8), "unknown dtype"),
        "shape-number": (framed(one(shape="2"), b8), "lists of whole numbers"),
        "shape-negative": (framed(one(shape="[-2]"), b8), "negative"),
        "shape-minus-zero": (framed(one(shape="[-0]", offsets="[0,0]")), "negative"),
        "shape-float": (framed(one(shape="[2.0]"), b8), "whole numbers"),
        "shape-exponent": (framed(one(shape="[2e0]"), b8), "whole numbers"),
        "shape-string": (framed(one(shape='["2"]'), b8), "whole numbers"),
        "shape-boolean": (framed(one(shape="[true,2]"), b8), "whole numbers"),
        "shape-null": (framed(one(shape="[null]"), b8), "whole numbers"),
        "dimension-over-u64": (framed(one(shape="[18446744073709551616]"), b8), "absurd"),
        "dimension-of-5000-digits": (framed(one(shape=f"[{'9' * 5000}]"), b8), "header of"),
        "offset-negative": (framed(one(offsets="[-8,0]"), b8), "negative"),
        "offset-float": (framed(one(offsets="[0,8.0]"), b8), "whole numbers"),
        "offset-boolean": (framed(one(shape="[]", dtype='"U8"', offsets="[false,true]"), b"\0"), "whole numbers"),
        "one-offset": (framed(one(offsets="[8]"), b8), "[begin, end]"),
        "three-offsets": (framed(one(offsets="[0,4,8]"), b8), "[begin, end]"),
        "begin-after-end": (framed(one(offsets="[8,0]"), b8), "[begin, end]"),
        "past-the-end": (framed(one(shape="[4]", offsets="[0,16]"), b8), "accounts for"),
        "overlap-identical": (framed("{" + entry("a") + "," + entry("b") + "}", b8), "begins at byte 0"),
        "overlap-partial": (
            framed("{" + entry("a") + "," + entry("b", offsets="[4,12]") + "}", bytes(12)),
            "begins at byte 4",
        ),
        "hole-at-start": (framed(one(offsets="[8,16]"), bytes(16)), "begins at byte 8"),
        "hole-between": (
            framed("{" + entry("a") + "," + entry("b", offsets="[12,20]") + "}", bytes(20)),
            "begins at byte 12",
        ),
        "trailing-bytes": (framed(good, b8 + b"#!/bin/sh"), "accounts for"),
        "body-one-short": (framed(good, bytes(7)), "accounts for"),
        "span-too-long": (framed(one(offsets="[0,12]"), bytes(12)), "does not take 12 bytes"),
        "span-too-short": (framed(one(offsets="[0,4]"), bytes(4)), "does not take 4 bytes"),
        "shape-overflow": (framed(one(shape="[4294967296,4294967296,4294967296]"), b8), "absurd"),
        "byte-size-overflow": (
            framed(one(dtype='"F64"', shape="[2147483648,2147483648,2]", offsets="[0,0]")),
            "does not take 0 bytes",
        ),
        "f4-odd-count": (framed(one(dtype='"F4"', shape="[3]", offsets="[0,1]"), b"\0"), "does not take 1 bytes"),
        "offset-2-53": (framed(one(offsets="[9007199254740992,9007199254741000]"), b8), "begins at byte"),
    }
    huge = "18446744073709551615"
    accepted: dict[str, tuple[bytes, str]] = {
        "duplicate-key": (framed("{" + entry() + "," + entry() + "}", b8), "'a' stands twice"),
        "duplicate-key-two-shapes": (
            framed("{" + entry(shape="[2,1]") + "," + entry() + "}", b8),
            "'a' stands twice",
        ),
        "duplicate-key-escaped": (framed("{" + entry() + "," + entry(r"\u0061") + "}", b8), "'a' stands twice"),
        "duplicate-metadata-key": (
            framed('{"__metadata__":{"k":"1","k":"2"},' + entry() + "}", b8),
            "'k' stands twice",
        ),
        "metadata-null": (framed('{"__metadata__":null,' + entry() + "}", b8), "names to strings"),
        "unknown-field": (framed(one(more=',"strides":[1]'), b8), "exactly dtype"),
        "zero-times-overflow": (framed(one(shape=f"[0,{huge},{huge}]", offsets="[0,0]")), "absurd"),
        "dimension-over-2-31": (framed(one(shape="[0,2147483649]", offsets="[0,0]")), "absurd"),
        "rank-9": (framed(one(shape="[1,1,1,1,1,1,1,1,2]"), b8), "absurd"),
        "rank-10000": (framed(one(shape=f"[{'1,' * 9999}2]"), b8), "absurd"),
        "name-empty": (framed(one(name=""), b8), "name is empty"),
        "name-nul": (framed(one(name=r"a\u0000b"), b8), "control characters"),
        "name-control": (framed(one(name=r"a\u001b[31mb"), b8), "control characters"),
        "name-c1-control": (framed(one(name=r"a\u0085b"), b8), "control characters"),
        "name-513-bytes": (framed(one(name="a" * 513), b8), "longer than 512 bytes"),
        "name-171-wide-characters": (framed(one(name="層" * 171), b8), "longer than 512 bytes"),
    }
    return {case: (*found, "rejects") for case, found in rejected.items()} | {
        case: (*found, "accepts") for case, found in accepted.items()
    }


# ---------------------------------------------------------------- adapters

PFX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


class Cases:
    """The cases of one format, collected under their names."""

    def __init__(self, format_id: str) -> None:
        self.where = ROOT / format_id / "invalid"

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
        assert (error is None) != (finding is None)
        expect: dict[str, Any] = {"verb": verb, "options": options}
        expect |= {"finding": finding} if finding else {"error": error, "message": message}
        write(self.where / case, files, expect)

    def both(self, case: str, files: Files, finding: str, message: str, **options: Any) -> None:
        """A fault that `check` finds and that stops a conversion."""
        self.add(case, files, "check", finding=finding)
        self.add(f"{case}-convert", files, "convert", error="invalid", message=message, **options)


def directory(config: dict[str, Any], arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Files:
    return {CONFIG: text(config), WEIGHTS: tensors(arrays, metadata)}


def lora_arrays(module: str = Q, r: int = 2) -> dict[str, np.ndarray]:
    return {f"{PFX}{module}.lora_A.weight": ramp(r, 8), f"{PFX}{module}.lora_B.weight": ramp(8, r)}


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def lora(more: dict[str, Any] | None = None, arrays: dict[str, np.ndarray] | None = None) -> Files:
    return directory({**LORA, **(more or {})}, lora_arrays() if arrays is None else arrays)


def peft() -> None:
    cases = Cases("peft")
    weights = tensors(lora_arrays())

    def config(case: str, raw: bytes, message: str) -> None:
        cases.add(case, {CONFIG: raw, WEIGHTS: weights}, "inspect", error="invalid", message=message)

    config("config-duplicate-key", b'{"peft_type": "LORA", "r": 2, "r": 4}', "'r' stands twice")
    config("config-nan", b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is not JSON")
    config("config-infinity", b'{"peft_type": "LORA", "lora_alpha": Infinity}', "Infinity is not JSON")
    config("config-1e999", b'{"peft_type": "LORA", "lora_alpha": 1e999}', "too large a number")
    config("config-nested-33", b'{"peft_type":"LORA","x":' + b"[" * 32 + b"]" * 32 + b"}", "nested deeper")
    config("config-nested-10000", b'{"x":' + b"[" * 10_000 + b"]" * 10_000 + b"}", CONFIG)
    config("config-lone-surrogate", rb'{"peft_type": "LORA", "x": "\udc00"}', "surrogates")
    config("config-not-utf8", b'{"peft_type": "LORA", "x": "\xe9"}', "utf-8")
    config("config-utf16", '{"peft_type": "LORA"}'.encode("utf-16"), "utf-8")
    config("config-array", b"[]", "object is wanted")
    config("config-null", b"null", "object is wanted")
    config("config-empty", b"", CONFIG)
    config("config-truncated", text(LORA)[:-5], CONFIG)
    config("peft-type-missing", b'{"r": 2}', "does not say its peft_type")
    config("peft-type-number", b'{"peft_type": 1}', "does not say its peft_type")

    cases.add("no-config", {WEIGHTS: weights}, "inspect", error="invalid", message=f"has no {CONFIG}")
    cases.add("no-weights", {CONFIG: text(LORA)}, "inspect", error="invalid", message=f"has no {WEIGHTS}")
    cases.add("no-tensors", directory(LORA, {}), "check", finding="empty")
    cases.add("weights-cut", {CONFIG: text(LORA), WEIGHTS: weights[:-1]}, "inspect", error="invalid", message="bytes")

    # Pickles. The payload touches a file in the working directory: it must never appear.
    legacy = b"cos\nsystem\n(S'touch adapterpack-was-here'\ntR."
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        for name, data in (
            ("archive/data.pkl", legacy),
            ("archive/version", b"3\n"),
            ("archive/byteorder", b"little"),
        ):
            z.writestr(zipfile.ZipInfo(name), data)
    for case, pickle in (("pickle", legacy), ("pickle-zip", archive.getvalue())):
        files = {CONFIG: text(LORA), PICKLE: pickle}
        cases.add(f"{case}-only", files, "inspect", error="pickle-refused", message="can run code")
        cases.add(f"{case}-convert", files, "convert", error="pickle-refused", message="can run code", dtype="bf16")
        cases.add(f"{case}-allowed", files, "inspect", error="invalid", message="not a state dict", allow_pickle=True)
        disguised = {CONFIG: text(LORA), WEIGHTS: pickle}
        cases.add(f"{case}-disguised", disguised, "inspect", error="invalid", message="not a valid safetensors")

    # Keys.
    a_key, b_key = lora_arrays()
    twice = {**lora_arrays(), a_key.replace("lora_A", "lora_A.default"): ramp(2, 8)}
    one_parameter = "one and the same parameter"
    cases.add("parameter-twice", lora(arrays=twice), "inspect", error="invalid", message=one_parameter)
    bank = {**vb_arrays(), f"{PFX}base_model.vblora_vector_bank": ramp(6, 4)}
    cases.add("shared-twice", directory(VB, bank), "inspect", error="invalid", message=one_parameter)
    bank = {**vb_arrays(), "base_model.vblora_vector_bank.default": ramp(6, 4)}
    cases.add("shared-twice-default", directory(VB, bank), "inspect", error="invalid", message=one_parameter)
    bare = {key.removeprefix(PFX): array for key, array in lora_arrays().items()}
    cases.add(
        "no-prefix", lora(arrays=bare), "convert", error="unsupported", message="no lora parameters", dtype="bf16"
    )
    stranger = {**lora_arrays(), "optimizer.step": ramp(1)}
    cases.add("unknown-key", lora(arrays=stranger), "check", finding="unknown-key")
    broken = {a_key: ramp(2, 8) * np.float32("nan"), b_key: ramp(8, 2)}
    cases.add("nan", lora(arrays=broken), "check", finding="nan")
    broken = {a_key: ramp(2, 8), b_key: ramp(8, 2) * np.float32("inf")}
    cases.add("infinite", lora(arrays=broken), "check", finding="infinite")
    cases.add(
        "unknown-method",
        directory({"peft_type": "ADALORA"}, lora_arrays()),
        "convert",
        error="unsupported",
        message="is ADALORA",
        dtype="bf16",
    )
    cases.add(
        "flag-string",
        lora({"fan_in_fan_out": "false"}),
        "convert",
        error="invalid",
        message="fan_in_fan_out in adapter_config.json is 'false'",
        dtype="bf16",
    )

    # Token rows.
    key = f"{PFX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = {**lora_arrays(), key: ramp(2, 8)}
    for case, indices, message in (
        ("tokens-missing", None, "does not say which rows"),
        ("tokens-too-many", [1, 2, 3], "for 3 token indices"),
        ("tokens-twice", [4, 4], "names a row twice"),
        ("tokens-negative", [-1, 2], "does not say which rows"),
        ("tokens-boolean", [True, False], "does not say which rows"),
        ("tokens-elsewhere", {"lm_head": [1, 2]}, "does not say which rows"),
    ):
        files = lora({"trainable_token_indices": indices}, rows)
        cases.add(case, files, "inspect", error="invalid", message=message)

    # Folders.
    two = {f"{name}/{file}": data for name in ("one", "two") for file, data in lora().items()}
    cases.add("two-adapters", two, "inspect", error="usage", message="holds 2 adapters")
    cases.add("subfolder-missing", two, "inspect", error="usage", message="no subfolder three", subfolder="three")
    cases.add("subfolder-outside", two, "inspect", error="usage", message="leads out of", subfolder="../../invalid")

    # Bases.
    base = {
        "base/config.json": text({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
        "base/model.safetensors": tensors({f"{Q}.weight": ramp(8, 8)}),
    }
    elsewhere = lora(arrays=lora_arrays(V)) | base
    cases.add("not-in-base", elsewhere, "check", finding="not-in-base", base="base")
    lacks = {"error": "wrong-base", "message": f"lacks 1 tensors that the adapter changes: {V}.weight"}
    cases.add("not-in-base-merge", elsewhere, "merge", **lacks, base="base")
    other = lora() | base | {"base/model.safetensors": tensors({f"{Q}.weight": ramp(8, 12)})}
    cases.add("shape-not-in-base", other, "check", finding="shape-not-in-base", base="base")
    cases.add("shape-not-in-base-merge", other, "merge", error="wrong-base", message="has shape (8, 12)", base="base")
    unused = lora(arrays=stranger) | base
    cases.add(
        "unused-merge", unused, "merge", error="loss-refused", message="would go unused: optimizer.step", base="base"
    )
    zero = lora(arrays={a_key: ramp(2, 8), b_key: np.zeros((8, 2), np.float32)}) | base
    cases.add("zero-merge", zero, "merge", error="nothing-changed", message="would change nothing", base="base")


BOMB = r"(.|\w)+(.|\w)+(.|\w)+(.|\w)+(.|\w)+(.|\w)+[A-Z]"
"""Alternatives that overlap, nested: no engine sees ahead that it fails."""


def lora_cases() -> None:
    cases = Cases("lora")
    a_key, b_key = lora_arrays()
    bf16 = {"dtype": "bf16"}

    def refused(case: str, files: Files, message: str) -> None:
        cases.add(case, files, "convert", error="unsupported", message=message, **bf16)

    def broken(case: str, files: Files, message: str) -> None:
        cases.add(case, files, "convert", error="invalid", message=message, **bf16)

    # Variants that are not plain LoRA, by their configs and by their tensors.
    for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "PiSSA"):
        refused(f"init-{init}", lora({"init_lora_weights": init}), "which changes the base weights")
    refused("init-unknown", lora({"init_lora_weights": "clover"}), "'clover' is unknown")
    switches: dict[str, tuple[Any, str]] = {
        "use_bdlora": ({"target_modules_bd_a": ["q_proj"], "nblocks": 2}, "BD-LoRA"),
        "use_qalora": (True, "QA-LoRA"),
        "alora_invocation_tokens": ([1, 2], "aLoRA"),
        "arrow_config": ({"top_k": 3}, "Arrow"),
        "kasa_config": ({"beta": 1e-4}, "KaSA"),
        "velora_config": ({"num_groups": 2}, "VeLoRA"),
        "monteclora_config": ({"samples": 4}, "MonteCLoRA"),
        "layer_replication": ([[0, 1], [0, 1]], "layer replication"),
        "megatron_config": ({"tensor_model_parallel_size": 2}, "Megatron"),
    }
    for field, (value, message) in switches.items():
        refused(field.replace("_", "-"), lora({field: value}), message)
    refused("unknown-switch", lora({"use_tomorrows_lora": True}), "use_tomorrows_lora is unknown")
    diag = {**lora_arrays(), f"{PFX}{Q}.lora_diag": ramp(2)}
    refused("kasa-tensors", lora(arrays=diag), "it is KaSA")
    mapping = {**lora_arrays(), f"{PFX}{Q}.lora_latent_mapping.weight": ramp(2, 2)}
    refused("lora-xs-tensors", lora(arrays=mapping), "it is LoRA-XS")
    conv = {f"{PFX}conv.lora_A.weight": ramp(2, 4, 3, 3), f"{PFX}conv.lora_B.weight": ramp(4, 1, 1, 1)}
    refused("convolution-in-groups", lora({"target_modules": ["conv"]}, conv), "is a convolution with 2 groups")
    inner = {k.replace(Q, "mlp.experts.base_layer"): v for k, v in lora_arrays().items()}
    outer = {k.replace(Q, "mlp.experts"): v for k, v in lora_arrays().items()}
    bare = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    refused("wrapped-module", lora(arrays=inner), "wraps a wrapped module")
    refused("wrapped-other-module", lora({"target_parameters": ["mlp.gate.weight"]}, inner), "does not name it")
    refused("parameters-dora", lora({**bare, "use_dora": True}, {**inner, **outer}), "PEFT does not load that")
    broken("parameters-string", lora({"target_parameters": "mlp.experts.down_proj"}), "no list of names")
    uneven = {f"{PFX}mlp.experts.lora_A.weight": ramp(5, 8), f"{PFX}mlp.experts.lora_B.weight": ramp(8, 5)}
    one = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    cases.both("parameters-rank", lora(one, uneven), "half-pair", "is not of rank 2 for each expert", **bf16)
    for case, rank in (("zero", 0), ("string", "2"), ("huge", 10**9)):
        broken(
            f"parameters-rank-{case}",
            lora({**one, "rank_pattern": {"down_proj": rank}}, uneven),
            "rank_pattern gives",
        )
    twice = {**uneven, f"{PFX}mlp.experts.lora_B.bias": ramp(8)}
    refused("parameters-bias", lora({**one, "r": 5}, twice), "more than A and B")

    # Pairs and ranks.
    cases.both("no-b", lora(arrays={a_key: ramp(2, 8)}), "half-pair", "lacks lora_B", **bf16)
    cases.both("no-a", lora(arrays={b_key: ramp(8, 2)}), "half-pair", "lacks lora_A", **bf16)
    uneven = {a_key: ramp(2, 8), b_key: ramp(8, 3)}
    cases.both("ranks-differ", lora(arrays=uneven), "half-pair", "are not (r, in) and (out, r)", **bf16)
    nothing = {a_key: ramp(0, 8), b_key: ramp(8, 0)}
    cases.both("rank-zero", lora(arrays=nothing), "half-pair", "are not (r, in) and (out, r)", **bf16)
    flat = {a_key: ramp(16), b_key: ramp(16)}
    cases.both("vectors", lora(arrays=flat), "half-pair", "are not (r, in) and (out, r)", **bf16)
    cases.add("rank-not-as-config", lora({"r": 4}), "check", finding="rank-mismatch")
    cases.add("rank-not-as-pattern", lora({"rank_pattern": {"q_proj": 3}}), "check", finding="rank-mismatch")
    for case, r in (("r-zero", 0), ("r-huge", 10**9), ("r-string", "2"), ("r-boolean", True), ("r-float", 2.0)):
        cases.add(case, lora({"r": r}), "check", finding="malformed")
    cases.add(
        "b-all-zero",
        lora(arrays={a_key: ramp(2, 8), b_key: np.zeros((8, 2), "float32")}),
        "check",
        finding="all-zero",
    )
    embedding = {
        **lora_arrays(),
        f"{PFX}{Q}.lora_embedding_A": ramp(2, 8),
        f"{PFX}{Q}.lora_embedding_B": ramp(8, 2),
    }
    broken("embedding-and-linear", lora(arrays=embedding), "as an embedding and as a linear layer")

    # The scale.
    for case, alpha in (
        ("zero", 0),
        ("string", "16"),
        ("null", None),
        ("boolean", True),
        ("huge", 1e308),
        ("list", [16]),
    ):
        broken(f"alpha-{case}", lora({"lora_alpha": alpha}), f"lora_alpha of {Q} is")
    broken("alpha-pattern-string", lora({"alpha_pattern": {"q_proj": "8"}}), f"lora_alpha of {Q} is '8'")
    broken("alpha-pattern-list", lora({"alpha_pattern": ["q_proj"]}), "alpha_pattern in adapter_config.json is not")
    broken("rslora-string", lora({"use_rslora": "yes"}), "use_rslora in adapter_config.json is 'yes'")
    broken("pattern-bomb", lora({"alpha_pattern": {BOMB: 8}}), "does not end on")
    broken("pattern-too-long", lora({"alpha_pattern": {"a" * 2001: 8}}), "a pattern of 2,001 characters")
    broken("pattern-no-regex", lora({"alpha_pattern": {"(": 8}}), "is no regular expression")
    broken("pattern-recursion", lora({"alpha_pattern": {"(?P<x>(?&x)?a)": 8}}), "is no regular expression")
    broken("pattern-fuzzy", lora({"alpha_pattern": {"(?:v_proj){e<=9}": 8}}), "no module name needs")
    cases.add("rank-pattern-bomb", lora({"rank_pattern": {BOMB: 8}}), "check", finding="malformed")

    # Biases and magnitudes.
    bias = {**lora_arrays(), f"{PFX}{Q}.lora_B.bias": ramp(7)}
    broken("bias-too-short", lora({"lora_bias": True}, bias), "has shape (7,), not (8,)")
    magnitude = {**lora_arrays(), f"{PFX}{Q}.lora_magnitude_vector": ramp(8)}
    broken("dora-without-magnitude", lora({"use_dora": True}), "has no lora_magnitude_vector")
    broken("magnitude-without-dora", lora(arrays=magnitude), "use_dora is false")
    magnitude = {**lora_arrays(), f"{PFX}{Q}.lora_magnitude_vector": ramp(7)}
    broken("magnitude-too-short", lora({"use_dora": True}, magnitude), "has shape (7,), not (8,)")


VB = {
    "peft_type": "VBLORA",
    "r": 2,
    "num_vectors": 6,
    "vector_length": 4,
    "topk": 2,
    "save_only_topk_weights": False,
    "target_modules": ["q_proj"],
}
BANK = "base_model.vblora_vector_bank"


def vb_arrays() -> dict[str, np.ndarray]:
    """Full logits: A is (r, in / length, vectors), B (out / length, r, vectors)."""
    return {
        BANK: ramp(6, 4),
        f"{PFX}{Q}.vblora_logits_A": ramp(2, 2, 6),
        f"{PFX}{Q}.vblora_logits_B": ramp(2, 2, 6),
    }


def topk_arrays(k: int = 2) -> dict[str, np.ndarray]:
    indices = np.tile(np.arange(k, dtype=np.uint8), (2, 2, 1))
    weights = np.full((2, 2, k - 1), 0.75 / max(k - 1, 1), dtype=np.float32)
    arrays = {BANK: ramp(6, 4)}
    for side in "AB":
        arrays[f"{PFX}{Q}.vblora_logits_{side}_topk_indices"] = indices.copy()
        arrays[f"{PFX}{Q}.vblora_logits_{side}_topk_weights"] = weights.copy()
    return arrays


def vblora_cases() -> None:
    cases = Cases("vblora")
    to_lora = {"to": "lora"}
    only_topk = {**VB, "save_only_topk_weights": True}
    logits_a, logits_b = (f"{PFX}{Q}.vblora_logits_{side}" for side in "AB")

    def full(more: dict[str, Any] | None = None, **arrays: Any) -> Files:
        return directory({**VB, **(more or {})}, vb_arrays() | arrays)

    def topk(more: dict[str, Any] | None = None, arrays: dict[str, np.ndarray] | None = None, k: int = 2) -> Files:
        return directory({**only_topk, "topk": k, **(more or {})}, topk_arrays(k) | (arrays or {}))

    # The bank.
    for case, arrays, config in (("full", vb_arrays(), VB), ("topk", topk_arrays(), only_topk)):
        files = directory(config, {key: array for key, array in arrays.items() if key != BANK})
        cases.both(f"no-bank-{case}", files, "missing-bank", "has no vblora_vector_bank", **to_lora)
    cases.both("bank-flat", full(**{BANK: ramp(24)}), "malformed", "is no vector bank", **to_lora)
    cases.both("bank-integers", full(**{BANK: np.ones((6, 4), "int64")}), "malformed", "is no vector bank", **to_lora)
    cases.add("bank-not-as-config", full({"num_vectors": 256}), "check", finding="bank-mismatch")
    cases.add("vectors-not-as-config", full({"vector_length": 8}), "check", finding="bank-mismatch")

    # k and the flag.
    cases.both("k-over-vectors", full({"topk": 7}), "malformed", "the bank has 6 vectors", **to_lora)
    cases.both("k-zero", full({"topk": 0}), "malformed", "topk in adapter_config.json is 0", **to_lora)
    cases.both("k-not-as-tensors", topk({"topk": 3}), "half-pair", "not (.., .., 3)", **to_lora)
    cases.add("flag-says-topk", full({"save_only_topk_weights": True}), "check", finding="wrong-topk-flag")
    cases.add("flag-says-full", topk({"save_only_topk_weights": False}), "check", finding="wrong-topk-flag")

    # Logits.
    cases.both("logits-too-wide", full(**{logits_a: ramp(2, 2, 7)}), "half-pair", "not (.., .., 6)", **to_lora)
    cases.both("logits-flat", full(**{logits_a: ramp(2, 12)}), "half-pair", "has shape (2, 12)", **to_lora)
    cases.both("ranks-differ", full(**{logits_a: ramp(3, 2, 6)}), "half-pair", "rank 3 in A, 2 in B", **to_lora)
    cases.add("rank-not-as-config", full({"r": 4}), "check", finding="rank-mismatch")
    lacking = directory(VB, {key: array for key, array in vb_arrays().items() if key != logits_b})
    cases.both("no-logits-b", lacking, "half-pair", "lacks logits_B", **to_lora)
    nan = vb_arrays()[logits_a].copy()
    nan[0, 0, 0] = np.nan
    cases.both("logit-nan", full(**{logits_a: nan}), "nan", "a logit is NaN or infinite", to="topk")

    # Top-k tensors.
    indices, weights = f"{logits_a}_topk_indices", f"{logits_a}_topk_weights"
    outside = topk_arrays()[indices].copy()
    outside[1, 1, 1] = 6
    cases.both(
        "index-outside-bank", topk(arrays={indices: outside}), "index-outside-bank", "outside the bank", **to_lora
    )
    negative = outside.astype(np.int16)
    negative[1, 1, 1] = -1
    cases.both(
        "index-negative", topk(arrays={indices: negative}), "index-outside-bank", "outside the bank", **to_lora
    )
    double = np.zeros((2, 2, 2), np.uint8)
    cases.both(
        "index-twice", topk(arrays={indices: double}), "duplicate-index", "one vector of the bank twice", **to_lora
    )
    floats = topk_arrays()[indices].astype(np.float32)
    cases.both("index-float", topk(arrays={indices: floats}), "half-pair", "indices F32", **to_lora)
    short = topk_arrays()[weights][:1]
    cases.both("weights-too-few", topk(arrays={weights: short}), "half-pair", "weights (1, 2, 1)", **to_lora)
    narrow = topk_arrays()[weights].astype(np.float16)
    cases.add("weights-16-bit", topk(arrays={weights: narrow}), "check", finding="narrow-topk-weights")
    over = np.full((2, 2, 2), 0.5, np.float32)
    over[0, 0] = np.nextafter(np.float32(0.5), np.float32(1))
    cases.add("last-weight-negative", topk(arrays={weights: over}, k=3), "check", finding="negative-topk-weight")
    lacking = directory(only_topk, {key: array for key, array in topk_arrays().items() if key != weights})
    cases.both("no-weights-a", lacking, "half-pair", "lacks weights_A", **to_lora)
    mixed = directory(VB, vb_arrays() | {key.replace(Q, V): array for key, array in topk_arrays().items()})
    cases.add("mixed", mixed, "convert", error="unsupported", message="side by side", **to_lora)
    cases.add(
        "topk-to-full", topk(), "convert", error="loss-refused", message="the others are gone", to="full-logits"
    )


VERA = {
    "peft_type": "VERA",
    "r": 3,
    "projection_prng_key": 11,
    "save_projection": True,
    "target_modules": ["q_proj"],
}


def uniform(bits: Any, rows: int, columns: int) -> np.ndarray:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    low, high = np.float32(-bound), np.float32(bound)
    raw = (bits.random_raw(rows * columns) & np.uint64(0xFFFFFF)).astype(np.float64)
    return (raw * 2.0**-24 * np.float64(high - low) + np.float64(low)).astype(np.float32).reshape(rows, columns)


def projections(seed: int = 11, into: int = 8, out: int = 8) -> dict[str, np.ndarray]:
    bits = np.random.RandomState(seed)._bit_generator
    return {"base_model.vera_A": uniform(bits, 3, into), "base_model.vera_B": uniform(bits, out, 3)}


def lambdas(module: str = Q, r: int = 3, out: int = 8) -> dict[str, np.ndarray]:
    return {f"{PFX}{module}.vera_lambda_b": ramp(out), f"{PFX}{module}.vera_lambda_d": ramp(r)}


def recipe(version: Any = 1, **changed: Any) -> dict[str, str]:
    """The metadata that records how the projections of seed 11 are drawn."""
    shapes = {"vera_A": [3, 8], "vera_B": [8, 3]}
    record = {
        "name": "uniform",
        "generator": "mt19937",
        "seed": 11,
        "draws": [
            {
                "name": name,
                "shape": shape,
                "bound": (math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))).hex(),
            }
            for name, shape in shapes.items()
        ],
        "order": "row-major, one 32-bit draw per element, low 24 bits",
        "arithmetic": "fused",
        "through": "F32",
        "stored": "F32",
        "sha256": {
            key.removeprefix("base_model."): hashlib.sha256(array.tobytes()).hexdigest()
            for key, array in projections().items()
        },
        "keys": {name: f"base_model.{name}" for name in shapes},
    }
    return {"format": "pt", "adapterpack": json.dumps({"version": version, "recipe": {**record, **changed}})}


def vera_cases() -> None:
    cases = Cases("vera")
    llama = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 16,
        "dtype": "float32",
    }
    base = {"base/config.json": text(llama)}
    to_lora = {"to": "lora", "base": "base"}

    def projection(more: dict[str, Any] | None = None, **arrays: Any) -> Files:
        return directory({**VERA, **(more or {})}, projections() | lambdas() | arrays)

    def seed(metadata: dict[str, str] | None = None, more: dict[str, Any] | None = None) -> Files:
        return directory({**VERA, "save_projection": False, **(more or {})}, lambdas(), metadata)

    def refused(case: str, files: Files, message: str, error: str = "invalid", to: str = "projection") -> None:
        cases.add(case, files, "convert", error=error, message=message, to=to)

    # Projections.
    for name, other in (("A", "B"), ("B", "A")):
        lone = lambdas() | {f"base_model.vera_{name}": projections()[f"base_model.vera_{name}"]}
        cases.add(
            f"no-{other.lower()}", directory(VERA, lone), "inspect", error="invalid", message="one projection of two"
        )
    cases.add("flag-says-seed", projection({"save_projection": False}), "check", finding="wrong-projection-flag")
    cases.add("flag-says-projection", seed(more={"save_projection": True}), "check", finding="wrong-projection-flag")
    small = projection(**{"base_model.vera_B": ramp(7, 3)})
    cases.add("b-too-short", small, "check", finding="projection-shape")
    cases.add("b-too-short-convert", small | base, "convert", error="invalid", message="do not fit rank 3", **to_lora)
    slim = projection(**{"base_model.vera_A": ramp(2, 8)})
    cases.add("a-other-rank-convert", slim | base, "convert", error="invalid", message="do not fit rank 3", **to_lora)
    short = projection(**{"base_model.vera_A": ramp(3, 7)})
    cases.add("a-too-narrow-convert", short | base, "convert", error="wrong-base", message="7 wide", **to_lora)
    cases.add("no-base", projection(), "convert", error="wrong-base", message="needs the shapes", to="lora")
    unlike = base["base/config.json"].replace(b"llama", b"gpt2")
    gpt2 = projection() | {"base/config.json": unlike}
    cases.add("other-base", gpt2, "convert", error="wrong-base", message="config.json", **to_lora)

    # Vectors.
    d_key = f"{PFX}{Q}.vera_lambda_d"
    lone = directory(VERA, {key: array for key, array in (projections() | lambdas()).items() if key != d_key})
    cases.add("no-lambda-d", lone, "check", finding="half-pair")
    cases.add("no-lambda-d-convert", lone, "convert", error="invalid", message="lacks lambda_d", dtype="bf16")
    cases.add("lambda-matrix", projection(**{d_key: ramp(3, 1)}), "check", finding="half-pair")
    cases.add("rank-not-as-config", projection({"r": 4}), "check", finding="rank-mismatch")
    uneven = projection(**lambdas(V, 2))
    cases.add("ranks-differ", uneven, "convert", error="invalid", message="different ranks", dtype="bf16")

    # The seed.
    refused("other-seed", projection({"projection_prng_key": 12}), "no recipe gives", "loss-refused", "seed")
    for case, key in (("huge", 1 << 64), ("string", "11"), ("float", 11.0), ("boolean", True), ("null", None)):
        refused(f"prng-key-{case}", projection({"projection_prng_key": key}), "projection_prng_key is", to="seed")
    refused("seed-without-base", seed(), "needs the shapes", "wrong-base")

    # Recorded recipes.
    refused("recipe-other-seed", seed(recipe(seed=12)), "another vera_A")
    digests = json.loads(recipe()["adapterpack"])["recipe"]["sha256"]
    refused("recipe-other-digest", seed(recipe(sha256={**digests, "vera_B": "0" * 64})), "another vera_B")
    refused("recipe-digest-missing", seed(recipe(sha256={"vera_A": digests["vera_A"]})), "one digest for each")
    refused("recipe-no-digests", seed(recipe(sha256={})), "one digest for each")
    refused("recipe-other-arithmetic", seed(recipe(arithmetic="two-roundings")), "another vera_")
    refused("recipe-unknown-arithmetic", seed(recipe(arithmetic="three-roundings")), "unknown arithmetic")
    refused("recipe-unknown-dtype", seed(recipe(through="F31")), "is not a recipe")
    refused("recipe-integer-dtype", seed(recipe(stored="I32")), "unknown arithmetic or dtype")
    refused("recipe-version-2", seed(recipe(version=2)), "has version 2", "unsupported")
    refused("recipe-unknown-name", seed(recipe(name="normal")), "unknown recipe 'normal'", "unsupported")
    refused("recipe-seed-string", seed(recipe(seed="11")), "is not a recipe")
    refused("recipe-no-draws", seed(recipe(draws=[], sha256={})), "does not draw vera_A and vera_B")

    def draws(shape: list[Any], bound: str = "0x1p-1") -> list[dict[str, Any]]:
        return [{"name": name, "shape": shape, "bound": bound} for name in ("vera_A", "vera_B")]

    refused("recipe-huge", seed(recipe(draws=draws([1 << 31, 1 << 31]))), "would draw more than", "unsupported")
    refused("recipe-shape-negative", seed(recipe(draws=draws([-3, 8]))), "is not a recipe")
    refused("recipe-shape-float", seed(recipe(draws=draws([3.0, 8]))), "is not a recipe")
    refused("recipe-bound-nan", seed(recipe(draws=draws([3, 8], "nan"))), "is not a recipe")
    refused("recipe-bound-infinite", seed(recipe(draws=draws([3, 8], "inf"))), "is not a recipe")
    twice = [*draws([3, 8]), draws([3, 8])[0]]
    refused("recipe-draws-twice", seed(recipe(draws=twice)), "one digest for each")
    foreign = {"vera_A": f"{PFX}{Q}.vera_lambda_b", "vera_B": "base_model.vera_B"}
    refused("recipe-foreign-key", seed(recipe(keys=foreign)), "the recorded recipe calls vera_A")
    refused("recipe-not-json", seed({"adapterpack": "pickle"}), '__metadata__["adapterpack"]')
    refused("recipe-array", seed({"adapterpack": "[]"}), "object is wanted")
    refused("recipe-duplicate-key", seed({"adapterpack": '{"version":1,"version":1}'}), "stands twice")
    refused("recipe-missing", seed({"adapterpack": '{"version":1}'}), "is not a recipe")


def main() -> None:
    for old in ROOT.glob("*/invalid"):
        shutil.rmtree(old)
    for case, (data, message, library) in headers().items():
        expect = {"error": "invalid", "message": message, "library": library}
        write(ROOT / "safetensors" / "invalid" / case, {"model.safetensors": data}, expect)
    peft()
    lora_cases()
    vblora_cases()
    vera_cases()
    written = [p for p in ROOT.glob("*/invalid/**/*") if p.is_file()]
    cases = len(list(ROOT.glob("*/invalid/*")))
    print(f"{cases} cases, {sum(p.stat().st_size for p in written):,} bytes in {len(written)} files")


if __name__ == "__main__":
    main()
