"""Supertuning (arXiv 2607.09287): single weights are trained, those of the largest magnitude; with LoRA if wished.

    W' = W, values added at flat indices of (out, in), then alpha / r * B @ A ("Supra"), rounded to W's dtype each

Encodings: `indices` holds them; `magnitude` leaves them to the base: the k largest magnitudes of W, or smallest, in
the order in which torch's `topk` gives them.
Reference: peft/tuners/supertuning/layer.py (`merge`, `update_layer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Need, Outcome, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, WrongBase
from adapterpack.methods import _findings
from adapterpack.methods._changes import logical_shape, replacements
from adapterpack.methods._formula import DenseChange, Maths, TransformChange
from adapterpack.methods._keys import KeyTable, finite, flag, require
from adapterpack.methods._lora_modules import rank_findings
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import BF16, F16, F32, Shape, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterpack.backend import Array, Backend

    _Choose = Callable[[Maths, int], Array]
    """Flat indices into a weight of that many elements, int64."""

peft_type = "SUPERTUNING"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
INDICES, MAGNITUDE = "indices", "magnitude"
_LOW_RANK = ("A", "B")
_BASE = "base"
_SET_IT = "set it to true in adapter_config.json: as it stands PEFT ignores the indices and chooses others"
keys = KeyTable(
    "supertuning_",
    {
        "indices": "supertuning_indices",
        "values": "supertuning_values",
        **{name: f"supertuning_lora_{name}.weight" for name in _LOW_RANK},
    },
)


def parse(c: Checkpoint) -> Adapter:
    a = keys.parse(c, "supertuning", INDICES)
    stored = any("indices" in params for params in a.modules.values())
    # Told that they are there where they are not, PEFT chooses them too, after a warning.
    return a if stored else replace(a, encoding=MAGNITUDE)


def _ignored(a: Adapter) -> bool:
    """Does PEFT ignore the indices of the file and choose its own?"""
    return a.encoding == INDICES and not flag(a.config, "save_precomputed_indices", True)


@dataclass(frozen=True)
class _Parts:
    """What a module holds.

    Attributes:
        count: Of values.
        out, into, rank: Of the low-rank part; None without one.
    """

    count: int
    out: int | None = None
    into: int | None = None
    rank: int | None = None


def _parts(a: Adapter, module: str) -> _Parts:
    params = a.modules[module]
    hybrid = a.config.get("r") is not None
    stored = tuple(n for n in _LOW_RANK if n in params)
    if stored and not hybrid:
        raise InvalidFile(
            f"{module} has a low-rank part, and r in adapter_config.json is null: PEFT ignores that part",
            hint="set r and lora_alpha to what it was trained with",
        )
    names = ("values", *(("indices",) if a.encoding == INDICES else ()), *(_LOW_RANK if hybrid else ()))
    tensors = dict(zip(names, require(module, params, names), strict=True))
    shapes = {n: t.shape for n, t in tensors.items()}
    if len(shapes["values"]) != 1 or not shapes["values"][0]:
        raise InvalidFile(f"{module}: values {shapes['values']} are no vector")
    if a.encoding == INDICES and (shapes["indices"] != shapes["values"] or tensors["indices"].dtype.kind != "int"):
        raise InvalidFile(
            f"{module}: indices {shapes['indices']} of {tensors['indices'].dtype} are no whole numbers, one for each"
            f" of {shapes['values'][0]} values"
        )
    if not hybrid:
        return _Parts(shapes["values"][0])
    low, high = (shapes[n] for n in _LOW_RANK)
    if len(low) != 2 or len(high) != 2 or low[0] != high[1] or not low[0]:
        raise InvalidFile(f"{module}: A {low} and B {high} are not (r, in) and (out, r)")
    return _Parts(shapes["values"][0], high[0], low[1], low[0])


def _scale(a: Adapter, module: str) -> float:
    """alpha / r, as PEFT divides; 0 without a low-rank part."""
    rank = _parts(a, module).rank
    return 0.0 if rank is None else finite(a.config, "lora_alpha", 2.0 * rank) / rank


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    if _ignored(a):
        raise InvalidFile("save_precomputed_indices is false, but the file holds indices", hint=_SET_IT)
    for module, params in a.modules.items():
        parts, scale = _parts(a, module), _scale(a, module)
        choose, given = _chooser(a, module, parts, request.shapes)
        if request.shapes is None:
            # Nothing says how large W is: two adapters can be compared by their parameters.
            yield TransformChange(
                module=module, params=params, shape=(parts.count,), transform=partial(_added, choose, scale)
            )
            continue
        shape = _logical(a, module, parts, request.shapes)
        yield DenseChange(
            module=module,
            params=params,
            shape=shape,
            given=given,
            delta=partial(_delta, choose, scale, shape),
            added=partial(_added, choose, scale),
        )


def _logical(a: Adapter, module: str, parts: _Parts, shapes: Shapes) -> Shape:
    """(out, in) of the module. Raises WrongBase if the values are more than that, or the layer is another."""
    shape = logical_shape(a, module, shapes, out=parts.out, into=parts.into)
    if len(shape) != 2 or shapes.conv1d(module):
        raise WrongBase(f"{module} is no linear layer in the base: PEFT's Supertuning knows no others")
    if parts.count > shape[0] * shape[1]:
        raise WrongBase(f"{module} has {parts.count} values, the base's weight {shape[0] * shape[1]}")
    return shape


def _chooser(a: Adapter, module: str, parts: _Parts, shapes: Shapes | None) -> tuple[_Choose, Mapping[str, Tensor]]:
    """How the indices are found, and what that takes of the base."""
    if a.encoding == INDICES:
        return partial(_stored, module), {}
    largest = flag(a.config, "select_top", True)
    given: dict[str, Tensor] = {}
    if shapes is not None:
        tensor = shapes.tensor(f"{module}.weight")
        if tensor.dtype not in (F32, BF16, F16):
            raise WrongBase(f"{module} is {tensor.dtype} in the base: its magnitudes are not those of training")
        given = {_BASE: tensor}
    return partial(_largest, parts.count, largest, given.get(_BASE)), given


def _stored(module: str, m: Maths, size: int) -> Array:
    indices = m["indices"].long()
    if int(indices.min()) < 0 or int(indices.max()) >= size:
        raise InvalidFile(f"{module} has indices beyond its weight of {size:,} elements")
    return indices


def _largest(count: int, largest: bool, base: Tensor | None, m: Maths, size: int) -> Array:
    if base is None:
        raise WrongBase("the indices are those of the base's largest weights", hint="--base BASE")
    # In the base's own dtype: where magnitudes are equal, the order is that of torch's `topk`.
    return m.xp.round(m[_BASE], base.dtype).abs().flatten().topk(count, largest=largest).indices


def _delta(choose: _Choose, scale: float, shape: Shape, m: Maths) -> Array:
    indices = choose(m, shape[0] * shape[1])
    delta = m["values"].new_zeros(shape[0] * shape[1]).scatter_add(0, indices, m["values"]).reshape(shape)
    return delta + scale * (m["B"] @ m["A"]) if scale else delta


def _added(choose: _Choose, scale: float, m: Maths, w: Array, weight: float = 1.0) -> Array:
    values = m["values"] if weight == 1 else m["values"] * weight
    # In W's dtype, as PEFT adds.
    flat = m.rounded(w).reshape(-1).scatter_add(0, choose(m, w.numel()), m.rounded(values))
    merged = m.lift(flat.reshape(w.shape))
    if not scale:
        return merged
    low_rank = scale * (m["B"] @ m["A"])
    return merged + m.lift(m.rounded(low_rank if weight == 1 else low_rank * weight))


def ranks(a: Adapter) -> Mapping[str, int]:
    found = {module: _parts(a, module).rank for module in a.modules}
    return {module: rank for module, rank in found.items() if rank is not None}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from _findings.broken(a, lambda module: _parts(a, module))
    if a.config.get("r") is not None:
        yield from rank_findings(a.config, _findings.sound(a, lambda m: _parts(a, m).rank or 0), 8, pattern=False)
    if _ignored(a):
        said = "it is false, but the file holds indices"
        yield Finding("wrong-index-flag", "save_precomputed_indices", said, _SET_IT)
    if a.encoding == MAGNITUDE:
        yield Finding(
            "unsaved-indices",
            "save_precomputed_indices",
            "which weights were trained is left to the magnitudes of the base: another base, or another version of"
            " torch where magnitudes are equal, gives others",
            "adapterpack convert --to indices --base BASE",
            warning=True,
        )
    elif a.source.at_hand:
        for module in a.modules:
            yield from _index_findings(a, module, shapes)


def _index_findings(a: Adapter, module: str, shapes: Shapes | None) -> Iterator[Finding]:
    try:
        parts = _parts(a, module)
        size = None
        if shapes is not None and shapes.has(f"{module}.weight"):
            shape = _logical(a, module, parts, shapes)
            size = shape[0] * shape[1]
    except (InvalidFile, WrongBase):
        return
    import numpy as np

    param = a.modules[module]["indices"]
    indices = param.tensor.numpy()
    if indices.min() < 0 or (size is not None and indices.max() >= size):
        beyond = "" if size is None else f" of {size:,} elements"
        yield Finding(
            "index-out-of-range", param.key, f"an index beyond the weight{beyond}", "train or save it again"
        )
    if len(np.unique(indices)) != len(indices):
        yield Finding(
            "duplicate-index",
            param.key,
            "it names a weight twice: PEFT adds both values, in an order that GPUs do not keep",
            "train or save it again",
            warning=True,
        )


def _to_indices(a: Adapter, request: Request) -> Outcome:
    if request.shapes is None:
        raise WrongBase("the indices are those of the base's largest weights", hint="--base BASE")
    modules: dict[str, Mapping[str, Param]] = {}
    for module, params in a.modules.items():
        choose, given = _chooser(a, module, _parts(a, module), request.shapes)
        found = choose(_bare(request.xp, given), 0)
        indices = request.xp.tensor(found.to(request.xp.torch.int32))
        modules[module] = {"indices": Param(keys.key(module, "indices"), indices), **params}
    made = replace(
        a, encoding=INDICES, modules=modules, config={**a.config, "save_precomputed_indices": True}, changed=True
    )
    note = "the indices are those of this base: right if it is the one of the training, in the same dtype"
    return Outcome(made, Grade.EQUIVALENT, notes=(note,))


def _bare(xp: Backend, given: Mapping[str, Tensor]) -> Maths:
    return Maths(xp, {name: xp.f32(t) for name, t in given.items()}, False, F32)


edges: Mapping[str, tuple[Edge, ...]] = {
    INDICES: (),
    MAGNITUDE: (Edge(INDICES, Grade.EQUIVALENT, _to_indices, needs=Need.SHAPES | Need.WEIGHTS),),
}
