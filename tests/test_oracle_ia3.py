"""(IA)^3 merges are PEFT's `merge_and_unload`, bit for bit: of inputs, of outputs and their biases, of groups."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
from bitexact import assert_merges_like_peft, codes
from peft import IA3Config

import adapterpack
from adapterpack.errors import InvalidFile, LossRefused, Unsupported


def _ia3(target, feedforward=(), **fields):
    if not isinstance(feedforward, str):
        feedforward = list(feedforward)
    return lambda: IA3Config(target_modules=target, feedforward_modules=feedforward, **fields)


CASES = (
    cases.Case("ia3-llama", _ia3(["k_proj", "v_proj", "down_proj", "up_proj"], ["down_proj", "up_proj"])),
    cases.Case("ia3-biases", _ia3(["k_proj", "fc1", "fc2", "project_in"], ["fc2"]), "opt"),
    cases.Case("ia3-bert", _ia3(["query", "output.dense", "pooler.dense"], ["output.dense"]), "bert"),
    cases.Case("ia3-conv1d", _ia3(["c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"], ["mlp.c_proj"]), "gpt2"),
    cases.Case("ia3-pattern", _ia3(["q_proj", "up_proj", "gate_proj"], r".*\.(up|gate)_proj")),
    cases.Case("ia3-conv2d", _ia3(["convolution"], r".*layer\.0\.convolution"), "resnet"),
    cases.Case("ia3-groups", _ia3(["dwconv", "pwconv1", "pwconv2"], ["dwconv", "pwconv1"]), "convnext"),
    cases.Case("ia3-groups-outputs", _ia3(["dwconv", "pwconv1"]), "convnext"),
    cases.Case("ia3-conv3d", _ia3(["projection", "query"], ["projection"]), "videomae"),
    cases.Case("ia3-modules-to-save", _ia3(["q_proj"], modules_to_save=["lm_head"])),
)
NARROW = cases.Case("ia3-narrow", _ia3(["c_attn", "mlp.c_proj"], ["mlp.c_proj"]), "gpt2", autocast=False)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", (*CASES, NARROW), ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


def test_a_bias_is_scaled_where_the_base_has_one(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(CASES[1]), workshop.base_of(CASES[1])
    adapterpack.merge(adapter, base, tmp_path / "merged")
    merged, plain = files.tensors(tmp_path / "merged"), files.tensors(base)
    name = "model.decoder.layers.0.{}.bias"
    assert not files.same(merged[name.format("fc1")], plain[name.format("fc1")])
    assert files.same(merged[name.format("fc2")], plain[name.format("fc2")])


def test_verify_finds_one_moved_factor(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(CASES[3]), workshop.base_of(CASES[3])
    key = next(k for k in files.tensors(adapter) if k.endswith("h.1.attn.c_attn.ia3_l"))
    moved = files.tensors(adapter)[key].clone()
    moved.view(-1)[5] += 0.01
    other = files.edited(adapter, tmp_path / "other", {key: moved})
    for how in ({}, {"base": base}):
        result = adapterpack.verify(adapter, other, **how)
        assert not result.equal
        assert "h.1.attn.c_attn" in result.modules[0].name
        assert adapterpack.verify(adapter, adapter, **how).equal
    adapterpack.merge(adapter, base, tmp_path / "merged")
    assert adapterpack.verify(adapter, tmp_path / "merged", base=base).equal
    assert not adapterpack.verify(other, tmp_path / "merged", base=base).equal


def test_the_config_and_the_shapes_must_agree(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(CASES[0]), workshop.base_of(CASES[0])
    other = files.edited(adapter, tmp_path / "a", config={"feedforward_modules": ["down_proj"]})
    with pytest.raises(InvalidFile, match="up_proj"):
        adapterpack.merge(other, base, tmp_path / "merged")
    assert "other-shape" in codes(adapterpack.check(other))
    # What the shapes tell need not be said.
    silent = files.edited(adapter, tmp_path / "b", config={"feedforward_modules": None})
    adapterpack.merge(silent, base, tmp_path / "one")
    adapterpack.merge(adapter, base, tmp_path / "two")
    one, two = files.tensors(tmp_path / "one"), files.tensors(tmp_path / "two")
    assert all(files.same(one[k], two[k]) for k in two)


def test_a_convolution_needs_the_word_of_the_config(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(CASES[5]), workshop.base_of(CASES[5])
    silent = files.edited(adapter, tmp_path / "a", config={"feedforward_modules": None})
    with pytest.raises(Unsupported, match="feedforward_modules"):
        adapterpack.merge(silent, base, tmp_path / "merged")
    with pytest.raises(InvalidFile, match="feedforward_modules"):
        adapterpack.merge(
            files.edited(adapter, tmp_path / "b", config={"feedforward_modules": 3}), base, tmp_path / "m"
        )


def test_a_pattern_that_never_ends_is_refused(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(CASES[0]), workshop.base_of(CASES[0])
    slow = files.edited(adapter, tmp_path / "a", config={"feedforward_modules": r"(?:(?:.|\w)+)+[A-Z]"})
    with pytest.raises(InvalidFile, match="does not end"):
        adapterpack.merge(slow, base, tmp_path / "merged")


def test_its_lora_is_the_nearest_one(workshop, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(CASES[0]), workshop.base_of(CASES[0])
    with pytest.raises(LossRefused, match="no exact low-rank form"):
        adapterpack.convert(adapter, tmp_path / "lora", to="lora")
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base, rank=24, max_error=0.9)
    assert str(made.grade) == "approximate"
    assert 0 < made.max_rel_error < 0.9
