"""Sparse LoRA, as RoseLoRA and its like train it, and LoRA of ranks and grids of its own for each module: plain LoRA
that stays what it is, and packs by what it is worth."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import save_file

import adapterpack

_KEEP = 0.05
_DIM = 512


def _write(directory: Path, factors, ranks: dict[str, int] | None = None, dtype=torch.float32, r: int = 8) -> Path:
    """An adapter of four square layers; `factors` makes what is stored of random (r, in) matrices, A and B^T."""
    g = torch.Generator().manual_seed(1)
    ranks, tensors = ranks or {}, {}
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            path = f"model.layers.{layer}.self_attn.{name}"
            for side in "AB":
                x = factors(torch.randn(ranks.get(path, r), _DIM, generator=g) * 0.02, path)
                x = x.T if side == "B" else x
                tensors[f"base_model.model.{path}.lora_{side}.weight"] = x.to(dtype).contiguous()
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    config |= {"rank_pattern": ranks}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def _pruned(x: torch.Tensor, _: str) -> torch.Tensor:
    """RoseLoRA: of every row of A, and of every column of B, the largest values stay."""
    least = x.abs().sort(dim=1, descending=True).values[:, int(_KEEP * x.shape[1]) - 1 : int(_KEEP * x.shape[1])]
    return torch.where(x.abs() >= least, x, 0)


def _nonzero(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {k: int(t.count_nonzero()) for k, t in tensors.items()}


def test_inspect_says_how_dense_it_is(files, tmp_path: Path) -> None:
    sparse = _write(tmp_path / "sparse", _pruned)
    seen = adapterpack.inspect(sparse)
    true = sum(_nonzero(files.tensors(sparse)).values()) / sum(t.numel() for t in files.tensors(sparse).values())
    assert seen.density == pytest.approx(true, rel=0.5)
    assert any("sparse" in n for n in seen.notes)
    dense = adapterpack.inspect(_write(tmp_path / "dense", lambda x, _: x))
    assert dense.density == 1.0
    assert not any("sparse" in n for n in dense.notes)


def test_untrained_factors_and_packs_do_not_count(files, tmp_path: Path) -> None:
    fresh = _write(tmp_path / "fresh", lambda x, path: x)
    zeros = {k: torch.zeros_like(t) for k, t in files.tensors(fresh).items() if "lora_B" in k}
    assert adapterpack.inspect(files.edited(fresh, tmp_path / "untrained", zeros)).density == 1.0
    adapterpack.compress(fresh, tmp_path / "a.apack")
    assert adapterpack.inspect(tmp_path / "a.apack").density is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pack_holds_places_and_values(dtype, tmp_path: Path) -> None:
    sparse = _write(tmp_path / "sparse", _pruned, dtype=dtype)
    made = adapterpack.compress(sparse, tmp_path / "a.apack")
    adapterpack.unpack(tmp_path / "a.apack", tmp_path / "back")
    assert oracle.tree_hash(tmp_path / "back") == oracle.tree_hash(sparse)
    count = 8 * 8 * _DIM
    entropy = -_KEEP * math.log2(_KEEP) - (1 - _KEEP) * math.log2(1 - _KEEP)
    most = entropy + _KEEP * dtype.itemsize * 8
    assert made.bytes_out * 8 < count * most * 1.2 + 8 * 3000, "no more than places and raw values, and the frame"


def test_it_stays_sparse_in_every_form(workshop, files, tmp_path: Path) -> None:
    sparse = _write(tmp_path / "sparse", _pruned)
    before = _nonzero(files.tensors(sparse))
    adapterpack.convert(sparse, tmp_path / "half", dtype="bf16", max_error=0.01)
    adapterpack.convert(sparse, tmp_path / "served", engine="vllm")
    adapterpack.compress(sparse, tmp_path / "dir", max_error=0.01)
    for name in ("half", "served", "dir"):
        assert _nonzero(files.tensors(tmp_path / name)) == before, name


# -- ranks and grids of their own ------------------------------------------------------------------------

RANKS = {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.self_attn.v_proj": 12}


def _gridded(bits: int):
    def grid(x: torch.Tensor, path: str) -> torch.Tensor:
        """Whole numbers of steps of a power of two, as learned bits leave them."""
        step = 2.0 ** (math.ceil(math.log2(float(x.abs().max()))) - bits + 1)
        return (x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step

    return grid


def test_ranks_by_module_come_through(files, tmp_path: Path) -> None:
    adapter = _write(tmp_path / "a", _gridded(4), RANKS)
    assert adapterpack.inspect(adapter).ranks == {2: 1, 8: 2, 12: 1}
    assert adapterpack.check(adapter).healthy
    adapterpack.compress(adapter, tmp_path / "a.apack")
    adapterpack.unpack(tmp_path / "a.apack", tmp_path / "back")
    assert oracle.tree_hash(tmp_path / "back") == oracle.tree_hash(adapter)
    adapterpack.convert(adapter, tmp_path / "same", to="lora")
    assert files.config(tmp_path / "same")["rank_pattern"] == RANKS
    made = adapterpack.convert(adapter, tmp_path / "half", dtype="bf16")
    assert (made.grade, made.max_rel_error) == ("equivalent", 0), "a coarse grid needs no float32"


@pytest.mark.parametrize("bits", [2, 4])
def test_a_grid_of_powers_of_two_packs_small(bits, files, tmp_path: Path) -> None:
    adapter = _write(tmp_path / "a", _gridded(bits))
    made = adapterpack.compress(adapter, tmp_path / "a.apack")
    # Bit patterns: -0 is another value to a pack.
    values = np.concatenate([t.numpy().reshape(-1).view(np.uint32) for t in files.tensors(adapter).values()])
    _, counts = np.unique(values, return_counts=True)
    share = counts / counts.sum()
    entropy = float(-(share * np.log2(share)).sum())
    assert made.bytes_out * 8 < values.size * entropy * 1.6 + 8 * 3000
