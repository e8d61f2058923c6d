"""diff: what was changed is what it says, in the numbers of dense f64 arithmetic; and it never judges."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import oracle
import planted
import pytest
import torch
from click.testing import CliRunner
from peft import LoHaConfig, LoraConfig
from planted import CONFIGS, Draft
from safetensors.torch import load_file

import adapterpack
from adapterpack.cli import cli

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.make(tmp_path_factory.mktemp("diff"))


def _edited(place: Path, name: str, to: Path, **change: Any) -> Path:
    d = Draft.read(place / name)
    for key in list(d.tensors):
        for mark, f in change.get("tensors", {}).items():
            if mark in key:
                d.tensors[key] = f(d.tensors[key])
    d.config |= change.get("config", {})
    return d.write(to)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_differs_from_itself(place: Path, name: str) -> None:
    found = adapterpack.diff(place / name, place / name)
    assert found.same and not found.config and not found.tensors and not found.files
    assert found.equal_tensors == found.a.tensors == found.b.tensors > 0
    assert all(m.norm_difference == 0 and m.relative == 0 and m.norm_a == m.norm_b for m in found.modules)
    assert all(m.cosine is None or m.cosine == pytest.approx(1, abs=1e-9) for m in found.modules)


def test_a_pack_and_its_directory_are_the_same(place: Path, tmp_path: Path) -> None:
    adapterpack.compress(place / "lora", tmp_path / "a.apack")
    found = adapterpack.diff(place / "lora", tmp_path / "a.apack")
    assert found.same and found.b.bytes == (tmp_path / "a.apack").stat().st_size


def test_config_fields(place: Path, tmp_path: Path) -> None:
    d = Draft.read(place / "ranks")
    d.config["target_modules"] = list(reversed(d.config["target_modules"]))
    del d.config["lora_dropout"]
    d.config |= {"shiny": 1, "lora_alpha": 16, "use_dora": 0, "rank_pattern": {"down_proj": 4, "k_proj": 1}}
    d.metadata["format"] = "np"
    found = adapterpack.diff(place / "ranks", d.write(tmp_path / "b"))
    assert not found.same
    assert {(c.name, c.kind, c.before, c.after) for c in found.config} == {
        ("lora_dropout", "removed", 0.0, None),
        ("shiny", "added", None, 1),
        ("lora_alpha", "changed", 8, 16),
        # 0 is not false, though Python says that they are equal.
        ("use_dora", "changed", False, 0),
        ("rank_pattern.down_proj", "changed", 3, 4),
        ("rank_pattern.k_proj", "added", None, 1),
        ("__metadata__.format", "changed", "pt", "np"),
    }


def test_the_order_of_patterns_counts(place: Path, tmp_path: Path) -> None:
    patterns = {"self_attn.q_proj": 3, "q_proj": 50}
    a = _edited(place, "lora", tmp_path / "a", config={"alpha_pattern": patterns})
    b = _edited(place, "lora", tmp_path / "b", config={"alpha_pattern": dict(reversed(patterns.items()))})
    [change] = adapterpack.diff(a, b).config
    assert change.name == "alpha_pattern (order)"


def test_tensors(place: Path, tmp_path: Path) -> None:
    d = Draft.read(place / "lora")
    ours = dict(d.tensors)
    keys = sorted(d.tensors)
    gone, wider, narrow, moved, nan, spelled = keys[0], keys[1], keys[2], keys[3], keys[4], keys[5]
    del d.tensors[gone]
    d.tensors[wider] = torch.ones(7, 3)
    ours_narrow = d.tensors[narrow].bfloat16()
    d.tensors[narrow] = ours_narrow
    d.tensors[moved] = d.tensors[moved] * 1.25
    d.tensors[nan] = d.tensors[nan].clone().fill_(torch.nan)
    d.tensors[spelled.replace(".weight", ".default.weight")] = d.tensors.pop(spelled)
    d.tensors["base_model.model.new"] = torch.full((2, 2), 3.0)
    found = adapterpack.diff(place / "lora", d.write(tmp_path / "b"))
    by_key = {t.key: t for t in found.tensors}
    assert by_key.keys() == {gone, wider, narrow, moved, nan, "base_model.model.new"}
    assert found.equal_tensors == 3 and any("1 keys are spelled otherwise" in n for n in found.notes)
    assert by_key[gone].kind == "removed" and by_key[gone].dtype_b is None
    assert by_key["base_model.model.new"].kind == "added" and by_key["base_model.model.new"].norm_b == 6.0
    assert (by_key[wider].kind, by_key[wider].shape_b) == ("shape", (7, 3))
    t = by_key[moved]
    assert t.kind == "values" and t.relative == pytest.approx(0.25, rel=1e-6)
    assert t.norm_a == pytest.approx(float(ours[moved].double().norm()), rel=1e-12)
    assert t.max_abs == pytest.approx(float((ours[moved].double() * 0.25).abs().max()), rel=1e-6)
    lost = ours_narrow.double() - ours[narrow].double()
    assert by_key[narrow].norm_difference == pytest.approx(float(lost.norm()), rel=1e-9)
    assert (by_key[narrow].dtype_a, by_key[narrow].dtype_b) == ("F32", "BF16")
    relative, largest = by_key[nan].relative, by_key[nan].max_abs
    assert relative is not None and largest is not None and math.isnan(relative) and math.isnan(largest)
    assert [t.kind for t in found.tensors[:3]].count("shape") == 1
    # JSON has no NaN.
    said = CliRunner().invoke(cli, ["diff", str(place / "lora"), str(tmp_path / "b"), "--json"])
    assert said.exit_code == 0, said.output
    by_name = {t["key"]: t for t in json.loads(said.stdout)["tensors"]}
    assert by_name[nan]["relative"] is None


def test_a_cast_that_loses_nothing_says_so(place: Path, tmp_path: Path) -> None:
    a = _edited(place, "lora", tmp_path / "a", tensors={"lora_": lambda t: t.bfloat16().float()})
    b = _edited(place, "lora", tmp_path / "b", tensors={"lora_": lambda t: t.bfloat16()})
    found = adapterpack.diff(a, b)
    assert {t.kind for t in found.tensors} == {"dtype"} and {t.relative for t in found.tensors} == {0.0}
    assert all(m.norm_difference == 0 for m in found.modules)


def _dense(directory: Path, module: str, scale: float) -> torch.Tensor:
    t = load_file(directory / "adapter_model.safetensors")
    a, b = (t[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    return scale * b @ a


def test_modules_have_the_norms_of_dense_arithmetic(place: Path, tmp_path: Path) -> None:
    noise = {
        "0.self_attn.q_proj.lora_B": lambda t: t + torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
    }
    b = _edited(place, "lora", tmp_path / "b", tensors=noise, config={"lora_alpha": 12})
    found = adapterpack.diff(place / "lora", b)
    assert found.modules[0].name == f"{Q0}.weight"
    for m in found.modules:
        module = m.name.removesuffix(".weight")
        x, y = _dense(place / "lora", module, 8 / 2), _dense(b, module, 12 / 2)
        assert m.measure == "change of W"
        assert m.norm_a == pytest.approx(float(x.norm()), rel=1e-9)
        assert m.norm_b == pytest.approx(float(y.norm()), rel=1e-9)
        assert m.norm_difference == pytest.approx(float((x - y).norm()), rel=1e-9)
        assert m.relative == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-9)
        assert m.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), rel=1e-9)
    others = [m for m in found.modules if m.name != f"{Q0}.weight"]
    assert all(m.relative == pytest.approx(0.5) and m.cosine == pytest.approx(1) for m in others)


def test_a_reversed_adapter_points_the_other_way(place: Path, tmp_path: Path) -> None:
    b = _edited(place, "lora", tmp_path / "b", tensors={"lora_B": lambda t: -t})
    for m in adapterpack.diff(place / "lora", b).modules:
        assert m.cosine == pytest.approx(-1) and m.relative == pytest.approx(2)


def test_modules_of_one_side_come_first(place: Path, tmp_path: Path) -> None:
    d = Draft.read(place / "lora")
    d.tensors = {k: t for k, t in d.tensors.items() if DOWN1 not in k}
    found = adapterpack.diff(place / "lora", d.write(tmp_path / "b"))
    first = found.modules[0]
    assert (first.name, first.norm_b, first.norm_difference, first.note) == (
        f"{DOWN1}.weight",
        None,
        None,
        "only A changes it",
    )
    assert first.norm_a == pytest.approx(float(_dense(place / "lora", DOWN1, 4).norm()), rel=1e-9)


def test_other_methods_of_the_same_change_are_the_same_change(place: Path, tmp_path: Path) -> None:
    """LoHa and the LoRA that it is folded into share no tensor, and no module moved."""
    oracle.make_adapter(tmp_path / "loha", LoHaConfig(r=2, target_modules=["q_proj"]), scale=0.3)
    adapterpack.convert(tmp_path / "loha", tmp_path / "lora", to="lora")
    found = adapterpack.diff(tmp_path / "loha", tmp_path / "lora")
    assert (found.a.method, found.b.method) == ("loha", "lora")
    assert {t.kind for t in found.tensors} == {"added", "removed"} and found.equal_tensors == 0
    assert found.modules
    assert all(m.relative is not None and m.relative < 1e-6 for m in found.modules)


def test_what_depends_on_w_takes_the_base(place: Path, tmp_path: Path) -> None:
    b = _edited(place, "dora", tmp_path / "b", tensors={"magnitude": lambda t: t * 1.5})
    alone = adapterpack.diff(place / "dora", b)
    assert {m.measure for m in alone.modules} == {"parameters"} and any("--base" in n for n in alone.notes)
    base = place / "base"
    found = adapterpack.diff(place / "dora", b, base=base)
    x, y = (oracle.peft_merge(base, p) for p in (place / "dora", b))
    w = load_file(base / "model.safetensors")
    assert {m.measure for m in found.modules} == {"change of W"}
    for m in found.modules:
        dx, dy = (t[m.name].double() - w[m.name].double() for t in (x, y))
        assert m.norm_a == pytest.approx(float(dx.norm()), rel=1e-4)
        assert m.norm_difference == pytest.approx(float((dx - dy).norm()), rel=1e-4)


def test_replaced_tensors(place: Path, tmp_path: Path) -> None:
    b = _edited(place, "saved", tmp_path / "b", tensors={"model.norm.weight": lambda t: t + 1})
    found = {m.name: m for m in adapterpack.diff(place / "saved", b).modules}
    moved = found["model.norm.weight"]
    assert moved.measure == "new values" and moved.norm_difference == pytest.approx(math.sqrt(64))
    based = {m.name: m for m in adapterpack.diff(place / "saved", b, base=place / "base").modules}
    assert based["model.norm.weight"].measure == "change of W"
    assert based["model.norm.weight"].norm_difference == pytest.approx(math.sqrt(64), rel=1e-6)


def test_methods_that_are_not_read_are_compared_by_tensor(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    d = Draft.read(place / "lora")
    d.config["peft_type"] = "NO_SUCH_METHOD"
    d.write(path)
    d.tensors = {k: t * 2 for k, t in d.tensors.items()}
    found = adapterpack.diff(path, d.write(tmp_path / "b"))
    assert not found.modules and any("tensor by tensor" in n for n in found.notes)
    assert len(found.tensors) == 8 and all(t.relative == pytest.approx(1) for t in found.tensors)


def test_a_broken_one_is_compared_too(place: Path, tmp_path: Path) -> None:
    """A report is wanted most where something went wrong."""
    for name in ("no prefix", "half a pair", "alpha null", "no tensors"):
        faulty = planted.plant(place, planted.FAULTS[name], tmp_path / name)
        found = adapterpack.diff(place / "lora", faulty)
        assert not found.same and not found.modules and found.notes


def test_files(place: Path, tmp_path: Path) -> None:
    for n in "ab":
        d = Draft.read(place / "lora").write(tmp_path / n)
        (d / "README.md").write_text(n)
        (d / f"{n}.txt").write_text("x")
        (d / "same.txt").write_text("x")
    (tmp_path / "b" / "optimizer.pt").write_bytes(b"123")
    found = adapterpack.diff(tmp_path / "a", tmp_path / "b")
    assert [(f.name, f.kind, f.bytes_a, f.bytes_b) for f in found.files] == [
        ("README.md", "changed", 1, 1),
        ("a.txt", "removed", 1, None),
        ("b.txt", "added", None, 1),
        ("optimizer.pt", "added", None, 3),
    ]


def test_the_base_must_be_the_right_one(place: Path) -> None:
    with pytest.raises(adapterpack.AdapterpackError, match="lacks"):
        adapterpack.diff(place / "lora", place / "lora", base=place / "other")


def _run(*args: Any) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in args])


def test_the_command_line(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"])
    oracle.make_adapter(tmp_path / "a", config, num_hidden_layers=8, scale=0.5)
    d = Draft.read(tmp_path / "a")
    d.tensors = {k: t * 1.5 for k, t in d.tensors.items()}
    d.config |= {"lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}
    d.write(tmp_path / "b")
    done = _run("diff", tmp_path / "a", tmp_path / "b")
    assert done.exit_code == 0, done.output
    assert "lora_alpha" in done.stdout and "8 -> 3" in done.stdout and "-k_proj +v_proj" in done.stdout
    assert "... and 22 more" in done.stdout and "... and 6 more" in done.stdout
    whole = _run("diff", tmp_path / "a", tmp_path / "b", "--all")
    assert "more" not in whole.stdout and whole.stdout.count("lora_A") == 16
    said = json.loads(_run("diff", tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert said["schema"] == "adapterpack.diff/1" and not said["same"] and len(said["modules"]) == 16
    assert _run("diff", tmp_path / "a", tmp_path / "b", "-q").stdout == ""
    assert "nothing differs" in _run("diff", tmp_path / "a", tmp_path / "a").stdout
    assert _run("diff", tmp_path / "a", tmp_path / "none").exit_code == 1
    assert "exit code is 0" in " ".join(_run("diff", "--help").stdout.split())
