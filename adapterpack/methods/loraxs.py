"""LoRA-XS (Balazy et al. 2024): a small trained matrix between factors that the base's singular vectors give.

    delta W = s * B @ R @ A,   R (r, r) is trained; A (r, in) = diag(S) V^T and B (out, r) = U of the base's SVD

It is no method of PEFT: its authors patch PEFT's LoRA, so that the config says LORA. PEFT itself drops R when it
loads such a file, and adds B @ A, a part of W once more. The change has exact LoRA factors, B @ R and A. Encodings:
`loraxs` holds A, B and R; `seed` holds R, and how an SVD of the base gives A and B back, with their digests.
Reference: utils/latent_utils.py, utils/initialization_utils.py and utils/svd_utils.py of
github.com/MohammadrezaBanaei/LoRA-XS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterpack import limits
from adapterpack import recipes as recipe_words
from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Need, Outcome, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, LossRefused, Unsupported, WrongBase
from adapterpack.methods import _lora_variants, lora
from adapterpack.methods._changes import LowRankChange, replacements
from adapterpack.methods._keys import KeyTable, flag, require
from adapterpack.methods._lora_modules import Module, Scaling, modules
from adapterpack.methods._of_base import linear_shape
from adapterpack.methods._seeded import SEED, same
from adapterpack.methods._without import no_recipes
from adapterpack.recipes import METADATA_KEY, Factored, SvdRecipe, ways
from adapterpack.tensor import BF16, F16, F32, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

name = "loraxs"
peft_type = "LORA"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
_MARK = "lora_latent"
_OLD, _NEW = "_lora_latent_mapping.weight", ".default_lora_latent_mapping.weight"
"""How older PEFT spelled the key, which took `.default` out wherever it stood, and how PEFT does now."""
_FACTORS = ("lora_A", "lora_B")
keys = KeyTable("lora_", {**_lora_variants.KEYS.params, "latent": _NEW.removeprefix(".")})


def claims(c: Checkpoint) -> bool:
    """Has it latent mappings? Its config does not tell."""
    return any(_MARK in key for key in c.tensors)


def parse(c: Checkpoint) -> Adapter:
    spelled = {_spelled(key): key for key in c.tensors}
    if len(spelled) != len(c.tensors):
        raise InvalidFile(f"{c.name} has one latent mapping under two names")
    renamed = replace(c, tensors={new: c.tensors[key] for new, key in spelled.items()})
    a = _lora_variants.parse(renamed, name, keys, _MARK)
    # The file keeps its own spelling.
    own = {m: {n: replace(p, key=spelled[p.key]) for n, p in params.items()} for m, params in a.modules.items()}
    lean = METADATA_KEY in c.metadata and not any(n in params for params in own.values() for n in _FACTORS)
    return replace(a, encoding=SEED if lean else name, modules=own, source=c)


def _spelled(key: str) -> str:
    if key.endswith(_OLD) and not key.endswith(_NEW):
        return key.removesuffix(_OLD) + _NEW
    return key


@dataclass(frozen=True)
class _Latent:
    """A module's tensors.

    Attributes:
        a: (r, in).
        b: (out, r).
        r: (r, r).
    """

    a: Tensor
    b: Tensor
    r: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the change."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def whole(self) -> _Latent:
        return self

    def factors(self, xp: Backend) -> tuple[Array, Array]:
        """B @ R, (out, r), and A, (r, in), f32."""
        # (B @ R) @ A, in the order of get_delta_weight.
        return xp.f32(self.b) @ xp.f32(self.r), xp.f32(self.a)


@dataclass(frozen=True)
class _Lean:
    """A module whose A and B are left to the base.

    Attributes:
        r: (r, r).
        weight: The base's, (out, in); None: there is no base.
        recipe, of: How the weight gives A and B.
    """

    r: Tensor
    weight: Tensor | None
    recipe: SvdRecipe
    of: Factored

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the change."""
        return self.of.shape[0], self.of.shape[1]

    @property
    def rank(self) -> int:
        return self.of.rank

    def whole(self) -> _Latent:
        """With A and B, computed anew and proven.

        Raises:
            WrongBase: there is no base.
            InvalidFile, Unsupported: see `SvdRecipe.factors`.
        """
        if self.weight is None:
            raise WrongBase(f"A and B of {self.of.name} are left to the base's weights", hint="--base BASE")
        return _Latent(*self.recipe.factors(self.of, self.weight), self.r)

    def factors(self, xp: Backend) -> tuple[Array, Array]:
        """B @ R, (out, r), and A, (r, in), f32; see `whole`."""
        return self.whole().factors(xp)


def _latent(m: Module) -> _Latent:
    """Raises InvalidFile where the tensors do not fit each other."""
    if m.params.keys() == {"latent"}:
        raise InvalidFile(
            f"{m.name} has R alone: A and B are not stored, and a randomised SVD of the base gives others elsewhere",
            hint="save the adapter again where it was trained, with A and B",
        )
    a, b, r = require(m.name, m.params, (*_FACTORS, "latent"))
    rank = a.shape[0] if len(a.shape) == len(b.shape) == 2 else 0
    if not rank or b.shape[1] != rank or r.shape != (rank, rank):
        raise InvalidFile(f"{m.name}: A {a.shape}, B {b.shape} and R {r.shape} are not (r, in), (out, r) and (r, r)")
    return _Latent(a, b, r)


