"""The engine of merge: whatever the workers, the blocks and the library, the bits are PEFT's; memory stays small."""

from __future__ import annotations

import errno
import importlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import astuple
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import cases
import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file

import adapterpack
from adapterpack import arithmetic, containers, exactness, layout, methods, plan, shards, vectormath
from adapterpack.adapter import Mixture, Product
from adapterpack.arithmetic import Arithmetic
from adapterpack.backend import Backend, NumpyBackend, TorchBackend
from adapterpack.base import Base
from adapterpack.errors import ChangedWhileReading, InvalidFile
from adapterpack.io import files as io_files
from adapterpack.tensor import BF16, F16, F32, nonfinite, numpy_dtype

merging = importlib.import_module("adapterpack.merge")
BACKENDS: tuple[Backend, ...] = (NumpyBackend(), TorchBackend("cpu"))


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tried with blocks of one size says nothing about those of another."""
    monkeypatch.setattr(exactness, "_tried", {})


def _tiny(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Blocks of about so many elements; runs of a few blocks; short spans."""
    monkeypatch.setattr(exactness, "BLOCK", block)
    monkeypatch.setattr(shards, "_RUN", 3 * block)
    monkeypatch.setattr(shards, "_SPAN", 1000)
    monkeypatch.setattr(shards, "_TELL", 0)


def _questions(adapter: Path, base: Path) -> frozenset[Product | Mixture]:
    with Base(base) as b, containers.open_checkpoint(adapter) as checkpoint:
        return plan.make([methods.parse(checkpoint)], b).questions()


def _proven(questions: frozenset[Product | Mixture]) -> bool:
    """What the process of a Proof would find, with blocks as they are cut now."""
    found = io.StringIO()
    exactness.try_all(io.StringIO(json.dumps([astuple(q) for q in questions])), found)
    return all(json.loads(found.getvalue()))


def _names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


# -- workers, blocks, libraries ----------------------------------------------------------------------------

CASES = [
    ("linear-llama", "f32"),
    ("linear-llama", "bf16"),
    ("conv1d", "f32"),
    ("conv1d", "f16"),
    ("embedding-llama", "bf16"),
    ("embedding-gpt2", "f32"),
    ("lora-bias", "f16"),
    ("projection-mixed", "f32"),
    ("seed-conv1d", "f32"),
    ("full-k2", "f32"),
    ("topk-conv1d", "bf16"),
    ("topk-k2", "f32"),
    ("topk-bert", "bf16"),
    ("dora-linear", "f32"),
    ("dora-linear", "bf16"),
    ("dora-conv1d", "f32"),
    ("dora-embedding", "f32"),
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_bits_depend_neither_on_workers_nor_on_blocks_nor_on_the_library(
    name: str, dtype: str, workshop: Any, files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, base = workshop.pair(name, dtype)
    expected = workshop.peft_merge(base, adapter)
    cuts: set[int] = set()
    real = plan.blocks

    def blocks(*args: Any, **how: Any) -> Any:
        found = real(*args, **how)
        cuts.add(len(found))
        return found

    monkeypatch.setattr(plan, "blocks", blocks)
    trees: set[str] = set()
    for n, (jobs, block) in enumerate([(1, 1 << 18), (1, 700), (2, 1100), (3, 64), (5, 1700)]):
        _tiny(monkeypatch, block)
        monkeypatch.setattr(exactness, "_tried", {})
        for known in (False, True):
            # Where numpy gives other bits, or only torch can do it, nothing but torch may be chosen.
            questions = _questions(adapter, base)
            proven = known and _proven(questions)
            monkeypatch.setattr(exactness, "numpy_known", lambda _, proven=proven: proven)
            out = tmp_path / f"{n}-{known}"
            result = adapterpack.merge(adapter, base, out, jobs=jobs, verify="off")
            torch_only = name.startswith(("full", "topk-conv1d", "dora"))
            if known and not torch_only:
                assert result.arithmetic == ("numpy" if proven else "torch cpu")
            merged = files.tensors(out)
            wrong = [k for k in merged if not files.same(merged[k], expected[k])]
            assert not wrong, (jobs, block, result.arithmetic)
            trees.add(oracle.tree_hash(out))
    assert len(trees) == 1
    if name not in ("dora-conv1d", "dora-embedding"):
        assert max(cuts) >= 4, "nothing was cut: the case proves nothing"


@pytest.mark.parametrize("jobs", [1, 3])
def test_many_small_shards_are_shared_among_workers(
    jobs: int, workshop: Any, files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases.BY_NAME["linear-llama"]
    adapter, base = workshop.adapter(case), workshop.base("llama", shard="20KB")
    assert len(list(base.glob("*.safetensors"))) > 10
    expected = workshop.peft_merge(workshop.base_of(case), adapter)
    _tiny(monkeypatch, 500)
    adapterpack.merge(adapter, base, tmp_path / "m", jobs=jobs)
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[k]) for k in merged)
    for shard in base.glob("*.safetensors"):
        assert files.header(shard) == files.header(tmp_path / "m" / shard.name)


def test_what_cannot_be_cut_is_computed_whole(
    workshop: Any, files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, base = workshop.pair("linear-llama", "bf16")
    expected = workshop.peft_merge(base, adapter)
    _tiny(monkeypatch, 64)
    monkeypatch.setattr(exactness, "splits", lambda xp, product: False)
    seen: list[bool] = []
    real = plan.LoadedSteps.changed

    def changed(self: Any, w: Any, block: Any, **how: Any) -> Any:
        seen.append(block.whole)
        return real(self, w, block, **how)

    monkeypatch.setattr(plan.LoadedSteps, "changed", changed)
    monkeypatch.setattr(exactness, "numpy_known", lambda _: False)
    adapterpack.merge(adapter, base, tmp_path / "m", jobs=2, verify="off")
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[k]) for k in merged)
    assert seen and all(seen)


