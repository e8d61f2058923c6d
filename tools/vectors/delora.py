"""formats/delora: DeLoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import DeloraConfig, PeftModel

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "delora"
PEFT_TYPES = ("DELORA",)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "delora"
    for module in sorted(k.removesuffix(".delora_A").removeprefix(PFX) for k in tensors if k.endswith(".delora_A")):
        own = [f64(tensors.pop(f"{PFX}{module}.delora_{n}")) for n in ("A", "B", "lambda", "w_norm")]
        a, b, (strength,), w_norm = own
        r = len(a)
        delta = np.zeros((b.shape[0], a.shape[1]))
        for i in range(r):
            norms = max(np.sqrt((a[i] ** 2).sum()), 1e-4) * max(np.sqrt((b[:, i] ** 2).sum()), 1e-4)
            delta += strength / r / norms * np.outer(b[:, i], a[i])
        ctx.add(f"{module}.weight", delta * w_norm)


def delora(**kw: Any) -> Callable[[], Any]:
    return lambda: DeloraConfig(
        **{"r": 3, "init_weights": False, "target_modules": ["q_proj", "k_proj", "down_proj"], **kw}
    )


def shrink(model: PeftModel) -> None:
    """Norms below the least one."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "delora_A" in name:
                p[1] *= 1e-6
            if "delora_B" in name:
                p[:, 2] *= 1e-6


CASES = [
    Case("linear", delora(), "Linear layers of unequal shapes"),
    Case(
        "patterns",
        delora(rank_pattern={"k_proj": 2}, lambda_pattern={"down_proj": 4}),
        "ranks of their own; the strengths are in the tensors",
    ),
    Case("tiny-norms", delora(), "norms below 1e-4", post=shrink),
    Case("bias-only", delora(target_modules=["fc1"], bias="delora_only"), "biases of adapted layers", "opt"),
]

DELORA = {"peft_type": "DELORA", "r": 2, "target_modules": ["q_proj"]}


def invalid(cases: Cases) -> None:
    good = {"A": ramp(2, 8), "B": ramp(8, 2), "lambda": ramp(1), "w_norm": ramp(8)}

    def files(config: dict[str, Any] | None = None, **own: np.ndarray | None) -> dict[str, bytes]:
        arrays = {f"{PFX}{Q}.delora_{n}": a for n, a in {**good, **own}.items() if a is not None}
        return directory({**DELORA, **(config or {})}, arrays)

    cases.both("no-w-norm", files(w_norm=None), "half-pair", "lacks w_norm", to="lora")
    cases.both("w-norm-of-outputs", files(B=ramp(6, 2), w_norm=ramp(6)), "half-pair", "are not (r, in)", to="lora")
    cases.both("lambda-of-each-rank", files(**{"lambda": ramp(2)}), "half-pair", "are not (r, in)", to="lora")
    cases.both("rank-0", files(A=ramp(0, 8), B=ramp(8, 0)), "half-pair", "are not (r, in)", to="lora")
    cases.add("rank-not-as-config", files({"r": 3}), "check", finding="rank-mismatch")
