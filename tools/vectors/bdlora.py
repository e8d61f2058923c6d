"""formats/bdlora: BD-LoRA, whose A or B is stored block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft.tuners.lora.config import BdLoraConfig

from vectors import lora
from vectors.common import PFX, Case, Context, Tensors
from vectors.hostile import Cases, Files, Q, directory, ramp

FORMAT = "bdlora"


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    own = config["use_bdlora"]
    n = own["nblocks"]
    for key in sorted(k for k in tensors if k.endswith(("lora_A.weight", "lora_B.weight"))):
        module, side = key.removeprefix(PFX).rsplit(".", 2)[0], key.rsplit(".", 2)[1][-1].lower()
        if any(part in module for part in own[f"target_modules_bd_{side}"] or []):
            stored = tensors[key]
            rows, columns = stored.shape[0] // n, stored.shape[1]
            dense = torch.zeros(stored.shape[0], columns * n, dtype=stored.dtype)
            for i in range(n):
                dense[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = stored[i * rows : (i + 1) * rows]
            tensors[key] = dense
    lora.expected(tensors, config, base, ctx)
    ctx.facts["encoding"] = "bdlora"


def bdlora(n: int, strict: bool = True, **kw: Any) -> Callable[[], Any]:
    def config() -> Any:
        own = {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["self_attn"] if strict else ["q_proj"]}
        return lora.lora(use_bdlora=BdLoraConfig(nblocks=n, match_strict=strict, **own), r=4, **kw)()

    return config


CASES = [
    Case("a-and-b", bdlora(2), "A of one kind of layer, B of the others in two blocks"),
    Case("four-blocks-rslora", bdlora(4, use_rslora=True), "four blocks of one rank each; rsLoRA"),
    Case("some-dense", bdlora(2, strict=False), "match_strict is false: a layer that no list names is dense"),
    Case("bf16-base", bdlora(2), "a bfloat16 base: the delta is rounded before it is added", dtype="bfloat16"),
]


# ---------------------------------------------------------------- hostile adapters


def invalid(cases: Cases) -> None:
    own = {"target_modules_bd_a": ["q_proj"], "nblocks": 2}
    a_key, b_key = f"{PFX}{Q}.lora_A.weight", f"{PFX}{Q}.lora_B.weight"

    def adapter(more: dict[str, Any] | None = None, **config: Any) -> Files:
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        fields |= {"use_bdlora": {**own, **(more or {})}, **config}
        return directory(fields, {a_key: ramp(2, 4), b_key: ramp(8, 2)})

    to_lora = {"to": "lora"}

    def both(case: str, files: Files, finding: str, message: str) -> None:
        cases.both(case, files, finding, message, **to_lora)

    both("three-blocks", adapter({"nblocks": 3}), "half-pair", "do not fit 3 blocks")
    both("both-lists", adapter({"target_modules_bd_b": ["self_attn"]}), "half-pair", "in both lists")
    both("no-list", adapter({"target_modules_bd_a": ["k_proj"]}), "half-pair", "in neither list")
    both("names-no-list", adapter({"target_modules_bd_a": "q_proj"}), "half-pair", "no list of names")
    for case, n in (("zero", 0), ("string", "2"), ("huge", 10**9)):
        both(f"blocks-{case}", adapter({"nblocks": n}), "half-pair", "nblocks in adapter_config.json is")
    unknown = adapter({"axis": 1})
    cases.add("unknown-field", unknown, "convert", error="unsupported", message="axis in use_bdlora", **to_lora)
    for case, switch in (("dora", "use_dora"), ("qalora", "use_qalora")):
        files = adapter(**{switch: True})
        cases.add(f"and-{case}", files, "convert", error="unsupported", message="is not plain", **to_lora)
    wide = {"target_modules_bd_a": ["q_proj"], "nblocks": 20000}
    fields = {"peft_type": "LORA", "r": 20000, "use_bdlora": wide}
    bomb = {a_key: np.zeros((20000, 1), "uint8"), b_key: np.zeros((1, 20000), "uint8")}
    cases.add(
        "written-out-too-large", directory(fields, bomb), "convert", error="invalid", message="written out", **to_lora
    )
