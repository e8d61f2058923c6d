"""TinyLoRA (arXiv 2602.04118): the parts of W's SVD with a tiny trained vector between them.

    R = sum_i v[i] P[i],   delta W = B @ R @ A

A (r, in), B (out, r) hold singular vectors of W and are always saved; P (u, r, r) is random, of each module its own;
v (u,) is trained, one for each module or group of modules in the order of the model. It is plain LoRA with B @ R and
A. Encodings: `projection` holds the P; `seed` leaves them to `projection_seed` plus the module's number. Those are
normal draws, and the last bits of normal draws are those of the torch that draws them: packs store them.
Reference: peft/tuners/tinylora/model.py (`_create_and_replace`) and layer.py (`get_delta_weight`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack import draws
from adapterpack import recipes as recipe_words
from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Kind, Need, Outcome, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported, WrongBase
from adapterpack.methods import _model_order, _to_lora
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import DenseChange, Maths
from adapterpack.methods._keys import KeyTable, flag, positive, require
from adapterpack.methods._scattered import number
from adapterpack.methods._seeded import PROJECTION, SEED, Drawn, Seeded, whole_seed
from adapterpack.methods._without import no_recipes
from adapterpack.recipes import Normal, NormalRecipe, Recipe
from adapterpack.tensor import BF16, F16, F32, DType, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "TINYLORA"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
keys = KeyTable("tinylora_", {"A": "tinylora_A", "B": "tinylora_B", "P": "tinylora_P"}, shared=("tinylora_v.*",))
_MOST = 10_000
"""Most modules whose numbers are looked for in what their projections hold."""


def parse(c: Checkpoint) -> Adapter:
    a = keys.parse(c, "tinylora", PROJECTION)
    saved = {m for m, params in a.modules.items() if "P" in params}
    if saved and saved != a.modules.keys():
        raise InvalidFile(f"{c.name} holds the projections of some modules and not of others")
    return a if saved else replace(a, encoding=SEED)


def _factors_of(a: Adapter, module: str) -> tuple[Tensor, Tensor]:
    """(A, B) of a module. Raises InvalidFile: they do not fit together."""
    one, other = require(module, a.modules[module], ("A", "B"))
    if len(one.shape) != 2 or len(other.shape) != 2 or one.shape[0] != other.shape[1] or not one.shape[0]:
        raise InvalidFile(f"{module}: A {one.shape} and B {other.shape} are not (r, in) and (out, r)")
    return one, other


def ranks(a: Adapter) -> Mapping[str, int]:
    return {module: _factors_of(a, module)[0].shape[0] for module in a.modules}


# -- the order of the model ------------------------------------------------------------------------------


def _numbers(a: Adapter) -> Mapping[str, int]:
    """The number of each module in the order of the model: proven by its projection, told by a recipe, or known.

    Raises:
        Unsupported: it is none of these.
    """
    proven = _of_recipe(a) if a.encoding == SEED else _of_projections(a)
    if proven is not None:
        return proven
    ordered, known = _model_order.in_order(a.modules)
    if not known:
        raise Unsupported(
            "the order in which the model defines these modules is not known, and TinyLoRA draws and shares by it",
            hint="merge with PEFT, or save the adapter with save_projection: the projections tell the order",
        )
    return {module: n for n, module in enumerate(ordered)}


def _of_recipe(a: Adapter) -> Mapping[str, int] | None:
    recorded = recipe_words.from_metadata(a.metadata)
    if not isinstance(recorded, NormalRecipe):
        return None
    _checked(a, recorded)
    first = whole_seed(a.config, "projection_seed", 42)
    seeds = {d.name: d.seed - first for d in recorded.draws}
    found = {m: seeds[keys.key(m, "P")] for m in a.modules}
    return found if sorted(found.values()) == list(range(len(found))) else None


def _of_projections(a: Adapter) -> Mapping[str, int] | None:
    """Which number's seed gives each projection, to a few units in the last place; None if that is not clear."""
    import numpy as np

    if len(a.modules) > _MOST:
        return None
    seed, near = whole_seed(a.config, "projection_seed", 42), dict[tuple[int, int], Any]()
    found: dict[str, int] = {}
    for module in a.modules:
        p, r = _projection(a, module), _factors_of(a, module)[0].shape[0]
        sample = p.rows(0, p.numel // p.shape[-1]).reshape(-1) if p.numel <= 32 else p.rows(0, -(-8 // r)).reshape(-1)
        sample = sample.astype(np.float64)
        if (p.numel, r) not in near:
            drawn = (draws.normal_near(seed + n, p.numel, 1.0 / (r**0.5)) for n in range(len(a.modules)))
            near[p.numel, r] = np.stack(list(drawn))
        table = near[p.numel, r]
        # bf16 on its way is the coarsest.
        close = np.abs(sample[: table.shape[1]] - table) <= 1e-5 + 2.0**-8 * np.abs(table)
        alike = np.flatnonzero(close.all(axis=1))
        if len(alike) != 1:
            return None
        found[module] = int(alike[0])
    return found if len(set(found.values())) == len(found) else None


def _group(a: Adapter, index: int) -> str:
    """The name of the vector of the module with that number."""
    tying, count = number(a.config, "weight_tying", 0.0), len(a.modules)
    if not 0 <= tying <= 1:
        raise InvalidFile(f"weight_tying is {tying!r:.40}; 0 to 1 is wanted")
    groups = max(1, round(count * (1.0 - tying)))
    return f"tinylora_v.{min(index // max(1, count // groups), groups - 1)}"


def _vectors(a: Adapter) -> Mapping[str, Param]:
    """The trained vector of each module. Raises InvalidFile: it is missing, or is none."""
    tied = len(a.shared) == 1 and _group(a, len(a.modules) - 1) == "tinylora_v.0"
    numbers = dict.fromkeys(a.modules, 0) if tied else _numbers(a)
    found = {}
    for module, index in numbers.items():
        name = _group(a, index)
        if name not in a.shared:
            raise InvalidFile(f"{module} needs {name}, which is missing", hint="the adapter was saved incompletely")
        if len(a.shared[name].tensor.shape) != 1:
            raise InvalidFile(f"{a.shared[name].key} has shape {a.shared[name].tensor.shape}; a vector is wanted")
        found[module] = a.shared[name]
    return found


# -- the projections -------------------------------------------------------------------------------------


def _projection(a: Adapter, module: str) -> Tensor:
    """(u, r, r). Raises InvalidFile: it is another shape."""
    p, r = a.modules[module]["P"].tensor, _factors_of(a, module)[0].shape[0]
    if len(p.shape) != 3 or p.shape[1:] != (r, r) or not p.shape[0] or p.dtype.kind != "float":
        raise InvalidFile(f"{module}: the projection has shape {p.shape}; (u, {r}, {r}) is wanted")
    return p


def _recipe(a: Adapter, length: int | None, through: DType, stored: DType) -> NormalRecipe:
    """All projections in the order of the file's modules.

    Args:
        length: Of v; None: as the projections have it.
    """
    seed, drawn = whole_seed(a.config, "projection_seed", 42), []
    for module, index in _numbers(a).items():
        r = _factors_of(a, module)[0].shape[0]
        u = _projection(a, module).shape[0] if length is None else length
        drawn.append(Normal(keys.key(module, "P"), (u, r, r), seed + index, 1.0 / (r**0.5)))
    return NormalRecipe(tuple(drawn), through, stored)


def _candidates(a: Adapter) -> Iterator[Recipe]:
    stored = {_projection(a, m).dtype for m in a.modules}
    if len(stored) == 1 and (dtype := stored.pop()) in (F32, BF16, F16):
        for through in (F32, BF16, F16):
            if dtype is F32 or through is dtype:
                yield _recipe(a, None, through, dtype)


@dataclass(frozen=True)
class _Late:
    """The projections of a seed, drawn when the first module asks for one: it takes torch."""

    recipe: Recipe
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _drawn: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, key: str, torch: Any) -> Tensor:
        with self._lock:
            if not self._drawn:
                self._drawn.update(self.recipe.draw(torch))
            return self._drawn[key]


