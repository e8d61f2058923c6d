"""formats/adalora: AdaLoRA, pruned and not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import AdaLoraConfig, PeftModel

from vectors.common import GPT2_TM, PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "adalora"
PEFT_TYPES = ("ADALORA",)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "adalora"
    for module in sorted(k.removesuffix(".lora_E").removeprefix(PFX) for k in tensors if k.endswith(".lora_E")):
        a, b, e = (f64(tensors.pop(f"{PFX}{module}.lora_{n}")) for n in "ABE")
        scale = config["lora_alpha"] / (config["init_r"] + 1e-5)
        delta = scale * (b @ np.diag(e[:, 0]) @ a)
        ctx.add(f"{module}.weight", ctx.stored(module, delta.reshape(ctx.logical(module))))


def adalora(**kw: Any) -> Callable[[], Any]:
    fields = {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 16}
    return lambda: AdaLoraConfig(**{**fields, "target_modules": ["q_proj", "k_proj", "down_proj"], **kw})


def prune(model: PeftModel) -> None:
    """Leave some of the triples, as training does."""
    kept = {}
    with torch.no_grad():
        for n, (name, e) in enumerate(p for p in model.named_parameters() if ".lora_E." in p[0]):
            mask = torch.arange(len(e)) % 3 != n % 3
            e.masked_fill_(~mask[:, None], 0)
            kept[name.removeprefix("base_model.model.")] = mask.tolist()
    model.peft_config["default"].rank_pattern = kept


CASES = [
    Case("linear", adalora(), "Linear layers of unequal shapes", scale=0.3),
    Case(
        "pruned",
        adalora(),
        "rank_pattern: tensors of fewer triples, the divisor is still init_r",
        scale=0.3,
        post=prune,
    ),
    Case("gpt2", adalora(target_modules=GPT2_TM), "Conv1D", "gpt2", scale=0.3),
    Case("conv2d", adalora(target_modules=["conv0"]), "a kernel that A holds flattened", "custom-conv2d", scale=0.3),
    Case("bias-all", adalora(target_modules=["fc1"], bias="all"), "every bias", "opt", scale=0.3),
]

ADALORA = {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 4, "total_step": 9, "target_modules": ["q_proj"]}


def invalid(cases: Cases) -> None:
    good = {"A": ramp(2, 8), "B": ramp(8, 2), "E": ramp(2, 1)}

    def files(config: dict[str, Any] | None = None, **own: np.ndarray | None) -> dict[str, bytes]:
        arrays = {f"{PFX}{Q}.lora_{n}": a for n, a in {**good, **own}.items() if a is not None}
        return directory({**ADALORA, **(config or {})}, arrays)

    cases.both("no-e", files(E=None), "half-pair", "lacks E", to="lora")
    cases.both("flat-e", files(E=ramp(2)), "half-pair", "are not (r, in)", to="lora")
    cases.both("b-of-other-rank", files(B=ramp(8, 3)), "half-pair", "are not (r, in)", to="lora")
    cases.both("init-r-boolean", files({"init_r": True}), "malformed", "init_r", to="lora")
    cases.both("pattern-no-object", files({"rank_pattern": [True]}), "malformed", "not an object", to="lora")
    for name, mask in (("pattern-of-numbers", [1, 0]), ("pattern-too-long", [True] * 3)):
        broken = files({"rank_pattern": {f"{Q}.lora_E": mask}})
        cases.add(name, broken, "convert", error="invalid", message="no list of 2 truth values", to="lora")
    pruned = files({"rank_pattern": {f"{Q}.lora_E": [True, False]}})
    cases.add("pattern-of-another-rank", pruned, "check", finding="rank-mismatch")
    dora = files({"use_dora": True})
    cases.add("dora", dora, "convert", error="unsupported", message="use_dora is set", to="lora")
