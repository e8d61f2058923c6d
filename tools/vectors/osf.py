"""formats/osf: OSF."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import OSFConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "osf"
PEFT_TYPES = ("OSF",)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "osf"
    tail = ".osf_svd_params.S_low"
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        s_low = f64(tensors.pop(key))
        u_low, v_low = (f64(tensors.pop(f"{PFX}{module}.osf_svd_params.{n}_low")) for n in "UV")
        u, s, vh = np.linalg.svd(f64(base[f"{module}.weight"]), full_matrices=False)
        top = len(s) - len(s_low)
        before = (u[:, top:] * s[top:]) @ vh[top:]
        ctx.base_dependent(f"{module}.weight", (u_low * s_low) @ v_low - before)


def osf(**kw: Any) -> Callable[[], Any]:
    return lambda: OSFConfig(**{"effective_rank": 5, "target_modules": ["q_proj", "v_proj", "down_proj"], **kw})


CASES = [
    Case("linear", osf(), "layers of unequal shapes", scale=0.3),
    Case(
        "patterns",
        osf(effective_rank=0.75, rank_pattern={"q_proj": 9, r"mlp\.": 0.25}),
        "fractions, and patterns that match anywhere in the path",
        scale=0.3,
    ),
    Case("bf16-base", osf(), "a bfloat16 base", dtype="bfloat16", scale=0.3),
]


def invalid(cases: Cases) -> None:
    config = {"peft_type": "OSF", "effective_rank": 5, "target_modules": ["q_proj"]}
    key = f"{PFX}{Q}.osf_svd_params"

    def bad(more: dict[str, Any] | None = None, **arrays: Any) -> Any:
        own = {"U_low": ramp(8, 3), "S_low": ramp(3), "V_low": ramp(3, 8), **arrays}
        return directory({**config, **(more or {})}, {f"{key}.{n}": a for n, a in own.items() if a is not None})

    cases.both("no-s", bad(S_low=None), "half-pair", "lacks S_low", dtype="bf16")
    cases.both("ranks-differ", bad(V_low=ramp(4, 8)), "half-pair", "no lesser part", dtype="bf16")
    whole = bad(U_low=ramp(8, 8), S_low=ramp(8), V_low=ramp(8, 8))
    cases.both("nothing-kept", whole, "half-pair", "no lesser part", dtype="bf16")
    cases.add("rank-not-as-config", bad({"effective_rank": 0.5}), "check", finding="rank-mismatch")
    cases.add("rank-no-number", bad({"effective_rank": "half"}), "check", finding="malformed")
    cases.add("pattern-runs-on", bad({"rank_pattern": {"(a+)+$": 2, "(": 1}}), "check", finding="malformed")
