"""formats/road: RoAd."""

from __future__ import annotations

from typing import Any

import numpy as np
from peft import RoadConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "road"
PEFT_TYPES = ("ROAD",)


def matrix(theta: np.ndarray, alpha: np.ndarray, variant: str, group: int) -> np.ndarray:
    """R, (out, out), element by element."""
    out = {"road_1": 2 * len(theta), "road_2": len(theta), "road_4": len(theta) // 2}[variant]
    r, half = np.zeros((out, out)), group // 2
    for i in range(out):
        g, inner = divmod(i, group)
        partner = g * group + (inner + half) % group
        if variant == "road_1":
            own = other = g * half + inner % half
        elif variant == "road_2":
            own = other = i
        else:
            own, other = 2 * g * group + inner, (2 * g + 1) * group + inner
        r[i, i] = alpha[own] * np.cos(theta[own])
        r[i, partner] = alpha[other] * np.sin(theta[other]) * (-1 if inner < half else 1)
    return r


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "road"
    tail = ".road_theta"
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        theta, alpha = f64(tensors.pop(key)), f64(tensors.pop(f"{PFX}{module}.road_alpha"))
        r = matrix(theta, alpha, config["variant"], config["group_size"])
        for part in ("weight", "bias"):
            if f"{module}.{part}" in base:
                w = f64(base[f"{module}.{part}"])
                ctx.base_dependent(f"{module}.{part}", r @ w - w)


def road(variant: str, group: int = 8, target: tuple[str, ...] = ("fc1", "fc2")) -> Any:
    return lambda: RoadConfig(variant=variant, group_size=group, target_modules=list(target))


CASES = [
    Case("one", road("road_1"), "one angle for each pair; biases", kind="opt", scale=0.3),
    Case("two", road("road_2", 4), "one angle for each output", kind="opt", scale=0.3),
    Case("four", road("road_4"), "two angles for each output", kind="opt", scale=0.3),
    Case(
        "bf16-base",
        road("road_1", 2, ("q_proj", "up_proj")),
        "a bfloat16 base: R is rounded too",
        dtype="bfloat16",
        scale=0.3,
    ),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "ROAD", "variant": "road_1", "group_size": 4, "target_modules": ["q_proj"]}

    def with_angles(theta: tuple[int, ...], alpha: tuple[int, ...], **fields: Any) -> dict[str, bytes]:
        arrays = {f"{PFX}{Q}.road_theta": ramp(*theta), f"{PFX}{Q}.road_alpha": ramp(*alpha)}
        return directory({**config, **fields}, arrays)

    cases.both("lengths-differ", with_angles((4,), (8,)), "half-pair", "vectors of one length", dtype="bf16")
    cases.both("matrix", with_angles((4, 1), (4, 1)), "half-pair", "vectors of one length", dtype="bf16")
    cases.both("no-groups", with_angles((5,), (5,)), "half-pair", "do not make groups of 4", dtype="bf16")
    third = with_angles((4,), (4,), variant="road_3")
    cases.add("other-variant", third, "convert", error="unsupported", message="'road_3'", dtype="bf16")
    several = with_angles((4,), (4,), variant=["road_1"])
    cases.add("variant-list", several, "check", finding="unknown-variant")
    odd = with_angles((4,), (4,), group_size=3)
    cases.add("odd-group", odd, "convert", error="invalid", message="even number", dtype="bf16")
    alone = directory(config, {f"{PFX}{Q}.road_theta": ramp(4)})
    cases.add("no-alpha", alone, "check", finding="half-pair")
