"""The packs under formats/apack/, walked by both readers: what is whole is read, and what is malformed refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import apack_decoder
import packs
import pytest

import adapterpack
from adapterpack import containers
from adapterpack.containers.apack import file as outer
from adapterpack.containers.apack import manifest, parsing
from adapterpack.errors import AdapterpackError

FOLDER = Path(__file__).parent.parent / "formats" / "apack"
VECTORS = sorted(case for version in (FOLDER / "vectors").iterdir() for case in version.iterdir())
INVALID = sorted((FOLDER / "invalid").iterdir())


def _name(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


def _expect(case: Path) -> dict[str, Any]:
    return dict(json.loads((case / "expect.json").read_text()))


def _given(case: Path) -> dict[str, Path]:
    return {kind: case / kind for kind in ("parent", "base") if (case / kind).exists()}


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_dictionary_is_the_one_that_the_package_has() -> None:
    data = (FOLDER / "dictionary").read_bytes()
    assert outer.dictionary() == data
    spec = (FOLDER / "SPEC.md").read_text()
    assert _sha(data) in "".join(spec.split())


def test_the_vectors_hold_every_step_place_and_kind_of_file() -> None:
    manifests = [apack_decoder.manifest_of((case / "pack.apack").read_bytes())[0] for case in VECTORS]
    streams = [s for m in manifests for s in m["streams"]]
    assert {step for s in streams for step in s["steps"]} == set(apack_decoder.STEPS)
    assert {s["width"] for s in streams} == {1, 2, 4, 8}
    places = {e[3][0] if isinstance(e[3], list) else "stream" for m in manifests for e in m["tensors"]}
    assert places == {"stream", "same", "recipe", "base", "parent", "lines"}
    files = [f for m in manifests for f in m["files"]]
    kinds = {kind for f in files for kind in ("text", "stream", "tensors") if kind in f}
    assert kinds == {"text", "stream", "tensors"}
    headers = {(f["metadata"] is None, f["header"] is None) for f in files if "tensors" in f}
    assert headers == {(True, True), (False, True), (True, False)}
    assert {e[1] for m in manifests for e in m["tensors"]} == set(apack_decoder.BITS)
    assert max(m["parent"]["depth"] for m in manifests if m["parent"]) == 2
    assert any(s != d for s in streams for f in s["frames"] for d, s in zip(f[1::2], f[2::2], strict=True))


@pytest.mark.parametrize("case", VECTORS, ids=_name)
def test_the_library_reads_a_vector(case: Path, tmp_path: Path) -> None:
    expect, before = _expect(case), packs.tree(case)
    adapterpack.unpack(case / "pack.apack", tmp_path / "out", **_given(case))
    assert {path: _sha(data) for path, data in packs.tree(tmp_path / "out").items()} == expect["files"]
    assert packs.tree(case) == before
    data = (case / "pack.apack").read_bytes()
    with containers.open_checkpoint(case / "pack.apack", opaque=True, **_given(case)) as c:
        c.prove()
        assert c.pack is not None
        text = manifest.dump(c.pack.manifest)
        assert _sha(text) == expect["manifest"]
        assert parsing.parse(text, "again") == c.pack.manifest
        files = {path: source.read(0, source.nbytes) for path, source in c.pack.files.items()}
        assert {path: _sha(found) for path, found in files.items()} == expect["files"]
    assert len(data) < 30_000


@pytest.mark.parametrize("case", VECTORS, ids=_name)
def test_the_other_reader_reads_a_vector(case: Path) -> None:
    expect = _expect(case)
    files, plain = packs.read_case(packs.tree(case))
    assert {path: _sha(data) for path, data in files.items()} == expect["files"]
    assert _sha(plain) == expect["manifest"]


@pytest.mark.parametrize("case", INVALID, ids=_name)
def test_the_library_refuses_a_malformed_pack(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect = _expect(case)
    source, here = tmp_path / "case", tmp_path / "here"
    shutil.copytree(case, source, ignore=shutil.ignore_patterns("expect.json"))
    assert set(packs.tree(source)) == set(expect["files"])
    here.mkdir()
    monkeypatch.chdir(here)
    pack, before, start = source / "pack.apack", packs.tree(source), time.process_time()
    with pytest.raises(AdapterpackError) as caught:
        adapterpack.unpack(pack, here / "out", jobs=1)
    assert caught.value.code == expect["error"], caught.value.message
    assert expect["message"] in caught.value.message
    assert str(pack) in caught.value.message
    assert len(caught.value.message) < 1000 and "\n" not in caught.value.message
    assert time.process_time() - start < 1
    with pytest.raises(AdapterpackError), containers.open_checkpoint(pack, opaque=True) as c:
        c.prove()
    assert packs.tree(source) == before and not list(here.iterdir())


@pytest.mark.parametrize("case", INVALID, ids=_name)
def test_the_other_reader_refuses_a_malformed_pack(case: Path) -> None:
    files = packs.tree(case)
    before = {path: data for path, data in files.items() if path.startswith("before/")}
    with pytest.raises(apack_decoder.Refused):
        apack_decoder.decode(files["pack.apack"], before)
