"""The loopback Hub under the unmodified huggingface_hub client: what the tests of push and pull stand on."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import httpx2
import oracle
import pytest
import torch
from conftest import Workshop
from hub import LoopbackHub
from hub.client import point_client, run_client
from hub.state import git_oid
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from peft import PeftModel
from transformers import AutoModelForCausalLM

CARD = b"---\nlicense: mit\nbase_model: org/base\ntags: [lora]\n---\n# card\n"
NOISE = random.Random(0).randbytes(1_200_000)


def api(hub: LoopbackHub) -> HfApi:
    return HfApi(token=hub.token)


def add(**files: bytes) -> list[CommitOperationAdd]:
    """Operations; `__` in a name stands for a dot."""
    return [CommitOperationAdd(name.replace("__", "."), data) for name, data in files.items()]


def read(directory: str) -> dict[str, bytes]:
    root = Path(directory)
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def without_xet(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub) -> None:
    point_client(monkeypatch, hub, HF_HUB_DISABLE_XET="1")


# Repositories and commits.


def test_account_and_repositories(hub: LoopbackHub) -> None:
    assert api(hub).whoami()["name"] == hub.user
    url = api(hub).create_repo("me/new", private=True)
    assert (url.repo_id, str(url)) == ("me/new", f"{hub.url}/me/new")
    assert api(hub).create_repo("me/new", exist_ok=True).repo_id == "me/new"
    assert hub.repo("me/new").private
    assert list(hub.files("me/new")) == [".gitattributes"]
    for repo_id, token, status in (
        ("me/new", hub.token, 409),
        ("stranger/new", hub.token, 403),
        ("me/other", hub.read_token, 403),
        ("me/other", False, 401),
        ("me/other", "hf_wrong", 401),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            HfApi().create_repo(repo_id, token=token)
        assert error.value.response.status_code == status
    api(hub).delete_repo("me/new")
    assert not hub.exists("me/new")


@pytest.mark.parametrize("transport", ["xet", "lfs", "multipart"])
def test_push_and_pull(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    if transport != "xet":
        without_xet(monkeypatch, hub)
    if transport == "multipart":
        hub.set_limits(multipart=1_000_000, part=500_000)
    floats = torch.randn(60_000, generator=torch.Generator().manual_seed(0)).numpy().tobytes() + bytes(80_000)
    files = {"a.safetensors": NOISE, "deep/er/b.bin": floats, "README.md": CARD, "x/config.json": b"{}\n"}
    hub.create("me/a")
    made = api(hub).create_commit(
        "me/a", [CommitOperationAdd(k, v) for k, v in files.items()], commit_message="first", commit_description="why"
    )
    there = hub.files("me/a")
    assert {k: v for k, v in there.items() if k != ".gitattributes"} == files
    assert [hub.is_lfs("me/a", name) for name in files] == [True, True, False, False]
    assert next((c.oid, c.title, c.description) for c in hub.commits("me/a")) == (made.oid, "first", "why")
    uploads = hub.asked(host="storage", method="POST" if transport == "xet" else "PUT")
    sizes = [r.size for r in uploads if "/xorbs/" in r.target or "/upload/" in r.target]
    # The floats went through as LZ4 or byte groups: the server has decoded them, or the digests would not agree.
    expected = {
        "xet": len(sizes) == 1 and sizes[0] < sum(map(len, (NOISE, floats))),
        "lfs": sorted(sizes) == [len(floats), len(NOISE)],
        "multipart": sorted(sizes) == [200_000, len(floats), 500_000, 500_000],
    }
    assert expected[transport]
    assert read(snapshot_download("me/a")) == there
    gets = [r.path.split("/")[1] for r in hub.asked("GET", host="storage")]
    assert ("xorbs" in gets) == (transport == "xet")
    assert ("objects" in gets) == (transport != "xet")
    assert not hub.unknown


def test_the_same_bytes_go_up_once_per_hub(hub: LoopbackHub) -> None:
    """Nothing that the client remembers of one Hub (here: of the test before) is taken for this one's."""
    hub.create("me/a")
    api(hub).create_commit("me/a", add(a__safetensors=NOISE), commit_message="one")
    api(hub).create_commit("me/a", add(b__safetensors=NOISE), commit_message="two")
    assert hub.files("me/a")["b.safetensors"] == NOISE
    assert sum(r.size for r in hub.asked("POST", "/v1/xorbs/")) < 1.1 * len(NOISE)


