"""formats/peanut: PEANuT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import PeanutConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "peanut"
PEFT_TYPES = ("PEANUT",)
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "peanut"
    act, depth = ACTIVATIONS[config["act_fn"]], config["depth"]
    tail = ".peanut_A.weight"
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        first, last = f64(tensors.pop(key)), f64(tensors.pop(f"{PFX}{module}.peanut_B.weight"))
        layers = {
            side: [f64(tensors.pop(f"{PFX}{module}.peanut_{side}.{n}.weight")) for n in range(depth)]
            for side in ("encoders", "decoders")
        }
        # Columns are input features.
        hidden = [act(first @ f64(base[f"{module}.weight"]))]
        for encoder in layers["encoders"]:
            hidden.append(act(encoder @ hidden[-1]))
        h = hidden.pop()
        for decoder in layers["decoders"]:
            h = act(decoder @ h) + hidden.pop()
        ctx.base_dependent(f"{module}.weight", config["scaling"] * last @ h)


def peanut(**kw: Any) -> Callable[[], Any]:
    return lambda: PeanutConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], **kw})


CASES = [
    Case("depth-0", peanut(scaling=0.5), "A and B alone", scale=0.3),
    Case("depth-2", peanut(depth=2, act_fn="silu"), "two encoders, two decoders", scale=0.3),
    Case("bf16-base", peanut(depth=1, act_fn="tanh"), "a bfloat16 base", dtype="bfloat16", scale=0.3),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "PEANUT", "r": 3, "depth": 1, "target_modules": ["q_proj"]}
    names = {"peanut_A": (3, 8), "peanut_B": (8, 3), "peanut_encoders.0": (3, 3), "peanut_decoders.0": (3, 3)}

    def bad(more: dict[str, Any] | None = None, **shapes: Any) -> Any:
        own = {**names, **{n.replace("__", "."): s for n, s in shapes.items()}}
        arrays = {f"{PFX}{Q}.{n}.weight": ramp(*s) for n, s in own.items() if s is not None}
        return directory({**config, **(more or {})}, arrays)

    cases.both("no-decoder", bad(peanut_decoders__0=None), "half-pair", "lacks decoders.0", dtype="bf16")
    cases.both("b-other-outputs", bad(peanut_B=(9, 3)), "half-pair", "do not fit together", dtype="bf16")
    cases.both("deeper-than-config", bad({"depth": 0}), "half-pair", "would ignore it", dtype="bf16")
    cases.both("depth-absurd", bad({"depth": 1 << 40}), "malformed", "depth", dtype="bf16")
    odd = bad({"act_fn": "xielu"})
    cases.add("unknown-activation", odd, "convert", error="unsupported", message="'xielu'", dtype="bf16")
    cases.add("rank-not-as-config", bad({"r": 4}), "check", finding="rank-mismatch")
