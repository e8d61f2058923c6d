"""Merging an adapter into a 1.1B model on disk: adapterpack beside PEFT, mergekit and a plain copy.

    python benchmarks/merge.py --work DIR                              # 10 to 20 minutes on two cores
    python benchmarks/merge.py --work DIR --only qv16,all16 --rounds 1
    python benchmarks/merge.py --layers 2 --no-peft                    # small and quick
    python benchmarks/merge.py --work DIR --mergekit VENV/bin/mergekit-yaml

The base is random with the shape of TinyLlama-1.1B, bf16, in five shards; PEFT writes the adapters. Both are made
once and stay in DIR (`base`, `qv16`, `all16`, ...); without --work they go to a temporary directory, which is no
measure of a disk where that is a tmpfs. Full size takes 9 GB of disk, 14 with mergekit, and wants memory to cache
most of it.

Every figure is a whole process, interpreter start and imports included, until its output is durable: adapterpack
fsyncs what it writes, the others end with a sync. Before each, untimed: its last output is removed (in the first
round a copy in its place), sync, and base and adapter are read into the page cache. The tools take turns, in the
other order every second round, and `cp -r` is one of them: its time is the floor for anything that writes a whole
new model, and ratios are taken within a round, for disks drift. CPU is user + system of the process and its
children. Peak is their largest resident set: mapped pages of files count, and it is no lower than this script's own
(some 20 MB). "exact": the bytes of all tensors are those of PEFT's output. mergekit is no dependency: give it a
virtual environment of its own. Linux only. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

LAYERS, SHARDS = 22, 5
COPY, OURS, PEFT, MERGEKIT = "cp -r; sync", "adapterpack", "PEFT", "mergekit"
OUTPUTS = {COPY: "out-cp", OURS: "out-adapterpack", PEFT: "out-peft", MERGEKIT: "out-mergekit"}
ADAPTERS = {
    "qv16": "LoRA r16 q,v",
    "all16": "LoRA r16 all-linear",
    "all64": "LoRA r64 all-linear",
    "dora16": "DoRA r16 all-linear",
    "vb": "VB-LoRA r4 all-linear",
    "vera": "VeRA r256 all-linear",
}
# A parent that imported torch would lend its peak to its children, so all that does runs in processes of its own.
WARM_UP = "import torch, peft; from transformers import LlamaForCausalLM"


class Figure(NamedTuple):
    wall: float
    cpu: float
    peak: float


# ---- Parts that run in processes of their own


def make_base(path: Path, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    size = 0
    with torch.no_grad():
        for parameter in model.parameters():
            size += parameter.nbytes
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(1)
    # Shards end at whole tensors: a tenth more keeps them at five.
    model.save_pretrained(path, max_shard_size=size // SHARDS * 11 // 10)


def make_adapter(name: str, base: Path, path: Path) -> None:
    import peft
    import torch
    from transformers import LlamaForCausalLM

    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {
        "qv16": peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
        "all16": peft.LoraConfig(r=16, lora_alpha=32, target_modules=linear),
        "all64": peft.LoraConfig(r=64, lora_alpha=128, target_modules=linear),
        "dora16": peft.LoraConfig(r=16, lora_alpha=32, target_modules=linear, use_dora=True),
        "vb": peft.VBLoRAConfig(
            r=4, num_vectors=256, vector_length=256, topk=2, target_modules=linear, save_only_topk_weights=True
        ),
        "vera": peft.VeraConfig(r=256, target_modules=linear),
    }[name]
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16), config)
    # A fresh adapter changes nothing; this stands for its training.
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter.dtype))
    model.save_pretrained(str(path))


def make(work: str, layers: str, *adapters: str) -> None:
    """What is not there yet, each built aside and renamed, so that a stopped run leaves no half of it."""
    base, part = Path(work) / "base", Path(work) / "part"
    for path in [base, *(Path(work) / name for name in adapters)]:
        if path.exists():
            continue
        shutil.rmtree(part, ignore_errors=True)
        if path == base:
            make_base(part, int(layers))
        else:
            make_adapter(path.name, base, part)
        part.rename(path)


def peft_merge(base: str, adapter: str, output: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
    os.sync()


def compare(ours: str, reference: str) -> None:
    """Prints how many tensors have the same bytes, of all that either model has; one pair in memory at a time."""
    import torch
    from safetensors import safe_open

    def names(directory: str) -> dict[str, Path]:
        found = {}
        for file in sorted(Path(directory).glob("*.safetensors")):
            with safe_open(file, framework="pt") as shard:
                found.update(dict.fromkeys(shard.keys(), file))
        return found

    left, right = names(ours), names(reference)
    equal = 0
    for one in sorted(set(left.values())):
        for other in sorted(set(right.values())):
            with safe_open(one, framework="pt") as a, safe_open(other, framework="pt") as b:
                for name in sorted(set(a.keys()) & set(b.keys())):
                    x, y = a.get_tensor(name), b.get_tensor(name)
                    same = x.dtype == y.dtype and x.shape == y.shape
                    equal += same and torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    total = len(left.keys() | right.keys())
    print(f"{'exact' if equal == total else 'DIFFERENT:'} {equal}/{total} tensors")


ROLES: dict[str, Callable[..., None]] = {"make": make, "peft": peft_merge, "compare": compare}


# ---- Measuring


def environment() -> dict[str, str]:
    """Offline; and byte code may be written, as it is for anything that pip installed."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"HF_HUB_OFFLINE": "1"}


