"""formats/vera: VeRA, with its projections or the seed alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import VeraConfig

from vectors.common import DTYPES, GPT2_TM, PFX, Case, Context, Tensors, f64, fuses, mersenne, sha256, uniform
from vectors.hostile import Cases, Files, Q, V, directory, ramp, text

FORMAT = "vera"
PEFT_TYPES = ("VERA",)


def vera(**kw: Any) -> Callable[[], Any]:
    return lambda: VeraConfig(
        **{"r": 3, "projection_prng_key": 11, "target_modules": ["q_proj", "v_proj", "down_proj"], **kw}
    )


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "projection" if config["save_projection"] else "seed"
    mods = sorted(k.removesuffix(".vera_lambda_b").removeprefix(PFX) for k in tensors if k.endswith(".vera_lambda_b"))
    logical = {m: ctx.logical(m) for m in mods}
    max_out, max_in = (max(s[i] for s in logical.values()) for i in (0, 1))
    rounded = DTYPES[ctx.case.dtype]
    fused = fuses()
    pa, pb = drawn(config["projection_prng_key"], config["r"], max_in, max_out, fused)
    ta = torch.from_numpy(pa).to(rounded)
    tb = torch.from_numpy(pb).to(rounded)
    if ctx.case.autocast:
        ta, tb = ta.float(), tb.float()
    if config["save_projection"]:
        same = torch.equal(ta, tensors["base_model.vera_A"]) and torch.equal(tb, tensors["base_model.vera_B"])
        assert same and ta.dtype == tensors["base_model.vera_A"].dtype, (
            "the recipe does not give back PEFT's projections"
        )
        del tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    ctx.facts["regenerate"] = {
        "prng_key": config["projection_prng_key"],
        "r": config["r"],
        "max_in": max_in,
        "max_out": max_out,
        "arithmetic": "fused" if fused else "two-roundings",
        "rounded_through": ctx.case.dtype,
        "dtype": str(ta.dtype).removeprefix("torch."),
        "sha256": {"base_model.vera_A": sha256(ta), "base_model.vera_B": sha256(tb)},
    }
    for m in mods:
        lb, ld = f64(tensors.pop(f"{PFX}{m}.vera_lambda_b")), f64(tensors.pop(f"{PFX}{m}.vera_lambda_d"))
        out, inn = logical[m]
        ctx.add(m + ".weight", ctx.stored(m, (lb[:, None] * f64(tb)[:out]) @ (ld[:, None] * f64(ta)[:, :inn])))


def bound(columns: int) -> float:
    """Of the uniform draw of a projection with that many columns."""
    return math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))


def drawn(key: int, r: int, max_in: int, max_out: int, fused: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A, (r, max_in), and B, (max_out, r), float32, from the seed."""
    bits = mersenne(key)
    a = uniform(bits, (r, max_in), bound(max_in), fused)
    return a, uniform(bits, (max_out, r), bound(r), fused)


CASES = [
    *[
        Case(
            f"{form}-{tag}",
            vera(save_projection=form == "projection", **kw),
            f"{says}; {form}",
            scale=0.3,
            **more,
        )
        for form in ("projection", "seed")
        for tag, says, kw, more in (
            ("mixed-shapes", "layers of unequal shapes: slices of the shared projections", {}, {}),
            (
                "opt",
                "OPT, four shapes",
                {"target_modules": ["q_proj", "fc1", "fc2", "project_in", "project_out"]},
                {"kind": "opt"},
            ),
            ("gpt2", "Conv1D", {"target_modules": GPT2_TM, "projection_prng_key": 2**32 + 5}, {"kind": "gpt2"}),
            ("bias-all", "every bias", {"target_modules": ["query", "dense"], "bias": "all"}, {"kind": "bert"}),
            (
                "bf16-base",
                "a bfloat16 base: projections are rounded to bfloat16, then float32 again",
                {},
                {"dtype": "bfloat16"},
            ),
        )
    ],
    Case(
        "projection-bias-only",
        vera(target_modules=["fc1"], bias="vera_only"),
        "biases of adapted layers",
        kind="opt",
        scale=0.3,
    ),
    Case("projection-modules-to-save", vera(modules_to_save=["lm_head"]), "modules_to_save", scale=0.3),
    Case(
        "projection-f16-base",
        vera(),
        "a float16 base: projections rounded to float16",
        dtype="float16",
        scale=0.3,
    ),
    Case(
        "projection-bf16-file",
        vera(),
        "autocast_adapter_dtype=False: the file is bfloat16",
        dtype="bfloat16",
        autocast=False,
        scale=0.3,
    ),
    Case(
        "projection-key-0",
        vera(projection_prng_key=0, r=8, target_modules=["q_proj"]),
        "the default key",
        scale=0.3,
    ),
]


