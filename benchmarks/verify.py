"""Two adapters of rank 64 on all linear layers of Llama-2-7B's shape: adapterpack verify beside dense arithmetic.

Makes pairs of random adapters of 32 layers by 7 modules with `safetensors`, then runs the verb in processes of its
own and measures their time and largest memory:
- `perturbed`: B is A with every value moved by about a unit in its last place: nearly equal;
- `unrelated`: another adapter altogether;
- `rescaled`: the same factors, alpha twice as large;
- `same`: the same file.
Beside it the plain way, f64 products of both changes, module by module, on as many modules as were asked for, from
which the time of all is extrapolated and said to be. Prints a Markdown table.

    python benchmarks/verify.py [dtype] [threads] [device] [dense modules]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LAYERS, RANK, HIDDEN, INNER = 32, 64, 4096, 11008
MODULES = {
    **{f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"},
    **{f"mlp.{p}_proj": (INNER, HIDDEN) for p in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INNER),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make(directory: Path, dtype: torch.dtype, seed: int, *, near: Path | None = None, alpha: int = RANK) -> Path:
    """An adapter; `near`: its values moved a little."""
    g = torch.Generator().manual_seed(seed)
    directory.mkdir()
    old = load_file(near / "adapter_model.safetensors") if near else None
    tensors = {}
    for layer in range(LAYERS):
        for name, (out, into) in MODULES.items():
            for x, shape in (("A", (RANK, into)), ("B", (out, RANK))):
                key = f"base_model.model.model.layers.{layer}.{name}.lora_{x}.weight"
                noise = torch.randn(shape, generator=g)
                moved = noise * 0.02 if old is None else old[key].float() * (1 + torch.finfo(dtype).eps * noise)
                tensors[key] = moved.to(dtype)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    write_config(directory, alpha)
    return directory


def make_all(place: Path, dtype: str) -> None:
    a = make(place / "a", DTYPES[dtype], 0)
    make(place / "near", DTYPES[dtype], 1, near=a)
    make(place / "other", DTYPES[dtype], 2)


def write_config(directory: Path, alpha: int) -> None:
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "target_modules": list(MODULES)}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def run(a: Path, b: Path, threads: int, device: str) -> tuple[float, float, float, dict[str, object]]:
    """Seconds, seconds of processor time, MB of memory at most, and what it said."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    program = [sys.executable, "-m", "adapterpack", "verify", str(a), str(b), "--device", device, "--json"]
    start = time.perf_counter()
    process = subprocess.Popen(program, stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    said = process.stdout.read()
    _, _, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, json.loads(said)


def dense(a: Path, b: Path, modules: int) -> float:
    """Seconds that all modules would take in dense f64, from so many of them."""
    x, y = (load_file(d / "adapter_model.safetensors") for d in (a, b))
    keys = [k for k in sorted(x) if k.endswith("lora_B.weight")]
    work = elements = 0.0
    for key in keys[:modules]:
        other = key.replace("lora_B", "lora_A")
        start = time.perf_counter()
        first, second = (t[key].double() @ t[other].double() for t in (x, y))
        assert first.norm() > 0
        difference = first - second
        assert difference.norm() >= 0 and difference.abs().max() >= 0
        work += time.perf_counter() - start
        elements += difference.numel()
    total = sum(out * into for out, into in MODULES.values()) * LAYERS
    return work * total / elements


def main(dtype: str = "float16", threads: str = "2", device: str = "cpu", modules: str = "7") -> None:
    torch.set_num_threads(int(threads))
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        a = place / "a"
        # A child's largest memory counts what its parent had when it was forked: this one stays small.
        maker = multiprocessing.get_context("spawn").Process(target=make_all, args=(place, dtype))
        maker.start()
        maker.join()
        pairs = {
            "perturbed": place / "near",
            "unrelated": place / "other",
            "rescaled": place / "scaled",
            "same": a,
        }
        pairs["rescaled"].mkdir()
        os.link(a / "adapter_model.safetensors", pairs["rescaled"] / "adapter_model.safetensors")
        write_config(pairs["rescaled"], 2 * RANK)
        size = (a / "adapter_model.safetensors").stat().st_size / 1e6
        print(f"{dtype}, {size:.0f} MB each, {threads} threads, {device}, torch {torch.__version__}\n")
        print("| B | seconds | CPU seconds | MB at most | equal | pooled relative error | largest error |")
        print("|---|---|---|---|---|---|---|")
        for name, b in pairs.items():
            seconds, busy, memory, said = run(a, b, int(threads), device)
            pooled = said["pooled"]
            assert isinstance(pooled, dict)
            figures = f"{pooled['rel_error']:.3g} | {pooled['max_abs_error']:.3g}"
            print(f"| {name} | {seconds:.1f} | {busy:.1f} | {memory:.0f} | {said['equal']} | {figures} |", flush=True)
        if int(modules):
            seconds = dense(a, pairs["unrelated"], int(modules))
            print(f"| (dense f64, from {modules} modules) | {seconds:.0f} | | | | | |")


if __name__ == "__main__":
    main(*sys.argv[1:])
