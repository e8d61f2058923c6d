"""What VeRA and PVeRA share: two frozen random projections for all modules, two trained vectors for each.

    delta W = (lambda_b[:, None] * B[:out]) @ (lambda_d[:r, None] * A[:r, :in])

PVeRA's A and lambda_d have a second half, for the variance of a distribution whose mean the first half gives; merging
takes the mean. Reference: peft/tuners/vera/model.py (`_init_vera_A_vera_B`) and layer.py, peft/tuners/pvera likewise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Kind, Need, Outcome, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, WrongBase
from adapterpack.methods import _to_lora
from adapterpack.methods._changes import LowRankChange, linear_kind, replacements
from adapterpack.methods._keys import KeyTable, flag, positive, require
from adapterpack.methods._seeded import PROJECTION, SEED, Drawn, Seeded, where_drawn, whole_seed
from adapterpack.recipes import FUSED, TWO_ROUNDINGS, Recipe, Uniform, UniformRecipe
from adapterpack.tensor import BF16, F16, F32, DType, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend


@dataclass(frozen=True)
class Vectors:
    """One of the methods.

    Attributes:
        title: How it is called.
        prefix: How its tensors begin, `vera_`.
        halves: 2 where A and lambda_d have a second half.
    """

    title: str
    prefix: str
    halves: int = 1

    @property
    def a(self) -> str:
        return f"{self.prefix}A"

    @property
    def b(self) -> str:
        return f"{self.prefix}B"

    @cached_property
    def keys(self) -> KeyTable:
        names = {name: f"{self.prefix}{name}" for name in ("lambda_b", "lambda_d")}
        return KeyTable(self.prefix, names, shared=(self.a, self.b))

    def parse(self, c: Checkpoint) -> Adapter:
        a = self.keys.parse(c, self.title.lower(), PROJECTION)
        if not a.shared:
            return replace(a, encoding=SEED)
        if set(a.shared) != {self.a, self.b}:
            raise InvalidFile(f"{c.name} holds one projection of two")
        return a

    def vectors(self, a: Adapter, module: str) -> tuple[Tensor, Tensor]:
        """(lambda_b, lambda_d) of a module. Raises InvalidFile: they are no vectors, or no two halves."""
        lambda_b, lambda_d = require(module, a.modules[module], ("lambda_b", "lambda_d"))
        if len(lambda_b.shape) != 1 or len(lambda_d.shape) != 1:
            raise InvalidFile(f"{module}: lambda_b {lambda_b.shape} and lambda_d {lambda_d.shape} are vectors")
        if lambda_d.shape[0] % self.halves:
            raise InvalidFile(f"{module}: lambda_d {lambda_d.shape} has no two halves")
        return lambda_b, lambda_d

    def ranks(self, a: Adapter) -> Mapping[str, int]:
        return {m: self.vectors(a, m)[1].shape[0] // self.halves for m in a.modules}

    def _rank(self, a: Adapter) -> int:
        found = set(self.ranks(a).values())
        if len(found) != 1:
            raise InvalidFile(f"the modules have different ranks: {sorted(found)}")
        return found.pop()

    def _widest(self, a: Adapter) -> int:
        return max(self.vectors(a, m)[0].shape[0] for m in a.modules)

    def _inputs(self, a: Adapter, module: str, shapes: Shapes) -> int:
        """Input features of a module: no tensor of the file has that length, so the base must say."""
        out, target = self.vectors(a, module)[0].shape[0], f"{module}.weight"
        shape = shapes.shape(target)
        kind = linear_kind(target, shape, out, None, shapes.conv1d(module), flag(a.config, "fan_in_fan_out"))
        return shape[1] if kind is Kind.LINEAR else shape[0]

    def _need_shapes(self, request: Request) -> Shapes:
        if request.shapes is None:
            raise WrongBase(
                f"{self.title} needs the shapes of the base's modules: nothing in the adapter says how many inputs"
                " they have",
                hint="--base BASE; its config.json and safetensors headers are enough, no weights are read",
            )
        return request.shapes

    # -- the projections ---------------------------------------------------------------------------------

    def projections(self, a: Adapter, request: Request) -> tuple[Drawn, tuple[str, ...]]:
        """A and B, from the file, the recorded recipe or the seed; and what the user should know of it.

        Raises:
            WrongBase: the seed alone is there and no base tells the shapes.
            InvalidFile: the shapes do not fit together, or a recorded digest does not agree.
        """
        pair, notes = self.seeded.drawn(a, request)
        r, widest = self._rank(a), self._widest(a)
        shape_a, shape_b = pair[self.a].shape, pair[self.b].shape
        fits = len(shape_a) == len(shape_b) == 2 and shape_a[0] == r * self.halves and shape_b[1] == r
        if not fits or shape_b[0] < widest:
            raise InvalidFile(f"projections {shape_a} and {shape_b} do not fit rank {r} and {widest} outputs")
        return pair, notes

    @cached_property
    def seeded(self) -> Seeded:
        return Seeded(
            switch="save_projection",
            default=True,
            seed="projection_prng_key",
            what="both projections",
            stored=lambda a: {name: a.shared[name].tensor for name in (self.a, self.b)},
            candidates=self.recipes,
            bare=lambda a: replace(a, shared={}),
            filled=self._filled,
            redrawn=self._redrawn,
            checked=self._checked,
            where=lambda r: where_drawn(r.arithmetic, r.through.name) if isinstance(r, UniformRecipe) else "",
        )

    def _filled(self, a: Adapter, pair: Drawn, recorded: Recipe | None) -> Adapter:
        spelled = {} if recorded is None else recorded.keys
        return replace(a, shared={n: Param(spelled.get(n, f"base_model.{n}"), pair[n]) for n in (self.a, self.b)})

    def _checked(self, a: Adapter, recorded: Recipe) -> None:
        if not isinstance(recorded, UniformRecipe) or set(recorded.shapes) != {self.a, self.b}:
            raise InvalidFile(f"the recorded recipe does not draw {self.a} and {self.b}")
        for name, key in recorded.keys.items():
            if not self.keys.spells_shared(key, name):
                raise InvalidFile(f"the recorded recipe calls {name} {key!r:.100}")

    def _redrawn(self, a: Adapter, request: Request) -> tuple[Drawn, tuple[str, ...]]:
        shapes = self._need_shapes(request)
        through = request.base_dtype or shapes.dtype
        if through is None:
            raise WrongBase(
                f"the base does not say its dtype, through which PEFT rounds {self.title}'s projections",
                hint="--base-dtype float32, bfloat16 or float16",
            )
        into = max(self._inputs(a, m, shapes) for m in a.modules)
        recipe = self._recipe(a, into, self._widest(a), FUSED, through, F32)
        note = (
            f"the projections were drawn from seed {recipe.seed} as torch does on x86 CPUs with AVX2 (fused), rounded"
            f" through {through}: unverified, for no digest was recorded"
        )
        return recipe.draw(), (note,)

    def _recipe(
        self, a: Adapter, into: int, out: int, arithmetic: str, through: DType, stored: DType
    ) -> UniformRecipe:
        """`_init_vera_A_vera_B`: A, then B, from one generator; kaiming bounds as Python doubles."""
        seed, r = whole_seed(a.config, "projection_prng_key", 0), self._rank(a)

        def bound(fan: int) -> float:
            return math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan))

        draws = (Uniform(self.a, (r * self.halves, into), bound(into)), Uniform(self.b, (out, r), bound(r)))
        return UniformRecipe(seed=seed, draws=draws, arithmetic=arithmetic, through=through, stored=stored)

    def recipes(self, a: Adapter) -> Iterator[Recipe]:
        """Every way in which the stored projections may have been drawn; the likeliest first."""
        if a.encoding != PROJECTION:
            return
        shape_a, shape_b = a.shared[self.a].tensor.shape, a.shared[self.b].tensor.shape
        stored = a.shared[self.a].tensor.dtype
        if len(shape_a) != 2 or len(shape_b) != 2 or stored not in (F32, BF16, F16):
            return
        for through in (F32, BF16, F16):
            if stored is F32 or through is stored:
                for arithmetic in (FUSED, TWO_ROUNDINGS):
                    yield self._recipe(a, shape_a[1], shape_b[0], arithmetic, through, stored)

    # -- the changes -------------------------------------------------------------------------------------

    def changes(self, a: Adapter, request: Request) -> Iterator[Change]:
        yield from replacements(a)
        pair, _ = self.projections(a, request)
        fan_in_fan_out = flag(a.config, "fan_in_fan_out")
        shared_keys = {p.key for p in a.shared.values()}
        for module, params in a.modules.items():
            lambda_b, lambda_d = self.vectors(a, module)
            wide, rank = pair[self.a].shape[1], lambda_d.shape[0] // self.halves
            # Without a base two adapters can still be compared, over the whole width of A.
            into = wide if request.shapes is None else self._inputs(a, module, request.shapes)
            if into > wide:
                raise WrongBase(f"{module} has {into} inputs in the base; the projection is {wide} wide")
            yield LowRankChange(
                module=module,
                factors=partial(_factors, pair[self.a], pair[self.b], lambda_b, lambda_d, rank, into),
                shape=(lambda_b.shape[0], into),
                rank=rank,
                scale=1.0,
                uses=frozenset({p.key for p in params.values()} | shared_keys),
                fan_in_fan_out=fan_in_fan_out,
            )

    def _fold(self, a: Adapter, request: Request) -> Outcome:
        self._need_shapes(request)
        _, notes = self.projections(a, request)
        dropped = f"the split into projections and vectors: training as {self.title} cannot resume from the result"
        if flag(a.config, "sample_at_inference"):
            notes += (
                "sample_at_inference is set: PEFT draws around the mean in each forward pass; the result is the mean,"
                " as it is when PEFT merges",
            )
        return replace(_to_lora.fold(a, request, self.changes(a, request), dropped=dropped), notes=notes)

    @property
    def edges(self) -> Mapping[str, tuple[Edge, ...]]:
        return self.seeded.edges(Edge("lora", Grade.EQUIVALENT, self._fold, needs=Need.SHAPES))

    def findings(self, a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
        yield from self.seeded.findings(a)
        broken = False
        for module in a.modules:
            try:
                self.vectors(a, module)
            except InvalidFile as e:
                broken = True
                yield Finding("half-pair", module, e.message, "train or save the adapter again")
        if broken:
            return
        r = positive(a.config, "r", 256)
        for module, rank in self.ranks(a).items():
            if rank != r:
                yield Finding(
                    "rank-mismatch", module, f"the config says rank {r}, lambda_d has {rank}", f"set r to {rank}"
                )
        if a.encoding == PROJECTION:
            shape_a, shape_b = a.shared[self.a].tensor.shape, a.shared[self.b].tensor.shape
            if len(shape_a) != 2 or len(shape_b) != 2 or shape_b[0] < self._widest(a):
                yield Finding("projection-shape", a.shared[self.b].key, f"{shape_a} and {shape_b} are too small")
        yield from self.seeded.unproven(a, "other base dtypes and CPUs redraw others")


def _factors(
    frozen_a: Tensor, frozen_b: Tensor, lambda_b: Tensor, lambda_d: Tensor, rank: int, into: int, xp: Backend
) -> tuple[Array, Array]:
    vector_b, vector_d = xp.f32(lambda_b), xp.f32(lambda_d)[:rank]
    b = vector_b[:, None] * xp.f32(frozen_b)[: len(vector_b)]
    a = vector_d[:, None] * xp.f32(frozen_a)[:rank, :into]
    return b, a
