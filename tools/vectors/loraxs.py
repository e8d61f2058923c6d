"""formats/loraxs: LoRA-XS, whose authors patch PEFT's LoRA. PEFT itself misreads such files."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vectors import lora
from vectors.common import PFX, Case, Context, Tensors, f64, first_match
from vectors.hostile import Cases, Files, Q, directory, ramp

FORMAT = "loraxs"
OLD, NEW = "_lora_latent_mapping.weight", ".default_lora_latent_mapping.weight"


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts |= {"encoding": "loraxs", "findings": ["misread-by-peft"]}
    for key in sorted(k for k in tensors if k.endswith(".lora_A.weight")):
        p = key.removesuffix(".lora_A.weight")
        module = p.removeprefix(PFX)
        a, b = f64(tensors.pop(key)), f64(tensors.pop(f"{p}.lora_B.weight"))
        (own,) = [k for k in tensors if k in (f"{p}{OLD}", f"{p}{NEW}")]
        r = f64(tensors.pop(own))
        alpha = first_match(config["alpha_pattern"], module, config["lora_alpha"])
        s = alpha / math.sqrt(len(a)) if config["use_rslora"] else alpha / len(a)
        ctx.add(f"{module}.weight", ctx.stored(module, s * np.einsum("or,rq,qi->oi", b, r, a)))


def latent(spelling: str) -> Callable[[Tensors], Tensors]:
    """R for each module, small numbers of both signs, under its key."""

    def edit(tensors: Tensors) -> Tensors:
        made = dict(tensors)
        for key in [k for k in tensors if k.endswith("lora_A.weight")]:
            r = tensors[key].shape[0]
            values = ((torch.arange(r * r) * 7 % 11) - 5).reshape(r, r) / 8
            made[key.removesuffix(".lora_A.weight") + spelling] = values
        return made

    return edit


def loraxs(name: str, config: Callable[[], Any], says: str, spelling: str = NEW, **more: Any) -> Case:
    # Factors are drawn, not taken from the base: the formula is the same.
    return Case(name, config, says, edit=latent(spelling), peft_merges=False, scale=0.3, **more)


CASES = [
    loraxs("newer-keys", lora.lora(r=3), "keys as PEFT writes them today"),
    loraxs("older-keys", lora.lora(r=3), "keys as older PEFT wrote them, without the dot", OLD),
    loraxs(
        "patterns-rslora",
        lora.lora(use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 9}),
        "ranks and alphas by pattern",
    ),
    loraxs("bf16-base", lora.lora(), "a bfloat16 base: one rounding", dtype="bfloat16"),
]


# ---------------------------------------------------------------- hostile adapters


def invalid(cases: Cases) -> None:
    a_key, b_key, r_key = f"{PFX}{Q}.lora_A.weight", f"{PFX}{Q}.lora_B.weight", f"{PFX}{Q}{NEW}"

    def adapter(arrays: dict[str, Any], **config: Any) -> Files:
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
        return directory(fields, arrays)

    pair = {a_key: ramp(2, 8), b_key: ramp(8, 2)}
    to_lora = {"to": "lora"}
    cases.add("misread", adapter({**pair, r_key: ramp(2, 2)}), "check", finding="misread-by-peft")
    for case, shape in (("not-square", (2, 3)), ("of-another-rank", (3, 3)), ("flat", (4,))):
        files = adapter({**pair, r_key: ramp(*shape)})
        cases.both(f"r-{case}", files, "half-pair", "are not (r, in), (out, r) and (r, r)", **to_lora)
    cases.both("no-a", adapter({b_key: ramp(8, 2), r_key: ramp(2, 2)}), "half-pair", "lacks lora_A", **to_lora)
    cases.both("r-alone", adapter({r_key: ramp(2, 2)}), "half-pair", "has R alone", **to_lora)
    twice = adapter({**pair, r_key: ramp(2, 2), f"{PFX}{Q}{OLD}": ramp(2, 2)})
    cases.add("two-names", twice, "convert", error="invalid", message="under two names", **to_lora)
    dora = adapter({**pair, r_key: ramp(2, 2)}, use_dora=True)
    cases.add("and-dora", dora, "convert", error="unsupported", message="DoRA and MiCA do not go with", **to_lora)
