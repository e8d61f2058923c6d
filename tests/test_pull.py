"""`pull`: pinned, only what is needed, every byte proven; hostile repositories and damaged transfers are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
from conftest import Files
from hub.server import LoopbackHub
from huggingface_hub import constants
from peft import LoraConfig

import adapterpack
from adapterpack.errors import (
    AdapterpackError,
    DestinationExists,
    HubError,
    InvalidFile,
    MissingReference,
    PickleRefused,
    UsageError,
)
from adapterpack.pull import pull
from adapterpack.push import push

CLI = [sys.executable, "-m", "adapterpack"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pull") / "lora"
    oracle.make_adapter(path, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    config = Files.config(path) | {"base_model_name_or_path": "org/base"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def _files(path: Path, folder: str = "", **more: bytes) -> dict[str, bytes]:
    """A repository as others make them."""
    found = {f"{folder}{p.name}": p.read_bytes() for p in path.iterdir() if p.is_file()}
    return found | {f"{folder}{name.replace('__', '.')}": data for name, data in more.items()}


def _tree(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# -- what comes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("xet", [True, False])
def test_only_what_is_needed_comes_and_lies_there_as_real_files(
    lora: Path, loopback: LoopbackHub, tmp_path: Path, xet: bool
) -> None:
    loopback.xet = xet
    commit = loopback.create(
        "me/a",
        _files(lora, adapter_model__bin=b"\x80", optimizer__pt=b"\x80", notes__txt=b"n", model__gguf=b"g")
        | {"checkpoint-1/optimizer.pt": b"x", "runs/events": b"x"},
    )
    result = pull("me/a", tmp_path / "out")
    assert _tree(tmp_path / "out") == _files(lora, notes__txt=b"n")
    assert result.commit == commit and result.reference == f"me/a@{commit}" and not result.manifest
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    fetched = [r.path for r in loopback.requests if r.method == "GET" and "/resolve/" in r.path]
    assert not any(p.endswith((".bin", ".pt", ".gguf", "events")) for p in fetched)


def test_a_push_comes_back_held_to_its_manifest(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    pushed = push(lora, "me/a")
    result = pull("me/a", tmp_path / "out")
    assert result.manifest and result.commit == pushed.commit
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (
        loopback.files("me/a")["adapter_model.safetensors"]
    )
    assert adapterpack.verify(lora, tmp_path / "out").equal


@pytest.mark.parametrize("xet", [True, False])
def test_bytes_are_reported_and_nothing_is_printed(
    lora: Path, loopback: LoopbackHub, tmp_path: Path, xet: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    loopback.xet = xet
    loopback.create("me/a", _files(lora))
    seen: list[tuple[str, int, int]] = []
    pull("me/a", tmp_path / "out", progress=lambda *facts: seen.append(facts))
    total = sum(len(data) for data in _files(lora).values())
    assert seen[-1] == ("download", total, total)
    push(lora, "me/b")
    pull("me/b", tmp_path / "b")
    assert capfd.readouterr() == ("", "")


def test_revisions_are_pinned(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    first = loopback.create("me/a", _files(lora))
    loopback.tag("me/a", "v1")
    loopback.branch("me/a", "feature/x")
    second = loopback.commit("me/a", {"notes.txt": b"later"})
    for n, (revision, commit) in enumerate(
        [("v1", first), ("feature%2Fx", first), (first, first), ("main", second), (second, second)]
    ):
        assert pull(f"me/a@{revision}", tmp_path / str(n)).commit == commit
        assert (tmp_path / str(n) / "notes.txt").exists() == (commit == second)


def test_nobody_needs_a_token_to_read(
    lora: Path, loopback: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    loopback.create("me/a", _files(lora))
    pull("me/a", tmp_path / "out")
    assert not any(r.bearer for r in loopback.requests if r.host == "hub")


@pytest.mark.parametrize("token", ["", " ", "a b", "hf_\nx: y", "hf_\u00fc"])
def test_what_cannot_be_a_token_is_refused_unsaid(loopback: LoopbackHub, tmp_path: Path, token: str) -> None:
    with pytest.raises(UsageError) as e:
        pull("me/a", tmp_path / "out", token=token)
    assert not token.strip() or token not in e.value.message


def test_a_repository_that_was_renamed_is_found(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    loopback.create("me/old", _files(lora))
    loopback.rename("me/old", "me/new")
    pull("me/old", tmp_path / "out")
    assert _tree(tmp_path / "out") == _files(lora)


def test_one_of_several(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    loopback.create("me/zoo", _files(lora, "one/") | _files(lora, "deep/two/", notes__txt=b"2"))
    with pytest.raises(UsageError) as e:
        pull("me/zoo", tmp_path / "out")
    assert "one" in str(e.value.hint) and "deep/two" in str(e.value.hint)
    pull("me/zoo/one", tmp_path / "one")
    pull("me/zoo", tmp_path / "two", subfolder="deep/two")
    assert _tree(tmp_path / "one") == _files(lora) and (tmp_path / "two" / "notes.txt").exists()


def test_packs_are_unpacked_or_kept(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    adapterpack.compress(lora, tmp_path / "x.apack")
    data = (tmp_path / "x.apack").read_bytes()
    loopback.create("me/p", {"x.apack": data, "README.md": b"# x\n"})
    result = pull("me/p", tmp_path / "out", expect_sha256=hashlib.sha256(data).hexdigest())
    assert result.unpacked and result.grade == "lossless" and _tree(tmp_path / "out") == _files(lora)
    kept = pull("me/p", tmp_path / "kept.apack")
    assert not kept.unpacked and (tmp_path / "kept.apack").read_bytes() == data
    pull("me/p/x.apack", tmp_path / "named")
    with pytest.raises(InvalidFile, match="not the expected"):
        pull("me/p", tmp_path / "no", expect_sha256="0" * 64)
    with pytest.raises(UsageError, match="no pack"):
        loopback.create("me/a", _files(lora))
        pull("me/a", tmp_path / "a.apack")
    assert not (tmp_path / "no").exists() and not (tmp_path / "a.apack").exists()


def test_parents_of_a_pack_are_fetched(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    adapterpack.compress(lora, tmp_path / "one.apack")
    tensors = Files.tensors(lora)
    key = next(iter(tensors))
    step = Files.edited(lora, tmp_path / "step", {key: tensors[key] + 1e-3})
    adapterpack.compress(step, tmp_path / "two.apack", parent=tmp_path / "one.apack")
    packs = {n: (tmp_path / n).read_bytes() for n in ("one.apack", "two.apack")}
    loopback.create("me/p", packs)
    pull("me/p/two.apack", tmp_path / "out")
    assert _tree(tmp_path / "out") == _tree(step)
    with pytest.raises(UsageError, match="2 adapters"):
        pull("me/p", tmp_path / "no")
    loopback.create("me/q", {"two.apack": packs["two.apack"]})
    with pytest.raises(MissingReference):
        pull("me/q", tmp_path / "no")
    assert not (tmp_path / "no").exists()


# -- proof -------------------------------------------------------------------------------------------------


def test_a_damaged_transfer_is_fetched_again(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    loopback.xet = False
    loopback.create("me/a", _files(lora))
    loopback.faults.corrupt(r"", host="storage", method="GET", at=900)
    loopback.faults.corrupt(r"/resolve/.*/adapter_config\.json", method="GET")
    pull("me/a", tmp_path / "out")
    assert _tree(tmp_path / "out") == _files(lora)


def test_what_is_damaged_again_and_again_is_refused(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    loopback.xet = False
    loopback.create("me/a", _files(lora))
    loopback.faults.corrupt(r"", host="storage", method="GET", at=900, times=None)
    with pytest.raises(InvalidFile, match="other bytes than the commit names"):
        pull("me/a", tmp_path / "out")
    assert list(tmp_path.glob("out*")) == [] and not list(tmp_path.glob(".adapterpack*"))


def test_a_damaged_cache_is_mended(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    loopback.create("me/a", _files(lora))
    pull("me/a", tmp_path / "one")
    blob = next((tmp_path / "cache").rglob("adapter_model.safetensors")).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    pull("me/a", tmp_path / "two")
    assert _tree(tmp_path / "two") == _files(lora)


def test_files_that_changed_since_the_push_are_refused(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    push(lora, "me/a", with_pack=True)
    loopback.commit("me/a", {"README.md": b"# A card may change\n"})
    pull("me/a", tmp_path / "fine")
    weights = bytearray(loopback.files("me/a")["adapter_model.safetensors"])
    weights[-1] ^= 1
    loopback.commit("me/a", {"adapter_model.safetensors": bytes(weights)})
    with pytest.raises(InvalidFile, match="not the file that was pushed"):
        pull("me/a", tmp_path / "out")
    tensors = Files.tensors(lora)
    key = next(iter(tensors))
    adapterpack.compress(Files.edited(lora, tmp_path / "x", {key: tensors[key] * 2}), tmp_path / "other.apack")
    loopback.commit("me/a", {"packed/adapter.apack": (tmp_path / "other.apack").read_bytes()})
    with pytest.raises(InvalidFile, match="not the file that was pushed"):
        pull("me/a/packed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_expected_weights(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    loopback.create("me/a", _files(lora))
    right = hashlib.sha256((lora / "adapter_model.safetensors").read_bytes()).hexdigest()
    pull("me/a", tmp_path / "out", expect_sha256=right.upper())
    with pytest.raises(InvalidFile, match="not the expected"):
        pull("me/a", tmp_path / "no", expect_sha256="f" * 64)


# -- the cache ---------------------------------------------------------------------------------------------


def test_the_cache_serves_and_offline_asks_nobody(
    lora: Path, loopback: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback.create("me/a", _files(lora))
    first = pull("me/a", tmp_path / "one")
    before = len(loopback.requests)
    pull("me/a", tmp_path / "two")
    assert not any("/resolve/" in r.path for r in loopback.requests[before:])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(loopback.requests)
    for n, reference in enumerate(("me/a", f"me/a@{first.commit}", "me/a@main")):
        assert pull(reference, tmp_path / f"off{n}").commit == first.commit
        assert _tree(tmp_path / f"off{n}") == _files(lora)
    with pytest.raises(HubError, match="local Hub cache"):
        pull("me/other", tmp_path / "no")
    with pytest.raises(HubError, match="local Hub cache"):
        pull("me/a@dev", tmp_path / "no")
    assert len(loopback.requests) == before
    blob = next((tmp_path / "cache").rglob("adapter_model.safetensors")).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(HubError, match="damaged"):
        pull("me/a", tmp_path / "no")


def test_nothing_is_written_through_the_links_of_the_cache(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    loopback.create("me/a", _files(lora))
    pull("me/a", tmp_path / "one")
    snapshot = next((tmp_path / "cache").glob("models--*/snapshots/*"))
    copy = tmp_path / "links"
    shutil.copytree(snapshot, copy, symlinks=True)
    before = _tree(tmp_path / "cache")
    for target in (snapshot, snapshot / "new", snapshot.parent / "new", snapshot.parent.parent / "blobs" / "x"):
        with pytest.raises(AdapterpackError):
            pull("me/a", target, overwrite=True)
        with pytest.raises(AdapterpackError):
            adapterpack.convert(lora, target, dtype="float32", overwrite=True)
    pull("me/a", copy, overwrite=True)
    assert _tree(tmp_path / "cache") == before and not any(p.is_symlink() for p in copy.iterdir())


# -- hostile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "a/../../evil.json", "aux.json", "x:y.json", "nul.txt", "a\\b.json", "sp .json/x", ".json "],
)
def test_hostile_names_write_nothing(lora: Path, loopback: LoopbackHub, tmp_path: Path, name: str) -> None:
    loopback.create("me/a", _files(lora) | {name: b"{}"})
    out = tmp_path / "deep" / "out"
    out.parent.mkdir()
    try:
        pull("me/a", out)
    except AdapterpackError as e:
        assert "\n" not in e.message
    written = {p.name for p in (tmp_path / "deep").rglob("*") if p.is_file()}
    assert written <= set(_files(lora)), "only what every system can write"
    assert not list(tmp_path.glob("evil*")) and not list(tmp_path.glob("*/evil*"))


def test_names_that_differ_in_case_alone_are_refused(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    loopback.create("me/a", _files(lora, notes__txt=b"a", Notes__txt=b"b"))
    with pytest.raises(InvalidFile, match="case"):
        pull("me/a", tmp_path / "out")


def test_a_pickle_is_not_even_fetched(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    files = _files(lora, adapter_model__bin=b"\x80\x04.")
    del files["adapter_model.safetensors"]
    loopback.create("me/a", files)
    for call in (lambda: pull("me/a", tmp_path / "out"), lambda: adapterpack.inspect("me/a")):
        with pytest.raises(PickleRefused):
            call()
    assert not any("adapter_model.bin" in r.target for r in loopback.requests)


@pytest.mark.parametrize(
    "manifest", [b"{", b"{}", b'{"schema":"adapterpack.manifest/1","files":{"a":{"size":-1}}}', b"[]", b"\xff"]
)
def test_a_manifest_that_makes_no_sense_is_an_error(
    lora: Path, loopback: LoopbackHub, tmp_path: Path, manifest: bytes
) -> None:
    loopback.create("me/a", _files(lora) | {"adapterpack_manifest.json": manifest})
    with pytest.raises(InvalidFile):
        pull("me/a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- failure -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        lambda f: f.status(503, r"/api/models/me/a"),
        lambda f: f.hang_up(r"/tree/"),
        lambda f: f.status(500, r"/resolve/", method="GET"),
        lambda f: f.drop(40, r"/resolve/.*adapter_config", method="GET"),
        lambda f: f.drop(900, r"", host="storage", method="GET"),
        lambda f: f.rate_limit(1, r"/resolve/"),
    ],
)
def test_faults_on_the_way_are_survived(
    lora: Path, loopback: LoopbackHub, tmp_path: Path, fault: Callable[[Any], object]
) -> None:
    loopback.xet = False
    loopback.create("me/a", _files(lora))
    fault(loopback.faults)
    pull("me/a", tmp_path / "out")
    assert _tree(tmp_path / "out") == _files(lora)


def test_a_dropped_download_goes_on_where_it_was(
    loopback: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the client takes at a time: 10 MB, more than this file has.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)
    big = tmp_path / "big"
    oracle.make_adapter(big, LoraConfig(r=64, target_modules=["q_proj", "down_proj", "k_proj", "up_proj"]))
    loopback.xet = False
    loopback.create("me/a", _files(big))
    size = (big / "adapter_model.safetensors").stat().st_size
    loopback.faults.drop(size // 2, r"", host="storage", method="GET")
    pull("me/a", tmp_path / "out")
    second = [r for r in loopback.requests if r.host == "storage"][-1]
    assert second.range is not None and second.sent < size


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("me/none", "no such repository on the Hub"),
        ("me/a@none", "no such branch"),
        ("me/a/none", "is no adapter"),
        ("me/private", "no such repository on the Hub"),
        ("me/gated", "gated"),
    ],
)
def test_what_is_not_there_is_one_clear_line(
    lora: Path, loopback: LoopbackHub, tmp_path: Path, reference: str, message: str
) -> None:
    loopback.create("me/a", _files(lora))
    loopback.create("me/private", _files(lora), private=True)
    loopback.create("me/gated", _files(lora), gated=True)
    with pytest.raises(AdapterpackError, match=message) as e:
        pull(reference, tmp_path / "out", token=loopback.outsider_token)
    assert "\n" not in e.value.message and (e.value.hint or "is no adapter" in e.value.message)
    assert not (tmp_path / "out").exists()


def test_a_destination_that_is_there_is_refused_before_anything_is_asked(
    lora: Path, loopback: LoopbackHub, tmp_path: Path
) -> None:
    loopback.create("me/a", _files(lora))
    (tmp_path / "out").mkdir()
    with pytest.raises(DestinationExists):
        pull("me/a", tmp_path / "out")
    assert not loopback.requests
    pull("me/a", tmp_path / "out", overwrite=True)


def test_the_command_line(lora: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        env = loopback.child_env(HF_TOKEN=loopback.token)
        return subprocess.run([*CLI, *map(str, args)], env=env, capture_output=True, text=True, check=False)

    done = run("push", lora, "me/a", "--json")
    pushed = json.loads(done.stdout)
    assert pushed["schema"] == "adapterpack.push/1" and pushed["commit"] and pushed["files"]
    done = run("pull", "me/a", tmp_path / "out", "--revision", pushed["commit"], "--json")
    assert json.loads(done.stdout)["commit"] == pushed["commit"], done.stderr
    assert run("pull", "me/a", tmp_path / "quiet", "-q").stdout.strip() == str(tmp_path / "quiet")
    assert run("verify", "me/a", tmp_path / "out").returncode == 0
    done = run("pull", "me/none", tmp_path / "no")
    assert done.returncode == 1 and done.stderr.count("\n") == 2
    assert done.stderr.startswith("error: ") and "\nhint: " in done.stderr
    done = run("inspect", "me/none")
    assert "no such file or directory, and no such repository" in done.stderr
    assert run("pull", "name", tmp_path / "no").returncode == 2
    done = run("inspect", lora, "--revision", "v1")
    assert done.returncode == 2 and "local path" in done.stderr
    assert run("inspect", "me/a", "--revision", pushed["commit"]).returncode == 0
    assert "no such branch" in run("check", "me/a", "--revision", "none").stderr
