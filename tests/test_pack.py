"""Packs give back what was packed: every byte of every file, whatever the adapter is."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import apack_decoder
import cases
import numpy as np
import packs
import peft
import pytest
from conftest import Workshop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load

import adapterpack
from adapterpack import containers
from adapterpack.adapter import Progress
from adapterpack.codecs import grid
from adapterpack.codecs.chain import Chain, store
from adapterpack.codecs.lines import Quantised
from adapterpack.containers import apack
from adapterpack.containers.apack import choosing
from adapterpack.errors import (
    AdapterpackError,
    ChangedWhileReading,
    InvalidFile,
    MissingReference,
    UsageError,
    WriteFailed,
)
from adapterpack.io import zstd
from adapterpack.methods import METHODS
from adapterpack.tensor import F32, Tensor

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
"""One directory serves all examples; `fresh` keeps them apart."""


@contextmanager
def fresh(root: Path) -> Iterator[Path]:
    """An empty directory, for one example of many."""
    where = root / "example"
    where.mkdir()
    try:
        yield where
    finally:
        shutil.rmtree(where)


def packed(source: Path, destination: Path, **options: Any) -> Path:
    adapterpack.compress(source, destination, **{"jobs": 1, **options})
    return destination


def restored(pack: Path, destination: Path, **options: Any) -> dict[str, bytes]:
    adapterpack.unpack(pack, destination, **{"jobs": 1, **options})
    return packs.tree(destination)


def round_trip(source: Path, where: Path, **options: Any) -> Path:
    """Pack, and compare what both readers give back with what was there."""
    before = packs.tree(source)
    pack = packed(source, where / "adapter.apack", **options)
    assert restored(pack, where / "again") == before
    assert apack_decoder.decode(pack.read_bytes()) == before
    assert packs.tree(source) == before, "the input was modified"
    return pack


def manifest(pack: Path) -> dict[str, Any]:
    return apack_decoder.manifest_of(pack.read_bytes())[0]


# ---------------------------------------------------------------- chains


def _chains() -> list[Chain]:
    """Every chain that there is."""
    ends = (
        (),
        ("bits",),
        ("planes",),
        ("rotate", "planes"),
        ("rotate", "exponents", "planes"),
        ("grid",),
        ("palette",),
    )
    parts = itertools.product((1, 2, 4, 8), ((), ("sub",)), ((), ("gaps",), ("mask",)), ((), ("narrow",)), ends)
    found = []
    for width, *steps in parts:
        try:
            found.append(Chain(width, tuple(itertools.chain(*steps))))
        except InvalidFile:
            continue
    return found


CHAINS = _chains()
SPECIAL = {
    1: [0, 1, 0x7F, 0x80, 0xFF],
    2: [0, 0x8000, 0x7C00, 0xFC00, 0x7E01, 0xFFFF, 0x3F80, 0x7F80, 0x7FC1, 1],
    4: [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 0x3F800000, 1, 0xFF800001],
    8: [0, 1 << 63, 0x7FF << 52, 0xFFF << 52, (0x7FF << 52) + 1, 2**64 - 1, 0x3FF << 52, 1],
}


@st.composite
def frames(draw: st.DrawFn) -> tuple[Chain, bytes, bytes]:
    """A chain, the bytes of a frame, and the parent's."""
    chain = draw(st.sampled_from(CHAINS))
    size = 8 * chain.width

    def words() -> bytes:
        near = st.integers(0x3E000000, 0x3F000000) if chain.width == 4 else st.integers(0, 300)
        word = st.sampled_from(SPECIAL[chain.width]) | st.integers(0, 2**size - 1) | near
        drawn = draw(st.lists(word | st.just(0), max_size=40))
        if draw(st.booleans()):
            drawn += [0] * draw(st.integers(0, 600))
        if "narrow" in chain.steps:
            drawn = [n & 0xFFFF0000 for n in drawn]
        return b"".join((n % 2**size).to_bytes(chain.width, "little") for n in drawn)

    raw = words()
    before = raw if "narrow" in chain.steps else words()[: len(raw)].ljust(len(raw), b"\x3c")
    if "grid" in chain.steps and draw(st.booleans()):
        moves = draw(st.lists(st.integers(-(1 << size - 9), 1 << size - 9), max_size=40))
        old = np.frombuffer(raw, f"<u{chain.width}").copy()
        old[: len(moves)] += np.array(moves[: old.size], np.int64).astype(old.dtype)
        before = old.tobytes()
    tail = draw(st.binary(max_size=chain.width - 1))
    return chain, raw + tail, before + bytes(len(tail))


def test_there_are_as_many_chains_as_the_specification_allows() -> None:
    assert len(CHAINS) == 4 * 6 * 5 - 6 + 6 * 5 + 2 * 3 + 2