# ---------------------------------------------------------------- hostile adapters

VERA = {
    "peft_type": "VERA",
    "r": 3,
    "projection_prng_key": 11,
    "save_projection": True,
    "target_modules": ["q_proj"],
}


def projections(seed: int = 11, into: int = 8, out: int = 8) -> dict[str, np.ndarray]:
    a, b = drawn(seed, 3, into, out)
    return {"base_model.vera_A": a, "base_model.vera_B": b}


def lambdas(module: str = Q, r: int = 3, out: int = 8) -> dict[str, np.ndarray]:
    return {f"{PFX}{module}.vera_lambda_b": ramp(out), f"{PFX}{module}.vera_lambda_d": ramp(r)}


def recipe(version: Any = 1, **changed: Any) -> dict[str, str]:
    """The metadata that records how the projections of seed 11 are drawn."""
    shapes = {"vera_A": [3, 8], "vera_B": [8, 3]}
    record = {
        "name": "uniform",
        "generator": "mt19937",
        "seed": 11,
        "draws": [
            {
                "name": name,
                "shape": shape,
                "bound": bound(shape[1]).hex(),
            }
            for name, shape in shapes.items()
        ],
        "order": "row-major, one 32-bit draw per element, low 24 bits",
        "arithmetic": "fused",
        "through": "F32",
        "stored": "F32",
        "sha256": {
            key.removeprefix("base_model."): hashlib.sha256(array.tobytes()).hexdigest()
            for key, array in projections().items()
        },
        "keys": {name: f"base_model.{name}" for name in shapes},
    }
    return {"format": "pt", "adapterpack": json.dumps({"version": version, "recipe": {**record, **changed}})}


