"""HiRA (Huang et al. 2025): a low-rank product scales the weight, element by element.

    W' = W + W * (B @ A), of embeddings W + W * (B @ A)^T; of a convolution the product of its factors as LoRA's

There is no alpha. PEFT rounds the product, W times it, and the sum, each to the dtype of the base.
Reference: peft/tuners/hira/layer.py (`_merge`, `get_delta_weight`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterpack import limits
from adapterpack.adapter import Adapter, Change, Edge, Finding, Kind, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.methods import _findings
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, flag, floats
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "HIRA"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
_PAIR, _EMBEDDING = ("A", "B"), ("embedding_A", "embedding_B")
keys = KeyTable("hira_", {name: f"hira_{name}" for name in (*_PAIR, *_EMBEDDING)})
edges: Mapping[str, tuple[Edge, ...]] = {"hira": ()}


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "hira", "hira")


@dataclass(frozen=True)
class _Factors:
    """A module's factors, checked: (r, in, k...) and (out, r, 1...)."""

    params: Mapping[str, Param]
    shape: Shape
    rank: int
    embedding: bool


def _factors(module: str, params: Mapping[str, Param]) -> _Factors:
    embedding = any(name in params for name in _EMBEDDING)
    if embedding and any(name in params for name in _PAIR):
        raise InvalidFile(f"{module} is adapted as an embedding and as another layer")
    names = _EMBEDDING if embedding else _PAIR
    a, b = (t.shape for t in floats(module, params, names))
    fits = len(a) == len(b) == 2 or (2 < len(a) < 6 and len(a) == len(b) and not embedding)
    if not fits or not min(a) or not min(b) or a[0] != b[1] or any(k != 1 for k in b[2:]) or a[0] > limits.LORA_RANK:
        raise InvalidFile(f"{module}: A {a} and B {b} are not (r, in) and (out, r)")
    return _Factors(
        params={plain: params[name] for plain, name in zip(_PAIR, names, strict=True)},
        shape=(b[0], *a[1:]),
        rank=a[0],
        embedding=embedding,
    )


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    for module, params in a.modules.items():
        f = _factors(module, params)
        yield TransformChange(
            module=module,
            params=f.params,
            shape=f.shape,
            transform=_scaled,
            layer=Kind.EMBEDDING if f.embedding else Kind.LINEAR,
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
        )


def _scaled(m: Maths, w: Array) -> Array:
    # PEFT adds it to zeros first, which turns -0 into 0.
    product = m.lift(m.rounded(_product(m) + 0.0))
    return w + m.lift(m.rounded(w * product))


def _product(m: Maths) -> Array:
    """(out, in), or (out, in, k...) by PEFT's way for each kernel."""
    a, b = m["A"], m["B"]
    kernel = a.shape[2:]
    if not kernel:
        return b @ a
    if kernel == (1, 1) or m.exact:
        return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])
    functional = m.torch.nn.functional
    convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 1]
    return convolution(a.transpose(0, 1), b).transpose(0, 1)


def ranks(a: Adapter) -> Mapping[str, int]:
    return {module: _factors(module, params).rank for module, params in a.modules.items()}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    # `rank_pattern` is a field of the config that PEFT 0.21 looks up and does not use.
    yield from _findings.of_factors(a, lambda module: _factors(module, a.modules[module]).rank, 32, pattern=False)