@settings(max_examples=600)
@given(frames())
def test_every_chain_gives_every_word_back(frame: tuple[Chain, bytes, bytes]) -> None:
    chain, raw, before = frame
    data, old = np.frombuffer(raw, np.uint8), np.frombuffer(before, np.uint8)
    segments = chain.split(data, old)
    assert sum(s.size for s in segments) <= 2 * len(raw) + 512
    assert chain.join(segments, len(raw), old).tobytes() == raw
    parts = [s.tobytes() for s in segments]
    assert apack_decoder.frame_bytes(parts, len(raw), chain.width, list(chain.steps), before) == raw
    assert data.tobytes() == raw


@settings(max_examples=300)
@given(frames(), st.data())
def test_damaged_segments_give_an_error_or_the_right_number_of_bytes(
    frame: tuple[Chain, bytes, bytes], data: st.DataObject
) -> None:
    chain, raw, before = frame
    old = np.frombuffer(before, np.uint8)
    segments = [s.copy() for s in chain.split(np.frombuffer(raw, np.uint8), old)]
    for _ in range(data.draw(st.integers(1, 3))):
        victim = data.draw(st.integers(0, len(segments) - 1))
        if segments[victim].size and data.draw(st.booleans()):
            segments[victim][data.draw(st.integers(0, segments[victim].size - 1))] ^= 1 << data.draw(
                st.integers(0, 7)
            )
        else:
            segments[victim] = np.frombuffer(data.draw(st.binary(max_size=64)), np.uint8).copy()
    try:
        found = chain.join(segments, len(raw), old).tobytes()
    except InvalidFile:
        return
    assert len(found) == len(raw)
    parts = [s.tobytes() for s in segments]
    assert apack_decoder.frame_bytes(parts, len(raw), chain.width, list(chain.steps), before) == found


@settings(max_examples=300)
@given(st.sampled_from((2, 4)), st.integers(0, 255), st.integers(-3, 30), st.integers(0, 2**32 - 1))
def test_any_grid_gives_every_word_back(width: int, step: int, finer: int, seed: int) -> None:
    """Also one that nobody would choose: words beyond its last line and below its first one, moves near 127."""
    rng = np.random.default_rng(seed)
    moved = 2.0 ** (min(step + finer, 250) - 127)
    floats = rng.standard_normal(60) * 2.0 ** rng.integers(-4, 12, 60) * moved
    with np.errstate(over="ignore"):
        old = floats.astype(np.float32)
        new = (floats + rng.standard_normal(60) * 2.0 ** rng.integers(-4, 4, 60) * moved).astype(np.float32)
    x, before = ((v.view(np.uint32) >> np.uint32(32 - 8 * width)).astype(f"<u{width}") for v in (new, old))
    x[:10] = (rng.integers(0, 2, 10) << 8 * width - 1) + rng.choice(np.array(SPECIAL[width]) >> 1, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "_step", lambda *_: step)
        segments = grid.split(x, before)
    assert segments[0].tolist() == [step]
    assert np.array_equal(grid.join(segments, before), x)
    assert apack_decoder.undo_grid([s.tobytes() for s in segments], before.tolist(), width) == x.tolist()


def test_a_grid_serves_values_of_all_sizes_that_move_alike() -> None:
    """With the float counts of `sub` small values seem to move far; with lines all moves are of one kind."""
    rng = np.random.default_rng(3)
    old = (rng.standard_normal(40_000) * 0.02).astype(np.float32)
    new = (old + rng.standard_normal(40_000) * 0.005).astype(np.float32)

    def size(*steps: str) -> int:
        segments = Chain(4, steps).split(new.view(np.uint8), old.view(np.uint8))
        return sum(len(store(s, (zstd.HUFFMAN,))) for s in segments)

    # What is known of a value before: its change has a variance, and its float a place behind the binary point.
    spacing = np.log2(np.spacing(np.abs(new)).astype(np.float64))
    entropy = (np.log2(0.005) + 0.5 * np.log2(2 * np.pi * np.e) - spacing).sum() / 8
    assert size("sub", "grid") < 1.01 * entropy
    assert size("sub", "planes") > 1.03 * entropy


# ---------------------------------------------------------------- directories


def _good_name(name: str) -> bool:
    return (
        name[-1] not in ". " and name.strip(". ") != "" and name.split(".")[0].strip().upper() not in ("CON", "NUL")
    )


NAME = st.text("abcXY019_-+= .é漢ß\U0001f600", min_size=1, max_size=12).filter(_good_name)
CONTENT = st.binary(max_size=300) | st.builds(
    lambda seed, n: np.random.default_rng(seed).bytes(n), st.integers(0, 99), st.sampled_from([0, 1, 4096, 70_001])
)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, bytes]:
    """Files of a directory beside the adapter's own, in folders too."""
    found: dict[str, bytes] = {}
    for parts in draw(st.lists(st.lists(NAME, min_size=1, max_size=3), max_size=8)):
        path, folded = "/".join(parts), "/".join(parts).casefold()
        taken = {*(p.casefold() for p in found), CONFIG, WEIGHTS}
        folders = {p[:i] for p in taken for i in range(len(p)) if p[i] == "/"}
        inside = {folded[:i] for i in range(len(folded)) if folded[i] == "/"}
        # A folder that is another adapter stays behind.
        if folded not in taken | folders and not inside & taken and parts[-1].casefold() != CONFIG:
            found[path] = draw(CONTENT)
    return found


