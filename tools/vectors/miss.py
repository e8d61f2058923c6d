"""formats/miss: MiSS in its three modes, and Bone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import MissConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "miss"
PEFT_TYPES = ("MISS",)
BONE = {"peft_type": "BONE", "rename": (".miss_block", ".bone_block")}


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    init = config["init_weights"]
    ctx.facts["encoding"] = init if isinstance(init, str) else "standard"
    for module in sorted(
        k.removesuffix(".miss_block").removeprefix(PFX) for k in tensors if k.endswith(".miss_block")
    ):
        block = f64(tensors.pop(f"{PFX}{module}.miss_block"))
        name = f"{module}.weight"
        out, into = ctx.logical(module)
        delta = np.zeros((out, into))
        if init == "bat":
            w, r = f64(base[name]), block.shape[-1]
            for i in range(0, out, r):
                for j in range(0, into, r):
                    piece = w[i : i + r, j : j + r]
                    delta[i : i + r, j : j + r] = piece @ block[i // r] + block[i // r]
            ctx.base_dependent(name, delta)
            continue
        for o in range(out):
            for i in range(into):
                delta[o, i] = block[i % block.shape[0], o % block.shape[1]]
        ctx.add(name, delta)


def miss(**kw: Any) -> Callable[[], Any]:
    return lambda: MissConfig(**{"r": 4, "target_modules": ["q_proj", "k_proj", "down_proj"], **kw})


CASES = [
    Case("standard", miss(), "Linear layers of unequal shapes"),
    Case("remainder", miss(r=5), "shards that do not fill the inputs"),
    Case("mini", miss(init_weights="mini", mini_r=2), "columns laid one below the other"),
    Case("bat", miss(init_weights="bat"), "pieces of W take part"),
    Case("bone", miss(), "the former name", **BONE),
    Case("bone-bat", miss(init_weights="bat"), "the former name, pieces of W take part", **BONE),
]

MISS = {"peft_type": "MISS", "r": 2, "init_weights": True, "target_modules": ["q_proj"]}


def invalid(cases: Cases) -> None:
    def files(block: np.ndarray, name: str = "miss_block", **config: Any) -> dict[str, bytes]:
        return directory({**MISS, **config}, {f"{PFX}{Q}.{name}": block})

    cases.both("flat", files(ramp(16)), "half-pair", "is not (r, out)", dtype="bf16")
    cases.both("empty", files(ramp(0, 8)), "half-pair", "is not (r, out)", dtype="bf16")
    cases.both(
        "bat-of-a-matrix", files(ramp(2, 8), init_weights="bat"), "half-pair", "as init_weights=bat", dtype="bf16"
    )
    cases.both(
        "bat-not-square", files(ramp(4, 2, 3), init_weights="bat"), "half-pair", "as init_weights=bat", dtype="bf16"
    )
    cases.add("rank-not-as-config", files(ramp(2, 8), r=3), "check", finding="rank-mismatch")
    mini = files(ramp(2, 4), init_weights="mini", mini_r=2)
    cases.add("mini-rank-not-as-config", mini, "check", finding="rank-mismatch")
    for name, init in (("unknown-mode", "maxi"), ("mode-in-capitals", "BAT")):
        unknown = files(ramp(2, 8), init_weights=init)
        cases.add(name, unknown, "convert", error="unsupported", message="is unknown", dtype="bf16")
    cases.add("no-base", files(ramp(2, 8)), "convert", error="wrong-base", message="needs the shapes", to="lora")
    bone = files(ramp(2, 4), "bone_block", peft_type="BONE", init_weights="mini")
    cases.add("bone-mini", bone, "convert", error="unsupported", message="is unknown", to="miss")
    keys = files(ramp(2, 8), "bone_block")
    cases.add("keys-of-bone", keys, "convert", error="unsupported", message="holds no miss parameters", dtype="bf16")
