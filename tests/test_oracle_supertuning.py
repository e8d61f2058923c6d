"""Supertuning merges are PEFT's `merge_and_unload`, bit for bit, with its indices in the file and without them."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from bitexact import assert_merges_like_peft, codes
from peft import SupertuningConfig

import adapterpack
from adapterpack.errors import InvalidFile, WrongBase

_QKU = ["q_proj", "k_proj", "up_proj", "down_proj"]


def _super(**fields):
    return lambda: SupertuningConfig(**{"sparsity": 0.9, "target_modules": _QKU, **fields})


CASES = (
    cases.Case("super-llama", _super()),
    cases.Case("super-smallest", _super(select_top=False)),
    cases.Case("super-all", _super(sparsity=0.0, target_modules=["k_proj"])),
    cases.Case("supra", _super(r=3, init_weights=False)),
    cases.Case("supra-alpha", _super(r=3, lora_alpha=2.5, init_weights=False)),
    cases.Case("supra-opt", _super(r=2, init_weights=False, target_modules=["q_proj", "fc1", "project_in"]), "opt"),
    cases.Case("super-unsaved", _super(save_precomputed_indices=False)),
    cases.Case("supra-unsaved-smallest", _super(save_precomputed_indices=False, r=2, select_top=False)),
    cases.Case("super-modules-to-save", _super(modules_to_save=["lm_head"])),
)
_BY_NAME = {c.name: c for c in CASES}
_Q = "base_model.model.model.layers.0.self_attn.q_proj"
_W = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_values_of_one_weight_add_up(dtype, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME["supra"], dtype), workshop.base_of(_BY_NAME["supra"], dtype)
    indices = files.tensors(adapter)[f"{_Q}.supertuning_indices"].clone()
    indices[1::2] = indices[::2][: len(indices[1::2])]
    twice = files.edited(adapter, tmp_path / "twice", {f"{_Q}.supertuning_indices": indices})
    assert_merges_like_peft(workshop, files, twice, base, tmp_path)
    health = adapterpack.check(twice, base=base)
    assert health.healthy and codes(health) == {"duplicate-index"}


@pytest.mark.parametrize("name", ["super-llama", "supra"])
def test_a_moved_parameter_is_found_and_the_merge_is_equal(name, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME[name]), workshop.base_of(_BY_NAME[name])
    for n, parameter in enumerate(["supertuning_values", "supertuning_lora_B.weight"][: 2 if name == "supra" else 1]):
        key = f"{_Q}.{parameter}"
        moved = files.edited(adapter, tmp_path / f"moved{n}", {key: files.tensors(adapter)[key] * 1.01})
        for where in (None, base):
            found = adapterpack.verify(adapter, moved, base=where)
            assert not found.equal and found.modules[0].name == _W
            assert adapterpack.verify(adapter, adapter, base=where).equal
    adapterpack.merge(adapter, base, tmp_path / "merged")
    assert adapterpack.verify(adapter, tmp_path / "merged", base=base).equal
    assert not adapterpack.verify(moved, tmp_path / "merged", base=base).equal


def test_a_weight_of_the_user_scales_it(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME["supra"]), workshop.base_of(_BY_NAME["supra"])
    for weight in (1.0, 0.5):
        adapterpack.merge(adapter, base, tmp_path / str(weight), weights=[weight])
    whole, half = (files.tensors(tmp_path / name)[_W].double() for name in ("1.0", "0.5"))
    w = files.tensors(base)[_W].double()
    assert float(((half - w) * 2 - (whole - w)).abs().max()) < 1e-6


def test_indices_that_were_not_saved_are_found_in_the_base(workshop, files, tmp_path: Path) -> None:
    case = _BY_NAME["super-unsaved"]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    assert codes(adapterpack.check(adapter)) == {"unsaved-indices"}
    made = adapterpack.convert(adapter, tmp_path / "indices", to="indices", base=base)
    assert (str(made.grade), made.max_rel_error) == ("equivalent", 0)
    expected, ours = workshop.peft_merge(base, adapter), workshop.peft_merge(base, tmp_path / "indices")
    assert ours.load.clean
    assert all(torch.equal(ours[k], expected[k]) for k in expected)
    saved = workshop.adapter(_BY_NAME["super-llama"])
    key = f"{_Q}.supertuning_indices"
    assert files.same(files.tensors(tmp_path / "indices")[key], files.tensors(saved)[key])


def test_indices_take_the_weights_of_a_base(workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(_BY_NAME["super-unsaved"])
    lost = files.edited(adapter, tmp_path / "lost", config={"base_model_name_or_path": None})
    with pytest.raises(WrongBase, match="largest weights"):
        adapterpack.convert(lost, tmp_path / "indices", to="indices")


_I32 = torch.int32


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("super-llama", {"supertuning_values": None}, "lacks values"),
        ("super-llama", {"supertuning_values": torch.ones(2, 2)}, "no vector"),
        ("super-llama", {"supertuning_indices": torch.ones(3, dtype=_I32)}, "whole numbers"),
        ("super-llama", {"supertuning_indices": torch.ones(409)}, "whole numbers"),
        ("super-llama", {"supertuning_lora_A.weight": torch.ones(3, 64)}, "r in adapter_config.json is null"),
        ("supra", {"supertuning_lora_B.weight": None}, "lacks B"),
        ("supra", {"supertuning_lora_B.weight": torch.ones(64, 2)}, "are not"),
    ],
)
def test_broken_shapes_are_refused(name, change, message, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME[name]), workshop.base_of(_BY_NAME[name])
    broken = files.edited(adapter, tmp_path / "broken", {f"{_Q}.{n}": t for n, t in change.items()})
    with pytest.raises(InvalidFile, match=message):
        adapterpack.merge(broken, base, tmp_path / "merged")
    assert "half-pair" in codes(adapterpack.check(broken))


@pytest.mark.parametrize("index", [-1, 64 * 64, 2**31 - 1])
def test_an_index_beyond_the_weight_is_refused(index, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME["super-llama"]), workshop.base_of(_BY_NAME["super-llama"])
    indices = files.tensors(adapter)[f"{_Q}.supertuning_indices"].clone()
    indices[3] = index
    broken = files.edited(adapter, tmp_path / "broken", {f"{_Q}.supertuning_indices": indices})
    with pytest.raises(InvalidFile, match="indices beyond"):
        adapterpack.merge(broken, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert "index-out-of-range" in codes(adapterpack.check(broken, base=base))


def test_indices_that_peft_would_ignore_are_refused(workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(_BY_NAME["super-llama"])
    lying = files.edited(adapter, tmp_path / "lying", config={"save_precomputed_indices": False})
    with pytest.raises(InvalidFile, match="save_precomputed_indices is false"):
        adapterpack.merge(lying, workshop.base_of(_BY_NAME["super-llama"]), tmp_path / "merged")
    assert "wrong-index-flag" in codes(adapterpack.check(lying))
    some = files.edited(adapter, tmp_path / "some", {f"{_Q}.supertuning_indices": None})
    with pytest.raises(InvalidFile, match="lacks indices"):
        adapterpack.merge(some, workshop.base_of(_BY_NAME["super-llama"]), tmp_path / "merged")


def test_more_values_than_the_weight_has_are_refused(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME["super-unsaved"]), workshop.base_of(_BY_NAME["super-unsaved"])
    many = files.edited(adapter, tmp_path / "many", {f"{_Q}.supertuning_values": torch.ones(5000)})
    with pytest.raises(WrongBase, match="5000 values"):
        adapterpack.merge(many, base, tmp_path / "merged")
