"""formats/c3a: C3A."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import C3AConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "c3a"
PEFT_TYPES = ("C3A",)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "c3a"
    for module in sorted(
        k.removesuffix(".c3a_kernel").removeprefix(PFX) for k in tensors if k.endswith(".c3a_kernel")
    ):
        kernel = f64(tensors.pop(f"{PFX}{module}.c3a_kernel"))
        rows, columns, b = kernel.shape
        delta = np.zeros((rows * b, columns * b))
        for o in range(rows * b):
            for i in range(columns * b):
                delta[o, i] = kernel[o // b, i // b, (i % b - o % b) % b] / (columns * b)
        ctx.add(f"{module}.weight", delta)


def c3a(**kw: Any) -> Callable[[], Any]:
    return lambda: C3AConfig(**{"block_size": 8, "target_modules": ["q_proj", "k_proj", "down_proj"], **kw})


CASES = [
    Case("linear", c3a(), "Linear layers of unequal shapes", scale=1.0),
    Case("patterns", c3a(block_size_pattern={"k_proj": 4, "down_proj": 2}), "block sizes of their own", scale=1.0),
    Case("block-of-1", c3a(block_size=1, target_modules=["k_proj"]), "every element is a block", scale=1.0),
    Case("bias-all", c3a(target_modules=["fc1"], bias="all"), "every bias", "opt", scale=1.0),
]

C3A = {"peft_type": "C3A", "block_size": 4, "target_modules": ["q_proj"]}


def invalid(cases: Cases) -> None:
    def files(kernel: np.ndarray, **config: Any) -> dict[str, bytes]:
        return directory({**C3A, **config}, {f"{PFX}{Q}.c3a_kernel": kernel})

    cases.both("matrix", files(ramp(2, 8)), "half-pair", "is not (out / b, in / b, b)", dtype="bf16")
    cases.both("empty-block", files(ramp(2, 2, 0)), "half-pair", "is not (out / b, in / b, b)", dtype="bf16")
    cases.add("block-size-not-as-config", files(ramp(2, 2, 4), block_size=8), "check", finding="rank-mismatch")
    pattern = {"block_size_pattern": {"self_attn.q_proj": 2}}
    cases.add("block-size-not-as-pattern", files(ramp(2, 2, 4), **pattern), "check", finding="rank-mismatch")
    cases.add("pattern-no-object", files(ramp(2, 2, 4), block_size_pattern=[4]), "check", finding="malformed")
