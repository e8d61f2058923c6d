"""formats/velora: VeLoRA, plain LoRA with what its activations are projected on in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import VeloraConfig

from vectors import lora
from vectors.common import GPT2_TM, Case, Context, Tensors
from vectors.hostile import PFX, Cases, Files, Q, directory, ramp

FORMAT = "velora"


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    for key in [k for k in tensors if k.endswith(".lora_velora_embed")]:
        del tensors[key]
    lora.expected(tensors, config, base, ctx)
    ctx.facts["encoding"] = "velora"


def velora(kind: str, **kw: Any) -> Callable[[], Any]:
    return lambda: lora.lora(velora_config=VeloraConfig(num_groups=3, init_type=kind), **kw)()


CASES = [
    Case("random", velora("random"), "a projection of 1/3 of the inputs, rounded up"),
    Case("average-conv1d", velora("batch_average", target_modules=GPT2_TM), "Conv1D; never trained", kind="gpt2"),
    Case("bf16-base", velora("random"), "a bfloat16 base: one rounding", dtype="bfloat16"),
]


# ---------------------------------------------------------------- hostile adapters


def invalid(cases: Cases) -> None:
    a_key, b_key, embed = (f"{PFX}{Q}.{n}" for n in ("lora_A.weight", "lora_B.weight", "lora_velora_embed"))

    def adapter(arrays: dict[str, Any] | None = None, **config: Any) -> Files:
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "velora_config": {"num_groups": 2}, **config}
        return directory(fields, {a_key: ramp(2, 8), b_key: ramp(8, 2), embed: ramp(4)} | (arrays or {}))

    cases.add("embed-too-long", adapter({embed: ramp(5)}), "check", finding="shape-mismatch")
    cases.add("embed-of-other-groups", adapter(velora_config={"num_groups": 3}), "check", finding="shape-mismatch")
    cases.add("groups-zero", adapter(velora_config={"num_groups": 0}), "check", finding="malformed")
    cases.add("config-no-object", adapter(velora_config=[2]), "check", finding="malformed")
    uneven = adapter({b_key: ramp(8, 3)})
    cases.both("ranks-differ", uneven, "half-pair", "are not (r, in) and (out, r)", dtype="bf16")
    message = "DoRA and MiCA do not go with"
    cases.add("and-dora", adapter(use_dora=True), "convert", error="unsupported", message=message, to="lora")
