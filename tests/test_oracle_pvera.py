"""PVeRA merges are PEFT's `merge_and_unload`, bit for bit, from stored projections and from the seed alone."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
from bitexact import assert_merges_like_peft
from peft import PveraConfig

import adapterpack
from adapterpack.errors import LossRefused


def _pvera(save=True, **fields):
    return lambda: PveraConfig(
        **{"r": 8, "save_projection": save, "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"], **fields}
    )


CASES = tuple(
    case
    for save in (True, False)
    for word in ("pvera-projection" if save else "pvera-seed",)
    for case in (
        cases.Case(f"{word}-mixed", _pvera(save)),
        cases.Case(f"{word}-key", _pvera(save, projection_prng_key=2**32 + 77, sample_at_inference=True)),
        cases.Case(f"{word}-conv1d", _pvera(save, target_modules=["c_attn", "c_proj"]), "gpt2"),
        cases.Case(f"{word}-opt", _pvera(save, target_modules=["q_proj", "fc1", "project_in"], r=6), "opt"),
        cases.Case(f"{word}-bias-all", _pvera(save, bias="all", target_modules=["q_proj", "fc1"]), "opt"),
        cases.Case(f"{word}-modules-to-save", _pvera(save, modules_to_save=["lm_head"])),
    )
)
NARROW = cases.Case("pvera-narrow", _pvera(), autocast=False)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_merge_of_a_16_bit_file_is_peft_bit_for_bit(dtype, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(NARROW, dtype), workshop.base_of(NARROW, dtype)
    assert_merges_like_peft(workshop, files, adapter, base, tmp_path)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_projections_go_and_come_back(dtype, workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(CASES[1], dtype)
    gone = adapterpack.convert(adapter, tmp_path / "seed", to="seed")
    assert str(gone.grade) == "lossless"
    assert not any("pvera_A" in key for key in files.tensors(tmp_path / "seed"))
    back = adapterpack.convert(tmp_path / "seed", tmp_path / "back", to="projection")
    assert str(back.grade) == "lossless"
    before, after = files.tensors(adapter), files.tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(files.same(before[key], after[key]) for key in before)


def test_projections_of_another_seed_stay(workshop, files, tmp_path: Path) -> None:
    other = files.edited(workshop.adapter(CASES[0]), tmp_path / "other", config={"projection_prng_key": 5})
    with pytest.raises(LossRefused, match="no recipe gives the stored projections"):
        adapterpack.convert(other, tmp_path / "seed", to="seed")


def test_its_lora_is_the_mean_and_says_so(workshop, files, tmp_path: Path) -> None:
    case = CASES[1]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base)
    assert str(made.grade) == "equivalent"
    assert made.max_rel_error == 0
    assert any("the result is the mean" in note for note in made.notes)
    assert set(adapterpack.inspect(tmp_path / "lora").ranks) == {8}
    ours, theirs = workshop.peft_merge(base, tmp_path / "lora"), workshop.peft_merge(base, adapter)
    assert all(files.same(ours[key], theirs[key]) for key in theirs)


def test_half_a_lambda_is_refused(workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(CASES[0])
    key = next(k for k in files.tensors(adapter) if k.endswith("pvera_lambda_d"))
    odd = files.edited(adapter, tmp_path / "odd", {key: files.tensors(adapter)[key][:7]})
    assert any(f.code == "half-pair" and "two halves" in f.message for f in adapterpack.check(odd).findings)
    with pytest.raises(adapterpack.AdapterpackError, match="two halves"):
        adapterpack.merge(odd, workshop.base_of(CASES[0]), tmp_path / "m")
