"""No damage gets past a reader of packs, and nothing hostile costs more than an error."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apack_decoder
import numpy as np
import packs
import pytest

import adapterpack
from adapterpack import containers, limits
from adapterpack.errors import AdapterpackError

SMALL = packs.small().pack()


class Slot:
    """A place where packs are put one after the other, and what the verbs say of each."""

    def __init__(self, root: Path) -> None:
        self.path, self.out = root / "slot.apack", root / "out"
        self.whole = root / "whole.apack"
        self.whole.write_bytes(SMALL)

    def put(self, data: bytes) -> Path:
        # Another file each time, so that nobody takes it for one that changed while it was read.
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(data)
        return self.path

    def refused(self, data: bytes) -> AdapterpackError:
        """The error of what unpack, check and verify do first: open the pack and prove it."""
        self.put(data)
        with pytest.raises(AdapterpackError) as caught, containers.open_checkpoint(self.path, opaque=True) as c:
            c.prove()
        return caught.value

    def refused_by_all(self, data: bytes) -> None:
        self.put(data)
        calls: list[Callable[[], object]] = [
            lambda: adapterpack.unpack(self.path, self.out, jobs=1),
            lambda: adapterpack.check(self.path),
            lambda: adapterpack.verify(self.path, self.whole),
            lambda: adapterpack.verify(self.whole, self.path),
        ]
        for call in calls:
            with pytest.raises(AdapterpackError) as caught:
                call()
            assert str(self.path) in caught.value.message
            assert not self.out.exists()
        assert sorted(p.name for p in self.path.parent.iterdir()) == ["slot.apack", "whole.apack"]


@pytest.fixture
def slot(tmp_path: Path) -> Slot:
    return Slot(tmp_path)


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_the_small_pack_is_whole(slot: Slot) -> None:
    slot.put(SMALL)
    adapterpack.unpack(slot.path, slot.out, jobs=1)
    assert packs.tree(slot.out) == apack_decoder.decode(SMALL)
    assert adapterpack.check(slot.path).healthy and adapterpack.verify(slot.path, slot.whole).equal
    assert len(SMALL) < 4096


# ---------------------------------------------------------------- accidents


def test_every_single_bit_is_guarded(slot: Slot) -> None:
    for bit in range(8 * len(SMALL)):
        slot.refused(flipped(SMALL, bit))


def test_every_single_bit_is_guarded_in_the_other_reader() -> None:
    for bit in range(0, 8 * len(SMALL), 7):
        with pytest.raises(apack_decoder.Refused):
            apack_decoder.decode(flipped(SMALL, bit))


def test_every_length_but_its_own_is_refused(slot: Slot) -> None:
    for length in range(len(SMALL)):
        slot.refused(SMALL[:length])
    for n in range(1, 65):
        slot.refused(SMALL + bytes(n))
        slot.refused(SMALL + SMALL[:n])
        slot.refused(bytes(n) + SMALL)
        slot.refused(SMALL[n:])


def _others() -> Iterator[bytes]:
    """Damage of other kinds."""
    yield SMALL + SMALL
    yield SMALL[:384] + SMALL
    yield SMALL + packs.small().pack()[384:]
    yield b"\n" + SMALL[:-1]
    yield SMALL[:-32] + bytes(32)
    yield SMALL[:384] + bytes(len(SMALL) - 384)
    yield bytes(len(SMALL))


def test_the_verbs_refuse_what_opening_and_proving_refuse(slot: Slot) -> None:
    bits = random.Random(7).sample(range(8 * len(SMALL)), 60)
    # Of each part: length, header, frames, digests, manifest, seal.
    edges = [0, 63, 64, 384 * 8, 384 * 8 + 9, (len(SMALL) - 33) * 8, (len(SMALL) - 1) * 8 + 7]
    damaged = [flipped(SMALL, bit) for bit in (*bits, *edges)]
    damaged += [SMALL[:length] for length in range(0, len(SMALL), 97)]
    damaged += [SMALL + bytes(n) for n in (1, 8, 64)]
    damaged += _others()
    for data in damaged:
        slot.refused_by_all(data)


def equal_frames() -> packs.Maker:
    """A pack of eight frames of the same length, each with other bytes."""
    maker = packs.Maker(method="lora", encoding="plain")
    maker.config(packs.LORA)
    rng = np.random.default_rng(2)
    data = [rng.bytes(128) for _ in range(8)]
    streams = [maker.stream(1, [], [(128, [part]) for part in half]) for half in (data[:4], data[4:])]
    for n, stream in enumerate(streams):
        whole = b"".join(data[4 * n : 4 * n + 4])
        maker.tensor(f"m{n}", "U8", (512,), whole, stream)
    maker.model({"format": "pt"})
    return maker


def test_swapped_frames_are_found(slot: Slot) -> None:
    maker = equal_frames()
    slot.put(maker.pack())
    with containers.open_checkpoint(slot.path) as c:
        c.prove()
    for i, j in itertools.combinations(range(8), 2):
        frames = list(maker.frames)
        frames[i], frames[j] = frames[j], frames[i]
        blob = b"".join(frames)
        assert (
            "is damaged between" in slot.refused(maker.pack()[:384] + blob + maker.pack()[384 + len(blob) :]).message
        )
        # The digests swapped with them break the seal; a seal made anew does not make the files right.
        sealed = packs.seal(maker.manifest, frames)
        old = maker.pack()
        assert "seal" in slot.refused(sealed[:-32] + old[-32:]).message
        assert "other bytes" in slot.refused(sealed).message


def test_a_part_of_another_pack_is_found(slot: Slot) -> None:
    one = equal_frames()
    two = equal_frames()
    two.frames[3] = bytes(128)
    other = packs.seal(two.manifest, two.frames)
    for cut in range(0, len(SMALL), 64):
        mixed = one.pack()[:cut] + other[cut:]
        if mixed not in (one.pack(), other):
            slot.refused(mixed)


def test_flips_in_a_larger_pack(slot: Slot, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    arrays = {f"m.{n}.lora_A": rng.standard_normal((64, 3000)).astype(np.float32) for n in range(4)}
    source = packs.adapter(slot.path.parent / "adapter", arrays, {"optimizer.pt": rng.bytes(100_000)})
    large = slot.path.parent / "large.apack"
    adapterpack.compress(source, large, jobs=1)
    data = large.read_bytes()
    for bit in random.Random(3).sample(range(8 * len(data)), 100):
        slot.refused(flipped(data, bit))
    for length in random.Random(4).sample(range(len(data)), 20):
        slot.refused(data[:length])


def test_a_damaged_tensor_is_never_handed_out(slot: Slot) -> None:
    """Not even where only a part is read: each frame is checked before anything of it is decoded."""
    manifest, frames = packs.take_apart(SMALL)
    for bit in range(0, 8 * sum(map(len, frames)), 3):
        slot.put(flipped(SMALL, 384 * 8 + bit))
        with containers.open_checkpoint(slot.path) as c:
            right = {e[0]: t for e, t in zip(manifest["tensors"], c.tensors.values(), strict=True)}
            good = packs_tensors()
            for name, tensor in right.items():
                try:
                    found = tensor.source.read(0, tensor.nbytes)
                except AdapterpackError:
                    continue
                assert found == good[name]


def packs_tensors() -> dict[str, bytes]:
    a, b = packs.ramp(4, 8).tobytes(), packs.ramp(32)[::-1].tobytes()
    q, k = packs.Q, packs.K
    return {q.format("A"): a, q.format("B"): a, k.format("A"): b, k.format("B"): b}


# ---------------------------------------------------------------- hostile ones that are no small files


def _child(code: str, *arguments: object) -> str:
    """Run with at most 1 GiB of address space beyond what the imports take."""
    before = (
        "import resource, sys, time, adapterpack, numpy, zstandard\n"
        "from adapterpack import containers\n"
        "from adapterpack.errors import AdapterpackError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))\n"
        "start = time.monotonic()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", before + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


_OPEN = """
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        with containers.open_checkpoint(path, opaque=True) as c:
            c.prove()
        print(path, "accepted")
    except AdapterpackError as e:
        assert path in e.message, e.message
        print(round(time.process_time() - start, 3), e.code, e.message)
