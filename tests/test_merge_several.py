"""Several adapters merged in one pass, and their weights."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import adapterpack

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("options")
    oracle.save_base(oracle.tiny_model("llama", torch.bfloat16), root / "base")
    for n, name in enumerate(("one", "two")):
        config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
        oracle.make_adapter(root / name, config, dtype=torch.bfloat16, scale=0.2, seed=n)
    return root


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def _delta(adapter: Path, target: str) -> torch.Tensor:
    t = load_file(adapter / "adapter_model.safetensors")
    module = "base_model.model." + target.removesuffix(".weight")
    return 1.5 * (t[f"{module}.lora_B.weight"].double() @ t[f"{module}.lora_A.weight"].double())


def test_several_adapters_in_one_pass_are_one_after_the_other(place: Path, tmp_path: Path) -> None:
    adapterpack.merge([place / "one", place / "two"], place / "base", tmp_path / "both")
    adapterpack.merge(place / "one", place / "base", tmp_path / "first")
    adapterpack.merge(place / "two", tmp_path / "first", tmp_path / "second")
    both, second = _weights(tmp_path / "both"), _weights(tmp_path / "second")
    assert all(torch.equal(both[name], second[name]) for name in second)


def test_a_weight_scales_the_change(place: Path, tmp_path: Path) -> None:
    adapterpack.merge(place / "one", place / "base", tmp_path / "m", weights=[-0.5], rounding="once")
    base, merged = _weights(place / "base"), _weights(tmp_path / "m")
    for name in base:
        exact = base[name].double()
        if name.split(".")[-2] in TARGETS:
            exact = exact - 0.5 * _delta(place / "one", name)
        assert ((merged[name].double() - exact).abs() <= exact.abs() * 2.0**-8).all()
