"""MiSS in its three modes is merged as PEFT does it, bit for bit; Bone is the same under older names."""

from __future__ import annotations

import json
from pathlib import Path

import cases
import pytest
import torch
from bitexact import assert_merges_like_peft, codes
from peft import MissConfig
from safetensors.torch import save_file

import adapterpack
from adapterpack.errors import InvalidFile, LossRefused, Unsupported, WrongBase

_QKU = ["q_proj", "k_proj", "up_proj", "down_proj"]


def _miss(**fields):
    return lambda: MissConfig(**{"r": 4, "target_modules": _QKU, **fields})


CASES = (
    cases.Case("miss-standard", _miss()),
    # Shards that do not fill the inputs.
    cases.Case("miss-remainder", _miss(r=12)),
    cases.Case("miss-random", _miss(init_weights=False)),
    cases.Case("miss-mini", _miss(init_weights="mini", mini_r=8)),
    cases.Case("miss-mini-narrow", _miss(init_weights="mini", mini_r=2, r=6)),
    cases.Case("miss-bat", _miss(init_weights="bat", r=8)),
    cases.Case("miss-opt-bias-all", _miss(target_modules=["q_proj", "fc1", "project_in"], bias="all"), "opt"),
    cases.Case("miss-bert-bat", _miss(target_modules=["query", "intermediate.dense"], init_weights="bat"), "bert"),
)
_BY_NAME = {c.name: c for c in CASES}
_ADDED = [c for c in CASES if "bat" not in c.name]
_Q = "base_model.model.model.layers.0.self_attn.q_proj.miss_block"


def _as_bone(adapter: Path, where: Path, files) -> Path:
    """The same adapter as PEFT 0.18 wrote it."""
    where.mkdir()
    tensors = {k.replace(".miss_block", ".bone_block"): t for k, t in files.tensors(adapter).items()}
    save_file(tensors, where / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in files.config(adapter).items() if k not in ("mini_r", "miss_dropout")}
    (where / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "BONE"}))
    return where


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("case", _ADDED, ids=str)
def test_its_lora_is_exact_and_peft_loads_it(case, workshop, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base)
    assert str(made.grade) == "equivalent"
    assert made.max_rel_error == 0
    expected, plain = workshop.peft_merge(base, adapter), workshop.peft_merge(base, tmp_path / "lora")
    assert plain.load.clean
    # Each sum has one term that is not zero.
    assert all(torch.equal(plain[k], expected[k]) for k in expected)


def test_mini_has_the_lesser_of_its_two_ranks(workshop, tmp_path: Path) -> None:
    for name, rank in (("miss-mini", 4), ("miss-mini-narrow", 2)):
        case = _BY_NAME[name]
        adapterpack.convert(workshop.adapter(case), tmp_path / name, to="lora", base=workshop.base_of(case))
        assert {int(r) for r in adapterpack.inspect(tmp_path / name).ranks} == {rank}


def test_its_lora_takes_the_shapes_of_a_base(workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(_BY_NAME["miss-standard"])
    lost = files.edited(adapter, tmp_path / "lost", config={"base_model_name_or_path": None})
    with pytest.raises(WrongBase, match="needs the shapes"):
        adapterpack.convert(lost, tmp_path / "lora", to="lora")


def test_bat_is_no_lora(workshop, tmp_path: Path) -> None:
    case = _BY_NAME["miss-bat"]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    with pytest.raises(LossRefused):
        adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base)
    near = adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base, rank=64)
    assert near.max_rel_error < 1e-5


@pytest.mark.parametrize("name", ["miss-standard", "miss-mini", "miss-bat"])
def test_a_moved_parameter_is_found_and_the_merge_is_equal(name, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME[name]), workshop.base_of(_BY_NAME[name])
    moved = files.edited(adapter, tmp_path / "moved", {_Q: files.tensors(adapter)[_Q] * 1.01})
    for where in (None, base):
        found = adapterpack.verify(adapter, moved, base=where)
        assert not found.equal and found.modules[0].name == "model.layers.0.self_attn.q_proj.weight"
        assert adapterpack.verify(adapter, adapter, base=where).equal
    adapterpack.merge(adapter, base, tmp_path / "merged")
    assert adapterpack.verify(adapter, tmp_path / "merged", base=base).equal
    assert not adapterpack.verify(moved, tmp_path / "merged", base=base).equal


