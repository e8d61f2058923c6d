"""What goes into a new pack beside the files: what it says of its making, and what it need not hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from adapterpack.checkpoint import Checkpoint
from adapterpack.containers.apack.manifest import Manifest, Parent
from adapterpack.tensor import Tensor

if TYPE_CHECKING:
    from adapterpack.adapter import Adapter, Grade

_GRADES = ("approximate", "equivalent", "lossless")
"""Ordered: more is better."""


@dataclass(frozen=True)
class Facts:
    """What a pack says of its making.

    Attributes:
        method: `peft_type` in lower case.
        grade: What was lost on the way from the source: `lossless`, `equivalent`, `approximate`.
        max_error, error: Allowed and measured, as text.
        source_bytes: All files of the source.
        dropped: What is not in it.
    """

    method: str
    encoding: str | None
    grade: str
    source_bytes: int
    max_error: str | None = None
    error: str | None = None
    dropped: tuple[str, ...] = ()

    @classmethod
    def after(
        cls,
        source: Checkpoint,
        made: Adapter,
        grade: Grade,
        error: float,
        max_error: float | None,
        dropped: tuple[str, ...],
    ) -> Facts:
        """What a pack says of an adapter that was made from another one.

        Args:
            error: Measured, relative.
            max_error: What was allowed; None: nothing beyond `equivalent`.
        """
        lossy = str(grade) == _GRADES[0]
        allowed = None if max_error is None or not lossy else f"{max_error:g}"
        measured = f"{error:.6g}" if lossy else None
        mine = cls(made.method, made.encoding, str(grade), source.bytes, allowed, measured, dropped)
        return mine if source.pack is None else mine.following(source.pack.manifest)

    def following(self, before: Manifest) -> Facts:
        """The same, of what was in a pack that has lost something itself."""
        facts = replace(self, source_bytes=before.source_bytes, dropped=(*before.dropped, *self.dropped))
        if _GRADES.index(before.grade) >= _GRADES.index(self.grade):
            return facts
        return replace(facts, grade=before.grade, max_error=before.max_error, error=before.error)


@dataclass(frozen=True)
class References:
    """What is at hand elsewhere, so that it need not be stored.

    Attributes:
        parent: The checkpoint before this one.
        parent_tensors: Its tensors.
        base: What to call the base model.
        base_tensors: Its tensors by their names on disk.
    """

    parent: Parent | None = None
    parent_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    base: str | None = None
    base_tensors: Mapping[str, Tensor] = field(default_factory=dict)
