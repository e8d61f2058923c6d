"""q, k, v and gate, up: apart or in one. The merged models are the same model in two layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file

import adapterpack
from adapterpack.errors import Unsupported, UsageError, WrongBase

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
LORA = {"r": 4, "lora_alpha": 6}
APART = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model twice: Phi-3 with fused projections, Llama with the same weights apart."""
    root = tmp_path_factory.mktemp("layouts")
    torch.manual_seed(0)
    fused = transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES, pad_token_id=0))
    apart = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    apart.load_state_dict(split(fused.state_dict()))
    oracle.save_base(fused, root / "fused")
    oracle.save_base(apart, root / "apart")
    x = torch.arange(12)[None]
    assert torch.allclose(fused(x).logits, apart(x).logits, atol=1e-5)
    return root / "fused", root / "apart"


def split(state: State) -> State:
    made = {}
    for name, t in state.items():
        if "qkv_proj" in name:
            for leaf, part in zip(("q", "k", "v"), t.split([32, 16, 16]), strict=True):
                made[name.replace("qkv_proj", f"{leaf}_proj")] = part
        elif "gate_up_proj" in name:
            for leaf, part in zip(("gate", "up"), t.split(48), strict=True):
                made[name.replace("gate_up_proj", f"{leaf}_proj")] = part
        else:
            made[name] = t
    return made


def distance(x: State, y: State, base: State) -> float:
    assert x.keys() == y.keys()
    moved = [n for n in base if not torch.equal(x[n], base[n])]
    return max(float((x[n] - y[n]).double().norm() / (x[n] - base[n]).double().norm()) for n in moved)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"k_proj": 2, "gate_up_proj": 5}, "alpha_pattern": {"v_proj": 12, "up_proj": 5}},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("target", ["apart", "fused"])
def test_fused_is_split(bases: tuple[Path, Path], tmp_path: Path, name: str, target: str) -> None:
    fused, apart = bases
    config = LoraConfig(**{**LORA, **CONFIGS[name]}, target_modules=["qkv_proj", "gate_up_proj", "o_proj"])
    oracle.make_adapter(tmp_path / "a", config, scale=0.3, base=oracle.load_base(fused))
    base = fused if target == "fused" else apart
    result = adapterpack.convert(tmp_path / "a", tmp_path / "s", layout="split", base=base)
    assert (result.grade, result.max_rel_error) == ("equivalent", 0)
    assert oracle.peft_load(apart, tmp_path / "s")[1].clean
    merged = split(oracle.peft_merge(fused, tmp_path / "a"))
    assert distance(merged, oracle.peft_merge(apart, tmp_path / "s"), oracle.load_base(apart).state_dict()) <= 5e-6
    # And back: the very tensors.
    adapterpack.convert(tmp_path / "s", tmp_path / "b", layout="fused", base=fused)
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in "ab")
    assert before.keys() == after.keys() and all(torch.equal(after[k], t) for k, t in before.items())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("modules", [APART, ["q_proj", "v_proj"], ["k_proj", "up_proj"]], ids=len)
def test_apart_is_fused(bases: tuple[Path, Path], tmp_path: Path, name: str, modules: list[str]) -> None:
    fused, apart = bases
    config = LoraConfig(**{**LORA, **CONFIGS[name]}, target_modules=modules)
    oracle.make_adapter(tmp_path / "a", config, scale=0.3, base=oracle.load_base(apart))
    result = adapterpack.convert(tmp_path / "a", tmp_path / "f", layout="fused", base=fused)
    assert result.grade == "equivalent" and result.max_rel_error <= 1e-7
    assert oracle.peft_load(fused, tmp_path / "f")[1].clean
    merged = split(oracle.peft_merge(fused, tmp_path / "f"))
    assert distance(oracle.peft_merge(apart, tmp_path / "a"), merged, oracle.load_base(apart).state_dict()) <= 5e-6
    shapes = {k: tuple(t.shape) for k, t in load_file(tmp_path / "f" / "adapter_model.safetensors").items()}
    if modules == APART and name == "plain":
        assert shapes["base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"] == (12, 32)
    # For an engine too, in one go: one scale and one rank.
    adapterpack.convert(tmp_path / "a", tmp_path / "e", layout="fused", engine="vllm", base=fused)
    assert oracle.peft_load(fused, tmp_path / "e")[1].clean
    merged = split(oracle.peft_merge(fused, tmp_path / "e"))
    assert distance(oracle.peft_merge(apart, tmp_path / "a"), merged, oracle.load_base(apart).state_dict()) <= 5e-6


def test_rows_by_heads(tmp_path: Path) -> None:
    """GPT-NeoX: for each head its q, k and v; what is split computes q, k and v."""
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48, vocab_size=96
    )
    base = oracle.save_base(transformers.GPTNeoXForCausalLM(config), tmp_path / "base")
    adapter = LoraConfig(**LORA, target_modules=["query_key_value"])
    oracle.make_adapter(tmp_path / "a", adapter, scale=0.3, base=oracle.load_base(base))
    adapterpack.convert(tmp_path / "a", tmp_path / "s", layout="split", base=base)
    whole = load_file(tmp_path / "a" / "adapter_model.safetensors")
    parts = load_file(tmp_path / "s" / "adapter_model.safetensors")
    stem = "base_model.model.gpt_neox.layers.0.attention."
    by_head = whole[f"{stem}query_key_value.lora_B.weight"].view(4, 3, 8, 4)
    for n, leaf in enumerate(("q_proj", "k_proj", "v_proj")):
        assert torch.equal(parts[f"{stem}{leaf}.lora_B.weight"], by_head[:, n].reshape(32, 4))
    adapterpack.convert(tmp_path / "s", tmp_path / "b", layout="fused", base=base)
    again = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert again.keys() == whole.keys() and all(torch.equal(again[k], t) for k, t in whole.items())


def test_what_is_not_known_to_be_exact_is_refused(bases: tuple[Path, Path], tmp_path: Path) -> None:
    fused, apart = bases
    targets = ["qkv_proj", "o_proj"]
    oracle.make_adapter(tmp_path / "a", LoraConfig(**LORA, target_modules=targets), base=oracle.load_base(fused))
    oracle.make_adapter(
        tmp_path / "d", LoraConfig(**LORA, use_dora=True, target_modules=targets), base=oracle.load_base(fused)
    )
    oracle.make_adapter(tmp_path / "o", LoraConfig(**LORA, target_modules=["o_proj"]), base=oracle.load_base(fused))

    def refused(kind: type[Exception], match: str, source: str, base: Path | None, layout: str = "split") -> None:
        with pytest.raises(kind, match=match):
            adapterpack.convert(tmp_path / source, tmp_path / "no", layout=layout, base=base)
        assert not (tmp_path / "no").exists()

    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    refused(WrongBase, "depends on the base", "a", None)
    refused(Unsupported, "more than A and B", "d", fused)
    refused(Unsupported, "nothing to do", "o", fused)
    refused(Unsupported, "nothing to do", "a", apart, "fused")
    other = tmp_path / "codegen"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "codegen", **SIZES}))
    refused(Unsupported, "codegen", "a", other)
    (other / "config.json").write_text(json.dumps({"model_type": "phi3", **SIZES, "num_key_value_heads": 4}))
    refused(WrongBase, "rows", "a", other)
    refused(UsageError, "no layout", "a", fused, "sideways")
    with pytest.raises(UsageError):
        adapterpack.convert(tmp_path / "a", tmp_path / "no", layout="split", to="topk")
