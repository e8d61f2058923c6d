"""formats/ia3: (IA)^3."""

from __future__ import annotations

import re
from typing import Any

from peft import IA3Config

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "ia3"
PEFT_TYPES = ("IA3",)


def feedforward(module: str, said: Any) -> bool:
    if isinstance(said, str):
        return re.fullmatch(said, module) is not None
    return any(module.endswith(name) for name in said)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "ia3"
    tail = ".ia3_l"
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        scale = f64(tensors.pop(key)).ravel()
        w = f64(base[f"{module}.weight"])
        crossed = module in ctx.conv1d
        logical = w.T if crossed else w
        new = logical.copy()
        if feedforward(module, config["feedforward_modules"]):
            groups = getattr(ctx.modules[module], "groups", 1)
            outputs, inputs = logical.shape[0] // groups, logical.shape[1]
            for g in range(groups):
                for i in range(inputs):
                    new[g * outputs : (g + 1) * outputs, i] *= scale[g * inputs + i]
        else:
            for o in range(len(logical)):
                new[o] *= scale[o]
            if f"{module}.bias" in base:
                bias = f64(base[f"{module}.bias"])
                ctx.base_dependent(f"{module}.bias", bias * scale - bias)
        ctx.base_dependent(f"{module}.weight", (new.T if crossed else new) - w)


def ia3(target: list[str], inputs: Any) -> Any:
    return lambda: IA3Config(target_modules=target, feedforward_modules=inputs)


CASES = [
    Case("llama", ia3(["k_proj", "down_proj"], ["down_proj"]), "one vector of outputs, one of inputs", scale=0.3),
    Case("biases", ia3(["fc1", "fc2"], ["fc2"]), "biases of outputs are scaled too", kind="opt", scale=0.3),
    Case("gpt2", ia3(["c_attn", "mlp.c_proj"], r".*mlp\.c_proj"), "Conv1D; a pattern", kind="gpt2", scale=0.3),
    Case(
        "groups",
        ia3(["conv"], ["conv"]),
        "inputs of a convolution in groups",
        kind="custom",
        over={"layers": [["conv", "Conv2d", {"in_channels": 6, "out_channels": 4, "kernel_size": 2, "groups": 2}]]},
        scale=0.3,
    ),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    key = f"{PFX}{Q}.ia3_l"

    def with_vector(shape: tuple[int, ...], **fields: Any) -> dict[str, bytes]:
        return directory({**config, **fields}, {key: ramp(*shape)})

    cases.add("flat", with_vector((8,)), "check", finding="other-shape")
    cases.add("inputs-not-outputs", with_vector((1, 8)), "check", finding="other-shape")
    silent = with_vector((1, 8, 1, 1), feedforward_modules=None)
    cases.add("convolution-untold", silent, "convert", error="unsupported", message="inputs or outputs", dtype="bf16")
    number = with_vector((8, 1), feedforward_modules=3)
    cases.add("modules-number", number, "convert", error="invalid", message="feedforward_modules", dtype="bf16")
    none = directory(config, {f"{PFX}{Q}.other": ramp(8)})
    cases.add("no-vector", none, "convert", error="unsupported", message="holds no ia3 parameters", dtype="bf16")
