"""LoHa (Hyeon-Woo et al. 2021, FedPara): the elementwise product of two low-rank products.

    delta W = alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)
    with `use_effective_conv2d`: each product is a Tucker form of t (r, r, k...), w_a (r, out), w_b (r, in)

It has exact LoRA factors of rank r^2: row by row the Kronecker products of w1_a and w2_a, column by column those of
w1_b and w2_b; of a Tucker form the core goes with w_b.
Reference: peft/tuners/loha/layer.py (`get_delta_weight`, `HadaWeight`, `HadaWeightCP`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Need, Outcome, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.methods import _findings, _to_lora
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import DenseChange, Maths
from adapterpack.methods._keys import KeyTable, require
from adapterpack.methods._lora_modules import Scaling
from adapterpack.methods._products import hadamard_pair, tucker, tucker_pair, unflattened
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array
    from adapterpack.methods._products import Pair

peft_type = "LOHA"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
_FACTORS = ("w1_a", "w1_b", "w2_a", "w2_b")
_CORES = ("t1", "t2")
keys = KeyTable("hada_", {name: f"hada_{name}" for name in (*_FACTORS, *_CORES)})


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "loha", "loha")


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    scaling = Scaling(a.config, "alpha")
    for module, params in a.modules.items():
        shape, rank = _shape(module, params)
        scale = scaling(module, rank)
        yield DenseChange(
            module=module,
            params=params,
            shape=unflattened(shape, f"{module}.weight", request.shapes),
            delta=partial(_delta, scale),
            factors=partial(_factors, scale),
        )


def _shape(module: str, params: Mapping[str, Param]) -> tuple[Shape, int]:
    """The delta weight's shape, (out, in * k...) or (out, in, k...), and the rank."""
    tucker = _CORES[0] in params or _CORES[1] in params
    names = _FACTORS + (_CORES if tucker else ())
    w1_a, w1_b, w2_a, w2_b, *cores = (t.shape for t in require(module, params, names))
    shapes = ", ".join(f"{n} {params[n].tensor.shape}" for n in names)
    if len(w1_a) != 2 or len(w1_b) != 2 or w1_a != w2_a or w1_b != w2_b or not w1_b[0]:
        raise InvalidFile(f"{module}: these shapes do not fit together: {shapes}")
    rank = w1_b[0]
    if tucker:
        # Here the factors lie the other way: w_a is (r, out).
        if cores[0] != cores[1] or len(cores[0]) != 4 or cores[0][:2] != (rank, rank) or w1_a[0] != rank:
            raise InvalidFile(f"{module}: these shapes do not fit together: {shapes}")
        return (w1_a[1], w1_b[1], *cores[0][2:]), rank
    if w1_a[1] != rank:
        raise InvalidFile(f"{module}: these shapes do not fit together: {shapes}")
    return (w1_a[0], w1_b[1]), rank


def _delta(scale: float, m: Maths) -> Array:
    factor = m.lift(m.torch.tensor(scale, dtype=m.torch.float32, device=m.xp.device))
    if "t1" in m:
        one, two = (tucker(m.torch, m[f"t{n}"], m[f"w{n}_a"], m[f"w{n}_b"], right_first=True) for n in (1, 2))
    else:
        one, two = (m[f"w{n}_a"] @ m[f"w{n}_b"] for n in (1, 2))
    return one * two * factor


def _pair(m: Maths, n: int) -> Pair:
    if f"t{n}" in m:
        return tucker_pair(m.torch, m[f"t{n}"], m[f"w{n}_a"], m[f"w{n}_b"])
    return m[f"w{n}_a"], m[f"w{n}_b"]


def _factors(scale: float, m: Maths) -> tuple[Array, Array, float]:
    return *hadamard_pair(_pair(m, 1), _pair(m, 2)), scale


def ranks(a: Adapter) -> Mapping[str, int]:
    return {module: _shape(module, params)[1] for module, params in a.modules.items()}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from _findings.of_factors(a, lambda module: _shape(module, a.modules[module])[1], 8)


def _fold(a: Adapter, request: Request) -> Outcome:
    dropped = "the two products of each module: training as LoHa cannot resume from the result"
    return _to_lora.fold(a, request, changes(a, request), dropped=dropped)


edges: Mapping[str, tuple[Edge, ...]] = {
    # The shapes tell how a convolution's kernel is shaped that its factors hold flattened.
    "loha": (Edge("lora", Grade.EQUIVALENT, _fold, needs=Need.SHAPES),)
}
