"""PEANuT (Zhong et al. 2024, arXiv 2410.01870): a small network that takes the weights and gives their change.

    H = f(W^T A^T);  H_i = f(H_(i-1) E_i^T) for each encoder;  then for each decoder, the last residual first:
    H = f(H D_i^T) + residual;   delta W = scaling * (H B^T)^T

Every row of H is one input feature. Reference: peft/tuners/peanut/layer.py (`_compute_delta_weight`, `merge`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Edge, Finding, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, floats
from adapterpack.methods._of_base import linear_shape, number, pair_findings
from adapterpack.methods._without import no_recipes

if TYPE_CHECKING:
    from adapterpack.backend import Array

    Activation = Callable[[Any, Array], Array]

peft_type = "PEANUT"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
_SIDES = ("encoders", "decoders")
keys = KeyTable(
    "peanut_",
    {"A": "peanut_A.weight", "B": "peanut_B.weight", **{f"{s}.*": f"peanut_{s}.*.weight" for s in _SIDES}},
)
_MOST_LAYERS = 1_000


def _gelu_tanh(torch: Any, x: Array) -> Array:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": lambda t, x: t.nn.functional.gelu(x),
    "gelu_10": lambda t, x: t.clip(t.nn.functional.gelu(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": lambda t, x: 0.5 * x * (1.0 + t.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "gelu_new": _gelu_tanh,
    "gelu_python": lambda t, x: x * 0.5 * (1.0 + t.erf(x / math.sqrt(2.0))),
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": lambda t, x: t.nn.functional.gelu(x, approximate="tanh"),
    "hardswish": lambda t, x: t.nn.functional.hardswish(x),
    "laplace": lambda t, x: 0.5 * (1.0 + t.erf((x - 0.707107).div(0.282095 * math.sqrt(2.0)))),
    "leaky_relu": lambda t, x: t.nn.functional.leaky_relu(x),
    "linear": lambda t, x: x,
    "mish": lambda t, x: t.nn.functional.mish(x),
    # Its slope is a parameter, which PEFT makes anew at every use.
    "prelu": lambda t, x: t.nn.functional.leaky_relu(x, 0.25),
    "quick_gelu": lambda t, x: x * t.sigmoid(1.702 * x),
    "relu": lambda t, x: t.relu(x),
    "relu2": lambda t, x: t.square(t.relu(x)),
    "relu6": lambda t, x: t.nn.functional.relu6(x),
    "sigmoid": lambda t, x: t.sigmoid(x),
    "silu": lambda t, x: t.nn.functional.silu(x),
    "sqrtsoftplus": lambda t, x: t.nn.functional.softplus(x).sqrt(),
    "swish": lambda t, x: t.nn.functional.silu(x),
    "tanh": lambda t, x: t.tanh(x),
}
"""transformers/activations.py, `ACT2CLS`, by the operations that each is made of."""


@dataclass(frozen=True)
class _Settings:
    """The config's word on the network."""

    depth: int
    act_fn: str
    scaling: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Settings:
        """Raises InvalidFile for what is no number, Unsupported for an activation that we do not have."""
        depth = config.get("depth", 0)
        if type(depth) is not int or not 0 <= depth <= _MOST_LAYERS:
            raise InvalidFile(f"depth in adapter_config.json is {depth!r:.60}; a whole number is wanted")
        act_fn = config.get("act_fn", "relu")
        if act_fn not in _ACTIVATIONS:
            raise Unsupported(
                f"act_fn in adapter_config.json is {act_fn!r:.60}; {', '.join(_ACTIVATIONS)} are known",
                hint="merge it with PEFT",
            )
        return cls(depth, act_fn, number(config, "scaling", 1.0))

    @property
    def names(self) -> tuple[str, ...]:
        return ("A", "B", *(f"{side}.{n}" for side in _SIDES for n in range(self.depth)))


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "peanut", "peanut")


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    s = _Settings.of(a.config)
    for module, params in a.modules.items():
        out, _ = _sizes(module, params, s)
        yield TransformChange(
            module=module,
            params=params,
            shape=linear_shape(a, module, request, out=out),
            transform=partial(_changed, s),
            settings={"scaling": s.scaling, "act_fn": list(_ACTIVATIONS).index(s.act_fn)},
        )


def _sizes(module: str, params: Mapping[str, Param], s: _Settings) -> tuple[int, int]:
    """out and r."""
    first, last, *inner = (t.shape for t in floats(module, params, s.names))
    more = sorted(params.keys() - set(s.names))
    if more:
        raise InvalidFile(
            f"{params[more[0]].key} is there, and depth is {s.depth}: PEFT would ignore it",
            hint="set depth in adapter_config.json to the number of encoders",
        )
    if len(first) != 2 or last != first[::-1] or any(shape != (first[0], first[0]) for shape in inner):
        shapes = ", ".join(f"{n} {params[n].tensor.shape}" for n in s.names[:6])
        raise InvalidFile(f"{module}: these shapes do not fit together: {shapes}")
    return first[1], first[0]


def _changed(s: _Settings, m: Maths, w: Array) -> Array:
    act, linear = partial(_ACTIVATIONS[s.act_fn], m.torch), m.torch.nn.functional.linear
    h = act(w.T @ m["A"].T)
    residuals = []
    for n in range(s.depth):
        residuals.append(h)
        h = act(linear(h, m[f"encoders.{n}"]))
    for n in range(s.depth):
        h = act(linear(h, m[f"decoders.{n}"])) + residuals[-1 - n]
    delta = (linear(h, m["B"]) * s.scaling).T
    return w + m.lift(m.rounded(delta))


def ranks(a: Adapter) -> Mapping[str, int]:
    s = _Settings.of(a.config)
    return {module: _sizes(module, params, s)[1] for module, params in a.modules.items()}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    s = _Settings.of(a.config)
    yield from pair_findings(a, lambda module, params: _sizes(module, params, s)[1], 32)


edges: Mapping[str, tuple[Edge, ...]] = {"peanut": ()}
