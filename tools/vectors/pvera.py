"""formats/pvera: PVeRA, with its projections or the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import PveraConfig

from vectors.common import DTYPES, GPT2_TM, PFX, Case, Context, Tensors, f64, fuses, mersenne, sha256, uniform
from vectors.fourierft import BASE
from vectors.hostile import Cases, Files, Q, directory, ramp
from vectors.vera import bound

FORMAT = "pvera"
PEFT_TYPES = ("PVERA",)


def pvera(**kw: Any) -> Callable[[], Any]:
    return lambda: PveraConfig(
        **{"r": 3, "projection_prng_key": 11, "target_modules": ["q_proj", "v_proj", "down_proj"], **kw}
    )


def drawn(key: int, r: int, max_in: int, max_out: int, fused: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A, (2 r, max_in), and B, (max_out, r), float32, from the seed."""
    bits = mersenne(key)
    a = uniform(bits, (2 * r, max_in), bound(max_in), fused)
    return a, uniform(bits, (max_out, r), bound(r), fused)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "projection" if config["save_projection"] else "seed"
    tail, r = ".pvera_lambda_b", config["r"]
    mods = sorted(k.removesuffix(tail).removeprefix(PFX) for k in tensors if k.endswith(tail))
    logical = {m: ctx.logical(m) for m in mods}
    max_out, max_in = (max(s[i] for s in logical.values()) for i in (0, 1))
    pair = drawn(config["projection_prng_key"], r, max_in, max_out, fuses())
    ta, tb = (torch.from_numpy(p).to(DTYPES[ctx.case.dtype]).float() for p in pair)
    if config["save_projection"]:
        same = torch.equal(ta, tensors.pop("base_model.pvera_A")) and torch.equal(
            tb, tensors.pop("base_model.pvera_B")
        )
        assert same, "the recipe does not give back PEFT's projections"
    ctx.facts["regenerate"] = {"base_model.pvera_A": sha256(ta), "base_model.pvera_B": sha256(tb)}
    for m in mods:
        out, into = logical[m]
        lb, ld = f64(tensors.pop(f"{PFX}{m}{tail}")), f64(tensors.pop(f"{PFX}{m}.pvera_lambda_d"))
        # The mean is the first half.
        mean = ld[:r, None] * f64(ta)[:r, :into]
        ctx.add(f"{m}.weight", ctx.stored(m, (lb[:, None] * f64(tb)[:out]) @ mean))


CASES = [
    Case("projection-mixed-shapes", pvera(), "layers of unequal shapes; projection", scale=0.3),
    Case("seed-mixed-shapes", pvera(save_projection=False), "layers of unequal shapes; seed", scale=0.3),
    Case("projection-gpt2", pvera(target_modules=GPT2_TM), "Conv1D", kind="gpt2", scale=0.3),
    Case("seed-bf16-base", pvera(save_projection=False), "a bfloat16 base", dtype="bfloat16", scale=0.3),
    Case("projection-sampling", pvera(sample_at_inference=True, generator_seed=5), "sample_at_inference", scale=0.3),
]

CONFIG = {
    "peft_type": "PVERA",
    "r": 3,
    "projection_prng_key": 11,
    "save_projection": True,
    "target_modules": ["q_proj"],
}


def invalid(cases: Cases) -> None:
    a, b = drawn(11, 3, 8, 8)
    both = {"base_model.pvera_A": a, "base_model.pvera_B": b}
    lambdas = {f"{PFX}{Q}.pvera_lambda_b": ramp(8), f"{PFX}{Q}.pvera_lambda_d": ramp(6)}

    def made(more: dict[str, Any] | None = None, **arrays: Any) -> Files:
        return directory({**CONFIG, **(more or {})}, both | lambdas | arrays) | BASE

    lone = directory(CONFIG, {**lambdas, "base_model.pvera_A": a})
    cases.add("no-b", lone, "inspect", error="invalid", message="one projection of two")
    odd = directory(CONFIG, both | {**lambdas, f"{PFX}{Q}.pvera_lambda_d": ramp(7)})
    cases.both("odd-lambda", odd, "half-pair", "has no two halves", dtype="bf16")
    cases.add("flag-says-seed", made({"save_projection": False}), "check", finding="wrong-projection-flag")
    small = made(**{"base_model.pvera_A": ramp(3, 8)})
    cases.add(
        "a-without-variance", small, "convert", error="invalid", message="do not fit rank 3", to="lora", base="base"
    )
    other = made({"projection_prng_key": 12})
    cases.add("other-seed", other, "convert", error="loss-refused", message="no recipe gives", to="seed")
