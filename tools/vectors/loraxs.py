"""formats/loraxs: LoRA-XS, whose authors patch PEFT's LoRA. PEFT itself misreads such files."""

from __future__ import annotations

import json
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
    lean(cases)
    twice = adapter({**pair, r_key: ramp(2, 2), f"{PFX}{Q}{OLD}": ramp(2, 2)})
    cases.add("two-names", twice, "convert", error="invalid", message="under two names", **to_lora)
    dora = adapter({**pair, r_key: ramp(2, 2)}, use_dora=True)
    cases.add("and-dora", dora, "convert", error="unsupported", message="DoRA and MiCA do not go with", **to_lora)


def lean(cases: Cases) -> None:
    """R alone, with a record of how the base gives A and B that does not hold."""
    a_key, b_key, r_key = f"{PFX}{Q}.lora_A.weight", f"{PFX}{Q}.lora_B.weight", f"{PFX}{Q}{NEW}"
    draw = {"name": Q, "A": a_key, "B": b_key, "shape": [8, 8], "rank": 2}
    record = {
        "name": "truncated-svd",
        "generator": "scikit-learn",
        "draws": [draw],
        "iterations": 10,
        "seed": 42,
        "signs": "outputs",
        "threads": 1,
        "through": "F32",
        "stored": "F32",
        "libraries": {},
        "sha256": {a_key: "0" * 64, b_key: "0" * 64},
        "keys": {},
    }

    def seed(arrays: dict[str, Any] | None = None, version: int = 1, **changed: Any) -> Files:
        said = {"version": version, "recipe": {**record, **changed}}
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        metadata = {"format": "pt", "adapterpack": json.dumps(said)}
        return directory(fields, {r_key: ramp(2, 2)} if arrays is None else arrays, metadata)

    def refused(case: str, files: Files, message: str, error: str = "invalid") -> None:
        cases.add(f"seed-{case}", files, "convert", error=error, message=message, to="lora")

    refused("no-base", seed(), "left to the base's weights", "wrong-base")
    cases.add("seed-misread", seed(), "check", finding="misread-by-peft")
    refused("r-of-another-rank", seed({r_key: ramp(3, 3)}), "a part of rank 2 was recorded")
    cases.add("seed-r-of-another-rank-check", seed({r_key: ramp(3, 3)}), "check", finding="half-pair")
    v_key = r_key.replace("q_proj", "v_proj")
    refused("module-unsaid", seed({r_key: ramp(2, 2), v_key: ramp(2, 2)}), "of the modules that")
    refused("module-twice", seed(draws=[draw, draw]), "one digest for each")
    other = {**draw, "A": b_key, "B": a_key}
    refused("a-and-b-exchanged", seed(draws=[other]), "of the modules that")
    refused("rank-above-shape", seed(draws=[{**draw, "rank": 9}]), "is not a recipe")
    refused("shape-of-three", seed(draws=[{**draw, "shape": [8, 8, 8]}]), "is not a recipe")
    refused("digest-missing", seed(sha256={a_key: "0" * 64}), "one digest for each")
    refused("integers-stored", seed(stored="I32"), "unknown arithmetic or dtype")
    refused("threads-none", seed(threads=0), "is not a recipe")
    refused("more-iterations", seed(iterations=10**6), "is not a recipe")
    refused("other-seed", seed(seed=1), "is not a recipe")
    refused("signs-unknown", seed(signs="both"), "is not a recipe")
    refused("field-too-many", seed(oversamples=10), "is not a recipe")
    refused("libraries-list", seed(libraries=[]), "is not a recipe")
    refused("version-2", seed(version=2), "has version 2", "unsupported")
    uniform = {"name": "uniform", "generator": "mt19937", "order": "", "arithmetic": "fused"}
    drawn = [{"name": n, "shape": [2, 8], "bound": "0x1p-1"} for n in (a_key, b_key)]
    refused("drawn-uniformly", seed(**uniform, draws=drawn), "not one that gives them")
