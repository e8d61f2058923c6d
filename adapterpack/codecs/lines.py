"""Whole-number codes of quantised tensors: lines of one step each, grouped so that like lines share a Huffman table.

A line is a row or a column of a matrix, or a whole vector; its values are code * step, exact in f32. A code q goes
through zigzag to z >= 0; the low n bits of z are stored as they are, for they are nearly uniform where steps are
small, and z >> n is one byte, which zstd's Huffman coder takes. No other entropy coder is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from adapterpack.errors import InvalidFile
from adapterpack.io import zstd

if TYPE_CHECKING:
    from adapterpack.tensor import Array

STEPS = range(-1024, 512)
"""Step codes. Products with any code have neither subnormals nor infinities in f32."""
MOST_LOW_BITS = 13
LARGEST = (1 << (MOST_LOW_BITS + 7)) - 1
"""Largest |code|: its zigzag has a byte beyond the low bits, and times 15 it is exact in f32."""

_MERGES_WITH_FOLD = 3
_TABLE_BYTES = 24.0
"""A class costs this much, and a part of a byte for each symbol, beside its codes: frame, block and table."""
_SYMBOL_BYTES = 0.4


def step_value(j: int) -> float:
    """The step of a code j: eight to an octave, (8 + j % 8) * 2**(j // 8 - 3), exact. Raises InvalidFile."""
    if j not in STEPS:
        raise InvalidFile(f"no step has the code {j}")
    return math.ldexp(8 + j % 8, j // 8 - 3)


def step_values(codes: Sequence[int] | Array) -> Array:
    """f64, the steps of many codes; see `step_value`."""
    j = np.asarray(codes, dtype=np.int64)
    if j.size and (int(j.min()) not in STEPS or int(j.max()) not in STEPS):
        raise InvalidFile("a step code out of range")
    values: Array = (8 + j % 8) * 2.0 ** (j // 8 - 3)
    return values


def nearest_steps(values: Sequence[float] | Array) -> Array:
    """int64, the codes of the steps nearest to positive finite numbers; the ends of the range where there is none."""
    fraction, exponent = np.frexp(np.asarray(values, dtype=np.float64))
    j = 8 * (exponent.astype(np.int64) - 1) + np.rint(fraction * 16).astype(np.int64) - 8
    found: Array = np.clip(j, STEPS.start, STEPS.stop - 1)
    return found


def line_shape(shape: Sequence[int], axis: int) -> tuple[int, int]:
    """(lines, length) of a tensor: the first dimension by all others is a matrix, a vector one line.

    Args:
        axis: 0: lines are rows; 1: columns.
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows, columns) if axis == 0 else (columns, rows)


@dataclass(frozen=True, eq=False)
class Quantised:
    """Where the bytes of a quantised tensor come from: little-endian f32 values, row by row.

    Attributes:
        codes: int32, (lines, length), |code| <= LARGEST.
        steps: The step code of each line.
        axis: 0: the lines are the rows of the tensor; 1: they are its columns.
    """

    codes: Array
    steps: tuple[int, ...]
    axis: int = 0

    def __post_init__(self) -> None:
        lines, _ = self.codes.shape
        if self.axis not in (0, 1) or len(self.steps) != lines or self.codes.dtype != np.int32:
            raise InvalidFile(f"{lines} lines of {self.codes.dtype} along axis {self.axis}, {len(self.steps)} steps")
        if self.codes.size and not (int(self.codes.min()) >= -LARGEST and int(self.codes.max()) <= LARGEST):
            raise InvalidFile(f"a code beyond {LARGEST}")

    @cached_property
    def _factors(self) -> Array:
        return step_values(self.steps).astype("<f4")

    @property
    def nbytes(self) -> int:
        return int(self.codes.size) * 4

    def values(self) -> Array:
        """f32, as the tensor lies: (lines, length), or (length, lines) where the lines are columns."""
        lifted = self.codes.astype("<f4") * self._factors[:, None]
        return lifted if self.axis == 0 else np.ascontiguousarray(lifted.T)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), of whole rows that are computed for it."""
        width = 4 * self.codes.shape[1 - self.axis]
        stop = min(stop, self.nbytes)
        if stop <= start:
            return b""
        first, last = start // width, -(-stop // width)
        if self.axis == 0:
            rows = self.codes[first:last].astype("<f4") * self._factors[first:last, None]
        else:
            rows = self.codes[:, first:last].T.astype("<f4") * self._factors
        return rows.tobytes()[start - first * width : stop - first * width]


# -- a line as it is stored ------------------------------------------------------------------------------


def zigzag(codes: Array) -> Array:
    """uint32: 0, -1, 1, -2, 2 as 0, 1, 2, 3, 4. Args: codes: int32."""
    return ((codes << 1) ^ (codes >> 31)).view(np.uint32)


def unzigzag(z: Array) -> Array:
    """The inverse of `zigzag`, int32. Args: z: uint32 below 2**31."""
    return (z >> np.uint32(1)).view(np.int32) ^ -(z & np.uint32(1)).astype(np.int32)


def split(codes: Array, n: int) -> tuple[bytes, bytes]:
    """A line as (high, low): a byte for each code, and n bits for each, packed from the lowest bit up.

    Args:
        codes: int32, flat.
        n: 0 to MOST_LOW_BITS.

    Raises:
        InvalidFile: what is above the low bits takes more than a byte.
    """
    z = zigzag(np.ascontiguousarray(codes))
    high = z >> np.uint32(n)
    if not 0 <= n <= MOST_LOW_BITS or (high.size and int(high.max()) > 255):
        raise InvalidFile(f"codes that do not fit in a byte and {n} bits")
    bits = np.unpackbits(z.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, count=n, bitorder="little")
    return high.astype(np.uint8).tobytes(), np.packbits(bits, bitorder="little").tobytes()


def join(high: bytes, low: bytes, n: int) -> Array:
    """The inverse of `split`: int32, flat.

    Raises:
        InvalidFile: the parts are of different lengths, or bits beyond the last code are set.
    """
    upper = np.frombuffer(high, np.uint8)
    if not 0 <= n <= MOST_LOW_BITS or len(low) != -(-upper.size * n // 8):
        raise InvalidFile(f"{len(low)} bytes are not {n} bits for each of {upper.size} codes")
    flat = np.unpackbits(np.frombuffer(low, np.uint8), bitorder="little")
    if flat[upper.size * n :].any():
        raise InvalidFile("bits beyond the last code")
    full = np.zeros((upper.size, 32), np.uint8)
    full[:, :n] = flat[: upper.size * n].reshape(upper.size, n)
    lower = np.packbits(full, axis=1, bitorder="little").reshape(-1).view("<u4")
    return unzigzag(upper.astype(np.uint32) << np.uint32(n) | lower)


# -- which lines share a table ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Classes:
    """How the lines of some tensors are stored.

    Attributes:
        low_bits: Of each class, the bits of a code that are stored as they are.
        of_lines: Of each tensor, the class of each line.
        nbytes: About what all of it takes, from histograms.
    """

    low_bits: tuple[int, ...]
    of_lines: tuple[tuple[int, ...], ...]
    nbytes: int


@dataclass(frozen=True, eq=False)
class _Group:
    """Lines that may share a table.

    Attributes:
        key: Of the kinds of lines in it.
        n: Low bits.
        counts: How often each high byte occurs, (256,).
        lines: How many they are.
    """

    keys: tuple[tuple[int, int], ...]
    n: int
    counts: Array
    lines: int

    @cached_property
    def bits(self) -> float:
        """What its codes take, the table counted in, the class of each line not."""
        total = float(self.counts.sum())
        used = self.counts[self.counts > 0]
        entropy = total * math.log2(total) - float((used * np.log2(used)).sum()) if total else 0.0
        # A Huffman code has whole bits: no symbol takes less than one, unless there is but one symbol.
        coded = 0.0 if used.size < 2 else max(entropy * 1.004, total)
        return coded + self.n * total + 8 * (_TABLE_BYTES + _SYMBOL_BYTES * used.size)

    def label_bits(self, lines: int) -> float:
        """What it takes to say of each line that it is one of these."""
        return self.lines * math.log2(lines / self.lines)

    def folded(self, n: int) -> Array:
        counts = self.counts
        for _ in range(n - self.n):
            counts = np.concatenate([counts[0::2] + counts[1::2], np.zeros(128, counts.dtype)])
        return counts

    def best(self) -> _Group:
        """The same lines with the number of low bits that is smallest."""
        top = min(self.n + _MERGES_WITH_FOLD, MOST_LOW_BITS)
        return min((_Group(self.keys, n, self.folded(n), self.lines) for n in range(self.n, top + 1)), key=_bits)

    def with_(self, other: _Group) -> _Group:
        n = max(self.n, other.n)
        return _Group((*self.keys, *other.keys), n, self.folded(n) + other.folded(n), self.lines + other.lines).best()


def _bits(group: _Group) -> float:
    return group.bits


def classes(tensors: Sequence[Quantised]) -> Classes:
    """Group lines, quarter octaves of their mean size at first, while joining two groups makes the whole smaller.

    It depends on the codes alone, and on their order only in how the classes are numbered.
    """
    kinds = [list(_kinds(t)) for t in tensors]
    found: dict[tuple[int, int], tuple[Array, int]] = {}
    for tensor, own in zip(tensors, kinds, strict=True):
        z = zigzag(tensor.codes)
        for kind in sorted(set(own)):
            picked = np.flatnonzero([k == kind for k in own])
            counts = np.bincount((z[picked] >> np.uint32(kind[1])).reshape(-1), minlength=256)
            before, lines = found.get(kind, (0, 0))
            found[kind] = (before + counts, lines + picked.size)
    total = sum(lines for _, lines in found.values())
    groups = [_Group((kind,), kind[1], counts, lines).best() for kind, (counts, lines) in sorted(found.items())]
    groups = _joined(groups, total)
    number = {kind: n for n, group in enumerate(groups) for kind in group.keys}
    return Classes(
        tuple(g.n for g in groups),
        tuple(tuple(number[kind] for kind in own) for own in kinds),
        math.ceil(sum(g.bits + g.label_bits(total) for g in groups) / 8),
    )


def _kinds(tensor: Quantised) -> Iterator[tuple[int, int]]:
    """Of each line: quarter octaves of its mean size, and the low bits that it takes at least."""
    if not tensor.codes.shape[1]:
        yield from [(0, 0)] * tensor.codes.shape[0]
        return
    z = zigzag(tensor.codes)
    for mean, most in zip(z.mean(axis=1, dtype=np.float64).tolist(), z.max(axis=1).tolist(), strict=True):
        yield round(4 * math.log2(1 + mean)), max(0, most.bit_length() - 8)


def _joined(groups: list[_Group], lines: int) -> list[_Group]:
    """Join the two that save most, until none save anything."""
    gains: dict[tuple[int, int], tuple[float, _Group]] = {}
    alive = dict(enumerate(groups))
    fresh = list(alive)
    while True:
        for new in fresh:
            for other in alive:
                if other != new:
                    pair = (min(new, other), max(new, other))
                    x, y = alive[pair[0]], alive[pair[1]]
                    both = x.with_(y)
                    saved = sum(g.bits + g.label_bits(lines) for g in (x, y)) - both.bits - both.label_bits(lines)
                    gains[pair] = (saved, both)
        best = max(gains, key=lambda p: (gains[p][0], p), default=None)
        if best is None or gains[best][0] <= 0:
            return [alive[n] for n in sorted(alive)]
        both = gains[best][1]
        gains = {p: g for p, g in gains.items() if not set(p) & set(best)}
        for n in best:
            del alive[n]
        fresh = [max((*alive, *best)) + 1]
        alive[fresh[0]] = both


# -- how large that is -----------------------------------------------------------------------------------


def streams(tensors: Sequence[Quantised], found: Classes) -> list[tuple[bytes, bytes]]:
    """Of each class its high bytes and its low bits, line after line."""
    high: list[list[bytes]] = [[] for _ in found.low_bits]
    low: list[list[bytes]] = [[] for _ in found.low_bits]
    for tensor, own in zip(tensors, found.of_lines, strict=True):
        for line, c in zip(tensor.codes, own, strict=True):
            upper, lower = split(line, found.low_bits[c])
            high[c].append(upper)
            low[c].append(lower)
    return [(b"".join(h), b"".join(w)) for h, w in zip(high, low, strict=True)]


def stored_size(tensors: Sequence[Quantised]) -> int:
    """Bytes of the tensors as a pack stores them: every stream coded, steps and classes too. Slow: for proofs."""
    found = classes(tensors)
    parts = streams(tensors, found)
    steps = np.array([j for t in tensors for j in t.steps], "<i2")
    side = [steps.tobytes(), bytes(c for own in found.of_lines for c in own)]
    return sum(_coded(h) + len(w) for h, w in parts) + sum(_coded(s) for s in side) + len(found.low_bits)


def _coded(data: bytes) -> int:
    return min(len(data), *(len(zstd.compress(data, level)) for level in (zstd.HUFFMAN, 19)))
