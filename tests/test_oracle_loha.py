"""LoHa merges are PEFT's `merge_and_unload`, bit for bit."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from bitexact import assert_merges_like_peft, codes
from peft import LoHaConfig

import adapterpack
from adapterpack.errors import InvalidFile

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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_peft_loads_its_lora_and_merges_the_same(case, workshop, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base)
    assert str(made.grade) == "equivalent"
    assert made.max_rel_error < 1e-6
    expected, plain = workshop.peft_merge(base, adapter), workshop.peft_merge(base, tmp_path / "lora")
    assert plain.load.clean
    assert all(
        float((plain[k] - expected[k]).abs().max()) < 1e-5 for k in expected if expected[k].is_floating_point()
    )


def test_a_moved_parameter_is_found_and_the_merge_is_equal(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(CASES[0]), workshop.base_of(CASES[0])
    key = "base_model.model.model.layers.0.self_attn.q_proj.hada_w2_a"
    moved = files.edited(adapter, tmp_path / "moved", {key: files.tensors(adapter)[key] * 1.01})
    found = adapterpack.verify(adapter, moved)
    assert not found.equal and found.modules[0].name == "model.layers.0.self_attn.q_proj.weight"
    adapterpack.merge(adapter, base, tmp_path / "merged", weights=[0.5])
    assert adapterpack.verify(adapter, tmp_path / "merged", base=base).equal


_MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hada_w2_a": None}, "lacks w2_a"),
        ({"hada_w2_b": (2, 64)}, "do not fit together"),
        ({"hada_w1_a": (64,)}, "do not fit together"),
        ({"hada_t1": (3, 3, 1, 1)}, "lacks t2"),
        ({"hada_t1": (3, 3, 1), "hada_t2": (3, 3, 1)}, "do not fit together"),
        (
            {f"hada_w{n}": s for n, s in (("1_a", (64, 0)), ("1_b", (0, 64)), ("2_a", (64, 0)), ("2_b", (0, 64)))},
            "fit",
        ),
    ],
)
def test_broken_shapes_are_refused(change, message, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(CASES[0]), workshop.base_of(CASES[0])
    edited = {f"{_MODULE}.{n}": None if s is None else torch.ones(s) for n, s in change.items()}
    broken = files.edited(adapter, tmp_path / "broken", edited)
    with pytest.raises(InvalidFile, match=message):
        adapterpack.merge(broken, base, tmp_path / "merged")
    assert "half-pair" in codes(adapterpack.check(broken))


def test_another_rank_in_the_config_is_found(workshop, files, tmp_path: Path) -> None:
    lying = files.edited(workshop.adapter(CASES[0]), tmp_path / "lying", config={"r": 4})
    assert codes(adapterpack.check(lying)) == {"rank-mismatch"}
