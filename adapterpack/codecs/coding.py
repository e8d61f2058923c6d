"""What the steps of a chain do, one after the other: from the bytes of a frame to segments, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from adapterpack.codecs import grid, palette, words
from adapterpack.errors import InvalidFile

if TYPE_CHECKING:
    from adapterpack.codecs.chain import Buffer, Chain
    from adapterpack.tensor import Array

_POSITIONS = {"gaps": (words.gaps, words.ungaps), "mask": (words.mask, words.unmask)}
_NOISE_BITS = 7.97
"""Bytes with more entropy than this, in bits, are not worth coding."""
_SAMPLE = 1 << 16


def split(chain: Chain, raw: Array, before: Array | None) -> list[Array]:
    """See `Chain.split`."""
    left = raw.size % chain.width
    if left:
        return [*_split(chain, raw[:-left], before), raw[-left:]]
    return _split(chain, raw, before)


def _split(chain: Chain, raw: Array, before: Array | None) -> list[Array]:
    x, segments = raw.view(words.word(chain.width)), []
    if "grid" in chain.steps:
        assert before is not None
        return _grid(chain, x, before[: raw.size].view(x.dtype))
    for step in chain.steps:
        if step == "sub":
            assert before is not None
            x = words.subtract(x, before[: raw.size].view(x.dtype))
        elif step in _POSITIONS:
            segments.append(_POSITIONS[step][0](x))
            x = x[x != 0]
        elif step == "narrow":
            x = words.narrow(x)
        elif step == "palette":
            return palette.split(x, chain.run or x.size)
        elif step == "bits":
            n, packed = words.bits(x)
            return [*segments, np.array([n], np.uint8), packed]
        elif step == "planes":
            return [*segments, *_planes(chain, x)]
    return [*segments, np.ascontiguousarray(x).view(np.uint8)]


def _grid(chain: Chain, x: Array, before: Array) -> list[Array]:
    """The words themselves instead of their differences, which only say where they are not the parent's."""
    for step in chain.steps:
        if step in _POSITIONS:
            other = x != before
            return [_POSITIONS[step][0](other), *grid.split(x[other], before[other])]
    return grid.split(x, before)


def _planes(chain: Chain, x: Array) -> list[Array]:
    upper, lower = words.planes(x)
    table = []
    if "rotate" in chain.steps:
        upper = words.rotate(upper)
    if "exponents" in chain.steps:
        numbered, upper = words.exponents(upper)
        table.append(numbered)
    return [*table, *words.halves(upper), *lower]


def join(chain: Chain, segments: Sequence[Buffer], nbytes: int, before: Array | None) -> Array:
    """See `Chain.join`."""
    n, tail = divmod(nbytes, chain.width)
    parts = [np.frombuffer(segment, np.uint8) for segment in segments]
    if len(parts) != _count(chain) + bool(tail) or (tail and parts[-1].size != tail):
        raise InvalidFile("a frame with other segments than its chain has")
    left = iter(parts[:-1] if tail else parts)
    found = None
    for step in chain.steps:
        if step in _POSITIONS:
            found = _POSITIONS[step][1](next(left), n)
    old = None
    if chain.from_parent:
        assert before is not None
        old = before[: n * chain.width].view(words.word(chain.width))
    if "palette" in chain.steps:
        x = palette.join(list(left), n, chain.width)
    elif "grid" in chain.steps:
        assert old is not None
        x = _join_grid(list(left), old, found)
    else:
        x = _words(chain, left, n if found is None else found.size)
        if found is not None:
            x = _spread(x, found, n)
        if old is not None:
            x = words.add(x, old)
    whole = np.ascontiguousarray(x).view(np.uint8)
    return np.concatenate([whole, parts[-1]]) if tail else whole


def _count(chain: Chain) -> int:
    """How many segments a frame has that holds whole words."""
    width = 2 if "narrow" in chain.steps else chain.width
    if "palette" in chain.steps:
        return palette.segments(width)
    side = sum(step in ("gaps", "mask", "exponents", "bits") for step in chain.steps)
    if "grid" in chain.steps:
        return side + grid.SEGMENTS
    return side + (width if "planes" in chain.steps else 1)


def _words(chain: Chain, left: Iterator[Array], count: int) -> Array:
    """The words that come after `sub`, `gaps` and `mask`."""
    width = 2 if "narrow" in chain.steps else chain.width
    table = next(left) if "exponents" in chain.steps else None
    if "bits" in chain.steps:
        size = next(left)
        if size.size != 1:
            raise InvalidFile("the number of bits takes one byte")
        x = words.unbits(int(size[0]), next(left), count, width)
    else:
        parts = list(left)
        if any(part.size != (count if "planes" in chain.steps else count * width) for part in parts):
            raise InvalidFile("a segment of another length than the frame")
        x = _unplanes(chain, parts, width, table) if "planes" in chain.steps else parts[0].view(words.word(width))
    return words.widen(x) if "narrow" in chain.steps else x


def _unplanes(chain: Chain, parts: list[Array], width: int, table: Array | None) -> Array:
    upper = parts[0].copy() if width == 1 else words.joined(parts[0], parts[1])
    if table is not None:
        upper = words.unexponents(table, upper)
    if "rotate" in chain.steps:
        upper = words.unrotate(upper)
    return words.unplanes(upper, parts[2:], width)


def _spread(x: Array, found: Array, n: int) -> Array:
    if not x.all():
        raise InvalidFile("a zero word where there should be none")
    full = np.zeros(n, x.dtype)
    full[found] = x
    return full


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
