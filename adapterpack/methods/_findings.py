"""What `check` finds in every method with factors: halves of pairs, and ranks that the config tells otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from adapterpack.adapter import Adapter, Finding
from adapterpack.errors import InvalidFile
from adapterpack.methods._keys import positive
from adapterpack.methods._lora_modules import first_match, pattern_field


def broken(a: Adapter, look: Callable[[str], object]) -> Iterator[Finding]:
    """One finding for each module whose tensors `look` refuses."""
    for module in a.modules:
        try:
            look(module)
        except InvalidFile as e:
            yield Finding("half-pair", module, e.message, "train or save the adapter again")


def other_ranks(
    a: Adapter, rank: Callable[[str], int], default: int, *, field: str = "r", pattern: str | None = "rank_pattern"
) -> Iterator[Finding]:
    """One finding for each module whose tensors have another rank than the config says; broken ones are left out.

    Args:
        rank: What the tensors of a module say. Raises InvalidFile.
        default: PEFT's, where the config does not say.
        field: The config's word for it.
        pattern: The config's word for what differs from it; None: the method has none.
    """
    patterns, values = ([], {}) if pattern is None else pattern_field(a.config, pattern)
    common = positive(a.config, field, default)
    for module in a.modules:
        said: Any = first_match(patterns, values, module)
        said = common if said is None else said
        try:
            found = rank(module)
        except InvalidFile:
            continue
        if said != found:
            yield Finding(
                "rank-mismatch",
                module,
                f"the config says {field} {said!r:.20}, the tensors have {found}: PEFT refuses to load it",
                f"set {field} to {found}" if pattern is None else f'put "{module}": {found} first in {pattern}',
            )