def in_a_process(role: str, *arguments: str | Path) -> str:
    command = [sys.executable, __file__, role, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{role} failed")
    return done.stdout.strip()


def command_of(tool: str, work: Path, adapter: str, mergekit: str) -> list[str]:
    base, output = work / "base", work / OUTPUTS[tool]
    if tool == OURS:
        command = [sys.executable, "-m", "adapterpack", "merge", work / adapter, "--into", base, "--output", output]
    elif tool == PEFT:
        command = [sys.executable, __file__, "peft", base, work / adapter, output]
    elif tool == COPY:
        command = ["sh", "-c", shlex.join(["cp", "-r", str(base), str(output)]) + " && sync"]
    else:
        recipe = work / "mergekit.yml"
        model = json.dumps(f"{base}+{work / adapter}")
        recipe.write_text(f"models:\n  - model: {model}\nmerge_method: passthrough\ndtype: bfloat16\n")
        merge = [mergekit, str(recipe), str(output), "--lora-merge-cache", str(work / "cache-mergekit")]
        command = ["sh", "-c", shlex.join(merge) + " && sync"]
    return [str(part) for part in command]


def warm(*directories: Path) -> None:
    block = bytearray(1 << 20)
    for directory in directories:
        for path in directory.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass


def measured(command: list[str], log: Path) -> Figure:
    with log.open("w") as sink:
        start = time.perf_counter()
        child = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"failed: {shlex.join(command)}\n{log.read_text()[-2000:]}")
    return Figure(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def clean(work: Path, *tools: str) -> None:
    for tool in tools:
        shutil.rmtree(work / OUTPUTS[tool], ignore_errors=True)
        if tool == MERGEKIT:  # It trusts what it finds there: a run with it would merge nothing.
            shutil.rmtree(work / "cache-mergekit", ignore_errors=True)
    os.sync()


def rounds_of(work: Path, adapter: str, tools: list[str], options: argparse.Namespace) -> dict[str, list[Figure]]:
    figures: dict[str, list[Figure]] = {tool: [] for tool in tools}
    for number in range(options.rounds):
        for tool in tools if number % 2 == 0 else reversed(tools):
            command = command_of(tool, work, adapter, options.mergekit)
            clean(work, tool)
            warm(work / "base", work / adapter)
            figures[tool].append(measured(command, work / "log"))
            print(f"round {number + 1}, {adapter}, {tool}: {figures[tool][-1].wall:.2f} s", file=sys.stderr)
    return figures


# ---- The report


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def row(adapter: str, tool: str, figures: list[Figure], copies: list[Figure], exact: str) -> str:
    ratios = [mine.wall / copy.wall for mine, copy in zip(figures, copies, strict=True)]
    return (
        f"| {ADAPTERS[adapter]} | {tool} | {spread([f.wall for f in figures])} |"
        f" {statistics.median(f.cpu for f in figures):.2f} | {max(f.peak for f in figures):.0f} |"
        f" {spread(ratios, 1) if tool != COPY else '1'} | {exact} |"
    )


def machine(work: Path, mergekit: str) -> str:
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = cpus[0].split(":", 1)[1].strip() if cpus else os.uname().machine
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    df = subprocess.run(["df", "--output=fstype", work], stdout=subprocess.PIPE, text=True, check=True)
    packages = [f"{name} {version(name)}" for name in ("adapterpack", "torch", "numpy", "peft", "transformers")]
    if mergekit:
        ask = "from importlib.metadata import version; print('mergekit', version('mergekit'))"
        python = Path(mergekit).with_name("python")
        packages.append(subprocess.run([python, "-c", ask], stdout=subprocess.PIPE, text=True).stdout.strip())
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {df.stdout.split()[-1]};"
        f" python {'.'.join(map(str, sys.version_info[:3]))}, {', '.join(packages)}"
    )


