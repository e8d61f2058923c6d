"""LoRA and DoRA on convolutions: merged as PEFT does it, bit for bit; groups are refused, as PEFT refuses them."""

from __future__ import annotations

from pathlib import Path

import cases
import oracle
import pytest
import torch
from bitexact import assert_merges_like_peft
from peft import LoraConfig

import adapterpack
from adapterpack.errors import InvalidFile, Unsupported

ALL = ["convolution"]
CONVOLUTIONS = (
    cases.Case("convolution-2d", cases.lora(target_modules=ALL), "resnet"),
    cases.Case("convolution-2d-rslora", cases.lora(use_rslora=True, target_modules=ALL), "resnet"),
    cases.Case(
        "convolution-2d-patterns",
        cases.lora(
            rank_pattern={r"layer\.1\.convolution": 3}, alpha_pattern={"embedder.convolution": 5}, target_modules=ALL
        ),
        "resnet",
    ),
    cases.Case("convolution-2d-dora", cases.lora(use_dora=True, target_modules=ALL), "resnet"),
    cases.Case("convolution-2d-dora-wide", cases.lora(use_dora=True, r=32, target_modules=ALL), "resnet"),
    cases.Case("convolution-1d", cases.lora(target_modules=["conv1", "conv2", "q_proj"]), "whisper"),
    cases.Case("convolution-1d-dora", cases.lora(use_dora=True, target_modules=["conv1", "conv2", "fc1"]), "whisper"),
    cases.Case("convolution-1d-bias", cases.lora(lora_bias=True, target_modules=["conv1", "conv2"]), "whisper"),
    cases.Case("convolution-1d-bias-all", cases.lora(bias="all", target_modules=["conv1"]), "whisper"),
    cases.Case("convolution-1d-saved", cases.lora(target_modules=["conv1"], modules_to_save=["conv2"]), "whisper"),
    cases.Case("convolution-3d", cases.lora(target_modules=["projection"]), "videomae"),
    cases.Case("convolution-3d-dora", cases.lora(use_dora=True, target_modules=["projection", "fc2"]), "videomae"),
)
# Wide enough for the kernels of other shapes, and for a rank beyond which libraries sum in another order.
LARGE = (
    cases.Case(
        "convolution-2d-large",
        cases.lora(r=16, target_modules=ALL),
        "resnet",
        over={"embedding_size": 64, "hidden_sizes": [256, 320], "layer_type": "basic"},
    ),
    cases.Case(
        "convolution-2d-large-dora",
        cases.lora(r=16, use_dora=True, target_modules=ALL),
        "resnet",
        over={"embedding_size": 64, "hidden_sizes": [256, 320], "layer_type": "basic"},
    ),
    cases.Case(
        "convolution-1d-rank-400", cases.lora(r=400, target_modules=["conv2"]), "whisper", over={"d_model": 192}
    ),
)
NARROW = cases.Case("convolution-2d-narrow", cases.lora(use_dora=True, target_modules=ALL), "resnet", autocast=False)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", [*CONVOLUTIONS, *LARGE], ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_16_bit_file_is_peft_bit_for_bit(dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(
        workshop, files, workshop.adapter(NARROW, dtype), workshop.base_of(NARROW, dtype), tmp_path
    )


@pytest.mark.parametrize("name", ["convolution-2d", "convolution-2d-dora", "convolution-3d"])
def test_rounding_once_is_within_the_rounding_of_the_dtype(name, workshop, tmp_path: Path) -> None:
    case = next(c for c in CONVOLUTIONS if c.name == name)
    adapter, base = workshop.adapter(case, "bf16"), workshop.base_of(case, "bf16")
    adapterpack.merge(adapter, base, tmp_path / "m", rounding="once", verify="full")
    result = adapterpack.verify(adapter, tmp_path / "m", base=base, device="cpu")
    assert result.equal, result.findings


