"""The lineage file: what it says of a merge, that it is reproducible, and what verify makes of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import cases
import oracle
import pytest
from safetensors.torch import load_file, save_file

import adapterpack
from adapterpack import __version__, exactness, lineage
from adapterpack.errors import AdapterpackError, InvalidFile, UsageError

NAME = "adapterpack_lineage.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _facts(shard: Path) -> dict[str, Any]:
    """Size, and SHA-256 of the length and the header."""
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return {"size": len(data), "header_sha256": _sha256(data[: 8 + length])}


def _all_facts(model: Path) -> dict[str, dict[str, Any]]:
    return {p.name: _facts(p) for p in model.glob("*.safetensors")}


def _said(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model / NAME).read_bytes())
    return found


def _source(adapter: Path, reference: Path, weight: float = 1.0) -> dict[str, Any]:
    return {
        "reference": str(reference),
        "sha256": _sha256((adapter / "adapter_model.safetensors").read_bytes()),
        "config_sha256": _sha256((adapter / "adapter_config.json").read_bytes()),
        "weight": weight,
    }


@pytest.fixture
def pair(workshop: Any) -> tuple[Path, Path]:
    return workshop.adapter(cases.BY_NAME["linear-llama"], "bf16"), workshop.base("llama", "bf16", shard="50KB")


@pytest.fixture
def other(workshop: Any) -> Path:
    """Another adapter for the same base."""
    found: Path = workshop.adapter(cases.BY_NAME["rslora"], "bf16")
    return found


# -- what it says ------------------------------------------------------------------------------------------


def test_it_says_what_was_merged_into_what(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, base = pair
    adapterpack.merge(adapter, base, tmp_path / "m")
    assert _said(tmp_path / "m") == {
        "schema": "adapterpack.lineage/1",
        "adapterpack": __version__,
        "base": {"reference": str(base), "commit": None, "shards": _all_facts(base)},
        "adapters": [_source(adapter, adapter)],
        "options": {"rounding": "peft"},
        "shards": _all_facts(tmp_path / "m"),
    }


def test_options_and_weights_that_decide_the_bytes_are_in_it(
    pair: tuple[Path, Path], other: Path, tmp_path: Path
) -> None:
    adapter, base = pair
    adapterpack.merge([adapter, other], base, tmp_path / "m", weights=[0.5, -2], rounding="once", jobs=3)
    said = _said(tmp_path / "m")
    assert said["options"] == {"rounding": "once"}
    assert said["adapters"] == [_source(adapter, adapter, 0.5), _source(other, other, -2)]


def test_references_are_what_the_user_named(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pair[0], tmp_path / "a")
    shutil.copytree(pair[1], tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    adapterpack.merge("a", "./b", "m")
    said = _said(tmp_path / "m")
    assert (said["adapters"][0]["reference"], said["base"]["reference"]) == ("a", "./b")
    assert adapterpack.verify("a", "m").equal


@pytest.mark.parametrize("commit", [COMMIT, COMMIT[:-1], COMMIT.upper(), "main"])
def test_the_commit_of_a_snapshot_is_in_it(commit: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As in the Hub's cache: models--org--name/snapshots/<commit>, a directory of links."""
    adapter, original = pair
    store, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots" / commit
    store.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in original.iterdir():
        shutil.copy(file, store / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    adapterpack.merge(adapter, snapshot, tmp_path / "m")
    said = _said(tmp_path / "m")["base"]
    assert said["commit"] == (commit if commit == COMMIT else None)
    assert said["shards"] == _all_facts(original)


def test_forty_digits_elsewhere_are_no_commit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / COMMIT)
    adapterpack.merge(pair[0], tmp_path / COMMIT, tmp_path / "m")
    assert _said(tmp_path / "m")["base"]["commit"] is None


@pytest.mark.parametrize("digest", [False, True])
def test_two_merges_have_the_same_bytes(digest: bool, pair: tuple[Path, Path], tmp_path: Path) -> None:
    for n, jobs in enumerate((1, 3)):
        adapterpack.merge(*pair, tmp_path / str(n), jobs=jobs, digest=digest)
    assert (tmp_path / "0" / NAME).read_bytes() == (tmp_path / "1" / NAME).read_bytes()


