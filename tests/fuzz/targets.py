"""Every reader of bytes that come from elsewhere, as a function of those bytes alone.

A target may raise nothing but an `AdapterpackError` with one short line. What it accepts must also keep what the
reader promises: it can be written again, it is read the same way again, it leads nowhere.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from adapterpack import limits, lineage, methods, recipes
from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.codecs import lines
from adapterpack.codecs.chain import _ORDER as STEPS
from adapterpack.codecs.chain import Chain
from adapterpack.containers.apack import file as outer
from adapterpack.containers.apack import layout, manifest, opening, parsing
from adapterpack.containers.apack.reader import Pack
from adapterpack.errors import AdapterpackError, InvalidFile
from adapterpack.io import json as strict_json
from adapterpack.io import paths, safetensors, zstd
from adapterpack.io.files import OpenFile
from adapterpack.tensor import Tensor, from_numpy

FORMATS = Path(__file__).parent.parent.parent / "formats"
_SMALL = 4 << 20
"""What a file may rightly claim takes longer than fuzzing has: beyond it nothing is carried out."""


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        run: What is done with the bytes.
        seeds: Bytes to begin with: good ones and known bad ones.
    """

    run: Callable[[bytes], object]
    seeds: Callable[[], Iterator[bytes]]


def judge(target: Target, data: bytes) -> None:
    """Run a target; only an error that a user can read may come out of it."""
    try:
        target.run(data)
    except AdapterpackError as e:
        text = e.message + (e.hint or "")
        assert "\n" not in text and len(e.message) < 1000, f"a message that is no line: {e.message!r:.200}"
        text.encode()


class Bytes(OpenFile):
    """An open file that lies in memory."""

    def __init__(self, data: bytes, name: str = "input") -> None:
        self.path = Path(name)
        self.data = data
        self.size = len(data)
        self.stamp = (self.size, 0)

    def read(self, start: int, stop: int) -> bytes:
        assert start >= 0 and stop <= self.size, f"bytes {start} to {stop} of {self.size}"
        return self.data[start:stop]

    def check_unchanged(self) -> None:
        pass

    def close(self) -> None:
        pass


def _cases(*formats: str) -> Iterator[Path]:
    for name in formats:
        for kind in ("vectors", "invalid"):
            yield from sorted(p.parent for p in (FORMATS / name / kind).rglob("expect.json"))


def _with_text(data: bytes) -> tuple[bytes, bytes]:
    """Two parts: JSON, which never holds a NUL, and what follows the first one."""
    text, _, rest = data.partition(b"\0")
    return text, rest


# -- safetensors and JSON --------------------------------------------------------------------------------


def _file_of(header: bytes) -> bytes:
    """A file with this header, its length and its data as the header claims them, as far as that is little."""
    ends = [int(n) for n in re.findall(rb"(\d{1,9})\s*\]", header)]
    body = min(max(ends, default=0), 1 << 16)
    return len(header).to_bytes(8, "little") + header + bytes(n % 251 for n in range(body))


def run_header(data: bytes) -> None:
    _read_header(data)


def run_header_text(data: bytes) -> None:
    _read_header(_file_of(data))


def _read_header(data: bytes) -> None:
    import safetensors as library

    header = safetensors.read(Bytes(data))
    # What the library refuses is never accepted, and what both accept is the same.
    theirs = dict(library.deserialize(data))
    assert theirs.keys() == header.tensors.keys()
    start = len(header.raw)
    for name, tensor in header.tensors.items():
        assert tuple(theirs[name]["shape"]) == tensor.shape
        assert bytes(theirs[name]["data"]) == tensor.source.read(0, tensor.nbytes)
        start += tensor.nbytes
    assert start == len(data)
    again = safetensors.header_bytes(header.tensors.items(), header.metadata)
    assert safetensors.read(Bytes(again + data[len(header.raw) :])).tensors.keys() == header.tensors.keys()


def seeds_of_headers() -> Iterator[bytes]:
    for case in _cases("safetensors", "lora", "quantised"):
        for file in case.glob("*model.safetensors"):
            yield file.read_bytes()


def seeds_of_header_texts() -> Iterator[bytes]:
    for data in seeds_of_headers():
        yield data[8 : 8 + min(int.from_bytes(data[:8], "little"), len(data))]


