"""VeRA (Kopiczko et al. 2023): two frozen random projections for all modules, two trained vectors for each.

    delta W = (lambda_b[:, None] * B[:out]) @ (lambda_d[:, None] * A[:, :in])

Encodings: `projection` holds A and B; `seed` leaves them to `projection_prng_key`.
Reference: peft/tuners/vera/model.py (`_init_vera_A_vera_B`) and layer.py (`get_delta_weight`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack import recipes as recipe_words
from adapterpack.adapter import (
    Adapter,
    Change,
    Edge,
    Finding,
    Grade,
    Kind,
    Need,
    Outcome,
    Param,
    Request,
    Shapes,
)
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, LossRefused, WrongBase
from adapterpack.methods import _to_lora
from adapterpack.methods._changes import LowRankChange, linear_kind, replacements
from adapterpack.methods._keys import KeyTable, flag, positive, require
from adapterpack.recipes import FUSED, METADATA_KEY, TWO_ROUNDINGS, Recipe, Uniform
from adapterpack.tensor import BF16, F16, F32, DType, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

peft_type = "VERA"
A, B = "vera_A", "vera_B"
PROJECTION, SEED = "projection", "seed"
keep_dtype: frozenset[str] = frozenset()
keys = KeyTable("vera_", {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"}, shared=(A, B))


def parse(c: Checkpoint) -> Adapter:
    a = keys.parse(c, "vera", PROJECTION)
    if not a.shared:
        return replace(a, encoding=SEED)
    if set(a.shared) != {A, B}:
        raise InvalidFile(f"{c.name} holds one projection of two")
    return a


def _vectors(a: Adapter, module: str) -> tuple[Tensor, Tensor]:
    lambda_b, lambda_d = require(module, a.modules[module], ("lambda_b", "lambda_d"))
    if len(lambda_b.shape) != 1 or len(lambda_d.shape) != 1:
        raise InvalidFile(f"{module}: lambda_b {lambda_b.shape} and lambda_d {lambda_d.shape} are vectors")
    return lambda_b, lambda_d


def _rank(a: Adapter) -> int:
    ranks_found = {_vectors(a, m)[1].shape[0] for m in a.modules}
    if len(ranks_found) != 1:
        raise InvalidFile(f"the modules have different ranks: {sorted(ranks_found)}")
    return ranks_found.pop()


def ranks(a: Adapter) -> Mapping[str, int]:
    return {m: _vectors(a, m)[1].shape[0] for m in a.modules}


def _inputs(a: Adapter, module: str, shapes: Shapes) -> int:
    """Input features of a module: no tensor of the file has that length, so the base must say."""
    out = _vectors(a, module)[0].shape[0]
    shape = shapes.shape(f"{module}.weight")
    kind = linear_kind(f"{module}.weight", shape, out, None, shapes.conv1d(module), flag(a.config, "fan_in_fan_out"))
    return shape[1] if kind is Kind.LINEAR else shape[0]


def _need_shapes(request: Request) -> Shapes:
    if request.shapes is None:
        raise WrongBase(
            "VeRA needs the shapes of the base's modules: nothing in the adapter says how many inputs they have",
            hint="--base BASE; its config.json and safetensors headers are enough, no weights are read",
        )
    return request.shapes


def projections(a: Adapter, request: Request) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """A and B, from the file, the recorded recipe or the seed; and what the user should know of it.

    Raises:
        WrongBase: the seed alone is there and no base tells the shapes.
        InvalidFile: the shapes do not fit together, or a recorded digest does not agree.
    """
    if a.encoding == PROJECTION:
        pair: Mapping[str, Tensor] = {name: a.shared[name].tensor for name in (A, B)}
        notes: tuple[str, ...] = ()
    else:
        pair, notes = _regenerated(a, request)
    r = _rank(a)
    shape_a, shape_b = pair[A].shape, pair[B].shape
    widest = max(_vectors(a, m)[0].shape[0] for m in a.modules)
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != r or shape_b[1] != r or shape_b[0] < widest:
        raise InvalidFile(f"projections {shape_a} and {shape_b} do not fit rank {r} and {widest} outputs")
    return pair, notes


def _regenerated(a: Adapter, request: Request) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    recorded = recipe_words.from_metadata(a.metadata)
    if recorded is not None:
        drawn = recorded.draw()
        if set(drawn) != {A, B}:
            raise InvalidFile("the recorded recipe does not draw vera_A and vera_B")
        for name, key in recorded.keys.items():
            if not keys.spells_shared(key, name):
                raise InvalidFile(f"the recorded recipe calls {name} {key!r:.100}")
        return drawn, ()
    shapes = _need_shapes(request)
    through = request.base_dtype or shapes.dtype
    if through is None:
        raise WrongBase(
            "the base does not say its dtype, through which PEFT rounds VeRA's projections",
            hint="--base-dtype float32, bfloat16 or float16",
        )
    into = max(_inputs(a, m, shapes) for m in a.modules)
    out = max(_vectors(a, m)[0].shape[0] for m in a.modules)
    recipe = _recipe(a, into, out, FUSED, through, F32)
    note = (
        f"the projections were drawn from seed {recipe.seed} as torch does on x86 CPUs with AVX2 (fused), rounded"
        f" through {through}: unverified, for no digest was recorded"
    )
    return recipe.draw(), (note,)


def _recipe(a: Adapter, into: int, out: int, arithmetic: str, through: DType, stored: DType) -> Recipe:
    """`_init_vera_A_vera_B`: A, then B, from one generator; kaiming bounds as Python doubles."""
    seed = a.config.get("projection_prng_key", 0)
    if type(seed) is not int or not -(1 << 63) <= seed < 1 << 64:
        raise InvalidFile(f"projection_prng_key is {seed!r:.60}; a 64-bit whole number is wanted")
    r = _rank(a)

    def bound(fan: int) -> float:
        return math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan))

    draws = (Uniform(A, (r, into), bound(into)), Uniform(B, (out, r), bound(r)))
    return Recipe(seed=seed, draws=draws, arithmetic=arithmetic, through=through, stored=stored)


def recipes(a: Adapter) -> Iterator[Recipe]:
    """Every way in which the stored projections may have been drawn; the likeliest first."""
    if a.encoding != PROJECTION:
        return
    shape_a, shape_b = a.shared[A].tensor.shape, a.shared[B].tensor.shape
    stored = a.shared[A].tensor.dtype
    if len(shape_a) != 2 or len(shape_b) != 2 or stored not in (F32, BF16, F16):
        return
    for through in (F32, BF16, F16):
        if stored is F32 or through is stored:
            for arithmetic in (FUSED, TWO_ROUNDINGS):
                yield _recipe(a, shape_a[1], shape_b[0], arithmetic, through, stored)


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    pair, _ = projections(a, request)
    fan_in_fan_out = flag(a.config, "fan_in_fan_out")
    shared_keys = {p.key for p in a.shared.values()}
    for module, params in a.modules.items():
        lambda_b, lambda_d = _vectors(a, module)
        # Without a base two adapters can still be compared, over the whole width of A.
        into = pair[A].shape[1] if request.shapes is None else _inputs(a, module, request.shapes)
        if into > pair[A].shape[1]:
            raise WrongBase(f"{module} has {into} inputs in the base; the projection is {pair[A].shape[1]} wide")
        yield LowRankChange(
            module=module,
            factors=partial(_factors, pair, lambda_b, lambda_d, into),
            shape=(lambda_b.shape[0], into),
            rank=lambda_d.shape[0],
            scale=1.0,
            uses=frozenset({p.key for p in params.values()} | shared_keys),
            fan_in_fan_out=fan_in_fan_out,
        )


def _factors(
    pair: Mapping[str, Tensor], lambda_b: Tensor, lambda_d: Tensor, into: int, xp: Backend
) -> tuple[Array, Array]:
    vector_b, vector_d = xp.f32(lambda_b), xp.f32(lambda_d)
    b = vector_b[:, None] * xp.f32(pair[B])[: len(vector_b)]
    a = vector_d[:, None] * xp.f32(pair[A])[:, :into]
    return b, a


def _to_seed(a: Adapter, request: Request) -> Outcome:
    wanted = {name: a.shared[name].tensor.digest() for name in (A, B)}
    tried = 0
    for recipe in recipes(a):
        tried += 1
        drawn = recipe.draw()
        if all(drawn[name].digest() == wanted[name] for name in (A, B)):
            return Outcome(
                _seeded(a, replace(recipe, digests=wanted)),
                Grade.LOSSLESS,
                dropped=("both projections: the recorded recipe gives them back bit for bit",),
                notes=(_where_peft_redraws(recipe),),
            )
    if request.max_error is not None and tried:
        return _to_nearest_seed(a, request)
    raise LossRefused(
        f"no recipe gives the stored projections back bit for bit ({tried} tried for seed"
        f" {a.config.get('projection_prng_key', 0)}): they come from another seed, method version or machine",
        hint="keep the projections, or allow a measured error with --max-error",
    )


def _to_nearest_seed(a: Adapter, request: Request) -> Outcome:
    """The recipe nearest to what is stored; the job measures the error and holds it against the bound."""
    xp = request.xp

    def distance(recipe: Recipe) -> float:
        drawn = recipe.draw()
        return sum(float((xp.f64(drawn[name]) - xp.f64(a.shared[name].tensor)).norm()) for name in (A, B))

    best = min(recipes(a), key=distance)
    digests = {name: tensor.digest() for name, tensor in best.draw().items()}
    return Outcome(
        _seeded(a, replace(best, digests=digests)),
        Grade.APPROXIMATE,
        dropped=("both projections: the recorded recipe gives others, near to them",),
        notes=(_where_peft_redraws(best),),
    )


def _seeded(a: Adapter, recipe: Recipe) -> Adapter:
    return replace(
        a,
        encoding=SEED,
        config={**a.config, "save_projection": False},
        shared={},
        metadata={**a.metadata, METADATA_KEY: replace(recipe, keys=_keys(a)).to_metadata()},
        changed=True,
    )


def _keys(a: Adapter) -> dict[str, str]:
    return {name: p.key for name, p in a.shared.items()}


def _where_peft_redraws(recipe: Recipe) -> str:
    cpu = {
        FUSED: "an x86 CPU with AVX2 or better",
        TWO_ROUNDINGS: "a CPU path without fused multiply-add (ATEN_CPU_CAPABILITY=default)",
    }[recipe.arithmetic]
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return (
        f"stock PEFT redraws the same projections when the base is loaded in {names[recipe.through.name]} on {cpu};"
        " adapterpack redraws them anywhere"
    )


def _to_projection(a: Adapter, request: Request) -> Outcome:
    recorded = recipe_words.from_metadata(a.metadata)
    pair, notes = projections(a, request)
    spelled = {} if recorded is None else recorded.keys
    shared = {name: Param(spelled.get(name, f"base_model.{name}"), pair[name]) for name in (A, B)}
    return Outcome(
        replace(
            a,
            encoding=PROJECTION,
            config={**a.config, "save_projection": True},
            shared=shared,
            metadata={k: v for k, v in a.metadata.items() if k != METADATA_KEY},
            changed=True,
        ),
        Grade.LOSSLESS if recorded is not None else Grade.EQUIVALENT,
        notes=notes,
    )


def _fold(a: Adapter, request: Request) -> Outcome:
    _need_shapes(request)
    _, notes = projections(a, request)
    dropped = "the split into projections and vectors: training as VeRA cannot resume from the result"
    return replace(_to_lora.fold(a, request, changes(a, request), dropped=dropped), notes=notes)


def _same(a: Adapter, request: Request) -> Outcome:
    return Outcome(a, Grade.LOSSLESS, notes=(f"it already is in the {a.encoding} encoding",))


edges: Mapping[str, tuple[Edge, ...]] = {
    PROJECTION: (
        Edge(SEED, Grade.LOSSLESS, _to_seed),
        Edge("lora", Grade.EQUIVALENT, _fold, needs=Need.SHAPES),
        Edge(PROJECTION, Grade.LOSSLESS, _same),
    ),
    SEED: (
        Edge(PROJECTION, Grade.LOSSLESS, _to_projection, needs=Need.SHAPES),
        Edge("lora", Grade.EQUIVALENT, _fold, needs=Need.SHAPES),
        Edge(SEED, Grade.LOSSLESS, _same),
    ),
}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    said: Any = flag(a.config, "save_projection", True)
    if said != (a.encoding == PROJECTION):
        what = "holds no projections: PEFT refuses to load it" if said else "holds them: PEFT ignores them"
        yield Finding(
            "wrong-projection-flag",
            "save_projection",
            f"the config says {str(said).lower()}, the file {what}",
            f"set save_projection to {str(not said).lower()} in adapter_config.json",
        )
    broken = False
    for module in a.modules:
        try:
            _vectors(a, module)
        except InvalidFile as e:
            broken = True
            yield Finding("half-pair", module, e.message, "train or save the adapter again")
    if broken:
        return
    r = positive(a.config, "r", 256)
    for module, rank in ranks(a).items():
        if rank != r:
            yield Finding(
                "rank-mismatch", module, f"the config says rank {r}, lambda_d has {rank}", f"set r to {rank}"
            )
    if a.encoding == PROJECTION:
        shape_a, shape_b = a.shared[A].tensor.shape, a.shared[B].tensor.shape
        widest = max(_vectors(a, m)[0].shape[0] for m in a.modules)
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_b[0] < widest:
            yield Finding("projection-shape", a.shared[B].key, f"{shape_a} and {shape_b} are too small")
    elif recipe_words.from_metadata(a.metadata) is None:
        yield Finding(
            "unproven-seed",
            "projection_prng_key",
            "the projections are left to the seed and no digest was recorded: other base dtypes and CPUs redraw"
            " others",
            "adapterpack convert --to projection --base BASE on the machine type of the training",
            warning=True,
        )
