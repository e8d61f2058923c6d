"""formats/supertuning: Supertuning, with its indices and without, and with LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import SupertuningConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "supertuning"
PEFT_TYPES = ("SUPERTUNING",)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    saved = config["save_precomputed_indices"]
    ctx.facts["encoding"] = "indices" if saved else "magnitude"
    tail = ".supertuning_values"
    for module in sorted(k.removesuffix(tail).removeprefix(PFX) for k in tensors if k.endswith(tail)):
        prefix, name = f"{PFX}{module}.supertuning_", f"{module}.weight"
        values = f64(tensors.pop(f"{prefix}values"))
        if saved:
            indices = tensors.pop(f"{prefix}indices").numpy()
        else:
            magnitude = np.abs(f64(base[name])).ravel()
            indices = np.argsort(-magnitude if config["select_top"] else magnitude, kind="stable")[: len(values)]
            ctx.keep(name)
        delta = np.zeros(base[name].numel())
        for at, value in zip(indices, values, strict=True):
            delta[at] += value
        delta = delta.reshape(ctx.logical(module))
        if config["r"] is not None:
            b, a = (f64(tensors.pop(f"{prefix}lora_{n}.weight")) for n in "BA")
            delta += config["lora_alpha"] / config["r"] * (b @ a)
        ctx.add(name, delta)


def supertuning(**kw: Any) -> Callable[[], Any]:
    return lambda: SupertuningConfig(**{"sparsity": 0.9, "target_modules": ["q_proj", "k_proj", "down_proj"], **kw})


CASES = [
    Case("indices", supertuning(), "Linear layers of unequal shapes"),
    Case("smallest", supertuning(select_top=False), "the smallest magnitudes"),
    Case("supra", supertuning(r=2, lora_alpha=3, init_weights=False), "with a low-rank part"),
    Case("supra-default-alpha", supertuning(r=2, init_weights=False), "lora_alpha is 2 r"),
    Case("magnitude", supertuning(save_precomputed_indices=False), "no indices: those of the base's magnitudes"),
    Case(
        "magnitude-smallest",
        supertuning(save_precomputed_indices=False, select_top=False, r=2, init_weights=False),
        "no indices, the smallest magnitudes, a low-rank part",
    ),
]

SUPERTUNING = {"peft_type": "SUPERTUNING", "sparsity": 0.9, "target_modules": ["q_proj"]}


def invalid(cases: Cases) -> None:
    good = {"indices": np.arange(6) * 7, "values": ramp(6)}

    def files(config: dict[str, Any] | None = None, **own: np.ndarray | None) -> dict[str, bytes]:
        arrays = {f"{PFX}{Q}.supertuning_{n}": a for n, a in {**good, **own}.items() if a is not None}
        return directory({**SUPERTUNING, **(config or {})}, arrays)

    low_rank = {"lora_A.weight": ramp(2, 8), "lora_B.weight": ramp(8, 2)}
    cases.add("no-values", files(values=None), "check", finding="half-pair")
    cases.both("fewer-indices", files(indices=np.arange(5)), "half-pair", "whole numbers", dtype="bf16")
    cases.both("indices-of-floats", files(indices=ramp(6)), "half-pair", "whole numbers", dtype="bf16")
    cases.both(
        "low-rank-not-in-config", files(**low_rank), "half-pair", "r in adapter_config.json is null", dtype="bf16"
    )
    cases.both("low-rank-not-in-file", files({"r": 2}), "half-pair", "lacks A, B", dtype="bf16")
    flagged = files({"save_precomputed_indices": False})
    cases.both("flag-says-no-indices", flagged, "wrong-index-flag", "save_precomputed_indices is false", dtype="bf16")
    cases.add("negative-index", files(indices=np.arange(6) - 1), "check", finding="index-out-of-range")
    lost = files({"save_precomputed_indices": False}, indices=None)
    cases.add("no-base", lost, "convert", error="wrong-base", message="largest weights", to="indices")