def run_json(data: bytes) -> None:
    value = strict_json.parse(data, "input")
    again = strict_json.parse(strict_json.dump(value), "again")
    assert again == value and list(again) == list(value)
    assert strict_json.parse(manifest.canonical(value), "canonical") == value


def seeds_of_json() -> Iterator[bytes]:
    yield from (b'{"a":[1,-0.5e3,true,null,"\\u00e9\\ud83d\\ude00"]}', b'{"a":' * 40 + b"1" + b"}" * 40)
    for case in _cases("lora", "vera", "peft"):
        for file in case.glob("adapter_config.json"):
            yield file.read_bytes()


def run_recipe(data: bytes) -> None:
    recipe = recipes.from_metadata({recipes.METADATA_KEY: data.decode("utf-8", "replace")})
    assert recipe is not None
    assert recipes.from_metadata({recipes.METADATA_KEY: recipe.to_metadata()}) == recipe
    if recipe.cost <= 10_000 and not recipe.takes_torch:
        recipe.draw()


def seeds_of_recipes() -> Iterator[bytes]:
    for case in _cases("vera"):
        for file in case.glob("adapter_model.safetensors"):
            data = file.read_bytes()
            try:
                text = safetensors.read(Bytes(data)).metadata.get(recipes.METADATA_KEY)
            except InvalidFile:
                continue
            if text is not None:
                yield text.encode()
    yield from map(_recipe, (1, 3))


def _recipe(rows: int) -> bytes:
    draws = (recipes.Uniform("vera_A", (rows, 4), 0.5), recipes.Uniform("vera_B", (8, rows), 0.25))
    drawn = {name: tensor.digest() for name, tensor in recipes.UniformRecipe(rows, draws).draw().items()}
    return recipes.UniformRecipe(rows, draws, digests=drawn).to_metadata().encode()


def run_name(data: bytes) -> None:
    name = paths.plain_name(data.decode("utf-8", "surrogateescape"), "input")
    assert Path(name).name == name and (Path("here") / name).resolve() == (Path("here").resolve() / name)
    assert len(name.encode()) <= 255 and "\0" not in name


def seeds_of_names() -> Iterator[bytes]:
    for name in (
        "a",
        "model-00001-of-00002.safetensors",
        "../a",
        "a/b",
        "CON.txt",
        "ü",
        "a\\b",
        "C:a",
        ".",
        "a ",
        "a*",
    ):
        yield name.encode()


# -- adapters and bases ----------------------------------------------------------------------------------


def _checkpoint(config: bytes, weights: bytes) -> Checkpoint:
    found = strict_json.parse(config, "adapter_config.json")
    if not isinstance(found.get("peft_type"), str):
        raise InvalidFile("no peft_type")
    header = safetensors.read(Bytes(weights))
    return Checkpoint("input", found, header.tensors, header.metadata, config)


def run_adapter(data: bytes) -> None:
    config, header = _with_text(data)
    _parsed(_checkpoint(config, _file_of(header)))


def _parsed(c: Checkpoint) -> None:
    method, adapter = methods.parse(c)
    method.ranks(adapter)
    list(method.findings(adapter, None))
    list(method.recipes(adapter))


def seeds_of_adapters() -> Iterator[bytes]:
    for case in _cases("lora", "vblora", "vera", "peft"):
        for config in case.rglob("adapter_config.json"):
            weights = config.with_name("adapter_model.safetensors")
            if weights.exists():
                data = weights.read_bytes()
                yield config.read_bytes() + b"\0" + data[8 : 8 + int.from_bytes(data[:8], "little")]


@cache
def _directory() -> Path:
    """Where files lie that only a directory can hold; in memory where the system has that."""
    shm = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="adapterpack-fuzz-", dir=shm if shm.is_dir() else None))
    import atexit

    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _base(files: Mapping[str, bytes]) -> None:
    place = _directory()
    for old in place.iterdir():
        old.unlink()
    for name, data in files.items():
        (place / name).write_bytes(data)
    with Base(place) as base:
        _ = base.embedding, base.head, base.tied, base.dtype
        for tensor in base.tensors.values():
            assert tensor.nbytes >= 0
        base.need_weights()
        for tensor in base.tensors.values():
            if tensor.nbytes <= _SMALL:
                assert len(tensor.source.read(0, tensor.nbytes)) == tensor.nbytes


