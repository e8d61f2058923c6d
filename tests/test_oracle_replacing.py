"""LN tuning, BEFT and trainable tokens: what is merged is what PEFT merges, bit for bit."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from bitexact import assert_merges_like_peft, codes
from peft import BeftConfig, LNTuningConfig, TrainableTokensConfig

import adapterpack
from adapterpack.errors import InvalidFile, Unsupported, WrongBase


def _ln(target, **fields):
    return lambda: LNTuningConfig(target_modules=target, **fields)


def _beft(target, **fields):
    return lambda: BeftConfig(target_modules=target, **fields)


def _tokens(target=None, indices=(7, 1, 90), **fields):
    return lambda: TrainableTokensConfig(target_modules=target, token_indices=list(indices), **fields)


LN = (
    cases.Case("ln-llama", _ln(["input_layernorm", "post_attention_layernorm", "norm"])),
    cases.Case("ln-gpt2", _ln(["ln_1", "ln_f"]), "gpt2"),
    cases.Case("ln-bert", _ln(r".*LayerNorm"), "bert"),
    cases.Case("ln-linear", _ln(["q_proj", "final_layer_norm"]), "opt"),
    cases.Case("ln-convolution", _ln([r"layer.0.convolution"]), "resnet"),
)
BEFT = (
    cases.Case("beft-opt", _beft(["v_proj", "fc1", "project_in"][:2]), "opt"),
    cases.Case("beft-bert", _beft(["value", "pooler.dense"], modules_to_save=["intermediate.dense"]), "bert"),
    cases.Case("beft-narrow", _beft(["v_proj"]), bias=True, autocast=False),
)
TOKENS = (
    cases.Case("tokens-llama", _tokens()),
    cases.Case("tokens-tied", _tokens(), tie=True),
    cases.Case("tokens-gpt2", _tokens(["wte"]), "gpt2"),
    cases.Case("tokens-gpt2-tied", _tokens(), "gpt2", tie=True),
    cases.Case("tokens-both", _tokens(["embed_tokens", "lm_head"], [0, 95])),
    cases.Case("tokens-positions", _tokens(["embed_tokens", "embed_positions"], [3, 5]), "opt"),
)
CASES = (*LN, *BEFT, *TOKENS)
BY_NAME = {c.name: c for c in CASES}


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("name", ["ln-gpt2", "beft-opt", "tokens-both"])
def test_verify_finds_one_moved_value(name, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(BY_NAME[name]), workshop.base_of(BY_NAME[name])
    key = min(files.tensors(adapter))
    moved = files.tensors(adapter)[key].clone()
    moved.view(-1)[3] += 0.01
    other = files.edited(adapter, tmp_path / "other", {key: moved})
    for how in ({}, {"base": base}):
        assert adapterpack.verify(adapter, adapter, **how).equal
        result = adapterpack.verify(adapter, other, **how)
        assert not result.equal
        assert sum(m.rel_error > 0 for m in result.modules) == 1
    adapterpack.merge(adapter, base, tmp_path / "merged")
    assert adapterpack.verify(adapter, tmp_path / "merged", base=base).equal
    assert not adapterpack.verify(other, tmp_path / "merged", base=base).equal


def test_beft_without_a_bias_cannot_be_merged(workshop, tmp_path: Path) -> None:
    case = cases.Case("beft-no-bias", _beft(["v_proj"]))
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    with pytest.raises(ValueError, match="no bias"):
        workshop.peft_merge(base, adapter)
    with pytest.raises(WrongBase, match="no bias"):
        adapterpack.merge(adapter, base, tmp_path / "merged")
    assert not adapterpack.check(adapter, base=base).healthy


def test_saved_modules_beside_norms_are_merged_too(workshop, files, tmp_path: Path) -> None:
    """PEFT 0.21 leaves them in their wrapper, under names that no model has."""
    case = cases.Case("ln-modules-to-save", _ln(["LayerNorm"], modules_to_save=["pooler"]), "bert")
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    assert "pooler.dense.weight" not in workshop.peft_merge(base, adapter)
    adapterpack.merge(adapter, base, tmp_path / "merged", verify="full")
    merged, values = files.tensors(tmp_path / "merged"), files.tensors(adapter)
    for name in ("pooler.dense.weight", "pooler.dense.bias"):
        assert files.same(merged[name], values[f"base_model.model.{name}"])


def test_batch_norms_are_refused(workshop, tmp_path: Path) -> None:
    case = cases.Case("ln-batch-norm", _ln(["normalization"]), "resnet")
    with pytest.raises(Unsupported, match="batch norm"):
        adapterpack.merge(workshop.adapter(case), workshop.base_of(case), tmp_path / "merged")


@pytest.mark.parametrize(
    "indices", [None, [7, 1], [7, 1, -1], [7, 1, 7], "all", [7, 1, 2.5], {"embed_tokens": [7, 1, 90]}]
)
def test_token_indices_must_name_the_rows(indices, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(BY_NAME["tokens-llama"]), workshop.base_of(BY_NAME["tokens-llama"])
    broken = files.edited(adapter, tmp_path / "broken", config={"token_indices": indices})
    with pytest.raises(InvalidFile, match=r"token.indices"):
        adapterpack.merge(broken, base, tmp_path / "merged")
    assert "token-rows" in codes(adapterpack.check(broken))


def test_what_does_not_fit_is_refused(workshop, files, tmp_path: Path) -> None:
    for n, (name, shape, config, error) in enumerate(
        [
            ("tokens-llama", None, {"token_indices": [7, 1, 96]}, WrongBase),
            ("tokens-llama", (3, 63), {}, WrongBase),
            ("ln-gpt2", (63,), {}, WrongBase),
            ("beft-opt", (1, 63), {}, WrongBase),
            ("beft-opt", (64,), {}, InvalidFile),
            ("beft-opt", (1, 0), {}, InvalidFile),
        ]
    ):
        adapter, base = workshop.adapter(BY_NAME[name]), workshop.base_of(BY_NAME[name])
        new = {} if shape is None else {min(files.tensors(adapter)): torch.zeros(shape)}
        broken = files.edited(adapter, tmp_path / f"broken{n}", new, config)
        with pytest.raises(error):
            adapterpack.merge(broken, base, tmp_path / f"merged{n}")
        assert not adapterpack.check(broken, base=base).healthy


def test_new_values_without_any_element_are_compared(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(BY_NAME["ln-gpt2"]), workshop.base_of(BY_NAME["ln-gpt2"])
    empty = files.edited(adapter, tmp_path / "empty", {min(files.tensors(adapter)): torch.zeros(3, 0)})
    assert adapterpack.verify(empty, empty).equal
    with pytest.raises(WrongBase):
        adapterpack.merge(empty, base, tmp_path / "merged")
