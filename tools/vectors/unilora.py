"""formats/unilora: UniLoRA, with its indices or theta alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import UniLoraConfig

from vectors.common import DTYPES, GPT2_TM, PFX, Case, Context, Tensors, f64
from vectors.fourierft import BASE
from vectors.hostile import Cases, Files, Q, directory, ramp

FORMAT = "unilora"
PEFT_TYPES = ("UNILORA",)
THETA = "base_model.unilora_theta_d"


def unilora(**kw: Any) -> Callable[[], Any]:
    return lambda: UniLoraConfig(
        **{"r": 2, "theta_d_length": 31, "target_modules": ["q_proj", "k_proj", "down_proj"], **kw}
    )


def spread(length: int, total: int, seed: int) -> np.ndarray:
    """Which element of theta each element of all matrices is."""
    rng = np.random.default_rng(seed)
    data = np.repeat(np.arange(length), total // length)
    if total % length:
        data = np.concatenate([data, rng.choice(length, total % length, replace=False)])
    rng.shuffle(data)
    return data


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "projection" if config["save_indices"] else "seed"
    theta, r = f64(tensors.pop(THETA)), config["r"]
    ends = tuple(config["target_modules"])
    mods = [m for m in ctx.modules if m.endswith(tuple(f".{e}" for e in ends)) or m in ends]
    shapes = [shape for m in mods for shape in ((r, ctx.logical(m)[1]), (ctx.logical(m)[0], r))]
    data = spread(len(theta), sum(a * b for a, b in shapes), config["proj_seed"])
    often, at, found = np.bincount(data, minlength=len(theta)), 0, []
    for shape in shapes:
        indices = data[at : at + shape[0] * shape[1]].reshape(shape)
        at += indices.size
        # A rounded root, then a rounded quotient.
        scales = torch.from_numpy(np.float32(1) / np.sqrt(often[indices].astype(np.float32)))
        scales = scales.to(DTYPES[ctx.case.dtype]).float()
        found.append((indices, scales))
    for n, m in enumerate(mods):
        matrices = []
        for side, (indices, scales) in zip("AB", found[2 * n : 2 * n + 2], strict=True):
            if config["save_indices"]:
                assert (tensors.pop(f"{PFX}{m}.unilora_indices_{side}").numpy() == indices).all()
                assert torch.equal(tensors.pop(f"{PFX}{m}.unilora_scales_{side}"), scales)
            matrices.append(theta[indices] * f64(scales))
        ctx.add(f"{m}.weight", ctx.stored(m, matrices[1] @ matrices[0]))


CASES = [
    Case("projection", unilora(save_indices=True), "layers of unequal shapes; save_indices", scale=0.3),
    Case("seed", unilora(), "layers of unequal shapes; theta alone", scale=0.3),
    Case("seed-long", unilora(theta_d_length=500, proj_seed=7), "more elements than places", scale=0.3),
    Case("seed-gpt2", unilora(target_modules=GPT2_TM), "Conv1D", kind="gpt2", scale=0.3),
    Case("projection-bf16-base", unilora(save_indices=True), "a bfloat16 base", dtype="bfloat16", scale=0.3),
]
CONFIG = {
    "peft_type": "UNILORA",
    "r": 2,
    "theta_d_length": 5,
    "proj_seed": 42,
    "save_indices": True,
    "target_modules": ["q_proj"],
}


def invalid(cases: Cases) -> None:
    data = spread(5, 32, 42)
    scale = 1 / np.sqrt(np.bincount(data))
    matrices: dict[str, np.ndarray] = {}
    for side, part, shape in (("A", data[:16], (2, 8)), ("B", data[16:], (8, 2))):
        matrices[f"{PFX}{Q}.unilora_indices_{side}"] = part.reshape(shape).astype(np.int64)
        matrices[f"{PFX}{Q}.unilora_scales_{side}"] = scale[part].reshape(shape).astype(np.float32)
    good, key = {THETA: ramp(5), **matrices}, f"{PFX}{Q}.unilora_indices_A"

    def made(drop: str = "", more: dict[str, Any] | None = None, **arrays: Any) -> Files:
        return directory({**CONFIG, **(more or {})}, {k: t for k, t in (good | arrays).items() if k != drop})

    def seed(more: dict[str, Any] | None = None, metadata: dict[str, str] | None = None) -> Files:
        return directory({**CONFIG, "save_indices": False, **(more or {})}, {THETA: ramp(5)}, metadata) | BASE

    outside = good[key].copy()
    outside[0, 0] = 5
    cases.add(
        "outside", made(**{key: outside}), "convert", error="invalid", message="lies outside of theta", to="lora"
    )
    cases.add("no-theta", made(THETA), "inspect", error="invalid", message="lacks base_model.unilora_theta_d")
    cases.add("theta-matrix", made(**{THETA: ramp(5, 1)}), "inspect", error="invalid", message="a vector is wanted")
    cases.both("half", made(f"{PFX}{Q}.unilora_scales_B"), "half-pair", "lacks scales_B", dtype="bf16")
    cases.both("int16", made(**{key: good[key].astype(np.int16)}), "half-pair", "do not fit together", dtype="bf16")
    cases.add("theta-not-as-config", made(more={"theta_d_length": 6}), "check", finding="theta-length")
    cases.add("flag-says-seed", made(more={"save_indices": False}), "check", finding="wrong-projection-flag")
    other = made(more={"proj_seed": 43})
    cases.add("other-seed", other, "convert", error="loss-refused", message="no recipe gives", to="seed")
    cases.add("no-base", seed(), "convert", error="wrong-base", message="needs the base", to="lora")
    every = seed({"target_modules": "all-linear"})
    message = "target_modules is 'all-linear'"
    cases.add("all-linear", every, "convert", error="unsupported", message=message, to="lora", base="base")
    record = {
        "name": "balanced",
        "generator": "pcg64",
        "seed": 42,
        "draws": [
            {
                "name": f"{PFX}{Q}.unilora_indices_{side}",
                "scales": f"{PFX}{Q}.unilora_scales_{side}",
                "shape": list(shape),
            }
            for side, shape in (("A", (2, 8)), ("B", (8, 2)))
        ],
        "length": 5,
        "through": "F32",
        "stored": "F32",
        "sha256": {"*": "0" * 64},
        "keys": {},
    }

    def recorded(**more: Any) -> Files:
        text = json.dumps({"version": 1, "recipe": {**record, **more}})
        return seed(metadata={"format": "pt", "adapterpack": text})

    for name, files, message in (
        ("recipe-other-digest", recorded(), "another set of tensors"),
        ("recipe-other-length", recorded(length=6), "does not draw the indices of this adapter"),
        ("recipe-more-fields", recorded(order="any"), "other fields than it should have"),
        ("recipe-negative-seed", recorded(seed=-1), "is not a recipe"),
    ):
        cases.add(name, files, "convert", error="invalid", message=message, to="projection")
