"""(IA)^3 (Liu et al. 2022): a learned factor for each output of a layer, or for each input of a feedforward one.

    W' = l[:, None] * W,  b' = l * b;    feedforward: W' = W * l[None, :]

Whether l belongs to inputs is said by `feedforward_modules`, and by the shape of l where that tells.
Reference: peft/tuners/ia3/layer.py (`merge`, `_get_ia3_scaling_for_weight`) and model.py
(`_check_target_module_feedforward`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Edge, Finding, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported, WrongBase
from adapterpack.io.patterns import Pattern
from adapterpack.methods._changes import replacements, weight_shape
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, flag, floats
from adapterpack.methods._without import no_ranks, no_recipes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "IA3"
keep_dtype: frozenset[str] = frozenset()
ranks = no_ranks
recipes = no_recipes
keys = KeyTable("ia3_", {"l": "ia3_l"})
edges: Mapping[str, tuple[Edge, ...]] = {"ia3": ()}
_FIELD = "feedforward_modules"


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "ia3", "ia3")


class _Feedforward:
    """What the config says of a module: True, False, or None where it says nothing."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        said = config.get(_FIELD)
        self._pattern: Pattern | None = None
        self._endings: list[str] | None = None
        if isinstance(said, str):
            self._pattern = Pattern(said, template=r"(?:{})\Z", where=_FIELD)
        elif isinstance(said, list) and all(isinstance(s, str) for s in said):
            self._endings = said
        elif said is not None:
            raise InvalidFile(f"{_FIELD} in adapter_config.json is {said!r:.60}: names or a pattern are wanted")

    def __call__(self, module: str) -> bool | None:
        if self._pattern is not None:
            return self._pattern.matches(module)
        # Without a dot: "fc1" means `my_fc1` too.
        return None if self._endings is None else any(module.endswith(e) for e in self._endings)


@dataclass(frozen=True)
class _Vector:
    """The vector of a module.

    Attributes:
        size: Its length.
        inputs: Does it belong to the inputs?
        kernel: Dimensions of a convolution's kernel; 0 of a linear layer.
    """

    size: int
    inputs: bool
    kernel: int


def _vector(module: str, params: Mapping[str, Param], feedforward: _Feedforward) -> _Vector:
    (tensor,) = floats(module, params, ("l",))
    shape, said = tensor.shape, feedforward(module)
    if len(shape) == 2 and 1 in shape and min(shape):
        told = None if shape == (1, 1) else shape[0] == 1
        if told is not None and said is not None and told != said:
            raise InvalidFile(
                f"ia3_l of {module} has shape {shape}, {_FIELD} makes it"
                f" {'one of inputs, (1, in)' if said else 'one of outputs, (out, 1)'}",
                hint=f"PEFT refuses to load it: correct {_FIELD} in adapter_config.json",
            )
        inputs = said if told is None else told
    elif len(shape) in (4, 5) and shape[0] == 1 and shape[1] and all(k == 1 for k in shape[2:]):
        inputs = said
    else:
        raise InvalidFile(f"ia3_l of {module} has shape {shape}: (out, 1), (1, in) or (1, channels, 1...) is wanted")
    if inputs is None:
        raise Unsupported(
            f"adapter_config.json has no {_FIELD}: nothing tells whether ia3_l of {module} is of inputs or outputs",
            hint=f"say so in {_FIELD}",
        )
    return _Vector(max(shape), inputs, len(shape) - 2)


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    feedforward = _Feedforward(a.config)
    for module, params in a.modules.items():
        v = _vector(module, params, feedforward)
        yield TransformChange(
            module=module,
            params=params,
            shape=_shape(a, module, v, request.shapes),
            transform=partial(_scaled, v.inputs),
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
        )
        if not v.inputs and request.shapes is not None and request.shapes.has(f"{module}.bias"):
            yield TransformChange(module=module, part="bias", params=params, shape=(v.size,), transform=_scaled_bias)


def _shape(a: Adapter, module: str, v: _Vector, shapes: Shapes | None) -> Shape:
    if not v.kernel:
        out, into = (None, v.size) if v.inputs else (v.size, None)
        return weight_shape(a, module, shapes, out=out, into=into)
    if shapes is None:
        return (0,) * (2 + v.kernel)
    shape = shapes.shape(f"{module}.weight")
    if len(shape) != 2 + v.kernel or not all(shape):
        fits = False
    elif v.inputs:
        # The weight holds the inputs of one group; outputs lie group after group.
        fits = v.size % shape[1] == 0 and shape[0] % (v.size // shape[1]) == 0
    else:
        fits = shape[0] == v.size
    if not fits:
        side = "inputs" if v.inputs else "outputs"
        raise WrongBase(f"{module}.weight has shape {shape}, the adapter scales {v.size} {side} of a convolution")
    return shape


def _scaled(inputs: bool, m: Maths, w: Array) -> Array:
    scale = m["l"]
    if w.ndim > 2 and not inputs:
        scale = scale.transpose(0, 1)
    elif w.ndim > 2 and scale.shape[1] != w.shape[1]:
        groups = scale.shape[1] // w.shape[1]
        ones = scale.shape[2:]
        scale = scale.reshape(groups, 1, w.shape[1], *ones).expand(
            -1, w.shape[0] // groups, *(-1 for _ in w.shape[1:])
        )
        scale = scale.reshape(w.shape[0], w.shape[1], *ones)
    return w * scale


def _scaled_bias(m: Maths, b: Array) -> Array:
    return b * m["l"].reshape(b.shape)


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    feedforward = _Feedforward(a.config)
    for module, params in a.modules.items():
        try:
            _vector(module, params, feedforward)
        except (InvalidFile, Unsupported) as e:
            yield Finding("other-shape", module, e.message, e.hint)
