"""formats/glora: GLoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import GloraConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "glora"
PEFT_TYPES = ("GLORA",)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "glora"
    modules = sorted({k.partition(".glora_")[0].removeprefix(PFX) for k in tensors if ".glora_" in k})

    def path(module: str, name: str) -> np.ndarray:
        key = f"{PFX}{module}.glora_{name}."
        own = {n: f64(tensors.pop(key + n)) for n in ("Xd", "Xu", "X", "zeros") if key + n in tensors}
        return own["Xd"] @ own["Xu"] if "Xd" in own else next(iter(own.values()))

    for module in modules:
        w = f64(base[f"{module}.weight"])
        a, b, c, d, e = (path(module, name) for name in "ABCDE")
        ctx.base_dependent(f"{module}.weight", w * a + b)
        if f"{module}.bias" in base:
            bias = f64(base[f"{module}.bias"])
            ctx.base_dependent(f"{module}.bias", bias * d + e + (w @ c)[:, 0])


def glora(**kw: Any) -> Callable[[], Any]:
    return lambda: GloraConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj", "fc1"], **kw})


CASES = [
    Case("linear-llama", glora(target_modules=["q_proj", "down_proj"]), "no biases in the base", scale=0.3),
    Case("linear-opt", glora(), "biases that take a part of the weight", kind="opt", scale=0.3),
    Case(
        "vectors",
        glora(config_A_B="vector", config_C="vector", config_D_E="vector"),
        "vectors",
        kind="opt",
        scale=0.3,
    ),
    Case(
        "bf16-base",
        glora(config_A_B="constant", config_C="lora"),
        "constants, in a bfloat16 base",
        kind="opt",
        dtype="bfloat16",
        scale=0.3,
    ),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "GLORA", "r": 3, "target_modules": ["q_proj"]}
    forms = {
        **{f"{p}.{n}": s for p in "AB" for n, s in (("Xd", (8, 3)), ("Xu", (3, 8)))},
        "C.Xd": (8, 3),
        "C.Xu": (3, 1),
        "D.X": (1,),
        "E.X": (1,),
    }

    def bad(more: dict[str, Any] | None = None, **shapes: Any) -> Any:
        own = {**forms, **{n.replace("__", "."): s for n, s in shapes.items()}}
        arrays = {f"{PFX}{Q}.glora_{n}": ramp(*s) for n, s in own.items() if s is not None}
        return directory({**config, **(more or {})}, arrays)

    cases.both("no-factor", bad(A__Xu=None), "half-pair", "says that A is 'lora'", dtype="bf16")
    cases.both("other-form", bad({"config_A_B": "vector"}), "half-pair", "says that A is 'vector'", dtype="bf16")
    cases.both("ranks-differ", bad(B__Xu=(4, 8)), "half-pair", "does not fit", dtype="bf16")
    cases.both("c-other-inputs", bad(C__Xd=(9, 3)), "half-pair", "does not fit", dtype="bf16")
    unknown = bad({"config_D_E": "matrix"})
    cases.both("unknown-form", unknown, "half-pair", "PEFT knows vector, constant, none", dtype="bf16")
    cases.add("rank-not-as-config", bad({"r": 4}), "check", finding="rank-mismatch")
