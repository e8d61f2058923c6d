"""What vLLM's own loader makes of adapter directories; for an interpreter that has vLLM's Python files on its path.

    python vllm_reads.py OUT.safetensors MAX_RANK DIRECTORY...

Prints JSON, directory name to `{"accepted": true}` or `{"error": text}`, and writes for each accepted one the change
of every module as vLLM's loader has it, scaling times B times A. No GPU and no compiled part of vLLM is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import vllm.lora.lora_model
from safetensors.torch import load_file, save_file
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"}


def main() -> None:
    # Memory for transfers is pinned, which takes a device to transfer to.
    vllm.lora.lora_model.PIN_MEMORY = False
    out, limit, *directories = sys.argv[1:]
    said, deltas = {}, {}
    for place in map(Path, directories):
        try:
            helper = PEFTHelper.from_local_dir(str(place), 64)
            helper.validate_legal(LoRAConfig(max_lora_rank=int(limit), lora_dtype=torch.float32))
            model = LoRAModel.from_local_checkpoint(
                str(place), MODULES, helper, lora_model_id=1, device="cpu", dtype=torch.float32, model_vocab_size=96
            )
            for name, lora in model.loras.items():
                a, b = lora.lora_a.double(), lora.lora_b.double()
                embedding = f"base_model.model.{name}.lora_embedding_A"
                change = lora.scaling * (b @ a)
                is_embedding = embedding in load_file(place / "adapter_model.safetensors")
                deltas[f"{place.name}/{name}.weight"] = (change.T if is_embedding else change).contiguous()
            said[place.name] = {"accepted": True}
        except Exception as e:
            said[place.name] = {"error": str(e).replace(str(place), "DIRECTORY")[:300]}
    save_file(deltas, out)
    print(json.dumps(said))


main()
