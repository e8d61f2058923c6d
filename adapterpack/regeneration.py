"""Seeded tensors drawn again, by numpy, by torch and on the device, and held against what is stored or recorded.

Which arithmetic made a stored tensor is not in any file: whether torch's multiply-add rounded once or twice, and
through which dtype of the base the draws went. It is found by trying, and said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterpack import recipes
from adapterpack.adapter import Adapter, Finding, Method, Request
from adapterpack.recipes import Recipe, UniformRecipe
from adapterpack.tensor import F32, DType, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

_MOST = 1 << 28
"""Numbers that are drawn to find out how a stored tensor was made, all attempts together."""
_SEEDS = ("projection_prng_key", "projection_seed", "proj_seed", "random_loc_seed", "random_seed")
"""What configs call the seed."""
RECORDED, STORED = "recorded digest", "stored tensor"


@dataclass(frozen=True)
class Regenerated:
    """One tensor, drawn again in one way.

    Attributes:
        side: `A` or `B`.
        name: Of the tensor, `vera_A`.
        by: Who drew: `numpy`, `torch cpu`, `torch cuda:0`.
        seed: Of the generator.
        arithmetic: `fused` or `two-roundings`; None where there is no such choice, or no recipe agrees.
        through: The dtype that the draws were rounded through; None as above.
        against: `recorded digest` or `stored tensor`.
        agrees: Bit for bit.
        sha256: Of what was drawn; None if nothing was.
    """

    side: str
    name: str
    by: str
    seed: int | None
    arithmetic: str | None
    through: str | None
    against: str
    agrees: bool
    sha256: str | None


def regenerate(side: str, method: Method, a: Adapter, request: Request) -> list[Regenerated]:
    """Draw the seeded tensors of an adapter again.

    Args:
        side: `A` or `B`, for the record.

    Returns:
        One entry for each tensor and each way of drawing it; none where nothing is seeded.

    Raises:
        InvalidFile: a recorded recipe makes no sense, or gives other tensors than were recorded.
    """
    recorded = recipes.from_metadata(a.metadata)
    if recorded is not None and recorded.takes_base:
        # The changes themselves draw it, and prove it, from the base's weights.
        return []
    if recorded is not None:
        return _by_all(side, recorded, recorded.digests, RECORDED, request.xp)
    stored = a.tensors() | {name: p.tensor for name, p in a.shared.items()}
    left, tried, digests = _MOST, 0, dict[str, str]()
    for recipe in method.recipes(a):
        left -= recipe.cost
        if left < 0 or recipe.takes_torch:
            break
        tried += 1
        drawn = recipe.draw()
        if not drawn.keys() <= stored.keys():
            continue
        digests |= {name: stored[name].digest() for name in drawn if name not in digests}
        if all(tensor.digest() == digests[name] for name, tensor in drawn.items()):
            return _by_all(side, recipe, {name: digests[name] for name in drawn}, STORED, request.xp)
    seed = next((a.config[f] for f in _SEEDS if type(a.config.get(f)) is int), None)
    return [Regenerated(side, name, "numpy", seed, None, None, STORED, False, None) for name in digests if tried]


def _by_all(side: str, recipe: Recipe, wanted: Mapping[str, str], against: str, xp: Backend) -> list[Regenerated]:
    """Whatever can draw this recipe does."""
    ways: dict[str, Mapping[str, Tensor]] = {} if recipe.takes_torch else {"numpy": recipe.draw()}
    # Plain uniform draws (VeRA, PVeRA): torch can be asked for them in one call each.
    if xp.name != "numpy" and isinstance(recipe, UniformRecipe):
        ways["torch cpu"] = by_torch(xp, recipe)
        if xp.device.type != "cpu":
            ways[xp.name] = on_device(xp, recipe)
    through = getattr(recipe, "through", None)
    found = []
    for by, drawn in ways.items():
        for name, tensor in drawn.items():
            sha256 = tensor.digest()
            # Kinds whose tensors have one digest together were proven by `draw`.
            agrees = sha256 == wanted.get(name, sha256)
            found.append(
                Regenerated(
                    side,
                    name,
                    by,
                    getattr(recipe, "seed", None),
                    getattr(recipe, "arithmetic", None),
                    through.name if isinstance(through, DType) else None,
                    against,
                    agrees,
                    sha256,
                )
            )
    return found


def by_torch(xp: Backend, recipe: UniformRecipe) -> dict[str, Tensor]:
    """What PEFT would draw with this torch on this machine: its own `uniform_`, on the CPU, whatever it rounds."""
    torch = xp.torch
    generator = torch.Generator("cpu").manual_seed(recipe.seed)
    drawn = {}
    for d in recipe.draws:
        values = torch.empty(d.shape, dtype=torch.float32).uniform_(-d.bound, d.bound, generator=generator)
        drawn[d.name] = xp.tensor(_cast(xp, values, recipe))
    return drawn


def on_device(xp: Backend, recipe: UniformRecipe) -> dict[str, Tensor]:
    """The recipe's arithmetic on the device, from the generator's 24-bit fractions, which are drawn on the CPU.

    u * (to - from) + from: fused in f64 and rounded once, else each operation in f32.
    """
    torch = xp.torch
    generator = torch.Generator("cpu").manual_seed(recipe.seed)
    proofs = xp.for_proofs()
    drawn = {}
    for d in recipe.draws:
        u = torch.rand(d.shape, dtype=torch.float32, generator=generator)
        low, high = (torch.tensor(bound, dtype=torch.float32) for bound in (-d.bound, d.bound))
        span = high - low
        if recipe.arithmetic == recipes.FUSED:
            values = (u.to(proofs.device).double() * span.double().item() + low.double().item()).float()
        else:
            # Two kernels: a device fuses within one, never across two.
            product = u.to(xp.device) * span.to(xp.device)
            values = product + low.to(xp.device)
        drawn[d.name] = xp.tensor(_cast(xp, values, recipe))
    return drawn


def _cast(xp: Backend, values: Array, recipe: UniformRecipe) -> Array:
    """Through the base's dtype into the one that is stored."""
    return xp.round(xp.f32(xp.round(values, recipe.through)), recipe.stored)


