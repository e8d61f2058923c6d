"""Write the dictionary of packs: what the small files and the manifest of most adapters have in common.

    python tools/make_dictionary.py

It is part of version 1 of the format: written once, and never again (`formats/apack/SPEC.md`).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import peft
import torch
from peft import get_peft_model

ROOT = Path(__file__).parent.parent
PLACES = (ROOT / "formats" / "apack" / "dictionary", ROOT / "adapterpack" / "containers" / "apack" / "dictionary")
HASH = "0123456789abcdef" * 4


def card() -> str:
    """The card that PEFT writes beside an adapter which nobody has described."""
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return (Path(directory) / "README.md").read_text()


def configs() -> str:
    """The configs of all methods as they stand in a manifest, the commonest last; of others only what is new."""
    lines: dict[str, None] = {}
    names = [name for name in dir(peft) if name.endswith("Config") and name not in ("PeftConfig", "LoraConfig")]
    common = {"peft_version": "0.21.2", "target_modules": ["q_proj", "v_proj"], "inference_mode": True}
    for name in [*sorted(names), "VBLoRAConfig", "VeraConfig", "LoraConfig"]:
        try:
            config = getattr(peft, name)().to_dict()
        except (AttributeError, TypeError, ValueError):
            continue
        config.update(common, base_model_name_or_path="meta-llama/Llama-2-7b-hf")
        text = json.dumps({k: v for k, v in config.items() if _plain(v)}, indent=2, sort_keys=True)
        for line in text.split("\n"):
            lines.pop(line, None)
            lines[line] = None
    return json.dumps("\n".join(lines))


def _plain(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def names() -> str:
    """Tensors as a manifest lists them."""
    rows = []
    for module in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", *(f"self_attn.{p}_proj" for p in "koqv")):
        for part, shape in (("lora_A", "[16,4096]"), ("lora_B", "[4096,16]")):
            rows.append(f'["base_model.model.model.layers.0.{module}.{part}.weight","F32",{shape},0]')
    for path in ("bert.encoder.layer.0.attention.self.query", "transformer.h.0.attn.c_attn"):
        for part in ("vera_lambda_b", "vera_lambda_d", "vblora_logits_A_topk_indices", "lora_magnitude_vector"):
            rows.append(f'["base_model.model.{path}.{part}","BF16",[768],1]')
    return ",".join(rows)


def manifest() -> str:
    """The frame of a manifest."""
    return (
        '{"apack":1,"base":null,"classes":[],"dropped":[],"encoding":"lora","error":null,"files":'
        '[{"path":"adapter_config.json","sha256":"' + HASH + '","size":1024,"text":' + configs() + "},"
        '{"header":null,"metadata":[["format","pt"]],"path":"adapter_model.safetensors","sha256":"","size":,"tensors":},'
        '{"path":"README.md","sha256":"","size":,"stream":2}],"grade":"lossless","max_error":null,"method":"lora",'
        '"parent":null,"producer":"adapterpack 0.1.0, zstd 1.5.7","recipes":[{"recipe":{"arithmetic":"fused","draws":'
        '[{"bound":"0x1.0000000000000p-5","name":"vera_A","shape":[256,4096]}],"generator":"mt19937","keys":{},'
        '"name":"uniform","order":"row-major, one 32-bit draw per element, low 24 bits","seed":0,"sha256":{"vera_A":"'
        '"},"stored":"F32","through":"F32"},"version":1}],"source_bytes":,"streams":[{"frames":[['
        '"steps":["gaps","narrow","rotate","exponents","planes"],"width":4},{"frames":[[,"steps":["rotate",'
        '"exponents","planes"],"width":2},{"frames":[[,"steps":[],"width":1}],"tensors":[' + names() + "]}"
    )


if __name__ == "__main__":
    data = (card() + manifest()).encode()
    for place in PLACES:
        place.write_bytes(data)
    print(f"{len(data):,} bytes")
