"""`push`: one commit, checked before, with a card that is true; faults are survived, or said in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import yaml
from conftest import Files
from hub.server import LoopbackHub
from huggingface_hub import constants
from peft import LoraConfig, VBLoRAConfig, VeraConfig

import adapterpack
from adapterpack.errors import AdapterpackError, HubError, InvalidFile, Unhealthy, Unsupported, UsageError
from adapterpack.push import push

CLI = [sys.executable, "-m", "adapterpack"]
BASE = "org/base"
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("push")
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", base_model_name_or_path=BASE)
    oracle.make_adapter(root / "lora", lora)
    vb = {"r": 4, "num_vectors": 40, "vector_length": 16, "target_modules": TARGETS}
    oracle.make_adapter(root / "vblora", VBLoRAConfig(**vb), scale=1.0)
    oracle.make_adapter(root / "vera", VeraConfig(r=4, target_modules=TARGETS))
    for made in ("lora", "vblora", "vera"):
        config = Files.config(root / made)
        (root / made / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": BASE}))
    return root


def _copy(source: Path, destination: Path, **files: str) -> Path:
    made = Files.edited(source, destination)
    for name, text in files.items():
        (made / name.replace("__", ".")).write_text(text)
    return made


def _front(hub: LoopbackHub, repo: str, path: str = "README.md") -> dict[str, Any]:
    return dict(yaml.safe_load(hub.files(repo)[path].decode().split("---\n")[1]))


# -- what is pushed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("xet", [True, False])
def test_one_commit_with_the_compact_form_a_card_and_a_manifest(
    place: Path, loopback: LoopbackHub, xet: bool, tmp_path: Path
) -> None:
    loopback.xet = xet
    result = push(place / "vblora", "me/new", private=True, license="mit")
    assert result.created and result.changed and result.encoding == "topk"
    commits = loopback.commits("me/new")
    assert [c.oid for c in commits][:-1] == [result.commit], "one commit on top of the Hub's own"
    files = loopback.files("me/new")
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "adapterpack_manifest.json"}
    assert set(files) - {".gitattributes"} == names
    assert loopback.repo("me/new").private
    adapterpack.compress(place / "vblora", tmp_path / "small")
    assert files["adapter_model.safetensors"] == (tmp_path / "small" / "adapter_model.safetensors").read_bytes()
    assert {f.path for f in result.files} == names
    assert bool(loopback.asked("POST", "/v1/xorbs")) == xet


def test_the_card_says_what_the_hub_wants_to_know(place: Path, loopback: LoopbackHub) -> None:
    result = push(place / "lora", "me/a", license="apache-2.0")
    front = _front(loopback, "me/a")
    assert front["library_name"] == "peft" and front["base_model"] == BASE
    assert front["base_model_relation"] == "adapter" and front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "text-generation"
    assert {"lora", "adapterpack", f"base_model:adapter:{BASE}"} <= set(front["tags"])
    body = loopback.files("me/a")["README.md"].decode()
    assert 'PeftModel.from_pretrained(base, "me/a")' in body and "vllm serve org/base" in body
    assert "adapterpack pull me/a" in body and "rank 4" in body
    weights = next(f for f in result.files if f.path.endswith(".safetensors"))
    assert weights.sha256 in body


def test_what_the_user_wrote_is_kept(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    loopback.create("me/a", {"README.md": b"---\nlicense: mit\nlanguage: [de]   # mine\nmy_key: 1\n---\n# Mine\n"})
    push(place / "lora", "me/a")
    text = loopback.files("me/a")["README.md"].decode()
    assert "language: [de]   # mine\n" in text and "# Mine" in text and "license: mit" in text
    again = push(place / "lora", "me/a")
    assert loopback.files("me/a")["README.md"].decode() == text
    assert not again.changed and len(loopback.commits("me/a")) == 3
    own = _copy(place / "lora", tmp_path / "own", README__md="---\npipeline_tag: other\n---\n# Own\n")
    push(own, "me/a")
    front, text = _front(loopback, "me/a"), loopback.files("me/a")["README.md"].decode()
    assert front["license"] == "mit" and front["my_key"] == 1 and front["pipeline_tag"] == "other"
    assert "# Own" in text and "# Mine" not in text
    empty = _copy(place / "lora", tmp_path / "empty", README__md="# Model\n\n[More Information Needed]\n")
    push(empty, "me/a")
    assert "# Own" in loopback.files("me/a")["README.md"].decode()


@pytest.mark.parametrize("said", ["", "/home/u/models/base", "./base", "~/base", "a/b/c", "C:\\base", None])
def test_a_local_base_is_refused_and_base_model_mends_it(
    place: Path, loopback: LoopbackHub, tmp_path: Path, said: str | None
) -> None:
    bad = Files.edited(place / "lora", tmp_path / "bad", config={"base_model_name_or_path": said})
    with pytest.raises(UsageError) as e:
        push(bad, "me/a")
    assert "--base-model" in str(e.value.hint) and not loopback.requests
    push(bad, "me/a", base_model="org/right@" + "a" * 40, with_pack=True)
    config = json.loads(loopback.files("me/a")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/right" and config["revision"] == "a" * 40
    assert "a" * 40 in loopback.files("me/a")["README.md"].decode()
    leaked = [n for n, data in loopback.files("me/a").items() if said and len(said) > 6 and said.encode() in data]
    assert not leaked


def test_a_base_in_the_cache_is_known_by_its_commit(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    commit = "b" * 40
    cached = tmp_path / "cache" / "models--org--base" / "snapshots" / commit
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    bad = Files.edited(place / "lora", tmp_path / "bad", config={"base_model_name_or_path": str(cached)})
    with pytest.raises(UsageError) as e:
        push(bad, "me/a")
    assert "--base-model org/base" in str(e.value.hint)
    push(bad, "me/a", base_model="org/base")
    assert commit in loopback.files("me/a")["README.md"].decode()


def test_the_pack_beside_or_alone(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    push(place / "vblora", "me/both", with_pack=True)
    assert "packed/adapter.apack" in loopback.files("me/both")
    push(place / "vblora", "me/alone", pack_only=True)
    files = loopback.files("me/alone")
    assert set(files) == {".gitattributes", "README.md", "adapter.apack", "adapterpack_manifest.json"}
    assert _front(loopback, "me/alone")["library_name"] == "adapterpack"
    assert "adapterpack pull me/alone adapter" in files["README.md"].decode()
    adapterpack.pull("me/alone", tmp_path / "back")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (place / "vblora" / name).read_bytes()


def test_a_push_replaces_the_one_before(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    push(place / "lora", "me/a", with_pack=True)
    loopback.commit("me/a", {"theirs.txt": b"stays"})
    alone = push(place / "vera", "me/a", pack_only=True)
    gone = {"adapter_config.json", "adapter_model.safetensors", "packed/adapter.apack"}
    assert set(alone.removed) == gone
    assert set(loopback.files("me/a")) == {
        *(".gitattributes", "README.md", "adapter.apack", "adapterpack_manifest.json", "theirs.txt")
    }
    assert adapterpack.inspect("me/a").method == "vera"
    assert push(place / "lora", "me/a").removed == ("adapter.apack",)
    adapterpack.pull("me/a", tmp_path / "out")
    assert adapterpack.inspect(tmp_path / "out").method == "lora"
    loopback.create("me/b", {"adapter_config.json": b"{}"})
    with pytest.raises(UsageError, match="in place of the pack"):
        push(place / "lora", "me/b", pack_only=True)


def test_many_adapters_in_one_repository(place: Path, loopback: LoopbackHub) -> None:
    push(place / "lora", "me/zoo", path_in_repo="first")
    push(place / "vera", "me/zoo", path_in_repo="second", base_model="org/other")
    push(place / "lora", "me/zoo", path_in_repo="first", license="mit")
    files = loopback.files("me/zoo")
    assert {"first/adapter_config.json", "second/adapter_model.safetensors", "first/README.md"} <= set(files)
    text, front = files["README.md"].decode(), _front(loopback, "me/zoo")
    assert text.count("[first](first)") == 1 and text.count("[second](second)") == 1
    assert front["base_model"] == [BASE, "org/other"] and front["license"] == "mit"
    assert 'subfolder="first"' in files["first/README.md"].decode()


def test_only_what_is_meant_for_all_is_pushed(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    full = _copy(
        place / "lora", tmp_path / "full", notes__txt="private", trainer_state__json="{}", tokenizer__json="{}"
    )
    (full / "training_args.bin").write_bytes(b"\x80")
    (full / "optimizer.pt").write_bytes(b"\x80")
    result = push(full, "me/a", with_pack=True)
    assert "tokenizer.json" in loopback.files("me/a")
    assert {"notes.txt", "training_args.bin", "optimizer.pt", "trainer_state.json"} <= set(result.left_out)
    adapterpack.pull("me/a/packed", tmp_path / "back")
    assert {p.name for p in (tmp_path / "back").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
    }
    push(full, "me/a", include=("notes.*",))
    assert loopback.files("me/a")["notes.txt"] == b"private"


def test_links_do_not_leave_the_folder(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    made = _copy(place / "lora", tmp_path / "made")
    (tmp_path / "secret").write_text("secret")
    (made / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidFile, match="leads out"):
        push(made, "me/a")
    assert not loopback.requests
    (made / "LICENSE").unlink()
    (made / "NOTICE").write_text("inside")
    (made / "LICENSE").symlink_to("NOTICE")
    push(made, "me/a")
    assert loopback.files("me/a")["LICENSE"] == b"inside"


def test_an_adapter_of_a_repository_goes_to_another(place: Path, loopback: LoopbackHub) -> None:
    push(place / "lora", "me/a")
    push("me/a", "me/b")
    a, b = loopback.files("me/a"), loopback.files("me/b")
    assert a["adapter_model.safetensors"] == b["adapter_model.safetensors"]


def test_dry_run_asks_nobody(place: Path, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    plan = push(place / "vblora", "me/a", dry_run=True, with_pack=True)
    assert not loopback.requests and not loopback.exists("me/a")
    assert plan.commit is None and not plan.changed
    monkeypatch.setenv("HF_TOKEN", loopback.token)
    done = push(place / "vblora", "me/a", with_pack=True)
    assert plan.files == done.files


def test_branches_and_pull_requests(place: Path, loopback: LoopbackHub) -> None:
    loopback.create("me/a", {"x.txt": b"x"})
    push(place / "lora", "me/a", revision="dev")
    assert "adapter_config.json" in loopback.files("me/a", "dev")
    assert "adapter_config.json" not in loopback.files("me/a")
    result = push(place / "lora", "me/a", create_pr=True)
    assert result.pull_request and len(loopback.pulls("me/a")) == 1
    assert "adapter_config.json" not in loopback.files("me/a")


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_unhealthy_adapters_are_refused(place: Path, loopback: LoopbackHub, tmp_path: Path, value: float) -> None:
    tensors = Files.tensors(place / "lora")
    key = next(k for k in tensors if "lora_B" in k)
    bad = Files.edited(place / "lora", tmp_path / "bad", {key: torch.full_like(tensors[key], value)})
    with pytest.raises(Unhealthy, match=re.escape(key)):
        push(bad, "me/a")
    assert not loopback.requests


def test_empty_adapters_are_refused(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    empty = Files.edited(place / "lora", tmp_path / "bad", dict.fromkeys(Files.tensors(place / "lora")))
    with pytest.raises(AdapterpackError):
        push(empty, "me/a")
    assert not loopback.requests


def test_packs_that_need_others_are_refused_unless_told(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    adapterpack.compress(place / "lora", tmp_path / "one.apack")
    tensors = Files.tensors(place / "lora")
    key = next(iter(tensors))
    step = Files.edited(place / "lora", tmp_path / "step", {key: tensors[key] + 1e-3})
    adapterpack.compress(step, tmp_path / "two.apack", parent=tmp_path / "one.apack")
    with pytest.raises(Unsupported, match=r"without one\.apack"):
        push(tmp_path / "two.apack", "me/a", pack_only=True)
    assert not loopback.requests
    push(tmp_path / "two.apack", "me/a", pack_only=True, allow_references=True)
    push(tmp_path / "two.apack", "me/b")
    assert "adapter_model.safetensors" in loopback.files("me/b")


def test_what_a_pack_had_lost_is_said(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    adapterpack.compress(place / "lora", tmp_path / "q.apack", max_error=0.05)
    for how in ({}, {"pack_only": True}):
        result = push(tmp_path / "q.apack", "me/q", **how)
        assert result.grade == "approximate" and 0 < result.max_rel_error <= 0.05
        assert "(approximate)" in loopback.files("me/q")["README.md"].decode()


def test_a_pack_that_holds_more_says_so(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    full = _copy(place / "lora", tmp_path / "full", notes__txt="private")
    adapterpack.compress(full, tmp_path / "x.apack")
    result = push(tmp_path / "x.apack", "me/a", pack_only=True)
    assert "notes.txt" in result.notes[0] and not result.left_out
    assert push(tmp_path / "x.apack", "me/b").left_out == ("notes.txt",)


@pytest.mark.parametrize(
    "how", [{"path_in_repo": "../x"}, {"path_in_repo": ".git"}, {"with_pack": True, "pack_only": True}]
)
@pytest.mark.parametrize("repo", ["me/a"])
def test_wrong_calls(place: Path, loopback: LoopbackHub, how: dict[str, Any], repo: str) -> None:
    with pytest.raises(UsageError):
        push(place / "lora", repo, **how)
    assert not loopback.requests


@pytest.mark.parametrize("repo", ["name", "me/a/b", "me/a@main", "/me/a", "hf://datasets/me/a"])
def test_wrong_repositories(place: Path, loopback: LoopbackHub, repo: str) -> None:
    with pytest.raises(UsageError):
        push(place / "lora", repo)


def test_what_shall_be_private_does_not_become_public(place: Path, loopback: LoopbackHub) -> None:
    loopback.create("me/a", {"x.txt": b""})
    with pytest.raises(HubError, match="public"):
        push(place / "lora", "me/a", private=True)
    push(place / "lora", "me/new", private=True)
    push(place / "lora", "me/new", private=True, license="mit")


# -- who may ----------------------------------------------------------------------------------------------


def test_a_token_is_needed_and_must_be_allowed(
    place: Path, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loopback.create("me/a", {"x.txt": b""})
    with pytest.raises(HubError, match="may not write"):
        push(place / "lora", "me/a", token=loopback.read_token)
    with pytest.raises(HubError, match=r"may not write|no such"):
        push(place / "lora", "me/a", token=loopback.outsider_token)
    with pytest.raises(HubError, match=r"does not accept the token|no such repository"):
        push(place / "lora", "me/a", token="hf_wrong")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    before = len(loopback.requests)
    with pytest.raises(HubError, match="takes a token"):
        push(place / "lora", "me/a")
    assert len(loopback.requests) == before and len(loopback.commits("me/a")) == 2


def test_a_token_in_a_file_is_not_pushed(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    bad = _copy(place / "lora", tmp_path / "bad", README__md=f"# Mine\n\ntoken {loopback.token}\n")
    with pytest.raises(HubError, match="holds your token") as e:
        push(bad, "me/a")
    assert loopback.token not in str(e.value)
    assert "adapter_config.json" not in loopback.files("me/a")


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("http://example.com", False),
        ("http://127.0.0.1.example.com", False),
        ("ftp://127.0.0.1", False),
        ("http://10.0.0.1:8080", False),
        ("http://localhost:1", True),
        ("http://127.0.0.2:1", True),
        ("http://[::1]:1", True),
        ("https://example.com", True),
    ],
)
def test_no_token_goes_anywhere_in_the_clear(monkeypatch: pytest.MonkeyPatch, url: str, good: bool) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    from adapterpack.hub import client

    if good:
        assert client.endpoint() == url
        return
    with pytest.raises(UsageError, match="in the clear"):
        client.endpoint()


# -- faults ------------------------------------------------------------------------------------------------


def _commits(hub: LoopbackHub) -> int:
    return len(hub.commits("me/a"))


@pytest.mark.parametrize(
    "fault",
    [
        lambda f: f.status(503, r"/api/repos/create"),
        lambda f: f.status(502, r"^/api/models/me/a$", times=2),
        lambda f: f.hang_up(r"/tree/"),
        lambda f: f.status(500, r"/commit/"),
        lambda f: f.hang_up(r"/commit/"),
        lambda f: f.lose_response(r"/commit/"),
        lambda f: f.lose_response(r"/api/repos/create"),
        lambda f: f.rate_limit(1, r"/commit/"),
        lambda f: f.status(503, r"/preupload/"),
        lambda f: f.drop_upload(10, r"/commit/"),
    ],
)
def test_faults_on_the_way_give_one_commit(
    place: Path, loopback: LoopbackHub, fault: Callable[[Any], object]
) -> None:
    fault(loopback.faults)
    result = push(place / "lora", "me/a")
    assert _commits(loopback) == 2 and loopback.commits("me/a")[0].oid == result.commit
    assert "adapter_model.safetensors" in loopback.files("me/a")


def test_a_broken_xet_falls_back_to_lfs(place: Path, loopback: LoopbackHub) -> None:
    loopback.break_xet()
    push(place / "lora", "me/a")
    assert _commits(loopback) == 2 and loopback.asked("POST", "/info/lfs/objects/batch")


def test_large_files_over_lfs_in_parts(place: Path, loopback: LoopbackHub) -> None:
    loopback.xet = False
    loopback.set_limits(multipart=4096, part=4096)
    loopback.faults.status(503, r".", method="PUT", host="storage")
    push(place / "lora", "me/a")
    assert len(loopback.asked("PUT", host="storage")) > 2
    assert (
        loopback.files("me/a")["adapter_model.safetensors"]
        == (place / "lora" / "adapter_model.safetensors").read_bytes()
    )


def test_a_pull_request_whose_answer_was_lost_is_not_made_twice(place: Path, loopback: LoopbackHub) -> None:
    loopback.create("me/a", {"x.txt": b""})
    loopback.faults.lose_response(r"/commit/")
    with pytest.raises(HubError, match="may be open"):
        push(place / "lora", "me/a", create_pr=True)
    assert len(loopback.pulls("me/a")) == 1


def test_somebody_else_was_quicker(place: Path, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterpack.hub import upload

    loopback.create("me/a", {"x.txt": b""})
    real = upload.commit

    def late(*args: Any, **kwargs: Any) -> upload.Commit:
        loopback.commit("me/a", {"README.md": b"# theirs\n"})
        return real(*args, **kwargs)

    monkeypatch.setattr(upload, "commit", late)
    with pytest.raises(HubError, match="changed by somebody else"):
        push(place / "lora", "me/a")
    assert loopback.files("me/a")["README.md"] == b"# theirs\n" and _commits(loopback) == 3


def test_a_hub_that_keeps_failing_is_one_clear_line(place: Path, loopback: LoopbackHub) -> None:
    loopback.faults.status(500, r"/api/models", times=None)
    with pytest.raises(HubError, match=r"fails \(500\)") as e:
        push(place / "lora", "me/a")
    assert "\n" not in e.value.message and e.value.hint


def test_a_long_rate_limit_is_said_and_not_waited_for(place: Path, loopback: LoopbackHub) -> None:
    loopback.faults.rate_limit(4000, r"/api/models", times=None)
    start = time.monotonic()
    with pytest.raises(HubError, match="rate limit") as e:
        push(place / "lora", "me/a")
    assert time.monotonic() - start < 20 and "4000" in str(e.value.hint)
    loopback.faults.clear()
    loopback.faults.rate_limit(4000, r"/commit/", times=None)
    with pytest.raises(HubError, match="rate limit"):
        push(place / "lora", "me/a")
    assert time.monotonic() - start < 30


def test_nobody_answers(place: Path, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot reach the Hub"):
        push(place / "lora", "me/a")


# -- the command line ---------------------------------------------------------------------------------------


def _run(hub: LoopbackHub, *args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *map(str, args)], env=hub.child_env(**env), capture_output=True, text=True, check=False, timeout=300
    )


def test_no_token_in_anything_that_is_written(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    """The canary: push, pull and failures, with debug output of the client; then everything is searched."""
    token, wrong = loopback.token, "hf_" + "Canary" * 6
    said = ""
    calls: list[tuple[list[str | Path], dict[str, str]]] = [
        (["push", place / "lora", "me/a", "--with-pack", "--json"], {"HF_TOKEN": token}),
        (["push", place / "lora", "me/b", "--token", token], {}),
        (["pull", "me/a", tmp_path / "out", "--token", token], {}),
        (["inspect", "me/a", "--token", token, "--json"], {}),
        (["push", place / "lora", "me/a", "--token", wrong], {}),
        (["push", place / "lora", "me/a", "--json"], {"HF_TOKEN": wrong, "ADAPTERPACK_DEBUG": "1"}),
        (["pull", "me/none", tmp_path / "none", "--token", token], {"HF_DEBUG": "1"}),
    ]
    codes = []
    for args, env in calls:
        done = _run(loopback, *args, TMPDIR=str(tmp_path), **env)
        codes.append(done.returncode)
        said += done.stdout + done.stderr
    assert codes == [0, 0, 0, 0, 1, 1, 1], said
    assert token not in said and wrong not in said
    places = [tmp_path / "out", Path(loopback.env()["HF_HOME"])]
    written = [p for top in places for p in top.rglob("*") if p.is_file()]
    texts = [p.read_bytes() for p in written] + [d for r in ("me/a", "me/b") for d in loopback.files(r).values()]
    assert len(written) > 5
    for data in texts:
        assert token.encode() not in data and wrong.encode() not in data
    assert not list(tmp_path.glob("adapterpack-push-*"))


def test_interrupted_nothing_is_half_visible(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    loopback.faults.delay(30.0, r"/commit/", times=None)
    child = subprocess.Popen(
        [*CLI, "push", str(place / "lora"), "me/a"],
        env=loopback.child_env(HF_TOKEN=loopback.token, TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not loopback.asked("POST", "/commit/") and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(2)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "me/a was made; the commit was on its way" in err
    assert not list(tmp_path.glob("adapterpack-push-*"))


def test_peft_loads_what_was_pushed(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    base = oracle.save_base(oracle.tiny_model("llama"), tmp_path / "base")
    push(place / "lora", "me/a", with_pack=True)
    push(place / "vblora", "me/zoo", path_in_repo="vb")
    script = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
where = {"kwargs": {}} if len(sys.argv) == 4 else {"kwargs": {"subfolder": sys.argv[4]}}
out = []
for source, more in ((sys.argv[2], where["kwargs"]), (sys.argv[3], {})):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), source, **more).eval()
    out.append(model(torch.arange(9)[None]).logits)
assert (out[0] - out[1]).abs().max() < 1e-5, (out[0] - out[1]).abs().max()
"""
    for args in (["me/a", place / "lora"], ["me/zoo", place / "vblora", "vb"]):
        done = subprocess.run(
            [sys.executable, "-c", script, str(base), *map(str, args)],
            env=loopback.child_env(HF_TOKEN=loopback.token),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert not loopback.leaks


def test_peft_s_own_card_loses_its_local_path(place: Path, loopback: LoopbackHub, tmp_path: Path) -> None:
    """PEFT writes the path of the base into field and tags; the Hub refuses such a card."""
    front = "base_model: /home/u/base\nlibrary_name: peft\ntags:\n- base_model:adapter:/home/u/base\n- lora\n- trl\n"
    own = _copy(place / "lora", tmp_path / "own", README__md=f"---\n{front}---\n# Mine\n")
    push(own, "me/a")
    text, front_now = loopback.files("me/a")["README.md"].decode(), _front(loopback, "me/a")
    assert "/home/u" not in text and front_now["base_model"] == BASE
    assert front_now["tags"][:2] == ["lora", "trl"]


def test_a_card_that_the_hub_refuses_is_said_before_anything_is_there(
    place: Path, loopback: LoopbackHub, tmp_path: Path
) -> None:
    own = _copy(place / "lora", tmp_path / "own", README__md="---\nlicense: my-own\n---\n# Mine\n")
    with pytest.raises(HubError, match="license"):
        push(own, "me/a")
    assert len(loopback.commits("me/a")) == 1
    bad = _copy(place / "lora", tmp_path / "bad", README__md="---\n[broken\n---\n# Mine\n")
    with pytest.raises(InvalidFile, match="no YAML"):
        push(bad, "me/b")
    assert not loopback.exists("me/b")