def _seed_recipe(a: Adapter, request: Request) -> tuple[Recipe, tuple[str, ...]]:
    """The recorded recipe, or that of the seed alone, and what the user should know of it."""
    recorded = recipe_words.from_metadata(a.metadata)
    if recorded is not None:
        _checked(a, recorded)
        return recorded, ()
    through = request.base_dtype or (None if request.shapes is None else request.shapes.dtype)
    if through is None:
        raise WrongBase(
            "TinyLoRA's projections are rounded to the dtype of the base, which nothing here says",
            hint="--base BASE, or --base-dtype float32, bfloat16 or float16",
        )
    lengths = {p.tensor.shape for p in a.shared.values()}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1:
        raise InvalidFile("the vectors tinylora_v have different lengths")
    recipe = _recipe(a, next(iter(lengths))[0], through, F32)
    note = (
        f"the projections were drawn from seed {a.config.get('projection_seed', 42)} by this torch, and rounded"
        f" through {through}: unverified, for no digest was recorded"
    )
    return recipe, (note,)


def _redrawn(a: Adapter, request: Request) -> tuple[Drawn, tuple[str, ...]]:
    recipe, notes = _seed_recipe(a, request)
    return recipe.draw(request.xp.torch), notes


def _checked(a: Adapter, recorded: Recipe) -> None:
    if not isinstance(recorded, NormalRecipe) or set(recorded.shapes) != {keys.key(m, "P") for m in a.modules}:
        raise InvalidFile("the recorded recipe does not draw the projections of these modules")


def _bare(a: Adapter) -> Adapter:
    return replace(a, modules={m: {n: p for n, p in ps.items() if n != "P"} for m, ps in a.modules.items()})


