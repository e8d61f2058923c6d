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

_EIGHT = np.uint16(8)
_CLOSE = 32
_FAR = 255
"""In gaps: 255 more zero words, and the gap goes on."""


def word(width: int) -> np.dtype[np.unsignedinteger]:
    """The dtype of words of so many bytes."""
    return np.dtype(f"<u{width}")


def rotate(upper: Array) -> Array:
    """The top bit of each goes to the low end; of the upper 16 bits of a float the sign.

    So the exponent begins a byte, and the bytes of the mantissa below stay as they are.
    """
    turned: Array = upper << upper.dtype.type(1)
    turned |= upper >> upper.dtype.type(upper.dtype.itemsize * 8 - 1)
    return turned


def unrotate(upper: Array) -> Array:
    """The inverse of `rotate`, in place."""
    last = upper.dtype.type(upper.dtype.itemsize * 8 - 1)
    low = upper << last
    upper >>= upper.dtype.type(1)
    upper |= low
    return upper


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


def exponents(upper: Array) -> tuple[Array, Array]:
    """Rotated floats with their exponents numbered.

    Numbers take fewer bits than exponents; the mantissa's next bits move up beside them into the top byte, so that
    they are coded jointly, and zeros follow below.

    Args:
        upper: The upper 16 bits of each word, uint16: the exponent, and 8 bits below it.

    Returns:
        The exponents, ascending, uint8, and what takes the place of `upper`.
    """
    used = _used(upper)
    spare = np.uint16(_spare(len(used)))
    if used[-1] - used[0] == len(used) - 1:
        numbered = upper - np.uint16(used[0] << 8)
        numbered <<= spare
        return np.frombuffer(used, np.uint8), numbered
    numbers = bytearray(256)
    for n, exponent in enumerate(used):
        numbers[exponent] = n
    return np.frombuffer(used, np.uint8), _renamed(upper, bytes(numbers)) << spare


def unexponents(table: Array, upper: Array) -> Array:
    """The inverse of `exponents`, in place. Raises InvalidFile for a number beyond the table."""
    if not table.size or np.any(table[1:] <= table[:-1]):
        raise InvalidFile("a table of exponents that is not in order")
    spare = _spare(table.size)
    low = np.uint16((1 << spare) - 1)
    if upper.size and (int(upper.max()) >> spare + 8 >= table.size or int(np.bitwise_or.reduce(upper)) & int(low)):
        raise InvalidFile("an exponent beyond its table")
    upper >>= np.uint16(spare)
    if int(table[-1]) - int(table[0]) == table.size - 1:
        upper += np.uint16(int(table[0]) << 8)
        return upper
    return _renamed(upper, table.tobytes().ljust(256, b"\0"))


def _renamed(upper: Array, names: bytes) -> Array:
    """The top bytes as a table has them."""
    top = np.frombuffer((upper >> _EIGHT).astype(np.uint8).tobytes().translate(names), np.uint8)
    return joined(top, upper.astype(np.uint8))


def _used(upper: Array) -> bytes:
    """The top bytes that occur, ascending; where they lie close together all between the least and the greatest."""
    if not upper.size:
        return bytes(1)
    least, greatest = int(upper.min()) >> 8, int(upper.max()) >> 8
    if greatest - least < _CLOSE:
        return bytes(range(least, greatest + 1))
    # Faster than counting them: few are missing from a sample.
    data = (upper >> _EIGHT).astype(np.uint8).tobytes()
    known = bytes(set(data[:4096]))
    return bytes(sorted({*known, *data.translate(None, known)}))


def _spare(used: int) -> int:
    """How far the mantissa moves up beside so many exponents: 7 bits together are what a Huffman coder does best."""
    return max(0, 7 - (used - 1).bit_length())


def joined(top: Array, below: Array) -> Array:
    """Two bytes as a word, uint16."""
    upper = top.astype("<u2")
    upper <<= _EIGHT
    upper |= below
    return upper


def halves(upper: Array) -> list[Array]:
    """The inverse of `joined`; of single bytes these alone."""
    return [(upper >> _EIGHT).astype(np.uint8), upper.astype(np.uint8)] if upper.dtype.itemsize == 2 else [upper]


def planes(x: Array) -> tuple[Array, list[Array]]:
    """The upper 16 bits of all words (of single bytes 8), and the bytes below, most significant ones first."""
    width = x.dtype.itemsize
    if width <= 2:
        return x, []
    upper = np.ascontiguousarray(x.view("<u2")[width // 2 - 1 :: width // 2])
    single = x.view(np.uint8).reshape(-1, width)
    return upper, [np.ascontiguousarray(single[:, place]) for place in reversed(range(width - 2))]


def unplanes(upper: Array, lower: list[Array], width: int) -> Array:
    """The inverse of `planes`."""
    if width <= 2:
        return upper
    whole = np.empty((upper.size, width), np.uint8)
    whole.view("<u2")[:, -1] = upper
    for place, part in zip(reversed(range(width - 2)), lower, strict=True):
        whole[:, place] = part
    return whole.reshape(-1).view(word(width))


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