def test_a_library_whose_blocks_differ_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that sums small matrices in another order, as some libraries have them."""
    xp = TorchBackend("cpu")
    product = Product(64, 7, 48, columns=False)
    monkeypatch.setattr(exactness, "BLOCK", 48 * 16)
    real = torch.Tensor.__matmul__

    def other(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.shape[0] == 64:
            return real(a, b)
        return real(a.flip(1).contiguous(), b.flip(0).contiguous())

    assert exactness.splits(xp, product)
    monkeypatch.setattr(exactness, "_tried", {})
    monkeypatch.setattr(torch.Tensor, "__matmul__", other)
    assert not exactness.splits(xp, product)


def test_a_shard_with_empty_tensors_alone_is_written(workshop: Any, files: Any, tmp_path: Path) -> None:
    """There is nothing to copy in it and nothing to compute."""
    adapter, original = workshop.pair("linear-llama")
    base = tmp_path / "base"
    base.mkdir()
    tensors = files.tensors(original)
    parts = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": {"e": torch.ones(0, 4)}}
    for name, content in parts.items():
        save_file(content, base / name, metadata={"format": "pt"})
    (base / "config.json").write_bytes((original / "config.json").read_bytes())
    weight_map = {key: name for name, content in parts.items() for key in content}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for jobs in (1, 2):
        out = tmp_path / str(jobs)
        adapterpack.merge(adapter, base, out, jobs=jobs)
        empty = "model-00002-of-00002.safetensors"
        assert (out / empty).read_bytes() == (base / empty).read_bytes()


# -- rounding once -------------------------------------------------------------------------------------------


def _nearest(x: float, digits: int, least: int, most: int) -> float:
    """x with so many binary digits, to nearest even: in exact arithmetic, from the definition.

    Args:
        least, most: The exponents of the smallest normal number and of the largest one.
    """
    if math.isnan(x) or math.isinf(x) or x == 0:
        return x
    quantum = Fraction(2) ** (max(math.frexp(x)[1] - 1, least) - (digits - 1))
    value = round(Fraction(x) / quantum) * quantum
    if abs(value) >= Fraction(2) ** (most + 1):
        return math.copysign(math.inf, x)
    return math.copysign(float(abs(value)), x)


FORMS = {"F16": (11, -14, 15), "BF16": (8, -126, 127), "F32": (24, -126, 127)}


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_rounding_once_is_one_rounding_of_the_exact_value(
    dtype: str, jobs: int, workshop: Any, files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums that f64 holds in any order, a hair beside the middle of two neighbours: f32 would lose the hair."""
    source, original = workshop.pair("linear-llama", dtype)
    ours = {"bf16": BF16, "f16": F16, "f32": F32}[dtype]
    digits, least, most = FORMS[ours.name]
    name = "model.layers.0.self_attn.q_proj"
    rng = np.random.default_rng(5)
    # In [1/32, 1/16): one unit in the last place is 2 ** (-5 - digits + 1).
    w = (rng.integers(1 << (digits - 1), 1 << digits, (64, 64)) * 2.0 ** (-4 - digits)).astype(numpy_dtype(ours))
    half, hair = 2.0 ** (-5 - digits), 2.0 ** (-5 - digits - 18)
    b, a = np.zeros((64, 4), np.float32), np.zeros((4, 64), np.float32)
    b[:, 0], a[0] = half * rng.choice([-1, 1, 3], 64), 1
    b[:, 1], a[1] = hair * rng.choice([-1, 0, 1], 64), rng.choice([-1, 1], 64)
    key = f"base_model.model.{name}.lora"
    adapter = files.edited(
        source,
        tmp_path / "a",
        {f"{key}_{x}.weight": torch.from_numpy(v) for x, v in (("A", a), ("B", b))},
        {"lora_alpha": 4, "r": 4},
    )
    base = tmp_path / "base"
    base.mkdir()
    tensors = files.tensors(original)
    tensors[f"{name}.weight"] = torch.from_numpy(w.astype(np.float32)).to(cases.DTYPES[dtype])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_bytes((original / "config.json").read_bytes())
    _tiny(monkeypatch, 1100)
    result = adapterpack.merge(adapter, base, tmp_path / "m", rounding="once", jobs=jobs)
    assert result.arithmetic == "numpy"
    exact = w.astype(np.float64) + b.astype(np.float64) @ a.astype(np.float64)
    expected = np.array([_nearest(x, digits, least, most) for x in exact.ravel()]).reshape(64, 64)
    twice = exact.astype(np.float32).astype(numpy_dtype(ours)).astype(np.float64)
    assert dtype == "f32" or (twice != expected).mean() > 0.1, "two roundings would do as well: nothing is proven"
    got = files.tensors(tmp_path / "m")[f"{name}.weight"].double().numpy()
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("name", ["linear-llama", "conv1d", "embedding-llama", "dora-linear"])
def test_rounding_once_does_not_depend_on_workers(
    name: str, workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, base = workshop.pair(name, "bf16")
    _tiny(monkeypatch, 1100)
    for jobs in (1, 2, 5):
        adapterpack.merge(adapter, base, tmp_path / str(jobs), rounding="once", jobs=jobs)
    assert len({oracle.tree_hash(tmp_path / str(jobs)) for jobs in (1, 2, 5)}) == 1


# -- proofs ---------------------------------------------------------------------------------------------------


class _Disproof:
    """A proof that says no."""

    def __init__(self, products: Any) -> None:
        self.closed = False

    def succeeds(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As in a process without torch, on a machine where nothing was tried: a proof is begun. Its cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    real = Arithmetic._numpy_will_do

    def numpy_will_do(self: Any) -> bool | None:
        with monkeypatch.context() as m:
            m.delitem(sys.modules, "torch")
            found: bool | None = real(self)
            return found

    monkeypatch.setattr(Arithmetic, "_numpy_will_do", numpy_will_do)
    return cache


@pytest.fixture
def wrong_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy computes something else: whoever keeps its bits is found out."""
    real, really = NumpyBackend.round, NumpyBackend.add

    def round(self: Any, values: Any, dtype: Any) -> Any:
        return real(self, values * np.float32(1.25), dtype)

    def add(self: Any, values: Any, w: Any, dtype: Any) -> Any:
        return really(self, values * np.float32(1.25), w, dtype)

    monkeypatch.setattr(NumpyBackend, "round", round)
    monkeypatch.setattr(NumpyBackend, "add", add)


def _child(tmp_path: Path, text: str) -> str:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    return str(script)


CHILDREN = {
    "fails": "exit 1",
    "is-killed": "kill -9 $$",
    "says-no": "cat > /dev/null; echo '[false]'",
    "fails-after-yes": "cat > /dev/null; echo '[true]'; exit 3",
    "says-nothing": "cat > /dev/null",
    "babbles": "cat > /dev/null; echo 'Intel MKL WARNING'; echo '[true]'",
    "says-too-little": "cat > /dev/null; echo '[]'",
    "says-other-things": "cat > /dev/null; echo '{\"a\": 1}'",
    "does-not-listen": "exec < /dev/null; echo '[false]'",
}


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("how", ["disproved", "absent", *CHILDREN])
def test_numpy_that_is_not_proven_leaves_nothing_behind(
    how: str,
    jobs: int,
    workshop: Any,
    files: Any,
    tmp_path: Path,
    untried: Path,
    wrong_numpy: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = cases.BY_NAME["narrow-embedding"]
    adapter, base = workshop.adapter(case), workshop.base("llama", shard="40KB")
    expected = workshop.peft_merge(workshop.base_of(case), adapter)
    # One product, so that a child can answer for it with one word.
    only = {k: None for k in files.tensors(adapter) if "embedding" not in k}
    adapter = files.edited(adapter, tmp_path / "a", only, {"target_modules": ["embed_tokens"]})
    expected = workshop.peft_merge(workshop.base_of(case), adapter)
    assert len(_questions(adapter, base)) == 1
    if how == "disproved":
        monkeypatch.setattr(exactness, "Proof", _Disproof)
    else:
        child = str(tmp_path / "nowhere") if how == "absent" else _child(tmp_path, CHILDREN[how])
        monkeypatch.setattr(sys, "executable", child)
    stages: list[list[str]] = []
    real = merging.write_shards

    def write_shards(stage: Path, *args: Any, **options: Any) -> None:
        stages.append(_names(stage))
        real(stage, *args, **options)

    monkeypatch.setattr(merging, "write_shards", write_shards)
    result = adapterpack.merge(adapter, base, tmp_path / "m", jobs=jobs)
    assert result.arithmetic == "torch cpu" and result.reused == ()
    assert stages == [[], []]
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[k]) for k in merged)
    assert not list(tmp_path.glob(".adapterpack*"))
    if how in ("says-no", "does-not-listen"):
        # It is remembered: next time torch is chosen at once.
        assert exactness.numpy_known(_questions(adapter, base)) is False
        stages.clear()
        again = adapterpack.merge(adapter, base, tmp_path / "again", jobs=jobs)
        assert again.arithmetic == "torch cpu" and stages == [[]]
    else:
        assert exactness.numpy_known(_questions(adapter, base)) is None


def test_a_process_without_torch_proves_numpy_and_the_next_one_trusts_it(
    workshop: Any, files: Any, tmp_path: Path
) -> None:
    adapter, base = workshop.pair("linear-llama", "bf16")
    expected = workshop.peft_merge(base, adapter)
    driver = (
        "import json, sys\n"
        "from adapterpack import exactness\n"
        "started = []\n"
        "real = exactness.subprocess.Popen\n"
        "exactness.subprocess.Popen = lambda *a, **k: started.append(1) or real(*a, **k)\n"
        "from adapterpack import merge\n"
        "result = merge(*sys.argv[1:4])\n"
        "print(json.dumps([result.arithmetic, 'torch' in sys.modules, len(started)]))\n"
    )
    (tmp_path / "elsewhere").mkdir()
    # A proof must not run what lies in the working directory.
    (tmp_path / "elsewhere" / "torch.py").write_text("raise SystemExit(7)")
    (tmp_path / "elsewhere" / "adapterpack.py").write_text("raise SystemExit(7)")
    (tmp_path / "driver.py").write_text(driver)
    proven = _proven(_questions(adapter, base))
    for n, children in enumerate([1, 0]):
        out = tmp_path / str(n)
        done = subprocess.run(
            [sys.executable, tmp_path / "driver.py", adapter, base, out],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path / "elsewhere",
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        )
        wanted = ["numpy", False, children] if proven else ["torch cpu", True, children]
        assert json.loads(done.stdout) == wanted, done.stderr
        merged = files.tensors(out)
        assert all(files.same(merged[k], expected[k]) for k in merged)


PRODUCT = Product(64, 4, 48, columns=True)
MALFORMED = {
    "empty": b"",
    "torn": b'{"64x4x48c": tr',
    "no text": b"\xff\xfe{}",
    "a list": b"[true]",
    "null": b"null",
    "a number for true": b'{"64x4x48c": 1}',
    "a word for true": b'{"64x4x48c": "true"}',
    "another product": b'{"64x4x48r": true, "64x4x48cn": true, "48x4x64c": true}',
    "deep": b"[" * 200_000,
    "large numbers": b'{"64x4x48c": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_record_that_makes_no_sense_is_ignored_and_replaced(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    exactness._path().parent.mkdir()
    exactness._path().write_bytes(MALFORMED[what])
    assert exactness.numpy_known([PRODUCT]) is None
    monkeypatch.setattr(sys, "executable", _child(tmp_path, "cat > /dev/null; echo '[true]'"))
    proof = exactness.Proof([PRODUCT])
    assert proof.succeeds() and proof.succeeds()
    proof.close()
    assert exactness.numpy_known([PRODUCT]) is True
    assert _names(exactness._path().parent) == [exactness._path().name]


def test_the_record_of_another_machine_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    exactness._write({exactness._name(PRODUCT): True})
    assert exactness.numpy_known([PRODUCT]) is True
    real = metadata.version
    with monkeypatch.context() as m:
        m.setattr(exactness, "_processor", lambda: "another")
        assert exactness.numpy_known([PRODUCT]) is None
    for package in ("torch", "numpy"):
        with monkeypatch.context() as m:
            m.setattr(metadata, "version", lambda p, package=package: "0" if p == package else real(p))
            assert exactness.numpy_known([PRODUCT]) is None
    for switch in ("MKL_CBWR", "OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA"):
        with monkeypatch.context() as m:
            m.setenv(switch, "x")
            assert exactness.numpy_known([PRODUCT]) is None
    with monkeypatch.context() as m:
        m.setattr(exactness, "BLOCK", 5)
        assert exactness.numpy_known([PRODUCT]) is None
    assert exactness.numpy_known([PRODUCT]) is True


def test_one_product_that_was_disproved_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other, unknown = Product(8, 2, 8, columns=False), Product(9, 2, 8, columns=False)
    exactness._write({exactness._name(PRODUCT): True, exactness._name(other): False})
    assert exactness.numpy_known([PRODUCT, other, unknown]) is False
    assert exactness.numpy_known([PRODUCT, unknown]) is None
    assert exactness.numpy_known([PRODUCT]) is True
    assert exactness.numpy_known([]) is True


def test_different_products_have_different_names() -> None:
    names = {
        exactness._name(Product(out, rank, into, columns, norms, batched))
        for out in (1, 11)
        for rank in (1, 11)
        for into in (1, 11)
        for columns in (False, True)
        for norms in (False, True)
        for batched in (False, True)
    }
    assert len(names) == 64


@pytest.mark.parametrize("how", ["a file in its place", "a directory in its place", "no home"])
def test_a_cache_that_cannot_be_used_does_no_harm(
    how: str, workshop: Any, files: Any, tmp_path: Path, untried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "a file in its place":
        untried.write_text("x")
    elif how == "a directory in its place":
        exactness._path().mkdir(parents=True)
        (exactness._path() / "x").mkdir()
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        # As in a container, where the user of the process has no entry.
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    adapter, base = workshop.pair("embedding-llama")
    expected = workshop.peft_merge(base, adapter)
    monkeypatch.setattr(sys, "executable", _child(tmp_path, "cat > /dev/null; echo '[true, true]'"))
    proven = _proven(_questions(adapter, base))
    assert exactness.numpy_known(_questions(adapter, base)) is None
    result = adapterpack.merge(adapter, base, tmp_path / "m")
    assert result.arithmetic == "numpy"
    merged = files.tensors(tmp_path / "m")
    assert not proven or all(files.same(merged[k], expected[k]) for k in merged)


# -- laws ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 5000), st.integers(0, 300), st.sampled_from([1, 7, 64, 1000, 1 << 18]))
@example(0, 5, 64)
@example(17, 1 << 20, 64)
def test_cut_is_every_row_once_in_blocks_of_one_height_or_one_more(rows: int, width: int, block: int) -> None:
    before = exactness.BLOCK
    exactness.BLOCK = block
    try:
        bounds = exactness.cut(rows, width)
    finally:
        exactness.BLOCK = before
    assert bounds[0][0] == 0 and bounds[-1][1] == rows
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    heights = {stop - start for start, stop in bounds}
    assert max(heights) - min(heights) <= 1
    assert min(heights) >= min(rows, 8)
    assert max(heights) <= max(16, block // max(width, 1)), "larger than a block, and more than the least"


def _copied(size: int, start: int, stop: int, at: int) -> tuple[bytes, bytes]:
    """A copy by OpenFile.copy, and what it should be."""
    rng = np.random.default_rng(size)
    source, target = rng.bytes(size), rng.bytes(at + stop - start + 100)
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder) / "a", Path(folder) / "b"
        a.write_bytes(source)
        b.write_bytes(target)
        with io_files.OpenFile(a) as file:
            fd = os.open(b, os.O_WRONLY)
            try:
                file.copy(start, stop, fd, at)
            finally:
                os.close(fd)
        return b.read_bytes(), target[:at] + source[start:stop] + target[at + stop - start :]


_EDGE = st.one_of(st.integers(0, 40_000), st.sampled_from([0, 1, 4095, 4096, 4097, 8192, 12288, 12289, 40_000]))


@settings(max_examples=60)
@given(_EDGE, _EDGE, _EDGE)
@example(4096, 4096, 0)
@example(0, 40_000, 8192)
@example(5, 30_000, 4096 + 5)
@example(4095, 4095 + 2 * 4096 + 1, 4095)
def test_a_copy_by_the_kernel_is_a_copy(x: int, y: int, at: int) -> None:
    got, wanted = _copied(40_000, min(x, y), max(x, y), at)
    assert got == wanted


class Kernel:
    """`copy_file_range` and `pwrite` that do less than they were asked for, and fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self._copy, self._write = os.copy_file_range, os.pwrite
        self._patch = monkeypatch

    def short(self, most: int) -> None:
        def copy(src: int, dst: int, count: int, *offsets: int) -> int:
            return self._copy(src, dst, min(count, most), *offsets)

        self._patch.setattr(os, "copy_file_range", copy)
        self._patch.setattr(os, "pwrite", lambda fd, data, at: self._write(fd, data[:most], at))

    def fail(self, number: int, after: int) -> None:
        """An error instead of copying, after so many calls that copied some."""

        def copy(src: int, dst: int, count: int, *offsets: int) -> int:
            self.calls += 1
            if self.calls > after:
                raise OSError(number, os.strerror(number))
            return self._copy(src, dst, min(count, 1000), *offsets)

        self._patch.setattr(os, "copy_file_range", copy)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


SPANS = [(0, 40_000, 0), (5, 30_005, 5), (5, 30_000, 4096), (4096, 40_000, 8192), (100, 101, 7), (9, 9, 9)]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
def test_where_the_kernel_cannot_copy_bytes_are_written(
    number: int, after: int, span: tuple[int, int, int], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.fail(number, after)
    monkeypatch.setattr(io_files, "_CHUNK", 3000)
    got, wanted = _copied(40_000, *span)
    assert got == wanted


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("absent", [False, True])
def test_calls_that_do_less_than_they_were_asked_for_are_repeated(
    absent: bool, span: tuple[int, int, int], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.short(777)
    if absent:
        # macOS has none.
        monkeypatch.delattr(os, "copy_file_range")
    got, wanted = _copied(40_000, *span)
    assert got == wanted


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_is_full_or_broken_is_an_error(number: int, kernel: Kernel) -> None:
    kernel.fail(number, 1)
    with pytest.raises(OSError) as caught:
        _copied(40_000, 0, 40_000, 0)
    assert caught.value.errno == number


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("left", [0, 5000, 39_999])
def test_a_source_that_is_cut_off_meanwhile_is_found_out(
    left: int, absent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if absent:
        monkeypatch.delattr(os, "copy_file_range")
    (tmp_path / "a").write_bytes(bytes(40_000))
    with io_files.OpenFile(tmp_path / "a") as file, (tmp_path / "b").open("wb") as out:
        os.truncate(tmp_path / "a", left)
        with pytest.raises(ChangedWhileReading):
            file.copy(0, 40_000, out.fileno(), 0)
        with pytest.raises(ChangedWhileReading):
            file.check_unchanged()


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("when", ["cut-off", "rewritten"])
def test_a_base_that_changes_while_it_is_merged_is_refused(
    when: str, jobs: int, workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, original = workshop.pair("linear-llama")
    base = tmp_path / "base"
    base.mkdir()
    for file in original.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    weights = base / "model.safetensors"
    _tiny(monkeypatch, 1000)

    def spoil(what: str, done: int, total: int) -> None:
        if done > total // 3 and weights.stat().st_size > 1000 and weights.stat().st_mtime_ns != 5:
            if when == "cut-off":
                os.truncate(weights, 500)
            else:
                with weights.open("r+b") as out:
                    out.seek(-4, os.SEEK_END)
                    out.write(b"\1\2\3\4")
                os.utime(weights, ns=(5, 5))

    with pytest.raises(ChangedWhileReading, match=r"model\.safetensors"):
        adapterpack.merge(adapter, base, tmp_path / "m", jobs=jobs, progress=spoil)
    assert _names(tmp_path) == ["base"]


# -- NaN, infinity, zero ----------------------------------------------------------------------------------------

DTYPES = pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
LIBRARIES = pytest.mark.parametrize("xp", BACKENDS, ids=lambda xp: xp.name)
_NEAR = {
    "F16": [65504.0, 65519.999, 65520.0, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0000000001, 1 + 2.0**-11],
    "BF16": [3.3895313892515355e38, 3.396e38, 3.4e38, 2.0**-133, 2.0**-134, 1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-40],
    "F32": [
        3.4028234663852886e38,
        3.4028235677973366e38,
        2.0**-149,
        2.0**-150,
        1 + 2.0**-24,
        1 + 2.0**-24 + 2.0**-50,
    ],
}


def _rounded(xp: Backend, values: Any, dtype: Any) -> Any:
    """By a backend, as f64."""
    array = values if xp.name == "numpy" else torch.from_numpy(values.copy())
    data = xp.buffer(xp.round(array, dtype))
    return data.view(numpy_dtype(dtype)).astype(np.float64)


def _same_values(got: Any, wanted: Any) -> bool:
    """NaN is NaN, whatever its bits; zeros have signs."""
    nan = np.isnan(wanted)
    return bool(
        np.array_equal(np.isnan(got), nan)
        and np.array_equal(got[~nan], wanted[~nan])
        and np.array_equal(np.signbit(got[~nan]), np.signbit(wanted[~nan]))
    )


@LIBRARIES
@DTYPES
@settings(max_examples=40)
@given(bits=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40))
def test_f64_is_rounded_once_to_nearest_even(xp: Backend, dtype: Any, bits: list[int]) -> None:
    near = _NEAR[dtype.name]
    values = np.concatenate([np.array(bits, np.uint64).view(np.float64), near, np.negative(near), [0.0, -0.0]])
    # Exponents that the dtype has, too: of random bits few have.
    values = np.concatenate([values, np.sign(values) * (1 + np.abs(np.frexp(values)[0]) * 2.0**-7)])
    wanted = np.array([_nearest(x, *FORMS[dtype.name]) for x in values])
    assert _same_values(_rounded(xp, values, dtype), wanted)


@LIBRARIES
@DTYPES
@settings(max_examples=40)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60))
def test_f32_is_rounded_once_to_nearest_even(xp: Backend, dtype: Any, bits: list[int]) -> None:
    values = np.concatenate([np.array(bits, np.uint32).view(np.float32), np.float32(_NEAR[dtype.name])])
    wanted = np.array([_nearest(float(x), *FORMS[dtype.name]) for x in values])
    assert _same_values(_rounded(xp, values, dtype), wanted)


@LIBRARIES
@DTYPES
@pytest.mark.parametrize("wide", ["f32", "f64"])
def test_no_nan_becomes_infinite_or_finite(wide: str, dtype: Any, xp: Backend) -> None:
    """Payloads whose kept bits are all zero: cut off, they would be infinity; rounded up, zero or infinity."""
    unsigned, infinity, sign, width = {
        "f32": (np.uint32, 0x7F800000, 0x80000000, 23),
        "f64": (np.uint64, 0x7FF << 52, 1 << 63, 52),
    }[wide]
    payloads = [1, 2, 3, (1 << width) - 1, (1 << width) - 2, *(1 << n for n in range(width))]
    payloads += [(1 << n) - 1 for n in range(1, width)]
    bits = np.array([infinity | p | s for p in payloads for s in (0, sign)], unsigned)
    got = _rounded(xp, bits.view(np.float32 if wide == "f32" else np.float64), dtype)
    assert np.isnan(got).all()


@DTYPES
@given(data=st.binary(max_size=200))
@example(data=b"\x00\x00\x80\x7f")
@example(data=b"\x00\x00\x80\xff")
@example(data=b"\x80\x7f\x80\xff")
@example(data=b"\x00\x7c\x00\xfc")
@example(data=b"\xff\xff\x7f\x7f\xff\xff\x7f\xff")
def test_nonfinite_is_what_numpy_says(dtype: Any, data: bytes) -> None:
    data = data[: len(data) // 4 * 4]
    values = np.frombuffer(data, numpy_dtype(dtype))
    assert nonfinite(np.frombuffer(data, np.uint8), dtype) is not bool(np.isfinite(values).all())


@DTYPES
def test_every_single_nonfinite_value_among_finite_ones_is_seen(dtype: Any) -> None:
    """All bits of 16; of 32 the upper half, with zeros and ones below."""
    size = 1 << 16
    if dtype.bits == 16:
        bits = np.arange(size, dtype=np.uint16)
    else:
        bits = np.concatenate(
            [np.arange(size, dtype=np.uint32) << 16, (np.arange(size, dtype=np.uint32) << 16) + 65535]
        )
    finite = np.isfinite(bits.view(numpy_dtype(dtype)).astype(np.float64))
    assert not nonfinite(bits[finite].view(np.uint8), dtype)
    zeros = np.zeros(3, bits.dtype)
    for value in bits[~finite][:: 1 if dtype.bits == 16 else 3]:
        zeros[1] = value
        assert nonfinite(zeros.view(np.uint8), dtype)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("rounding", ["peft", "once"])
@pytest.mark.parametrize("value", ["nan", "quiet-nan", "inf", "too-large"])
def test_nothing_that_is_not_finite_is_ever_written(
    value: str,
    rounding: str,
    dtype: str,
    library: str,
    workshop: Any,
    files: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, base = workshop.pair("linear-llama", dtype)
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    poisoned = files.tensors(source)[key].float().clone()
    bits = {"nan": 0x7F800001, "quiet-nan": -1, "inf": 0x7F800000, "too-large": 0x7F7FFFFF}[value]
    poisoned.view(torch.int32)[30, 2] = bits
    adapter = files.edited(source, tmp_path / "a", {key: poisoned}, {"lora_alpha": 400})
    _tiny(monkeypatch, 1000)
    monkeypatch.setattr(exactness, "numpy_known", lambda _: library == "numpy")
    if library == "torch":
        monkeypatch.setattr(Arithmetic, "_numpy_will_do", lambda self: False)
    with pytest.raises(InvalidFile, match=r"layers\.1\.self_attn\.k_proj"):
        adapterpack.merge(adapter, base, tmp_path / "m", jobs=2, rounding=rounding)
    assert _names(tmp_path) == ["a"]


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("rounding", ["peft", "once"])
def test_minus_zero_stays_minus_zero(
    rounding: str, library: str, workshop: Any, files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token rows: those that are not trained keep the sign of their zeros."""
    source, original = workshop.pair("token-rows-list", "bf16")
    base = tmp_path / "base"
    base.mkdir()
    tensors = files.tensors(original)
    tensors["model.embed_tokens.weight"].view(torch.int16)[:, ::2] = -0x8000
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_bytes((original / "config.json").read_bytes())
    _tiny(monkeypatch, 1100)
    monkeypatch.setattr(Arithmetic, "_numpy_will_do", lambda self: library == "numpy")
    adapterpack.merge(source, base, tmp_path / "m", rounding=rounding)
    merged = files.tensors(tmp_path / "m")["model.embed_tokens.weight"]
    kept = [n for n in range(len(merged)) if n not in (7, 1, 90)]
    assert files.same(merged[kept], tensors["model.embed_tokens.weight"][kept])
    assert not files.same(merged, tensors["model.embed_tokens.weight"])


# -- torch's functions without torch ---------------------------------------------------------------------------


def _wrong(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library, another constant, or no library: each is one unit in the last place, or nothing."""
    log, softmax = vectormath.log, vectormath.softmax_of_two
    if how == "log":
        monkeypatch.setattr(vectormath, "log", lambda v: np.nextafter(log(v), np.float32(0)))
    elif how == "one value in many":
        monkeypatch.setattr(vectormath, "log", lambda v: np.where(v == v.flat[12345], np.float32(-1), log(v)))
    elif how == "softmax":
        monkeypatch.setattr(vectormath, "softmax_of_two", lambda v: np.nextafter(softmax(v), np.float32(2)))
    elif how == "exponential":
        monkeypatch.setattr(vectormath, "_LN2", (vectormath._LN2[0], 1.4286e-06))
    else:
        monkeypatch.setattr(vectormath, "available", lambda: False)


@pytest.mark.skipif(not vectormath.available(), reason="torch has no MKL here")
@pytest.mark.parametrize("how", ["right", "log", "one value in many", "softmax", "exponential", "absent"])
def test_functions_that_differ_from_those_of_torch_are_found_out(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how != "right":
        _wrong(how, monkeypatch)
    assert _proven(frozenset([Mixture()])) == (how == "right")


# -- memory ------------------------------------------------------------------------------------------------------

_LAYERS, _HIDDEN, _INNER, _WORDS, _RANK = 6, 2048, 5632, 16384, 16
_MEASURE = """
import json, sys

def peak():
    # Not ru_maxrss: that begins with what the parent had when it forked.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

library, adapter, base, output = sys.argv[1:]
if library == "torch":
    import torch
alone = peak()
from adapterpack import exactness
exactness.numpy_known = lambda products: library == "numpy"
from adapterpack import merge
planned = merge(adapter, base, output, jobs=2, dry_run=True)
done = merge(adapter, base, output, jobs=2)
assert done.arithmetic.startswith(library)
print(json.dumps([alone, planned.memory, peak()]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base of 250 MB in two shards, and an adapter."""
    root = tmp_path_factory.mktemp("large")
    (root / "base").mkdir()
    shapes = {"model.embed_tokens.weight": (_WORDS, _HIDDEN)}
    for n in range(_LAYERS):
        shapes[f"model.layers.{n}.self_attn.q_proj.weight"] = (_HIDDEN, _HIDDEN)
        shapes[f"model.layers.{n}.mlp.down_proj.weight"] = (_HIDDEN, _INNER)
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(1 << 20) * 0.02).astype(ml_dtypes.bfloat16).tobytes()
    weight_map = {}
    for number, names in enumerate((list(shapes)[:6], list(shapes)[6:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header, at = {}, 0
        for name in names:
            size = math.prod(shapes[name]) * 2
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (root / "base" / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for left in range(at, 0, -len(values)):
                out.write(values[:left])
    index = {"metadata": {}, "weight_map": weight_map}
    (root / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "base" / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    (root / "lora").mkdir()
    factors = {}
    for name, (out_features, in_features) in list(shapes.items())[1:]:
        key = "base_model.model." + name.removesuffix(".weight")
        factors[f"{key}.lora_A.weight"] = torch.from_numpy(
            rng.standard_normal((_RANK, in_features), np.float32) * 0.02
        )
        factors[f"{key}.lora_B.weight"] = torch.from_numpy(
            rng.standard_normal((out_features, _RANK), np.float32) * 0.02
        )
    save_file(factors, root / "lora" / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(r=_RANK, lora_alpha=32, target_modules=["q_proj", "down_proj"]).save_pretrained(root / "lora")
    yield root
    for shard in (root / "base").glob("*.safetensors"):
        shard.unlink()


def _measured(library: str, large: Path, output: Path) -> tuple[float, float, float]:
    """MB: of the interpreter alone, planned, and at the peak."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, library, large / "lora", large / "base", output],
        capture_output=True,
        text=True,
        check=True,
    )
    sizes = sum(f.stat().st_size for f in output.iterdir())
    assert sizes > 250e6
    for shard in output.glob("*.safetensors"):
        shard.unlink()
    alone, planned, peak = json.loads(done.stdout)
    return alone / 1e6, planned / 1e6, peak / 1e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the peak")
def test_memory_is_a_fraction_of_the_model_and_what_was_planned(large: Path, tmp_path: Path) -> None:
    _, planned, peak = _measured("numpy", large, tmp_path / "m")
    assert peak < 150
    assert peak < planned


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the peak")
def test_memory_with_torch_is_little_more_than_that_of_torch(large: Path, tmp_path: Path) -> None:
    alone, planned, peak = _measured("torch", large, tmp_path / "m")
    if alone > 260:
        pytest.skip(f"torch alone takes {alone:.0f} MB here")
    assert peak < 300
    assert peak < planned


# -- progress and interruption -------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2, 4])
@pytest.mark.parametrize("name", ["linear-llama", "dora-linear"])
def test_progress_only_grows_and_ends_with_everything(
    name: str, jobs: int, workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = workshop.adapter(cases.BY_NAME[name])
    base = workshop.base("llama", shard="60KB")
    _tiny(monkeypatch, 500)
    told: list[tuple[str, int, int]] = []
    inside = threading.Lock()

    def progress(*what: Any) -> None:
        assert inside.acquire(blocking=False), "told by two threads at once"
        told.append(what)
        inside.release()

    adapterpack.merge(adapter, base, tmp_path / "m", jobs=jobs, progress=progress)
    total = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    done = [d for _, d, _ in told]
    assert {(what, t) for what, _, t in told} == {("merge", total)}
    assert done == sorted(set(done)) and done[-1] == total
    assert len(done) > 100


def _handles() -> int:
    """How many files this process has open, where the system tells."""
    place = Path("/proc/self/fd")
    return len(list(place.iterdir())) if place.exists() else 0


@pytest.mark.parametrize("jobs", [1, 2, 4])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_old_thing_and_no_threads(
    error: type[BaseException],
    existing: bool,
    jobs: int,
    workshop: Any,
    files: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = workshop.adapter(cases.BY_NAME["linear-llama"])
    base = workshop.base("llama", shard="60KB")
    out = tmp_path / "m"
    if existing:
        out.mkdir()
        (out / "old").write_text("old")
    _tiny(monkeypatch, 500)
    before, threads = oracle.tree_hash(base), threading.active_count()
    handles = _handles()
    for share in (0.0, 0.3, 0.99):

        def stop(what: str, done: int, total: int, share: float = share) -> None:
            if done > share * total:
                raise error("stop")

        with pytest.raises(error):
            adapterpack.merge(adapter, base, out, jobs=jobs, overwrite=existing, progress=stop)
        assert threading.active_count() == threads
        assert _handles() == handles
        assert _names(out) == ["old"] if existing else not out.exists()
        if error is RuntimeError:
            assert _names(tmp_path) == (["m"] if existing else [])
    assert oracle.tree_hash(base) == before
    adapterpack.merge(adapter, base, out, jobs=jobs, overwrite=existing)
    assert _names(tmp_path) == ["m"]
    adapterpack.merge(adapter, base, tmp_path / "clean")
    assert oracle.tree_hash(out) == oracle.tree_hash(tmp_path / "clean")


def test_a_backend_that_cannot_be_loaded_is_an_error_and_no_hang(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, base = workshop.pair("linear-llama")
    monkeypatch.setattr(arithmetic, "TorchBackend", lambda device: {}["absent"])
    monkeypatch.setattr(exactness, "numpy_known", lambda _: False)
    for jobs in (1, 3):
        with pytest.raises(KeyError):
            adapterpack.merge(adapter, base, tmp_path / "m", jobs=jobs)
        assert _names(tmp_path) == []


def test_spans_are_copied_while_torch_is_loaded(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several workers nothing that needs no arithmetic waits for it."""
    adapter, base = workshop.adapter(cases.BY_NAME["linear-llama"]), workshop.base("llama", shard="60KB")
    _tiny(monkeypatch, 1000)
    ready: Future[Backend] = Future()
    late = threading.Timer(20, ready.set_exception, [TimeoutError("nothing was copied")])
    late.start()
    with Base(base) as b, containers.open_checkpoint(adapter) as checkpoint:
        p = plan.make([methods.parse(checkpoint)], b)
        files = layout.make(b, p, False).shards
        # A shard is begun with its first span: those that have none wait.
        copied = [[s.tensor.nbytes for s in shard.segments if not s.steps] for shard in files]
        early = sum(sum(c) + len(shard.header) for c, shard in zip(copied, files, strict=True) if c)
        assert early > 10_000

        def progress(what: str, done: int, of: int) -> None:
            if done >= early and not ready.done():
                ready.set_result(NumpyBackend())

        finished: list[str] = []
        shards.write_shards(
            tmp_path,
            files,
            ready,
            jobs=2,
            once=False,
            finished=lambda shard, changed: finished.append(shard.name),
            progress=progress,
        )
    late.cancel()
    assert sorted(finished) == _names(tmp_path)
