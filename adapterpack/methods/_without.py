"""What most methods do not have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter

if TYPE_CHECKING:
    from adapterpack.recipes import Recipe


def no_ranks(a: Adapter) -> Mapping[str, int]:
    """Of a method whose modules have no rank; see `Method.ranks`."""
    return {}


def no_recipes(a: Adapter) -> Iterator[Recipe]:
    """Of a method that stores whatever it has; see `Method.recipes`."""
    return iter(())