def prepare(work: Path, tools: list[str], options: argparse.Namespace) -> None:
    """Inputs, imported modules, and stand-ins for outputs: what a first round would else lack beside a later one.

    A virtual machine gets its memory from the host at first touch; a copy then took three times as long.
    """
    work.mkdir(parents=True, exist_ok=True)
    config = work / "base" / "config.json"
    if config.exists() and (found := json.loads(config.read_text())["num_hidden_layers"]) != options.layers:
        sys.exit(f"{work}/base has {found} layers: say --layers {found} or give another --work")
    print("making what is missing, importing once ...", file=sys.stderr)
    in_a_process("make", work, str(options.layers), *options.only)
    measured([sys.executable, "-c", WARM_UP], work / "log")
    measured([sys.executable, "-m", "adapterpack", "merge", "--help"], work / "log")
    if options.mergekit:
        measured([options.mergekit, "--help"], work / "log")
    for tool in tools:
        clean(work, tool)
        warm(work / "base")
        shutil.copytree(work / "base", work / OUTPUTS[tool])


def bench(work: Path, options: argparse.Namespace) -> None:
    tools = [COPY, OURS] + [PEFT] * options.peft + [MERGEKIT] * bool(options.mergekit)
    prepare(work, tools, options)
    lines = []
    for adapter in options.only:
        figures = rounds_of(work, adapter, tools, options)
        for tool in tools:
            exact = ""
            if options.peft and tool in (OURS, MERGEKIT):
                exact = in_a_process("compare", work / OUTPUTS[tool], work / OUTPUTS[PEFT])
            lines.append(row(adapter, tool, figures[tool], figures[COPY], exact))
    size = sum(path.stat().st_size for path in (work / "base").iterdir())
    print(f"\nBase of {size / 1e6:,.0f} MB, {options.rounds} rounds. {machine(work, options.mergekit)}\n")
    print("| adapter | tool | wall s, median (min-max) | CPU s, median | peak MB | x cp, median (min-max) | = PEFT |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge speed, side by side; the docstring says what is measured.")
    parser.add_argument("--work", metavar="DIR", type=Path, help="made if missing, and kept; default: temporary")
    parser.add_argument("--layers", metavar="N", type=int, default=LAYERS, help="of the base")
    parser.add_argument("--rounds", metavar="N", type=int, default=3)
    parser.add_argument("--only", metavar="NAMES", default=",".join(ADAPTERS), help="of the adapters, with commas")
    parser.add_argument("--no-peft", dest="peft", action="store_false", help="no PEFT row, nothing compared")
    parser.add_argument("--mergekit", metavar="PATH", default="", help="a mergekit-yaml executable")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - ADAPTERS.keys():
        parser.error(f"no such adapter: {', '.join(sorted(unknown))}; there are {', '.join(ADAPTERS)}")
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work.resolve() if options.work else Path(scratch)
        try:
            bench(work, options)
        finally:
            clean(work, *OUTPUTS)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ROLES:
        ROLES[sys.argv[1]](*sys.argv[2:])
    else:
        main()