def _lean(m: Module, recipe: SvdRecipe, drawn: Mapping[str, Factored], weight: Tensor | None) -> _Lean:
    """Raises InvalidFile where R does not fit what was recorded."""
    (r,) = require(m.name, m.params, ("latent",))
    of = drawn[m.name]
    if r.shape != (of.rank, of.rank):
        raise InvalidFile(f"{m.name}: R is {r.shape}, and a part of rank {of.rank} was recorded")
    return _Lean(r, weight, recipe, of)


def _latents(a: Adapter, request: Request | None) -> Iterator[tuple[Module, _Latent | _Lean]]:
    """Every module in its encoding.

    Args:
        request: With the base; None: shapes are all that is asked for.

    Raises:
        InvalidFile: tensors that do not fit each other, or a recipe that is another adapter's.
        WrongBase: the base's weight has another shape, or there is none.
    """
    if a.encoding != SEED:
        yield from ((m, _latent(m)) for m in modules(a))
        return
    recipe = _recorded(a)
    drawn = {d.name: d for d in recipe.draws}
    for m in modules(a):
        weight = None if request is None else _weight(a, m.name, drawn[m.name].shape, request)
        yield m, _lean(m, recipe, drawn, weight)


def _recorded(a: Adapter) -> SvdRecipe:
    """How A and B come of the base. Raises InvalidFile unless it is said of the very modules that R is there of."""
    recipe = recipe_words.from_metadata(a.metadata)
    if not isinstance(recipe, SvdRecipe):
        raise InvalidFile(f"A and B are not in {a.source.name}, and its recipe is not one that gives them")
    wanted = {m: [(m, n) for n in _FACTORS] for m in a.modules}
    if {d.name: [keys.split(d.a), keys.split(d.b)] for d in recipe.draws} != wanted or len(recipe.draws) != len(
        wanted
    ):
        raise InvalidFile(f"the recorded recipe does not give A and B of the modules that {a.source.name} has")
    return recipe


def _weight(a: Adapter, module: str, shape: tuple[int, ...], request: Request) -> Tensor | None:
    """The base's weight of a linear layer, (out, in); None: there is no base."""
    if request.shapes is None:
        return None
    linear_shape(a, module, request, out=shape[0], into=shape[1])
    return request.shapes.tensor(f"{module}.weight")


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    scaling = Scaling(a.config)
    for m, latent in _latents(a, request):
        scale = scaling(m.name, latent.rank)
        yield LowRankChange(
            module=m.name,
            factors=latent.factors,
            shape=latent.shape,
            rank=latent.rank,
            scale=scale,
            uses=frozenset(m.params[n].key for n in (*_FACTORS, "latent") if n in m.params),
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            torch=True,
            # B @ R is a sum of r products in f32.
            factor_noise=2.0 * (1 + latent.rank**0.5),
        )
        yield from lora.biases(m, latent.shape[0], scale)


def ranks(a: Adapter) -> Mapping[str, int]:
    return {m.name: latent.rank for m, latent in _latents(a, None)}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    recipe = _recorded(a) if a.encoding == SEED else None
    drawn = {} if recipe is None else {d.name: d for d in recipe.draws}

    def rank(m: Module) -> int:
        return (_latent(m) if recipe is None else _lean(m, recipe, drawn, None)).rank

    yield from lora.pair_findings(a, rank)
    misread, more = "PEFT drops the trained R and adds B @ A, a part of the base itself", ""
    if recipe is not None:
        misread, more = _UNREAD, " --base BASE"
    yield Finding(
        "misread-by-peft",
        a.source.name,
        f"it is LoRA-XS, and its config says LORA: {misread}",
        f"adapterpack convert SRC DST --to lora{more}: plain LoRA that does the same",
    )


_UNREAD = "PEFT finds neither A nor B, drops the trained R, and changes nothing"


def _plain(a: Adapter, request: Request) -> Outcome:
    pairs = {}
    for m, latent in _latents(a, request):
        whole = latent.whole()
        b, _ = whole.factors(request.xp)
        pairs[m.name] = {"lora_A": whole.a, "lora_B": request.xp.tensor(b)}
    gone = "R by itself: training as LoRA-XS cannot resume from the result"
    return _lora_variants.plain(_without_recipe(a), "", pairs, dropped=gone)


def _without_recipe(a: Adapter) -> Adapter:
    if a.encoding != SEED:
        return a
    return replace(a, metadata={k: v for k, v in a.metadata.items() if k != METADATA_KEY})


def _to_factors(a: Adapter, request: Request) -> Outcome:
    made: dict[str, Mapping[str, Param]] = {}
    for m, latent in _latents(a, request):
        assert isinstance(latent, _Lean)
        whole = latent.whole()
        made[m.name] = {"lora_A": Param(latent.of.a, whole.a), "lora_B": Param(latent.of.b, whole.b), **m.params}
    return Outcome(replace(_without_recipe(a), encoding=name, modules=made, changed=True), Grade.LOSSLESS)


