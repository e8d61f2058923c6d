"""Floats given the parent's: how many steps of one grid they moved, and what of them lies between its lines.

Training moves all values of a tensor about as far, whatever their size. On a grid as fine as that all of them move
alike, so one Huffman table serves them; what is left of each word, as many bits as its exponent says, is noise.
`words.subtract` counts floats instead, which lie the closer the smaller they are.

A word has a sign, 8 bits of exponent, and a mantissa: fp32 and bf16. (Others come back as well; they gain nothing.)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
        stored whole; the lowest byte between the lines, the next one, and the bits above, as many each at a time.
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
    """The lowest `count` bits of each word: whole bytes, lowest first, and what is above them."""
    bits = count & np.uint8(7)
    over = (w >> (count - bits)).astype(np.uint8)
    packed = [_packed(over[np.flatnonzero(bits == r)], r) for r in range(1, 8)]
    low, next_one = w.astype(np.uint8), (w >> np.uint32(8)).astype(np.uint8)
    return [low[count >= 8], next_one[count >= 16], np.concatenate(packed)]


def _join_rest(rest: Sequence[Array], count: Array) -> Array:
    """The inverse of `_split_rest`, uint32. Raises InvalidFile for segments of other lengths."""
    bits = count & np.uint8(7)
    low, next_one = count >= 8, count >= 16
    sizes = np.bincount(bits, minlength=8).tolist()
    ends = [0, *itertools.accumulate(-(-n * r // 8) for r, n in enumerate(sizes[1:], 1))]
    if [part.size for part in rest] != [np.count_nonzero(low), np.count_nonzero(next_one), ends[-1]]:
        raise InvalidFile("other bits between the lines of a grid than there are")
    over = np.zeros(count.size, np.uint8)
    for r in range(1, 8):
        if sizes[r]:
            over[np.flatnonzero(bits == r)] = _unpacked(rest[2][ends[r - 1] : ends[r]], sizes[r], r)
    found: Array = over.astype(np.uint32) << (count - bits)
    found |= _spread(rest[0], low)
    found |= _spread(rest[1], next_one).astype(np.uint32) << np.uint32(8)
    return found


def _spread(values: Array, places: Array) -> Array:
    if values.size == places.size:
        return values
    full = np.zeros(places.size, np.uint8)
    full[places] = values
    return full


def _halves(r: int) -> list[tuple[np.uint64, np.uint64, np.uint64]]:
    """How eight numbers of r bits come together in a word of eight bytes: two each, four each, all eight.

    Each time the mask of the lower ones, where they go beside them, and how far the upper ones are to move.
    """
    found = []
    for lane in (8, 16, 32):
        have = lane // 8 * r
        lower = sum(((1 << have) - 1) << at for at in range(0, 64, 2 * lane))
        found.append((np.uint64(lower), np.uint64(lower << have), np.uint64(lane - have)))
    return found


def _packed(x: Array, r: int) -> Array:
    """The lowest r bits of each, one behind the other, from the lowest bit of the first byte up."""
    full = np.zeros((-(-x.size // 8), 8), np.uint8)
    full.reshape(-1)[: x.size] = x
    words = full.view(np.uint64)
    for lower, beside, far in _halves(r):
        words = (words & lower) | ((words >> far) & beside)
    packed: Array = words.view(np.uint8)[:, :r].reshape(-1)[: -(-x.size * r // 8)]
    return packed


def _unpacked(packed: Array, n: int, r: int) -> Array:
    """The inverse of `_packed`. Raises InvalidFile for bits beyond the last number."""
    rows = -(-n // 8)
    full = np.zeros((rows, 8), np.uint8)
    full[:, :r] = np.concatenate([packed, np.zeros(rows * r - packed.size, np.uint8)]).reshape(rows, r)
    words = full.view(np.uint64)
    for lower, beside, far in reversed(_halves(r)):
        words = (words & lower) | ((words & beside) << far)
    found = words.view(np.uint8).reshape(-1)
    if found[n:].any():
        raise InvalidFile("bits beyond the last word of a grid")
    return found[:n]