def run_base(data: bytes) -> None:
    """config.json, then model.safetensors."""
    config, weights = _with_text(data)
    _base({"config.json": config, "model.safetensors": weights})


def seeds_of_bases() -> Iterator[bytes]:
    for case in _cases("quantised"):
        if (case / "model.safetensors").exists():
            yield (case / "config.json").read_bytes() + b"\0" + (case / "model.safetensors").read_bytes()


def run_index(data: bytes) -> None:
    """model.safetensors.index.json of a base that has two shards."""
    tensor = b'"dtype":"U8","shape":[1],"data_offsets":[0,1]'
    shards = {f"model-{n}.safetensors": _file_of(b'{"%s":{%s}}' % (b"ab"[n : n + 1], tensor)) for n in (0, 1)}
    _base({**shards, "model.safetensors.index.json": data})


def seeds_of_indices() -> Iterator[bytes]:
    good = {"a": "model-0.safetensors", "b": "model-1.safetensors"}
    for shards in (good, {"a": "../x"}, {"a": "model-0.safetensors"}, {**good, "c": "model-0.safetensors"}, {}):
        yield json.dumps({"metadata": {"total_size": 2}, "weight_map": shards}).encode()


def run_lineage(data: bytes) -> None:
    place = _directory()
    (place / lineage.NAME).write_bytes(data)
    lineage.read(place)


def seeds_of_lineages() -> Iterator[bytes]:
    source = lineage.Source("a", "0" * 64, "1" * 64, 1.0)
    shards = {"model.safetensors": {"size": 1, "header_sha256": "2" * 64}}
    found = lineage.Lineage("base", None, (source,), {}, shards, shards, "1")
    yield lineage.render(found, {}, None)


# -- the pack --------------------------------------------------------------------------------------------


def run_zstd(data: bytes) -> None:
    dictionary = outer.dictionary() if data[:1] == b"\1" else b""
    data = data[1:]
    size = zstd.stated_size(data, "input")
    if size > _SMALL:
        # Refused by its size before this is asked; what is claimed is allocated.
        raise InvalidFile("too large")
    found = zstd.decompress(data, size, "input", dictionary)
    assert len(found) == size
    again = zstd.compress(found, 3, dictionary)
    assert zstd.decompress(again, size, "again", dictionary) == found


def seeds_of_frames() -> Iterator[bytes]:
    rng = random.Random(0)
    for content in (b"", b"a" * 10_000, rng.randbytes(300), b'{"a":1}' * 100):
        for level in (zstd.HUFFMAN, 3, 19):
            yield b"\0" + zstd.compress(content, level)
        yield b"\1" + zstd.compress(content, 19, outer.dictionary())
    yield b"\0" + zstd.compress(b"a", 3) * 2
    yield b"\0\x28\xb5\x2f\xfd\xe0" + (1 << 50).to_bytes(8, "little") + b"\1\0\0"


def run_outer(data: bytes) -> None:
    found = outer.read(Bytes(data))
    assert outer.HEAD_BYTES + found.frames + len(found.digests) < len(data)


def seeds_of_packs() -> Iterator[bytes]:
    for case in _cases("apack"):
        for file in case.glob("*.apack"):
            yield file.read_bytes()
    yield from _packs()


def run_manifest(data: bytes) -> None:
    found = parsing.parse(data, "input")
    assert manifest.dump(found) == data
    layout.account(found, "input", sum(frame.stored for frame in found.frames()))


def seeds_of_manifests() -> Iterator[bytes]:
    for data in seeds_of_packs():
        try:
            yield outer.read(Bytes(data)).manifest
        except AdapterpackError:
            continue


def run_pack(data: bytes) -> None:
    """A manifest, then frames; form, digests, header and seal are made to fit, so that all behind them is reached."""
    text, frames = _with_text(data)
    text = manifest.canonical(strict_json.parse(text, "input"))
    pack = Pack(Bytes(_sealed(text, frames), "input.apack"), parent=_elsewhere, base=_elsewhere)
    m = pack.manifest
    decoded = sum(d for frame in m.frames() for d, _ in frame.segments)
    drawn = sum(recipe.cost for recipe in m.recipes)
    if max(decoded, 4 * drawn, sum(file.size for file in m.files)) > _SMALL:
        raise InvalidFile("too large for here")
    with opening.checkpoint(pack, ExitStack(), opaque=True) as c:
        for name, tensor in c.tensors.items():
            assert len(tensor.source.read(0, tensor.nbytes)) == tensor.nbytes, name
        pack.prove()