@settings(max_examples=60, suppress_health_check=SLOW)
@given(trees())
def test_random_directories_come_back(tmp_path: Path, files: dict[str, bytes]) -> None:
    with fresh(tmp_path) as where:
        source = packs.adapter(where / "adapter", {"w": packs.ramp(3, 5)}, files)
        round_trip(source, where)


DTYPES = list(apack_decoder.BITS)


@st.composite
def weights(draw: st.DrawFn) -> bytes:
    """A safetensors file: any dtypes and shapes, the header written in any way."""
    entries: list[tuple[str, str, list[int], int]] = []
    names = draw(st.lists(st.text('aA.é漢"\\/ _\u2028', min_size=1, max_size=9), max_size=6, unique=True))
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 33]), max_size=3))
        if apack_decoder.BITS[dtype] < 8:
            shape.append(4)
        bits = apack_decoder.BITS[dtype]
        entries.append((name, dtype, shape, int(np.prod(shape, dtype=int)) * bits // 8))
    header, end, body = {}, 0, b""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        body += rng.bytes(size) if draw(st.booleans()) else bytes(size)
        end += size
    listed: dict[str, Any] = {}
    metadata = draw(
        st.none() | st.dictionaries(st.text("kß\n", max_size=3), st.text("v\"'\x7f", max_size=5), max_size=3)
    )
    order = draw(st.permutations(list(header)))
    if metadata is not None:
        listed["__metadata__"] = metadata
    listed |= {name: header[name] for name in (order if draw(st.booleans()) else header)}
    compact = draw(st.booleans())
    text = json.dumps(listed, ensure_ascii=draw(st.booleans()), separators=(",", ":") if compact else None).encode()
    text += b" " * (-len(text) % 8 if draw(st.booleans()) else draw(st.integers(0, 20)))
    return len(text).to_bytes(8, "little") + text + body


@settings(max_examples=150, suppress_health_check=SLOW)
@given(weights())
def test_random_tensor_files_come_back(tmp_path: Path, model: bytes) -> None:
    with fresh(tmp_path) as where:
        source = packs.write_tree(where / "adapter", {CONFIG: packs.CONFIG, WEIGHTS: model})
        round_trip(source, where)


VALUES = (
    lambda rng, n: rng.standard_normal(n).astype(np.float32),
    lambda rng, n: (rng.standard_normal(n) * (rng.random(n) < 0.03)).astype(np.float32),
    lambda rng, n: rng.standard_normal(n).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000),
    lambda rng, n: np.zeros(n, np.float32),
    lambda rng, n: rng.integers(0, 5, n).astype(np.int64),
    lambda rng, n: rng.integers(0, 2**32, n).astype(np.uint32),
    lambda rng, n: np.resize(np.array(SPECIAL[4], np.uint32), n),
)


@pytest.mark.parametrize("kind", range(len(VALUES)))
def test_tensors_of_several_frames_come_back(kind: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(kind)
    drawn = VALUES[kind](rng, 1_100_000)
    array = drawn.view(np.float32) if drawn.dtype == np.uint32 else drawn
    pack = round_trip(
        packs.adapter(tmp_path / "adapter", {"a.lora_A": array, "a.lora_B": array[::-1].copy()}), tmp_path
    )
    assert any(len(stream["frames"]) > 1 for stream in manifest(pack)["streams"])


def test_a_frame_of_zeros_among_others_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    # Two exponents, few words: the chain numbers exponents and leaves zeros out.
    values = np.where(rng.random(3 << 19) < 0.02, rng.uniform(1, 3, 3 << 19), 0).astype(np.float32)
    values[1 << 19 : 2 << 19] = 0
    round_trip(packs.adapter(tmp_path / "adapter", {"a.lora_A": values}), tmp_path)


# ---------------------------------------------------------------- the same bytes


def _mixed(where: Path) -> Path:
    rng = np.random.default_rng(1)
    arrays = {f"m.{i}.lora_{x}": rng.standard_normal((16, 700)).astype(np.float32) for i in range(4) for x in "AB"}
    files = {
        "README.md": b"words " * 400,
        "runs/events": rng.bytes(9000),
        "z.json": b"{}",
        "optimizer.pt": bytes(5000),
    }
    return packs.adapter(where / "adapter", arrays, files)


def test_the_same_bytes_whatever_the_number_of_threads(tmp_path: Path) -> None:
    source = _mixed(tmp_path)
    made = {packed(source, tmp_path / f"{jobs}.apack", jobs=jobs).read_bytes() for jobs in (1, 2, 4)}
    assert len(made) == 1
    trees = [restored(tmp_path / "1.apack", tmp_path / f"out{jobs}", jobs=jobs) for jobs in (1, 2, 4)]
    assert trees[0] == trees[1] == trees[2] == packs.tree(source)


@pytest.mark.parametrize("seed", ["1", "77"])
def test_the_same_bytes_whatever_the_hash_seed(seed: str, tmp_path: Path) -> None:
    source = _mixed(tmp_path)
    here = packed(source, tmp_path / "here.apack").read_bytes()
    code = "import sys, adapterpack; adapterpack.compress(sys.argv[1], sys.argv[2], jobs=2)"
    there = tmp_path / "there.apack"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(source), str(there)], check=True, env=environment)
    assert there.read_bytes() == here


