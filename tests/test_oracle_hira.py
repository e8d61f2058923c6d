"""HiRA merges are PEFT's `merge_and_unload`, bit for bit: three roundings in a 16-bit base."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from bitexact import assert_merges_like_peft, codes
from peft import HiraConfig

import adapterpack
from adapterpack.errors import InvalidFile, WrongBase

_QKU = ["q_proj", "k_proj", "up_proj", "down_proj"]


def _hira(**fields):
    return lambda: HiraConfig(**{"r": 4, "target_modules": _QKU, **fields})


CASES = (
    cases.Case("hira-llama", _hira()),
    cases.Case("hira-opt", _hira(target_modules=["q_proj", "fc1", "fc2", "project_in"]), "opt"),
    cases.Case("hira-conv1d", _hira(target_modules=["c_attn", "c_fc", "attn.c_proj"]), "gpt2"),
    cases.Case("hira-embedding", _hira(target_modules=["embed_tokens", "q_proj"])),
    cases.Case("hira-embedding-square", _hira(target_modules=["embed_tokens"]), over={"vocab_size": 64}),
    cases.Case("hira-conv2d", _hira(target_modules=["convolution"]), "resnet"),
    cases.Case("hira-kernel1d", _hira(target_modules=["conv1", "conv2"]), "whisper"),
    cases.Case("hira-conv3d", _hira(target_modules=["projection"]), "videomae"),
    cases.Case("hira-modules-to-save", _hira(target_modules=["query"], modules_to_save=["pooler"]), "bert"),
)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


def test_verify_finds_one_moved_parameter(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(CASES[2]), workshop.base_of(CASES[2])
    key = next(k for k in files.tensors(adapter) if k.endswith("h.1.mlp.c_fc.hira_B"))
    moved = files.tensors(adapter)[key].clone()
    moved[3, 1] += 0.02
    other = files.edited(adapter, tmp_path / "other", {key: moved})
    for how in ({}, {"base": base}):
        result = adapterpack.verify(adapter, other, **how)
        assert not result.equal
        assert [m.name for m in result.modules if m.rel_error] == ["transformer.h.1.mlp.c_fc.weight"]
    adapterpack.merge(adapter, base, tmp_path / "merged")
    assert adapterpack.verify(adapter, tmp_path / "merged", base=base).equal
    assert not adapterpack.verify(other, tmp_path / "merged", base=base).equal


@pytest.mark.parametrize(
    ("shape", "error", "says"),
    [
        ((3, 64), InvalidFile, "q_proj: A"),
        ((4, 63), WrongBase, "q_proj"),
        ((4, 64, 1), InvalidFile, "q_proj: A"),
        ((0, 64), InvalidFile, "q_proj: A"),
    ],
)
def test_what_does_not_fit_is_refused(shape, error, says, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(CASES[0]), workshop.base_of(CASES[0])
    key = next(k for k in files.tensors(adapter) if k.endswith("q_proj.hira_A"))
    broken = files.edited(adapter, tmp_path / "broken", {key: torch.zeros(shape)})
    with pytest.raises(error, match=says):
        adapterpack.merge(broken, base, tmp_path / "merged")
    assert not adapterpack.check(broken, base=base).healthy


def test_ranks_and_findings(workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(CASES[0])
    assert {int(r) for r in adapterpack.inspect(adapter).ranks} == {4}
    # PEFT 0.21 does not follow it.
    patterned = files.edited(adapter, tmp_path / "patterned", config={"rank_pattern": {"k_proj": 2}})
    assert workshop.peft_merge(workshop.base_of(CASES[0]), patterned).load.clean
    assert adapterpack.check(patterned).healthy
    other = files.edited(adapter, tmp_path / "other", config={"r": 2})
    assert codes(adapterpack.check(other)) == {"rank-mismatch"}
    key = next(k for k in files.tensors(adapter) if k.endswith("hira_A"))
    half = files.edited(adapter, tmp_path / "half", {key: None})
    assert "half-pair" in codes(adapterpack.check(half))
