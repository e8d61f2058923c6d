"""formats/hira: HiRA."""

from __future__ import annotations

from typing import Any

import numpy as np
from peft import HiraConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "hira"
PEFT_TYPES = ("HIRA",)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "hira"
    for tail in (".hira_A", ".hira_embedding_A"):
        for key in sorted(k for k in tensors if k.endswith(tail)):
            module = key.removesuffix(tail).removeprefix(PFX)
            a, b = f64(tensors.pop(key)), f64(tensors.pop(key.removesuffix("A") + "B"))
            product = np.tensordot(b.reshape(len(b), -1), a, axes=(1, 0))
            product = product.T if "embedding" in tail else ctx.stored(module, product)
            ctx.base_dependent(f"{module}.weight", f64(base[f"{module}.weight"]) * product)


def hira(**kw: Any) -> Any:
    return lambda: HiraConfig(**{"r": 3, "target_modules": ["q_proj", "down_proj"], **kw})


CASES = [
    Case("llama", hira(), "layers of unequal shapes", scale=0.3),
    Case("gpt2", hira(target_modules=["c_attn", "mlp.c_proj"]), "Conv1D", kind="gpt2", scale=0.3),
    Case("embedding", hira(target_modules=["model.embed_tokens"]), "an embedding", scale=0.3),
    Case(
        "conv1d-kernel",
        hira(target_modules=["conv"]),
        "a convolution",
        kind="custom",
        over={"layers": [["conv", "Conv1d", {"in_channels": 4, "out_channels": 5, "kernel_size": 3}]]},
        scale=0.3,
    ),
    Case("bf16-base", hira(), "a bfloat16 base: three roundings", dtype="bfloat16", scale=0.3),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "HIRA", "r": 2, "target_modules": ["q_proj"]}

    def refused(case: str, message: str, **arrays: np.ndarray) -> None:
        files = directory(config, {f"{PFX}{Q}.{name}": array for name, array in arrays.items()})
        cases.both(case, files, "half-pair", message, dtype="bf16")

    refused("no-b", "lacks B", hira_A=ramp(2, 8))
    refused("ranks-differ", "are not (r, in)", hira_A=ramp(2, 8), hira_B=ramp(8, 3))
    refused("kernel-in-b", "are not (r, in)", hira_A=ramp(2, 8, 3), hira_B=ramp(8, 2, 3))
    refused("two-kinds", "as an embedding", hira_A=ramp(2, 8), hira_embedding_B=ramp(8, 2))
    three = directory(config, {f"{PFX}{Q}.hira_A": ramp(3, 8), f"{PFX}{Q}.hira_B": ramp(8, 3)})
    cases.add("rank-not-as-config", three, "check", finding="rank-mismatch")
