"""RandLoRA (Albert et al. 2025): full-rank changes from random bases that all modules share, and trained diagonals.

    A' = (lambda[:, :, None] * A[:, :, :n] * gamma[None]).flatten(0, 1)      (r nb, n),  n = min(in, out)
    B' = B[:m, :nb].flatten(1)                                                (m, nb r),  m = max(in, out)
    delta W = randlora_alpha / r * B' @ A'   where n = in, else its mirror image (A'^T @ B'^T)

Encodings: `projection` holds A and B, once and again for each module; `seed` leaves them to `projection_prng_key`.
There is no low-rank form worth having: its rank is that of W. PEFT rounds the delta weight to the dtype of the base.
Reference: peft/tuners/randlora/model.py (`_init_randlora_A_randlora_B`, `..._sparse`) and layer.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Finding, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, WrongBase
from adapterpack.methods._changes import logical_shape, replacements
from adapterpack.methods._formula import DenseChange, Maths
from adapterpack.methods._keys import KeyTable, flag, positive, require
from adapterpack.methods._scattered import number
from adapterpack.methods._seeded import PROJECTION, SEED, Drawn, Seeded, where_drawn, whole_seed
from adapterpack.recipes import FUSED, TERNARY, TWO_ROUNDINGS, UNIFORM, BasesRecipe, Basis, Recipe
from adapterpack.tensor import BF16, F16, F32, DType, Shape, Tensor, numpy_dtype

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "RANDLORA"
A, B = "randlora_A", "randlora_B"
keep_dtype: frozenset[str] = frozenset()
keys = KeyTable(
    "randlora_",
    {"lambda": "randlora_lambda", "gamma": "randlora_gamma", "A": A, "B": B},
    shared=(A, B),
)
_OF = {"A": A, "B": B}


def parse(c: Checkpoint) -> Adapter:
    a = keys.parse(c, "randlora", PROJECTION)
    found = {name for name in (A, B) if _copies(a, name)}
    if not found:
        return replace(a, encoding=SEED)
    if len(found) == 1:
        raise InvalidFile(f"{c.name} holds one projection of two")
    return a


def _copies(a: Adapter, name: str) -> list[Param]:
    """Everything in the file that is one of the two bases: PEFT has one tensor, and saves it under many names."""
    of_modules = (params.get(name.removeprefix("randlora_")) for params in a.modules.values())
    return [p for p in (a.shared.get(name), *of_modules) if p is not None]


def _stored(a: Adapter) -> dict[str, Tensor]:
    return {_copies(a, name)[0].key: _copies(a, name)[0].tensor for name in (A, B)}


def _name(key: str) -> str:
    return A if key.rpartition(".")[2].startswith(A) or f".{A}." in key else B


def _diagonals(a: Adapter, module: str) -> tuple[Tensor, Tensor]:
    """(lambda, gamma) of a module: (r, nb) and (nb, n). Raises InvalidFile: they do not fit together."""
    lambda_, gamma = require(module, a.modules[module], ("lambda", "gamma"))
    fits = len(lambda_.shape) == len(gamma.shape) == 2 and lambda_.shape[1] == gamma.shape[0] and lambda_.shape[0]
    if not fits or gamma.shape[0] != -(-gamma.shape[1] // lambda_.shape[0]):
        raise InvalidFile(
            f"{module}: lambda {lambda_.shape} and gamma {gamma.shape} are not (r, nb) and (nb, n) with nb = n / r"
        )
    return lambda_, gamma


def ranks(a: Adapter) -> Mapping[str, int]:
    return {module: _diagonals(a, module)[0].shape[0] for module in a.modules}


def _rank(a: Adapter) -> int:
    found = set(ranks(a).values())
    if len(found) != 1:
        raise InvalidFile(f"the modules have different ranks: {sorted(found)}")
    return found.pop()


# -- the bases -------------------------------------------------------------------------------------------


def _bases(a: Adapter, request: Request) -> tuple[Tensor, Tensor]:
    """A (r, 1, n) and B (m, nb, r). Raises InvalidFile: they do not fit, or copies of one differ."""
    drawn, _ = seeded.drawn(a, request)
    pair = {_name(key): tensor for key, tensor in drawn.items()}
    for name in (A, B):
        for copy in _copies(a, name):
            if not copy.tensor.equals(pair[name]):
                raise InvalidFile(f"{copy.key} is another {name} than the others: PEFT has one for all modules")
    r, (shape_a, shape_b) = _rank(a), (pair[A].shape, pair[B].shape)
    if len(shape_a) != 3 or len(shape_b) != 3 or shape_a[:2] != (r, 1) or shape_b[2] != r:
        raise InvalidFile(f"bases {shape_a} and {shape_b} do not fit rank {r}: (r, 1, n) and (m, nb, r) are wanted")
    return pair[A], pair[B]


def _recipe(
    a: Adapter,
    names: tuple[str, str],
    sides: tuple[int, int],
    drawn: DType,
    arithmetic: str,
    how: tuple[DType, DType],
) -> BasesRecipe:
    """`_pre_injection_hook`, with deviations of 1 where none is known yet.

    Args:
        sides: (n, m): of the largest out and the largest in, the smaller and the larger one.
        how: The dtype of the base, and that of the file.
    """
    seed, r, (n, m) = whole_seed(a.config, "projection_prng_key", 0), _rank(a), sides
    ternary = _ternary(a)

    def bound(fan: int) -> float:
        if ternary:
            return 1 / (2 * (math.sqrt(n) if flag(a.config, "very_sparse") else 3))
        # kaiming_uniform_ with a = sqrt(5), in Python doubles.
        return math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(fan))

    shapes = ((r, 1, n), (m, -(-n // r), r))
    draws = tuple(Basis(name, shape, bound(shape[2]), 1.0) for name, shape in zip(names, shapes, strict=True))
    law = TERNARY if ternary else UNIFORM
    return BasesRecipe(seed, draws, law, F32 if ternary else drawn, arithmetic, *how)


def _ternary(a: Adapter) -> bool:
    """Are the bases -1, 0 and 1, drawn in f32, and not uniform draws in 16 bits?"""
    return flag(a.config, "sparse") or flag(a.config, "very_sparse")


def _with_deviations(recipe: BasesRecipe, stored: Drawn) -> BasesRecipe:
    """The recipe with the deviations that its values have.

    torch's own sum may round to a neighbour of the true one: the one that the stored values were divided by is taken.
    """
    import numpy as np

    own = numpy_dtype(recipe.drawn)
    draws = []
    for draw, bare in zip(recipe.draws, recipe.bare(), strict=True):
        true = np.std(bare.astype(np.float64), ddof=1).astype(own)
        bits = np.array([true]).view(f"u{own.itemsize}")
        near = [float(np.array([int(bits[0]) + step], bits.dtype).view(own)[0]) for step in (0, 1, -1)]
        sample = bare.reshape(-1)[:4096].astype(np.float32)
        wanted = stored[draw.name].numpy().reshape(-1)[:4096] if draw.name in stored else None

        def gives(std: float, sample: Array = sample, wanted: Array = wanted) -> bool:
            made = (sample / np.float32(std)).astype(own).astype(numpy_dtype(recipe.through))
            return wanted is not None and np.array_equal(made.astype(wanted.dtype), wanted)

        draws.append(replace(draw, std=next((std for std in near if gives(std)), near[0])))
    return replace(recipe, draws=tuple(draws))


def _candidates(a: Adapter, stored: Drawn) -> Iterator[BasesRecipe]:
    """Every way in which these two may have been drawn; the likeliest first."""
    (key_a, frozen_a), (key_b, frozen_b) = stored.items()
    shape_a, shape_b, r, kept = frozen_a.shape, frozen_b.shape, _rank(a), frozen_a.dtype
    if len(shape_a) != 3 or len(shape_b) != 3 or kept not in (F32, BF16, F16) or frozen_b.dtype != kept:
        return
    if shape_a[:2] != (r, 1) or shape_b[1:] != (-(-shape_a[2] // r), r) or shape_b[0] < shape_a[2]:
        return
    if not frozen_a.numel + frozen_b.numel or frozen_a.numel < 2:
        return
    sides, ternary = (shape_a[2], shape_b[0]), _ternary(a)
    for drawn, through in itertools.product((BF16, F16), (F32, BF16, F16)):
        # What was drawn in 16 bits is not rounded by the same 16 bits; what is stored narrowly went through that.
        if (through is drawn and not ternary and kept is F32) or (kept is not F32 and through is not kept):
            continue
        if ternary and drawn is F16:
            continue
        for arithmetic in (FUSED,) if ternary else (FUSED, TWO_ROUNDINGS):
            recipe = _recipe(a, (key_a, key_b), sides, drawn, arithmetic, (through, kept))
            yield _with_deviations(recipe, stored)


def recipes(a: Adapter) -> Iterator[Recipe]:
    """For packs: named as the first copies in the file are, which the others then equal."""
    if a.encoding != PROJECTION:
        return
    place = {key: n for n, key in enumerate(a.source.tensors)}
    first = (min(_copies(a, name), key=lambda p: place.get(p.key, 0)) for name in (A, B))
    yield from _candidates(a, {p.key: p.tensor for p in first})


def _redrawn(a: Adapter, request: Request) -> tuple[Drawn, tuple[str, ...]]:
    shapes = _need_shapes(request)
    through = request.base_dtype or shapes.dtype
    if through is None:
        raise WrongBase(
            "the base does not say its dtype, through which PEFT rounds RandLoRA's bases",
            hint="--base-dtype float32, bfloat16 or float16",
        )
    logical = [_shape(a, m, shapes) for m in a.modules]
    largest = sorted(max(side) for side in zip(*logical, strict=True))
    names = (f"base_model.{A}", f"base_model.{B}")
    recipe = _recipe(a, names, (largest[0], largest[1]), BF16, FUSED, (through, F32))
    how = "" if _ternary(a) else " in bfloat16, as PEFT does where the accelerator has it,"
    note = (
        f"the bases were drawn from seed {recipe.seed}{how} as torch does on x86 CPUs with AVX2 (fused), and rounded"
        f" through {through}: unverified, for no digest was recorded"
    )
    return _with_deviations(recipe, {}).draw(), (note,)


def _checked(a: Adapter, recorded: Recipe) -> None:
    names = list(recorded.shapes)
    spelled = len(names) == 2 and all(keys.spells_shared(key, name) for key, name in zip(names, (A, B), strict=True))
    if not isinstance(recorded, BasesRecipe) or not spelled:
        raise InvalidFile(f"the recorded recipe does not draw {A} and {B}")


def _bare(a: Adapter) -> Adapter:
    kept = {m: {n: p for n, p in params.items() if n not in _OF} for m, params in a.modules.items()}
    return replace(a, shared={}, modules=kept)


def _filled(a: Adapter, drawn: Drawn, recorded: Recipe | None) -> Adapter:
    """As PEFT saves them: once, and again for each module."""
    pair = {_name(key): Param(key, tensor) for key, tensor in drawn.items()}
    modules = {
        m: {**params, **{n: Param(keys.key(m, n), pair[name].tensor) for n, name in _OF.items()}}
        for m, params in a.modules.items()
    }
    return replace(a, shared=pair, modules=modules)


def _where(recipe: Recipe) -> str:
    assert isinstance(recipe, BasesRecipe)
    gpu = {BF16: " and the accelerator has bfloat16", F16: " and the accelerator has no bfloat16"}
    return where_drawn(recipe.arithmetic, recipe.through.name) + gpu.get(recipe.drawn, "")


def _stored_as_shared(a: Adapter) -> Drawn:
    stored = _stored(a)
    return {
        key if keys.spells_shared(key, _name(key)) else f"base_model.{_name(key)}": t for key, t in stored.items()
    }


seeded = Seeded(
    switch="save_projection",
    default=True,
    seed="projection_prng_key",
    what="both bases and their copies",
    stored=_stored_as_shared,
    candidates=lambda a: _candidates(a, _stored_as_shared(a)),
    bare=_bare,
    filled=_filled,
    redrawn=_redrawn,
    checked=_checked,
    where=_where,
)
edges = seeded.edges()


# -- the changes -----------------------------------------------------------------------------------------


def _need_shapes(request: Request) -> Shapes:
    if request.shapes is None:
        raise WrongBase(
            "RandLoRA needs the shapes of the base's modules: the adapter knows the smaller side of each only",
            hint="--base BASE; its config.json and safetensors headers are enough, no weights are read",
        )
    return request.shapes


def _shape(a: Adapter, module: str, shapes: Shapes) -> tuple[int, int]:
    shape, least = logical_shape(a, module, shapes), _diagonals(a, module)[1].shape[1]
    if len(shape) != 2 or min(shape) != least:
        raise WrongBase(f"{module}.weight has shape {shape} in the base; the smaller side must be {least}")
    return shape[0], shape[1]


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    shapes = _need_shapes(request)
    frozen_a, frozen_b = _bases(a, request)
    alpha, shared = number(a.config, "randlora_alpha", 640), frozenset(p.key for p in a.shared.values())
    for module, params in a.modules.items():
        lambda_, gamma = _diagonals(a, module)
        shape = _shape(a, module, shapes)
        if frozen_a.shape[2] < min(shape) or frozen_b.shape[0] < max(shape) or frozen_b.shape[1] < gamma.shape[0]:
            raise WrongBase(
                f"{module} is {shape} in the base: bases {frozen_a.shape}, {frozen_b.shape} are too small"
            )
        yield DenseChange(
            module=module,
            params=params,
            shape=shape,
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            given={"A": frozen_a, "B": frozen_b},
            also=shared,
            delta=partial(_delta, shape, alpha / lambda_.shape[0]),
            round_delta=True,
        )


def _delta(shape: Shape, scale: float, m: Maths) -> Array:
    lambda_, gamma = m["lambda"], m["gamma"]
    bases, least = gamma.shape
    # lambda * A first: the order in which PEFT rounds.
    small = (lambda_[:, :, None] * m["A"][:, :, :least] * gamma[None]).flatten(end_dim=1)
    large = m["B"][: max(shape), :bases].flatten(start_dim=1)
    outer, inner = (small, large) if least == shape[1] else (large.T, small.T)
    return (outer.T @ inner.T).T * scale


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from seeded.findings(a)
    r, broken = positive(a.config, "r", 32), False
    for module in a.modules:
        try:
            rank = _diagonals(a, module)[0].shape[0]
        except InvalidFile as e:
            broken = True
            yield Finding("half-pair", module, e.message, "train or save the adapter again")
            continue
        if rank != r:
            what = f"the config says rank {r}, lambda has {rank}"
            yield Finding("rank-mismatch", module, what, f"set r to {rank}")
    if not broken:
        yield from seeded.unproven(a, "other base dtypes, accelerators and CPUs redraw others")
