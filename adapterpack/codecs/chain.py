"""A chain: the steps that turn the bytes of a frame into segments, and back (`formats/apack/SPEC.md`).

Segments are then stored as they are, or as one zstd frame where that is shorter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapterpack.codecs import grid, words
from adapterpack.errors import InvalidFile
from adapterpack.io import zstd

if TYPE_CHECKING:
    from adapterpack.tensor import Array

_ORDER = ("sub", "gaps", "mask", "narrow", "rotate", "exponents", "planes", "bits", "grid")
_POSITIONS = {"gaps": (words.gaps, words.ungaps), "mask": (words.mask, words.unmask)}
_NOISE_BITS = 7.97
"""Bytes with more entropy than this, in bits, are not worth coding."""
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Chain:
    """Steps in the order of coding.

    Attributes:
        width: Bytes of a word.
        steps: Any of these, in this order: `sub` (the difference to the parent's word), `gaps` or `mask` (zero words
            left out), `narrow` (4-byte words to 2), `rotate`, `exponents`, and `planes`, `bits` or `grid` at the end.
    """

    width: int
    steps: tuple[str, ...] = ()

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
        left = raw.size % self.width
        if left:
            return [*self._split(raw[:-left], before), raw[-left:]]
        return self._split(raw, before)

    def _split(self, raw: Array, before: Array | None) -> list[Array]:
        x, segments = raw.view(words.word(self.width)), []
        if "grid" in self.steps:
            assert before is not None
            return self._grid(x, before[: raw.size].view(x.dtype))
        for step in self.steps:
            if step == "sub":
                assert before is not None
                x = words.subtract(x, before[: raw.size].view(x.dtype))
            elif step in _POSITIONS:
                segments.append(_POSITIONS[step][0](x))
                x = x[x != 0]
            elif step == "narrow":
                x = words.narrow(x)
            elif step == "bits":
                n, packed = words.bits(x)
                return [*segments, np.array([n], np.uint8), packed]
            elif step == "planes":
                return [*segments, *self._planes(x)]
        return [*segments, np.ascontiguousarray(x).view(np.uint8)]

    def _grid(self, x: Array, before: Array) -> list[Array]:
        """The words themselves instead of their differences, which only say where they are not the parent's."""
        for step in self.steps:
            if step in _POSITIONS:
                other = x != before
                return [_POSITIONS[step][0](other), *grid.split(x[other], before[other])]
        return grid.split(x, before)

    def _planes(self, x: Array) -> list[Array]:
        parts = words.planes(x)
        if "rotate" in self.steps:
            parts = words.rotate(parts)
        if "exponents" in self.steps:
            table, parts[0], parts[1] = words.exponents(parts[0], parts[1])
            parts.insert(0, table)
        return parts

    def join(self, segments: Sequence[Array], nbytes: int, before: Array | None = None) -> Array:
        """The inverse of `split`: `nbytes` bytes, uint8.

        Raises:
            InvalidFile: the segments do not make a frame of that size.
        """
        n, tail = divmod(nbytes, self.width)
        if len(segments) != self._segments() + bool(tail) or (tail and segments[-1].size != tail):
            raise InvalidFile("a frame with other segments than its chain has")
        left = iter(segments[:-1] if tail else segments)
        found = None
        for step in self.steps:
            if step in _POSITIONS:
                found = _POSITIONS[step][1](next(left), n)
        old = None
        if self.from_parent:
            assert before is not None
            old = before[: n * self.width].view(words.word(self.width))
        if "grid" in self.steps:
            assert old is not None
            x = _join_grid(list(left), old, found)
        else:
            x = self._words(left, n if found is None else found.size)
            if found is not None:
                if not x.all():
                    raise InvalidFile("a zero word where there should be none")
                full = np.zeros(n, x.dtype)
                full[found] = x
                x = full
            if old is not None:
                x = words.add(x, old)
        whole = np.ascontiguousarray(x).view(np.uint8)
        return np.concatenate([whole, segments[-1]]) if tail else whole

    def _segments(self) -> int:
        width = 2 if "narrow" in self.steps else self.width
        side = sum(step in ("gaps", "mask", "exponents", "bits") for step in self.steps)
        if "grid" in self.steps:
            return side + grid.SEGMENTS
        return side + (width if "planes" in self.steps else 1)

    def _words(self, left: Iterator[Array], count: int) -> Array:
        """The words that come after `sub`, `gaps` and `mask`."""
        width = 2 if "narrow" in self.steps else self.width
        table = next(left) if "exponents" in self.steps else None
        if "bits" in self.steps:
            size = next(left)
            if size.size != 1:
                raise InvalidFile("the number of bits takes one byte")
            x = words.unbits(int(size[0]), next(left), count, width)
        else:
            parts = list(left)
            if any(part.size != (count if "planes" in self.steps else count * width) for part in parts):
                raise InvalidFile("a segment of another length than the frame")
            if table is not None:
                parts[0], parts[1] = words.unexponents(table, parts[0], parts[1])
            if "rotate" in self.steps:
                parts = words.unrotate(parts)
            x = words.unplanes(parts, width) if "planes" in self.steps else parts[0].view(words.word(width))
        return words.widen(x) if "narrow" in self.steps else x


def _join_grid(segments: Sequence[Array], old: Array, found: Array | None) -> Array:
    if found is None:
        return grid.join(segments, old)
    before = old[found]
    x = grid.join(segments, before)
    if (x == before).any():
        raise InvalidFile("a word like the parent's where there should be none")
    full = old.copy()
    full[found] = x
    return full


def noise(segment: Array) -> bool:
    """Has a sample of these bytes so much entropy that coding them is in vain?"""
    if segment.size < 256:
        return False
    sample = segment[:: max(segment.size // _SAMPLE, 1)]
    counts = np.bincount(sample, minlength=256)
    p = counts[counts > 0] / sample.size
    # A sample of n bytes shows about 255 / (2 n ln 2) bits less than there are (Miller 1955).
    return float(-(p * np.log2(p)).sum()) + (p.size - 1) / (2 * sample.size * 0.6931) > _NOISE_BITS


def store(segment: Array, levels: Sequence[int], dictionary: bytes = b"", cuts: Sequence[int] = ()) -> bytes:
    """A segment as it is stored: the shortest of itself and of zstd frames.

    Args:
        segment: uint8.
        levels: zstd levels to try.
        dictionary: For zstd.
        cuts: Where Huffman tables may change, tried too.
    """
    raw = segment.tobytes()
    if noise(segment):
        return raw
    tried = [raw, *(zstd.compress(raw, level, dictionary) for level in levels)]
    if cuts:
        tried.append(zstd.compress(raw, zstd.HUFFMAN, dictionary, cuts))
    return min(tried, key=len)


def restore(stored: bytes | memoryview, size: int, where: str, dictionary: bytes = b"") -> Array:
    """The inverse of `store`. Raises InvalidFile."""
    data = stored if len(stored) == size else zstd.decompress(stored, size, where, dictionary)
    return np.frombuffer(data, np.uint8)
