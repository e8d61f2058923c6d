"""verify: honest merges are equal, planted faults are found, across dtypes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import adapterpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("verify")
    oracle.save_base(oracle.tiny_model("llama", request.param), root / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    oracle.make_adapter(root / "lora", config, dtype=request.param, scale=0.2)
    adapterpack.merge(root / "lora", root / "base", root / "merged")
    return root, request.param


def _spoiled(root: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Any:
    merged, base = (load_file(root / d / "model.safetensors") for d in ("merged", "base"))
    change(merged, base)
    target.mkdir()
    (target / "config.json").write_bytes((root / "merged" / "config.json").read_bytes())
    save_file(merged, target / "model.safetensors", metadata={"format": "pt"})
    return adapterpack.verify(root / "lora", target, base=root / "base")


@pytest.mark.parametrize("safe", [False, True])
def test_honest_merges_by_peft_are_equal(place: Any, tmp_path: Path, safe: bool) -> None:
    root, dtype = place
    theirs = oracle.peft_merge(root / "base", root / "lora", dtype, safe_merge=safe)

    def take(merged: dict[str, Any], base: dict[str, Any]) -> None:
        merged.update({k: theirs[k] for k in merged})

    assert _spoiled(root, tmp_path / "m", take).equal


FAULTS: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "module skipped": lambda m, b: m.update({Q: b[Q]}),
    "scale lost": lambda m, b: m.update({Q: (b[Q] + (m[Q].float() - b[Q].float()) / 2).to(m[Q].dtype)}),
    "scale 0.9": lambda m, b: m.update({Q: (b[Q] + (m[Q].float() - b[Q].float()) * 0.9).to(m[Q].dtype)}),
    "sign": lambda m, b: m.update({Q: (2 * b[Q].float() - m[Q].float()).to(m[Q].dtype)}),
    "merged twice": lambda m, b: m.update({Q: (2 * m[Q].float() - b[Q].float()).to(m[Q].dtype)}),
    "one weight": lambda m, b: m[Q].view(-1)[7:8].add_(0.5),
    "untouched changed": lambda m, b: m["model.norm.weight"].view(-1)[3:4].add_(0.5),
    "tensor missing": lambda m, b: m.__delitem__("model.norm.weight"),
    "wrong base": lambda m, b: m.update({k: v + 0.01 for k, v in m.items()}),
    "NaN": lambda m, b: m[Q].view(-1)[0:1].fill_(float("nan")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(place: Any, tmp_path: Path, fault: str) -> None:
    root, _ = place
    result = _spoiled(root, tmp_path / "m", FAULTS[fault])
    assert not result.equal
    assert result.findings


def test_a_lost_scale_is_named(place: Any, tmp_path: Path) -> None:
    root, _ = place
    result = _spoiled(root, tmp_path / "m", FAULTS["scale lost"])
    assert "factor 0.5" in result.findings[0].message


def test_the_same_values_in_other_rows_are_a_difference(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5])
    oracle.make_adapter(tmp_path / "a", config)
    moved = tmp_path / "b"
    moved.mkdir()
    for file in (tmp_path / "a").iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    path = moved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainable_token_indices": [1, 6]}))
    assert adapterpack.verify(tmp_path / "a", tmp_path / "a").equal
    result = adapterpack.verify(tmp_path / "a", moved)
    assert not result.equal
    assert "different rows" in result.findings[0].message