def test_order_times_and_modes_of_the_source_play_no_part(tmp_path: Path) -> None:
    source = _mixed(tmp_path)
    other = tmp_path / "other" / "adapter"
    for path, data in reversed(packs.tree(source).items()):
        (other / path).parent.mkdir(parents=True, exist_ok=True)
        (other / path).write_bytes(data)
        (other / path).chmod(0o600)
        os.utime(other / path, (1, 1))
    assert packed(source, tmp_path / "a.apack").read_bytes() == packed(other, tmp_path / "b.apack").read_bytes()


def test_a_dry_run_writes_nothing_and_tells_the_size(tmp_path: Path) -> None:
    source = _mixed(tmp_path)
    told = adapterpack.compress(source, tmp_path / "a.apack", jobs=1, dry_run=True)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}
    assert packed(source, tmp_path / "a.apack").stat().st_size == told.bytes_out


# ---------------------------------------------------------------- every method

_TARGETS = ["q_proj", "k_proj"]
OTHERS: Mapping[str, Callable[[], peft.PeftConfig]] = {
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=_TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=_TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=_TARGETS, feedforward_modules=[]),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=_TARGETS, total_step=10),
    "oft": lambda: peft.OFTConfig(target_modules=_TARGETS, oft_block_size=0, r=2),
    "boft": lambda: peft.BOFTConfig(target_modules=_TARGETS, boft_block_size=4),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=_TARGETS),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, target_modules=_TARGETS),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=_TARGETS),
}
KNOWN = ("linear-llama", "dora-linear", "modules-to-save", "full-k2", "topk-k3", "projection-mixed", "seed-mixed")


@pytest.mark.parametrize("method", OTHERS)
def test_adapters_of_every_method_come_back(method: str, workshop: Workshop, tmp_path: Path) -> None:
    source = workshop.adapter(cases.Case(f"pack-{method}", OTHERS[method]))
    pack = round_trip(source, tmp_path)
    said = manifest(pack)
    assert (said["method"], said["grade"]) == (method, "lossless")
    assert (said["encoding"] is None) == (method.upper() not in METHODS)


@pytest.mark.parametrize("name", KNOWN)
def test_adapters_of_known_methods_come_back(name: str, workshop: Workshop, tmp_path: Path) -> None:
    pack = round_trip(workshop.adapter(cases.BY_NAME[name]), tmp_path)
    assert manifest(pack)["encoding"] is not None


def test_an_unknown_peft_type_comes_back(tmp_path: Path) -> None:
    config = '{"peft_type": "Überraschung",\t"r":\n 1e0}\n'.encode()
    source = packs.adapter(tmp_path / "adapter", {"a b/c": packs.ramp(2)}, {CONFIG: config})
    assert manifest(round_trip(source, tmp_path))["method"] == "überraschung"


