"""LoKr (Yeh et al. 2023, LyCORIS): the Kronecker product of two small matrices, each whole or a low-rank product.

    delta W = alpha / r * kron(w1, w2),   w1 or w1_a @ w1_b,   w2 or w2_a @ w2_b
    with `use_effective_conv2d`: w2 is a Tucker form of t2 (r, r, k...), w2_a (r, out), w2_b (r, in)

It has exact LoRA factors, the Kronecker products of those of w1 and w2.
Reference: peft/tuners/lokr/layer.py (`get_delta_weight`, `make_kron`, `make_weight_cp`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Need, Outcome, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.methods import _findings, _to_lora
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import DenseChange, Maths
from adapterpack.methods._keys import KeyTable, positive, require
from adapterpack.methods._lora_modules import Scaling, first_match, pattern_field
from adapterpack.methods._products import (
    kronecker,
    kronecker_pair,
    least_pair,
    tucker,
    tucker_pair,
    unflattened,
    whole_pair,
)
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array
    from adapterpack.methods._products import Pair

peft_type = "LOKR"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
_MOST = 1 << 40
"""r may be absurdly large: that is how users ask for whole matrices."""
keys = KeyTable("lokr_", {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")})


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "lokr", "lokr")


@dataclass(frozen=True)
class _Parts:
    """The two matrices of a module.

    Attributes:
        one: (a, c) of w1.
        two: (b, d) of w2; (b, d, k...) of a convolution, whose kernel may be flattened into d.
        rank: r, where a tensor has it.
    """

    one: Shape
    two: Shape
    rank: int | None

    @property
    def shape(self) -> Shape:
        """Of the delta weight."""
        return self.one[0] * self.two[0], self.one[1] * self.two[1], *self.two[2:]


def _parts(module: str, params: Mapping[str, Param]) -> _Parts:
    one, rank_one = _matrix(module, params, "w1")
    two, rank_two = _matrix(module, params, "w2")
    if len(one) != 2 or len({rank_one, rank_two} - {None}) > 1:
        shapes = ", ".join(f"{n} {p.tensor.shape}" for n, p in params.items())
        raise InvalidFile(f"{module}: these shapes do not fit together: {shapes}")
    return _Parts(one, two, rank_one or rank_two)


def _matrix(module: str, params: Mapping[str, Param], name: str) -> tuple[Shape, int | None]:
    """The shape of w1 or w2, and its rank if it is a product."""
    product = tuple(n for n in (f"{name}_a", f"{name}_b", f"t{name[1:]}") if n in params)
    if not product or name in params:
        if product:
            raise InvalidFile(f"{module} holds {name} whole and as {', '.join(product)}: one is wanted")
        shape = require(module, params, (name,))[0].shape
        if not 2 <= len(shape) <= 4:
            raise InvalidFile(f"{module}: {name} has shape {shape}, which is no matrix and no kernel")
        return shape, None
    core = f"t{name[1:]}"
    names = (f"{name}_a", f"{name}_b", *((core,) if core in params else ()))
    a, b, *t = (tensor.shape for tensor in require(module, params, names))
    wrong = len(a) != 2 or len(b) != 2 or not b[0]
    if not wrong and t:
        # Here the first factor lies the other way: (r, out).
        if len(t[0]) == 4 and t[0][:2] == (b[0], b[0]) and a[0] == b[0]:
            return (a[1], b[1], *t[0][2:]), b[0]
    elif not wrong and a[1] == b[0]:
        return (a[0], b[1]), b[0]
    shapes = ", ".join(f"{n} {params[n].tensor.shape}" for n in names)
    raise InvalidFile(f"{module}: these shapes do not fit together: {shapes}")


class _Ranks:
    """r of each module, by which alpha is divided: of its tensors, or where both matrices are whole of the config."""

    def __init__(self, a: Adapter) -> None:
        self._patterns, self._values = pattern_field(a.config, "rank_pattern")
        self._common = positive(a.config, "r", 8, most=_MOST)

    def said(self, module: str) -> int:
        found = first_match(self._patterns, self._values, module)
        if found is None:
            return self._common
        return positive({"rank_pattern": found}, "rank_pattern", 8, most=_MOST)

    def of(self, module: str, parts: _Parts) -> int:
        return parts.rank or self.said(module)


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    scaling, ranks_of = Scaling(a.config, "alpha"), _Ranks(a)
    for module, params in a.modules.items():
        parts = _parts(module, params)
        scale = scaling(module, ranks_of.of(module, parts))
        yield DenseChange(
            module=module,
            params=params,
            shape=unflattened(parts.shape, f"{module}.weight", request.shapes),
            delta=partial(_delta, scale),
            # PEFT spreads a whole kernel of one dimension in another order: no small factors there.
            factors=None if len(parts.two) == 3 else partial(_factors, scale),
        )


def _delta(scale: float, m: Maths) -> Array:
    one = m["w1"] if "w1" in m else m["w1_a"] @ m["w1_b"]
    if "w2" in m:
        two = m["w2"]
    elif "t2" in m:
        two = tucker(m.torch, m["t2"], m["w2_a"], m["w2_b"], right_first=False)
    else:
        two = m["w2_a"] @ m["w2_b"]
    if two.ndim == 4:
        one = one[:, :, None, None]
    # Three dimensions by two: `kron` puts a 1 before the two, as it does in PEFT; the result is reshaped.
    whole = kronecker(m.torch, one, two) * scale
    return whole.reshape(one.shape[0] * two.shape[0], -1)


def _factors(scale: float, m: Maths) -> tuple[Array, Array, float]:
    pairs = [_pair(m, "w1"), _pair(m, "w2")]
    return *kronecker_pair(m.torch, *pairs), scale


def _pair(m: Maths, name: str) -> Pair:
    if name in m:
        return whole_pair(m.torch, m[name].flatten(1))
    if (core := f"t{name[1:]}") in m:
        pair = tucker_pair(m.torch, m[core], m[f"{name}_a"], m[f"{name}_b"])
    else:
        pair = m[f"{name}_a"], m[f"{name}_b"]
    return least_pair(m.torch, pair)


def ranks(a: Adapter) -> Mapping[str, int]:
    ranks_of = _Ranks(a)
    return {module: ranks_of.of(module, _parts(module, params)) for module, params in a.modules.items()}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    ranks_of = _Ranks(a)
    yield from _findings.of_factors(
        a, lambda module: ranks_of.of(module, _parts(module, a.modules[module])), 8, most=_MOST
    )


def _fold(a: Adapter, request: Request) -> Outcome:
    dropped = "the two matrices of each module: training as LoKr cannot resume from the result"
    return _to_lora.fold(a, request, changes(a, request), dropped=dropped)


edges: Mapping[str, tuple[Edge, ...]] = {
    # The shapes tell how a convolution's kernel is shaped that its factors hold flattened.
    "lokr": (Edge("lora", Grade.EQUIVALENT, _fold, needs=Need.SHAPES),)
}
