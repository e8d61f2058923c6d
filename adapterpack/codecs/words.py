"""What a chain does to words: flat little-endian unsigned arrays of 1, 2, 4 or 8 bytes each.

Every function here has its inverse beside it. None loses a bit, whatever the words mean: NaN payloads and
negative zeros are words like others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adapterpack.errors import InvalidFile

if TYPE_CHECKING:
    from adapterpack.tensor import Array

_ONE, _SEVEN = np.uint8(1), np.uint8(7)
_CLOSE = 32
_FAR = 255
"""In gaps: 255 more zero words, and the gap goes on."""


def word(width: int) -> np.dtype[np.unsignedinteger]:
    """The dtype of words of so many bytes."""
    return np.dtype(f"<u{width}")


def rotate(parts: list[Array]) -> list[Array]:
    """Words as planes: the top bit goes to the low end of the top two bytes; of a float the sign.

    So the exponent begins a byte, and the bytes of the mantissa below stay as they are.
    """
    top, below, *rest = (*parts, parts[0])[: max(len(parts), 2)]
    new = [(top << _ONE) | (below >> _SEVEN), (below << _ONE) | (top >> _SEVEN), *rest]
    return new[: len(parts)]


def unrotate(parts: list[Array]) -> list[Array]:
    """The inverse of `rotate`."""
    top, below, *rest = (*parts, parts[0])[: max(len(parts), 2)]
    new = [(top >> _ONE) | (below << _SEVEN), (below >> _ONE) | (top << _SEVEN), *rest]
    return new[: len(parts)]


def narrow(x: Array) -> Array:
    """The upper halves of 4-byte words whose lower halves are zero: bf16 values in an fp32 file."""
    return np.ascontiguousarray(x.view("<u2")[1::2])


def widen(x: Array) -> Array:
    """The inverse of `narrow`."""
    return x.astype("<u4") << np.uint32(16)


def _negative(x: Array) -> Array:
    """All bits where the top bit is set, else none."""
    shift = x.dtype.itemsize * 8 - 1
    result: Array = (x.view(f"<i{x.dtype.itemsize}") >> shift).view(x.dtype)
    return result


def _ordered(x: Array) -> Array:
    """Floats as unsigned numbers in the order of their values: negative ones inverted, positive ones above them."""
    result: Array = x ^ (_negative(x) | x.dtype.type(1 << (x.dtype.itemsize * 8 - 1)))
    return result


def _unordered(x: Array) -> Array:
    result: Array = x ^ (~_negative(x) | x.dtype.type(1 << (x.dtype.itemsize * 8 - 1)))
    return result


def subtract(x: Array, before: Array) -> Array:
    """How many floats lie between each word and the one before; zigzag, so that small is small either way."""
    difference = _ordered(x) - _ordered(before)
    result: Array = (difference << difference.dtype.type(1)) ^ _negative(difference)
    return result


def add(z: Array, before: Array) -> Array:
    """The inverse of `subtract`."""
    one = z.dtype.type(1)
    difference = (z >> one) ^ (~(z & one) + one)
    return _unordered(_ordered(before) + difference)


def gaps(x: Array) -> Array:
    """Where words are not zero, as uint8: before each such word the number of zero words, 255 being 'and more'."""
    gap = np.diff(np.flatnonzero(x), prepend=-1) - 1
    far = gap // _FAR
    coded = np.full(gap.size + int(far.sum()), _FAR, dtype=np.uint8)
    coded[np.cumsum(far + 1) - 1] = gap % _FAR
    return coded


def ungaps(coded: Array, n: int) -> Array:
    """The inverse of `gaps`: positions among `n` words, ascending. Raises InvalidFile where they lie beyond."""
    ends = coded != _FAR
    if coded.size and not ends[-1]:
        raise InvalidFile("gaps that lead to no word")
    positions = np.cumsum(np.where(ends, coded.astype(np.int64) + 1, _FAR))[ends] - 1
    if positions.size and positions[-1] >= n:
        raise InvalidFile("a gap that leads beyond the frame")
    result: Array = positions
    return result


def mask(x: Array) -> Array:
    """Where words are not zero: one bit a word, the first one lowest in its byte."""
    return np.packbits(x != 0, bitorder="little")


def unmask(coded: Array, n: int) -> Array:
    """The inverse of `mask`: positions among `n` words. Raises InvalidFile for bits beyond."""
    bits = np.unpackbits(coded, bitorder="little")
    if coded.size != -(-n // 8) or bits[n:].any():
        raise InvalidFile("a mask of another length than the frame")
    return np.flatnonzero(bits[:n])


def exponents(top: Array, below: Array) -> tuple[Array, Array, Array]:
    """Rotated floats with their exponents numbered: the first two planes change.

    Numbers take fewer bits than exponents; the mantissa's next bits move up beside them into the top byte, so that
    they are coded jointly, and zeros follow below.

    Args:
        top: The exponents, uint8.
        below: The next byte of each word.

    Returns:
        The exponents, ascending, and the two planes.
    """
    used = _used(top)
    numbers = bytearray(256)
    for n, exponent in enumerate(used):
        numbers[exponent] = n
    number = np.frombuffer(top.tobytes().translate(bytes(numbers)), np.uint8)
    spare = _spare(len(used))
    if not spare:
        return np.frombuffer(used, np.uint8), number, below
    up, down = np.uint8(spare), np.uint8(8 - spare)
    return np.frombuffer(used, np.uint8), (number << up) | (below >> down), below << up


def unexponents(table: Array, top: Array, below: Array) -> tuple[Array, Array]:
    """The inverse of `exponents`. Raises InvalidFile for a number beyond the table."""
    if not table.size or np.any(table[1:] <= table[:-1]):
        raise InvalidFile("a table of exponents that is not in order")
    spare = _spare(table.size)
    number = top >> np.uint8(spare)
    if top.size and (int(number.max()) >= table.size or int(np.bitwise_or.reduce(below)) & ((1 << spare) - 1)):
        raise InvalidFile("an exponent beyond its table")
    exponent = np.frombuffer(number.tobytes().translate(table.tobytes().ljust(256, b"\0")), np.uint8)
    return exponent, (top << np.uint8(8 - spare)) | (below >> np.uint8(spare)) if spare else below


def _used(top: Array) -> bytes:
    """The byte values that occur, ascending; where they lie close together all between the least and the greatest."""
    if not top.size:
        return bytes(1)
    least, greatest = int(top.min()), int(top.max())
    if greatest - least < _CLOSE:
        return bytes(range(least, greatest + 1))
    # Faster than counting them: few are missing from a sample.
    data = top.tobytes()
    known = bytes(set(data[:4096]))
    return bytes(sorted({*known, *data.translate(None, known)}))


def _spare(used: int) -> int:
    """How far the mantissa moves up beside so many exponents: 7 bits together are what a Huffman coder does best."""
    return max(0, 7 - (used - 1).bit_length())


def planes(x: Array) -> list[Array]:
    """The bytes of all words, most significant ones first, one uint8 array for each place."""
    width = x.dtype.itemsize
    pairs = x.view(np.uint8).reshape(-1, width)
    return [np.ascontiguousarray(pairs[:, place]) for place in reversed(range(width))]


def unplanes(parts: list[Array], width: int) -> Array:
    """The inverse of `planes`."""
    joined = np.empty((parts[0].size, width), np.uint8)
    for place, part in zip(reversed(range(width)), parts, strict=True):
        joined[:, place] = part
    return joined.reshape(-1).view(word(width))


def bits(x: Array) -> tuple[int, Array]:
    """Words at the least number of bits that holds all of them, one behind the other from the lowest bit up.

    Returns:
        The number of bits, 0 where all are zero, and the bytes.
    """
    n = int(x.max()).bit_length() if x.size else 0
    lowest = np.unpackbits(x.view(np.uint8).reshape(-1, x.dtype.itemsize), axis=1, bitorder="little")[:, :n]
    return n, np.packbits(lowest, bitorder="little")


def unbits(n: int, coded: Array, count: int, width: int) -> Array:
    """The inverse of `bits`. Raises InvalidFile for a wrong length or bits beyond the last word."""
    if n > width * 8 or coded.size != -(-count * n // 8):
        raise InvalidFile("packed words of another length than the frame")
    flat = np.unpackbits(coded, bitorder="little")
    if flat[count * n :].any():
        raise InvalidFile("bits beyond the last word")
    full = np.zeros((count, width * 8), np.uint8)
    full[:, :n] = flat[: count * n].reshape(count, n)
    return np.packbits(full, axis=1, bitorder="little").reshape(-1).view(word(width))
