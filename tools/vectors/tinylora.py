"""formats/tinylora: TinyLoRA, with its projections or the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import TinyLoraConfig

from vectors.common import DTYPES, PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Files, Q, V, directory, ramp

FORMAT = "tinylora"
PEFT_TYPES = ("TINYLORA",)


def tinylora(**kw: Any) -> Callable[[], Any]:
    return lambda: TinyLoraConfig(
        **{"r": 2, "u": 5, "projection_seed": 11, "target_modules": ["q_proj", "k_proj", "down_proj"], **kw}
    )


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "projection" if config["save_projection"] else "seed"
    tail = ".tinylora_A"
    found = {k.removesuffix(tail).removeprefix(PFX) for k in tensors if k.endswith(tail)}
    # In the order in which the model has them.
    mods = [m for m in ctx.modules if m in found]
    groups = max(1, round(len(mods) * (1.0 - config["weight_tying"])))
    vectors = {g: f64(tensors.pop(f"base_model.tinylora_v.{g}")) for g in range(groups)}
    for n, m in enumerate(mods):
        a, b = f64(tensors.pop(f"{PFX}{m}{tail}")), f64(tensors.pop(f"{PFX}{m}.tinylora_B"))
        r = len(a)
        drawn = torch.normal(0.0, 1.0 / r**0.5, (config["u"], r, r), generator=torch.Generator().manual_seed(11 + n))
        p = drawn.to(DTYPES[ctx.case.dtype]).float()
        if config["save_projection"]:
            saved = tensors.pop(f"{PFX}{m}.tinylora_P")
            torch.testing.assert_close(saved, p)
            p = saved
        v = vectors[min(n // max(1, len(mods) // groups), groups - 1)]
        delta = b @ np.tensordot(v, f64(p), 1) @ a
        ctx.add(f"{m}.weight", ctx.stored(m, delta))


CASES = [
    Case("projection", tinylora(), "layers of unequal shapes; projection", scale=0.3),
    Case("seed", tinylora(save_projection=False), "layers of unequal shapes; seed", scale=0.3),
    Case("projection-tied", tinylora(weight_tying=0.5), "groups of modules share a vector", scale=0.3),
    Case(
        "seed-gpt2",
        tinylora(target_modules=["c_attn", "c_proj", "wpe"], save_projection=False),
        "Conv1D, and an embedding",
        kind="gpt2",
        scale=0.3,
    ),
    Case("seed-bf16-base", tinylora(save_projection=False), "a bfloat16 base", dtype="bfloat16", scale=0.3),
]
CONFIG = {
    "peft_type": "TINYLORA",
    "r": 2,
    "u": 5,
    "projection_seed": 11,
    "save_projection": True,
    "weight_tying": 0.0,
    "target_modules": ["q_proj", "v_proj"],
}


def invalid(cases: Cases) -> None:
    def module(name: str) -> dict[str, np.ndarray]:
        shapes = {"A": (2, 8), "B": (8, 2), "P": (5, 2, 2)}
        return {f"{PFX}{name}.tinylora_{part}": ramp(*shape) for part, shape in shapes.items()}

    vectors = {f"base_model.tinylora_v.{g}": ramp(5) for g in (0, 1)}
    good = module(Q) | module(V) | vectors
    p = f"{PFX}{Q}.tinylora_P"

    def made(drop: str = "", more: dict[str, Any] | None = None, **arrays: Any) -> Files:
        return directory({**CONFIG, **(more or {})}, {k: t for k, t in (good | arrays).items() if k != drop})

    some = made(p)
    cases.add("p-of-some", some, "inspect", error="invalid", message="projections of some modules")
    cases.both("p-not-square", made(**{p: ramp(5, 2, 3)}), "half-pair", "(u, 2, 2) is wanted", dtype="bf16")
    cases.both("no-a", made(f"{PFX}{Q}.tinylora_A"), "half-pair", "lacks A", dtype="bf16")
    lost = made("base_model.tinylora_v.1")
    cases.both("no-vector", lost, "missing-vector", "needs tinylora_v.1", dtype="bf16")
    tying = made(more={"weight_tying": 1.5})
    cases.add("tying-too-much", tying, "convert", error="invalid", message="weight_tying is 1.5", dtype="bf16")
    cases.add("flag-says-seed", made(more={"save_projection": False}), "check", finding="wrong-projection-flag")
    odd = {k.replace("q_proj", "zig").replace("v_proj", "zag"): t for k, t in good.items()}
    message = "the order in which the model defines these modules is not known"
    cases.add("unknown-order", directory(CONFIG, odd), "convert", error="unsupported", message=message, to="lora")
