"""formats/gralora: GraLoRA, with a general part and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import GraloraConfig

from vectors.common import GPT2_TM, PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "gralora"
PEFT_TYPES = ("GRALORA",)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "gralora"
    k, r, h = config["gralora_k"], config["r"], config["hybrid_r"]
    q = r // k
    for module in sorted(t.removesuffix(".gralora_A").removeprefix(PFX) for t in tensors if t.endswith(".gralora_A")):
        a, b = (f64(tensors.pop(f"{PFX}{module}.gralora_{n}")) for n in "AB")
        out, into = ctx.logical(module)
        delta = np.zeros((out, into))
        for j in range(k):
            for n in range(k):
                rows, columns = slice(j * out // k, (j + 1) * out // k), slice(n * into // k, (n + 1) * into // k)
                delta[rows, columns] = b[j, n * q : (n + 1) * q].T @ a[n, :, j * q : (j + 1) * q].T
        if h:
            general = [f64(tensors.pop(f"{PFX}{module}.gralora_{n}_general.weight")) for n in "BA"]
            delta += general[0] @ general[1]
        ctx.add(f"{module}.weight", ctx.stored(module, config["alpha"] / (r + h) * delta))


def gralora(**kw: Any) -> Callable[[], Any]:
    return lambda: GraloraConfig(
        **{"r": 4, "alpha": 6, "init_weights": False, "target_modules": ["q_proj", "k_proj", "down_proj"], **kw}
    )


CASES = [
    Case("linear", gralora(), "Linear layers of unequal shapes", scale=0.3),
    Case("four-blocks", gralora(gralora_k=4), "four blocks in a row, one rank for each", scale=0.3),
    Case("hybrid", gralora(hybrid_r=2), "a general part besides", scale=0.3),
    Case("gpt2", gralora(target_modules=GPT2_TM, hybrid_r=1), "Conv1D, hybrid", "gpt2", scale=0.3),
]

GRALORA = {"peft_type": "GRALORA", "r": 2, "alpha": 4, "gralora_k": 2, "hybrid_r": 0, "target_modules": ["q_proj"]}


def invalid(cases: Cases) -> None:
    good = {"A": ramp(2, 4, 2), "B": ramp(2, 2, 4)}

    def files(config: dict[str, Any] | None = None, **own: np.ndarray | None) -> dict[str, bytes]:
        arrays = {f"{PFX}{Q}.gralora_{n}": a for n, a in {**good, **own}.items() if a is not None}
        return directory({**GRALORA, **(config or {})}, arrays)

    general = {"A_general.weight": ramp(1, 8), "B_general.weight": ramp(8, 1)}
    cases.both("no-b", files(B=None), "half-pair", "lacks B", to="lora")
    uneven = files({"r": 3}, A=ramp(2, 4, 3), B=ramp(2, 3, 4))
    cases.both("rank-no-multiple-of-k", uneven, "half-pair", "do not fit together", to="lora")
    cases.both("matrices", files(A=ramp(4, 2), B=ramp(2, 4)), "half-pair", "do not fit together", to="lora")
    half = files({"hybrid_r": 1}, **{**general, "B_general.weight": None})
    cases.both("half-a-general-part", half, "half-pair", "lacks B_general", to="lora")
    for name, config, own in (("hybrid-not-in-config", {}, general), ("hybrid-not-in-file", {"hybrid_r": 1}, {})):
        cases.add(name, files(config, **own), "convert", error="invalid", message="the scale is not known", to="lora")
    cases.add("rank-not-as-config", files({"r": 4}), "check", finding="rank-mismatch")
    cases.add("k-not-as-config", files({"gralora_k": 1}), "check", finding="rank-mismatch")