class Trap:
    """Unpickled it would leave a file behind."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return Path.touch, (self.where,)


def _trainer_files(where: Path) -> dict[str, Any]:
    import pickle

    trap = pickle.dumps(Trap(where / "sprung"))
    return {
        "optimizer.pt": trap + bytes(2000),
        "scheduler.pt": trap,
        "rng_state.pth": trap,
        "training_args.bin": trap,
        "trainer_state.json": b'{"epoch": 1.5}',
        "README.md": b"# Card\n",
        "runs/Nov25/events.out": bytes(range(256)) * 9,
    }


def test_a_pickle_alone_is_packed_and_never_opened(tmp_path: Path) -> None:
    import pickle

    files = {CONFIG: packs.LORA, "adapter_model.bin": pickle.dumps(Trap(tmp_path / "sprung"))}
    source = packs.write_tree(tmp_path / "adapter", files)
    result = adapterpack.compress(source, tmp_path / "a.apack", jobs=1)
    assert any("pickles" in note and "adapter_model.bin" in note for note in result.notes)
    assert restored(tmp_path / "a.apack", tmp_path / "again") == files
    assert apack_decoder.decode((tmp_path / "a.apack").read_bytes()) == files
    assert adapterpack.inspect(tmp_path / "a.apack").unsupported is not None
    with pytest.raises(AdapterpackError) as caught:
        adapterpack.check(tmp_path / "a.apack")
    assert caught.value.code == "pickle-refused"
    assert not (tmp_path / "sprung").exists()


def test_a_trainer_s_checkpoint_comes_back_with_its_state(tmp_path: Path) -> None:
    source = packs.adapter(tmp_path / "adapter", {"w": packs.ramp(9, 9)}, _trainer_files(tmp_path))
    result = adapterpack.compress(source, tmp_path / "a.apack", jobs=1)
    (note,) = [note for note in result.notes if "pickles" in note]
    assert all(name in note for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"))
    assert result.dropped == ()
    assert restored(tmp_path / "a.apack", tmp_path / "again") == packs.tree(source)
    assert not (tmp_path / "sprung").exists()


def test_adapter_only_leaves_the_training_state_out_and_says_so(tmp_path: Path) -> None:
    source = packs.adapter(tmp_path / "adapter", {"w": packs.ramp(9, 9)}, _trainer_files(tmp_path))
    result = adapterpack.compress(source, tmp_path / "a.apack", jobs=1, adapter_only=True)
    found = restored(tmp_path / "a.apack", tmp_path / "again")
    assert found.keys() == {CONFIG, WEIGHTS, "README.md"}
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", "runs/"):
        assert any(name in text for text in result.dropped), name
    assert manifest(tmp_path / "a.apack")["dropped"] == list(result.dropped)


def test_what_a_pack_cannot_hold_is_named(tmp_path: Path) -> None:
    source = packs.adapter(tmp_path / "adapter", {"w": packs.ramp(9)}, {"deep/a.txt": b"a", "deep/other/b": b"b"})
    packs.write_tree(source / "deep/other", {CONFIG: packs.CONFIG})
    (source / "deep/empty").mkdir()
    (source / "deep/link").symlink_to(tmp_path)
    (source / "void").mkdir()
    os.mkfifo(source / "deep/pipe")
    result = adapterpack.compress(source, tmp_path / "a.apack", jobs=1)
    found = restored(tmp_path / "a.apack", tmp_path / "again")
    assert found == {path: data for path, data in packs.tree(source).items() if not path.startswith("deep/other")}
    for name in ("deep/other/", "deep/empty/", "deep/link/", "deep/pipe", "void/"):
        assert any(text.endswith(name) for text in result.dropped), (name, result.dropped)


@pytest.mark.parametrize("name", ["a:b", "con.txt", "a ", "a\\b", "tab\t", "what?"])
def test_a_name_that_some_system_lacks_is_refused_when_packing(name: str, tmp_path: Path) -> None:
    source = packs.adapter(tmp_path / "adapter", {"w": packs.ramp(9)}, {name: b"x"})
    with pytest.raises(WriteFailed, match="does not fit in a pack"):
        packed(source, tmp_path / "a.apack")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


# ---------------------------------------------------------------- recipes, equal tensors, quantised values


def test_projections_are_kept_as_a_recipe(workshop: Workshop, tmp_path: Path) -> None:
    source = workshop.adapter(cases.BY_NAME["projection-mixed"])
    pack = round_trip(source, tmp_path)
    places = {name: place for name, _, _, place in manifest(pack)["tensors"]}
    assert places["base_model.vera_A"] == ["recipe", 0, "vera_A"]
    assert places["base_model.vera_B"] == ["recipe", 0, "vera_B"]
    bare = tmp_path / "bare"
    arrays = apack_decoder_arrays(source / WEIGHTS)
    packs.adapter(bare, {n: a for n, a in arrays.items() if "vera_A" not in n and "vera_B" not in n})
    assert pack.stat().st_size < packed(bare, tmp_path / "bare.apack").stat().st_size + 1500


def apack_decoder_arrays(file: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return dict(load_file(file))


def test_changed_projections_are_stored(workshop: Workshop, tmp_path: Path) -> None:
    source = shutil.copytree(workshop.adapter(cases.BY_NAME["projection-mixed"]), tmp_path / "adapter")
    data = bytearray((source / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    begin = json.loads(data[8:header])["base_model.vera_A"]["data_offsets"][0]
    data[header + begin] ^= 1
    (source / WEIGHTS).write_bytes(data)
    assert manifest(round_trip(source, tmp_path))["recipes"] == []


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    one, two = (rng.standard_normal((40, 50)).astype(np.float32) for _ in range(2))
    close = one.copy()
    close[20, 20] += 1
    arrays = {"a": one, "b": two, "c": one, "d": close, "e": one.reshape(50, 40), "f": one.view(np.int32)}
    places = {
        t[0]: t[3] for t in manifest(round_trip(packs.adapter(tmp_path / "adapter", arrays), tmp_path))["tensors"]
    }
    assert places["c"] == places["e"] == places["f"] == ["same", 0]
    assert all(isinstance(places[name], int) for name in "abd")


@st.composite
def quantised(draw: st.DrawFn) -> list[Quantised]:
    found = []
    for _ in range(draw(st.integers(1, 3))):
        lines, length = draw(st.integers(0, 6)), draw(st.integers(0, 40))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        codes = np.zeros((lines, length), np.int32)
        for line in codes:
            top = draw(st.sampled_from([0, 1, 100, 2000, (1 << 20) - 1]))
            line[:] = rng.integers(-top, top + 1, length)
        steps = draw(st.lists(st.sampled_from([-1024, -80, -7, 0, 9, 511]), min_size=lines, max_size=lines))
        found.append(Quantised(codes, tuple(steps), draw(st.integers(0, 1))))
    return found


@settings(max_examples=60, suppress_health_check=SLOW)
@given(quantised())
def test_quantised_tensors_come_back(tmp_path: Path, sources: list[Quantised]) -> None:
    with fresh(tmp_path) as where:
        pack = write_quantised(where / "q.apack", sources)
        files = restored(pack, where / "again")
        assert apack_decoder.decode(pack.read_bytes()) == files
        for n, source in enumerate(sources):
            array = apack_decoder_arrays(where / "again" / WEIGHTS)[f"w{n}"]
            assert array.tobytes() == source.values().tobytes()


def write_quantised(path: Path, sources: list[Quantised]) -> Path:
    tensors = {}
    for n, source in enumerate(sources):
        lines, length = source.codes.shape
        tensors[f"w{n}"] = Tensor(F32, (lines, length) if source.axis == 0 else (length, lines), source)
    c = containers.Checkpoint(name="made", config=json.loads(packs.CONFIG), tensors=tensors)
    facts = apack.Facts("other", None, "approximate", 1, "0.01", "0.001")
    apack.write_pack(c, path, {}, facts, apack.References(), overwrite=False, protected=(), jobs=1)
    return path


# ---------------------------------------------------------------- base and parent


def test_saved_embeddings_are_the_base_s(workshop: Workshop, tmp_path: Path) -> None:
    source, base = workshop.pair("saved-embeddings")
    plain = packed(source, tmp_path / "plain.apack")
    pack = packed(source, tmp_path / "a.apack", base=base)
    said = manifest(pack)
    assert any(t[3][0] == "base" for t in said["tensors"] if isinstance(t[3], list))
    assert said["base"] == str(base)
    assert pack.stat().st_size < plain.stat().st_size / 2
    moved = shutil.copytree(base, tmp_path / "base")
    assert restored(pack, tmp_path / "again", base=moved) == packs.tree(source)
    arrays = {name: array.tobytes() for name, array in apack_decoder_arrays(next(base.glob("*.safetensors"))).items()}
    assert apack_decoder.decode(pack.read_bytes(), base=arrays) == packs.tree(source)
    assert adapterpack.check(pack, base=moved).healthy == adapterpack.check(source, base=moved).healthy


def test_another_base_or_none_is_an_error_with_a_hint(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, base = workshop.pair("saved-embeddings")
    moved = shutil.copytree(base, tmp_path / "base")
    pack = packed(source, tmp_path / "a.apack", base=moved)
    shutil.rmtree(moved)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingReference) as caught:
        restored(pack, tmp_path / "again")
    assert "--base" in (caught.value.hint or "") and str(pack) in caught.value.message
    with pytest.raises(InvalidFile) as other:
        restored(pack, tmp_path / "again", base=workshop.base("llama", seed=9))
    assert "other values" in other.value.message and other.value.hint
    with pytest.raises(AdapterpackError):
        restored(pack, tmp_path / "again", base=workshop.base("opt"))
    assert not (tmp_path / "again").exists()


def test_a_base_in_vain_is_said(tmp_path: Path, workshop: Workshop) -> None:
    source = packs.adapter(tmp_path / "adapter", {"w": packs.ramp(30, 30)})
    result = adapterpack.compress(source, tmp_path / "a.apack", base=workshop.base("llama"), jobs=1)
    assert manifest(tmp_path / "a.apack")["base"] is None
    assert any("without it" in note for note in result.notes)


def series(root: Path, count: int, size: int = 40) -> list[Path]:
    """Checkpoints of one run, each a little further than the one before."""
    rng = np.random.default_rng(8)
    a = (rng.standard_normal((4, 10 * size)) * 0.1).astype(np.float32)
    fixed = rng.standard_normal((10 * size, 4)).astype(np.float32)
    found = []
    for n in range(count):
        a = a + (rng.standard_normal(a.shape) * 1e-5).astype(np.float32)
        found.append(packs.adapter(root / f"step-{n}", {packs.Q.format("A"): a, packs.Q.format("B"): fixed}))
        (found[-1] / CONFIG).write_bytes(packs.LORA)
    return found


def test_a_chain_of_packs_each_the_parent_of_the_next(tmp_path: Path) -> None:
    steps = series(tmp_path / "run", 4)
    where = tmp_path / "packs"
    where.mkdir()
    made: list[Path] = []
    for step in steps:
        made.append(packed(step, where / f"{step.name}.apack", **({"parent": made[-1]} if made else {})))
    assert made[0].stat().st_size > 2 * made[1].stat().st_size
    known: dict[str, bytes] | None = None
    for n, (step, pack) in enumerate(zip(steps, made, strict=True)):
        said = manifest(pack)["parent"]
        assert (said and said["depth"]) == (n or None)
        assert restored(pack, tmp_path / f"out{n}") == packs.tree(step)
        known = apack_decoder.decode(pack.read_bytes(), known)
        assert known == packs.tree(step)
        assert adapterpack.check(pack).healthy
        assert adapterpack.verify(pack, step).equal
    facts = adapterpack.inspect(made[3]).pack
    assert facts is not None and facts.parents == ("step-2.apack", "step-1.apack", "step-0.apack")
    assert facts.depth == 3
    # All parents in another place, named once.
    away = tmp_path / "away"
    away.mkdir()
    moved = shutil.move(made[3], away / "last.apack")
    assert restored(moved, tmp_path / "far", parent=where) == packs.tree(steps[3])
    with pytest.raises(MissingReference) as caught:
        restored(moved, tmp_path / "lost")
    assert "--parent" in (caught.value.hint or "") and "step-2.apack" in caught.value.message
    with pytest.raises(MissingReference):
        restored(moved, tmp_path / "lost", parent=made[0])
    assert not (tmp_path / "lost").exists()


def test_a_directory_as_parent(tmp_path: Path) -> None:
    first, second = series(tmp_path, 2)
    pack = packed(second, tmp_path / "second.apack", parent=first)
    assert manifest(pack)["parent"]["name"] == "step-0"
    places = {t[0]: t[3] for t in manifest(pack)["tensors"]}
    assert places[packs.Q.format("B")] == ["parent"]
    assert ["sub", "grid"] in [stream["steps"] for stream in manifest(pack)["streams"]]
    assert restored(pack, tmp_path / "out") == packs.tree(second)
    assert apack_decoder.decode(pack.read_bytes(), packs.tree(first)) == packs.tree(second)
    # Its tensors alone count: another card does no harm.
    (first / "README.md").write_text("later")
    assert restored(pack, tmp_path / "out2") == packs.tree(second)
    first.rename(tmp_path / "elsewhere")
    assert restored(pack, tmp_path / "out3", parent=tmp_path / "elsewhere") == packs.tree(second)


def test_a_changed_parent_is_not_taken(tmp_path: Path) -> None:
    first, second = series(tmp_path, 2)
    pack = packed(second, tmp_path / "second.apack", parent=first)
    data = bytearray((first / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (first / WEIGHTS).write_bytes(data)
    for call in (lambda: restored(pack, tmp_path / "out"), lambda: adapterpack.check(pack)):
        with pytest.raises(MissingReference, match="SHA-256"):
            call()
    with pytest.raises(MissingReference):
        restored(pack, tmp_path / "out", parent=first)


def test_64_parents_are_read_and_65_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    w = rng.standard_normal((16, 16)).astype(np.float32)
    last = packed(packs.adapter(tmp_path / "step", {"w": w}), tmp_path / "0.apack")
    for n in range(1, 65):
        w = w + np.float32(1e-6)
        (tmp_path / "step" / WEIGHTS).write_bytes(packs.safetensors({"w": w}, {"format": "pt"}))
        last = packed(tmp_path / "step", tmp_path / f"{n}.apack", parent=last)
    assert manifest(last)["parent"]["depth"] == 64
    assert restored(last, tmp_path / "out") == packs.tree(tmp_path / "step")
    with pytest.raises(UsageError, match="64 packs"):
        packed(tmp_path / "step", tmp_path / "65.apack", parent=last)


# ---------------------------------------------------------------- a pack as a source


def test_a_pack_is_packed_anew(tmp_path: Path, workshop: Workshop) -> None:
    source = workshop.adapter(cases.BY_NAME["projection-mixed"])
    first = packed(source, tmp_path / "first.apack")
    second = packed(first, tmp_path / "second.apack")
    assert restored(second, tmp_path / "out") == packs.tree(source)
    assert second.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("name", ["linear-llama", "topk-k3", "projection-mixed"])
def test_every_verb_takes_a_pack(name: str, workshop: Workshop, tmp_path: Path) -> None:
    source, base = workshop.pair(name)
    pack = packed(source, tmp_path / "a.apack")
    of_pack, of_directory = (adapterpack.inspect(path) for path in (pack, source))
    assert of_pack.pack is not None and of_directory.pack is None
    assert of_pack.parts == of_directory.parts and of_pack.dtypes == of_directory.dtypes
    assert of_pack.method == of_directory.method
    assert adapterpack.check(pack).findings == adapterpack.check(source).findings
    assert adapterpack.verify(pack, source, base=base).equal and adapterpack.verify(source, pack, base=base).equal
    for path, out in ((pack, "p"), (source, "d")):
        adapterpack.convert(path, tmp_path / f"{out}-lora", to="lora", base=base)
        adapterpack.merge(path, base, tmp_path / f"{out}-merged")
    for kind in ("lora", "merged"):
        ours, theirs = (packs.tree(tmp_path / f"{x}-{kind}") for x in "pd")
        assert any(path.endswith(".safetensors") for path in ours)
        assert {p: d for p, d in ours.items() if p.endswith(".safetensors")} == {
            p: d for p, d in theirs.items() if p.endswith(".safetensors")
        }


# ---------------------------------------------------------------- a source that changes meanwhile


@pytest.mark.parametrize("name", ["README.md", "optimizer.pt", "runs/events", WEIGHTS])
def test_a_file_that_changes_while_it_is_packed_gives_no_pack(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _mixed(tmp_path)
    choose = choosing.choose

    def late(*arguments: Any) -> Any:
        # Between the reading that is hashed and the one that is coded; as many bytes as before.
        time.sleep(0.2)
        data = (source / name).read_bytes()
        (source / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return choose(*arguments)

    monkeypatch.setattr(choosing, "choose", late)
    with pytest.raises(ChangedWhileReading, match=name):
        packed(source, tmp_path / "a.apack")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


# ---------------------------------------------------------------- destinations


def test_inputs_and_what_is_there_stay(tmp_path: Path) -> None:
    source = packs.adapter(tmp_path / "adapter", {"w": packs.ramp(9)})
    before = packs.tree(source)
    pack = packed(source, tmp_path / "a.apack")
    data = pack.read_bytes()
    for call in (
        lambda: packed(source, pack),
        lambda: packed(source, source / "b.apack"),
        lambda: packed(pack, pack, overwrite=True),
        lambda: adapterpack.unpack(pack, source),
        lambda: adapterpack.unpack(pack, tmp_path, overwrite=True),
        lambda: adapterpack.unpack(source, tmp_path / "out"),
        lambda: adapterpack.unpack(pack, tmp_path / "out", expect_sha256="0" * 64),
    ):
        with pytest.raises(AdapterpackError):
            call()
        assert packs.tree(source) == before and pack.read_bytes() == data
        assert not (tmp_path / "out").exists()
    packed(source, pack, overwrite=True)
    assert pack.read_bytes() == data
    adapterpack.unpack(pack, tmp_path / "out", expect_sha256=hashlib.sha256(data).hexdigest().upper())
    adapterpack.unpack(pack, tmp_path / "out", overwrite=True)
    assert packs.tree(tmp_path / "out") == before
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "a.apack", "out"}


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    source = _mixed(tmp_path)
    seen: list[tuple[str, int, int]] = []
    progress: Progress = lambda stage, done, total: seen.append((stage, done, total))  # noqa: E731
    packed(source, tmp_path / "a.apack", progress=progress)
    restored(tmp_path / "a.apack", tmp_path / "out", progress=progress)
    for stage in ("pack", "unpack"):
        steps = [(done, total) for name, done, total in seen if name == stage]
        assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]


def test_a_pack_is_a_safetensors_file(tmp_path: Path) -> None:
    pack = packed(_mixed(tmp_path), tmp_path / "a.apack")
    loaded = load(pack.read_bytes())
    assert sorted(loaded) == ["0", "1", "2", "3"]


def test_unpack_loads_late_what_it_may_not_need() -> None:
    """numpy while frames are decoded, the rest hardly ever: loading takes longer than unpacking."""
    code = "import sys, adapterpack.cli.unpack_verb; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "adapterpack.hub", "adapterpack.sources", "adapterpack.base"} & set(done.stdout.split())


@pytest.mark.parametrize("begun", [0, 3 << 20, 1 << 30])
@pytest.mark.parametrize("jobs", [1, 3])
def test_frames_that_were_begun_before_numpy_is_there(
    begun: int, jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("adapterpack.unpack")
    values = np.random.default_rng(4).standard_normal((1200, 1200)).astype(np.float32)
    source = packs.adapter(tmp_path / "src", {packs.Q.format("A"): values, packs.Q.format("B"): values[::-1].copy()})
    pack = packed(source, tmp_path / "it.apack")

    def late(name: str) -> object:
        time.sleep(0.2)
        return import_module(name)

    def never(name: str) -> object:
        time.sleep(0.1)
        raise MemoryError

    monkeypatch.setattr(module, "_BEGUN", begun)
    monkeypatch.setattr(module, "import_module", late)
    assert restored(pack, tmp_path / "out", jobs=jobs) == packs.tree(source)
    monkeypatch.setattr(module, "import_module", never)
    with pytest.raises(MemoryError):
        restored(pack, tmp_path / "none", jobs=jobs)
    assert not (tmp_path / "none").exists()
    data = bytearray(pack.read_bytes())
    data[3 << 20] ^= 1
    pack.write_bytes(data)
    monkeypatch.setattr(module, "import_module", late)
    with pytest.raises(InvalidFile, match="is damaged between"):
        restored(pack, tmp_path / "none", jobs=jobs)
    assert not (tmp_path / "none").exists() and not list(tmp_path.glob(".adapterpack*"))
