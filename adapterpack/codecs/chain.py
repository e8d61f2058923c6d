"""A chain: the steps that turn the bytes of a frame into segments, and back (`formats/apack/SPEC.md`).

Segments are then stored as they are, or as one zstd frame where that is shorter. What the steps do is in `coding`,
loaded when it is first needed: it brings numpy along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapterpack.errors import InvalidFile
from adapterpack.io import zstd

if TYPE_CHECKING:
    from adapterpack.tensor import Array

    Buffer = bytes | memoryview | Array

_ORDER = ("sub", "gaps", "mask", "narrow", "rotate", "exponents", "planes", "bits", "grid", "palette")


@dataclass(frozen=True)
class Chain:
    """Steps in the order of coding.

    Attributes:
        width: Bytes of a word.
        steps: Any of these, in this order: `sub` (the difference to the parent's word), `gaps` or `mask` (zero words
            left out), `narrow` (4-byte words to 2), `rotate`, `exponents`, and `planes`, `bits` or `grid` at the end;
            or `palette` alone.
        run: For the writer: so many words share a palette; 0: all of a frame.
    """

    width: int
    steps: tuple[str, ...] = ()
    run: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        places = [_ORDER.index(s) if s in _ORDER else -1 for s in self.steps]
        fits = (
            self.width in (1, 2, 4, 8)
            and all(a < b for a, b in zip([-1, *places], places, strict=False))
            and not {"gaps", "mask"} <= set(self.steps)
            and sum(step in ("planes", "bits", "grid") for step in self.steps) <= 1
            and not ("narrow" in self.steps and self.width != 4)
            and not ("rotate" in self.steps and "planes" not in self.steps)
            and not ("exponents" in self.steps and (self.width == 1 or "rotate" not in self.steps))
            and not ("grid" in self.steps and ("sub" not in self.steps or self.width not in (2, 4)))
            and not {"grid", "narrow"} <= set(self.steps)
            and not ("palette" in self.steps and (len(self.steps) > 1 or self.width not in (2, 4)))
        )
        if not fits:
            raise InvalidFile(f"no chain of steps: {self.width} {' '.join(self.steps)!r:.150}")

    @property
    def text(self) -> bool:
        """Bytes as they are: the dictionary may help."""
        return not self.steps

    @property
    def from_parent(self) -> bool:
        return "sub" in self.steps

    def split(self, raw: Array, before: Array | None = None) -> list[Array]:
        """The segments of a frame.

        Args:
            raw: uint8. What is left of a last word that is not whole becomes a segment of its own, the last one.
            before: The parent's bytes at the same place, where the chain takes them.
        """
        from adapterpack.codecs import coding

        return coding.split(self, raw, before)

    def join(self, segments: Sequence[Buffer], nbytes: int, before: Array | None = None) -> Array:
        """The inverse of `split`: `nbytes` bytes, uint8.

        Raises:
            InvalidFile: the segments do not make a frame of that size.
        """
        from adapterpack.codecs import coding

        return coding.join(self, segments, nbytes, before)


def store(segment: Array, levels: Sequence[int], dictionary: bytes = b"", cuts: Sequence[int] = ()) -> bytes:
    """A segment as it is stored: the shortest of itself and of zstd frames.

    Args:
        segment: uint8.
        levels: zstd levels to try.
        dictionary: For zstd.
        cuts: Where Huffman tables may change, tried too.
    """
    from adapterpack.codecs import coding

    raw = segment.tobytes()
    if coding.noise(segment):
        return raw
    tried = [raw, *(zstd.compress(raw, level, dictionary) for level in levels)]
    if cuts:
        tried.append(zstd.compress(raw, zstd.HUFFMAN, dictionary, cuts))
    return min(tried, key=len)


def restore(stored: bytes | memoryview, size: int, where: str, dictionary: bytes = b"") -> bytes | memoryview:
    """The inverse of `store`, without a copy of what is stored as it is. Raises InvalidFile."""
    return stored if len(stored) == size else zstd.decompress(stored, size, where, dictionary)
