"""The law, walked: every case under formats/ is tested, and none is listed here by hand."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import safetensors
import torch
from safetensors.torch import load_file

import adapterpack
from adapterpack import containers, methods
from adapterpack.adapter import Block, Change, Effect, Kind, Request
from adapterpack.backend import Backend, TorchBackend
from adapterpack.base import Base
from adapterpack.errors import AdapterpackError
from adapterpack.io import safetensors as ours
from adapterpack.io.files import OpenFile
from adapterpack.methods._keys import render
from adapterpack.plan import as_matrix
from adapterpack.tensor import Tensor

FORMATS = Path(__file__).parent.parent / "formats"
FOLDERS = sorted(p for p in FORMATS.iterdir() if p.is_dir())
HEADERS = FORMATS / "safetensors"
BASES = FORMATS / "quantised"
"""Base models, no adapters: test_quantised.py walks them."""
PACKS = FORMATS / "apack"
"""Files, no directories: test_pack_formats.py walks them."""
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def _cases(kind: str) -> list[Path]:
    return sorted(case for folder in FOLDERS if (folder / kind).is_dir() for case in (folder / kind).iterdir())


def _name(path: Path) -> str:
    return path.relative_to(FORMATS).as_posix()


VECTORS = [case for case in _cases("vectors") if case.parent.parent not in (BASES, PACKS)]
INVALID = [case for case in _cases("invalid") if case.parent.parent not in (HEADERS, BASES, PACKS)]
INVALID_HEADERS = [case for case in _cases("invalid") if case.parent.parent == HEADERS]


def _expect(case: Path) -> dict[str, Any]:
    return dict(json.loads((case / "expect.json").read_text()))


def _files(case: Path) -> set[str]:
    return {p.relative_to(case).as_posix() for p in case.rglob("*") if not p.is_dir()}


# ---------------------------------------------------------------- the folders


@pytest.mark.parametrize("folder", FOLDERS, ids=_name)
def test_a_format_is_prose_and_data_and_nothing_else(folder: Path) -> None:
    assert {p.name for p in folder.iterdir()} <= {"SPEC.md", "vectors", "invalid", "dictionary"}
    assert len((folder / "SPEC.md").read_text().splitlines()) > 20
    assert any((folder / "invalid").iterdir())
    if folder != HEADERS:
        assert any((folder / "vectors").iterdir())


def test_nothing_lies_beside_the_format_folders() -> None:
    assert all(p.is_dir() for p in FORMATS.iterdir())


@pytest.mark.parametrize("case", VECTORS, ids=_name)
def test_a_vector_has_exactly_its_files(case: Path) -> None:
    where = _expect(case).get("subfolder")
    adapter = {f"{where}/{name}" for name in ADAPTER} if where else ADAPTER
    assert _files(case) == adapter | {"expect.json", "expect.safetensors"}


@pytest.mark.parametrize("case", INVALID + INVALID_HEADERS, ids=_name)
def test_an_invalid_case_has_exactly_its_files(case: Path) -> None:
    assert _files(case) == {*_expect(case)["files"], "expect.json"}


# ---------------------------------------------------------------- vectors


def _open(case: Path) -> Any:
    return containers.open_checkpoint(case, subfolder=_expect(case).get("subfolder"))


@pytest.mark.parametrize("case", VECTORS, ids=_name)
def test_method_and_encoding_are_recognised(case: Path) -> None:
    expect = _expect(case)
    with _open(case) as c:
        # A former name of a method may stand in the file.
        assert c.peft_type == expect["method"]
        assert len(c.tensors) == expect["tensors"]
        method, adapter = methods.parse(c)
        assert (method.peft_type, adapter.encoding) == (expect["method"], expect["encoding"])
        assert sorted(adapter.extra) == expect["unexpected"]


@pytest.mark.parametrize("case", VECTORS, ids=_name)
def test_render_after_parse_is_the_same_checkpoint(case: Path) -> None:
    with _open(case) as c:
        again = render(methods.parse(c)[1])
        assert again.tensors.keys() == c.tensors.keys()
        assert all(again.tensors[key].equals(tensor) for key, tensor in c.tensors.items())
        assert (again.config, list(again.config)) == (c.config, list(c.config))
        assert again.metadata == c.metadata
        assert again.config_bytes == c.config_bytes
        assert again.weights is not None and c.weights is not None
        assert again.weights.read(0, c.weights.nbytes) == c.weights.read(0, c.weights.nbytes)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """The recorded base of a case, as a model directory; each is made once.

    The base depends on torch's normal generator, whose last bits differ between CPUs: where a change was computed
    with base tensors, those that lie beside it take the place of the drawn ones.
    """
    root = tmp_path_factory.mktemp("bases")

    def make(case: Path) -> Path:
        said = _expect(case)["base"]
        key = {field: said[field] for field in ("kind", "dtype", "tie", "bias", "seed", "config")}
        recorded = {k.removeprefix("base:"): v for k, v in _arrays(case).items() if k.startswith("base:")}
        if recorded:
            key["recorded"] = _name(case)
        path = root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        if not path.exists():
            dtype = getattr(torch, said["dtype"])
            model = oracle.tiny_model(
                said["kind"], dtype, tie=said["tie"], bias=said["bias"], seed=said["seed"], **said["config"]
            )
            with torch.no_grad():
                drawn = model.state_dict()
                for name, tensor in recorded.items():
                    here = drawn[name]
                    assert here.dtype == tensor.dtype
                    torch.testing.assert_close(here, tensor)
                    here.copy_(tensor)
            oracle.save_base(model, path)
        return path

    return make


@pytest.mark.parametrize("case", VECTORS, ids=_name)
def test_the_change_of_every_base_tensor_is_the_recorded_one(case: Path, base_of: Callable[[Path], Path]) -> None:
    expect, arrays = _expect(case), _arrays(case)
    xp = TorchBackend("cpu")
    with _open(case) as c, Base(base_of(case)) as base:
        method, adapter = methods.parse(c)
        request = Request(xp=xp, shapes=base)
        changes: dict[str, list[Change]] = {}
        for change in method.changes(adapter, request):
            changes.setdefault(change.target, []).append(change)
        assert changes.keys() == {entry["name"] for entry in expect["changes"]}
        for entry in expect["changes"]:
            name, kind = entry["name"], entry["kind"]
            steps, tensor = changes[name], base.tensor(name)
            assert list(tensor.shape) == entry["shape"]
            if kind == "add":
                got = sum(_delta(step, tensor.shape, base, xp) for step in steps)
            else:
                w = xp.native(tensor).double()
                assert kind != "base-dependent" or torch.equal(w, arrays["base:" + name].double())
                got = _applied(steps, w, tensor, base, xp)
                got = got[entry["indices"]] if kind == "rows" else got
                got = got - w if kind == "base-dependent" else got
            error = float((got - arrays[name]).norm() / arrays[name].norm())
            assert error <= entry["bound"], f"{name}: {error:.3g}"


def _arrays(case: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(case / "expect.safetensors"))


def _applied(steps: list[Change], w: torch.Tensor, tensor: Tensor, base: Base, xp: Backend) -> torch.Tensor:
    """The changed tensor in f64, from one block of all its rows, as a merge hands it out."""
    rows, width = as_matrix(tensor.shape)
    result = w.reshape(rows, width) if w.ndim > 1 else w
    for step in steps:
        place = step.place(tensor.shape, base.conv1d(step.module))
        result = step.load(xp).exact(result, Block(place, slice(0, rows), True, tensor.dtype))
    return result.reshape(w.shape)


def _delta(step: Change, shape: tuple[int, ...], base: Base, xp: Backend) -> torch.Tensor:
    assert step.effect is Effect.ADD
    delta = step.load(xp).delta(slice(0, step.shape[0]))
    assert delta is not None
    place = step.place(shape, base.conv1d(step.module))
    if place in (Kind.CONV1D, Kind.EMBEDDING):
        # Of experts the logical matrices stand one below the other.
        experts = shape[0] if len(shape) == 3 else 1
        delta = delta.reshape(experts, -1, delta.shape[-1]).transpose(1, 2)
    return delta.reshape(shape)


@pytest.mark.parametrize("case", VECTORS, ids=_name)
def test_every_parameter_is_used_by_a_change(case: Path, base_of: Callable[[Path], Path]) -> None:
    with _open(case) as c, Base(base_of(case)) as base:
        method, adapter = methods.parse(c)
        changes = list(method.changes(adapter, Request(xp=TorchBackend("cpu"), shapes=base)))
        used = set().union(*(change.uses for change in changes))
        assert used == c.tensors.keys() - set(_expect(case)["unexpected"])
        said = {entry["name"]: entry["kind"] for entry in _expect(case)["changes"]}
        replaced, transformed = (
            {change.target for change in changes if change.effect is effect}
            for effect in (Effect.REPLACE, Effect.TRANSFORM)
        )
        assert replaced == {name for name, kind in said.items() if kind in ("value", "rows")}
        # What transforms new values needs nothing of W.
        assert transformed - replaced == {name for name, kind in said.items() if kind == "base-dependent"}


# ---------------------------------------------------------------- invalid


@pytest.mark.parametrize("case", INVALID_HEADERS, ids=_name)
def test_a_malformed_header_is_refused_and_never_accepted_where_the_library_refuses(case: Path) -> None:
    expect = _expect(case)
    file = case / "model.safetensors"
    try:
        safetensors.deserialize(file.read_bytes())
        library = "accepts"
    except Exception:
        library = "rejects"
    assert library == expect["library"]
    with pytest.raises(AdapterpackError) as caught, OpenFile(file) as opened:
        ours.read(opened)
    assert caught.value.code == expect["error"]
    assert expect["message"] in caught.value.message
    assert len(caught.value.message) < 1000 and "\n" not in caught.value.message


def _call(verb: str, source: Path, out: Path, options: dict[str, Any]) -> Any:
    options = dict(options)
    if "base" in options:
        options["base"] = source / options["base"]
    if verb == "convert":
        return adapterpack.convert(source, out, **options)
    if verb == "merge":
        return adapterpack.merge(source, options.pop("base"), out, **options)
    return {"inspect": adapterpack.inspect, "check": adapterpack.check}[verb](source, **options)


@pytest.mark.parametrize("case", INVALID, ids=_name)
def test_an_invalid_adapter_gives_the_recorded_error(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect = _expect(case)
    source, here = tmp_path / "case", tmp_path / "here"
    shutil.copytree(case, source, ignore=shutil.ignore_patterns("expect.json"))
    here.mkdir()
    monkeypatch.chdir(here)
    before = oracle.tree_hash(source)
    if "finding" in expect:
        health = _call(expect["verb"], source, here / "out", expect["options"])
        assert expect["finding"] in [f.code for f in health.findings]
        assert not health.healthy
    else:
        with pytest.raises(AdapterpackError) as caught:
            _call(expect["verb"], source, here / "out", expect["options"])
        assert caught.value.code == expect["error"], caught.value.message
        assert expect["message"] in caught.value.message
        assert len(caught.value.message) < 1000 and "\n" not in caught.value.message
    assert oracle.tree_hash(source) == before, "the input was modified"
    # Neither half a result nor the work of a pickle's payload.
    assert not list(here.iterdir())
