"""HRA (Yuan et al. 2024): the inputs of a weight are reflected, one vector after the other.

    W' = W H_1 H_2 ... H_r,  H_i = I - 2 u_i u_i^T, u_i brought to length 1
    with `apply_GS` the u_i are made orthonormal first, and W' = W (I - 2 U U^T)

Reference: peft/tuners/hra/layer.py (`get_delta_weight`, `merge`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack import limits
from adapterpack.adapter import Adapter, Change, Edge, Finding, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, WrongBase
from adapterpack.methods import _orthogonal
from adapterpack.methods._changes import replacements, weight_shape
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, flag, floats
from adapterpack.methods._lora_modules import rank_findings
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "HRA"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
keys = KeyTable("hra_", {"u": "hra_u"})
edges: Mapping[str, tuple[Edge, ...]] = {"hra": ()}


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "hra", "hra")


def _vectors(module: str, params: Mapping[str, Param], config: Mapping[str, Any]) -> Shape:
    """(in, r)."""
    (u,) = floats(module, params, ("u",))
    if len(u.shape) != 2 or not min(u.shape) or u.shape[1] > limits.LORA_RANK:
        raise InvalidFile(f"hra_u of {module} has shape {u.shape}; (in, r) is wanted")
    if u.shape[1] > u.shape[0] and flag(config, "apply_GS"):
        raise InvalidFile(
            f"hra_u of {module}: {u.shape[1]} vectors of length {u.shape[0]} cannot be made orthonormal"
        )
    return u.shape


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    reflect = _orthogonal.reflect_span if flag(a.config, "apply_GS") else _orthogonal.reflect
    for module, params in a.modules.items():
        into, _ = _vectors(module, params, a.config)
        shape = weight_shape(a, module, request.shapes, into=into, conv1d=False)
        if len(shape) not in (2, 4):
            raise WrongBase(
                f"{module}.weight has shape {shape}: HRA is for linear layers and two-dimensional kernels"
            )
        yield TransformChange(module=module, params=params, shape=shape, transform=partial(_reflected, reflect))


def _reflected(reflect: Callable[[Maths, Array, Array], Array], m: Maths, w: Array) -> Array:
    return reflect(m, m["u"], w.reshape(w.shape[0], -1)).reshape(w.shape)


def ranks(a: Adapter) -> Mapping[str, int]:
    return {module: _vectors(module, params, a.config)[1] for module, params in a.modules.items()}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    found: dict[str, int] = {}
    for module, params in a.modules.items():
        try:
            found[module] = _vectors(module, params, a.config)[1]
        except InvalidFile as e:
            yield Finding("other-shape", module, e.message, "train or save the adapter again")
    yield from rank_findings(a.config, found, 8, pattern=False)