def test_it_is_compared_with_its_lora_without_a_base(workshop, tmp_path: Path) -> None:
    case = _BY_NAME["miss-remainder"]
    adapterpack.convert(workshop.adapter(case), tmp_path / "lora", to="lora", base=workshop.base_of(case))
    assert adapterpack.verify(workshop.adapter(case), tmp_path / "lora").equal
    assert adapterpack.verify(tmp_path / "lora", workshop.adapter(case)).equal


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("miss-standard", (4,), r"is not \(r, out\)"),
        ("miss-standard", (0, 64), r"is not \(r, out\)"),
        ("miss-bat", (4, 64), r"is not \(out / r, r, r\)"),
        ("miss-bat", (8, 8, 4), r"is not \(out / r, r, r\)"),
    ],
)
def test_broken_shapes_are_refused(name, shape, message, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME[name]), workshop.base_of(_BY_NAME[name])
    broken = files.edited(adapter, tmp_path / "broken", {_Q: torch.ones(shape)})
    with pytest.raises(InvalidFile, match=message):
        adapterpack.merge(broken, base, tmp_path / "merged")
    assert "half-pair" in codes(adapterpack.check(broken))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("miss-standard", (65, 64)), ("miss-standard", (4, 63)), ("miss-mini", (4, 7)), ("miss-bat", (9, 7, 7))],
)
def test_blocks_that_do_not_fit_the_base_are_refused(name, shape, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME[name]), workshop.base_of(_BY_NAME[name])
    other = files.edited(adapter, tmp_path / "other", {_Q: torch.ones(shape)})
    with pytest.raises(WrongBase):
        adapterpack.merge(other, base, tmp_path / "merged")


def test_modes_and_ranks_that_the_config_tells_otherwise(workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(_BY_NAME["miss-mini"])
    with pytest.raises(Unsupported, match="init_weights='maxi' is unknown"):
        adapterpack.merge(
            files.edited(adapter, tmp_path / "maxi", config={"init_weights": "maxi"}),
            workshop.base_of(_BY_NAME["miss-mini"]),
            tmp_path / "merged",
        )
    for n, config in enumerate(({"mini_r": 4}, {"r": 5})):
        found = adapterpack.check(files.edited(adapter, tmp_path / f"lying{n}", config=config))
        assert codes(found) == {"rank-mismatch"}


# -- Bone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", ["miss-standard", "miss-remainder"])
def test_bone_is_merged_as_miss(name, dtype, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME[name], dtype), workshop.base_of(_BY_NAME[name], dtype)
    bone = _as_bone(adapter, tmp_path / "bone", files)
    expected = workshop.peft_merge(base, adapter)
    adapterpack.merge(bone, base, tmp_path / "merged", verify="full")
    assert all(files.same(t, expected[k]) for k, t in files.tensors(tmp_path / "merged").items())


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_bat_of_bone_rounds_what_it_adds(dtype, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME["miss-bat"], dtype), workshop.base_of(_BY_NAME["miss-bat"], dtype)
    bone = _as_bone(adapter, tmp_path / "bone", files)
    adapterpack.merge(bone, base, tmp_path / "merged", verify="full")
    block, w = files.tensors(adapter)[_Q], files.tensors(base)["model.layers.0.self_attn.q_proj.weight"]
    added = torch.empty(w.shape)
    for i in range(0, w.shape[0], 8):
        for j in range(0, w.shape[1], 8):
            piece = w[i : i + 8, j : j + 8].float()
            added[i : i + 8, j : j + 8] = piece @ block[i // 8] + block[i // 8]
    ours = files.tensors(tmp_path / "merged")["model.layers.0.self_attn.q_proj.weight"]
    assert files.same(ours, w + added.to(w.dtype))
    miss = workshop.peft_merge(base, adapter)["model.layers.0.self_attn.q_proj.weight"]
    assert (dtype == "f32") == files.same(ours, miss)


@pytest.mark.parametrize("name", ["miss-standard", "miss-bat"])
def test_bone_becomes_miss_that_peft_loads(name, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME[name]), workshop.base_of(_BY_NAME[name])
    bone = _as_bone(adapter, tmp_path / "bone", files)
    made = adapterpack.convert(bone, tmp_path / "miss", to="miss")
    assert (str(made.grade), made.max_rel_error) == ("equivalent", 0)
    expected, plain = workshop.peft_merge(base, adapter), workshop.peft_merge(base, tmp_path / "miss")
    assert plain.load.clean
    assert all(torch.equal(plain[k], expected[k]) for k in expected)
    assert files.config(tmp_path / "miss")["peft_type"] == "MISS"


def test_bone_becomes_lora_and_check_says_that_peft_lost_it(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME["miss-standard"]), workshop.base_of(_BY_NAME["miss-standard"])
    bone = _as_bone(adapter, tmp_path / "bone", files)
    assert adapterpack.convert(bone, tmp_path / "lora", to="lora", base=base).max_rel_error == 0
    health = adapterpack.check(bone)
    assert health.healthy and codes(health) == {"removed-from-peft"}
    with pytest.raises(Unsupported, match="init_weights='mini' is unknown"):
        mini = files.edited(bone, tmp_path / "mini", config={"init_weights": "mini"})
        adapterpack.convert(mini, tmp_path / "no", to="miss")
