"""BOFT (Liu et al. 2024): the inputs of a weight are rotated by a product of block butterflies, its outputs scaled.

    W' = s[:, None] * (W R^T),  R = B_k ... B_1 B_0,  B_i = P_i diag(R_i1, R_i2, ...) P_i^T

with permutations P_i of butterflies and each R_ij the Cayley transform of (A - A^T) / 2. PEFT has more than one
factor only where its CUDA extension is at hand; the tensors say how many there are.
Reference: peft/tuners/boft/layer.py (`get_delta_weight`, `block_butterfly_perm`, `merge`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Edge, Finding, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.methods import _orthogonal
from adapterpack.methods._changes import replacements, weight_shape
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, flag, floats
from adapterpack.methods._without import no_ranks, no_recipes

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "BOFT"
keep_dtype: frozenset[str] = frozenset()
ranks = no_ranks
recipes = no_recipes
keys = KeyTable("boft_", {"R": "boft_R", "s": "boft_s"})
edges: Mapping[str, tuple[Edge, ...]] = {"boft": ()}


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "boft", "boft")


def _sizes(module: str, params: Mapping[str, Param]) -> tuple[int, int]:
    """Outputs and inputs that the parameters of a module are for; of a convolution the inputs with their kernel."""
    r, s = (t.shape for t in floats(module, params, ("R", "s")))
    square = len(r) == 4 and r[2] == r[3] and min(r)
    # (out, 1); of a convolution (1, out).
    if not square or len(s) != 2 or 1 not in s or not min(s):
        raise InvalidFile(f"{module}: boft_R {r} and boft_s {s} are not (factors, blocks, b, b) and (out, 1)")
    factors, blocks, side, _ = r
    if factors > 1 and (side % 2 or blocks % (1 << min(factors - 1, 40))):
        raise InvalidFile(f"{module}: {blocks} blocks of {side} make no butterfly of {factors} factors")
    return max(s), blocks * side


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    for module, params in a.modules.items():
        out, into = _sizes(module, params)
        shape = weight_shape(a, module, request.shapes, out=out, into=into, conv1d=False)
        scale = params["s"].tensor.shape
        if len(shape) not in (2, 4) or (request.shapes and scale != ((out, 1) if len(shape) == 2 else (1, out))):
            raise InvalidFile(f"{module}: boft_s {scale} is not for a weight {shape}")
        yield TransformChange(
            module=module,
            params=params,
            shape=shape,
            transform=_rotated,
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
        )


def _rotated(m: Maths, w: Array) -> Array:
    values = m["R"]
    factors, blocks, side, _ = values.shape
    flat = values.view(factors * blocks, side, side)
    rotations = _orthogonal.cayley(m, 0.5 * (flat - flat.transpose(1, 2))).view(values.shape)
    return (_orthogonal.butterfly(m, rotations, w.reshape(w.shape[0], -1)) * m["s"].reshape(-1, 1)).reshape(w.shape)


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    for module, params in a.modules.items():
        try:
            _sizes(module, params)
        except InvalidFile as e:
            yield Finding("half-pair", module, e.message, "train or save the adapter again")
            continue
        factors = params["R"].tensor.shape[0]
        if factors > 1:
            yield Finding(
                "butterfly",
                module,
                f"it has {factors} butterfly factors: PEFT loads it only where its CUDA extension was built",
                "merge it here, or train with boft_n_butterfly_factor 1",
                warning=True,
            )
