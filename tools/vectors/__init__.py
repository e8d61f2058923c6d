'''What formats/<id>/ is tested with: one module here for each PEFT method.

The two commands find the modules of this package by themselves; no list is edited anywhere:

    python tools/make_vectors.py [NAME]   formats/<id>/vectors: adapters that PEFT wrote, and what each must change
    python tools/make_invalid.py [NAME]   formats/<id>/invalid: hostile input, and the error that it must give

Without NAME every case is removed and written anew; with it, those whose "<id>/<case>" contains NAME.

A module that says FORMAT is found, and may hold:

    FORMAT = "miss"                # the folder under formats/; its SPEC.md has the formulas
    PEFT_TYPES = ("MISS",)         # `peft_type` of the adapters that `expected` computes
    CASES = [Case(...), ...]       # the vectors: common.Case says all that a case can ask for
    def expected(tensors, config, base, ctx) -> None: ...   # the formulas, in float64
    def invalid(cases) -> None: ...                         # the hostile cases: hostile.Cases has what writes them

Modules without FORMAT (common, hostile, whatever methods share) only help. A module may import another's helpers.

A whole method, as an example:

    """formats/miss: MiSS."""

    from __future__ import annotations

    from typing import Any

    import numpy as np
    from peft import MissConfig

    from vectors.common import PFX, Case, Context, Tensors, f64
    from vectors.hostile import Cases, Q, directory, ramp

    FORMAT = "miss"
    PEFT_TYPES = ("MISS",)


    def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
        ctx.facts["encoding"] = "miss"
        tail = ".miss_block"
        for key in sorted(k for k in tensors if k.endswith(tail)):
            module = key.removesuffix(tail).removeprefix(PFX)
            block = f64(tensors.pop(key))  # pop what the method knows
            _, into = ctx.logical(module)
            delta = np.tile(block, (-(-into // len(block)), 1))[:into].T  # (out, in)
            ctx.add(f"{module}.weight", ctx.stored(module, delta))  # one result for each base tensor


    def miss(**kw: Any) -> Any:
        return lambda: MissConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], **kw})


    CASES = [
        Case("linear", miss(), "Linear layers of unequal shapes"),
        Case("custom", miss(target_modules=["lin0"]), "no transformers model", kind="custom-mlp", scale=0.3),
    ]


    def invalid(cases: Cases) -> None:
        config = {"peft_type": "MISS", "r": 2, "target_modules": ["q_proj"]}
        flat = directory(config, {f"{PFX}{Q}.miss_block": ramp(16)})
        cases.both("flat", flat, "malformed", "is no matrix", dtype="bf16")

**expected** is given the adapter's tensors by their canonical keys (no `.default`, shared ones without the second
prefix), adapter_config.json, and the base model's whole state dict, all as torch has them, in their stored dtype. It
pops the tensors that it knows; what it leaves is taken for new values of base tensors (biases, modules_to_save, saved
embeddings, token rows), under the rules that all methods have in common. It shares no code with PEFT or adapterpack.
It puts one result per base tensor, weight or bias alike, through `ctx`, and facts for expect.json into `ctx.facts`,
of which `encoding` must be one:

    ctx.add(name, dW)                      dW as W is stored, before any rounding to the base's dtype; not of W
    ctx.value(name, new)                   the whole new value
    ctx.rows(name, new, indices)           new rows
    ctx.base_dependent(name, W' - W)       what takes W to know; W is recorded too
    ctx.keep(name)                         records another base tensor that the formula reads: the tests then have its
                                           very bits, though torch's normal generator differs between CPU classes

each with `bound=` where one tensor's differs from its case's. ctx.logical(module) is (out, in); ctx.stored(module,
delta) transposes where the module is Conv1D; ctx.modules holds the base's modules by name (strides, groups); ctx.case
is the case; ctx.crossed names parameters of experts that lie as (experts, in, out).

**The base** of a case is `kind`: one of the tiny models of tests/oracle.py, with `over` for fields of its config;
one of tests/custom_models.py, "custom-mlp" and its like; or "custom" with layers of your own,
`over={"layers": [["lin", "Linear", {"in_features": 6, "out_features": 9}], ...]}`. All are drawn from fixed seeds and
recorded in expect.json, from which tests/test_formats.py makes them again.

**invalid** writes by hand, with numpy at most, and twice the same bytes. `cases.add(name, files, verb, error=,
message=, **options)` or `finding=`; `cases.both` for what `check` finds and `convert` refuses. Messages are parts of
what adapterpack says.

tests/test_formats.py walks formats/, so new cases are tested at once.
'''

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent
FORMATS = ROOT / "formats"
sys.path.insert(0, str(ROOT / "tests"))  # oracle and custom_models make the tiny models


def modules() -> list[ModuleType]:
    """The modules of this package that hold cases, by name."""
    found = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return [m for m in found if hasattr(m, "FORMAT")]
