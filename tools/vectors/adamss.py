"""formats/adamss: AdaMSS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import AdamssConfig
from sklearn.cluster import KMeans

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp
from vectors.of_base import sketch

FORMAT = "adamss"
PEFT_TYPES = ("ADAMSS",)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "adamss"
    tail = ".adamss_newB"
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        projection = f64(tensors.pop(key))
        weight, bias = base[f"{module}.weight"], base.get(f"{module}.bias")
        stacked = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
        rank = min(config["r"], *stacked.shape)
        u = sketch(stacked, rank, 2, config["random_seed"])[0]
        means = KMeans(
            min(config["num_subspaces"], len(u)), init="random", n_init=1, max_iter=10, random_state=123456789
        )
        clusters = means.fit_predict(u.astype(np.float32))
        delta = np.zeros(stacked.shape)
        for n in range(clusters.max() + 1):
            a, b = (f64(tensors.pop(f"{PFX}{module}.adamss_{side}.{n}")) for side in "AB")
            delta[clusters == n] = b @ a @ projection
        ctx.facts.setdefault("clusters", {})[module] = clusters.tolist()
        into = weight.shape[1]
        ctx.base_dependent(f"{module}.weight", delta[:, :into])
        if bias is not None:
            ctx.base_dependent(f"{module}.bias", delta[:, into])


def adamss(**kw: Any) -> Callable[[], Any]:
    fields = {
        "r": 4,
        "num_subspaces": 3,
        "subspace_rank": 2,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        **kw,
    }
    return lambda: AdamssConfig(**fields)


CASES = [
    Case("linear", adamss(), "no biases in the base", scale=0.3),
    Case("bias", adamss(target_modules=["q_proj", "fc1"], random_seed=3), "the bias, too", kind="opt", scale=0.3),
    Case("bf16-base", adamss(num_subspaces=2), "a bfloat16 base", dtype="bfloat16", scale=0.3),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "ADAMSS", "r": 4, "num_subspaces": 2, "target_modules": ["q_proj"]}
    shapes = {"newB": (4, 8), "A.0": (1, 4), "B.0": (5, 1), "A.1": (1, 4), "B.1": (3, 1)}

    def bad(more: dict[str, Any] | None = None, **changed: Any) -> Any:
        own = {**shapes, **{n.replace("__", "."): s for n, s in changed.items()}}
        arrays = {f"{PFX}{Q}.adamss_{n}": ramp(*s) for n, s in own.items() if s is not None}
        return directory({**config, **(more or {})}, arrays)

    cases.both("no-projection", bad(newB=None), "half-pair", "lacks newB", dtype="bf16")
    cases.both("no-b", bad(B__1=None), "half-pair", "lacks B.1", dtype="bf16")
    cases.both("a-of-another-rank", bad(A__0=(1, 5)), "half-pair", "do not fit together", dtype="bf16")
    cases.both("a-gap", bad(A__1=None, B__1=None, A__2=(1, 4), B__2=(3, 1)), "half-pair", "lacks A.1", dtype="bf16")
    cases.both("seed-string", bad({"random_seed": "0"}), "malformed", "random_seed", dtype="bf16")
    cases.add("clusters-not-as-config", bad({"num_subspaces": 5}), "check", finding="config-mismatch")
