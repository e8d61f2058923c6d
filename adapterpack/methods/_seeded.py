"""Frozen tensors that stand in the file or are left to a seed: the two encodings, and the ways between them.

`projection` holds them, `seed` leaves them to the config's seed, with a recorded recipe that gives them back bit for
bit where it was this tool that left them out. Which tensors, and how they may have been drawn, each method says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapterpack import recipes as recipe_words
from adapterpack.adapter import Adapter, Edge, Finding, Grade, Need, Outcome, Request
from adapterpack.errors import InvalidFile, LossRefused
from adapterpack.methods._keys import flag
from adapterpack.recipes import FUSED, METADATA_KEY, TWO_ROUNDINGS, Recipe
from adapterpack.tensor import Tensor

PROJECTION, SEED = "projection", "seed"
Drawn = Mapping[str, Tensor]


def whole_seed(config: Mapping[str, Any], field: str, default: int) -> int:
    """A seed as torch's generators take it. Raises InvalidFile for anything else."""
    seed = config.get(field, default)
    if type(seed) is not int or not -(1 << 63) <= seed < 1 << 64:
        raise InvalidFile(f"{field} is {seed!r:.60}; a 64-bit whole number is wanted")
    return seed


@dataclass(frozen=True)
class Seeded:
    """What one method has to say of its seeded tensors.

    Attributes:
        switch: The config field that tells PEFT to save them.
        default: Its default.
        seed: The config field with the seed.
        what: The tensors in words, `both projections`.
        key: The shared tensor or module parameter that a finding names.
        stored: The tensors of a `projection` file, by the names that its recipes have.
        candidates: How they may have been drawn.
        bare: The adapter without them.
        filled: The adapter with them.
        redrawn: Without a recorded recipe: the tensors, and what the user should know of them.
        checked: Raises InvalidFile if a recorded recipe draws something else than this method has.
        where: When stock PEFT draws the same as a recipe, one sentence.
        needs: Of the base, to draw without a recorded recipe.
        absent: What PEFT does where the switch is set and the tensors are not there.
    """

    switch: str
    default: bool
    seed: str
    what: str
    stored: Callable[[Adapter], Drawn]
    candidates: Callable[[Adapter], Iterator[Recipe]]
    bare: Callable[[Adapter], Adapter]
    filled: Callable[[Adapter, Drawn, Recipe | None], Adapter]
    redrawn: Callable[[Adapter, Request], tuple[Drawn, tuple[str, ...]]]
    checked: Callable[[Adapter, Recipe], None]
    where: Callable[[Recipe], str]
    needs: Need = Need.SHAPES
    absent: str = "PEFT refuses to load it"

    def drawn(self, a: Adapter, request: Request, torch: Any = None) -> tuple[Drawn, tuple[str, ...]]:
        """The tensors of either encoding, and what the user should know of them.

        Raises:
            InvalidFile: a recorded recipe is another method's, or a digest does not agree.
            WrongBase: the seed alone is there, and no base tells what it takes to draw from it.
        """
        if a.encoding == PROJECTION:
            return self.stored(a), ()
        recorded = recipe_words.from_metadata(a.metadata)
        if recorded is None:
            return self.redrawn(a, request)
        self.checked(a, recorded)
        return recorded.draw(torch), ()

    def edges(self, *own: Edge) -> Mapping[str, tuple[Edge, ...]]:
        """Between the two encodings; `own` are the edges that both have."""
        return {
            PROJECTION: (Edge(SEED, Grade.LOSSLESS, self._to_seed), *own, Edge(PROJECTION, Grade.LOSSLESS, same)),
            SEED: (
                Edge(PROJECTION, Grade.LOSSLESS, self._to_projection, needs=self.needs),
                *own,
                Edge(SEED, Grade.LOSSLESS, same),
            ),
        }

    def _to_seed(self, a: Adapter, request: Request) -> Outcome:
        wanted, tried = self.stored(a), 0
        for recipe in self.candidates(a):
            tried += 1
            drawn = recipe.draw(request.xp.torch)
            if drawn.keys() == wanted.keys() and all(drawn[name].equals(wanted[name]) for name in wanted):
                return Outcome(
                    self._without(a, recipe, drawn),
                    Grade.LOSSLESS,
                    dropped=(f"{self.what}: the recorded recipe gives them back bit for bit",),
                    notes=(self.where(recipe),),
                )
        if request.max_error is not None and tried:
            return self._to_nearest_seed(a, request)
        raise LossRefused(
            f"no recipe gives the stored projections back bit for bit ({tried} tried for seed"
            f" {a.config.get(self.seed, 0)}): they come from another seed, method version or machine",
            hint="keep the projections, or allow a measured error with --max-error",
        )

    def _to_nearest_seed(self, a: Adapter, request: Request) -> Outcome:
        """The recipe nearest to what is stored; the job measures the error and holds it against the bound."""
        xp, wanted = request.xp, self.stored(a)

        def distance(recipe: Recipe) -> float:
            drawn = recipe.draw(xp.torch)
            return sum(float((xp.f64(drawn[name]) - xp.f64(wanted[name])).norm()) for name in wanted)

        best = min(self.candidates(a), key=distance)
        return Outcome(
            self._without(a, best, best.draw(xp.torch)),
            Grade.APPROXIMATE,
            dropped=(f"{self.what}: the recorded recipe gives others, near to them",),
            notes=(self.where(best),),
        )

    def _without(self, a: Adapter, recipe: Recipe, drawn: Drawn) -> Adapter:
        spelled = {name: p.key for name, p in a.shared.items() if name in drawn}
        return replace(
            self.bare(a),
            encoding=SEED,
            config={**a.config, self.switch: False},
            metadata={**a.metadata, METADATA_KEY: recipe.proven(drawn, spelled).to_metadata()},
            changed=True,
        )

    def _to_projection(self, a: Adapter, request: Request) -> Outcome:
        recorded = recipe_words.from_metadata(a.metadata)
        drawn, notes = self.drawn(a, request, request.xp.torch)
        return Outcome(
            replace(
                self.filled(a, drawn, recorded),
                encoding=PROJECTION,
                config={**a.config, self.switch: True},
                metadata={k: v for k, v in a.metadata.items() if k != METADATA_KEY},
                changed=True,
            ),
            Grade.LOSSLESS if recorded is not None else Grade.EQUIVALENT,
            notes=notes,
        )

    def findings(self, a: Adapter) -> Iterator[Finding]:
        """What is wrong with the switch, or may be with a seed."""
        said = flag(a.config, self.switch, self.default)
        if said != (a.encoding == PROJECTION):
            what = f"holds no projections: {self.absent}" if said else "holds them: PEFT ignores them"
            yield Finding(
                "wrong-projection-flag",
                self.switch,
                f"the config says {str(said).lower()}, the file {what}",
                f"set {self.switch} to {str(not said).lower()} in adapter_config.json",
            )

    def unproven(self, a: Adapter, why: str) -> Iterator[Finding]:
        """A warning if nothing but the seed tells what the tensors were."""
        if a.encoding == SEED and recipe_words.from_metadata(a.metadata) is None:
            yield Finding(
                "unproven-seed",
                self.seed,
                f"the projections are left to the seed and no digest was recorded: {why}",
                "adapterpack convert --to projection --base BASE on the machine type of the training",
                warning=True,
            )


def same(a: Adapter, request: Request) -> Outcome:
    """To the encoding that it has."""
    return Outcome(a, Grade.LOSSLESS, notes=(f"it already is in the {a.encoding} encoding",))


def where_drawn(arithmetic: str, through: str) -> str:
    """When stock PEFT draws the same uniform numbers."""
    cpu = {
        FUSED: "an x86 CPU with AVX2 or better",
        TWO_ROUNDINGS: "a CPU path without fused multiply-add (ATEN_CPU_CAPABILITY=default)",
    }[arithmetic]
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return (
        f"stock PEFT redraws the same projections when the base is loaded in {names[through]} on {cpu};"
        " adapterpack redraws them anywhere"
    )