# -- what to say of it -------------------------------------------------------------------------------------


def told(drawn: Sequence[Regenerated]) -> list[str]:
    """One line for each side and way: which arithmetic was found, and who agrees."""
    notes = []
    for side in dict.fromkeys(r.side for r in drawn):
        own = [r for r in drawn if r.side == side]
        names = ", ".join(dict.fromkeys(r.name for r in own if "." not in r.name)) or f"{len(own)} tensors"
        if own[0].sha256 is None:
            notes.append(
                f"{side}: no known arithmetic gives {names} from seed {own[0].seed}: they come from another seed,"
                " version or machine"
            )
            continue
        agree = [by for by in dict.fromkeys(r.by for r in own) if all(r.agrees for r in own if r.by == by)]
        how = f" in {own[0].arithmetic} arithmetic" if own[0].arithmetic else ""
        if own[0].through and own[0].through != F32.name:
            how += f", rounded through {own[0].through}"
        notes.append(
            f"{side}: {names} are those of seed {own[0].seed}{how}: {' and '.join(agree)} give the same bits"
        )
        if others := [by for by in dict.fromkeys(r.by for r in own) if by not in agree]:
            notes.append(
                f"{side}: {' and '.join(others)} of this machine would draw other {names} from the same seed"
            )
    return notes


def wrong_seed(side: str, a: Adapter) -> Finding | None:
    """A seed in the config that is not the recorded one: PEFT would draw other tensors from it."""
    recorded = recipes.from_metadata(a.metadata)
    seed: Any = getattr(recorded, "seed", None)
    for field in _SEEDS:
        said = a.config.get(field)
        if type(seed) is int and type(said) is int and (said ^ seed) & 0xFFFFFFFF:
            return Finding(
                "wrong-seed",
                field,
                f"{side}: the config says seed {said}, its tensors were drawn from {seed}: PEFT would draw others",
                f"set {field} to {seed}",
            )
    return None