def _elsewhere(name: str) -> Tensor:
    found = _parent_tensors()
    if name not in found:
        raise InvalidFile("not there")
    return found[name]


@cache
def _parent_tensors() -> Mapping[str, Tensor]:
    """What the parent and the base have: both are the same here."""
    rng = np.random.default_rng(0)
    names = ("near.weight", "sparse.weight", "equal.weight", "base.weight")
    return {name: from_numpy(rng.standard_normal((16, 64), np.float32)) for name in names}


def _child_tensors() -> dict[str, Tensor]:
    """Something for each place and step."""
    rng = np.random.default_rng(1)
    before = {name: np.frombuffer(t.source.read(0, t.nbytes), "<f4") for name, t in _parent_tensors().items()}
    near = before["near.weight"] * (1 + rng.standard_normal(1024).astype("<f4") * 1e-5)
    sparse = before["sparse.weight"].copy()
    sparse[::100] += 1
    own = rng.standard_normal((16, 64), np.float32)
    made = {
        "near.weight": near.astype("<f4").reshape(16, 64),
        "sparse.weight": sparse.reshape(16, 64),
        "own.weight": own,
        "own_again.weight": own,
        "narrow.weight": (own.view("<u4") & 0xFFFF0000).view("<f4"),
        "half.weight": own.astype("<f2"),
        "numbers.weight": rng.integers(0, 1000, 512),
        "zeros.weight": np.where(rng.random(1024) < 0.02, 3, 0).astype("<i4"),
    }
    found = {name: from_numpy(np.ascontiguousarray(values)) for name, values in made.items()}
    parent = _parent_tensors()
    # `base` is the base's under another name.
    return {**found, "equal.weight": parent["equal.weight"], "copied.weight": parent["base.weight"]}


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        safetensors.write(file, tensors, {})


def _sealed(text: bytes, frames: bytes) -> bytes:
    import hashlib

    digests, at = [], 0
    try:
        for frame in parsing.parse(text, "input").frames():
            digests.append(hashlib.sha256(frames[at : at + frame.stored]).digest())
            at += frame.stored
    except AdapterpackError:
        # It will be refused, and should be by whoever reads it.
        pass
    stored, listed = zstd.compress(text, 1, outer.dictionary()), b"".join(digests)
    header = outer.head(len(frames), len(listed), len(stored))
    return header + frames + listed + stored + outer.seal(header, listed, stored)


def seeds_of_contents() -> Iterator[bytes]:
    for data in seeds_of_packs():
        try:
            found = outer.read(Bytes(data))
        except AdapterpackError:
            continue
        yield found.manifest + b"\0" + data[outer.HEAD_BYTES : outer.HEAD_BYTES + found.frames]


