"""Strict JSON, safetensors against the library in both directions, hostile files, names, patterns, recipes."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from adapterpack import limits
from adapterpack.draws import mt19937, uniform
from adapterpack.errors import ChangedWhileReading, InvalidFile, Unsupported
from adapterpack.io import json as strict_json
from adapterpack.io import safetensors as ours
from adapterpack.io.files import OpenFile, WholeFile, read_small
from adapterpack.io.paths import plain_name
from adapterpack.io.patterns import Budget, Pattern, peft_patterns
from adapterpack.recipes import (
    FUSED,
    METADATA_KEY,
    TWO_ROUNDINGS,
    Recipe,
    Uniform,
    UniformRecipe,
    from_metadata,
)
from adapterpack.tensor import (
    BF16,
    DTYPES,
    F16,
    F32,
    Memory,
    Tensor,
    cast,
    chunks,
    from_numpy,
    narrowest,
    numpy_dtype,
)

SMALL = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a":1,"a":1}', "twice"),
        ('{"x":[{"a":1,"\\u0061":1}]}', "twice"),
        ('{"a":NaN}', "NaN"),
        ('{"a":-Infinity}', "Infinity"),
        ('{"a":1e999}', "too large"),
        ('{"a":-1e999}', "too large"),
        ('{"a":"\\udfff"}', "surrogates"),
        ('{"\\uD800":1}', "surrogates"),
        ('{"a":' + "[" * 32 + "]" * 32 + "}", "nested deeper than 32"),
        ('{"a":' * 33 + "1" + "}" * 33, "nested deeper than 32"),
        ("[]", "object is wanted"),
        ("null", "object is wanted"),
        ("1", "object is wanted"),
        ("", "Expecting value"),
        ("{'a':1}", "Expecting"),
        ('{"a":1,}', "in x"),
        ('{"a":1}{"a":1}', "Extra data"),
        ("\ufeff{}", "BOM"),
        ('{"a":"\t"}', "control character"),
        ('{"a":01}', "Expecting"),
        ('{"a":' + "9" * 5000 + "}", "digits"),
    ],
)
def test_what_json_means_twice_or_not_at_all_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidFile) as caught:
        strict_json.parse(text.encode(), "in x" if reason == "in x" else "x")
    assert reason in caught.value.message


def test_nesting_at_the_limit_surrogate_pairs_and_large_numbers_are_read() -> None:
    deep = '{"a":' + "[" * 31 + "]" * 31 + "}"
    assert strict_json.parse(deep.encode(), "x")
    assert strict_json.parse(b'{"a":"\\ud83d\\ude00", "b":1e308, "c":-0.0, "d":123456789012345678901}', "x") == {
        "a": "\U0001f600",
        "b": 1e308,
        "c": -0.0,
        "d": 123456789012345678901,
    }


def test_nesting_without_bound_ends_quickly() -> None:
    started = time.monotonic()
    for n in (1_000, 100_000, 1_000_000):
        with pytest.raises(InvalidFile):
            strict_json.parse(b'{"a":' + b"[" * n + b"]" * n + b"}", "x")
    assert time.monotonic() - started < 10


def test_the_order_of_keys_survives() -> None:
    text = b'{"z": 1, "a": {"y": 2, "b": 3}}'
    assert json.dumps(strict_json.parse(text, "x")).encode() == text
    assert strict_json.parse(strict_json.dump(strict_json.parse(text, "x")), "x") == json.loads(text)


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_good_json_is_read_as_python_reads_it(value: dict[str, Any]) -> None:
    assert strict_json.parse(strict_json.dump(value), "x") == value
    assert strict_json.parse(json.dumps(value).encode(), "x") == value


@given(st.binary(max_size=40) | st.text(alphabet='{}[]":,\\u0dD8 1eE+-.truefalsn', max_size=40).map(str.encode))
def test_no_bytes_make_anything_but_an_object_or_an_invalid_file(data: bytes) -> None:
    try:
        assert isinstance(strict_json.parse(data, "x"), dict)
    except InvalidFile:
        return
    json.loads(data)


def test_a_config_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(b"{}" + b" " * limits.CONFIG_BYTES)
    with pytest.raises(InvalidFile, match=r"at most 4,194,304 are read"):
        strict_json.read(path)


# ---------------------------------------------------------------- safetensors: both directions

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_TORCH_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}


def _torch(tensor: Tensor) -> torch.Tensor:
    dtype = (_TORCH | _TORCH_INTEGERS)[tensor.dtype.name]
    if not tensor.numel:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(tensor.bytes()), dtype=dtype).reshape(tensor.shape)


NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def _tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    found = {}
    for name in draw(st.lists(NAMES, unique=True, max_size=6)):
        dtype, shape = DTYPES[draw(st.sampled_from(sorted(DTYPES)))], draw(SHAPES)
        bits = math.prod(shape) * dtype.bits
        if bits % 8:
            shape = (8, *shape[1:])
            bits = math.prod(shape) * dtype.bits
        data = np.random.default_rng(draw(st.integers(0, 99))).bytes(bits // 8)
        found[name] = Tensor(dtype, shape, Memory(data))
    return found


METADATA = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.text(max_size=8))


def _written(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    sink = io.BytesIO()
    ours.write(sink, tensors, metadata)
    return sink.getvalue()


def _read(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], bytes]], dict[str, str]]:
    with OpenFile(path) as file:
        header = ours.read(file)
        return {n: (t.dtype.name, t.shape, t.bytes()) for n, t in header.tensors.items()}, dict(header.metadata)


def _library(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {n: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in safetensors.deserialize(data)}


@SMALL
@given(_tensors(), METADATA)
def test_the_library_reads_what_we_write(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    data = _written(tensors, metadata)
    want = {name: (t.dtype.name, t.shape, t.bytes()) for name, t in tensors.items()}
    assert _library(data) == want
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    with safetensors.safe_open(path, "np") as f:
        assert (f.metadata() or {}) == metadata
        assert set(f.keys()) == set(tensors)
    assert _read(path) == (want, metadata)


@SMALL
@given(_tensors(), METADATA)
def test_we_read_what_the_library_writes(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    known = {n: t for n, t in tensors.items() if t.dtype.name in _TORCH or t.dtype.name in _TORCH_INTEGERS}
    path = tmp_path / "t.safetensors"
    save_file({n: _torch(t) for n, t in known.items()}, path, metadata or None)
    assert _read(path) == ({n: (t.dtype.name, t.shape, t.bytes()) for n, t in known.items()}, metadata)
    assert _library(path.read_bytes()) == _read(path)[0]


@given(_tensors(), METADATA, st.randoms())
def test_the_same_content_gives_the_same_bytes(
    tensors: dict[str, Tensor], metadata: dict[str, str], rng: Any
) -> None:
    data = _written(tensors, metadata)
    names, keys = list(tensors), list(metadata)
    rng.shuffle(names)
    rng.shuffle(keys)
    assert _written({n: tensors[n] for n in names}, {k: metadata[k] for k in keys}) == data
    assert int.from_bytes(data[:8], "little") % 8 == 0


@given(_tensors())
def test_every_tensor_is_aligned_to_its_elements(tensors: dict[str, Tensor]) -> None:
    at = 0
    for name in ours.order(tensors):
        assert at % max(tensors[name].dtype.bits // 8, 1) == 0
        at += tensors[name].nbytes


def test_the_bytes_are_pinned() -> None:
    tensors = {
        "b": Tensor(F32, (1,), Memory(b"\0\0\x80?")),
        "ä": Tensor(F16, (2,), Memory(b"abcd")),
        "a": Tensor(DTYPES["I64"], (), Memory(bytes(8))),
    }
    header = (
        '{"__metadata__":{"a":"2","format":"pt"},"a":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
        '"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},"ä":{"dtype":"F16","shape":[2],"data_offsets":[12,16]}}'
    ).encode()
    header += b" " * (-len(header) % 8)
    want = len(header).to_bytes(8, "little") + header + bytes(8) + b"\0\0\x80?abcd"
    assert _written(tensors, {"format": "pt", "a": "2"}) == want


# ---------------------------------------------------------------- safetensors: damage

_SEED = _written(
    {
        "w": Tensor(F32, (2, 2), Memory(bytes(16))),
        "e": Tensor(F16, (0, 3), Memory(b"")),
        "b": Tensor(DTYPES["U8"], (3,), Memory(b"abc")),
    },
    {"format": "pt"},
)
_TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"-", b"1e1", b"9" * 20, b"null", b"true", b"\\u0000"]
_TOKENS += [b" ", b"\0", b"\xff", b"F32", b"F64", b"shape", b"__metadata__", b"NaN", b"\\ud800", b'"w":', b"4", b"16"]


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    """A good file with a few edits in its header, the length mended or not, the data cut or grown."""
    size = int.from_bytes(_SEED[:8], "little")
    header, body = bytearray(_SEED[8 : 8 + size]), _SEED[8 + size :]
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(header)))
        cut = draw(st.integers(0, 8))
        header[at : at + cut] = draw(st.sampled_from(_TOKENS) | st.binary(max_size=3))
    length = draw(st.sampled_from([len(header)] * 6 + [size, len(header) + 1, 0, 1 << 40]))
    body = body[: draw(st.integers(0, len(body)))] if draw(st.booleans()) else body + draw(st.binary(max_size=4))
    return length.to_bytes(8, "little") + bytes(header) + body


@settings(max_examples=1500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_damaged())
@example(_SEED)
def test_damaged_files_are_never_read_where_the_library_refuses_and_never_read_differently(
    tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    try:
        got = _read(path)[0]
    except InvalidFile as e:
        assert "\n" not in e.message and len(e.message) < 1000
        return
    assert got == _library(data)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64))
def test_random_bytes_give_an_invalid_file_and_nothing_else(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidFile):
        _read(path)


def test_every_truncation_and_extension_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    for data in [*(_SEED[:n] for n in range(len(_SEED))), *(_SEED + bytes(n) for n in range(1, 65))]:
        path.write_bytes(data)
        with pytest.raises(InvalidFile):
            _read(path)


@pytest.mark.parametrize("space", [" ", "\n", "\t", "\r", " \n\t\r "])
def test_white_space_around_the_header_is_read(tmp_path: Path, space: str) -> None:
    header = f'{space}{{"a" : {{"dtype":"U8",{space}"shape":[1],"data_offsets":[0,1]}} }}{space}'.encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    assert _read(path) == ({"a": ("U8", (1,), b"x")}, {})


def test_a_name_that_looks_like_a_path_is_a_name(tmp_path: Path) -> None:
    tensors = {"../../etc/passwd": Tensor(DTYPES["U8"], (1,), Memory(b"x")), "C:\\x": Tensor(F32, (0,), Memory(b""))}
    path = tmp_path / "t.safetensors"
    path.write_bytes(_written(tensors, {}))
    assert _read(path)[0].keys() == tensors.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


# ---------------------------------------------------------------- safetensors: limits


def _framed(path: Path, header: bytes, size: int | None = None) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    if size is not None:
        os.truncate(path, size)
    return path


def _empty(n: int) -> bytes:
    entry = '"t%06x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(entry % i for i in range(n)) + "}").encode()


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(lambda: _empty(limits.TENSORS + 1), id="200001-tensors"),
        pytest.param(lambda: b'{"a":[' + b"[]," * 5_000_000 + b"[]]}", id="lists"),
        pytest.param(lambda: b'{"a":[' + b"0," * 7_500_000 + b"0]}", id="numbers"),
        pytest.param(lambda: b'{"a":' * 3_000_000 + b"0" + b"}" * 3_000_000, id="nested"),
        pytest.param(lambda: b"{" + b",".join(b'"%x":0' % i for i in range(1_300_000)) + b"}", id="keys"),
        pytest.param(lambda: b"{" + b",".join([b'"a":0'] * 2_000_000) + b"}", id="one-key"),
        pytest.param(lambda: b" " * (15 << 20), id="spaces"),
        pytest.param(lambda: b'{"' + b"a" * (15 << 20) + b'":0}', id="long-name"),
        pytest.param(lambda: b'{"a":"' + b"\\u0061" * (2 << 20) + b'"}', id="escapes"),
        pytest.param(lambda: b'{"__metadata__":{"a":"' + b"b" * (2 << 20) + b'"}}', id="metadata"),
        pytest.param(lambda: b"{}".ljust((16 << 20) + 1), id="over-16-mib"),
        pytest.param(
            lambda: b'{"' + b"a" * (1 << 20) + b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', id="1-mb"
        ),
    ],
)
def test_a_huge_header_is_refused_in_bounded_time(tmp_path: Path, header: Callable[[], bytes]) -> None:
    path = _framed(tmp_path / "t.safetensors", header())
    started = time.process_time()
    with pytest.raises(InvalidFile):
        _read(path)
    assert time.process_time() - started < 8


def test_the_limits_themselves_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    name = "n" * limits.NAME_BYTES
    entry = {"dtype": "U8", "shape": [0, 1, 1, 1, 1, 1, 1, 1 << 31], "data_offsets": [0, 0]}
    _framed(path, json.dumps({name: entry}).encode())
    assert _read(path)[0] == {name: ("U8", (0, 1, 1, 1, 1, 1, 1, 1 << 31), b"")}
    text = "b" * (limits.METADATA_BYTES - 1)
    _framed(path, json.dumps({"__metadata__": {"a": text}}).encode())
    assert _read(path)[1] == {"a": text}
    _framed(path, b"{}".ljust(limits.HEADER_BYTES))
    assert _read(path) == ({}, {})


def test_a_sparse_terabyte_costs_nothing(tmp_path: Path) -> None:
    n = (1 << 40) // 2
    header = b'{"a":{"dtype":"F16","shape":[524288,1048576],"data_offsets":[0,%d]}}' % (2 * n)
    path = _framed(tmp_path / "t.safetensors", header)
    os.truncate(path, 8 + len(header) + 2 * n)
    started = time.monotonic()
    with OpenFile(path) as file:
        tensor = ours.read(file).tensors["a"]
        assert tensor.nbytes == 1 << 40
        assert not tensor.rows(1 << 18, (1 << 18) + 1).any()
    os.truncate(path, 1 << 40)
    with pytest.raises(InvalidFile, match="accounts for"):
        _read(path)
    with pytest.raises(InvalidFile, match="at most"):
        read_small(path, limits.CONFIG_BYTES)
    assert time.monotonic() - started < 5


# ---------------------------------------------------------------- what is no file


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "absent", "dangling", "loop", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    import socket

    path = tmp_path / "x"
    with socket.socket(socket.AF_UNIX) as s:
        {
            "fifo": lambda: os.mkfifo(path),
            "directory": path.mkdir,
            "device": lambda: path.symlink_to("/dev/zero"),
            "absent": lambda: None,
            "dangling": lambda: path.symlink_to(tmp_path / "nowhere"),
            "loop": lambda: path.symlink_to(path),
            "socket": lambda: s.bind(str(path)),
        }[kind]()
        started = time.monotonic()
        for read in (OpenFile, lambda p: read_small(p, 100), strict_json.read, WholeFile(path, 5).read):
            with pytest.raises(InvalidFile):
                read(*((0, 5) if read.__name__ == "read" and read is not strict_json.read else (path,)))
        assert time.monotonic() - started < 2


def test_a_file_that_changes_while_it_is_read_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(1000))
    with OpenFile(path) as file:
        file.check_unchanged()
        assert file.read(990, 1000) == bytes(10)
        os.truncate(path, 500)
        assert file.read(0, 500) == bytes(500)
        with pytest.raises(ChangedWhileReading):
            file.read(490, 510)
        with pytest.raises(ChangedWhileReading):
            file.check_unchanged()
    path.write_bytes(b"a" * 1000)
    with OpenFile(path) as file:
        os.utime(path, ns=(1, 1))
        with pytest.raises(ChangedWhileReading):
            file.check_unchanged()
    with OpenFile(path) as file:
        with path.open("ab") as out:
            out.write(b"more")
        with pytest.raises(ChangedWhileReading):
            file.check_unchanged()


@pytest.mark.parametrize("size", [0, 999, 1001])
def test_a_carried_file_that_has_another_size_now_is_found_out(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(1000))
    source = WholeFile(path, 1000)
    assert source.read(0, 1000) == bytes(1000)
    path.write_bytes(bytes(size))
    with pytest.raises(ChangedWhileReading):
        source.read(0, 10)


def test_replacing_an_open_file_changes_nothing_for_its_reader(tmp_path: Path) -> None:
    path, other = tmp_path / "x", tmp_path / "y"
    path.write_bytes(b"old")
    with OpenFile(path) as file:
        other.write_bytes(b"new and longer")
        other.replace(path)
        assert file.read(0, 3) == b"old"
        file.check_unchanged()


# ---------------------------------------------------------------- names

HOSTILE = [
    "", ".", "..", "../x", "a/../b", "a/b", "/etc/passwd", "//server/share", "\\\\server\\share", "..\\x", "a\\b",
    "C:x", "C:\\x", "c:", "x:stream", "a\0b", "\0", "a\nb", "a\rb", "\x1b[31m", "a\x7fb", "a\x85b", "\ud800", "x.",
    "x ", "x..", "...", "CON", "con.safetensors", "Aux.txt", "NUL", "nul .txt", "COM1", "lpt9.bin", "PRN.a.b", "a*",
    "a?b", 'a"b', "<a", "a>", "a|b", "a" * 256, "é" * 128, None, 1, True, ["x"], {"x": 1}, b"x",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda n: ascii(n)[:24])
def test_a_hostile_name_is_refused(name: object) -> None:
    with pytest.raises(InvalidFile) as caught:
        plain_name(name, "index.json")
    assert "\n" not in caught.value.message and "\x1b" not in caught.value.message


def test_there_are_forty_hostile_names() -> None:
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "é.safetensors", "a b", ".hidden", "CONFIG", "~x", "a" * 255, "-x", "层"],
)
def test_an_honest_name_passes_unchanged(name: str) -> None:
    assert plain_name(name, "index.json") == name


@given(st.text(max_size=20))
def test_a_name_that_passes_stays_in_its_directory(name: str) -> None:
    try:
        plain_name(name, "x")
    except InvalidFile:
        return
    assert os.path.normpath(os.path.join("/d", name)) == f"/d/{name}"  # noqa: PTH118
    assert Path("/d", name).parent == Path("/d")


# ---------------------------------------------------------------- patterns

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "q_proj",
    "xq_proj",
    "encoder.layer.3.attention.output.dense",
]


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj"],
        ["proj", "q_proj"],
        [r"layers\.1.*", "q_proj"],
        ["q_proj", r"layers\.1.*"],
        [r".*\.q_proj", "q_proj"],
        ["^q_proj", "q_proj"],
        ["model.layers.0.self_attn.q_proj", r"[a-z]+\.layers\.\d+\..*"],
        ["q_proj|down_proj"],
        [r"(self_attn|mlp)\.(q|down)_proj"],
        ["", "q_proj"],
        [r"layer\.\d{1,2}\.attention.output.dense"],
        ["(?i)Q_PROJ"],
    ],
)
@pytest.mark.parametrize("module", MODULES)
def test_the_first_pattern_in_file_order_wins_as_in_peft(keys: list[str], module: str) -> None:
    try:
        theirs = get_pattern_key(keys, module)
    except re.error:
        with pytest.raises(InvalidFile):
            list(peft_patterns(keys, "alpha_pattern"))
        return
    mine = next((p.text for p in peft_patterns(keys, "alpha_pattern") if p.matches(module)), module)
    assert mine == theirs


@given(st.lists(st.text("qpj_.*+?|()[]^$\\d0", max_size=6), min_size=1, max_size=3), st.sampled_from(MODULES))
def test_random_patterns_match_as_in_peft(keys: list[str], module: str) -> None:
    try:
        theirs = get_pattern_key(keys, module)
        for key in keys:
            re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError):
        return
    try:
        mine = next((p.text for p in peft_patterns(keys, "alpha_pattern") if p.matches(module)), module)
    except InvalidFile:
        return
    assert mine == theirs


BOMBS = [
    "(.|.)+[^a-z]",
    r"(?:(?:.|\w)+)+[A-Z]",
    "(a|a)*" * 30 + "b",
    "((a{1,1000}){1,1000}){1,1000}",
    "(?R)?a",
    "((?R))",
    "(?P<x>(?&x)?a)",
    "(?:" * 400 + "a" + ")*" * 400,
    "(?:abcdefghij){e<=9}",
    "[[:alpha:]]+",
    "a" * 2001,
    "(",
    "a{2,1}",
    r"\p{L}+",
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda b: b[:20])
def test_a_pattern_bomb_ends_within_its_limit(bomb: str) -> None:
    started = time.monotonic()
    try:
        for pattern in peft_patterns([bomb], "rank_pattern"):
            pattern.matches("a" * 60 + "." + MODULES[0])
    except InvalidFile as e:
        assert e.message.startswith("rank_pattern:")
        assert "\n" not in e.message
    assert time.monotonic() - started < 4 * limits.PATTERN_SECONDS


def test_many_slow_patterns_share_one_budget() -> None:
    budget = Budget(0.2)
    slow = Pattern("(.|.)+[^a-z]", where="rank_pattern", budget=budget)
    started = time.monotonic()
    with pytest.raises(InvalidFile, match="does not end"):
        for n in range(10_000):
            slow.matches("a" * (10 + n % 6))
    assert time.monotonic() - started < 2


def test_ten_thousand_patterns_are_read_and_no_more() -> None:
    patterns = list(peft_patterns((f"layer{i}" for i in range(limits.PATTERNS)), "rank_pattern"))
    assert len(patterns) == limits.PATTERNS
    with pytest.raises(InvalidFile, match="more than 10,000 patterns"):
        list(peft_patterns((f"layer{i}" for i in range(limits.PATTERNS + 1)), "rank_pattern"))


# ---------------------------------------------------------------- casts


def _every_f32(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random bit patterns, so that subnormals, infinities and NaN are among them, and the edges."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32)
    edges = [0, 0x80000000, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x3F808000, 0x3F818000, 0x3F80FFFF]
    edges += [0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 0x387FC000, 0x7F7F7FFF, 0x7F7F8000]
    return np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)


@pytest.mark.parametrize("to", [BF16, F16], ids=str)
def test_a_cast_rounds_to_nearest_even_as_torch_does(to: Any) -> None:
    values = _every_f32(1 << 18)
    got = cast(from_numpy(values), to).bytes()
    want = torch.from_numpy(values.copy()).to(_TORCH[to.name]).view(torch.uint8).numpy().tobytes()
    a, b = np.frombuffer(got, np.uint16), np.frombuffer(want, np.uint16)
    finite = ~np.isnan(values)
    assert (a[finite] == b[finite]).all()
    assert np.isnan(np.frombuffer(got, numpy_dtype(to))[~finite].astype(np.float32)).all()


@pytest.mark.parametrize("source", [BF16, F16], ids=str)
def test_widening_keeps_every_one_of_the_65536_values(source: Any) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = cast(Tensor(source, (1 << 16,), Memory(bits.tobytes())), F32)
    theirs = torch.from_numpy(bits.view(np.int16).copy()).view(_TORCH[source.name]).float().numpy()
    assert np.array_equal(wide.numpy(), theirs, equal_nan=True)
    back = np.frombuffer(cast(wide, source).bytes(), np.uint16)
    number = ~np.isnan(theirs)
    assert (back[number] == bits[number]).all()


@pytest.mark.parametrize("to", [BF16, F16], ids=str)
def test_a_cast_from_f64_rounds_once(to: Any) -> None:
    """Halfway points and their neighbours, closer than float32 can tell: against exact arithmetic."""
    width = 8 if to is BF16 else 11
    rng = np.random.default_rng(3)
    mantissa = rng.integers(1 << (width - 1), 1 << width, 10_000).astype(np.float64)
    exponent = rng.integers(-6, 6, 10_000)
    nudge = rng.choice([0.0, 2.0**-30, -(2.0**-30), 0.25, -0.25], 10_000)
    exact = (mantissa + 0.5 + nudge) * 2.0**exponent * rng.choice([1, -1], 10_000)
    down = np.floor(mantissa + 0.5 + nudge)
    rest = mantissa + 0.5 + nudge - down
    up = (rest > 0.5) | ((rest == 0.5) & (down % 2 == 1))
    want = (down + up) * 2.0**exponent * np.sign(exact)
    assert (cast(from_numpy(exact), to).numpy().astype(np.float64) == want).all()


@given(st.integers(0, 2100), st.integers(0, 2100))
def test_any_range_of_a_cast_is_that_range_of_the_whole(a: int, b: int) -> None:
    tensor = cast(from_numpy(_every_f32(1000, seed=5)), F16)
    whole = tensor.bytes()
    assert tensor.nbytes == len(whole) == 2 * tensor.numel
    assert tensor.source.read(a, max(a, min(b, len(whole)))) == whole[a : max(a, min(b, len(whole)))]


def test_chunks_join_to_the_whole() -> None:
    tensor = cast(from_numpy(_every_f32(5000)), BF16)
    for start, stop in ((0, None), (0, 10_000), (1, 10_000), (3, 4097), (10_000, 10_000)):
        assert b"".join(chunks(tensor.source, start, stop)) == tensor.bytes()[start:stop]
    assert list(chunks(Memory(b""))) == []


def test_narrowest_is_exact_and_counts_bits() -> None:
    cases: list[tuple[Any, Any]] = [
        (np.float32([1, 0.5, -0.0, np.inf, -np.inf]), BF16),
        (np.float32([1 + 2**-10, 65504]), F16),
        (np.float32([1 + 2**-10, 3e38]), F32),
        (np.float32([1e-7, 1e-40]), F32),
        (np.float64([1 + 2**-20]), F32),
        (np.float64([0.1]), DTYPES["F64"]),
        (np.float64([1 + 2**-10]), F16),
        (np.float16([0.1]), F16),
        (np.array([0.1], ml_dtypes.bfloat16), BF16),
        (np.int64([1]), DTYPES["I64"]),
        (np.float32([]), F32),
    ]
    for values, want in cases:
        assert narrowest(from_numpy(values)) is want, values
    payload = np.array([0x7F801234], np.uint32).view(np.float32)
    assert narrowest(from_numpy(payload)) is F32, "the payload of a NaN counts"


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=20))
def test_narrowing_and_widening_again_gives_the_same_bits(values: list[float]) -> None:
    tensor = from_numpy(np.array(values, np.float32))
    there = cast(tensor, narrowest(tensor))
    assert cast(there, F32).bytes() == tensor.bytes()


def test_one_odd_value_far_behind_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.ones((limits.CHUNK_BYTES // 4) * 2 + 7, np.float32)
    assert narrowest(from_numpy(values)) is BF16
    values[-1] = 1 + 2**-23
    assert narrowest(from_numpy(values)) is F32


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("seed", "first"),
    [
        (0, [2357136044, 2546248239, 3071714933, 3626093760]),
        (2**32 + 5, [953453411, 236996814, 3739766767]),
        (5, [953453411, 236996814, 3739766767]),
    ],
)
def test_the_generator_gives_the_published_numbers(seed: int, first: list[int]) -> None:
    assert mt19937(seed).random_raw(len(first)).tolist() == first


BOUND = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(64))
UNIFORM = {
    True: (["bb163b71", "3e283195", "be8106d0", "be66be0f"], "444f70263bd3f147", "cae93c86ebc132a4"),
    False: (["bb163b80", "3e283194", "be8106d0", "be66be10"], "f5c519eb39879416", "71931b58957ff946"),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "two-roundings"])
def test_uniform_draws_are_the_published_ones(fused: bool) -> None:
    assert BOUND == 0.3061862178478973
    first, sha, sha_bf16 = UNIFORM[fused]
    values = uniform(mt19937(0), (1, 1_000_003), BOUND, fused=fused)[0]
    assert [f"{x:08x}" for x in values[:4].view(np.uint32)] == first
    assert hashlib.sha256(values.tobytes()).hexdigest()[:16] == sha
    # torch draws a bfloat16 tensor from the same numbers, but never lets rounding reach the upper bound.
    narrow = values.astype(ml_dtypes.bfloat16)
    low, high = (np.float32(b).astype(ml_dtypes.bfloat16) for b in (-BOUND, BOUND))
    assert hashlib.sha256(np.where(narrow >= high, low, narrow).tobytes()).hexdigest()[:16] == sha_bf16


def _vera(**how: Any) -> Recipe:
    bounds = [math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan)) for fan in (128, 6)]
    draws = (Uniform("vera_A", (6, 128), bounds[0]), Uniform("vera_B", (128, 6), bounds[1]))
    return UniformRecipe(seed=11, draws=draws, **how)


def test_veras_projections_are_the_published_ones() -> None:
    drawn = _vera().draw()
    for name, first, sha in (
        ("vera_A", ["be1b9ddd", "bbbecc0c", "3e575841", "be130850"], "4e115c6725e0bab9"),
        ("vera_B", ["be87fd6c", "bec3ffd8", "bf09e1c6", "bec09888"], "31eaa6fb1e2ca7f0"),
    ):
        assert [f"{x:08x}" for x in drawn[name].numpy().reshape(-1)[:4].view(np.uint32)] == first
        assert drawn[name].digest()[:16] == sha


@pytest.mark.parametrize("seed", [0, 1, 5, 2**32 - 1, 2**32 + 5, 2**63, -1])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 16), (64, 300)])
def test_draws_are_torchs_own_on_this_machine(seed: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    raw = mt19937(seed)
    fans = [0.3, BOUND, 1.7]
    theirs = [torch.empty(shape).uniform_(-b, b, generator=generator).numpy() for b in fans]
    state = raw.state
    for fused in (True, False):
        raw.state = state
        mine = [uniform(raw, shape, b, fused=fused) for b in fans]
        if all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)):
            return
    raise AssertionError("neither arithmetic gives torch's numbers")


@pytest.mark.parametrize("through", [F32, BF16, F16], ids=str)
def test_a_recipe_rounds_through_the_dtype_of_the_base(through: Any) -> None:
    plain, rounded = _vera().draw(), _vera(through=through).draw()
    for name in plain:
        want = plain[name].numpy().astype(numpy_dtype(through)).astype(np.float32)
        assert np.array_equal(rounded[name].numpy(), want)


def _recorded(**how: Any) -> Recipe:
    recipe = _vera(**how)
    keys = {"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"}
    digests = {name: tensor.digest() for name, tensor in recipe.draw().items()}
    return replace(recipe, digests=digests, keys=keys)


@pytest.mark.parametrize("arithmetic", [FUSED, TWO_ROUNDINGS])
@pytest.mark.parametrize(("through", "stored"), [(F32, F32), (BF16, F32), (F16, F16)])
def test_a_recipe_survives_its_json(arithmetic: str, through: Any, stored: Any) -> None:
    recipe = _recorded(arithmetic=arithmetic, through=through, stored=stored)
    assert from_metadata({METADATA_KEY: recipe.to_metadata(), "format": "pt"}) == recipe
    assert recipe.to_metadata() == recipe.to_metadata()
    assert from_metadata({"format": "pt"}) is None


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for key, v in value.items() for leaf in [(*path, key), *_leaves(v, (*path, key))]]
    if isinstance(value, list):
        return [leaf for i, v in enumerate(value) for leaf in [(*path, i), *_leaves(v, (*path, i))]]
    return []


RECORD = json.loads(_recorded().to_metadata())


@pytest.mark.parametrize("path", _leaves(RECORD), ids=lambda p: ".".join(map(str, p)))
@pytest.mark.parametrize("value", [None, -1, 10**30, True, "x", [], {}, ["x"], 1.5], ids=str)
def test_a_tampered_recipe_is_an_error_and_never_other_tensors(path: tuple[Any, ...], value: Any) -> None:
    record = json.loads(json.dumps(RECORD))
    at = record
    for step in path[:-1]:
        at = at[step]
    if at[path[-1]] == value and type(at[path[-1]]) is type(value):
        return
    at[path[-1]] = value
    wanted = _recorded().digests
    try:
        recipe = from_metadata({METADATA_KEY: json.dumps(record)})
        assert recipe is not None
        drawn = recipe.draw()
    except (InvalidFile, Unsupported):
        return
    # What is left are remarks for people, names that a method checks, and the same low 32 bits.
    assert {tensor.digest() for tensor in drawn.values()} == set(wanted.values())


def test_a_recipe_that_would_draw_too_much_is_refused_before_it_draws() -> None:
    side = math.isqrt(limits.RECIPE_ELEMENTS) + 1
    with pytest.raises(Unsupported, match="would draw more than"):
        UniformRecipe(seed=1, draws=(Uniform("a", (side, side), 1.0),)).draw()
