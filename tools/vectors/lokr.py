"""formats/lokr: LoKr in all of its forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import LoKrConfig

from vectors.common import PFX, Case, Context, Tensors, f64, first_match
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "lokr"
PEFT_TYPES = ("LOKR",)
NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "lokr"
    modules = {k.rpartition(".lokr_")[0].removeprefix(PFX) for k in tensors if ".lokr_" in k}
    for module in sorted(modules):
        own = {n: f64(tensors.pop(f"{PFX}{module}.lokr_{n}")) for n in NAMES if f"{PFX}{module}.lokr_{n}" in tensors}
        one = own["w1"] if "w1" in own else own["w1_a"] @ own["w1_b"]
        if "w2" in own:
            two = own["w2"]
        elif "t2" in own:
            two = np.einsum("ijkl,ip,jq->pqkl", own["t2"], own["w2_a"], own["w2_b"])
        else:
            two = own["w2_a"] @ own["w2_b"]
        r = first_match(config["rank_pattern"], module, config["r"])
        alpha = first_match(config["alpha_pattern"], module, config["alpha"])
        delta = product(one, two).reshape(ctx.logical(module))
        ctx.add(f"{module}.weight", alpha / r * delta)


def product(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """The Kronecker product over the first two dimensions; of three over the last two, as SPEC.md says."""
    (a, c), (b, d) = one.shape, two.shape[:2]
    if two.ndim == 3:
        k = two.shape[2]
        return np.einsum("ac,bdk->badck", one, two).reshape(b, a * d, c * k)
    return np.einsum("ac,bd...->abcd...", one, two).reshape(a * b, c * d, *two.shape[2:])


def lokr(**kw: Any) -> Callable[[], Any]:
    return lambda: LoKrConfig(
        **{"r": 1, "alpha": 3, "init_weights": False, "target_modules": ["q_proj", "k_proj", "down_proj"], **kw}
    )


CASES = [
    Case("w1-whole", lokr(), "the default: w1 whole, w2 a product", scale=0.3),
    Case("both", lokr(decompose_both=True), "both are products", scale=0.3),
    Case("whole", lokr(r=100, alpha=300), "both whole: only the config knows r", scale=0.3),
    Case(
        "patterns",
        lokr(decompose_factor=2, rank_pattern={"q_proj": 2, "k_proj": 50}, alpha_pattern={"down_proj": 8}),
        "rank and alpha of their own, one module whole",
        scale=0.3,
    ),
    Case("conv2d", lokr(target_modules=["conv0"]), "a kernel that w2_b holds flattened", "custom-conv2d", scale=0.3),
    Case(
        "tucker-conv1d",
        lokr(target_modules=["conv1"], use_effective_conv2d=True, r=2),
        "a Tucker form of one dimension, with a 1 behind it",
        "whisper",
        scale=0.3,
        over={"num_mel_bins": 7},
    ),
    Case(
        "whole-conv1d",
        lokr(target_modules=["conv1"], r=100, alpha=300),
        "a whole kernel of one dimension: spread in another order",
        "whisper",
        scale=0.3,
    ),
]

LOKR = {"peft_type": "LOKR", "r": 2, "alpha": 4, "target_modules": ["q_proj"]}


def invalid(cases: Cases) -> None:
    good = {"w1": ramp(2, 2), "w2_a": ramp(4, 2), "w2_b": ramp(2, 4)}

    def files(config: dict[str, Any] | None = None, **own: np.ndarray | None) -> dict[str, bytes]:
        arrays = {f"{PFX}{Q}.lokr_{n}": a for n, a in {**good, **own}.items() if a is not None}
        return directory({**LOKR, **(config or {})}, arrays)

    cases.both("no-w2-b", files(w2_b=None), "half-pair", "lacks w2_b", to="lora")
    cases.both("no-w1", files(w1=None), "half-pair", "lacks w1", to="lora")
    cases.both("w2-twice", files(w2=ramp(4, 4)), "half-pair", "whole and as w2_a, w2_b", to="lora")
    cases.both("factors-of-other-ranks", files(w2_b=ramp(3, 4)), "half-pair", "do not fit together", to="lora")
    cases.both("five-dimensions", files(w1=ramp(2, 1, 1, 1, 1)), "half-pair", "no matrix and no kernel", to="lora")
    cases.both("core-of-other-rank", files(t2=ramp(3, 3, 1, 1)), "half-pair", "do not fit together", to="lora")
    cases.add("rank-not-as-config", files({"r": 3}), "check", finding="rank-mismatch")
    ends = {f"w{n}_{x}": ramp(*((512, 1) if x == "a" else (1, 512))) for n in "12" for x in "ab"}
    huge = files({"r": 1}, w1=None, **ends)
    cases.add("change-of-2-to-36", huge, "convert", error="invalid", message="no weight is that large", to="lora")
