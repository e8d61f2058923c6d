"""What convert, compress and their like report: apart from them, since a pack needs none of their maths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FactoredModule:
    """One module of a LoRA that was factored from a change of W.

    Attributes:
        name: Path of the module.
        rank: Of its factors; 0 where a dry run cannot know it.
        rel_error: Frobenius norm of what the factors leave out, over that of the change, in f64 sums; the factors as
            written, cast to their dtype. None in a dry run.
    """

    name: str
    rank: int
    rel_error: float | None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert` or `compress` made, or would make.

    Attributes:
        output: The new directory or pack.
        method: Of the result.
        encoding: Of the result; None for methods that are not read.
        bytes_in: Sum of all files of the source.
        bytes_out: Sum of all files of the result.
        grade: `lossless`, `equivalent` or `approximate`.
        dropped: What is gone, and files that were left behind.
        max_rel_error: Largest relative error of a module's change of W, measured; 0 where it is exact.
        notes: What the user should know.
        serve: With an engine named: the command that serves it.
        factored: Of the nearest LoRA, where there is no exact one: rank and error of each module, worst first.
    """

    output: str
    method: str
    encoding: str | None
    bytes_in: int
    bytes_out: int
    grade: str
    dropped: tuple[str, ...]
    max_rel_error: float
    notes: tuple[str, ...]
    serve: str | None = None
    factored: tuple[FactoredModule, ...] = ()


def inputs(*places: str | Path | None) -> tuple[Path, ...]:
    """What a destination must not harm: everything that was named."""
    return tuple(Path(place).expanduser() for place in places if place is not None)
