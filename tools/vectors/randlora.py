"""formats/randlora: RandLoRA, with its bases or the seed alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import RandLoraConfig

from vectors.common import DTYPES, GPT2_TM, PFX, Case, Context, Tensors, f64, fuses, mersenne, sha256, uniform
from vectors.fourierft import BASE
from vectors.hostile import Cases, Files, Q, directory, ramp

FORMAT = "randlora"
PEFT_TYPES = ("RANDLORA",)


def randlora(**kw: Any) -> Callable[[], Any]:
    return lambda: RandLoraConfig(
        **{
            "r": 3,
            "randlora_alpha": 12,
            "projection_prng_key": 11,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            **kw,
        }
    )


def kaiming(columns: int) -> float:
    return math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(columns))


def narrow(bits: Any, shape: tuple[int, ...], bound: float) -> torch.Tensor:
    """A uniform draw in bfloat16: what rounds up to the upper bound is the lower one."""
    values = torch.from_numpy(uniform(bits, shape, bound, fuses())).bfloat16()
    low, high = (torch.tensor(b, dtype=torch.float32).bfloat16() for b in (-bound, bound))
    return torch.where(values >= high, low, values)


def deviation(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(((values - values.mean()) ** 2).sum() / (values.size - 1)))


def drawn(config: dict[str, Any], least: int, most: int) -> list[torch.Tensor]:
    """A, (r, 1, least), and B, (most, ceil(least / r), r), as PEFT keeps them before it rounds them for the base."""
    bits, r = mersenne(config["projection_prng_key"]), config["r"]
    shapes, made = ((r, 1, least), (most, -(-least // r), r)), []
    for shape in shapes:
        if config["sparse"] or config["very_sparse"]:
            share = 1 / (2 * (math.sqrt(least) if config["very_sparse"] else 3))
            u = (bits.random_raw(math.prod(shape)) & np.uint64(0xFFFFFF)).astype(np.float64) * 2.0**-24
            signs = (u > np.float32(1 - share)).astype(np.float64) - (u < np.float32(share))
            std = np.float32(deviation(signs))
            made.append(torch.from_numpy((signs.astype(np.float32) / std).reshape(shape)))
            continue
        each = [narrow(bits, (shape[0], 1, shape[2]), kaiming(shape[2])) for _ in range(shape[1])]
        values = torch.cat(each, 1)
        std = torch.from_numpy(deviation(f64(values))).bfloat16()
        made.append((values.float() / std.float()).bfloat16())
    return made


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "projection" if config["save_projection"] else "seed"
    tail = ".randlora_lambda"
    mods = sorted(k.removesuffix(tail).removeprefix(PFX) for k in tensors if k.endswith(tail))
    sides = sorted(max(side) for side in zip(*(ctx.logical(m) for m in mods), strict=True))
    pair = [t.to(DTYPES[ctx.case.dtype]).float() for t in drawn(config, sides[0], sides[1])]
    for name, ours in zip("AB", pair, strict=True):
        copies = [k for k in tensors if k.endswith(f"randlora_{name}")]
        assert len(copies) == (len(mods) + 1 if config["save_projection"] else 0)
        for key in copies:
            assert torch.equal(ours, tensors.pop(key)), "the recipe does not give back PEFT's bases"
    ctx.facts["regenerate"] = {f"base_model.randlora_{n}": sha256(t) for n, t in zip("AB", pair, strict=True)}
    a, b = (f64(t) for t in pair)
    for m in mods:
        lam, gam = f64(tensors.pop(f"{PFX}{m}{tail}")), f64(tensors.pop(f"{PFX}{m}.randlora_gamma"))
        out, into = ctx.logical(m)
        least, bases = min(out, into), gam.shape[0]
        # Rank by rank on one side, base by base on the other: PEFT multiplies them as they lie.
        small = (lam[:, :, None] * a[:, :, :least] * gam).reshape(-1, least)
        large = b[: max(out, into), :bases].reshape(max(out, into), -1)
        delta = large @ small * (config["randlora_alpha"] / config["r"])
        ctx.add(f"{m}.weight", ctx.stored(m, delta if into == least else delta.T))


CASES = [
    Case("projection", randlora(), "layers of unequal shapes; projection", scale=0.1),
    Case("seed", randlora(save_projection=False), "layers of unequal shapes; seed", scale=0.1),
    Case("projection-sparse", randlora(sparse=True), "ternary bases", scale=0.1),
    Case("seed-very-sparse", randlora(very_sparse=True, save_projection=False), "fewer of them; seed", scale=0.1),
    Case("seed-gpt2", randlora(target_modules=GPT2_TM, save_projection=False), "Conv1D", kind="gpt2", scale=0.1),
    Case("seed-f16-base", randlora(save_projection=False), "a float16 base", dtype="float16", scale=0.1),
]
CONFIG = {
    "peft_type": "RANDLORA",
    "r": 4,
    "projection_prng_key": 11,
    "save_projection": True,
    "sparse": True,
    "very_sparse": False,
    "target_modules": ["q_proj"],
}


def invalid(cases: Cases) -> None:
    pair = {f"base_model.randlora_{n}": t.numpy() for n, t in zip("AB", drawn(CONFIG, 8, 8), strict=True)}
    lam, gam = f"{PFX}{Q}.randlora_lambda", f"{PFX}{Q}.randlora_gamma"
    diagonals = {lam: ramp(4, 2), gam: ramp(2, 8)}
    how: dict[str, Any] = {"dtype": "bf16", "base": "base"}

    def made(more: dict[str, Any] | None = None, **arrays: Any) -> Files:
        return directory({**CONFIG, **(more or {})}, pair | diagonals | arrays) | BASE

    lone = directory(CONFIG, {**diagonals, "base_model.randlora_B": pair["base_model.randlora_B"]})
    cases.add("no-a", lone, "inspect", error="invalid", message="one projection of two")
    cases.both("no-gamma", directory(CONFIG, pair | {lam: ramp(4, 2)}) | BASE, "half-pair", "lacks gamma", **how)
    cases.both("other-bases", made(**{gam: ramp(3, 8)}), "half-pair", "(r, nb) and (nb, n)", **how)
    copy = made(**{f"{PFX}{Q}.randlora_B": pair["base_model.randlora_B"] * 2})
    cases.add("copies-differ", copy, "convert", error="invalid", message="another randlora_B", **how)
    cases.add("flag-says-seed", made({"save_projection": False}), "check", finding="wrong-projection-flag")
    narrow_b = made(**{"base_model.randlora_B": ramp(8, 2, 3)})
    cases.add("b-other-rank", narrow_b, "convert", error="invalid", message="do not fit rank 4", **how)
    other = made({"projection_prng_key": 12})
    cases.add("other-seed", other, "convert", error="loss-refused", message="no recipe gives", to="seed", base="base")
