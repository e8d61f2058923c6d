"""formats/loha: LoHa."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import LoHaConfig

from vectors.common import PFX, Case, Context, Tensors, f64, first_match
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "loha"
PEFT_TYPES = ("LOHA",)
NAMES = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "loha"
    for module in sorted(k.removesuffix(".hada_w1_a").removeprefix(PFX) for k in tensors if k.endswith(".hada_w1_a")):
        own = {n: f64(tensors.pop(f"{PFX}{module}.hada_{n}")) for n in NAMES if f"{PFX}{module}.hada_{n}" in tensors}
        delta = np.ones(())
        for n in "12":
            a, b = own[f"w{n}_a"], own[f"w{n}_b"]
            delta = delta * (np.einsum("ijkl,ip,jq->pqkl", own[f"t{n}"], a, b) if f"t{n}" in own else a @ b)
        r = own["w1_b"].shape[0]
        alpha = first_match(config["alpha_pattern"], module, config["alpha"])
        ctx.add(f"{module}.weight", alpha / r * delta.reshape(ctx.logical(module)))


def loha(**kw: Any) -> Callable[[], Any]:
    return lambda: LoHaConfig(
        **{"r": 2, "alpha": 3, "init_weights": False, "target_modules": ["q_proj", "k_proj", "down_proj"], **kw}
    )


CASES = [
    Case("linear", loha(), "Linear layers of unequal shapes", scale=0.3),
    Case(
        "patterns",
        loha(rank_pattern={"k_proj": 3}, alpha_pattern={"down_proj": 8}),
        "rank and alpha of their own",
        scale=0.3,
    ),
    Case(
        "conv2d",
        loha(target_modules=["conv0"]),
        "a kernel that the factors hold flattened",
        "custom-conv2d",
        scale=0.3,
    ),
    Case(
        "tucker-conv2d",
        loha(target_modules=["conv0"], use_effective_conv2d=True),
        "Tucker forms",
        "custom-conv2d",
        scale=0.3,
    ),
    Case(
        "tucker-conv1d",
        loha(target_modules=["conv1"], use_effective_conv2d=True),
        "Tucker forms of one dimension, with a 1 behind it",
        "whisper",
        scale=0.3,
    ),
]

LOHA = {"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": ["q_proj"]}


def invalid(cases: Cases) -> None:
    good = {"w1_a": ramp(8, 2), "w1_b": ramp(2, 8), "w2_a": ramp(8, 2), "w2_b": ramp(2, 8)}

    def files(config: dict[str, Any] | None = None, **own: np.ndarray | None) -> dict[str, bytes]:
        arrays = {f"{PFX}{Q}.hada_{n}": a for n, a in {**good, **own}.items() if a is not None}
        return directory({**LOHA, **(config or {})}, arrays)

    cases.both("no-w2-b", files(w2_b=None), "half-pair", "lacks w2_b", to="lora")
    cases.both("factors-of-other-widths", files(w2_b=ramp(2, 7)), "half-pair", "do not fit together", to="lora")
    cases.both("vector", files(w1_a=ramp(8)), "half-pair", "do not fit together", to="lora")
    cases.both("one-core", files(t1=ramp(2, 2, 3, 3)), "half-pair", "lacks t2", to="lora")
    empty = {"w1_a": ramp(8, 0), "w1_b": ramp(0, 8), "w2_a": ramp(8, 0), "w2_b": ramp(0, 8)}
    cases.both("rank-0", files(**empty), "half-pair", "do not fit together", to="lora")
    cases.add("rank-not-as-config", files({"r": 3}), "check", finding="rank-mismatch")
    cases.add("alpha-string", files({"alpha": "4"}), "convert", error="invalid", message="alpha of", to="lora")
