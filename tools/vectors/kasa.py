"""formats/kasa: KaSA, a variant of LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import KasaConfig, LoraConfig

from vectors.common import PFX, Case, Context, Tensors, f64, first_match
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "kasa"


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "kasa"
    tail = ".lora_diag"
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        diagonal = f64(tensors.pop(key))
        a, b = (f64(tensors.pop(f"{PFX}{module}.lora_{side}.weight")) for side in "AB")
        r = len(diagonal)
        alpha = first_match(config["alpha_pattern"], module, config["lora_alpha"])
        scale = alpha / (r**0.5 if config["use_rslora"] else r)
        w = f64(base[f"{module}.weight"])
        u, s, vh = np.linalg.svd(w, full_matrices=False)
        lost = (u[:, -r:] * s[-r:]) @ vh[-r:]
        ctx.base_dependent(f"{module}.weight", scale * (b * diagonal) @ a - lost)
        bias = tensors.pop(f"{PFX}{module}.lora_B.bias", None)
        if bias is not None:
            ctx.add(f"{module}.bias", scale * f64(bias))


def kasa(**kw: Any) -> Callable[[], Any]:
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"], **kw}
    return lambda: LoraConfig(kasa_config=KasaConfig(), **fields)


CASES = [
    Case("linear", kasa(), "layers of unequal shapes", scale=0.3),
    Case(
        "patterns",
        kasa(rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 2}, use_rslora=True),
        "ranks and alphas of single modules",
        scale=0.3,
    ),
    Case("bias", kasa(lora_bias=True, target_modules=["q_proj", "fc1"]), "biases of B", kind="opt", scale=0.3),
    Case("bf16-base", kasa(), "a bfloat16 base", dtype="bfloat16", scale=0.3),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "kasa_config": {"beta": 1e-4, "gamma": 1e-3}}
    config |= {"target_modules": ["q_proj"]}
    shapes = {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2), "lora_diag": (2,)}

    def bad(more: dict[str, Any] | None = None, **changed: Any) -> Any:
        own = {**shapes, **changed}
        arrays = {f"{PFX}{Q}.{n}": ramp(*s) for n, s in own.items() if s is not None}
        return directory({**config, **(more or {})}, arrays)

    def refused(case: str, files: Any, message: str, error: str = "unsupported") -> None:
        cases.add(case, files, "convert", error=error, message=message, dtype="bf16")

    cases.both("no-diagonal", bad(lora_diag=None), "half-pair", "lacks lora_diag", dtype="bf16")
    cases.both("diagonal-of-another-rank", bad(lora_diag=(3,)), "half-pair", "are not (r, in)", dtype="bf16")
    cases.add("rank-not-as-config", bad({"r": 4}), "check", finding="rank-mismatch")
    refused("config-off", bad({"kasa_config": None}), "an object is wanted", "invalid")
    refused("unknown-field", bad({"kasa_config": {"delta": 1}}), "delta in kasa_config is unknown")
    refused("dora-too", bad({"use_dora": True}), "do not go with kasa_config")
