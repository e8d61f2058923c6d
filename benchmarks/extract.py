"""`extract` on four layers of half the width of Llama2-7B: time, memory, how near its sketch comes to the exact SVD.

The change has singular values that fall slowly, like 1 / k^0.7, on bf16 weights from a warm page cache. The exact
SVD is `torch.linalg.svd` of the same change in float32, one matrix at a time, which is what a script without a sketch
does. Whole processes, imports included. Prints a Markdown table.

    python benchmarks/extract.py [rank] [size]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = int(sys.argv[1]) if len(sys.argv) > 1 else 16
SIZE = int(sys.argv[2]) if len(sys.argv) > 2 else 2048
WIDE = SIZE * 11008 // 4096
SHAPES = {
    "self_attn.q_proj": (SIZE, SIZE),
    "self_attn.o_proj": (SIZE, SIZE),
    "mlp.up_proj": (WIDE, SIZE),
    "mlp.down_proj": (SIZE, WIDE),
}
OURS = "import sys, adapterpack; r = adapterpack.extract(*sys.argv[1:4], rank=int(sys.argv[4]))\n"
OURS += "print({m.name: m.rel_error for m in r.modules})"
EXACT = """
import sys, torch
from safetensors.torch import load_file, save_file
base, tuned, out, rank = *sys.argv[1:4], int(sys.argv[4])
a, b = (load_file(f"{d}/model.safetensors") for d in (base, tuned))
made, errors = {}, {}
for name in a:
    d = b[name].float() - a[name].float()
    u, s, vh = torch.linalg.svd(d, full_matrices=False)
    made[name + ".b"], made[name + ".a"] = (u[:, :rank] * s[:rank]).contiguous(), vh[:rank].contiguous()
    errors[name.removesuffix(".weight")] = float((s[rank:].double() ** 2).sum().sqrt() / s.double().norm())
save_file(made, out + ".safetensors")
print(errors)
"""


def change(out: int, into: int, seed: int) -> torch.Tensor:
    """A random matrix whose columns are scaled: its singular values fall like 1 / k^0.7."""
    g = torch.Generator().manual_seed(seed)
    n = min(out, into)
    left = torch.randn(out, n, generator=g) * torch.arange(1, n + 1) ** -0.7
    return left @ torch.randn(n, into, generator=g) * (1e-3 / n**0.5)


def models(root: Path) -> None:
    base, tuned = {}, {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed)) * 0.02
        key = f"model.layers.0.{name}.weight"
        base[key] = w.bfloat16()
        tuned[key] = (w + change(*shape, seed)).bfloat16()
    for where, tensors in (("base", base), ("tuned", tuned)):
        (root / where).mkdir()
        (root / where / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file(tensors, root / where / "model.safetensors", metadata={"format": "pt"})
        load_file(root / where / "model.safetensors")


def measured(code: str, root: Path, out: str) -> tuple[float, float, dict[str, float]]:
    """Seconds, MB at the peak, and the error of each module."""
    # Not getrusage: a child's begins with what its parent had.
    code += "\nprint(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    args = [sys.executable, "-c", code, str(root / "base"), str(root / "tuned"), str(root / out), str(RANK)]
    start = time.perf_counter()
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    errors, peak = done.stdout.strip().splitlines()
    return seconds, int(peak) / 1000, json.loads(errors.replace("'", '"'))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        models(root)
        rows = {way: measured(code, root, out) for way, code, out in (("sketch", OURS, "a"), ("exact", EXACT, "b"))}
    print("| way | wall s | peak memory MB | error, worst module | error, mean |")
    print("|---|---|---|---|---|")
    for way, (seconds, peak, errors) in rows.items():
        mean = sum(errors.values()) / len(errors)
        print(f"| {way} | {seconds:.1f} | {peak:.0f} | {max(errors.values()):.6f} | {mean:.6f} |")


if __name__ == "__main__":
    main()