def invalid(cases: Cases) -> None:
    llama = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 16,
        "dtype": "float32",
    }
    base = {"base/config.json": text(llama)}
    to_lora = {"to": "lora", "base": "base"}

    def projection(more: dict[str, Any] | None = None, **arrays: Any) -> Files:
        return directory({**VERA, **(more or {})}, projections() | lambdas() | arrays)

    def seed(metadata: dict[str, str] | None = None, more: dict[str, Any] | None = None) -> Files:
        return directory({**VERA, "save_projection": False, **(more or {})}, lambdas(), metadata)

    def refused(case: str, files: Files, message: str, error: str = "invalid", to: str = "projection") -> None:
        cases.add(case, files, "convert", error=error, message=message, to=to)

    # Projections.
    for name, other in (("A", "B"), ("B", "A")):
        lone = lambdas() | {f"base_model.vera_{name}": projections()[f"base_model.vera_{name}"]}
        cases.add(
            f"no-{other.lower()}", directory(VERA, lone), "inspect", error="invalid", message="one projection of two"
        )
    cases.add("flag-says-seed", projection({"save_projection": False}), "check", finding="wrong-projection-flag")
    cases.add("flag-says-projection", seed(more={"save_projection": True}), "check", finding="wrong-projection-flag")
    small = projection(**{"base_model.vera_B": ramp(7, 3)})
    cases.add("b-too-short", small, "check", finding="projection-shape")
    cases.add("b-too-short-convert", small | base, "convert", error="invalid", message="do not fit rank 3", **to_lora)
    slim = projection(**{"base_model.vera_A": ramp(2, 8)})
    cases.add("a-other-rank-convert", slim | base, "convert", error="invalid", message="do not fit rank 3", **to_lora)
    short = projection(**{"base_model.vera_A": ramp(3, 7)})
    cases.add("a-too-narrow-convert", short | base, "convert", error="wrong-base", message="7 wide", **to_lora)
    cases.add("no-base", projection(), "convert", error="wrong-base", message="needs the shapes", to="lora")
    unlike = base["base/config.json"].replace(b"llama", b"gpt2")
    gpt2 = projection() | {"base/config.json": unlike}
    cases.add("other-base", gpt2, "convert", error="wrong-base", message="config.json", **to_lora)

    # Vectors.
    d_key = f"{PFX}{Q}.vera_lambda_d"
    lone = directory(VERA, {key: array for key, array in (projections() | lambdas()).items() if key != d_key})
    cases.add("no-lambda-d", lone, "check", finding="half-pair")
    cases.add("no-lambda-d-convert", lone, "convert", error="invalid", message="lacks lambda_d", dtype="bf16")
    cases.add("lambda-matrix", projection(**{d_key: ramp(3, 1)}), "check", finding="half-pair")
    cases.add("rank-not-as-config", projection({"r": 4}), "check", finding="rank-mismatch")
    uneven = projection(**lambdas(V, 2))
    cases.add("ranks-differ", uneven, "convert", error="invalid", message="different ranks", dtype="bf16")

    # The seed.
    refused("other-seed", projection({"projection_prng_key": 12}), "no recipe gives", "loss-refused", "seed")
    for case, key in (("huge", 1 << 64), ("string", "11"), ("float", 11.0), ("boolean", True), ("null", None)):
        refused(f"prng-key-{case}", projection({"projection_prng_key": key}), "projection_prng_key is", to="seed")
    refused("seed-without-base", seed(), "needs the shapes", "wrong-base")

    # Recorded recipes.
    refused("recipe-other-seed", seed(recipe(seed=12)), "another vera_A")
    digests = json.loads(recipe()["adapterpack"])["recipe"]["sha256"]
    refused("recipe-other-digest", seed(recipe(sha256={**digests, "vera_B": "0" * 64})), "another vera_B")
    refused("recipe-digest-missing", seed(recipe(sha256={"vera_A": digests["vera_A"]})), "one digest for each")
    refused("recipe-no-digests", seed(recipe(sha256={})), "one digest for each")
    refused("recipe-other-arithmetic", seed(recipe(arithmetic="two-roundings")), "another vera_")
    refused("recipe-unknown-arithmetic", seed(recipe(arithmetic="three-roundings")), "unknown arithmetic")
    refused("recipe-unknown-dtype", seed(recipe(through="F31")), "is not a recipe")
    refused("recipe-integer-dtype", seed(recipe(stored="I32")), "unknown arithmetic or dtype")
    refused("recipe-version-2", seed(recipe(version=2)), "has version 2", "unsupported")
    refused("recipe-unknown-name", seed(recipe(name="normal")), "unknown recipe 'normal'", "unsupported")
    refused("recipe-seed-string", seed(recipe(seed="11")), "is not a recipe")
    refused("recipe-no-draws", seed(recipe(draws=[], sha256={})), "does not draw vera_A and vera_B")

    def draws(shape: list[Any], bound: str = "0x1p-1") -> list[dict[str, Any]]:
        return [{"name": name, "shape": shape, "bound": bound} for name in ("vera_A", "vera_B")]

    refused("recipe-huge", seed(recipe(draws=draws([1 << 31, 1 << 31]))), "would draw more than", "unsupported")
    refused("recipe-shape-negative", seed(recipe(draws=draws([-3, 8]))), "is not a recipe")
    refused("recipe-shape-float", seed(recipe(draws=draws([3.0, 8]))), "is not a recipe")
    refused("recipe-bound-nan", seed(recipe(draws=draws([3, 8], "nan"))), "is not a recipe")
    refused("recipe-bound-infinite", seed(recipe(draws=draws([3, 8], "inf"))), "is not a recipe")
    twice = [*draws([3, 8]), draws([3, 8])[0]]
    refused("recipe-draws-twice", seed(recipe(draws=twice)), "one digest for each")
    foreign = {"vera_A": f"{PFX}{Q}.vera_lambda_b", "vera_B": "base_model.vera_B"}
    refused("recipe-foreign-key", seed(recipe(keys=foreign)), "the recorded recipe calls vera_A")
    refused("recipe-not-json", seed({"adapterpack": "pickle"}), '__metadata__["adapterpack"]')
    refused("recipe-array", seed({"adapterpack": "[]"}), "object is wanted")
    refused("recipe-duplicate-key", seed({"adapterpack": '{"version":1,"version":1}'}), "stands twice")
    refused("recipe-missing", seed({"adapterpack": '{"version":1}'}), "is not a recipe")
