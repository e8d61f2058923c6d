"""LoRA merges are PEFT's `merge_and_unload`, bit for bit."""

from __future__ import annotations

from pathlib import Path

import cases
import oracle
import pytest
from bitexact import assert_merges_like_peft

import adapterpack


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", cases.LORA, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("case", cases.NARROW_LORA, ids=str)
def test_merge_of_a_16_bit_file_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(case, dtype)
    assert {t.dtype for t in files.tensors(adapter).values()} == {cases.DTYPES[dtype]}
    assert_merges_like_peft(workshop, files, adapter, workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("case", cases.NARROW_LORA[:2], ids=str)
def test_16_bit_file_merges_into_a_float32_base(case, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, "bf16"), workshop.base_of(case, "f32"), tmp_path)


def test_the_flag_of_the_mixed_model_lies_for_some_layer(workshop, files) -> None:
    """What makes the case worth having: one saved flag for Conv1D and Linear layers alike."""
    case = cases.BY_NAME["conv1d-and-square-linear"]
    flag = files.config(workshop.adapter(case))["fan_in_fan_out"]
    tensors = files.tensors(workshop.base_of(case))
    assert tensors["lm_head.weight"].shape == (64, 64)
    assert tensors["transformer.h.0.attn.c_proj.weight"].shape == (64, 64)
    assert flag in (True, False)


@pytest.mark.parametrize("flag", [True, False])
def test_orientation_comes_from_the_base_and_not_from_the_flag(flag, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("conv1d-and-square-linear")
    edited = files.edited(adapter, tmp_path / "a", config={"fan_in_fan_out": flag})
    expected = workshop.peft_merge(base, adapter)
    adapterpack.merge(edited, base, tmp_path / "m")
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[k]) for k in merged)


def test_patterns_of_the_case_really_overlap(workshop, files) -> None:
    """Written {q_proj: 50, self_attn.q_proj: 3}, saved sorted: the other one wins after loading."""
    adapter, _ = workshop.pair("patterns-that-overlap")
    assert list(files.config(adapter)["alpha_pattern"])[1:] == ["q_proj", "self_attn.q_proj"]


def test_several_adapters_merge_one_after_the_other(workshop, files, tmp_path: Path) -> None:
    one, base = workshop.pair("linear-llama")
    two = workshop.pair("rslora")[0]
    adapterpack.merge([one, two], base, tmp_path / "both")
    adapterpack.merge(one, base, tmp_path / "first")
    expected = oracle.peft_merge(tmp_path / "first", two)
    merged = files.tensors(tmp_path / "both")
    assert all(files.same(merged[k], expected[k]) for k in merged)


def test_a_weight_scales_the_change(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    alpha = files.config(adapter)["lora_alpha"]
    half = files.edited(adapter, tmp_path / "half", config={"lora_alpha": alpha / 2})
    adapterpack.merge(adapter, base, tmp_path / "m", weights=[0.5])
    expected = workshop.peft_merge(base, half)
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[k]) for k in merged)
