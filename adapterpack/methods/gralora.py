"""GraLoRA (Jung et al. 2025): W cut into k by k blocks, each with a low-rank product of its own.

    delta W [block j, n] = alpha / (r + hybrid_r) * B_j[rows n].T @ A_n[:, columns j].T,   r / k rows and columns
    A (k, in / k, r), B (k, r, out / k); with `hybrid_r` a plain B_general @ A_general over all of it besides

It has exact LoRA factors of rank k * r + hybrid_r.
Reference: peft/tuners/gralora/layer.py (`get_delta_weight`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Outcome, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.methods import _findings, _to_lora
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import DenseChange, Maths
from adapterpack.methods._keys import KeyTable, finite, flag, positive, require
from adapterpack.methods._lora_modules import rank_findings
from adapterpack.methods._products import on_diagonal
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "GRALORA"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
_GENERAL = ("A_general", "B_general")
keys = KeyTable(
    "gralora_",
    {"A": "gralora_A", "B": "gralora_B", **{name: f"gralora_{name}.weight" for name in _GENERAL}},
)


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "gralora", "gralora")


def _shape(module: str, params: Mapping[str, Param]) -> tuple[Shape, int, int, int]:
    """(out, in), the number of blocks in a row, r, and the rank of the general part: 0 without one."""
    hybrid = any(name in params for name in _GENERAL)
    a, b, *general = (t.shape for t in require(module, params, ("A", "B", *(_GENERAL if hybrid else ()))))
    fits = len(a) == len(b) == 3 and a[0] == b[0] > 0 and a[2] == b[1] > 0 and a[2] % a[0] == 0
    if fits:
        shape, h = (a[0] * b[2], a[0] * a[1]), general[0][0] if hybrid and general[0] else 0
        if not hybrid or (h > 0 and general == [(h, shape[1]), (shape[0], h)]):
            return shape, a[0], a[2], h
    found = ", ".join(f"{n} {p.tensor.shape}" for n, p in params.items())
    raise InvalidFile(
        f"{module}: these shapes do not fit together: {found}",
        hint="A (k, in / k, r), B (k, r, out / k) with r a multiple of k; A_general (h, in), B_general (out, h)",
    )


def _hybrid_rank(a: Adapter) -> int:
    value = a.config.get("hybrid_r", 0)
    return 0 if value in (0, None) and value is not False else positive(a.config, "hybrid_r", 0)


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    alpha, said = finite(a.config, "alpha", 64), _hybrid_rank(a)
    for module, params in a.modules.items():
        shape, _, r, hybrid = _shape(module, params)
        if hybrid != said:
            raise InvalidFile(
                f"hybrid_r is {said}, the general part of {module} has rank {hybrid}: the scale is not known",
                hint=f"set hybrid_r to {hybrid} in adapter_config.json if that is what it was trained with",
            )
        scale = alpha / (r + hybrid)
        yield DenseChange(
            module=module,
            params=params,
            shape=shape,
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            delta=partial(_delta, scale),
            factors=partial(_factors, scale),
        )


def _delta(scale: float, m: Maths) -> Array:
    a, b = m["A"], m["B"]
    k, width, r = a.shape
    # (in, block row, r): what a block row does not use of r is zero there, and takes part in PEFT's sums.
    spread = on_diagonal(a.reshape(k, width, k, r // k), at=3).reshape(k * width, k, r)
    delta = m.torch.einsum("ikr, kro -> iko", spread, b).reshape(k * width, -1).T
    if _GENERAL[0] in m:
        delta += m["B_general"] @ m["A_general"]
    return delta * scale


def _factors(scale: float, m: Maths) -> tuple[Array, Array, float]:
    a, b = m["A"], m["B"]
    k, width, r = a.shape
    # Ranks in the order (block row j, block column n, q): B_j is block j, and A_n lies in columns n of every row.
    left = m.torch.block_diag(*b.transpose(1, 2))
    parts = a.reshape(k, width, k, r // k).permute(0, 2, 3, 1)
    right = on_diagonal(parts, at=2).permute(1, 2, 3, 0, 4).reshape(k * r, k * width)
    if _GENERAL[0] in m:
        left = m.torch.cat([left, m["B_general"]], dim=1)
        right = m.torch.cat([right, m["A_general"]], dim=0)
    return left, right, scale


def ranks(a: Adapter) -> Mapping[str, int]:
    return {module: _shape(module, params)[2] for module, params in a.modules.items()}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from _findings.of_factors(a, lambda module: _shape(module, a.modules[module])[2], 32, pattern=False)
    blocks = _findings.sound(a, lambda module: _shape(module, a.modules[module])[1])
    yield from rank_findings(a.config, blocks, 2, field="gralora_k", pattern=False)


def _fold(a: Adapter, request: Request) -> Outcome:
    dropped = "the blocks: training as GraLoRA cannot resume from the result"
    return _to_lora.fold(a, request, changes(a, request), dropped=dropped)


edges: Mapping[str, tuple[Edge, ...]] = {"gralora": (Edge("lora", Grade.EQUIVALENT, _fold),)}