def test_a_weight_scales_the_change(workshop, files, tmp_path: Path) -> None:
    case = CONVOLUTIONS[0]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    half = files.edited(adapter, tmp_path / "half", config={"lora_alpha": files.config(adapter)["lora_alpha"] / 2})
    expected = workshop.peft_merge(base, half)
    adapterpack.merge(adapter, base, tmp_path / "m", weights=[0.5])
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[k]) for k in merged)
    dora = workshop.adapter(CONVOLUTIONS[3])
    with pytest.raises(Unsupported, match="weight"):
        adapterpack.merge(dora, base, tmp_path / "n", weights=[0.5])


def test_a_planted_fault_is_found(workshop, files, tmp_path: Path) -> None:
    case = CONVOLUTIONS[0]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    double = files.edited(
        adapter, tmp_path / "double", config={"lora_alpha": files.config(adapter)["lora_alpha"] * 2}
    )
    adapterpack.merge(double, base, tmp_path / "m")
    result = adapterpack.verify(adapter, tmp_path / "m", base=base, device="cpu")
    assert not result.equal
    assert "factor 2" in result.findings[0].message


def test_verify_of_two_adapters_and_casts(workshop, files, tmp_path: Path) -> None:
    for case in (CONVOLUTIONS[0], CONVOLUTIONS[3]):
        adapter, out = workshop.adapter(case), tmp_path / case.name
        assert adapterpack.verify(adapter, adapter).equal
        made = adapterpack.convert(adapter, out, dtype="bfloat16", max_error=0.02, base=workshop.base_of(case))
        assert 0 < made.max_rel_error < 0.02
        assert {t.dtype for k, t in files.tensors(out).items()} == {torch.bfloat16}
        assert not adapterpack.verify(adapter, out, base=workshop.base_of(case)).equal


def test_rank_truncation_keeps_the_kernels_and_loads_in_peft(workshop, files, tmp_path: Path) -> None:
    case = cases.Case(
        "convolution-2d-truncate", cases.lora(r=6, target_modules=ALL), "resnet", over={"hidden_sizes": [32, 64]}
    )
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    key = next(k for k in files.tensors(adapter) if "stages.1.layers.0.layer.1" in k and "lora_B" in k)
    thin = files.tensors(adapter)[key].clone()
    thin[:, 2:] = 0
    low = files.edited(adapter, tmp_path / "low", {key: thin})
    result = adapterpack.compress(low, tmp_path / "small", max_error=1e-5)
    assert result.max_rel_error <= 1e-5
    small = files.tensors(tmp_path / "small")
    assert small[key].shape == (16, 2, 1, 1)
    assert small[key.replace("lora_B", "lora_A")].shape == (2, 16, 3, 3)
    merged, expected = oracle.peft_merge(base, tmp_path / "small"), oracle.peft_merge(base, low)
    assert merged.load.clean
    assert all(torch.allclose(merged[k], expected[k], atol=1e-5) for k in merged)


def test_inspect_and_check(workshop, files, tmp_path: Path) -> None:
    case = CONVOLUTIONS[2]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    assert adapterpack.inspect(adapter).ranks == {3: 2, 4: 7}
    assert adapterpack.check(adapter, base=base).healthy
    other = workshop.base("resnet", embedding_size=4)
    assert {f.code for f in adapterpack.check(adapter, base=other).findings if not f.warning} == {"shape-not-in-base"}


def test_groups_are_refused_as_peft_refuses_them(workshop, tmp_path: Path) -> None:
    base = workshop.base("convnext")
    oracle.make_adapter(
        tmp_path / "a", LoraConfig(r=20 * 2 * 3 * 4, target_modules=["dwconv"]), base=oracle.load_base(base)
    )
    with pytest.raises(NotImplementedError, match="groups"):
        oracle.peft_merge(base, tmp_path / "a")
    with pytest.raises(Unsupported, match="groups"):
        adapterpack.merge(tmp_path / "a", base, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_magnitudes_of_another_shape_are_refused(workshop, files, tmp_path: Path) -> None:
    case = CONVOLUTIONS[3]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    key = next(k for k in files.tensors(adapter) if k.endswith("lora_magnitude_vector"))
    odd = files.edited(adapter, tmp_path / "a", {key: files.tensors(adapter)[key].reshape(-1)})
    with pytest.raises(InvalidFile, match="magnitude"):
        adapterpack.merge(odd, base, tmp_path / "m")
