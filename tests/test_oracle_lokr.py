"""LoKr merges are PEFT's `merge_and_unload`, bit for bit, in each of its forms."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from bitexact import assert_merges_like_peft, codes
from peft import LoKrConfig

import adapterpack
from adapterpack.errors import InvalidFile, Unsupported

_QKU = ["q_proj", "k_proj", "up_proj", "down_proj"]


def _lokr(**fields):
    return lambda: LoKrConfig(**{"r": 2, "alpha": 7, "init_weights": False, **fields})


CASES = (
    # w1 whole, w2 a product: the default.
    cases.Case("lokr-llama", _lokr(target_modules=_QKU)),
    cases.Case("lokr-both", _lokr(target_modules=_QKU, decompose_both=True)),
    cases.Case("lokr-factor", _lokr(target_modules=_QKU, decompose_factor=4, decompose_both=True)),
    # Both whole: only the config knows r.
    cases.Case("lokr-whole", _lokr(target_modules=_QKU, r=100)),
    cases.Case(
        "lokr-patterns",
        _lokr(target_modules=_QKU, rank_pattern={"k_proj": 3, "q_proj": 60}, alpha_pattern={"up_proj": 5}),
    ),
    cases.Case("lokr-opt", _lokr(target_modules=["q_proj", "fc1", "project_in"]), "opt"),
    cases.Case("lokr-conv2d", _lokr(target_modules=["convolution"], r=1), "resnet"),
    cases.Case(
        "lokr-effective-conv2d", _lokr(target_modules=["convolution"], r=1, use_effective_conv2d=True), "resnet"
    ),
    cases.Case("lokr-whole-conv2d", _lokr(target_modules=["convolution"], r=30), "resnet"),
    cases.Case("lokr-conv1d", _lokr(target_modules=["conv1", "conv2"], r=1), "whisper"),
    cases.Case("lokr-effective-conv1d", _lokr(target_modules=["conv1"], use_effective_conv2d=True), "whisper"),
    # PEFT spreads this kernel in another order than the others.
    cases.Case("lokr-whole-conv1d", _lokr(target_modules=["conv1", "conv2"], r=30), "whisper"),
)
_BY_NAME = {c.name: c for c in CASES}


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "lokr-whole-conv1d"], ids=str)
def test_its_lora_computes_the_same_and_peft_loads_it(case, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base)
    assert str(made.grade) == "equivalent"
    assert made.max_rel_error < 1e-6
    expected, plain = workshop.peft_merge(base, adapter), workshop.peft_merge(base, tmp_path / "lora")
    assert plain.load.clean
    assert all(
        float((plain[k] - expected[k]).abs().max()) < 1e-5 for k in expected if expected[k].is_floating_point()
    )


def test_a_kernel_that_peft_cannot_spread_is_merged(workshop, files, tmp_path: Path) -> None:
    # Rank 1 in one dimension: torch's kron fails on the strides that PEFT hands it.
    case = cases.Case("lokr-rank-1", _lokr(r=1, target_modules=["conv1"], use_effective_conv2d=True), "whisper")
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    with pytest.raises(RuntimeError, match="view size"):
        workshop.peft_merge(base, adapter)
    adapterpack.merge(adapter, base, tmp_path / "merged", verify="full")
    adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base)
    plain, ours = workshop.peft_merge(base, tmp_path / "lora"), files.tensors(tmp_path / "merged")
    assert float((plain["encoder.conv1.weight"] - ours["encoder.conv1.weight"]).abs().max()) < 1e-6


def test_a_moved_parameter_is_found_and_the_merge_is_equal(workshop, files, tmp_path: Path) -> None:
    case = _BY_NAME["lokr-llama"]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lokr_w1"
    moved = files.edited(adapter, tmp_path / "moved", {key: files.tensors(adapter)[key] * 1.01})
    found = adapterpack.verify(adapter, moved)
    assert not found.equal and found.modules[0].name == "model.layers.0.self_attn.q_proj.weight"
    adapterpack.merge(adapter, base, tmp_path / "merged")
    assert adapterpack.verify(adapter, tmp_path / "merged", base=base).equal


def test_a_whole_kernel_of_one_dimension_has_no_small_lora(workshop, tmp_path: Path) -> None:
    case = _BY_NAME["lokr-whole-conv1d"]
    with pytest.raises(Unsupported, match="no exact low-rank form"):
        adapterpack.convert(workshop.adapter(case), tmp_path / "lora", to="lora", base=workshop.base_of(case))


_MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lokr_w2_a": None}, "lacks w2_a"),
        ({"lokr_w1": None}, "lacks w1"),
        ({"lokr_w2_b": (3, 8)}, "do not fit together"),
        ({"lokr_w1": (8,)}, "do not fit together|no matrix"),
        ({"lokr_w1": (2, 2, 2, 2, 2)}, "no matrix"),
        ({"lokr_w2": (8, 8)}, "whole and as"),
        ({"lokr_w2_a": (8, 0), "lokr_w2_b": (0, 8)}, "do not fit together"),
    ],
)
def test_broken_shapes_are_refused(change, message, workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(_BY_NAME["lokr-llama"])
    edited = {f"{_MODULE}.{n}": None if s is None else torch.ones(s) for n, s in change.items()}
    broken = files.edited(adapter, tmp_path / "broken", edited)
    with pytest.raises(InvalidFile, match=message):
        adapterpack.merge(broken, workshop.base_of(_BY_NAME["lokr-llama"]), tmp_path / "merged")
    assert "half-pair" in codes(adapterpack.check(broken))


def test_another_rank_in_the_config_is_found(workshop, files, tmp_path: Path) -> None:
    lying = files.edited(workshop.adapter(_BY_NAME["lokr-llama"]), tmp_path / "lying", config={"r": 3})
    assert codes(adapterpack.check(lying)) == {"rank-mismatch"}


def test_a_rank_beyond_all_matrices_asks_for_whole_ones(workshop, files, tmp_path: Path) -> None:
    case = _BY_NAME["lokr-whole"]
    whole = files.edited(workshop.adapter(case), tmp_path / "whole", config={"r": 100_000, "alpha": 100_000})
    assert adapterpack.check(whole, base=workshop.base_of(case)).healthy
    expected = workshop.peft_merge(workshop.base_of(case), whole)
    adapterpack.merge(whole, workshop.base_of(case), tmp_path / "merged", verify="full")
    assert all(files.same(t, expected[k]) for k, t in files.tensors(tmp_path / "merged").items())
