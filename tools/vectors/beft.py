"""formats/beft: BEFT."""

from __future__ import annotations

from typing import Any

from peft import BeftConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "beft"
PEFT_TYPES = ("BEFT",)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "beft"
    tail = ".beft_bias"
    for key in sorted(k for k in tensors if k.endswith(tail)):
        ctx.add(f"{key.removesuffix(tail).removeprefix(PFX)}.bias", f64(tensors.pop(key)).ravel())


def beft(*target: str, **kw: Any) -> Any:
    return lambda: BeftConfig(target_modules=list(target), **kw)


CASES = [
    Case("opt", beft("v_proj", "fc1"), "layers of two sizes", kind="opt", scale=0.3),
    Case(
        "modules-to-save",
        beft("value", modules_to_save=["intermediate.dense"]),
        "modules_to_save beside it",
        kind="bert",
        scale=0.3,
    ),
    Case("bf16-base", beft("v_proj"), "a bfloat16 base", kind="opt", dtype="bfloat16", scale=0.3),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "BEFT", "target_modules": ["q_proj"]}

    def with_vector(*shape: int) -> dict[str, bytes]:
        return directory(config, {f"{PFX}{Q}.beft_bias": ramp(*shape)})

    cases.both("flat", with_vector(8), "other-shape", "(1, out) is wanted", dtype="bf16")
    cases.both("column", with_vector(8, 1), "other-shape", "(1, out) is wanted", dtype="bf16")
    cases.both("empty", with_vector(1, 0), "other-shape", "(1, out) is wanted", dtype="bf16")
