"""formats/frod: FRoD, with its bases or the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import FrodConfig

from vectors.common import GPT2_TM, PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "frod"
PEFT_TYPES = ("FROD",)


def kind(module: str) -> str:
    parts = module.split(".")
    return parts[-1] if parts[-2].isdigit() else "_".join(parts[-2:])


def basis(matrices: list[np.ndarray], alpha: float) -> np.ndarray:
    """V of the matrices of one kind, (out, in) each; the way that each column points is torch's, in float32."""
    stacked = np.concatenate(matrices)
    q, r = np.linalg.qr(stacked)
    signs = np.sign(np.diag(r)) * np.sign(np.diag(f64(torch.linalg.qr(torch.from_numpy(stacked).float()).R)))
    q, r = q * signs, r * signs[:, None]
    mean = np.zeros(r.shape)
    for part in np.split(q, np.cumsum([len(m) for m in matrices])[:-1]):
        mean += np.linalg.inv(part.T @ part + alpha * np.eye(len(r))) / len(matrices)
    vectors = np.linalg.eigh(mean)[1]
    theirs = f64(torch.linalg.eigh(torch.from_numpy(mean).float()).eigenvectors)
    return r.T @ (vectors * np.where((vectors * theirs).sum(0) < 0, -1.0, 1.0))


def places(generator: torch.Generator, into: int, rate: float) -> np.ndarray:
    off = np.array([(i, j) for i in range(into) for j in range(into) if i != j])
    chosen = torch.randperm(len(off), generator=generator)[: max(1, int(into * into * rate))]
    return off[chosen.numpy()].T


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    tail = ".frod_lambda_l"
    modules = sorted(k.removesuffix(tail).removeprefix(PFX) for k in tensors if k.endswith(tail))
    kinds = sorted({kind(m) for m in modules})
    stored = config["save_projection"]
    ctx.facts["encoding"] = "basis" if stored else "seed"
    bases = {}
    generator = torch.Generator().manual_seed(config["projection_prng_key"])
    for k in kinds:
        if stored:
            v = f64(tensors.pop(f"base_model.frod_V.{k}"))
            where = tensors.pop(f"base_model.frod_s_indices.{k}").numpy()
            size = tensors.pop(f"base_model.frod_s_size.{k}")
            assert size.tolist() == list(v.shape)
        else:
            own = [ctx.stored(m, f64(base[f"{m}.weight"])) for m in modules if kind(m) == k]
            v = basis(own, config["regularization_alpha"])
            where = places(generator, len(v), config["sparse_rate"])
        bases[k] = v, where
    for m in modules:
        v, (rows, columns) = bases[kind(m)]
        w = ctx.stored(m, f64(base[f"{m}.weight"]))
        directions = w @ np.linalg.inv(v).T
        directions /= np.linalg.norm(directions, axis=0)
        middle = np.diag(f64(tensors.pop(f"{PFX}{m}.frod_lambda_l")))
        middle[rows, columns] += f64(tensors.pop(f"{PFX}{m}.frod_lambda_s_values"))
        ctx.base_dependent(f"{m}.weight", ctx.stored(m, directions @ middle @ v.T - w))


def frod(**kw: Any) -> Callable[[], Any]:
    fields = {"target_modules": ["q_proj", "v_proj"], "sparse_rate": 0.05, "progressbar": False, **kw}
    return lambda: FrodConfig(**fields)


TWO = {"num_hidden_layers": 2}
CASES = [
    Case("basis-llama", frod(), "two layers of each kind", over=TWO, scale=0.3, bound=1e-4),
    Case("basis-gpt2", frod(target_modules=GPT2_TM), "Conv1D", kind="gpt2", scale=0.3, bound=1e-4),
    Case(
        "basis-bf16-base",
        frod(),
        "a bfloat16 base, in which V is stored",
        dtype="bfloat16",
        scale=0.3,
        merge_bound=0.1,
        bound=1e-4,
    ),
    Case(
        "seed-llama",
        frod(save_projection=False, projection_prng_key=5, target_modules=["q_proj", "up_proj"]),
        "the same, made of the base's weights again",
        over=TWO,
        scale=0.3,
        bound=1e-3,
    ),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "FROD", "save_projection": True, "target_modules": ["q_proj"]}
    own = {
        f"{PFX}{Q}.frod_lambda_l": ramp(8),
        f"{PFX}{Q}.frod_lambda_s_values": ramp(2),
        "base_model.frod_V.self_attn_q_proj": ramp(8, 8),
        "base_model.frod_s_indices.self_attn_q_proj": np.array([[0, 1], [2, 3]]),
        "base_model.frod_s_size.self_attn_q_proj": np.array([8, 8]),
    }

    def bad(more: dict[str, Any] | None = None, **changed: Any) -> Any:
        arrays = {**own, **{next(k for k in own if f".frod_{n}" in k): a for n, a in changed.items()}}
        return directory({**config, **(more or {})}, {k: a for k, a in arrays.items() if a is not None})

    cases.both("no-values", bad(lambda_s_values=None), "half-pair", "lacks lambda_s_values", dtype="bf16")
    cases.both("no-places", bad(s_indices=None), "half-pair", "which the file lacks", dtype="bf16")
    cases.both("v-too-narrow", bad(V=ramp(8, 7)), "half-pair", "has 8 input features", dtype="bf16")
    cases.both("places-of-another-number", bad(s_indices=np.zeros((2, 3), int)), "half-pair", "not I64", dtype="bf16")
    cases.add("flag-says-seed", bad({"save_projection": False}), "check", finding="wrong-projection-flag")
    lone = bad(V=None, s_indices=None, s_size=None)
    cases.add("flag-says-projection", lone, "check", finding="wrong-projection-flag")
