"""QA-LoRA (Xu et al. 2023): LoRA on inputs that were pooled group by group, for GPTQ bases.

    delta W = s * B @ A',  A'[:, j] = (in / g) / g * A[:, j // g],   A (r, in / g)

PEFT averages g inputs and multiplies by the number of groups (peft/tuners/lora/variants.py, `QALoraLinearVariant`),
on layers of GPTQ alone, and merges nothing. The change is linear all the same: it has exact LoRA factors of the same
rank, and can be merged into the 16-bit model. The paper's own merge, into the zero points of the quantised weights,
is something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Outcome, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.methods import _lora_variants, lora
from adapterpack.methods._changes import LowRankChange, replacements
from adapterpack.methods._keys import KeyTable, flag, positive, require
from adapterpack.methods._lora_modules import Module, Scaling, modules
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

name = "qalora"
peft_type = "LORA"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
keys: KeyTable = _lora_variants.KEYS
_SWITCH = "use_qalora"


def claims(c: Checkpoint) -> bool:
    """Does the config turn it on? The names of its tensors are those of plain LoRA."""
    return bool(c.config.get(_SWITCH))


def parse(c: Checkpoint) -> Adapter:
    return _lora_variants.parse(c, name, keys, _SWITCH)


@dataclass(frozen=True)
class _Pooled:
    """A module's factors as stored.

    Attributes:
        a: (r, in / group).
        b: (out, r).
        group: Inputs that are pooled.
    """

    a: Tensor
    b: Tensor
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the change."""
        return self.b.shape[0], self.a.shape[1] * self.group

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def whole(self, xp: Backend) -> Array:
        """A', f32, (r, in)."""
        return xp.torch.repeat_interleave(xp.f32(self.a) * (self.a.shape[1] / self.group), self.group, dim=1)

    def factors(self, xp: Backend) -> tuple[Array, Array]:
        return xp.f32(self.b), self.whole(xp)


def _pooled(m: Module, config: Mapping[str, Any]) -> _Pooled:
    """Raises InvalidFile where the tensors do not fit each other."""
    a, b = require(m.name, m.params, ("lora_A", "lora_B"))
    group = positive(config, "qalora_group_size", 16)
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] or a.shape[0] != b.shape[1]:
        raise InvalidFile(f"{m.name}: A {a.shape} and B {b.shape} are not (r, in / {group}) and (out, r)")
    _lora_variants.bounded(m.name, (a.shape[0], a.shape[1] * group))
    return _Pooled(a, b, group)


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    scaling = Scaling(a.config)
    for m in modules(a):
        pooled = _pooled(m, a.config)
        scale = scaling(m.name, pooled.rank)
        yield LowRankChange(
            module=m.name,
            factors=pooled.factors,
            shape=pooled.shape,
            rank=pooled.rank,
            scale=scale,
            uses=frozenset(m.params[n].key for n in ("lora_A", "lora_B")),
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            torch=True,
            factor_noise=1.0,
        )
        yield from lora.biases(m, pooled.shape[0], scale)


def ranks(a: Adapter) -> Mapping[str, int]:
    return {m.name: _pooled(m, a.config).rank for m in modules(a)}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    def rank(m: Module) -> int:
        return _pooled(m, a.config).rank

    yield from lora.pair_findings(a, rank)


def _plain(a: Adapter, request: Request) -> Outcome:
    pairs = {}
    for m in modules(a):
        pooled = _pooled(m, a.config)
        pairs[m.name] = {"lora_A": request.xp.tensor(pooled.whole(request.xp)), "lora_B": pooled.b}
    return _lora_variants.plain(a, _SWITCH, pairs, dropped="the pooling: A takes every input now")


edges: Mapping[str, tuple[Edge, ...]] = {name: (Edge("lora", Grade.EQUIVALENT, _plain),)}