def _filled(a: Adapter, drawn: Drawn, recorded: Recipe | None) -> Adapter:
    own = {m: keys.key(m, "P") for m in a.modules}
    return replace(a, modules={m: {**ps, "P": Param(own[m], drawn[own[m]])} for m, ps in a.modules.items()})


def _where(recipe: Recipe) -> str:
    assert isinstance(recipe, NormalRecipe)
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return (
        "these are normal draws: PEFT and adapterpack draw them again with a torch whose build is like this one's,"
        f" where the base is loaded in {names[recipe.through.name]}; adapterpack notices if another one draws others"
    )


seeded = Seeded(
    switch="save_projection",
    default=True,
    seed="projection_seed",
    what="the projections",
    stored=lambda a: {keys.key(m, "P"): _projection(a, m) for m in a.modules},
    candidates=_candidates,
    bare=_bare,
    filled=_filled,
    redrawn=_redrawn,
    checked=_checked,
    where=_where,
    needs=Need.NOTHING,
    absent="PEFT draws them anew",
)


# -- the changes -----------------------------------------------------------------------------------------


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    vectors = _vectors(a)
    late = _Late(_seed_recipe(a, request)[0]) if a.encoding == SEED else None
    for module, params in a.modules.items():
        one, other = _factors_of(a, module)
        v = vectors[module]
        if late is None and _projection(a, module).shape[0] != v.tensor.shape[0]:
            raise InvalidFile(f"{module}: {v.key} {v.tensor.shape} does not fit {_projection(a, module).shape}")
        embedding = _is_embedding(module)
        shape = (other.shape[0], one.shape[1])
        yield DenseChange(
            module=module,
            params=params,
            shape=shape[::-1] if embedding else shape,
            layer=Kind.EMBEDDING if embedding else Kind.LINEAR,
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            given={"v": v.tensor},
            also=frozenset({v.key}),
            delta=partial(_delta, late, keys.key(module, "P"), embedding),
            factors=partial(_factors, late, keys.key(module, "P"), embedding),
        )


_EMBEDDINGS = {
    *("embed_tokens", "embed_positions", "embed_in", "tok_embeddings", "wte", "wpe", "word_embeddings", "emb"),
    *("position_embeddings", "token_type_embeddings", "token_embedding", "position_embedding", "embedding", "embed"),
    *("relative_attention_bias", "shared"),
}
"""What PEFT wraps as embeddings: in the file they look like linear layers, and merge alike."""


def _is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in _EMBEDDINGS


def _product(late: _Late | None, key: str, m: Maths) -> Array:
    """B @ R: PEFT multiplies in this order."""
    projection = m["P"] if late is None else m.lift(late(key, m.torch))
    return m["B"] @ m.torch.einsum("i,ijk->jk", m["v"], projection)


def _delta(late: _Late | None, key: str, embedding: bool, m: Maths) -> Array:
    delta = _product(late, key, m) @ m["A"]
    return delta.T if embedding else delta


def _factors(late: _Late | None, key: str, embedding: bool, m: Maths) -> tuple[Array, Array, float]:
    left = _product(late, key, m)
    return (m["A"].T.contiguous(), left.T.contiguous(), 1.0) if embedding else (left, m["A"], 1.0)


def _fold(a: Adapter, request: Request) -> Outcome:
    for module in a.modules:
        last = module.rpartition(".")[2]
        if "emb" in last and not _is_embedding(module) and last not in ("embed_out", "embedding_hidden_mapping_in"):
            raise Unsupported(
                f"whether {module} is an embedding is not known: LoRA has other keys for those",
                hint="the adapter can be merged",
            )
    notes = _seed_recipe(a, request)[1] if a.encoding == SEED else ()
    dropped = "the split into factors, projections and vectors: training as TinyLoRA cannot resume from the result"
    return replace(_to_lora.fold(a, request, changes(a, request), dropped=dropped), notes=notes)


edges = seeded.edges(Edge("lora", Grade.EQUIVALENT, _fold))


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from seeded.findings(a)
    r, broken = positive(a.config, "r", 2), False
    for module in a.modules:
        try:
            one, other = _factors_of(a, module)
            if a.encoding == PROJECTION:
                _projection(a, module)
        except InvalidFile as e:
            broken = True
            yield Finding("half-pair", module, e.message, "train or save the adapter again")
            continue
        if one.shape[0] != min(r, one.shape[1], other.shape[0]):
            what = f"the config says rank {r}, A has {one.shape[0]}"
            yield Finding("rank-mismatch", module, what, f"set r to {one.shape[0]}")
    if broken:
        return
    try:
        _vectors(a)
    except InvalidFile as e:
        yield Finding("missing-vector", "tinylora_v", e.message, "train or save the adapter again")
    except Unsupported as e:
        yield Finding("unknown-order", "tinylora_v", e.message, e.hint, warning=True)
    yield from seeded.unproven(a, "other base dtypes and builds of torch redraw others")
