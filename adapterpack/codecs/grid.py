"""Floats given the parent's: how many steps of one grid they moved, and what of them lies between its lines.

Training moves all values of a tensor about as far, whatever their size. On a grid as fine as that all of them move
alike, so one Huffman table serves them; what is left of each word, as many bits as its exponent says, is noise.
`words.subtract` counts floats instead, which lie the closer the smaller they are.

A word has a sign, 8 bits of exponent, and a mantissa: fp32 and bf16. (Others come back as well; they gain nothing.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from adapterpack.codecs.words import word
from adapterpack.errors import InvalidFile

if TYPE_CHECKING:
    from adapterpack.tensor import Array

SEGMENTS = 7
_ELSEWHERE = 255
"""The move of a word that is stored whole."""
_BIAS, _MANTISSA = 127, 23
"""Of fp32; words of two bytes are the upper halves of such."""
_SAMPLE = 1 << 15
"""Words that the grid's step is chosen by."""
_FINE, _FAR = 2, 5
"""The grid's steps are so many powers of two finer than most moves, and than nearly all: these reach 127 steps."""


def split(x: Array, before: Array) -> list[Array]:
    """Words as segments.

    Args:
        x: Words of 2 or 4 bytes.
        before: The parent's.

    Returns:
        uint8 each: the exponent of the grid's step; the moves; the exponents of words below the first line; words
        stored whole; the lowest byte between the lines, the next one, and the bits above.
    """
    cut = 32 - 8 * x.dtype.itemsize
    mantissa = np.uint32(_MANTISSA - cut)
    w, p = _single(x), _single(before)
    every = max(x.size // _SAMPLE, 1)
    step = _step(w[::every], p[::every], int(mantissa))
    line, old = _lines(w, step), _lines(p, step)
    moved = _signed(line, w) - _signed(old, p)
    coded = ((moved << 1) ^ (moved >> 31)).view(np.uint32)
    coded[((line | old).view(np.uint32) >> (mantissa + np.uint32(1))) != 0] = _ELSEWHERE
    moves = np.minimum(coded, np.uint32(_ELSEWHERE)).astype(np.uint8)
    placed, whole = _placed(moves)
    if whole.size:
        w = w[placed]
    exponent = ((w >> np.uint32(_MANTISSA)) & np.uint32(255)).astype(np.int16)
    below = np.flatnonzero(exponent < step)
    count = (int(mantissa) - np.clip(exponent - step, 0, int(mantissa))).astype(np.uint8)
    return [
        np.array([step], np.uint8),
        moves,
        exponent[below].astype(np.uint8),
        x[whole].view(np.uint8),
        *_split_rest(w >> np.uint32(cut), count),
    ]


def join(segments: Sequence[Array], before: Array) -> Array:
    """The inverse of `split`. Raises InvalidFile where the segments do not fit each other or the parent's words."""
    size, moves, exponents, whole, *rest = segments
    width = before.dtype.itemsize
    cut = 32 - 8 * width
    mantissa = _MANTISSA - cut
    if size.size != 1 or moves.size != before.size:
        raise InvalidFile("a grid of another length than the frame")
    step = int(size[0])
    placed, left_out = _placed(moves)
    every = not left_out.size
    p = _single(before if every else before[placed])
    coded = (moves if every else moves[placed]).astype(np.int32)
    old = _lines(p, step)
    line = _signed(old, p) + ((coded >> 1) ^ -(coded & 1))
    magnitude = line ^ (line >> 31)
    w = magnitude.astype(np.float32).view(np.uint32)
    above = np.maximum(w >> np.uint32(_MANTISSA), np.uint32(_BIAS)).astype(np.int16) - _BIAS
    most = min(mantissa, 255 - step)
    if ((old | magnitude) >> (mantissa + 1)).any() or (above.size and int(above.max()) > most):
        raise InvalidFile("a move to or from beyond the grid")
    below = np.flatnonzero(magnitude == 0)
    if exponents.size != below.size or np.any(exponents >= step):
        raise InvalidFile("other exponents than the grid has words below its first line")
    if whole.size != left_out.size * width:
        raise InvalidFile("another number of words beside the grid than it leaves out")
    w += np.uint32(((step - _BIAS) << _MANTISSA) % (1 << 32))
    w[below] = exponents.astype(np.uint32) << np.uint32(_MANTISSA)
    w |= _join_rest(rest, (mantissa - above).astype(np.uint8)) << np.uint32(cut)
    w |= line.view(np.uint32) & np.uint32(1 << 31)
    x: Array = w.view(before.dtype) if width == 4 else (w >> np.uint32(cut)).astype(before.dtype)
    if every:
        return x
    found = np.empty(before.size, before.dtype)
    found[placed], found[left_out] = x, whole.view(word(width))
    return found


def _placed(moves: Array) -> tuple[Array, Array]:
    """The places of the words on the grid, and of those beside it."""
    beside = moves == _ELSEWHERE
    return np.flatnonzero(~beside), np.flatnonzero(beside)


def _single(x: Array) -> Array:
    """As fp32, uint32."""
    if x.dtype.itemsize == 4:
        return x
    upper: Array = x.astype(np.uint32) << np.uint32(16)
    return upper


def _step(w: Array, p: Array, mantissa: int) -> int:
    """A good exponent of the grid's step: it costs space where it is a bad one, no more."""
    with np.errstate(all="ignore"):
        moved = np.abs(w.view(np.float32) - p.view(np.float32)).view(np.uint32) >> np.uint32(_MANTISSA)
    # Equal words and NaN say nothing.
    moves = np.bincount(moved, minlength=256)[1:255].cumsum()
    sizes = np.bincount((w >> np.uint32(_MANTISSA)) & np.uint32(255), minlength=256)[:255].cumsum()
    most, nearly_all = (1 + int(np.searchsorted(moves, moves[-1] * part)) for part in (0.5, 0.99))
    large = int(np.searchsorted(sizes, sizes[-1] * 0.99))
    # Finer than the floats themselves is no grid.
    return min(max(most - _FINE, nearly_all - _FAR, large - mantissa, 0), 254)


def _lines(w: Array, step: int) -> Array:
    """How many whole steps a word is away from zero, int32; 2^24 for those whose floats lie further apart."""
    zero = (step - _BIAS) << _MANTISSA
    least, most = max(zero, 0), min((step + _MANTISSA + 1) << _MANTISSA, (1 << 31) - 1)
    size = np.clip(w & np.uint32((1 << 31) - 1), np.uint32(least), np.uint32(most))
    # The exponent less that of the step: a float that counts steps.
    size -= np.uint32(zero % (1 << 32))
    count: Array = size.view(np.float32).astype(np.int32)
    return count


def _signed(line: Array, w: Array) -> Array:
    """Lines below zero as -1 and on: there are two in the middle."""
    result: Array = line ^ (w.view(np.int32) >> 31)
    return result


def _split_rest(w: Array, count: Array) -> list[Array]:
    """The lowest `count` bits of each word: whole bytes, lowest first, and what is above them bit by bit."""
    bits = count & np.uint8(7)
    over = (w >> (count - bits)).astype(np.uint8)
    found = [(over[has] >> np.uint8(j)) & np.uint8(1) for j, has in enumerate(_having(bits))]
    low, next_one = w.astype(np.uint8), (w >> np.uint32(8)).astype(np.uint8)
    return [low[count >= 8], next_one[count >= 16], np.packbits(np.concatenate(found), bitorder="little")]


def _join_rest(rest: Sequence[Array], count: Array) -> Array:
    """The inverse of `_split_rest`, uint32. Raises InvalidFile for segments of other lengths."""
    bits = count & np.uint8(7)
    total = int(bits.sum(dtype=np.int64))
    low, next_one = count >= 8, count >= 16
    sizes = [int(np.count_nonzero(low)), int(np.count_nonzero(next_one)), -(-total // 8)]
    flat = np.unpackbits(rest[2], bitorder="little")
    if [part.size for part in rest] != sizes or flat[total:].any():
        raise InvalidFile("other bits between the lines of a grid than there are")
    over, at = np.zeros(count.size, np.uint8), 0
    for j, has in enumerate(_having(bits)):
        over[has] |= flat[at : at + has.size] << np.uint8(j)
        at += has.size
    r: Array = over.astype(np.uint32) << (count - bits)
    whole = np.zeros((2, count.size), np.uint8)
    whole[0, low], whole[1, next_one] = rest[:2]
    r |= whole[0]
    r |= whole[1].astype(np.uint32) << np.uint32(8)
    return r


def _having(bits: Array) -> Iterator[Array]:
    """The places where there are more than 0 bits, more than 1, and so on to 6."""
    # Places are several times faster than a mask that is as good as random.
    return (np.flatnonzero(bits > n) for n in range(7))
