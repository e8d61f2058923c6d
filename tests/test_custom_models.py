"""Models that are no transformers ones: no config.json, names of their own, every kind of layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import custom_models
import oracle
import pytest
import torch
from bitexact import assert_merges_like_peft

KINDS = sorted(custom_models.KINDS)


def _targets(kind: str) -> list[str]:
    """What LoRA can be put on: not norms, not convolutions in groups."""
    return [n for n, cls, how in custom_models.KINDS[kind] if cls != "LayerNorm" and how.get("groups", 1) == 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_custom_model_comes_back_from_its_file_and_from_its_layers(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = oracle.tiny_model(kind, dtype)
    weights = model.state_dict()
    assert weights and all(w.dtype == dtype and w.count_nonzero() > 0 for w in weights.values())
    assert [p.name for p in oracle.save_base(model, tmp_path / "base").iterdir()] == ["model.safetensors"]
    layers: dict[str, Any] = {"layers": [[name, cls, dict(how)] for name, cls, how in custom_models.KINDS[kind]]}
    for again in (oracle.load_base(tmp_path / "base"), oracle.tiny_model("custom", dtype, **layers)):
        assert again.state_dict().keys() == weights.keys()
        assert all(torch.equal(again.state_dict()[name], w) for name, w in weights.items())


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_custom_model_is_merged_as_peft_merges_it(
    kind: str, dtype: str, tmp_path: Path, workshop: Any, files: Any
) -> None:
    case = cases.Case(kind, cases.lora(target_modules=_targets(kind)), kind)
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base(kind, dtype), tmp_path)


def test_layers_that_do_not_exist_and_fields_that_a_custom_model_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match="layer x is 'Linaer'"):
        oracle.tiny_model("custom", layers=[["x", "Linaer", {}]])
    with pytest.raises(ValueError, match="says no layers"):
        oracle.tiny_model("custom")
    with pytest.raises(ValueError, match="say in the layers"):
        oracle.tiny_model("custom-mlp", bias=True)
