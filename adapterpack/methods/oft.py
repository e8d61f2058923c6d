"""OFT (Qiu et al. 2023, OFTv2 2025): the inputs of a weight are rotated, block by block.

    W' = W R^T,  R = diag(R_1, R_2, ...),  each R_i the Cayley transform of a skew-symmetric Q_i, or the first terms
    of its Neumann series (the default);    embeddings: W' = W R

Only the upper triangles of the Q_i are stored. `coft` bounds the norm of each Q_i, `block_share` has one for all.
Reference: peft/tuners/oft/layer.py (`OFTRotationModule.get_weight`, `merge`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Edge, Finding, Kind, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported, WrongBase
from adapterpack.methods import _orthogonal
from adapterpack.methods._changes import replacements, weight_shape
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, flag, floats, positive
from adapterpack.methods._without import no_ranks, no_recipes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "OFT"
keep_dtype: frozenset[str] = frozenset()
ranks = no_ranks
recipes = no_recipes
keys = KeyTable("oft_", {"R": "oft_R.weight", "embedding_R": "oft_embedding_R.weight"})
edges: Mapping[str, tuple[Edge, ...]] = {"oft": ()}
_MOST_TERMS = 1_000
_OLD = re.compile(r"\.oft_r(\.|$)")


def parse(c: Checkpoint) -> Adapter:
    if any(_OLD.search(key) for key in c.tensors) or "oft_block_size" not in c.config:
        raise Unsupported(
            f"{c.name} is OFT as PEFT wrote it before 0.16, with other parameters: no later version reads it",
            hint="merge it with PEFT 0.15",
        )
    return keys.parse(c, "oft", "oft")


@dataclass(frozen=True)
class _Options:
    """How the rotations come from the parameters.

    Attributes:
        terms: Of the Neumann series; None for the Cayley transform.
        bound: Largest norm of all Q_i together, `coft`'s eps; None without.
        shared: Is one rotation meant for all blocks?
    """

    terms: int | None
    bound: float | None
    shared: bool


def _options(config: Mapping[str, Any]) -> _Options:
    terms = bound = None
    if flag(config, "use_cayley_neumann", True):
        terms = positive(config, "num_cayley_neumann_terms", 5, _MOST_TERMS)
    if flag(config, "coft"):
        bound = config.get("eps", 6e-5)
        if type(bound) not in (int, float) or not math.isfinite(bound) or bound < 0:
            raise InvalidFile(f"eps in adapter_config.json is {bound!r:.60}; a number >= 0 is wanted")
    return _Options(terms, bound, flag(config, "block_share"))


def _other_series(config: Mapping[str, Any]) -> str | None:
    """Why the series is not the one that PEFT computes now; None if it is."""
    if not flag(config, "use_cayley_neumann", True):
        return None
    said = config.get("peft_version")
    numbers = re.match(r"(\d+)\.(\d+)", said) if isinstance(said, str) else None
    if numbers and (int(numbers[1]), int(numbers[2])) >= (0, 18):
        return None
    return (
        f"it was written by PEFT {said or 'before 0.18'}, whose Neumann series counts its last term twice:"
        " later versions compute another rotation from the same file"
    )


@dataclass(frozen=True)
class _Rotation:
    """The parameters of a module, checked.

    Attributes:
        blocks: How many rotations are stored.
        side: Inputs of one.
    """

    param: Param
    blocks: int
    side: int
    embedding: bool


def _rotation(module: str, params: Mapping[str, Param], shared: bool) -> _Rotation:
    if len(params) != 1:
        raise InvalidFile(f"{module} is adapted as an embedding and as another layer")
    ((name, param),) = params.items()
    floats(module, params, (name,))
    shape = param.tensor.shape
    side = _orthogonal.triangle_side(shape[1]) if len(shape) == 2 and shape[0] else None
    if side is None:
        raise InvalidFile(f"{param.key} has shape {shape}; (blocks, b * (b - 1) / 2) is wanted")
    if shared and shape[0] != 1:
        raise InvalidFile(
            f"block_share is true but {param.key} holds {shape[0]} blocks",
            hint="PEFT refuses to load it: correct block_share in adapter_config.json",
        )
    return _Rotation(param, shape[0], side, name == "embedding_R")


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    options = _options(a.config)
    if reason := _other_series(a.config):
        raise Unsupported(f"{a.source.name}: {reason}", hint="merge it with the PEFT that trained it, at most 0.17")
    for module, params in a.modules.items():
        r = _rotation(module, params, options.shared)
        yield TransformChange(
            module=module,
            params={"R": r.param},
            shape=_shape(a, module, r, options.shared, request.shapes),
            transform=partial(_rotated, options, r.side, r.embedding),
            layer=Kind.EMBEDDING if r.embedding else Kind.LINEAR,
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
        )


def _shape(a: Adapter, module: str, r: _Rotation, shared: bool, shapes: Shapes | None) -> Shape:
    into = None if shared else r.blocks * r.side
    if r.embedding:
        # (entries, dim) in the base; what is rotated is dim.
        shape = (0, into or 0) if shapes is None else shapes.shape(f"{module}.weight")
        logical = shape[::-1]
        fits = len(shape) == 2 and into in (None, shape[1])
    else:
        logical = shape = weight_shape(a, module, shapes, into=into, conv1d=False)
        fits = len(shape) in (2, 4)
    inputs = shape[1] if r.embedding else math.prod(shape[1:])
    if not fits or inputs % r.side:
        wanted = f"{r.blocks} x {r.side}" if into else f"a multiple of {r.side}"
        raise WrongBase(f"{module}.weight has shape {shape}, the adapter rotates {wanted} inputs")
    return logical


def _rotated(options: _Options, side: int, embedding: bool, m: Maths, w: Array) -> Array:
    flat = w.t() if embedding else w.reshape(w.shape[0], -1)
    q = _orthogonal.skew(m, m["R"], side)
    if options.bound is not None:
        q = _bounded(m, q, options.bound)
    r = _orthogonal.cayley(m, q) if options.terms is None else _orthogonal.neumann(m, q, options.terms)
    if options.shared:
        r = r.expand(flat.shape[1] // side, side, side)
    if embedding:
        if m.exact:
            # W R is W (R^T)^T.
            return _orthogonal.rotate(m, r.transpose(-2, -1), flat).t()
        return m.torch.mm(flat, m.torch.block_diag(*r)).t()
    return _orthogonal.rotate(m, r, flat).reshape(w.shape)


def _bounded(m: Maths, q: Array, bound: float) -> Array:
    """Each Q_i with a norm of at most bound / sqrt(blocks)."""
    most = bound / m.lift(m.torch.tensor(float(q.shape[0]), device=q.device)).sqrt()
    norm = m.torch.norm(q, dim=(1, 2), keepdim=True)
    return m.torch.where(norm <= most, q, most * (q / norm))


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    shared = _options(a.config).shared
    if reason := _other_series(a.config):
        yield Finding(
            "other-series", "peft_version", reason, "merge it with the PEFT that trained it, or train again"
        )
    for module, params in a.modules.items():
        try:
            r = _rotation(module, params, shared)
        except InvalidFile as e:
            yield Finding("other-shape", module, e.message, e.hint)
            continue
        wanted = a.config.get("oft_block_size")
        fits = type(wanted) is int and wanted > 0 and (shared or r.blocks * r.side % wanted == 0)
        if fits and wanted != r.side:
            yield Finding(
                "block-size",
                module,
                f"the config says blocks of {wanted}, the tensors have {r.side}: PEFT refuses to load it",
                f"set oft_block_size to {r.side}",
            )
