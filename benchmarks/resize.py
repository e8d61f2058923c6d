"""Rank 64 to 16 on 4096 x 4096 modules: adapterpack resize beside PEFT's way, a dense SVD.

PEFT lowers a rank by `add_weighted_adapter(..., "svd", svd_rank)` or `convert_to_lora`: both form B @ A and call
torch.linalg.svd on it. Its arithmetic is run here on the same factors, without the live model that it takes as well:
the dense product, the SVD with full matrices (its default for `add_weighted_adapter`) or thin (the kinder one), and
the cut. Ours is the whole verb: reading, cutting, measuring every error, writing, fsync; torch is imported before.
Both run in one process with the same threads. Prints a Markdown table.

    python benchmarks/resize.py [modules] [dense modules]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from adapterpack import resize

SIZE, RANK, LOWER = 4096, 64, 16


def make_input(directory: Path, modules: int) -> None:
    g = torch.Generator().manual_seed(0)
    decay = 0.9 ** torch.arange(RANK)
    tensors = {}
    for n in range(modules):
        key = f"base_model.model.model.layers.{n}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, SIZE, generator=g) * decay[:, None]
        tensors[f"{key}.lora_B.weight"] = torch.randn(SIZE, RANK, generator=g)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def dense(source: Path, modules: int, full_matrices: bool) -> tuple[float, float]:
    """Seconds for each module, and the worst relative error."""
    tensors = load_file(source / "adapter_model.safetensors")
    start, worst = time.perf_counter(), 0.0
    for n in range(modules):
        key = f"base_model.model.model.layers.{n}.self_attn.q_proj"
        delta = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        u, s, vh = torch.linalg.svd(delta, full_matrices=full_matrices)
        b, a = u[:, :LOWER] @ torch.diag(s[:LOWER]), vh[:LOWER]
        assert b.shape == (SIZE, LOWER) and a.shape == (LOWER, SIZE)
        worst = max(worst, float(s[LOWER:].norm() / s.norm()))
    return (time.perf_counter() - start) / modules, worst


def main(modules: int, dense_modules: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "a"
        make_input(source, modules)
        start = time.perf_counter()
        result = resize(source, Path(scratch) / "r", rank=LOWER)
        ours = (time.perf_counter() - start) / modules
        worst = max(m.rel_error for m in result.modules[:dense_modules])
        rows = [("adapterpack resize, whole verb", modules, ours, worst)]
        for name, full in (("dense SVD, thin", False), ("dense SVD, full matrices (PEFT's default)", True)):
            seconds, error = dense(source, dense_modules, full)
            rows.append((name, dense_modules, seconds, error))
    print(f"{SIZE} x {SIZE}, rank {RANK} to {LOWER}, float32, {torch.get_num_threads()} threads\n")
    print("| way | modules | s a module | times as long | worst error of the first |")
    print("|---|---|---|---|---|")
    for name, count, seconds, error in rows:
        print(f"| {name} | {count} | {seconds:.3f} | {seconds / ours:.0f} | {error:.6f} |")


if __name__ == "__main__":
    words = [int(w) for w in sys.argv[1:3]]
    main(*(words + [16, 2][len(words) :]))
