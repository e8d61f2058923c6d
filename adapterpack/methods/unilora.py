"""UniLoRA (Li et al. 2025): plain LoRA whose every element is one of a short vector's, scaled.

    A = theta[indices_A] * scales_A,   B = theta[indices_B] * scales_B,   delta W = B @ A

Each element of theta stands equally often in all matrices together, to one; a scale is 1 / sqrt(how often).
Encodings: `projection` holds indices and scales (PEFT's `save_indices`); `seed` holds theta alone, and what it means
follows from `proj_seed`, the shapes of all modules, and their order in the model. It is plain LoRA with A and B.
Reference: peft/tuners/unilora/model.py (`generate_index`, `_assign_unilora_indices_and_scales`) and layer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from adapterpack import recipes as recipe_words
from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Outcome, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported, WrongBase
from adapterpack.methods import _model_order, _to_lora
from adapterpack.methods._changes import LowRankChange, logical_shape, replacements
from adapterpack.methods._keys import KeyTable, flag, positive, require
from adapterpack.methods._seeded import PROJECTION, SEED, Drawn, Seeded
from adapterpack.methods._targets import targeted
from adapterpack.recipes import METADATA_KEY, BalancedRecipe, Indices, Recipe
from adapterpack.tensor import BF16, DTYPES, F16, F32, DType, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

peft_type = "UNILORA"
THETA = "unilora_theta_d"
_PARTS = ("indices_A", "scales_A", "indices_B", "scales_B")
keep_dtype: frozenset[str] = frozenset({"indices_A", "indices_B"})
keys = KeyTable("unilora_", {name: f"unilora_{name}" for name in _PARTS}, shared=(THETA,))
_I64 = DTYPES["I64"]


def parse(c: Checkpoint) -> Adapter:
    a = keys.parse(c, "unilora", PROJECTION, alone=True)
    if THETA not in a.shared:
        raise InvalidFile(f"{c.name} lacks base_model.{THETA}", hint="the adapter was saved incompletely")
    if len(a.shared[THETA].tensor.shape) != 1 or not a.shared[THETA].tensor.shape[0]:
        raise InvalidFile(f"{a.shared[THETA].key} has shape {a.shared[THETA].tensor.shape}; a vector is wanted")
    if a.modules:
        return a
    modules: dict[str, dict[str, Param]] = {}
    if METADATA_KEY in a.metadata and (recorded := recipe_words.from_metadata(a.metadata)) is not None:
        modules = {module: {} for module in _recorded(a, recorded)}
    return replace(a, encoding=SEED, modules=modules)


def _matrices(module: str, parts: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """(out, r, in) of a module. Raises InvalidFile: its matrices do not fit together."""
    index_a, scale_a, index_b, scale_b = (parts[name] for name in _PARTS)
    fits = len(index_a.shape) == len(index_b.shape) == 2 and index_a.shape[0] == index_b.shape[1] > 0
    same = index_a.shape == scale_a.shape and index_b.shape == scale_b.shape
    if not fits or not same or {index_a.dtype, index_b.dtype} != {_I64} or scale_a.dtype.kind != "float":
        shapes = ", ".join(f"{name} {parts[name].dtype} {parts[name].shape}" for name in _PARTS)
        raise InvalidFile(f"{module}: these do not fit together: {shapes}")
    return index_b.shape[0], index_a.shape[0], index_a.shape[1]


def _saved(a: Adapter, module: str) -> Mapping[str, Tensor]:
    parts = dict(zip(_PARTS, require(module, a.modules[module], _PARTS), strict=True))
    _matrices(module, parts)
    return parts


def ranks(a: Adapter) -> Mapping[str, int]:
    if a.encoding == SEED:
        return dict.fromkeys(a.modules, positive(a.config, "r", 4))
    return {module: _matrices(module, _saved(a, module))[1] for module in a.modules}


# -- indices and scales ----------------------------------------------------------------------------------


def _recipe(a: Adapter, sides: Mapping[str, tuple[int, int, int]], through: DType, stored: DType) -> BalancedRecipe:
    """Of these modules, (out, r, in) each, in the order of the model."""
    seed = a.config.get("proj_seed", 42)
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        raise InvalidFile(f"proj_seed is {seed!r:.60}; a whole number of at most 64 bits is wanted")
    found = []
    for module, (out, r, into) in sides.items():
        own = {name: a.modules[module][name].key for name in _PARTS if name in a.modules.get(module, {})}
        names = {name: own.get(name, keys.key(module, name)) for name in _PARTS}
        found.append(Indices(names["indices_A"], names["scales_A"], (r, into)))
        found.append(Indices(names["indices_B"], names["scales_B"], (out, r)))
    return BalancedRecipe(seed, tuple(found), a.shared[THETA].tensor.shape[0], through, stored)


def recipes(a: Adapter) -> Iterator[Recipe]:
    """How the saved ones may have been drawn, in the likeliest order of the modules: what they are proves it."""
    if a.encoding != PROJECTION:
        return
    sides = {m: _matrices(m, _saved(a, m)) for m in _model_order.in_order(a.modules)[0]}
    kept = {parts["scales_A"].tensor.dtype for parts in a.modules.values()}
    if len(kept) == 1 and (stored := kept.pop()) in (F32, BF16, F16):
        for through in (F32, BF16, F16):
            if stored is F32 or through is stored:
                yield _recipe(a, sides, through, stored)


def _redrawn(a: Adapter, request: Request) -> tuple[Drawn, tuple[str, ...]]:
    shapes = request.shapes
    if shapes is None:
        raise WrongBase(
            "UniLoRA without saved indices needs the base: which modules there are, their shapes and their order",
            hint="--base BASE with its safetensors files; only their headers are read",
        )
    meant, known = _model_order.in_order(targeted(a.config, shapes.modules()))
    if not meant:
        raise WrongBase("the base has none of the modules that target_modules names")
    if not known:
        raise Unsupported(
            "the order in which the model defines these modules is not known, and UniLoRA draws by it",
            hint="save the adapter with PEFT and save_indices: then nothing needs to be drawn",
        )
    r, sides = positive(a.config, "r", 4), {}
    for module in meant:
        shape = logical_shape(a, module, shapes)
        if len(shape) != 2:
            raise Unsupported(f"{module}.weight has shape {shape}: UniLoRA has linear layers only")
        sides[module] = (shape[0], r, shape[1])
    dtypes = (
        {shapes.tensor(f"{m}.weight").dtype for m in meant} if request.base_dtype is None else {request.base_dtype}
    )
    if len(dtypes) != 1:
        raise Unsupported("the base has several dtypes, and the scales are rounded to each module's")
    recipe = _recipe(a, sides, dtypes.pop(), F32)
    note = (
        f"indices and scales were drawn from seed {recipe.seed} for the {len(meant)} modules that target_modules"
        f" names in the base, and scales rounded through {recipe.through}: unverified, for no digest was recorded"
    )
    return recipe.draw(), (note,)


def _recorded(a: Adapter, recorded: Recipe) -> dict[str, dict[str, str]]:
    """Module to parameter name to the name that the recipe has for it."""
    found: dict[str, dict[str, str]] = {}
    for name in recorded.shapes:
        module, part = keys.split(name) or ("", "")
        found.setdefault(module, {})[part] = name
    good = isinstance(recorded, BalancedRecipe) and recorded.length == a.shared[THETA].tensor.shape[0]
    if not good or any(set(parts) != set(_PARTS) for parts in found.values()):
        raise InvalidFile("the recorded recipe does not draw the indices of this adapter")
    return found


def _checked(a: Adapter, recorded: Recipe) -> None:
    _recorded(a, recorded)


def _filled(a: Adapter, drawn: Drawn, recorded: Recipe | None) -> Adapter:
    modules: dict[str, dict[str, Param]] = {}
    for key, tensor in drawn.items():
        module, part = keys.split(key) or ("", "")
        modules.setdefault(module, {})[part] = Param(key, tensor)
    return replace(a, modules=modules)


def _where(recipe: Recipe) -> str:
    assert isinstance(recipe, BalancedRecipe)
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return f"stock PEFT draws the same when the base is loaded in {names[recipe.through.name]}"


seeded = Seeded(
    switch="save_indices",
    default=False,
    seed="proj_seed",
    what="indices and scales",
    stored=lambda a: {a.modules[m][name].key: t for m in a.modules for name, t in _saved(a, m).items()},
    candidates=recipes,
    bare=lambda a: replace(a, modules={m: {} for m in a.modules}),
    filled=_filled,
    redrawn=_redrawn,
    checked=_checked,
    where=_where,
    absent="PEFT draws them anew",
)


# -- the changes -----------------------------------------------------------------------------------------


def _by_module(a: Adapter, request: Request) -> tuple[Mapping[str, Mapping[str, Tensor]], tuple[str, ...]]:
    """The matrices of each module, and what the user should know of them."""
    if a.encoding == PROJECTION:
        return {m: _saved(a, m) for m in a.modules}, ()
    drawn, notes = seeded.drawn(a, request)
    filled = _filled(a, drawn, None)
    return {m: {n: p.tensor for n, p in parts.items()} for m, parts in filled.modules.items()}, notes


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    theta = a.shared[THETA]
    for module, parts in _by_module(a, request)[0].items():
        out, r, into = _matrices(module, parts)
        own = a.modules.get(module, {})
        yield LowRankChange(
            module=module,
            factors=partial(_factors, module, theta.tensor, parts),
            shape=(out, into),
            rank=r,
            scale=1.0,
            uses=frozenset({theta.key, *(p.key for p in own.values())}),
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
        )


def _factors(module: str, theta: Tensor, parts: Mapping[str, Tensor], xp: Backend) -> tuple[Array, Array]:
    vector = xp.f32(theta)

    def matrix(side: str) -> Array:
        indices = xp.native(parts[f"indices_{side}"])
        if not (int(indices.min()) >= 0 and int(indices.max()) < len(vector)):
            raise InvalidFile(f"{module}: an index of {side} lies outside of theta, which has {len(vector)} elements")
        return vector[indices] * xp.f32(parts[f"scales_{side}"])

    return matrix("B"), matrix("A")


def _fold(a: Adapter, request: Request) -> Outcome:
    notes = _by_module(a, request)[1]
    dropped = "the one vector that all factors consist of: training as UniLoRA cannot resume from the result"
    return replace(_to_lora.fold(a, request, changes(a, request), dropped=dropped), notes=notes)


edges = seeded.edges(Edge("lora", Grade.EQUIVALENT, _fold))


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from seeded.findings(a)
    length, said = a.shared[THETA].tensor.shape[0], positive(a.config, "theta_d_length", 256, 1 << 40)
    if length != said:
        what = f"the config says {said} elements, theta has {length}: PEFT does not load it"
        yield Finding("theta-length", a.shared[THETA].key, what, f"set theta_d_length to {length}")
    for module in a.modules if a.encoding == PROJECTION else ():
        try:
            _saved(a, module)
        except InvalidFile as e:
            yield Finding("half-pair", module, e.message, "train or save the adapter again")
    yield from seeded.unproven(a, "other base dtypes, and models that define their modules otherwise, draw others")
