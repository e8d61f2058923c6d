"""The ten traps of adapter checkpoints: one test each, which fails where its fix is taken out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from peft import LoraConfig, RandLoraConfig, VBLoRAConfig, VeraConfig
from safetensors.torch import load_file, save_file

import adapterpack
from adapterpack import methods, recipes
from adapterpack.containers import open_checkpoint

F32, BF16 = torch.float32, torch.bfloat16
UNEQUAL = ["q_proj", "k_proj", "down_proj"]


def _base(path: Path, dtype: torch.dtype = F32) -> Path:
    return oracle.save_base(oracle.tiny_model("llama", dtype), path)


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def _recipe(path: Path) -> dict[str, Any]:
    with open_checkpoint(path) as c:
        return dict(json.loads(c.metadata["adapterpack"])["recipe"])


def test_trap_1_both_ways_of_drawing_are_recognised(tmp_path: Path) -> None:
    """torch draws with one rounding or with two, by CPU path: half of the values differ."""
    oracle.make_adapter(tmp_path / "fused", VeraConfig(r=4, target_modules=UNEQUAL))
    with open_checkpoint(tmp_path / "fused") as c:
        method, adapter = methods.parse(c)
        recipe = replace(next(iter(method.recipes(adapter))), arithmetic=recipes.TWO_ROUNDINGS)
    weights = tmp_path / "fused" / "adapter_model.safetensors"
    drawn = {f"base_model.{name}": torch.from_numpy(t.numpy().copy()) for name, t in recipe.draw().items()}
    changed = {**load_file(weights), **drawn}
    assert not torch.equal(changed["base_model.vera_A"], load_file(weights)["base_model.vera_A"])
    twice = tmp_path / "twice"
    twice.mkdir()
    (twice / "adapter_config.json").write_bytes((tmp_path / "fused" / "adapter_config.json").read_bytes())
    save_file(changed, twice / weights.name, metadata={"format": "pt"})
    for name, arithmetic in (("fused", "fused"), ("twice", "two-roundings")):
        result = adapterpack.convert(tmp_path / name, tmp_path / f"{name}-seed", to="seed")
        assert result.grade == "lossless"
        assert _recipe(tmp_path / f"{name}-seed")["arithmetic"] == arithmetic


def test_trap_2_the_dtype_of_the_base_is_in_the_recipe(tmp_path: Path) -> None:
    """A VeRA trained on a bf16 base holds rounded projections in a file that says float32."""
    oracle.make_adapter(tmp_path / "a", VeraConfig(r=4, target_modules=UNEQUAL), dtype=BF16)
    adapterpack.convert(tmp_path / "a", tmp_path / "seed", to="seed")
    assert (_recipe(tmp_path / "seed")["through"], _recipe(tmp_path / "seed")["stored"]) == ("BF16", "F32")
    adapterpack.convert(tmp_path / "seed", tmp_path / "back", to="projection")
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("a", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("k", [3, 4])
def test_trap_3_peaked_logits_never_load_as_nan(tmp_path: Path, k: int) -> None:
    """The last weight is recovered as 1 - sum, and the logarithm of -1.2e-7 is NaN."""

    def peak(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "logits" in name:
                    p.mul_(20)

    config = VBLoRAConfig(r=4, num_vectors=90, vector_length=16, topk=k, target_modules=UNEQUAL)
    oracle.make_adapter(tmp_path / "a", config, scale=1.0, post=peak)
    adapterpack.compress(tmp_path / "a", tmp_path / "top")
    tensors = load_file(tmp_path / "top" / "adapter_model.safetensors")
    assert all(bool((1 - t.sum(-1) >= 0).all()) for name, t in tensors.items() if name.endswith("topk_weights"))
    merged = oracle.peft_merge(_base(tmp_path / "base"), tmp_path / "top")
    assert all(bool(t.isfinite().all()) for t in merged.values())


def test_trap_4_topk_is_equivalent_and_measured_not_lossless(tmp_path: Path) -> None:
    """softmax, logarithm and softmax again do not give the same bits."""
    config = VBLoRAConfig(r=4, num_vectors=90, vector_length=16, target_modules=UNEQUAL)
    oracle.make_adapter(tmp_path / "a", config, scale=1.0)
    result = adapterpack.convert(tmp_path / "a", tmp_path / "top", to="topk")
    assert result.grade == "equivalent"
    assert 0 < result.max_rel_error <= 2e-6


def test_trap_5_patterns_match_in_file_order_and_keep_it(tmp_path: Path) -> None:
    """Overlapping alpha patterns mean another scale once their order changes."""
    base = _base(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], alpha_pattern={"q_proj": 50})
    oracle.make_adapter(tmp_path / "a", config)
    path = tmp_path / "a" / "adapter_config.json"
    patterns = {"self_attn.q_proj": 3, "q_proj": 50}
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": patterns}))
    adapterpack.merge(tmp_path / "a", base, tmp_path / "m")
    ours, theirs = _weights(tmp_path / "m"), oracle.peft_merge(base, tmp_path / "a")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    adapterpack.convert(tmp_path / "a", tmp_path / "half", dtype="bf16", max_error=0.1)
    written = json.loads((tmp_path / "half" / "adapter_config.json").read_text())
    assert list(written["alpha_pattern"].items()) == list(patterns.items())
    findings = adapterpack.check(tmp_path / "a").findings
    assert "overlapping-patterns" in {f.code for f in findings}


def test_trap_6_one_rounding_as_peft_does_by_default(tmp_path: Path) -> None:
    """safe_merge rounds the delta first: about half of the weights differ."""
    base = _base(tmp_path / "base", BF16)
    oracle.make_adapter(tmp_path / "a", LoraConfig(r=4, target_modules=["q_proj"]), dtype=BF16, scale=0.3)
    adapterpack.merge(tmp_path / "a", base, tmp_path / "m")
    ours = _weights(tmp_path / "m")
    default = oracle.peft_merge(base, tmp_path / "a", BF16)
    safe = oracle.peft_merge(base, tmp_path / "a", BF16, safe_merge=True)
    assert all(torch.equal(ours[name], default[name]) for name in ours)
    assert any(not torch.equal(ours[name], safe[name]) for name in ours)


def test_trap_7_vera_becomes_lora_by_exact_factors(tmp_path: Path) -> None:
    """PEFT's own way is a dense SVD: lossy, and it takes the model."""
    base = _base(tmp_path / "base")
    oracle.make_adapter(tmp_path / "a", VeraConfig(r=4, target_modules=UNEQUAL), scale=0.3)
    adapterpack.convert(tmp_path / "a", tmp_path / "lora", to="lora", base=base)
    before, after = (oracle.peft_merge(base, tmp_path / name) for name in ("a", "lora"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_trap_8_a_method_that_is_not_read_is_never_guessed(tmp_path: Path) -> None:
    """A method of tomorrow, whose tensors look like RandLoRA's: it can be inspected, not converted or merged."""
    oracle.make_adapter(tmp_path / "a", RandLoraConfig(r=4, target_modules=["q_proj"]))
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"RANDLORA"', '"RANDLORA_TWO"'))
    seen = adapterpack.inspect(tmp_path / "a")
    assert (seen.method, seen.encoding) == ("randlora_two", None) and seen.unsupported
    for call in (
        lambda: adapterpack.convert(tmp_path / "a", tmp_path / "x", to="lora"),
        lambda: adapterpack.merge(tmp_path / "a", _base(tmp_path / "base"), tmp_path / "x"),
    ):
        with pytest.raises(adapterpack.AdapterpackError, match="RANDLORA_TWO"):
            call()


def test_trap_9_plain_names_do_not_make_it_plain_lora(tmp_path: Path) -> None:
    """PiSSA's file looks like LoRA by every key; it is another model's change."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    oracle.make_adapter(tmp_path / "a", config)
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in keys)
    with pytest.raises(adapterpack.AdapterpackError, match="changes the base"):
        adapterpack.merge(tmp_path / "a", _base(tmp_path / "base"), tmp_path / "x")


def test_trap_10_saved_embeddings_and_undelimited_names_are_base_weights(tmp_path: Path) -> None:
    """embed_tokens brings its base weight into the file; modules_to_save "norm" means every norm."""
    base = _base(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], modules_to_save=["norm"])
    oracle.make_adapter(tmp_path / "a", config)
    with open_checkpoint(tmp_path / "a") as c:
        adapter = methods.parse(c)[1]
    assert not adapter.extra
    assert "model.embed_tokens.weight" in adapter.replaced
    assert any("input_layernorm" in name for name in adapter.replaced)
    adapterpack.merge(tmp_path / "a", base, tmp_path / "m")
    ours, theirs = _weights(tmp_path / "m"), oracle.peft_merge(base, tmp_path / "a")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    result = adapterpack.compress(tmp_path / "a", tmp_path / "small", base=base)
    assert any("embed_tokens.base_layer.weight" in dropped for dropped in result.dropped)
