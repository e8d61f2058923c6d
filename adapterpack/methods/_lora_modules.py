"""The modules that a LoRA adapter changes, and the factor of each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adapterpack import limits
from adapterpack.adapter import Adapter, Finding, Param
from adapterpack.errors import InvalidFile, NoMergedWeight
from adapterpack.io.patterns import Pattern, peft_patterns
from adapterpack.methods._keys import flag, positive, require
from adapterpack.tensor import Shape, Tensor


@dataclass(frozen=True)
class Module:
    """One adapted module, its tensors sorted out and checked against each other.

    Attributes:
        known_as: Under which name the patterns of the config know it.
    """

    name: str
    params: Mapping[str, Param]
    embedding: bool
    known_as: str

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor, int]:
        """A, B and the number of groups; see `pair`."""
        names = ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A", "lora_B")
        a, b = require(self.name, self.params, names)
        n, groups = len(a.shape), 1
        fits = len(b.shape) == n and (n == 2 or (2 < n < 6 and not self.embedding))
        if not fits or not a.shape[0] or any(k != 1 for k in b.shape[2:]):
            raise InvalidFile(f"{self.name}: A {a.shape} and B {b.shape} are not (r, in) and (out, r)")
        if n > 2 and b.shape[1] and a.shape[0] % b.shape[1] == 0:
            groups = a.shape[0] // b.shape[1]
        if a.shape[0] != b.shape[1] * groups:
            raise InvalidFile(f"{self.name}: A {a.shape} and B {b.shape} are not (r, in) and (out, r)")
        return a, b, groups

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B, (r, in) and (out, r); of a convolution (r, in, k...) and (out, r, 1...).

        Raises:
            InvalidFile: half a pair, or shapes that do not fit each other.
            NoMergedWeight: of a convolution with groups, whose A takes all inputs and B one group of ranks.
        """
        a, b, groups = self._factors
        if groups > 1:
            raise NoMergedWeight(
                f"{self.name} is a convolution with {groups} groups: its A crosses their borders, so that no such"
                " convolution has the sum as its weight, and PEFT cannot merge it either",
                hint="leave such layers out in training, or keep the adapter beside its base",
            )
        return a, b

    @property
    def rank(self) -> int:
        return self._factors[0].shape[0]

    @property
    def shape(self) -> Shape:
        """Of the change: (out, in), and the kernel of a convolution behind it."""
        a, b = self.pair
        return b.shape[0], *a.shape[1:]

    @property
    def convolution(self) -> bool:
        return len(self.shape) > 2

    @property
    def magnitude(self) -> Param | None:
        return self.params.get("magnitude") or self.params.get("magnitude.weight")


def modules(a: Adapter) -> Iterator[Module]:
    """Every adapted module, but for those that wrap a parameter. Raises InvalidFile for one adapted in two ways."""
    for name, params in a.modules.items():
        if name in a.parameters:
            continue
        embedding = "lora_embedding_A" in params or "lora_embedding_B" in params
        if embedding and ("lora_A" in params or "lora_B" in params):
            raise InvalidFile(f"{name} is adapted as an embedding and as a linear layer")
        yield Module(name, params, embedding, attention_of(a, name) or name)


IN_PROJ, OUT_PROJ = "in_proj_weight", "out_proj"
"""What LoRA adapts of torch's multi-head attention: a bare parameter, and a linear layer. Never one alone."""


def attention_of(a: Adapter, name: str) -> str | None:
    """The multi-head attention that this module is the output projection of; None: it is none."""
    module, _, last = name.rpartition(".")
    inside = last == OUT_PROJ and f"{module}.{IN_PROJ}" in a.parameters.get(module, ())
    return module if inside else None


def first_match(patterns: list[Pattern], values: Mapping[str, Any], module: str) -> Any:
    """PEFT takes the first pattern in file order that matches; None if none does."""
    for pattern in patterns:
        if pattern.matches(module):
            return values[pattern.text]
    return None


def pattern_field(config: Mapping[str, Any], field: str) -> tuple[list[Pattern], Mapping[str, Any]]:
    """The patterns of `rank_pattern` or `alpha_pattern` in the file's order, and what each gives."""
    values = config.get(field) or {}
    if not isinstance(values, dict):
        raise InvalidFile(f"{field} in adapter_config.json is not an object")
    return list(peft_patterns(values, field)), values


def rank_findings(
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
    default: int,
    *,
    field: str = "r",
    pattern: bool = True,
    most: int = limits.LORA_RANK,
) -> Iterator[Finding]:
    """Modules whose tensors have another rank than `r` and `rank_pattern` say: PEFT refuses to load those.

    Args:
        ranks: Module to the rank of its tensors.
        default: Of PEFT, where the config has no `r`.
        field: The config's word for it.
        pattern: Does the method follow `rank_pattern`?
        most: The largest that is believed.
    """
    patterns, values = pattern_field(config if pattern else {}, "rank_pattern")
    r = positive(config, field, default, most)
    for module, rank in ranks.items():
        said = first_match(patterns, values, module)
        said = r if said is None else said
        if said != rank:
            yield Finding(
                "rank-mismatch",
                module,
                f"the config says {field} {said!r:.20}, the tensors have {rank}: PEFT refuses to load it",
                f'put "{module}": {rank} first in rank_pattern' if pattern else f"set {field} to {rank}",
            )


def exactly(module: str) -> str:
    """A pattern for this module and none that is merely named like it.

    PEFT puts `(.*\\.)?` before a pattern and takes the first one that matches, in sorted order once it was saved:
    anchored and escaped, no two of them match one module.
    """
    return "^" + re.escape(module)


class Scaling:
    """The factor of each module, from the config and the rank that its tensors have.

    The rank comes from the tensors: `rank_pattern` was written with sorted keys, so overlapping patterns
    may say something else now than in training.

    Args:
        field: The config's word for alpha: methods that are akin to LoRA have their own.
        default: Of PEFT, where the config does not say.
    """

    def __init__(self, config: Mapping[str, Any], field: str = "lora_alpha", default: float = 8) -> None:
        self._field = field
        self._alpha = config.get(field, default)
        # A switch of LoRA's: PEFT ignores it in the config of another method.
        self._rslora = field == "lora_alpha" and flag(config, "use_rslora")
        self._patterns, self._values = pattern_field(config, "alpha_pattern")

    def __call__(self, module: str, rank: int) -> float:
        alpha = first_match(self._patterns, self._values, module)
        if alpha is None:
            alpha = self._alpha
        number = type(alpha) in (int, float) and math.isfinite(alpha) and 0 < abs(alpha) < 1e9
        if not number:
            raise InvalidFile(f"{self._field} of {module} is {alpha!r:.60}; a finite number other than 0 is wanted")
        return float(alpha / (math.sqrt(rank) if self._rslora else rank))
