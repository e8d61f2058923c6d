"""AdaLoRA (Zhang et al. 2023): a singular value decomposition in form, pruned while it is trained.

    delta W = lora_alpha / (init_r + 1e-5) * B @ (A * E),   A (r, in), B (out, r), E (r, 1)

What was pruned is left out of the file: `rank_pattern` says which of the init_r triples are there, and the divisor
stays init_r. With a base of 16 bits PEFT loads the tensors of pruned modules through its dtype.
Reference: peft/tuners/adalora/layer.py (`get_delta_weight`) and model.py (`resize_modules_by_rank_pattern`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Edge, Finding, Grade, Need, Outcome, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.methods import _findings, _to_lora
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import DenseChange, Maths
from adapterpack.methods._keys import KeyTable, finite, flag, positive, require
from adapterpack.methods._lora_variants import refused_variant
from adapterpack.methods._products import unflattened
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "ADALORA"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
keys = KeyTable("lora_", {"A": "lora_A", "B": "lora_B", "E": "lora_E"})
_EPS = 1e-5
_OTHER_SWITCHES = ("use_dora", "target_parameters")


def parse(c: Checkpoint) -> Adapter:
    # Its config is LoRA's and more; the initial values of LoRA's variants mean nothing to it.
    reason = refused_variant({**c.config, "init_lora_weights": True}, c.tensors)
    reason = reason or next((f"{field} is set" for field in _OTHER_SWITCHES if c.config.get(field)), None)
    if reason is not None:
        raise Unsupported(f"{c.name} is not plain AdaLoRA: {reason}", hint="PEFT's AdaLoRA does not know it either")
    return keys.parse(c, "adalora", "adalora")


def _shape(module: str, params: Mapping[str, Param]) -> tuple[Shape, int]:
    """The delta weight's shape, (out, in) or of a convolution (out, in * k...), and how many triples are left."""
    a, b, e = (t.shape for t in require(module, params, ("A", "B", "E")))
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or e != (a[0], 1):
        raise InvalidFile(f"{module}: A {a}, B {b} and E {e} are not (r, in), (out, r) and (r, 1)")
    return (b[0], a[1]), a[0]


class _Pruned:
    """What `rank_pattern` keeps of each module."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        pattern = config.get("rank_pattern") or {}
        if not isinstance(pattern, dict):
            raise InvalidFile("rank_pattern in adapter_config.json is not an object")
        self._pattern = pattern
        self.init_r = positive(config, "init_r", 12)

    def kept(self, module: str) -> int | None:
        """How many triples of the module are left; None: it was not pruned."""
        mask = self._pattern.get(f"{module}.lora_E", self._pattern.get(f"{module}.lora_E.default"))
        if mask is None:
            return None
        if not isinstance(mask, list) or len(mask) != self.init_r or not all(isinstance(m, bool) for m in mask):
            raise InvalidFile(
                f"rank_pattern of {module} is no list of {self.init_r} truth values, one for each of init_r",
                hint="the config does not belong to these tensors",
            )
        return sum(mask)


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    pruned, alpha = _Pruned(a.config), finite(a.config, "lora_alpha", 8)
    for module, params in a.modules.items():
        shape, rank = _shape(module, params)
        through = pruned.kept(module) is not None
        # PEFT takes the rank itself where alpha is not positive.
        scaling = alpha if alpha > 0 else float(rank)
        yield DenseChange(
            module=module,
            params=params,
            shape=unflattened(shape, f"{module}.weight", request.shapes),
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            delta=partial(_delta, scaling, pruned.init_r, through),
            factors=partial(_factors, scaling / (pruned.init_r + _EPS)),
        )


def _delta(scaling: float, init_r: int, through: bool, m: Maths) -> Array:
    a, b, e = (m.lift(m.xp.round(m[n], m.dtype)) if through else m[n] for n in ("A", "B", "E"))
    # In the base's dtype PEFT keeps the divisor too.
    ranks = m.lift(m.rounded(m.lift(m.torch.tensor([float(init_r)], device=m.xp.device))))
    return b @ (a * e) * scaling / (ranks + _EPS)


def _factors(scale: float, m: Maths) -> tuple[Array, Array, float]:
    a, b = m["A"] * m["E"], m["B"]
    if not a.shape[0]:
        # All of it was pruned; plain LoRA has no rank 0.
        a, b = a.new_zeros(1, a.shape[1]), b.new_zeros(b.shape[0], 1)
    return b, a, scale


def ranks(a: Adapter) -> Mapping[str, int]:
    return {module: _shape(module, params)[1] for module, params in a.modules.items()}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from _findings.broken(a, lambda module: _shape(module, a.modules[module]))
    pruned = _Pruned(a.config)
    for module, rank in _findings.sound(a, lambda module: _shape(module, a.modules[module])[1]).items():
        kept = pruned.kept(module)
        said = pruned.init_r if kept is None else kept
        if said != rank:
            where = "init_r" if kept is None else "rank_pattern"
            message = f"{where} says rank {said}, the tensors have {rank}: PEFT refuses to load it"
            yield Finding("rank-mismatch", module, message, "take the config that was saved with these tensors")


def _fold(a: Adapter, request: Request) -> Outcome:
    dropped = "the singular values and the pruning state: training as AdaLoRA cannot resume from the result"
    return _to_lora.fold(a, request, changes(a, request), dropped=dropped)


edges: Mapping[str, tuple[Edge, ...]] = {
    # The shapes tell how a convolution's kernel is shaped that A holds flattened.
    "adalora": (Edge("lora", Grade.EQUIVALENT, _fold, needs=Need.SHAPES),)
}
