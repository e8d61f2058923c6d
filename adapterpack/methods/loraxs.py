"""LoRA-XS (Balazy et al. 2024): a small trained matrix between factors that the base's singular vectors give.

    delta W = s * B @ R @ A,   R (r, r) is trained; A (r, in) = diag(S) V^T and B (out, r) = U of the base's SVD

It is no method of PEFT: its authors patch PEFT's LoRA, so that the config says LORA. PEFT itself drops R when it
loads such a file, and adds B @ A, a part of W once more. A and B are stored, and the change has exact LoRA factors,
B @ R and A. Reference: utils/latent_utils.py and utils/initialization_utils.py of
github.com/MohammadrezaBanaei/LoRA-XS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Outcome, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.methods import _lora_variants, lora
from adapterpack.methods._changes import LowRankChange, replacements
from adapterpack.methods._keys import KeyTable, flag, require
from adapterpack.methods._lora_modules import Module, Scaling, modules
from adapterpack.recipes import Recipe
from adapterpack.tensor import Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

name = "loraxs"
peft_type = "LORA"
keep_dtype: frozenset[str] = frozenset()
_MARK = "lora_latent"
_OLD, _NEW = "_lora_latent_mapping.weight", ".default_lora_latent_mapping.weight"
"""How older PEFT spelled the key, which took `.default` out wherever it stood, and how PEFT does now."""
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
    return replace(a, modules=own, source=c)


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

    def factors(self, xp: Backend) -> tuple[Array, Array]:
        # (B @ R) @ A, in the order of get_delta_weight.
        return xp.f32(self.b) @ xp.f32(self.r), xp.f32(self.a)


def _latent(m: Module) -> _Latent:
    """Raises InvalidFile where the tensors do not fit each other."""
    if m.params.keys() == {"latent"}:
        raise InvalidFile(
            f"{m.name} has R alone: A and B are not stored, and a randomised SVD of the base gives others elsewhere",
            hint="save the adapter again where it was trained, with A and B",
        )
    a, b, r = require(m.name, m.params, ("lora_A", "lora_B", "latent"))
    rank = a.shape[0] if len(a.shape) == len(b.shape) == 2 else 0
    if not rank or b.shape[1] != rank or r.shape != (rank, rank):
        raise InvalidFile(f"{m.name}: A {a.shape}, B {b.shape} and R {r.shape} are not (r, in), (out, r) and (r, r)")
    return _Latent(a, b, r)


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    scaling = Scaling(a.config)
    for m in modules(a):
        latent = _latent(m)
        scale = scaling(m.name, latent.rank)
        yield LowRankChange(
            module=m.name,
            factors=latent.factors,
            shape=latent.shape,
            rank=latent.rank,
            scale=scale,
            uses=frozenset(m.params[n].key for n in ("lora_A", "lora_B", "latent")),
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            torch=True,
            # B @ R is a sum of r products in f32.
            factor_noise=2.0 * (1 + latent.rank**0.5),
        )
        yield from lora.biases(m, latent.shape[0], scale)


def ranks(a: Adapter) -> Mapping[str, int]:
    return {m.name: _latent(m).rank for m in modules(a)}


def recipes(a: Adapter) -> Iterator[Recipe]:
    return iter(())


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    def rank(m: Module) -> int:
        return _latent(m).rank

    yield from lora.pair_findings(a, rank)
    yield Finding(
        "misread-by-peft",
        a.source.name,
        "it is LoRA-XS, and its config says LORA: PEFT drops the trained R and adds B @ A, a part of the base itself",
        "adapterpack convert SRC DST --to lora: plain LoRA that does the same",
    )


def _plain(a: Adapter, request: Request) -> Outcome:
    pairs = {}
    for m in modules(a):
        latent = _latent(m)
        b, _ = latent.factors(request.xp)
        pairs[m.name] = {"lora_A": latent.a, "lora_B": request.xp.tensor(b)}
    return _lora_variants.plain(
        a, "", pairs, dropped="R by itself: training as LoRA-XS cannot resume from the result"
    )


edges: Mapping[str, tuple[Edge, ...]] = {name: (Edge("lora", Grade.EQUIVALENT, _plain),)}
