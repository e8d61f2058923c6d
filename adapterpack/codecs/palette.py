"""Floats of few values: the values of each run of words once, and the place of each word among them.

Factors that were trained or rounded on a grid have few values for each scale, 2^bits or so. The bytes of a float hide
that: each of them is coded alone, and the lower ones look like noise. A run is what has one scale: rows, or all of a
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from adapterpack.codecs.words import halves, joined, planes, rotate, unplanes, unrotate, word
from adapterpack.errors import InvalidFile

if TYPE_CHECKING:
    from adapterpack.tensor import Array, Source

WIDTHS = (2, 4)
"""Bytes of a word that this serves."""
_MOST = 256
"""Values of a palette: places are a byte each, or less."""
_LEAST_RUN = 256
"""Words of a run: fewer may all have a value of their own, so that any words can be coded."""
_MOST_RUN = 2 << 20
"""Bytes of a run that is looked for: no more than a frame has."""
_SAMPLE = 512
"""Consecutive words that tell of most tensors that they have too many values."""
_PART = 4096
_REPEATS = 4
"""How often a value must occur in the mean, zeros aside: what is merely sparse is better coded as such."""


def segments(width: int) -> int:
    """How many segments a frame has."""
    return width + 2


def split(x: Array, run: int) -> list[Array]:
    """Words as segments.

    Args:
        x: Words of 2 or 4 bytes.
        run: So many one behind the other share a palette; fewer where that is too many for one.

    Returns:
        uint8 each: the words of a run as 4 bytes, and the size of each palette less one; what each value is above
        the one before, most significant bytes of all first; the place of each word, several to a byte if they fit:
        together they are coded better.
    """
    # The sign at the low end: in the order of magnitudes one more of the largest ones moves no other place.
    turned = rotate(x)
    run = max(min(run, x.size), _LEAST_RUN)
    while (found := _palettes(turned, run)) is None:
        run = max(-(-run // 2), _LEAST_RUN)
    places = np.empty(x.size, np.uint8)
    for n, palette in enumerate(found):
        part = slice(n * run, (n + 1) * run)
        places[part] = np.searchsorted(palette, turned[part])
    sizes = np.array([palette.size - 1 for palette in found], np.uint8)
    above = [np.diff(palette, prepend=x.dtype.type(0)) for palette in found]
    upper, lower = planes(np.concatenate([np.empty(0, x.dtype), *above]))
    head = np.concatenate([np.array([run], "<u4").view(np.uint8), sizes])
    return [head, *halves(upper), *lower, _packed(places, _bits(sizes))]


def join(parts: Sequence[Array], n: int, width: int) -> Array:
    """The inverse of `split`: n words. Raises InvalidFile where the segments do not fit each other."""
    head, *above, packed = parts
    run = int.from_bytes(head[:4].tobytes(), "little")
    sizes = head[4:].astype(np.int64) + 1
    if head.size < 4 or run < _LEAST_RUN or sizes.size != -(-n // run):
        raise InvalidFile("palettes for another number of words than the frame has")
    ends, places = np.cumsum(sizes), _unpacked(packed, _bits(head[4:]), n)
    if any(part.size != (ends[-1] if ends.size else 0) for part in above):
        raise InvalidFile("palettes of other sizes than they say")
    values = unplanes(joined(above[0], above[1]), above[2:], width).astype(np.uint64)
    x = np.empty(n, word(width))
    for i, (size, end) in enumerate(zip(sizes.tolist(), ends.tolist(), strict=True)):
        part, steps = slice(i * run, (i + 1) * run), values[end - size : end]
        palette = np.cumsum(steps, dtype=np.uint64)
        if not steps[1:].all() or int(palette[-1]) >> (8 * width):
            raise InvalidFile("a palette that does not ascend")
        if int(places[part].max()) >= size:
            raise InvalidFile("a place beyond its palette")
        x[part] = palette.astype(x.dtype)[places[part]]
    return unrotate(x)


def _bits(sizes: Array) -> int:
    """Of a place: 1, 2, 4 or 8. Sizes are less one."""
    most = int(sizes.max()) if sizes.size else 0
    return next(q for q in (1, 2, 4, 8) if most < 1 << q)


def _packed(places: Array, q: int) -> Array:
    """Places of q bits, the first one lowest in its byte."""
    rows = np.zeros((-(-places.size * q // 8), 8 // q), np.uint8)
    rows.reshape(-1)[: places.size] = places
    packed = rows[:, 0].copy()
    for n in range(1, 8 // q):
        packed |= rows[:, n] << np.uint8(q * n)
    return packed


def _unpacked(packed: Array, q: int, n: int) -> Array:
    """The inverse of `_packed`. Raises InvalidFile for another length, or bits beyond the last place."""
    if packed.size != -(-n * q // 8):
        raise InvalidFile("palettes with places for another number of words than the frame has")
    rows = np.empty((packed.size, 8 // q), np.uint8)
    for i in range(8 // q):
        rows[:, i] = (packed >> np.uint8(q * i)) & np.uint8((1 << q) - 1)
    places = rows.reshape(-1)
    if places[n:].any():
        raise InvalidFile("bits beyond the last place in a palette")
    return places[:n]


def shared(source: Source, width: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """How many words of a matrix could share a palette: as many rows as a frame holds, or one row if its places are
    shorter.

    Args:
        source: Its bytes.
        width: Bytes of a word.
        shape: (rows, columns), or more dimensions, of which the last one is the row.

    Returns:
        That, and the bits of a place; 0, 0 where its values are too many, or so few that any other code does as well.
        Of most tensors that is known from their first words.
    """
    row = shape[-1]
    rows = math.prod(shape[:-1])
    if width not in WIDTHS or rows < 2 or not 0 < row * width <= _MOST_RUN:
        return 0, 0
    many = next(k for k in range(min(rows, _MOST_RUN // (row * width)), 0, -1) if rows % k == 0)
    runs = [run for run in dict.fromkeys((many * row, row)) if run >= _LEAST_RUN]
    if not runs or _palette(np.frombuffer(source.read(0, min(_SAMPLE, *runs) * width), word(width)), 2) is None:
        return 0, 0
    found = [(run, q) for run in runs if (q := _few(source, width, run))]
    return min(found, key=lambda one: one[1], default=(0, 0))


def _few(source: Source, width: int, run: int) -> int:
    """The bits of a place, if all runs have few values that come again and again, and one of them more than two."""

    def words(start: int, stop: int) -> Array:
        return np.frombuffer(source.read(start * width, stop * width), word(width))

    # Both ends of a run and its middle: a part of it is rarely like the others by chance.
    size = min(_SAMPLE, run)
    if _palette(np.concatenate([words(at, at + size) for at in {0, (run - size) // 2, run - size}]), 2) is None:
        return 0
    most = 0
    for start in range(0, source.nbytes // width, run):
        x = words(start, start + run)
        palette = _palette(x, _REPEATS)
        if palette is None:
            return 0
        most = max(most, palette.size)
    return _bits(np.array([most - 1])) if most > 2 else 0


def _palettes(x: Array, run: int) -> list[Array] | None:
    """The values of each run, ascending; None where they are too many."""
    found = []
    for start in range(0, x.size, run):
        palette = _palette(x[start : start + run])
        if palette is None:
            return None
        found.append(palette)
    return found


def _palette(x: Array, repeats: int = 0) -> Array | None:
    """The values, ascending; None where they are too many, or do not occur so often in the mean, zeros aside."""
    # Most that are too many are so in a part already.
    if x.size > 2 * _PART and np.unique(x[:: x.size // _PART]).size > _MOST:
        return None
    found = np.unique(x)
    return found if found.size <= _MOST and np.count_nonzero(x) >= repeats * np.count_nonzero(found) else None
