"""A full fine-tune as LoRA: what comes back, what is kept, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import cases
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_cli import run

import adapterpack
from adapterpack import svd
from adapterpack.backend import TorchBackend
from adapterpack.errors import (
    DestinationExists,
    InvalidFile,
    LossRefused,
    NothingChanged,
    Unsupported,
    UsageError,
    WrongBase,
)

XP = TorchBackend("cpu")


def tuned_by(workshop, name: str, where: Path) -> tuple[Path, Path]:
    """(base, tuned): a fine-tune whose change is that of a LoRA adapter, merged by PEFT."""
    adapter, base = workshop.pair(name)
    oracle.save_base(oracle.peft_merge(base, adapter).model, where)
    return base, where


def tuned_all(base: Path, where: Path, only: tuple[str, ...] = ("",), scale: float = 0.02) -> Path:
    """Every parameter whose name has one of these parts moves at random."""
    model = oracle.load_base(base)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(o in name for o in only):
                p.add_((torch.randn(p.shape, generator=g) * scale).to(p.dtype))
    oracle.save_base(model, where)
    return where


def edited(model: Path, where: Path, **edits) -> Path:
    """A copy of a model directory with other tensors; None removes one. `__` stands for a dot."""
    where.mkdir()
    for f in model.iterdir():
        if f.suffix != ".safetensors":
            (where / f.name).write_bytes(f.read_bytes())
    tensors = load_file(model / "model.safetensors") | {k.replace("__", "."): v for k, v in edits.items()}
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, where / "model.safetensors")
    return where


def off(x: torch.Tensor, y: torch.Tensor, base: torch.Tensor) -> float:
    change = float((y.double() - base.double()).norm())
    lost = float((x.double() - y.double()).norm())
    return lost / change if change else lost


def assert_gives(workshop, files, base: Path, tuned: Path, adapter: Path, error: float) -> None:
    """PEFT loads it without a word, and its merge and ours give the tuned model within the error."""
    merged = oracle.peft_merge(base, adapter)
    assert merged.load.clean, (merged.load.missing, merged.load.unexpected)
    wanted, before = oracle.load_base(tuned).state_dict(), oracle.load_base(base).state_dict()
    assert max(off(merged[k], wanted[k], before[k]) for k in wanted) <= error
    adapterpack.merge(adapter, base, adapter.parent / "merged", verify="full")
    ours = oracle.load_base(adapter.parent / "merged").state_dict()
    assert max(off(ours[k], wanted[k], before[k]) for k in wanted) <= error


LOW_RANK = ["linear-llama", "linear-opt", "linear-bert", "conv1d", "rslora"]


@pytest.mark.parametrize("name", LOW_RANK)
def test_a_merged_lora_comes_back_at_its_rank(name, workshop, files, tmp_path: Path) -> None:
    base, tuned = tuned_by(workshop, name, tmp_path / "t")
    before = oracle.tree_hash(base), oracle.tree_hash(tuned)
    result = adapterpack.extract(base, tuned, tmp_path / "a", rank=4)
    assert (oracle.tree_hash(base), oracle.tree_hash(tuned)) == before
    adapter, _ = workshop.pair(name)
    with adapterpack.containers.open_checkpoint(adapter) as c:
        modules = set(adapterpack.methods.parse(c)[1].modules)
    assert {m.name for m in result.modules} == modules
    assert {m.rank for m in result.modules} == {4}
    assert result.max_rel_error == result.modules[0].rel_error < 1e-6
    assert result.kept == result.dropped == ()
    assert result.bytes_out == oracle.adapter_bytes(tmp_path / "a")
    assert_gives(workshop, files, base, tuned, tmp_path / "a", 2e-6)


@pytest.mark.parametrize("kind, how", [("llama", {}), ("llama", {"tie": True}), ("opt", {}), ("bert", {}),
                                       ("gpt2", {}), ("gpt2", {"tie": True}), ("llama", {"bias": True})])
def test_a_whole_fine_tune_with_the_rest_kept(kind, how, workshop, files, tmp_path: Path) -> None:
    base = workshop.base(kind, **how)
    tuned = tuned_all(base, tmp_path / "t")
    with pytest.raises(LossRefused) as e:
        adapterpack.extract(base, tuned, tmp_path / "a", rank=4)
    assert "--rest keep" in str(e.value.hint)
    assert not (tmp_path / "a").exists()
    result = adapterpack.extract(base, tuned, tmp_path / "a", rank=64, rest="keep")
    assert result.kept
    assert_gives(workshop, files, base, tuned, tmp_path / "a", 2e-6)
