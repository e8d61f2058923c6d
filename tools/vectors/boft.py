"""formats/boft: BOFT."""

from __future__ import annotations

from typing import Any

import numpy as np
from peft import BOFTConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp
from vectors.orthogonal import cayley, diagonal

FORMAT = "boft"
PEFT_TYPES = ("BOFT",)


def butterfly(factors: int, level: int, blocks: int, side: int) -> np.ndarray:
    """P of one factor, (in, in)."""
    p = np.zeros((blocks * side,) * 2)
    group, half = side * 2**level, side // 2
    for i in range(blocks * side):
        start, inner = i // group * group, i % group
        if factors == 1:
            p[i, i] = 1
            continue
        n, rest = divmod(inner, half)
        pieces = group // half
        source = 2 * n if n < pieces // 2 else 2 * (n - pieces // 2) + 1
        p[i, start + source * half + rest] = 1
    return p


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "boft"
    tail = ".boft_R"
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        values, scale = f64(tensors.pop(key)), f64(tensors.pop(f"{PFX}{module}.boft_s")).ravel()
        factors, blocks, side, _ = values.shape
        r = np.eye(blocks * side)
        for level in range(factors):
            p = butterfly(factors, level, blocks, side)
            turned = diagonal([cayley((v - v.T) / 2) for v in values[level]])
            r = p @ turned @ p.T @ r
        w = f64(base[f"{module}.weight"])
        new = scale[:, None] * (w.reshape(len(w), -1) @ r.T)
        ctx.base_dependent(f"{module}.weight", new.reshape(w.shape) - w)


def boft(**kw: Any) -> Any:
    return lambda: BOFTConfig(**{"boft_block_size": 4, "target_modules": ["q_proj", "down_proj"], **kw})


CASES = [
    Case("llama", boft(), "blocks of four", scale=0.2, bound=5e-6),
    Case(
        "block-count",
        boft(boft_block_size=0, boft_block_num=2, target_modules=["fc1", "fc2"]),
        "two blocks of each layer, of other sizes",
        kind="opt",
        scale=0.2,
        bound=5e-6,
    ),
    Case(
        "conv2d",
        boft(target_modules=["conv"], boft_block_size=6),
        "inputs of a convolution with their kernel; s is (1, out)",
        kind="custom",
        over={"layers": [["conv", "Conv2d", {"in_channels": 3, "out_channels": 5, "kernel_size": 2}]]},
        scale=0.2,
        bound=5e-6,
    ),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "BOFT", "target_modules": ["q_proj"], "boft_block_size": 4}

    def refused(case: str, message: str, **arrays: np.ndarray) -> None:
        files = directory(config, {f"{PFX}{Q}.{name}": array for name, array in arrays.items()})
        cases.both(case, files, "half-pair", message, dtype="bf16")

    refused("no-scale", "lacks s", boft_R=ramp(1, 2, 4, 4))
    refused("not-square", "are not (factors", boft_R=ramp(1, 2, 4, 3), boft_s=ramp(8, 1))
    refused("scale-flat", "are not (factors", boft_R=ramp(1, 2, 4, 4), boft_s=ramp(8))
    refused("no-butterfly", "make no butterfly", boft_R=ramp(3, 2, 4, 4), boft_s=ramp(8, 1))
