"""What `check` finds in every method with factors: halves of pairs, and ranks that the config tells otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from adapterpack import limits
from adapterpack.adapter import Adapter, Finding
from adapterpack.errors import InvalidFile
from adapterpack.methods._lora_modules import rank_findings

_Seen = TypeVar("_Seen")


def broken(a: Adapter, look: Callable[[str], _Seen]) -> Iterator[Finding]:
    """One finding for each module whose tensors `look` refuses."""
    for module in a.modules:
        try:
            look(module)
        except InvalidFile as e:
            yield Finding("half-pair", module, e.message, "train or save the adapter again")


def sound(a: Adapter, look: Callable[[str], _Seen]) -> dict[str, _Seen]:
    """What `look` sees in the modules whose tensors it does not refuse."""
    seen: dict[str, _Seen] = {}
    for module in a.modules:
        try:
            seen[module] = look(module)
        except InvalidFile:
            continue
    return seen


def of_factors(
    a: Adapter, rank: Callable[[str], int], default: int, *, pattern: bool = True, most: int = limits.LORA_RANK
) -> Iterator[Finding]:
    """Broken modules, and those of another rank than `r` and `rank_pattern` say.

    Args:
        rank: What the tensors of a module say. Raises InvalidFile.
        default: PEFT's, where the config has no `r`.
        pattern: Does the method follow `rank_pattern`?
        most: The largest `r` that is believed.
    """
    yield from broken(a, rank)
    yield from rank_findings(a.config, sound(a, rank), default, pattern=pattern, most=most)
