"""Any method to plain LoRA: adapterpack's exact factors beside PEFT's `save_as_lora`, an SVD of each delta weight.

One Llama block, seven linear layers, random adapters of every method that both convert. PEFT has the model with the
adapter loaded already: only `save_as_lora` is timed. adapterpack starts from the files: reading, folding, measuring
the error of every module and durable writing are timed. One process, in turns; the error of both is measured alike,
in f64, against the delta weights that PEFT itself computes. Prints a Markdown table.

    python benchmarks/convert.py [--runs 3] [--hidden 1024] [METHOD ...]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.conversion import save_as_lora
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapterpack import convert
from adapterpack.methods import METHODS

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAKERS: dict[str, Callable[[], Any]] = {
    "VERA": lambda: peft.VeraConfig(r=64, target_modules=TARGETS),
    "VBLORA": lambda: peft.VBLoRAConfig(r=8, num_vectors=256, vector_length=64, target_modules=TARGETS),
    "UNILORA": lambda: peft.UniLoraConfig(r=8, theta_d_length=4096, target_modules=TARGETS),
    "TINYLORA": lambda: peft.TinyLoraConfig(r=8, target_modules=TARGETS),
    "DELORA": lambda: peft.DeloraConfig(r=16, target_modules=TARGETS),
    "GRALORA": lambda: peft.GraloraConfig(r=16, gralora_k=2, target_modules=TARGETS),
    "LOHA": lambda: peft.LoHaConfig(r=8, alpha=8, target_modules=TARGETS),
    "LOKR": lambda: peft.LoKrConfig(r=4, alpha=4, decompose_both=True, target_modules=TARGETS),
    "MISS": lambda: peft.MissConfig(r=16, target_modules=TARGETS),
}


def llama(hidden: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def make(method: str, hidden: int, directory: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(llama(hidden), MAKERS[method]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)


def deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    """Of every adapted layer, f64, as PEFT computes them."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight") and name.rpartition(".")[2] in TARGETS:
            before = layer.get_base_layer().weight.data.clone()
            layer.merge()
            found[name] = layer.get_base_layer().weight.data.double() - before.double()
            layer.get_base_layer().weight.data.copy_(before)
            layer.merged_adapters.clear()
    return found


def worst(lora: Path, wanted: dict[str, torch.Tensor]) -> tuple[float, int]:
    """The largest relative error of a module, and the largest rank, of a LoRA whose scale is 1."""
    tensors = load_file(lora / "adapter_model.safetensors")
    error, rank = 0.0, 0
    for name, delta in wanted.items():
        key = name if name.startswith("base_model.model.") else f"base_model.model.{name}"
        a, b = (tensors[f"{key}.lora_{side}.weight"].double() for side in "AB")
        error = max(error, float((b @ a - delta).norm() / delta.norm()))
        rank = max(rank, a.shape[0])
    return error, rank


def run(method: str, hidden: int, runs: int, work: Path) -> list[str]:
    source, base = work / method, work / "base"
    make(method, hidden, source)
    model = PeftModel.from_pretrained(llama(hidden), str(source)).eval()
    wanted = deltas(model)
    walls: dict[str, list[float]] = {"ours": [], "peft": []}
    for _ in range(runs):
        shutil.rmtree(work / "ours", ignore_errors=True)
        start = time.perf_counter()
        convert(source, work / "ours", to="lora", base=base)
        walls["ours"].append(time.perf_counter() - start)
        ours, rank = worst(work / "ours", wanted)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The same rank as ours, so that both may be exact.
            save_as_lora(str(work / "peft"), model, rank=rank)
        walls["peft"].append(time.perf_counter() - start)
        theirs, _ = worst(work / "peft", wanted)
    ratio = statistics.median(p / o for p, o in zip(walls["peft"], walls["ours"], strict=True))
    return [
        method,
        str(rank),
        f"{statistics.median(walls['ours']):.3f}",
        f"{statistics.median(walls['peft']):.2f}",
        f"{ratio:.0f} x",
        f"{ours:.1e}",
        f"{theirs:.1e}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=1024)
    args = parser.parse_args()
    names = args.methods or [m for m in MAKERS if m in METHODS]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        llama(args.hidden).save_pretrained(work / "base")
        print(f"\nhidden {args.hidden}, 7 modules, {args.runs} runs each, in turns\n")
        print("| method | rank | adapterpack s | PEFT save_as_lora s | faster | error | PEFT's error |")
        print("|---|---|---|---|---|---|---|")
        for name in names:
            print(f"| {' | '.join(run(name, args.hidden, args.runs, work))} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