def test_it_is_plain_json_of_little_size(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapterpack.merge(*pair, tmp_path / "m")
    data = (tmp_path / "m" / NAME).read_bytes()
    assert data.endswith(b"}\n") and b"\n " in data and len(data) < 8000
    assert str(tmp_path).encode() not in data, "where it was written decides its bytes"


def test_a_dry_run_counts_its_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    planned = adapterpack.merge(*pair, tmp_path / "m", dry_run=True)
    done = adapterpack.merge(*pair, tmp_path / "m")
    assert planned.bytes_written == done.bytes_written == oracle.adapter_bytes(tmp_path / "m")


# -- a base that is a merged model -----------------------------------------------------------------------------


def test_the_lineage_of_a_merged_base_is_told_and_not_carried(
    pair: tuple[Path, Path], other: Path, tmp_path: Path
) -> None:
    adapter, base = pair
    adapterpack.merge(adapter, base, tmp_path / "one")
    adapterpack.merge(other, tmp_path / "one", tmp_path / "two")
    one, two = _said(tmp_path / "one"), _said(tmp_path / "two")
    assert two["base"] == {
        "reference": str(tmp_path / "one"),
        "commit": None,
        "shards": _all_facts(tmp_path / "one"),
    }
    assert two["history"] == [one]
    adapterpack.merge(adapter, tmp_path / "two", tmp_path / "three")
    assert _said(tmp_path / "three")["history"] == [{k: v for k, v in two.items() if k != "history"}, one]
    assert two["adapters"] == [_source(other, other)]
    assert adapterpack.verify(other, tmp_path / "two").equal
    assert adapterpack.verify(adapter, tmp_path / "one").equal


def test_a_model_that_was_merged_many_times_can_be_merged_and_verified_again(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, original = pair
    adapterpack.merge(adapter, original, tmp_path / "first")
    record = _said(tmp_path / "first")
    base = shutil.copytree(original, tmp_path / "base")
    (base / NAME).write_text(json.dumps({**record, "history": [record] * 100}))
    adapterpack.merge(adapter, base, tmp_path / "m")
    assert len(_said(tmp_path / "m")["history"]) == 101
    assert adapterpack.verify(adapter, tmp_path / "m").equal


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"a": NaN}', b""])
def test_a_base_whose_lineage_cannot_be_read_is_an_error_that_names_it(
    content: bytes, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(pair[1], tmp_path / "base")
    (base / NAME).write_bytes(content)
    with pytest.raises(InvalidFile, match=NAME):
        adapterpack.merge(pair[0], base, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_a_base_whose_lineage_cannot_be_read_is_refused_before_any_work(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(pair[1], tmp_path / "base")
    (base / NAME).write_bytes(b"{")
    told: list[int] = []
    with pytest.raises(InvalidFile, match=NAME):
        adapterpack.merge(pair[0], base, tmp_path / "m", progress=lambda _, done, total: told.append(done))
    assert not told


# -- digests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 3])
def test_digests_of_every_file_read_and_written(jobs: int, pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, original = pair
    base = shutil.copytree(original, tmp_path / "base")
    (base / "sub").mkdir()
    (base / "sub" / "tokens.txt").write_text("a b")
    (base / "model.bin").write_text("weights in another form: neither read nor written")
    adapterpack.merge(adapter, base, tmp_path / "m", digest=True, jobs=jobs)
    files = _said(tmp_path / "m")["files"]

    def digests(root: Path, *but: str) -> dict[str, str]:
        found = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
        return {name: _sha256(path.read_bytes()) for name, path in found.items() if name not in but}

    assert files == {"read": digests(base, "model.bin"), "written": digests(tmp_path / "m", NAME)}
    assert "sub/tokens.txt" in files["written"]
    plain = {k: v for k, v in _said(tmp_path / "m").items() if k != "files"}
    adapterpack.merge(adapter, base, tmp_path / "without")
    assert _said(tmp_path / "without") == plain


def test_digests_of_a_model_whose_embeddings_part(workshop: Any, tmp_path: Path) -> None:
    """Its config and index are written anew, and both sides have theirs."""
    base = workshop.base("llama", shard="60KB", tie=True)
    oracle.make_adapter(tmp_path / "a", cases.lora(target_modules=["lm_head"])(), base=oracle.load_base(base))
    adapterpack.merge(tmp_path / "a", base, tmp_path / "m", digest=True)
    files = _said(tmp_path / "m")["files"]
    for name in ("config.json", "model.safetensors.index.json"):
        assert files["read"][name] == _sha256((base / name).read_bytes())
        assert files["written"][name] == _sha256((tmp_path / "m" / name).read_bytes())
        assert files["read"][name] != files["written"][name]
    assert adapterpack.verify(tmp_path / "a", tmp_path / "m").equal


# -- verify -------------------------------------------------------------------------------------------------------


def test_verify_finds_the_base_by_lineage(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, base = pair
    adapterpack.merge(adapter, base, tmp_path / "m")
    found = adapterpack.verify(adapter, tmp_path / "m")
    assert found.equal and found.modules
    assert any(str(base) in note and NAME in note for note in found.notes)
    (tmp_path / "m" / NAME).unlink()
    with pytest.raises(UsageError) as caught:
        adapterpack.verify(adapter, tmp_path / "m")
    assert caught.value.hint == "--base BASE"
    assert adapterpack.verify(adapter, tmp_path / "m", base=base).equal


def test_verify_by_lineage_sees_a_wrong_value(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, base = pair
    adapterpack.merge(adapter, base, tmp_path / "m")
    shard = next(p for p in (tmp_path / "m").glob("*.safetensors") if any("q_proj" in k for k in load_file(p)))
    tensors = load_file(shard)
    name = next(k for k in tensors if "q_proj" in k)
    tensors[name][3, 5] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    found = adapterpack.verify(adapter, tmp_path / "m")
    assert [f.key for f in found.findings] == [name] and not found.equal


def test_a_base_that_is_gone_is_an_error_that_names_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, original = pair
    base = shutil.copytree(original, tmp_path / "base")
    adapterpack.merge(adapter, base, tmp_path / "m")
    base.rename(tmp_path / "moved")
    with pytest.raises(AdapterpackError, match="base"):
        adapterpack.verify(adapter, tmp_path / "m")
    assert adapterpack.verify(adapter, tmp_path / "m", base=tmp_path / "moved").equal


def test_files_that_are_not_those_of_the_merge_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, original = pair
    base = shutil.copytree(original, tmp_path / "base")
    adapterpack.merge(adapter, base, tmp_path / "m")
    for side, where in (("the base", base), ("the merged model", tmp_path / "m")):
        shard = min(where.glob("*.safetensors"))
        kept = shard.read_bytes()
        save_file(load_file(shard), shard, metadata={"format": "pt", "more": "than before"})
        found = adapterpack.verify(adapter, tmp_path / "m")
        assert any(f"{shard.name} of {side}" in note for note in found.notes)
        assert found.equal, "the tensors are the same"
        shard.write_bytes(kept)
    assert not any("another size" in note for note in adapterpack.verify(adapter, tmp_path / "m").notes)


@pytest.mark.parametrize("rounding", ["peft", "once"])
def test_several_adapters_verify_by_lineage_from_any_of_them(
    rounding: str, pair: tuple[Path, Path], other: Path, tmp_path: Path
) -> None:
    adapter, base = pair
    adapterpack.merge([adapter, other], base, tmp_path / "m", weights=[0.5, -2.0], rounding=rounding)
    for a in (adapter, other):
        found = adapterpack.verify(a, tmp_path / "m")
        assert found.equal, found.findings
        assert any("2 adapters" in note for note in found.notes)
    # The weights count: with others the model would be another.
    said = _said(tmp_path / "m")
    said["adapters"][0]["weight"] = 1.0
    (tmp_path / "m" / NAME).write_text(json.dumps(said))
    assert not adapterpack.verify(adapter, tmp_path / "m").equal


def test_one_adapter_twice_verifies_by_lineage(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, base = pair
    adapterpack.merge([adapter, adapter], base, tmp_path / "m", weights=[0.5, 0.25])
    assert adapterpack.verify(adapter, tmp_path / "m").equal


def test_another_adapter_that_is_missing_or_changed_is_a_clear_error(
    pair: tuple[Path, Path], other: Path, tmp_path: Path
) -> None:
    adapter, base = pair
    second = shutil.copytree(other, tmp_path / "second")
    adapterpack.merge([adapter, second], base, tmp_path / "m")
    assert adapterpack.verify(adapter, tmp_path / "m").equal
    tensors = load_file(second / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, second / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidFile, match="second is not the adapter that was merged") as caught:
        adapterpack.verify(adapter, tmp_path / "m")
    assert "2 adapters" in str(caught.value.hint)
    second.rename(tmp_path / "moved")
    with pytest.raises(InvalidFile, match="second, merged too, cannot be read") as caught:
        adapterpack.verify(adapter, tmp_path / "m")
    assert "2 adapters" in str(caught.value.hint)


def test_another_adapter_whose_config_was_changed_is_a_clear_error(
    pair: tuple[Path, Path], other: Path, tmp_path: Path
) -> None:
    adapter, base = pair
    second = shutil.copytree(other, tmp_path / "second")
    adapterpack.merge([adapter, second], base, tmp_path / "m")
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 100}))
    with pytest.raises(InvalidFile, match="second is not the adapter that was merged"):
        adapterpack.verify(adapter, tmp_path / "m")


def test_an_adapter_that_was_not_merged_is_found_out(pair: tuple[Path, Path], other: Path, tmp_path: Path) -> None:
    adapter, base = pair
    adapterpack.merge(adapter, base, tmp_path / "m")
    found = adapterpack.verify(other, tmp_path / "m")
    assert not found.equal
    assert any("other files were merged" in note and str(adapter) in note for note in found.notes)


def test_the_same_change_in_another_file_still_verifies(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """What counts are the tensors; that the file is another one is a note."""
    adapter, base = pair
    adapterpack.merge(adapter, base, tmp_path / "m")
    adapterpack.convert(adapter, tmp_path / "f32", dtype="float32")
    found = adapterpack.verify(tmp_path / "f32", tmp_path / "m")
    assert found.equal
    same = (tmp_path / "f32" / "adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()
    assert same is not any("other files were merged" in note for note in found.notes)


# -- files that make no sense ---------------------------------------------------------------------------------------


def _with(path: str, value: Any) -> Any:
    """A change of the record: the field at a dotted path."""

    def change(record: dict[str, Any]) -> Any:
        *above, last = path.split(".")
        at: Any = record
        for key in above:
            at = at[int(key) if isinstance(at, list) else key]
        if value is None:
            del at[last]
        else:
            at[int(last) if isinstance(at, list) else last] = value
        return record

    return change


MALFORMED = {
    "another schema": _with("schema", "adapterpack.lineage/2"),
    "no schema": _with("schema", None),
    "a number as schema": _with("schema", 1),
    "no base": _with("base", None),
    "a text as base": _with("base", "x"),
    "no reference": _with("base.reference", None),
    "a number as reference": _with("base.reference", 5),
    "no shards": _with("shards", None),
    "a text as shards": _with("shards", "x"),
    "numbers as facts of shards": _with("shards", {"model.safetensors": 5}),
    "texts as facts of the base's shards": _with("base.shards", {"model.safetensors": "x"}),
    "no adapters": _with("adapters", None),
    "a text as adapters": _with("adapters", "abc"),
    "a number as adapters": _with("adapters", 5),
    "a text as adapter": _with("adapters.0", "abc"),
    "an adapter with more": _with("adapters.0.more", 1),
    "an adapter with less": _with("adapters.0.weight", None),
    "a text as weight": _with("adapters.0.weight", "1"),
    "true as weight": _with("adapters.0.weight", True),
    "a list as digest": _with("adapters.0.sha256", []),
    "no options": _with("options", None),
    "a number as options": _with("options", 3),
    "no version": _with("adapterpack", None),
    "a text as history": _with("history", "x"),
    "a list": lambda record: [record],
    "null": lambda record: None,
}


@pytest.fixture(scope="module")
def merged(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter and a model that was merged from it."""
    adapter = workshop.adapter(cases.BY_NAME["linear-llama"], "bf16")
    target = tmp_path_factory.mktemp("lineage") / "m"
    adapterpack.merge(adapter, workshop.base("llama", "bf16", shard="50KB"), target)
    return adapter, target


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_or_foreign_file_is_an_error_that_names_it(
    what: str, merged: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, model = merged
    copy = shutil.copytree(model, tmp_path / "m")
    (copy / NAME).write_text(json.dumps(MALFORMED[what](_said(model))))
    with pytest.raises(InvalidFile, match=NAME):
        adapterpack.verify(adapter, copy)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b'{"schema": NaN}', b"[" * 100_000, b'{"schema": 1, "schema": 2}']
)
def test_a_file_that_is_no_json_is_an_error_that_names_it(
    content: bytes, merged: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, model = merged
    copy = shutil.copytree(model, tmp_path / "m")
    (copy / NAME).write_bytes(content)
    with pytest.raises(InvalidFile, match=NAME):
        adapterpack.verify(adapter, copy)


def test_a_file_that_is_no_file_is_an_error(merged: tuple[Path, Path], tmp_path: Path) -> None:
    """A FIFO would block for ever."""
    adapter, model = merged
    copy = shutil.copytree(model, tmp_path / "m")
    (copy / NAME).unlink()
    os.mkfifo(copy / NAME)
    with pytest.raises(InvalidFile, match=NAME):
        adapterpack.verify(adapter, copy)


def test_read_gives_what_render_was_given(merged: tuple[Path, Path]) -> None:
    _, model = merged
    story = lineage.read(model)
    assert story is not None
    assert lineage.render(story, {}, None) == (model / NAME).read_bytes()
    assert lineage.read(model.parent) is None


def test_torch_and_numpy_leave_the_same_lineage(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was computed decides no bytes on the CPU, so it is not told."""
    for known, name in ((True, "numpy"), (False, "torch cpu")):
        monkeypatch.setattr(exactness, "numpy_known", lambda products, known=known: known)
        assert adapterpack.merge(*pair, tmp_path / name, verify="off").arithmetic == name
    assert (tmp_path / "numpy" / NAME).read_bytes() == (tmp_path / "torch cpu" / NAME).read_bytes()
