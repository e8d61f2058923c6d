"""VB-LoRA full logits to top-k at Llama2-7B size: adapterpack beside PEFT's own way.

39,040 sub-vectors x 2,048 logits: rank 4 on the seven linear layers of 32 blocks, vectors of 256. PEFT can
only write top-k from a live model, so it gets one whose base weights are never touched (they cost it no
memory here; in life they are 13 GB). Both read the same directory from a warm page cache and end fsynced or
saved; whole processes, imports included, in turns. Prints a Markdown table.

    python benchmarks/vblora_topk.py [runs]
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LAYERS, RANK, VECTORS, LENGTH, TOPK = 32, 4, 2048, 256, 2
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def modules() -> Iterator[tuple[str, tuple[int, int]]]:
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            yield f"model.layers.{layer}.{name}", shape


def make_input(directory: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    tensors = {"base_model.vblora_vector_bank": normal(VECTORS, LENGTH) * np.float32(0.02)}
    for module, (out, into) in modules():
        tensors[f"base_model.model.{module}.vblora_logits_A"] = normal(RANK, into // LENGTH, VECTORS)
        tensors[f"base_model.model.{module}.vblora_logits_B"] = normal(out // LENGTH, RANK, VECTORS)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "VBLORA",
        "r": RANK,
        "num_vectors": VECTORS,
        "vector_length": LENGTH,
        "topk": TOPK,
        "save_only_topk_weights": False,
        "target_modules": [name.split(".")[1] for name in SHAPES],
        "bias": "none",
        "fan_in_fan_out": False,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def ours(source: Path, target: Path) -> None:
    from adapterpack import compress

    result = compress(source, target)
    print(f"grade {result.grade}, error {result.max_rel_error:.2g}", file=sys.stderr)


def peft(source: Path, target: Path) -> None:
    import torch
    from peft import PeftModel

    class Block(torch.nn.Module):
        def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
            super().__init__()
            for name, (out, into) in shapes.items():
                self.add_module(name, torch.nn.Linear(into, out, bias=False, device="meta", dtype=torch.bfloat16))

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for part in ("self_attn", "mlp"):
                self.add_module(part, Block({n.split(".")[1]: s for n, s in SHAPES.items() if n.startswith(part)}))

    body = torch.nn.Module()
    body.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
    model = torch.nn.Module()
    model.model = body
    # Allocated, never written: pages that are not touched take no memory.
    model.to_empty(device="cpu")
    loaded = PeftModel.from_pretrained(model, str(source))
    loaded.peft_config["default"].save_only_topk_weights = True
    loaded.save_pretrained(str(target))


def measured(way: str, source: Path, target: Path) -> tuple[float, float, int]:
    """Wall seconds, peak MB of memory, and bytes written, of one whole process."""
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    child = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, __file__, way, str(source), str(target)])
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"{way} failed")
    wall = time.perf_counter() - start
    return wall, usage.ru_maxrss / 1000, sum(f.stat().st_size for f in target.iterdir())


def main(runs: int) -> None:
    ways = {"adapterpack compress": "ours", "PEFT: load into a model, save_pretrained": "peft"}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "full"
        make_input(source)
        size = sum(f.stat().st_size for f in source.iterdir())
        for file in source.iterdir():
            file.read_bytes()
        rows: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ways}
        for _ in range(runs):
            for name, way in ways.items():
                rows[name].append(measured(way, source, Path(scratch) / way))
        print(f"\n{size / 1e6:.0f} MB of full logits, {runs} runs each, in turns\n")
        print("| way | wall s, median (min-max) | peak memory MB | bytes out |")
        print("|---|---|---|---|")
        for name, figures in rows.items():
            walls = [f[0] for f in figures]
            print(
                f"| {name} | {statistics.median(walls):.1f} ({min(walls):.1f}-{max(walls):.1f}) |"
                f" {max(f[1] for f in figures):.0f} | {figures[0][2]:,} |"
            )


if __name__ == "__main__":
    if len(sys.argv) == 4:
        {"ours": ours, "peft": peft}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
