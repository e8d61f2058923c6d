"""formats/qalora: QA-LoRA, whose A takes inputs that were pooled. PEFT has it for GPTQ layers, and merges nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vectors import lora
from vectors.common import Case, Context, Tensors
from vectors.hostile import PFX, Cases, Files, Q, directory, ramp

FORMAT = "qalora"
_GROUP = 4


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    g = config["qalora_group_size"]
    for key in [k for k in tensors if k.endswith("lora_A.weight")]:
        pooled = tensors[key]
        groups = pooled.shape[1]
        dense = torch.zeros(pooled.shape[0], groups * g, dtype=torch.float64)
        for j in range(groups * g):
            # The mean of g inputs, times the number of groups.
            dense[:, j] = pooled[:, j // g].double() * groups / g
        tensors[key] = dense
    lora.expected(tensors, config, base, ctx)
    ctx.facts["encoding"] = "qalora"


def pooled(tensors: Tensors) -> Tensors:
    """A of fewer columns, as it is for pooled inputs."""
    return {
        k: t[:, : t.shape[1] // _GROUP].contiguous() if k.endswith("lora_A.weight") else t for k, t in tensors.items()
    }


def switched(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "use_qalora": True, "qalora_group_size": _GROUP}


def qalora(name: str, config: Callable[[], Any], says: str, **more: Any) -> Case:
    return Case(name, config, says, edit=pooled, edit_config=switched, peft_merges=False, **more)


CASES = [
    qalora("linear", lora.lora(), "groups of four inputs; layers of unequal shapes"),
    qalora(
        "patterns-rslora",
        lora.lora(use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 9}),
        "ranks and alphas by pattern",
    ),
    qalora("bf16-base", lora.lora(), "a bfloat16 base: one rounding", dtype="bfloat16"),
]


# ---------------------------------------------------------------- hostile adapters


def invalid(cases: Cases) -> None:
    a_key, b_key = f"{PFX}{Q}.lora_A.weight", f"{PFX}{Q}.lora_B.weight"

    def adapter(arrays: dict[str, Any] | None = None, **config: Any) -> Files:
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_qalora": True, "qalora_group_size": 4, **config}
        return directory(fields, {a_key: ramp(2, 2), b_key: ramp(8, 2)} if arrays is None else arrays)

    to_lora = {"to": "lora"}
    cases.both("no-b", adapter({a_key: ramp(2, 2)}), "half-pair", "lacks lora_B", **to_lora)
    uneven = {a_key: ramp(3, 2), b_key: ramp(8, 2)}
    cases.both("ranks-differ", adapter(uneven), "half-pair", "are not (r, in / 4)", **to_lora)
    for case, group in (("zero", 0), ("string", "4"), ("huge", 10**12)):
        message = "qalora_group_size in adapter_config.json is"
        cases.both(f"group-{case}", adapter(qalora_group_size=group), "half-pair", message, **to_lora)
    wide = {a_key: ramp(2, 4096, dtype="float16"), b_key: ramp(8, 2)}
    files = adapter(wide, qalora_group_size=65536)
    cases.add("written-out-too-large", files, "convert", error="invalid", message="written out", **to_lora)
    files = adapter(use_dora=True)
    cases.add("and-dora", files, "convert", error="unsupported", message="DoRA and MiCA do not go with", **to_lora)