@cache
def _packs() -> tuple[bytes, ...]:
    """Packs of each kind of place and step, made here."""
    import adapterpack

    made = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        _write(place / "parent" / "adapter_model.safetensors", _parent_tensors())
        _write(place / "base" / "model.safetensors", {"base.weight": _parent_tensors()["base.weight"]})
        _write(place / "child" / "adapter_model.safetensors", _child_tensors())
        for name in ("parent", "child"):
            (place / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (place / "child" / "notes.md").write_text("a note\n" * 50)
        child = place / "child"
        jobs = [
            (child, {}),
            (child, {"parent": place / "parent", "base": place / "base"}),
            (FORMATS / "vblora" / "vectors" / "full-256", {}),
            *((case, {}) for case in sorted((FORMATS / "vera" / "vectors").iterdir())[:2]),
            (FORMATS / "lora" / "vectors" / "linear-llama", {}),
            (FORMATS / "lora" / "vectors" / "linear-llama", {"max_error": 0.02}),
        ]
        for n, (source, options) in enumerate(jobs):
            adapterpack.compress(source, place / f"{n}.apack", **options)
            made.append((place / f"{n}.apack").read_bytes())
    return tuple(made)


def run_chain(data: bytes) -> None:
    """Width, steps and size, then segments, each with its length before it; the parent's bytes are fixed."""
    if len(data) < 5:
        return
    width, steps, nbytes = 1 << data[0] % 4, data[1] | data[0] >> 2 << 8, int.from_bytes(data[2:4], "little") % 2048
    chain = Chain(width, tuple(step for n, step in enumerate(STEPS) if steps >> n & 1))
    left, segments = data[4:], []
    while len(left) >= 2 and len(segments) < 20:
        size = int.from_bytes(left[:2], "little")
        segments.append(np.frombuffer(left[2 : 2 + size], np.uint8))
        left = left[2 + size :]
    before = np.arange(nbytes, dtype=np.uint32).astype(np.uint8)
    found = chain.join(segments, nbytes, before)
    assert found.dtype == np.uint8 and found.size == nbytes
    if "narrow" in chain.steps and found[: nbytes - nbytes % 4].view("<u2")[::2].any():
        return
    again = chain.join(chain.split(found.copy(), before), nbytes, before)
    assert np.array_equal(again, found)


def seeds_of_chains() -> Iterator[bytes]:
    rng = random.Random(0)
    for steps in range(1 << len(STEPS)):
        names = tuple(step for n, step in enumerate(STEPS) if steps >> n & 1)
        for power, nbytes in ((0, 5), (1, 64), (2, 66), (3, 128)):
            # Runs are of 256 words at least: here there are two or three.
            nbytes += 1200 if "palette" in names else 0
            raw = np.frombuffer(rng.randbytes(nbytes), np.uint8).copy()
            if "palette" in names:
                raw[::2] &= 1
                raw[1::2] = 60
            if "narrow" in names:
                raw[: nbytes - nbytes % 4].view("<u2")[::2] = 0
            raw[: nbytes // 2 // 8 * 8] = 0
            before = np.arange(nbytes, dtype=np.uint32).astype(np.uint8)
            try:
                segments = Chain(1 << power, names, 256).split(raw, before)
            except InvalidFile:
                continue
            parts = b"".join(s.size.to_bytes(2, "little") + s.tobytes() for s in segments)
            yield bytes([power | steps >> 8 << 2, steps & 255]) + nbytes.to_bytes(2, "little") + parts


def run_lines(data: bytes) -> None:
    """Low bits and the length of the high part, then both parts."""
    if len(data) < 3:
        return
    n, size = data[0], int.from_bytes(data[1:3], "little")
    high, low = data[3 : 3 + size], data[3 + size :]
    codes = lines.join(high, low, n)
    assert codes.dtype == np.int32 and lines.split(codes, n) == (high, low)
    values = lines.Quantised(codes.reshape(1, -1), (5,)).values()
    assert np.isfinite(values).all()


def seeds_of_lines() -> Iterator[bytes]:
    rng = random.Random(0)
    for n in range(lines.MOST_LOW_BITS + 1):
        codes = np.array([rng.randrange(-(1 << n + 6), 1 << n + 6) for _ in range(21)], np.int32)
        high, low = lines.split(codes, n)
        yield bytes([n]) + len(high).to_bytes(2, "little") + high + low


TARGETS: dict[str, Target] = {
    "header": Target(run_header, seeds_of_headers),
    "header-text": Target(run_header_text, seeds_of_header_texts),
    "json": Target(run_json, seeds_of_json),
    "recipe": Target(run_recipe, seeds_of_recipes),
    "name": Target(run_name, seeds_of_names),
    "adapter": Target(run_adapter, seeds_of_adapters),
    "base": Target(run_base, seeds_of_bases),
    "index": Target(run_index, seeds_of_indices),
    "lineage": Target(run_lineage, seeds_of_lineages),
    "zstd": Target(run_zstd, seeds_of_frames),
    "outer": Target(run_outer, seeds_of_packs),
    "manifest": Target(run_manifest, seeds_of_manifests),
    "pack": Target(run_pack, seeds_of_contents),
    "chain": Target(run_chain, seeds_of_chains),
    "lines": Target(run_lines, seeds_of_lines),
}


def keep_patterns_short() -> None:
    """A pattern of a config may run for a second, all of a field for ten: too long for millions of runs."""
    limits.PATTERN_SECONDS = 0.05
