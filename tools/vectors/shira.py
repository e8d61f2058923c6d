"""formats/shira: SHiRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import ShiraConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.fourierft import BASE, places
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "shira"
PEFT_TYPES = ("SHIRA",)
UNSEEDED = 67280421310721
"""Of a torch.Generator that nobody seeded."""


def shira(**kw: Any) -> Callable[[], Any]:
    return lambda: ShiraConfig(**{"r": 2, "target_modules": ["q_proj", "k_proj", "down_proj"], **kw})


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "shira"
    tail = ".shira_weight"
    seed = UNSEEDED if config["random_seed"] is None else config["random_seed"]
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        weight, indices = f64(tensors.pop(key)), tensors.pop(key.replace("weight", "indices")).numpy()
        out, into = ctx.logical(module)
        flat = np.sort(places(out * into, len(weight), seed))
        assert (np.stack(divmod(flat, into)) == indices).all(), "the seed does not give PEFT's indices"
        delta = np.zeros((out, into))
        delta[indices[0], indices[1]] = weight
        ctx.add(f"{module}.weight", delta)


CASES = [
    Case("linear", shira(), "linear layers of unequal shapes; no seed is a seed too", scale=0.3),
    Case("seed", shira(random_seed=2**33 + 5), "a seed", kind="opt", scale=0.3),
    Case("bf16-base", shira(), "a bfloat16 base", dtype="bfloat16", scale=0.3),
]
CONFIG = {"peft_type": "SHIRA", "r": 1, "target_modules": ["q_proj"]}


def invalid(cases: Cases) -> None:
    weight, indices = f"{PFX}{Q}.shira_weight", f"{PFX}{Q}.shira_indices"
    good = np.stack([np.arange(16) // 8, np.arange(16) % 8]).astype(np.int32)
    how: dict[str, Any] = {"dtype": "bf16", "base": "base"}

    def made(where: np.ndarray) -> Any:
        return directory(CONFIG, {weight: ramp(16) / 3, indices: where}) | BASE

    outside, twice, negative = good.copy(), good.copy(), good.copy()
    outside[0, 3], negative[1, 3], twice[:, 3] = 8, -1, twice[:, 2]
    for name, bad in (("outside", outside), ("twice", twice), ("negative", negative)):
        cases.add(name, made(bad), "convert", error="invalid", message="outside of (8, 8), or one", **how)
    cases.both("no-indices", directory(CONFIG, {weight: ramp(16)}) | BASE, "half-pair", "lacks indices", **how)
    cases.both("other-length", made(good[:, 1:]), "half-pair", "do not fit 16 weights", **how)
    cases.both("int16", made(good.astype(np.int16)), "half-pair", "do not fit 16 weights", **how)
    cases.add("no-base", made(good), "convert", error="wrong-base", message="needs the shapes", dtype="bf16")