def _to_seed(a: Adapter, request: Request) -> Outcome:
    """R alone, where an SVD of the base gives the stored A and B bit for bit, or with `max_error` near to them."""
    latents = {m.name: _latent(m) for m in modules(a)}
    stored = {t.dtype for latent in latents.values() for t in (latent.a, latent.b)}
    if len(stored) > 1 or not stored <= {F32, BF16, F16}:
        raise LossRefused(f"A and B are of the dtypes {', '.join(sorted(map(str, stored)))}: no one SVD gives them")
    draws, weights = _drawn(a, request, latents)
    tried = list(ways(draws, stored.pop()))
    for recipe in tried:
        digests = _digests(recipe, weights, latents)
        if digests is not None:
            return _lean_outcome(a, recipe, digests, Grade.LOSSLESS)
    if request.max_error is None:
        raise LossRefused(
            f"TruncatedSVD of the base does not give the stored A and B back bit for bit ({len(tried)} ways tried):"
            " they come from another machine, library, base or initialisation",
            hint="keep A and B, or allow a measured error with --max-error",
        )
    # One module tells the ways apart; the job measures all of them.
    first, xp = draws[0], request.xp
    own = latents[first.name]

    def distance(recipe: SvdRecipe) -> float:
        found_a, found_b = recipe.factors(first, weights[first.name])
        return sum(float((xp.f64(x) - xp.f64(y)).norm()) for x, y in ((found_a, own.a), (found_b, own.b)))

    nearest = min(tried, key=distance)
    digests = _digests(nearest, weights, None)
    assert digests is not None
    return _lean_outcome(a, nearest, digests, Grade.APPROXIMATE)


def _drawn(
    a: Adapter, request: Request, latents: Mapping[str, _Latent]
) -> tuple[tuple[Factored, ...], Mapping[str, Tensor]]:
    """What an SVD is to give, and the weights that it is of.

    Raises:
        WrongBase: no base, or another's shapes.
        LossRefused: A and B are larger than an SVD's.
    """
    draws, weights = [], {}
    for module, latent in latents.items():
        weight = _weight(a, module, latent.shape, request)
        if weight is None:
            raise WrongBase("A and B are left out only where the base's weights give them back", hint="--base BASE")
        if latent.rank > min(latent.shape):
            raise LossRefused(f"{module}: an SVD of {latent.shape} has no part of rank {latent.rank}")
        weights[module] = weight
        key_a, key_b = (a.modules[module][n].key for n in _FACTORS)
        draws.append(Factored(module, key_a, key_b, latent.shape, latent.rank))
    return tuple(draws), weights


def _digests(
    recipe: SvdRecipe, weights: Mapping[str, Tensor], wanted: Mapping[str, _Latent] | None
) -> Mapping[str, str] | None:
    """Key to SHA-256 of what the base gives, module by module; None where that is not what is wanted."""
    digests: dict[str, str] = {}
    for d in recipe.draws:
        a, b = recipe.factors(d, weights[d.name])
        if wanted is not None and not (a.equals(wanted[d.name].a) and b.equals(wanted[d.name].b)):
            return None
        digests |= {d.a: a.digest(), d.b: b.digest()}
    return digests


def _lean_outcome(a: Adapter, recipe: SvdRecipe, digests: Mapping[str, str], grade: Grade) -> Outcome:
    text = replace(recipe, digests=digests).to_metadata()
    if len(text) > limits.METADATA_BYTES // 2:
        raise Unsupported(f"the digests of {len(a.modules):,} modules are more than a header holds")
    made = replace(
        a,
        encoding=SEED,
        modules={m: {n: p for n, p in own.items() if n not in _FACTORS} for m, own in a.modules.items()},
        metadata={**a.metadata, METADATA_KEY: text},
        changed=True,
    )
    back = "back bit for bit" if grade is Grade.LOSSLESS else "as others, near to them"
    libraries = ", ".join(f"{n} {v}" for n, v in sorted(recipe.libraries.items()))
    notes = (
        f"stock PEFT cannot read it: {_UNREAD}",
        f"an SVD of the base gives A and B again with {libraries}; elsewhere it may give others, and then the file is"
        " refused",
    )
    return Outcome(made, grade, dropped=(f"A and B: the recorded recipe and the base give them {back}",), notes=notes)


_OF_BASE = Need.SHAPES | Need.WEIGHTS
edges: Mapping[str, tuple[Edge, ...]] = {
    # No need of shapes by itself: with A and B there, the change is known without the base.
    name: (
        Edge("lora", Grade.EQUIVALENT, _plain),
        Edge(SEED, Grade.LOSSLESS, _to_seed, needs=Need.WEIGHTS),
        Edge(name, Grade.LOSSLESS, same),
    ),
    SEED: (
        Edge("lora", Grade.EQUIVALENT, _plain, needs=_OF_BASE),
        Edge(name, Grade.LOSSLESS, _to_factors, needs=_OF_BASE),
        Edge(SEED, Grade.LOSSLESS, same),
    ),
}
