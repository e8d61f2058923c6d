"""formats/deft: DEFT and PaRa."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import DeftConfig

from vectors.common import GPT2_TM, PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "deft"
PEFT_TYPES = ("DEFT",)


def householder(p: np.ndarray) -> np.ndarray:
    """Q of P = Q R by Householder's reflections, each of which sends a column to minus its sign times its norm."""
    rows, columns = p.shape
    q, r = np.eye(rows), p.copy()
    for n in range(min(rows - 1, columns)):
        x = r[n:, n]
        v = x.copy()
        v[0] += np.copysign(np.linalg.norm(x), x[0])
        v /= np.linalg.norm(v)
        r[n:] -= 2 * np.outer(v, v @ r[n:])
        q[:, n:] -= 2 * np.outer(q[:, n:] @ v, v)
    return q[:, :columns]


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "deft"
    tail = ".deft_P"
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        p = f64(tensors.pop(key))
        w = ctx.stored(module, f64(base[f"{module}.weight"]))
        q = householder(p) if config["decomposition_method"] == "qr" else p
        right = q if config["decomposition_method"] == "qr" else np.maximum(p, 0)
        put = 0.0
        if not config["para"]:
            scale = config["alpha"] / p.shape[1] if config["alpha"] else 1.0
            put = scale * f64(tensors.pop(f"{PFX}{module}.deft_R"))
        ctx.base_dependent(f"{module}.weight", ctx.stored(module, q @ (put - right.T @ w)))


def deft(**kw: Any) -> Callable[[], Any]:
    return lambda: DeftConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], **kw})


CASES = [
    Case("relu", deft(), "P and relu(P)", scale=0.3),
    Case("qr-gpt2", deft(decomposition_method="qr", alpha=5, target_modules=GPT2_TM), "QR, Conv1D", kind="gpt2"),
    Case("para", deft(para=True, decomposition_method="qr"), "PaRa: no R", scale=0.3),
    Case("bf16-base", deft(bias="deft_only"), "a bfloat16 base", dtype="bfloat16", scale=0.3),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "DEFT", "r": 3, "target_modules": ["q_proj"]}
    p, r = f"{PFX}{Q}.deft_P", f"{PFX}{Q}.deft_R"

    def bad(more: dict[str, Any] | None = None, **arrays: Any) -> Any:
        own = {p: ramp(8, 3), r: ramp(3, 8), **{f"{PFX}{Q}.deft_{n}": a for n, a in arrays.items()}}
        return directory({**config, **(more or {})}, {k: a for k, a in own.items() if a is not None})

    cases.both("no-r", bad(R=None), "half-pair", "lacks R", dtype="bf16")
    cases.both("ranks-differ", bad(R=ramp(2, 8)), "half-pair", "do not fit together", dtype="bf16")
    cases.both("para-with-r", bad({"para": True}), "half-pair", "would ignore it", dtype="bf16")
    cases.both(
        "unknown-method", bad({"decomposition_method": "svd"}), "malformed", "PEFT knows relu, qr", dtype="bf16"
    )
    cases.add("rank-not-as-config", bad({"r": 4}), "check", finding="rank-mismatch")