def test_upload_file_and_upload_folder(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.create("me/a")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.safetensors").write_bytes(NOISE)
    (tmp_path / "README.md").write_bytes(CARD)
    api(hub).upload_file(repo_id="me/a", path_or_fileobj=b"{}", path_in_repo="config.json")
    api(hub).upload_folder(repo_id="me/a", folder_path=tmp_path)
    assert hub.files("me/a")["sub/w.safetensors"] == NOISE
    before = hub.commits("me/a")
    api(hub).upload_folder(repo_id="me/a", folder_path=tmp_path)
    assert hub.commits("me/a") == before, "nothing new, no commit"


def test_parent_commit(hub: LoopbackHub) -> None:
    first = hub.create("me/a")
    second = hub.commit("me/a", {"theirs.txt": b"1"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api(hub).create_commit("me/a", add(mine__txt=b"2"), commit_message="m", parent_commit=first)
    assert error.value.response.status_code == 412
    assert hub.commits("me/a")[0].oid == second
    api(hub).create_commit("me/a", add(mine__txt=b"2"), commit_message="m", parent_commit=second)
    assert set(hub.files("me/a")) == {".gitattributes", "theirs.txt", "mine.txt"}


def test_what_has_not_changed_is_no_commit(hub: LoopbackHub) -> None:
    head = hub.create("me/a", {"a.txt": b"1", "b.safetensors": b"22"})
    made = api(hub).create_commit("me/a", add(a__txt=b"1", b__safetensors=b"22"), commit_message="again")
    assert made.oid == head
    assert len(hub.commits("me/a")) == 2


def test_deleting(hub: LoopbackHub) -> None:
    hub.create("me/a", {"a.txt": b"1", "d/b.txt": b"2", "d/c/e.txt": b"3", "keep": b"4"})
    gone = [CommitOperationDelete("a.txt"), CommitOperationDelete("d/")]
    api(hub).create_commit("me/a", gone, commit_message="less")
    assert set(hub.files("me/a")) == {".gitattributes", "keep"}
    with pytest.raises(EntryNotFoundError):
        api(hub).create_commit("me/a", gone[:1], commit_message="again")


def test_pull_requests(hub: LoopbackHub, tmp_path: Path) -> None:
    head = hub.create("me/a", {"a.txt": b"1"})
    made = api(hub).create_commit("me/a", add(b__txt=b"2"), commit_message="please", create_pr=True)
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    assert hub.commits("me/a")[0].oid == head
    assert hub.files("me/a", "refs/pr/1")["b.txt"] == b"2"
    assert Path(hf_hub_download("me/a", "b.txt", revision="refs/pr/1")).read_bytes() == b"2"
    refs = api(hub).list_repo_refs("me/a", include_pull_requests=True)
    assert [r.ref for r in refs.pull_requests or []] == ["refs/pr/1"]
    (tmp_path / "c.txt").write_bytes(b"3")
    other = api(hub).upload_folder(repo_id="me/a", folder_path=tmp_path, create_pr=True)
    assert other.pr_num == 2
    assert [p.status for p in hub.pulls("me/a")] == ["draft", "draft"]
    api(hub).merge_pull_request("me/a", 1)
    assert api(hub).get_discussion_details("me/a", 1).status == "merged"
    assert "b.txt" in hub.files("me/a")


def test_branches_and_tags(hub: LoopbackHub) -> None:
    head = hub.create("me/a", {"a.txt": b"1"})
    api(hub).create_branch("me/a", branch="dev")
    api(hub).create_tag("me/a", tag="v1")
    api(hub).create_commit("me/a", add(a__txt=b"2"), commit_message="m", revision="dev")
    contents = {
        r: Path(hf_hub_download("me/a", "a.txt", revision=r)).read_bytes() for r in ("main", "dev", "v1", head)
    }
    assert contents == {"main": b"1", "dev": b"2", "v1": b"1", head: b"1"}
    hub.requests.clear()
    hf_hub_download("me/a", "a.txt", revision=head)
    assert not hub.requests, "a commit in the cache is not asked for again"
    assert next(c.title for c in api(hub).list_repo_commits("me/a", revision="dev")) == "m"
    with pytest.raises(RevisionNotFoundError):
        api(hub).create_commit("me/a", add(a__txt=b"3"), commit_message="m", revision="none")
    with pytest.raises(HfHubHTTPError, match="Can only commit to a branch"):
        api(hub).create_commit("me/a", add(a__txt=b"3"), commit_message="m", revision=head)


# What the Hub says of files.


def test_metadata_and_listings(hub: LoopbackHub) -> None:
    head = hub.create(
        "me/a", {f"d/{i}.txt": b"x" * i for i in range(1, 6)} | {"w.safetensors": b"ww", "README.md": CARD}
    )
    hub.set_limits(page=3)
    assert len(api(hub).list_repo_files("me/a")) == 8
    assert len(hub.asked("GET", "cursor=")) == 2
    folder = {f.path for f in api(hub).list_repo_tree("me/a", "d")}
    assert folder == {f"d/{i}.txt" for i in range(1, 6)}
    (large,) = api(hub).get_paths_info("me/a", ["w.safetensors", "none"])
    assert large.lfs is not None
    assert large.lfs.sha256 == hashlib.sha256(b"ww").hexdigest()
    info = api(hub).repo_info("me/a", files_metadata=True)
    assert (info.sha, info.card_data.base_model, info.tags) == (head, "org/base", ["lora"])
    assert {s.rfilename: s.size for s in info.siblings or []}["d/5.txt"] == 5
    large_file = get_hf_file_metadata(hf_hub_url("me/a", "w.safetensors"))
    assert (large_file.commit_hash, large_file.etag, large_file.size) == (head, large.lfs.sha256, 2)
    assert large_file.location.startswith(hub.storage_url)
    assert large_file.xet_file_data is not None
    small = get_hf_file_metadata(hf_hub_url("me/a", "d/5.txt"))
    assert (small.commit_hash, small.size, small.etag) == (head, 5, git_oid(b"x" * 5))


def test_ranges(hub: LoopbackHub) -> None:
    data = bytes(range(256)) * 40
    hub.create("me/a", {"w.safetensors": data, "t.txt": data})
    for name in ("w.safetensors", "t.txt"):
        for asked, expected in (
            ("0-9", data[:10]),
            ("10000-", data[10000:]),
            ("-5", data[-5:]),
            ("5-99999", data[5:]),
        ):
            got = get_session().get(
                hf_hub_url("me/a", name), headers={"Range": f"bytes={asked}"}, follow_redirects=True
            )
            assert (got.status_code, got.content) == (206, expected)
            assert got.headers["content-range"].endswith(f"/{len(data)}")
        past = get_session().get(hf_hub_url("me/a", name), headers={"Range": "bytes=20000-"}, follow_redirects=True)
        assert past.status_code == 416
    with HfFileSystem().open("me/a/w.safetensors", block_size=64) as f:
        f.seek(9000)
        assert f.read(20) == data[9000:9020]


def test_a_file_larger_than_the_disk(hub: LoopbackHub) -> None:
    hub.create("me/a")
    hub.commit_hole("me/a", "w.safetensors", b"header", 100 << 30)
    hub.requests.clear()
    with HfFileSystem().open("me/a/w.safetensors", block_size=1 << 16) as f:
        assert f.size == 100 << 30
        assert f.read(7) == b"header\0"
        f.seek(90 << 30)
        assert f.read(2) == b"\0\0"
    assert hub.sent(host="storage") < 300_000


@pytest.mark.parametrize("token", ["none", "outsider"])
def test_who_may_see_what(hub: LoopbackHub, token: str) -> None:
    hub.create("me/private", {"a.txt": b"1"}, private=True)
    hub.create("me/gated", {"a.txt": b"1", "w.safetensors": b"2"}, gated=True)
    given = hub.outsider_token if token == "outsider" else False
    for repo_id in ("me/private", "me/none"):
        with pytest.raises(RepositoryNotFoundError) as error:
            hf_hub_download(repo_id, "a.txt", token=given)
        assert error.value.response.status_code == (404 if given else 401)
        with pytest.raises(RepositoryNotFoundError):
            HfApi().repo_info(repo_id, token=given)
    assert HfApi().repo_info("me/gated", token=given).gated == "auto"
    with pytest.raises(GatedRepoError) as error:
        hf_hub_download("me/gated", "w.safetensors", token=given)
    assert error.value.response.status_code == (403 if given else 401)
    for repo_id in ("me/private", "me/gated"):
        assert Path(hf_hub_download(repo_id, "a.txt", token=hub.token)).read_bytes() == b"1"


def test_what_is_missing(hub: LoopbackHub) -> None:
    head = hub.create("me/a", {"a.txt": b"1"})
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/a", "b.txt")
    cache = Path(hub.env()["HF_HOME"]) / "hub" / "models--me--a"
    assert (cache / ".no_exist" / head / "b.txt").exists()
    with pytest.raises(RevisionNotFoundError):
        snapshot_download("me/a", revision="none")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:
        HfApi().repo_info("me/a", token="hf_wrong")
    assert not isinstance(error.value, RepositoryNotFoundError)
    assert not HfApi().file_exists("me/a", "b.txt")
    assert not HfApi().repo_exists("me/b")


def test_a_renamed_repository(hub: LoopbackHub) -> None:
    hub.create("me/old", {"a.txt": b"1", "w.safetensors": b"2"})
    hub.rename("me/old", "me/new")
    assert HfApi().repo_info("me/old").id == "me/new"
    assert Path(hf_hub_download("me/old", "w.safetensors")).read_bytes() == b"2"


def test_names_that_would_leave_the_directory(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.create("me/evil", {"../evil.txt": b"1", "a.txt": b"2"})
    with pytest.raises(ValueError, match="evil"):
        snapshot_download("me/evil", local_dir=tmp_path / "in")
    assert not (tmp_path / "evil.txt").exists()


# What the Hub refuses.


@pytest.mark.parametrize(
    "card, reason",
    [
        (b"---\na: [\n---\n", "Invalid YAML"),
        (b"---\nbase_model: /home/x/model\n---\n", "base_model"),
        (b"---\nbase_model_relation: child\n---\n", "base_model_relation"),
        (b"---\ntags: lora\n---\n", "tags"),
        (b"---\nlicense: Apache 2.0\n---\n", "license"),
    ],
)
def test_cards(hub: LoopbackHub, card: bytes, reason: str) -> None:
    hub.create("me/a")
    with pytest.raises(ValueError, match=reason):
        api(hub).create_commit("me/a", [CommitOperationAdd("README.md", card)], commit_message="m")
    assert len(hub.commits("me/a")) == 1


def test_a_card_without_front_matter_is_warned_of(hub: LoopbackHub) -> None:
    hub.create("me/a")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api(hub).create_commit("me/a", [CommitOperationAdd("README.md", b"# hi\n")], commit_message="m")


def commit_lines(hub: LoopbackHub, *lines: object, header: object = None) -> tuple[int, str]:
    told = [header or {"key": "header", "value": {"summary": "s", "description": ""}}, *lines]
    body = "\n".join(json.dumps(x) for x in told)
    headers = {"Authorization": f"Bearer {hub.token}"}
    answer = get_session().post(f"{hub.url}/api/models/me/a/commit/main", content=body, headers=headers)
    return answer.status_code, answer.text


def test_commits_that_are_refused(hub: LoopbackHub) -> None:
    hub.create("me/a", {"file": b"1"})
    for path in ("../x", "/x", "a/../../x", "a//b", ".git/config", "a/.GIT/x", "a\\b", "a/./b", "", "a\0b", "file/x"):
        line = {"key": "file", "value": {"path": path, "content": "MQ==", "encoding": "base64"}}
        assert commit_lines(hub, line)[0] == 400, path
    for value in (
        {"path": "w.bin", "algo": "sha256", "oid": "0" * 64, "size": 3},
        {"path": "w.bin", "algo": "sha256", "oid": hashlib.sha256(b"1").hexdigest(), "size": 2},
        {"path": "w.bin", "algo": "md5", "oid": "0" * 32, "size": 3},
    ):
        assert commit_lines(hub, {"key": "lfsFile", "value": value})[0] == 400
    assert commit_lines(hub, {"key": "file", "value": {"path": "x", "content": "%%"}})[0] == 400
    assert commit_lines(hub, {"key": "magic", "value": {"path": "x"}})[0] == 400
    assert commit_lines(hub, header={"key": "header", "value": {"summary": ""}})[0] == 400
    stale = {"key": "header", "value": {"summary": "s", "parentCommit": "0" * 40}}
    assert commit_lines(hub, header=stale)[0] == 400
    hub.set_limits(lfs=2)
    line = {"key": "file", "value": {"path": "big.txt", "content": "MTIzNA==", "encoding": "base64"}}
    assert "too large" in commit_lines(hub, line)[1]
    assert len(hub.commits("me/a")) == 2


@pytest.mark.parametrize("lfs", [True, False])
def test_a_small_binary_file(hub: LoopbackHub, lfs: bool) -> None:
    hub.create("me/a")
    hub.binary_is_lfs = lfs
    api(hub).create_commit("me/a", add(a__apack=b"\0\1"), commit_message="m")
    assert hub.is_lfs("me/a", "a.apack") == lfs


def test_the_storage_checks_bytes_and_signatures(hub: LoopbackHub) -> None:
    hub.create("me/a", {"w.bin": b"0123"})
    oid = hashlib.sha256(b"right").hexdigest()
    asked = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": 5}]}
    headers = {"Authorization": f"Bearer {hub.token}"}
    answer = get_session().post(f"{hub.url}/me/a.git/info/lfs/objects/batch", json=asked, headers=headers).json()
    href = answer["objects"][0]["actions"]["upload"]["href"]
    assert href.startswith(hub.storage_url)
    assert get_session().put(href, content=b"wrong").status_code == 400
    assert get_session().put(href.split("?")[0], content=b"right").status_code == 403
    assert get_session().put(href, content=b"right").status_code == 200
    answer = get_session().post(f"{hub.url}/me/a.git/info/lfs/objects/batch", json=asked, headers=headers).json()
    assert "actions" not in answer["objects"][0]
    assert get_session().get(f"{hub.storage_url}/v2/reconstructions/{oid}").status_code == 401
    assert get_session().post(f"{hub.storage_url}/v1/shards", content=b"x").status_code == 401


def test_a_token_at_the_storage_fails_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="saw a token"), LoopbackHub(tmp_path) as hub:
        point_client(monkeypatch, hub)
        headers = {"Authorization": f"Bearer {hub.token}"}
        assert get_session().get(f"{hub.storage_url}/objects/0", headers=headers).status_code == 400


# Faults.


def test_a_download_goes_on_where_it_broke_off(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    without_xet(monkeypatch, hub)
    hub.create("me/a", {"w.safetensors": NOISE})
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    fault = hub.faults.drop(900_000, "/objects/")
    assert Path(hf_hub_download("me/a", "w.safetensors")).read_bytes() == NOISE
    assert fault.hits == 1
    first, second = hub.asked("GET", "/objects/")
    assert first.range is None
    assert first.sent == 900_000
    start = int((second.range or "").removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= 900_000
    assert second.sent == len(NOISE) - start


def test_a_small_file_that_breaks_off_or_is_corrupt(hub: LoopbackHub) -> None:
    """Redirects on the way are let through, and asking for metadata too: a file's name is enough to match it."""
    hub.create("me/a", {"a.json": b"0123456789", "b.json": b"9876543210"})
    faults = hub.faults.drop(4, "a.json"), hub.faults.corrupt("b.json")
    assert Path(hf_hub_download("me/a", "a.json")).read_bytes() == b"0123456789"
    assert Path(hf_hub_download("me/a", "b.json")).read_bytes() == b"\xc6876543210"
    assert [f.hits for f in faults] == [1, 1]


@pytest.mark.parametrize("xet", [True, False])
def test_a_corrupt_download_is_for_us_to_notice(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, xet: bool) -> None:
    """A flipped byte gets past the client, through plain HTTP and through Xet: it compares sizes alone."""
    if not xet:
        without_xet(monkeypatch, hub)
    hub.create("me/a", {"w.safetensors": NOISE})
    fault = hub.faults.corrupt("/xorbs/" if xet else "/objects/", at=1000)
    got = Path(hf_hub_download("me/a", "w.safetensors")).read_bytes()
    assert fault.hits == 1
    assert sum(a != b for a, b in zip(got, NOISE, strict=True)) == 1


def test_the_client_tries_again(hub: LoopbackHub) -> None:
    hub.create("me/a")
    fault = hub.faults.rate_limit(0, "/preupload/")
    hub.faults.delay(0.01, "/commit/")
    api(hub).create_commit("me/a", add(a__txt=b"1"), commit_message="m")
    assert fault.hits == 1
    assert [r.status for r in hub.asked(path="/preupload/")] == [429, 200]


def test_a_lost_response(hub: LoopbackHub) -> None:
    """The commit was made, and the client cannot know: trying again finds it done, and makes no second one."""
    hub.create("me/a")
    hub.faults.lose_response("/commit/")
    with pytest.raises(httpx2.RemoteProtocolError):
        api(hub).create_commit("me/a", add(a__txt=b"1"), commit_message="m")
    assert hub.files("me/a")["a.txt"] == b"1"
    again = api(hub).create_commit("me/a", add(a__txt=b"1"), commit_message="m")
    assert [c.title for c in hub.commits("me/a")] == ["m", "initial commit"]
    assert again.oid == hub.commits("me/a")[0].oid


def test_faults_before_the_work(hub: LoopbackHub) -> None:
    hub.create("me/a")
    hub.faults.status(500, "/commit/", method="POST")
    hub.faults.hang_up("/commit/", after=1)
    for error in (HfHubHTTPError, httpx2.RemoteProtocolError):
        with pytest.raises(error):
            api(hub).create_commit("me/a", add(a__txt=b"1"), commit_message="m")
    assert len(hub.commits("me/a")) == 1
    hub.faults.clear()
    api(hub).create_commit("me/a", add(a__txt=b"1"), commit_message="m")


def test_an_upload_that_breaks_off(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    without_xet(monkeypatch, hub)
    hub.create("me/a")
    fault = hub.faults.drop_upload(300_000, "/upload/")
    api(hub).create_commit("me/a", add(w__safetensors=NOISE), commit_message="m")
    assert fault.hits == 1
    assert hub.files("me/a")["w.safetensors"] == NOISE


def test_without_xet(hub: LoopbackHub, tmp_path: Path) -> None:
    """The client takes Xet for granted: bytes and paths fail, an open file goes through LFS."""
    hub.create("me/a", {"w.safetensors": b"0"})
    hub.xet = False
    file = tmp_path / "new.safetensors"
    file.write_bytes(NOISE)
    for source in (NOISE, file):
        with pytest.raises(ConnectionError, match="xet-write-token"):
            api(hub).create_commit("me/a", [CommitOperationAdd("new.safetensors", source)], commit_message="m")
    with file.open("rb") as f:
        api(hub).create_commit("me/a", [CommitOperationAdd("new.safetensors", f)], commit_message="m")
    assert hub.files("me/a")["new.safetensors"] == NOISE
    assert Path(hf_hub_download("me/a", "new.safetensors")).read_bytes() == NOISE
    assert get_hf_file_metadata(hf_hub_url("me/a", "new.safetensors")).xet_file_data is None


def test_broken_xet(hub: LoopbackHub) -> None:
    hub.create("me/a", {"w.safetensors": NOISE})
    fault = hub.break_xet()
    with pytest.raises(Exception, match="403"):
        hf_hub_download("me/a", "w.safetensors")
    with pytest.raises(Exception, match="403"):
        api(hub).create_commit("me/a", add(new__safetensors=NOISE), commit_message="m")
    assert fault.hits >= 2
    assert len(hub.commits("me/a")) == 2


# Whole ways.


def test_peft_loads_from_it(hub: LoopbackHub, workshop: Workshop) -> None:
    adapter, base = workshop.pair("linear-llama")
    names = ("adapter_config.json", "adapter_model.safetensors")
    hub.create("me/base", read(str(base)))
    head = hub.create("me/adapter", {f"sub/{name}": (adapter / name).read_bytes() for name in names})
    hub.requests.clear()
    model = AutoModelForCausalLM.from_pretrained("me/base")
    there = PeftModel.from_pretrained(model, "me/adapter", subfolder="sub", revision=head).state_dict()
    here = PeftModel.from_pretrained(oracle.load_base(base), str(adapter)).state_dict()
    assert there.keys() == here.keys()
    assert all(torch.equal(there[k], here[k]) for k in here)
    fetched = {r.path.rsplit("/", 1)[-1] for r in hub.asked(path="me/adapter/resolve")}
    assert fetched == set(names)


def test_the_token_of_the_environment(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create("me/a", {"a.txt": b"1"}, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hf_hub_download("me/a", "a.txt")
    assert {r.bearer for r in hub.requests} == {hub.token}
    monkeypatch.delenv("HF_TOKEN")
    assert get_token() is None


def test_a_hub_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackHub(tmp_path) as hub:
        point_client(monkeypatch, hub)
        assert get_session().get(f"{hub.url}/x").status_code == 404
        assert [r.path for r in hub.unknown] == ["/x"]
    with pytest.raises(httpx2.TransportError):
        get_session().get(f"{hub.url}/x")


def test_a_process_of_its_own(hub: LoopbackHub) -> None:
    hub.create("me/a", {"w.safetensors": NOISE})
    code = """
import hashlib, sys
from huggingface_hub import HfApi, constants, get_token, hf_hub_download
data = open(hf_hub_download(sys.argv[1], "w.safetensors"), "rb").read()
HfApi().create_commit("me/a", [__import__("huggingface_hub").CommitOperationAdd("v.bin", data[:99999])],
                      commit_message="m")
print(constants.HF_HOME, get_token(), hashlib.sha256(data).hexdigest())
"""
    home, token, digest = run_client(hub, code, "me/a", HF_TOKEN=hub.token).split()
    assert (home, token, digest) == (hub.env()["HF_HOME"], hub.token, hashlib.sha256(NOISE).hexdigest())
    assert hub.files("me/a")["v.bin"] == NOISE[:99999]


def test_offline(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create("me/a", {"a.txt": b"1"})
    hf_hub_download("me/a", "a.txt")
    point_client(monkeypatch, hub, HF_HUB_OFFLINE="1")
    hub.requests.clear()
    assert Path(hf_hub_download("me/a", "a.txt")).read_bytes() == b"1"
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("me/a", "b.txt")
    assert not hub.requests
