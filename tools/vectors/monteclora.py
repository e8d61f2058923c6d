"""formats/monteclora: MonteCLoRA, plain LoRA with the distribution that A is sampled from in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import MontecloraConfig

from vectors import lora
from vectors.common import GPT2_TM, Case, Context, Tensors
from vectors.hostile import PFX, Cases, Files, Q, directory, ramp

FORMAT = "monteclora"


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    for key in [k for k in tensors if ".lora_monteclora_sampler." in k]:
        del tensors[key]
    lora.expected(tensors, config, base, ctx)
    ctx.facts["encoding"] = "monteclora"


def monteclora(**kw: Any) -> Callable[[], Any]:
    return lambda: lora.lora(monteclora_config=MontecloraConfig(num_samples=3, buffer_size=1), **kw)()


CASES = [
    Case("linear", monteclora(), "three samples; layers of unequal shapes"),
    Case("conv1d-patterns", monteclora(target_modules=GPT2_TM, rank_pattern={"c_attn": 3}), "Conv1D", kind="gpt2"),
    Case("bf16-base", monteclora(use_rslora=True), "a bfloat16 base: one rounding", dtype="bfloat16"),
]


# ---------------------------------------------------------------- hostile adapters


def invalid(cases: Cases) -> None:
    sampler = f"{PFX}{Q}.lora_monteclora_sampler."
    a_key, b_key = f"{PFX}{Q}.lora_A.weight", f"{PFX}{Q}.lora_B.weight"
    state = {f"{sampler}{n}": ramp(3) for n in ("expert_weights", "expert_weights_prior")}
    state |= {f"{sampler}std_prior": ramp(2), f"{sampler}gaussian_var_prior": ramp(2, 2)}

    def adapter(arrays: dict[str, Any] | None = None, **config: Any) -> Files:
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "monteclora_config": {"num_samples": 3}, **config}
        return directory(fields, {a_key: ramp(2, 8), b_key: ramp(8, 2), **state} | (arrays or {}))

    wide = adapter({f"{sampler}gaussian_var_prior": ramp(3, 3)})
    cases.add("variance-of-another-rank", wide, "check", finding="shape-mismatch")
    cases.add("other-samples", adapter(monteclora_config={"num_samples": 4}), "check", finding="shape-mismatch")
    cases.add("samples-string", adapter(monteclora_config={"num_samples": "3"}), "check", finding="malformed")
    uneven = adapter({b_key: ramp(8, 3)})
    cases.both("ranks-differ", uneven, "half-pair", "are not (r, in) and (out, r)", dtype="bf16")
    velora = adapter(velora_config={"num_groups": 2})
    cases.add("and-velora", velora, "convert", error="unsupported", message="is VeLoRA", to="lora")
