"""formats/ln_tuning: LN tuning."""

from __future__ import annotations

from typing import Any

import numpy as np
from peft import LNTuningConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, directory, ramp

FORMAT = "ln_tuning"
PEFT_TYPES = ("LN_TUNING",)
NORM = "model.layers.0.input_layernorm"


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "ln_tuning"
    for key in sorted(k for k in tensors if ".ln_tuning_layers." in k):
        ctx.value(key.removeprefix(PFX).replace(".ln_tuning_layers.", "."), f64(tensors.pop(key)))


def ln(*target: str) -> Any:
    return lambda: LNTuningConfig(target_modules=list(target))


CASES = [
    Case("llama", ln("input_layernorm", "norm"), "norms without biases", scale=0.3),
    Case("gpt2", ln("ln_1", "ln_f"), "norms with biases", kind="gpt2", scale=0.3),
    Case("linear", ln("q_proj"), "a linear layer", kind="opt", scale=0.3),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]}
    bias = directory(config, {f"{PFX}{NORM}.ln_tuning_layers.bias": ramp(8)})
    cases.add("no-weight", bias, "check", finding="half-pair")
    none = directory(config, {f"{PFX}{NORM}.weight": ramp(8)})
    cases.add("no-layers", none, "convert", error="unsupported", message="holds no ln_tuning", dtype="bf16")
    names = ("weight", "bias", "running_mean", "running_var")
    arrays = {f"{PFX}{NORM}.ln_tuning_layers.{name}": ramp(8) for name in names}
    arrays[f"{PFX}{NORM}.ln_tuning_layers.num_batches_tracked"] = np.array(7, dtype=np.int64)
    batch = directory(config, arrays)
    cases.add("batch-norm", batch, "convert", error="unsupported", message="is a batch norm", dtype="bf16")
    twice = {f"{PFX}{NORM}.ln_tuning_layers.{name}": ramp(8) for name in ("weight", "default.weight")}
    cases.add("twice", directory(config, twice), "convert", error="invalid", message="one and the same", dtype="bf16")
