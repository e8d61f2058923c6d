"""LoHa merges are PEFT's `merge_and_unload`, bit for bit."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
from bitexact import assert_merges_like_peft
from peft import LoHaConfig

import adapterpack

_QKU = ["q_proj", "k_proj", "up_proj", "down_proj"]


def _loha(**fields):
    return lambda: LoHaConfig(**{"r": 3, "alpha": 7, **fields})


CASES = (
    cases.Case("loha-llama", _loha(target_modules=_QKU)),
    cases.Case("loha-patterns", _loha(target_modules=_QKU, rank_pattern={"k_proj": 2}, alpha_pattern={"up_proj": 5})),
    cases.Case("loha-effective-conv2d", _loha(target_modules=["convolution"], use_effective_conv2d=True), "resnet"),
    cases.Case("loha-conv2d", _loha(target_modules=["convolution"]), "resnet"),
    cases.Case("loha-conv1d", _loha(target_modules=["conv1", "conv2"], use_effective_conv2d=True), "whisper"),
)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


def test_its_lora_computes_the_same(workshop, tmp_path: Path) -> None:
    adapter = workshop.adapter(CASES[1])
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora")
    assert str(made.grade) == "equivalent"
    assert made.max_rel_error < 1e-6
    assert {int(r) for r in adapterpack.inspect(tmp_path / "lora").ranks} == {4, 9}
