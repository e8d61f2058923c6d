"""Sources and bases on the Hub: headers by range, counted; values only when they are needed, and then proven."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import Files
from hub.exchange import Reply
from hub.server import LoopbackHub
from huggingface_hub import constants
from peft import LoraConfig, VBLoRAConfig, VeraConfig
from safetensors.torch import save_file

import adapterpack
from adapterpack.check import check
from adapterpack.errors import AdapterpackError, HubError, InvalidFile, UsageError
from adapterpack.hub import remote
from adapterpack.inspect import inspect

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    oracle.save_base(oracle.tiny_model("llama"), root / "base", "60KB")
    targets = ["q_proj", "down_proj"]
    oracle.make_adapter(root / "lora", LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    vb = {"r": 4, "num_vectors": 40, "vector_length": 16, "target_modules": targets}
    oracle.make_adapter(root / "vblora", VBLoRAConfig(**vb), scale=1.0)
    oracle.make_adapter(root / "vera", VeraConfig(r=4, target_modules=targets))
    return root


def _upload(hub: LoopbackHub, repo: str, path: Path, **more: bytes) -> str:
    files = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return hub.create(repo, files | {name.replace("__", "."): data for name, data in more.items()})


def _sent(hub: LoopbackHub, since: int = 0) -> int:
    return sum(r.sent for r in hub.requests[since:])


def _weights(hub: LoopbackHub) -> list[Any]:
    """Requests for all of a weight file."""
    wanted = [r for r in hub.requests if r.method == "GET" and r.status == 200]
    return [r for r in wanted if r.path.endswith(".safetensors") or r.host == "storage"]


# -- headers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("xet", [True, False])
@pytest.mark.parametrize("name", ["lora", "vblora", "vera"])
def test_inspect_says_the_same_as_of_a_local_copy(place: Path, loopback: LoopbackHub, name: str, xet: bool) -> None:
    loopback.xet = xet
    _upload(loopback, "me/a", place / name, filler__txt=bytes(300_000))
    local, remote = inspect(place / name), inspect("me/a")
    for field in ("method", "encoding", "modules", "tensors", "ranks", "dtypes", "parts"):
        assert getattr(local, field) == getattr(remote, field)
    assert not _weights(loopback) or _sent(loopback) < 100_000


def _header(tensors: dict[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """The beginning of a BF16 safetensors file, and the size of all of it."""
    entries, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def test_a_huge_base_costs_a_few_hundred_kilobytes(place: Path, loopback: LoopbackHub) -> None:
    """100 GB in 20 shards, holes but for their headers; every byte that goes out is counted."""
    loopback.create("org/huge", {"config.json": (place / "base" / "config.json").read_bytes()})
    config = json.loads((place / "base" / "config.json").read_text())
    wide, deep = config["hidden_size"], config["intermediate_size"]
    q, down = "self_attn.q_proj.weight", "mlp.down_proj.weight"
    names, total = {}, 0
    for n in range(20):
        tensors = {f"model.layers.{n}.filler{i}.weight": (9600, 8192) for i in range(32)}
        tensors |= {f"model.layers.{n}.{q}": (wide, wide), f"model.layers.{n}.{down}": (wide, deep)}
        beginning, size = _header(tensors)
        file, total = f"model-{n + 1:05}-of-00020.safetensors", total + size
        loopback.commit_hole("org/huge", file, beginning, size)
        names |= dict.fromkeys(tensors, file)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": names}).encode()
    loopback.commit("org/huge", {"model.safetensors.index.json": index})
    result = inspect(place / "lora", base="org/huge")
    assert "has all" in result.notes[-1]
    assert total > 100e9 and loopback.sent() < 500_000
    assert len([r for r in loopback.requests if r.path.endswith(".safetensors") and r.range]) == 20
    before = loopback.sent()
    assert check(place / "lora", base="org/huge").healthy
    assert loopback.sent() - before < 500_000


def test_shapes_of_a_base_on_the_hub(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    _upload(loopback, "org/base", place / "base")
    adapterpack.convert(place / "vera", tmp_path / "there", to="lora", base="org/base")
    adapterpack.convert(place / "vera", tmp_path / "here", to="lora", base=place / "base")
    a, b = (Files.tensors(tmp_path / n) for n in ("there", "here"))
    assert a.keys() == b.keys() and all(Files.same(a[k], b[k]) for k in a)
    assert not [r for r in _weights(loopback) if r.range is None]
    assert check(place / "lora", base="org/base").healthy
    wide = {Q: torch.zeros(8, 8)}
    save_file(wide, tmp_path / "model.safetensors", {"format": "pt"})
    loopback.create("org/other", {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
    assert not check(place / "lora", base="org/other").healthy


def test_check_needs_no_values_and_says_so(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    tensors = Files.tensors(place / "lora")
    key = next(iter(tensors))
    bad = Files.edited(place / "lora", tmp_path / "bad", {key: torch.full_like(tensors[key], torch.nan)})
    _upload(loopback, "me/nan", bad)
    health = check("me/nan")
    assert health.healthy and "--fetch" in health.notes[0]
    assert not check("me/nan", fetch=True).healthy
    half = Files.edited(place / "lora", tmp_path / "half", {key: None})
    _upload(loopback, "me/half", half)
    before = len(loopback.requests)
    local, remote = check(half), check("me/half")
    assert not remote.healthy and {f.code for f in remote.findings} == {f.code for f in local.findings}
    assert not [r for r in loopback.requests[before:] if r.path.endswith(".safetensors") and not r.range]


@pytest.mark.parametrize("name", ["lora", "vblora", "vera"])
def test_value_free_checks_read_no_values(place: Path, loopback: LoopbackHub, tmp_path: Path, name: str) -> None:
    small = tmp_path / "small"
    adapterpack.compress(place / name, small)
    _upload(loopback, "me/a", small)
    assert check("me/a").healthy and check("me/a", engine="vllm") is not None
    assert not [r for r in loopback.requests if r.path.endswith(".safetensors") and r.method == "GET" and not r.range]


def test_a_pack_tells_what_it_is_from_its_two_ends(loopback: LoopbackHub, tmp_path: Path) -> None:
    big = tmp_path / "big"
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "up_proj", "gate_proj"]
    oracle.make_adapter(big, LoraConfig(r=64, target_modules=targets))
    adapterpack.compress(big, tmp_path / "x.apack")
    size = (tmp_path / "x.apack").stat().st_size
    loopback.create("me/p", {"deep/x.apack": (tmp_path / "x.apack").read_bytes()})
    result = inspect("me/p/deep")
    assert result.pack is not None and result.pack.bytes == size and result.modules == inspect(big).modules
    assert inspect("hf://me/p/deep/x.apack").pack == result.pack
    assert _sent(loopback) < size / 2
    assert check("me/p/deep").healthy


def test_servers_without_ranges_are_found_out(
    place: Path, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lambda request, size, read, headers: Reply(200, read(0, size), dict(headers))  # noqa: E731
    monkeypatch.setattr("hub.reading.ranged", whole)
    monkeypatch.setattr("hub.storage.ranged", whole)
    monkeypatch.setattr(remote, "_FIRST", 64)
    _upload(loopback, "me/a", place / "lora")
    with pytest.raises(HubError, match="does not give parts"):
        inspect("me/a")


def test_a_long_header_takes_two_requests(
    loopback: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = tmp_path / "big"
    oracle.make_adapter(big, LoraConfig(r=64, target_modules=["q_proj", "k_proj", "down_proj"]))
    _upload(loopback, "me/a", big)
    monkeypatch.setattr(remote, "_FIRST", 64)
    inspect("me/a")
    assert len([r for r in loopback.requests if r.path.endswith(".safetensors") and r.range]) >= 2


@pytest.mark.parametrize("damage", ["length", "json", "short"])
def test_a_malformed_header_there_is_the_same_error(
    place: Path, loopback: LoopbackHub, tmp_path: Path, damage: str
) -> None:
    data = bytearray((place / "lora" / "adapter_model.safetensors").read_bytes())
    if damage == "length":
        data[:8] = (1 << 60).to_bytes(8, "little")
    elif damage == "json":
        data[8:12] = b"xxxx"
    else:
        data = data[:-4]
    config = (place / "lora" / "adapter_config.json").read_bytes()
    loopback.create("me/a", {"adapter_config.json": config, "adapter_model.safetensors": bytes(data)})
    with pytest.raises(InvalidFile, match=r"valid safetensors file|header of"):
        inspect("me/a")
    assert _sent(loopback) < 100_000


def test_a_dropped_range_is_asked_for_again(place: Path, loopback: LoopbackHub) -> None:
    _upload(loopback, "me/a", place / "lora")
    loopback.faults.drop(100, r"", host="storage", method="GET")
    loopback.faults.status(503, r"/resolve/.*safetensors", method="GET")
    assert inspect("me/a").modules == inspect(place / "lora").modules


# -- values ------------------------------------------------------------------------------------------------


def test_every_verb_reads_references(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    _upload(loopback, "me/lora", place / "lora")
    _upload(loopback, "me/vb", place / "vblora")
    adapterpack.convert("me/vb", tmp_path / "a", to="lora")
    adapterpack.compress("me/vb", tmp_path / "b")
    adapterpack.compress("me/lora@main", tmp_path / "c.apack")
    adapterpack.resize("me/lora", tmp_path / "d", rank=2)
    adapterpack.combine(["me/lora", str(tmp_path / "a")], tmp_path / "e")
    assert adapterpack.verify("me/lora", tmp_path / "c.apack").equal
    assert adapterpack.verify(tmp_path / "c.apack", "me/lora").equal
    loopback.create("me/p", {"c.apack": (tmp_path / "c.apack").read_bytes()})
    assert adapterpack.verify("me/p", "me/lora").equal
    adapterpack.unpack("hf://me/p/c.apack", tmp_path / "f")
    assert Files.config(tmp_path / "f") == Files.config(place / "lora")


def test_merge_into_a_base_on_the_hub(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    commit = _upload(
        loopback, "org/base", place / "base", consolidated__safetensors=b"x" * 99, pytorch_model__bin=b"\x80"
    )
    _upload(loopback, "me/lora", place / "lora")
    adapterpack.merge("me/lora", "org/base", tmp_path / "there")
    adapterpack.merge(place / "lora", place / "base", tmp_path / "here")
    a, b = (Files.tensors(tmp_path / n) for n in ("there", "here"))
    assert a.keys() == b.keys() and all(Files.same(a[k], b[k]) for k in a)
    assert not any("consolidated" in r.target or "pytorch_model" in r.target for r in loopback.requests)
    lineage = json.loads((tmp_path / "there" / "adapterpack_lineage.json").read_text())
    assert lineage["base"]["reference"] == "org/base" and lineage["base"]["commit"] == commit
    assert not any(p.is_symlink() for p in (tmp_path / "there").rglob("*"))
    before = len(loopback.requests)
    assert adapterpack.verify("me/lora", tmp_path / "there").equal, "the base is found in the cache"
    assert not [r for r in loopback.requests[before:] if "org/base" in r.path]
    assert adapterpack.verify(place / "lora", tmp_path / "there", base="org/base").equal


def test_merge_takes_what_is_in_the_cache(
    place: Path, loopback: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _upload(loopback, "org/base", place / "base")
    adapterpack.merge(place / "lora", "org/base", tmp_path / "one")
    before = len(loopback.requests)
    adapterpack.merge(place / "lora", "org/base", tmp_path / "two")
    assert not [r for r in loopback.requests[before:] if r.path.endswith(".safetensors")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(loopback.requests)
    adapterpack.merge(place / "lora", "org/base", tmp_path / "three")
    assert len(loopback.requests) == before
    snapshot = next((tmp_path / "cache").glob("models--org--base/snapshots/*"))
    shards = {p.name: p.read_bytes() for p in snapshot.iterdir()}
    for target in (snapshot, snapshot / "x"):
        with pytest.raises(UsageError):
            adapterpack.merge(place / "lora", "org/base", target, overwrite=True)
    copy = tmp_path / "links"
    shutil.copytree(snapshot, copy, symlinks=True)
    adapterpack.merge(place / "lora", "org/base", copy, overwrite=True)
    assert {p.name: p.read_bytes() for p in snapshot.iterdir()} == shards


def test_a_damaged_shard_is_fetched_again(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    loopback.xet = False
    _upload(loopback, "org/base", place / "base")
    loopback.faults.corrupt(r"", host="storage", method="GET", at=-8)
    adapterpack.merge(place / "lora", "org/base", tmp_path / "there")
    adapterpack.merge(place / "lora", place / "base", tmp_path / "here")
    a, b = (Files.tensors(tmp_path / n) for n in ("there", "here"))
    assert all(Files.same(a[k], b[k]) for k in a)


def test_extract_from_two_models_on_the_hub(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    _upload(loopback, "org/base", place / "base")
    adapterpack.merge(place / "lora", "org/base", tmp_path / "tuned")
    _upload(loopback, "org/tuned", tmp_path / "tuned")
    assert adapterpack.verify(place / "lora", "org/tuned", base="org/base").equal
    adapterpack.extract("hf://org/base@main", "org/tuned", tmp_path / "back", rank=4)
    assert adapterpack.verify(place / "lora", tmp_path / "back", max_error=1e-4).equal
    assert Files.config(tmp_path / "back")["base_model_name_or_path"] == "org/base"


def test_nothing_is_downloaded_unless_it_was_named(
    place: Path, loopback: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _upload(loopback, "org/base", place / "base")
    own = Files.edited(place / "vera", tmp_path / "own", config={"base_model_name_or_path": "org/base"})
    with pytest.raises(AdapterpackError):
        adapterpack.convert(own, tmp_path / "x", to="lora")
    assert check(own).healthy and not loopback.requests


def test_both_are_named_when_neither_is_there(
    loopback: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: inspect("me/none"),
        lambda: adapterpack.convert("me/none", "x", dtype="float32"),
        lambda: adapterpack.merge("me/none", "org/none", "x"),
    ):
        with pytest.raises(HubError, match="no such file or directory, and no such repository on the Hub"):
            call()
    with pytest.raises(InvalidFile, match="no such file or directory"):
        inspect("./me/none")
    with pytest.raises(HubError) as e:
        inspect("hf://me/none")
    assert "no such file" not in e.value.message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="no such file or directory, and no such repository in the local Hub cache"):
        inspect("me/none")
