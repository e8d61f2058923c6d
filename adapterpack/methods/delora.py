"""DeLoRA (Bini et al. 2025): low-rank terms of unit norm, their strength learned apart from their direction.

    delta W = B @ diag(lambda / r / (||A_i|| * ||B_i||)) @ A * w_norm,   norms of rows and of columns, >= 1e-4

w_norm is what the norms of W's columns were when training began; it is saved.
Reference: peft/tuners/delora/layer.py (`_compute_delta`, `merge`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Outcome, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.methods import _findings, _to_lora
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import DenseChange, Maths
from adapterpack.methods._keys import KeyTable, require
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "DELORA"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
_NAMES = ("A", "B", "lambda", "w_norm")
keys = KeyTable("delora_", {name: f"delora_{name}" for name in _NAMES})
_LEAST = 1e-4


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "delora", "delora")


def _shape(module: str, params: Mapping[str, Param]) -> tuple[Shape, int]:
    """(out, in) and the rank."""
    a, b, strength, norm = (t.shape for t in require(module, params, _NAMES))
    fits = len(a) == len(b) == 2 and a[0] == b[1] > 0 and strength == (1,) and norm == a[1:]
    if not fits:
        raise InvalidFile(
            f"{module}: A {a}, B {b}, lambda {strength} and w_norm {norm} are not (r, in), (out, r), (1,) and (in,)"
        )
    return (b[0], a[1]), a[0]


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    for module, params in a.modules.items():
        yield DenseChange(
            module=module,
            params=params,
            shape=_shape(module, params)[0],
            delta=_delta,
            factors=_factors,
            # `delta_weight.to(base_layer.weight.dtype)`, then it is added.
            round_delta=True,
        )


def _strengths(m: Maths) -> Array:
    """(r,)."""
    a, b = m["A"], m["B"]
    norms = a.norm(dim=1).clamp(min=_LEAST) * b.norm(dim=0).clamp(min=_LEAST)
    return m["lambda"] / a.shape[0] / norms


def _delta(m: Maths) -> Array:
    return m["B"] @ m.torch.diag_embed(_strengths(m)) @ m["A"] * m["w_norm"][None, :]


def _factors(m: Maths) -> tuple[Array, Array, float]:
    return m["B"] * _strengths(m), m["A"] * m["w_norm"][None, :], 1.0


def ranks(a: Adapter) -> Mapping[str, int]:
    return {module: _shape(module, params)[1] for module, params in a.modules.items()}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from _findings.of_factors(a, lambda module: _shape(module, a.modules[module])[1], 8)


def _fold(a: Adapter, request: Request) -> Outcome:
    dropped = "strength and direction apart: training as DeLoRA cannot resume from the result"
    return _to_lora.fold(a, request, changes(a, request), dropped=dropped)


edges: Mapping[str, tuple[Edge, ...]] = {"delora": (Edge("lora", Grade.EQUIVALENT, _fold),)}
