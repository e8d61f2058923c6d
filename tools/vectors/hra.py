"""formats/hra: HRA."""

from __future__ import annotations

from typing import Any

import numpy as np
from peft import HRAConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "hra"
PEFT_TYPES = ("HRA",)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "hra"
    tail = ".hra_u"
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        u = f64(tensors.pop(key))
        h = np.eye(len(u))
        if config["apply_GS"]:
            # The Q of a QR is Gram-Schmidt's basis but for signs, which Q Q^T does not see.
            q, _ = np.linalg.qr(u)
            h -= 2 * q @ q.T
        else:
            for column in u.T:
                h = h @ (np.eye(len(u)) - 2 * np.outer(column, column) / (column @ column))
        w = f64(base[f"{module}.weight"])
        flat = w.reshape(len(w), -1)
        ctx.base_dependent(f"{module}.weight", (flat @ h - flat).reshape(w.shape))


def hra(**kw: Any) -> Any:
    return lambda: HRAConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **kw})


CASES = [
    Case("chain", hra(), "a chain of four reflections", scale=0.3),
    Case("span", hra(apply_GS=True, r=3), "vectors made orthonormal", scale=0.3),
    Case(
        "conv2d",
        hra(target_modules=["conv"], r=2),
        "inputs of a convolution with their kernel",
        kind="custom",
        over={"layers": [["conv", "Conv2d", {"in_channels": 3, "out_channels": 5, "kernel_size": 2}]]},
        scale=0.3,
    ),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "HRA", "r": 2, "target_modules": ["q_proj"]}

    def with_vectors(shape: tuple[int, ...], **fields: Any) -> dict[str, bytes]:
        return directory({**config, **fields}, {f"{PFX}{Q}.hra_u": ramp(*shape)})

    cases.both("flat", with_vectors((8,)), "other-shape", "(in, r) is wanted", dtype="bf16")
    cases.both("no-vectors", with_vectors((8, 0)), "other-shape", "(in, r) is wanted", dtype="bf16")
    cases.both(
        "more-than-dimensions", with_vectors((2, 3), apply_GS=True, r=3), "other-shape", "orthonormal", dtype="bf16"
    )
    whole = directory(config, {f"{PFX}{Q}.hra_u": np.ones((8, 2), dtype=np.int64)})
    cases.add("whole-numbers", whole, "check", finding="other-shape")
    cases.add("rank-not-as-config", with_vectors((8, 3)), "check", finding="rank-mismatch")
    word = with_vectors((8, 2), apply_GS="yes")
    cases.add("flag-word", word, "convert", error="invalid", message="apply_GS", dtype="bf16")
