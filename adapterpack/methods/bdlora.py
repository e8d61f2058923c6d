"""BD-LoRA: LoRA with A or B block-diagonal, so that a model cut over several devices needs no exchange for it.

    delta W = s * B @ A,  with A = block_diag(A_1 ... A_n) of the stored (r, in / n), cut into n parts of its rows;
    of other modules B = block_diag(B_1 ... B_n) of the stored (out, r / n); of the rest both are dense

PEFT rounds the delta to the dtype of the base before it adds it. As plain LoRA it is exact: the same rank, zeros
between the blocks. Reference: peft/tuners/lora/variants.py (`BlockDiagonalLinear`, `BdLoraLinearVariant`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Outcome, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.methods import _lora_variants, lora
from adapterpack.methods._changes import LowRankChange, replacements
from adapterpack.methods._keys import KeyTable, flag, positive, require
from adapterpack.methods._lora_modules import Module, Scaling, modules
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

name = "bdlora"
peft_type = "LORA"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
keys: KeyTable = _lora_variants.KEYS
_SWITCH = "use_bdlora"
_FIELDS = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}


def claims(c: Checkpoint) -> bool:
    """Does the config turn it on? The names of its tensors are those of plain LoRA."""
    return bool(c.config.get(_SWITCH))


def parse(c: Checkpoint) -> Adapter:
    a = _lora_variants.parse(c, name, keys, _SWITCH)
    unknown = sorted(_lora_variants.sub_config(c.config, _SWITCH).keys() - _FIELDS)
    if unknown:
        raise Unsupported(f"{unknown[0]:.60} in {_SWITCH} is unknown", hint="merge it with PEFT")
    return a


@dataclass(frozen=True)
class _Blocks:
    """A module's factors as stored, and which is blockwise.

    Attributes:
        a: (r, in), or (r, in / in_a).
        b: (out, r), or (out, r / in_b).
        in_a, in_b: Blocks of A and of B; 1: it is dense.
    """

    a: Tensor
    b: Tensor
    in_a: int
    in_b: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the change."""
        return self.b.shape[0], self.a.shape[1] * self.in_a

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def dense(self, b: Array, a: Array, xp: Backend) -> tuple[Array, Array]:
        """(out, r) and (r, in), from the stored ones."""
        return _diagonal(b, self.in_b, xp), _diagonal(a, self.in_a, xp)

    def factors(self, xp: Backend) -> tuple[Array, Array]:
        return self.dense(xp.f32(self.b), xp.f32(self.a), xp)


def _diagonal(values: Array, blocks: int, xp: Backend) -> Array:
    return values if blocks == 1 else xp.torch.block_diag(*xp.torch.chunk(values, blocks, dim=0))


def _blocks(m: Module, config: Mapping[str, Any]) -> _Blocks:
    """Raises InvalidFile where the tensors do not fit each other or the config."""
    own = _lora_variants.sub_config(config, _SWITCH)
    n = positive(own, "nblocks", 1)
    # Any part of the module's path, as PEFT has it.
    in_a, in_b = (any(p in m.name for p in _names(own, f"target_modules_bd_{side}")) for side in "ab")
    if in_a and in_b:
        raise InvalidFile(f"{m.name} is in both lists of {_SWITCH}: PEFT refuses to load it")
    if flag(own, "match_strict", True) and not (in_a or in_b):
        raise InvalidFile(
            f"{m.name} is in neither list of {_SWITCH}, and match_strict is true: PEFT refuses to load it",
            hint="set match_strict to false in adapter_config.json if its A and B are dense",
        )
    a, b = require(m.name, m.params, ("lora_A", "lora_B"))
    found = _Blocks(a, b, n if in_a else 1, n if in_b else 1)
    rank = a.shape[0] if len(a.shape) == len(b.shape) == 2 else 0
    if not rank or rank != b.shape[1] * found.in_b or rank % found.in_a or b.shape[0] % found.in_b:
        kind = "A blockwise" if in_a else "B blockwise" if in_b else "dense"
        raise InvalidFile(f"{m.name}: A {a.shape} and B {b.shape} do not fit {n} blocks, {kind}")
    _lora_variants.bounded(m.name, (rank, found.shape[1]), (found.shape[0], rank))
    if in_b and "lora_bias" in m.params:
        raise Unsupported(f"{m.name}: a blockwise B has no bias, and PEFT cannot merge one")
    return found


def _names(own: Mapping[str, Any], field: str) -> list[str]:
    names = own.get(field) or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InvalidFile(f"{field} in {_SWITCH} is no list of names")
    return names


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    scaling = Scaling(a.config)
    for m in modules(a):
        blocks = _blocks(m, a.config)
        scale = scaling(m.name, blocks.rank)
        yield LowRankChange(
            module=m.name,
            factors=blocks.factors,
            shape=blocks.shape,
            rank=blocks.rank,
            scale=scale,
            uses=frozenset(m.params[n].key for n in ("lora_A", "lora_B")),
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            round_delta=True,
            torch=True,
        )
        yield from lora.biases(m, blocks.shape[0], scale)


def ranks(a: Adapter) -> Mapping[str, int]:
    return {m.name: _blocks(m, a.config).rank for m in modules(a)}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    def rank(m: Module) -> int:
        return _blocks(m, a.config).rank

    yield from lora.pair_findings(a, rank)


def _plain(a: Adapter, request: Request) -> Outcome:
    pairs = {}
    for m in modules(a):
        blocks = _blocks(m, a.config)
        dense = blocks.dense(request.xp.native(blocks.b), request.xp.native(blocks.a), request.xp)
        b, lora_a = (request.xp.tensor(f) for f in dense)
        pairs[m.name] = {"lora_A": lora_a, "lora_B": b}
    return _lora_variants.plain(a, _SWITCH, pairs, dropped="the blocks: their zeros are stored now")


edges: Mapping[str, tuple[Edge, ...]] = {name: (Edge("lora", Grade.EQUIVALENT, _plain),)}
