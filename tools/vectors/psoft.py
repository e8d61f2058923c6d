"""formats/psoft: PSOFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import PsoftConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp
from vectors.of_base import sketch, svd

FORMAT = "psoft"
PEFT_TYPES = ("PSOFT",)


def rotation(config: dict[str, Any], weight: np.ndarray) -> np.ndarray:
    """R, (r, r), without its magnitudes."""
    r = config["r"]
    if not config["psoft_orth"]:
        return weight
    q = np.zeros((r, r))
    q[np.triu_indices(r, 1)] = weight
    q -= q.T
    eye = np.eye(r)
    if not config["use_cayley_neumann"]:
        return np.linalg.inv(eye - q).T.dot(np.eye(r)).T @ (eye + q)
    norm, eps = np.linalg.norm(q), config["cayley_neumann_eps"]
    if eps is not None and norm > eps:
        q *= eps / (norm + 1e-12)
    last = config["num_cayley_neumann_terms"] - 1
    if last == 2:
        last = 3
    powers = [np.linalg.matrix_power(q, n) for n in range(last + 1)]
    if last < 2:
        return sum((2 * p for p in powers[1:]), eye)
    return eye + 2 * sum(powers[1:last]) + powers[last]


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "psoft"
    tail = ".psoft_R.weight"
    r = config["r"]
    scale = config["psoft_alpha"] / r
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        rot = rotation(config, f64(tensors.pop(key)))
        a, b = (tensors.pop(f"{PFX}{module}.psoft_R.vector_{side}", None) for side in "ab")
        rot = rot if b is None else f64(b)[:, None] * rot
        rot = rot if a is None else rot * f64(a)[None]
        w = base[f"{module}.weight"]
        if config["psoft_svd"] == "full":
            u, s, vh = (x[..., :r] if n != 2 else x[:r] for n, x in enumerate(svd(w)))
        else:
            u, s, vh = sketch(w, r, config["psoft_svd_lowrank_niter"], config["random_seed"])
        s = s / scale
        left, right = (u * s, vh) if config["ab_svd_init"] == "psoft_init" else (u * s**0.5, s[:, None] ** 0.5 * vh)
        # Which way the vectors point: the sign of the largest entry of each column of U.
        ctx.facts.setdefault("signs", {})[module] = [int(np.sign(c[np.abs(c).argmax()])) for c in u.T]
        ctx.base_dependent(f"{module}.weight", scale * left @ (rot - np.eye(r)) @ right)


def psoft(**kw: Any) -> Callable[[], Any]:
    fields = {"r": 4, "psoft_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **kw}
    return lambda: PsoftConfig(**fields)


CASES = [
    Case("cayley", psoft(), "Cayley's transform and both magnitudes", scale=0.3, bound=2e-5),
    Case(
        "series-pissa",
        psoft(use_cayley_neumann=True, cayley_neumann_eps=0.5, ab_svd_init="pissa_init", psoft_mag_a=False),
        "the Neumann series, Q made smaller, roots of the singular values in both factors",
        scale=0.3,
        bound=2e-5,
    ),
    Case(
        "lowrank-free",
        psoft(psoft_svd="lowrank", random_seed=7, psoft_orth=False, target_modules=["q_proj", "project_in"]),
        "a randomised SVD and a free R",
        kind="opt",
        scale=0.3,
        bound=1e-4,
    ),
    Case("bf16-base", psoft(), "a bfloat16 base", dtype="bfloat16", scale=0.3, bound=2e-5),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "PSOFT", "r": 3, "psoft_alpha": 3, "target_modules": ["q_proj"]}
    key = f"{PFX}{Q}.psoft_R"
    good = {f"{key}.weight": ramp(3), f"{key}.vector_a": ramp(3), f"{key}.vector_b": ramp(3)}

    def bad(more: dict[str, Any] | None = None, **arrays: Any) -> Any:
        changed = {**good, **{f"{key}.{n}": a for n, a in arrays.items()}}
        return directory({**config, **(more or {})}, {k: a for k, a in changed.items() if a is not None})

    cases.both("no-vector", bad(vector_a=None), "config-mismatch", "lacks vector_a", dtype="bf16")
    cases.both("rank-not-as-config", bad({"r": 4}), "config-mismatch", "of rank 4", dtype="bf16")
    cases.both("magnitude-off", bad({"psoft_mag_b": False}), "config-mismatch", "would ignore it", dtype="bf16")
    cases.both("unknown-start", bad({"ab_svd_init": "svd"}), "malformed", "PEFT knows psoft_init", dtype="bf16")
    cases.both("alpha-zero", bad({"psoft_alpha": 0}), "malformed", "psoft_alpha", dtype="bf16")
    terms = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 1 << 40}
    cases.both("terms-absurd", bad(terms), "malformed", "num_cayley_neumann_terms", dtype="bf16")