"""


def _bombs() -> dict[str, bytes]:
    """Packs of a few hundred kilobytes at most that state, or hold, far more."""
    maker = packs.small()
    plain = apack_decoder.canonical(maker.manifest)
    padded = plain.replace(b'"by hand"', b'"' + b"p" * (80 << 20) + b'"')
    full = [[1, "F32", [], 0]] * 1_000_000

    def sealed(**fields: Any) -> bytes:
        return packs.seal({**maker.manifest, **fields}, maker.frames)

    huge = packs.Maker()
    huge.manifest["streams"].append({"frames": [[1 << 26, 1 << 26, 300]] * 4000, "steps": [], "width": 1})
    huge.frames += [packs.zstd(bytes(1 << 10), True)[:300].ljust(300, b"\0")] * 4000
    huge.config()
    huge.file("data.bin", b"", stream=0)
    huge.manifest["files"][-1]["size"] = 4000 << 26
    recipe = {
        "name": "uniform",
        "generator": "mt19937",
        "seed": 1,
        "draws": [{"name": "vera_A", "shape": [1 << 30, 1 << 4], "bound": (1.0).hex()}],
        "order": "row-major, one 32-bit draw per element, low 24 bits",
        "arithmetic": "fused",
        "through": "F32",
        "stored": "F32",
        "sha256": {"vera_A": "0" * 64},
        "keys": {},
    }
    drawn = packs.Maker(recipes=[{"version": 1, "recipe": recipe}])
    drawn.config()
    drawn.manifest["tensors"].append(["w", "F32", [1 << 30, 1 << 4], ["recipe", 0, "vera_A"]])
    length = len(apack_decoder.weights_header(None, drawn.manifest["tensors"], [1 << 36]))
    drawn.file("adapter_model.safetensors", b"", tensors=1, metadata=None, header=None)
    drawn.manifest["files"][-1]["size"] = (1 << 36) + length
    return {
        "manifest-of-80-mib": packs.seal(plain, maker.frames, packed=packs.zstd(padded, True, level=3)),
        "manifest-states-2-to-the-40": packs.seal(plain, maker.frames, packed=_stating(packs.zstd(plain), 1 << 40)),
        "manifest-states-64-mib": packs.seal(plain, maker.frames, packed=_stating(packs.zstd(plain), 1 << 26)),
        "a-million-tensors": sealed(tensors=full),
        "200001-tensors": sealed(tensors=[["n", "F32", [0], 0]] * 200_001),
        "twenty-million-lists": sealed(dropped=[[]] * 20_000_000),
        "six-million-numbers": sealed(dropped=[300] * 6_000_000),
        "a-million-files": sealed(files=[0] * 1_000_000),
        "a-million-frames": sealed(streams=[{"frames": [0] * (1 << 21), "steps": [], "width": 1}]),
        "a-million-classes": sealed(classes=[[0, 0, 0]] * 1_000_000),
        "frames-of-256-gib": huge.pack(),
        "recipe-of-64-gib": drawn.pack(),
        "number-of-5000-digits": packs.seal(plain.replace(b'"apack":1', b'"apack":' + b"1" * 5000), maker.frames),
    }


def _stating(frame: bytes, size: int) -> bytes:
    """The same zstd frame with another content size."""
    at = 6 if not frame[4] & 0x20 else 5
    old = (1 if frame[4] & 0x20 else 0, 2, 4, 8)[frame[4] >> 6]
    return frame[:4] + bytes([frame[4] & 0x3F | 0xC0]) + frame[5:at] + size.to_bytes(8, "little") + frame[at + old :]


def test_bombs_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    paths = []
    for name, data in _bombs().items():
        paths.append(tmp_path / f"{name}.apack")
        paths[-1].write_bytes(data)
        assert len(data) < 4 << 20, name
    lines = _child(_OPEN, *paths).splitlines()
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines, strict=True):
        seconds, code, message = line.split(" ", 2)
        assert code in ("invalid", "unsupported"), line
        # Of the processor's time. Parsing tens of megabytes of JSON is the most that anything takes.
        assert float(seconds) < (20 if "million" in path.name else 4), (path.name, seconds)
        assert len(message) < 1000


def test_parents_in_a_circle_are_refused(tmp_path: Path) -> None:
    """Both packs know the other's tensor file, which is possible, since a digest is of what is restored."""
    data = packs.ramp(16, 16).tobytes()

    def pointing(name: str) -> packs.Maker:
        maker = packs.Maker(parent={"depth": 1, "name": name, "sha256": "0" * 64})
        maker.config()
        maker.tensor("w", "F32", (16, 16), data, ["parent"])
        model = maker.model()
        maker.manifest["parent"]["sha256"] = packs.sha(model)
        return maker

    (tmp_path / "a.apack").write_bytes(pointing("b.apack").pack())
    (tmp_path / "b.apack").write_bytes(pointing("a.apack").pack())
    for name in ("a.apack", "b.apack"):
        start = time.monotonic()
        with pytest.raises(AdapterpackError, match="more than 64 packs"):
            adapterpack.unpack(tmp_path / name, tmp_path / "out")
        facts = adapterpack.inspect(tmp_path / name).pack
        assert facts is not None and len(facts.parents) <= limits.PARENTS
        assert time.monotonic() - start < 5
    assert not (tmp_path / "out").exists()


def test_a_chain_of_65_parents_is_refused_by_the_reader_too(tmp_path: Path) -> None:
    data = packs.ramp(16, 16).tobytes()
    for n in range(67):
        maker = packs.Maker()
        maker.config()
        place: Any = ["parent"] if n else maker.bytes(data)
        maker.tensor("w", "F32", (16, 16), data, place)
        model = maker.model()
        if n:
            # It says that it is not far from the first one.
            maker.manifest["parent"] = {"depth": 1, "name": f"{n - 1}.apack", "sha256": packs.sha(model)}
        (tmp_path / f"{n}.apack").write_bytes(maker.pack())
    adapterpack.unpack(tmp_path / "64.apack", tmp_path / "good")
    with pytest.raises(AdapterpackError, match="more than 64 packs"):
        adapterpack.unpack(tmp_path / "66.apack", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pack_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.apack")
    (tmp_path / "folder.apack").mkdir()
    (tmp_path / "gone.apack").symlink_to(tmp_path / "nowhere")
    for name in ("fifo.apack", "folder.apack", "gone.apack", "missing.apack"):
        with pytest.raises(AdapterpackError):
            adapterpack.unpack(tmp_path / name, tmp_path / "out")
        with pytest.raises(AdapterpackError):
            adapterpack.inspect(tmp_path / name)


def test_what_a_pack_restores_stays_inside_its_directory(tmp_path: Path) -> None:
    """A folder that is a link beforehand cannot be there: the directory is new."""
    maker = packs.small()
    data = packs.changed(maker, lambda m: m["files"][2].update(path="a/b/c/d/e/f/README.md"))
    (tmp_path / "a.apack").write_bytes(data)
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    for overwrite in (False, True):
        with pytest.raises(AdapterpackError):
            adapterpack.unpack(tmp_path / "a.apack", tmp_path / "out", overwrite=overwrite)
    assert not list((tmp_path / "elsewhere").iterdir())
    adapterpack.unpack(tmp_path / "a.apack", tmp_path / "new")
    assert (tmp_path / "new/a/b/c/d/e/f/README.md").read_bytes() == packs.CARD


def test_a_small_pack_needs_little_memory(tmp_path: Path) -> None:
    (tmp_path / "a.apack").write_bytes(SMALL)
    assert "accepted" in _child(_OPEN, tmp_path / "a.apack")
