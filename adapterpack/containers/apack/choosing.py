"""Which chain suits a stream: tried on a sample of it, so that the choice depends on the bytes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterpack.codecs.chain import Chain, store
from adapterpack.containers.apack.file import dictionary_of
from adapterpack.containers.apack.placing import StreamPlan
from adapterpack.io import zstd
from adapterpack.tensor import Joined, Source

if TYPE_CHECKING:
    from adapterpack.tensor import Array

WORDS_FRAME = 2 << 20
"""Bytes of a frame of words: its planes stay in the cache, and one tensor does not cost another."""
BYTES_FRAME = 16 << 20
"""Bytes of a frame of text and the like, where zstd looks back far."""
_BEST, _FAIR, _QUICK = 19, 6, 3
"""zstd levels."""
_SAMPLES, _SAMPLE = 4, 128 << 10
_THOROUGH = 512 << 10
"""Streams up to so many bytes get zstd's best level too."""
_WILLING = 2 << 20
"""Up to so many, where it pays on a sample."""
_PATIENT = 8 << 20
"""Text up to so many bytes gets the best level."""
_CUT_WORDS = 4096
"""Fewer words than this are not worth a table of their own."""
_SPARSE = 0.01
"""Share of zero words from which on they may be worth leaving out."""


@dataclass(frozen=True)
class Choice:
    """How a stream is coded.

    Attributes:
        levels: zstd levels to try on each segment.
        frame: Bytes of a frame.
        cut: Is it worth while to let Huffman tables change where another tensor begins?
    """

    chain: Chain
    levels: tuple[int, ...]
    frame: int
    cut: bool = False

    def store(self, segments: list[Array], cuts: list[int], words: int) -> list[bytes]:
        """Segments of a frame as they are stored.

        Args:
            segments: As the chain splits the frame.
            cuts: Where tensors begin in it, in words; none where it does not pay.
            words: How many words it has. (Planes of fewer bytes are not cut: words are left out there.)
        """
        dictionary = dictionary_of(self.chain)
        return [store(s, self.levels, dictionary, cuts if s.size == words else ()) for s in segments]


def choose(stream: StreamPlan, source: Joined, before: Source | None, total: int) -> Choice:
    """The chain that makes a sample smallest; of equal ones the simplest.

    Args:
        stream: What is to be coded.
        source: Its bytes.
        before: The parent's bytes.
        total: Bytes of all streams: what is a second for a small adapter is nothing gained for a large one.
    """
    if stream.noise:
        return Choice(Chain(1), (), BYTES_FRAME)
    places = _places(stream, source.nbytes)
    sample = [(_raw(source, *place), None if before is None else _raw(before, *place)) for place in places]
    best, smallest = Chain(1), None
    for chain in _candidates(stream, sample):
        size = sum(_size(chain, raw, old) for raw, old in sample)
        if smallest is None or size < smallest:
            best, smallest = chain, size
    if best.steps:
        cut = _cut_pays(best, source, places, sample)
        # Of runs that share a palette none is in two frames.
        frame = WORDS_FRAME // (best.run * best.width) * best.run * best.width if best.run else WORDS_FRAME
        return Choice(best, _levels(best, sample, source.nbytes, total), frame, cut)
    return Choice(best, (zstd.HUFFMAN, _BEST if source.nbytes <= _PATIENT else _FAIR), BYTES_FRAME)


def cuts_in(source: Joined, start: int, stop: int, width: int) -> list[int]:
    """Where parts begin in [start, stop), in words, none of them close behind the one before."""
    found: list[int] = []
    for end in source.ends(start, stop):
        at = (end - start) // width
        if at - (found[-1] if found else 0) >= _CUT_WORDS:
            found.append(at)
    return found


def _places(stream: StreamPlan, nbytes: int) -> list[tuple[int, int]]:
    """[start, stop) of a few samples, where runs begin if there are any."""
    if nbytes <= _SAMPLES * _SAMPLE:
        return [(0, nbytes)]
    unit = stream.run * stream.width or 8
    step = max(nbytes // _SAMPLES // unit, 1) * unit
    return [(start, start + _SAMPLE) for start in range(0, min(_SAMPLES * step, nbytes), step)]


def _raw(source: Source, start: int, stop: int) -> Array:
    import numpy as np

    return np.frombuffer(source.read(start, stop), np.uint8)


def _candidates(stream: StreamPlan, sample: list[tuple[Array, Array | None]]) -> Iterator[Chain]:
    width = stream.width
    if stream.kind == "bytes":
        yield Chain(1)
        if stream.nbytes >= _SAMPLES * _SAMPLE:
            # Optimizer state and the like: arrays of floats between things that are not ours to read.
            yield Chain(4, ("rotate", "planes"))
            yield Chain(2, ("rotate", "planes"))
        return
    plain: list[tuple[str, ...]] = [("planes",)] if width > 1 else [()]
    if stream.kind == "float":
        # As they are: for values of one sign near 1, whose exponents do not tell them apart.
        plain = [("rotate", "planes"), ("rotate", "exponents", "planes"), ("planes",)]
        if stream.narrow:
            plain = [("narrow", *steps) for steps in plain]
    else:
        plain.append(("bits",))
    sparse = _zeros(width, sample) >= _SPARSE
    for steps in plain:
        yield Chain(width, steps)
        if sparse:
            yield Chain(width, ("gaps", *steps))
            yield Chain(width, ("mask", *steps))
    if stream.run:
        yield Chain(width, ("palette",), stream.run)
    if stream.before is not None:
        for places in ((), ("gaps",), ("mask",)):
            yield Chain(width, ("sub", *places, "planes"))
            if stream.kind == "float" and width in (2, 4):
                yield Chain(width, ("sub", *places, "grid"))


def _zeros(width: int, sample: list[tuple[Array, Array | None]]) -> float:
    from adapterpack.codecs.words import word

    words = [raw.view(word(width)) for raw, _ in sample]
    return sum(int((w == 0).sum()) for w in words) / max(sum(w.size for w in words), 1)


def _size(chain: Chain, raw: Array, before: Array | None) -> int:
    return sum(len(store(segment, (zstd.HUFFMAN,))) for segment in chain.split(raw, before))


def _levels(chain: Chain, sample: list[tuple[Array, Array | None]], nbytes: int, total: int) -> tuple[int, ...]:
    """Huffman, and matches too where the stream is short or a part of it says that they are there."""
    if nbytes <= _THOROUGH:
        return zstd.HUFFMAN, _BEST
    segments = chain.split(*sample[0])
    further = _BEST if max(nbytes, total // 4) <= _WILLING else _QUICK
    huffman = sum(len(store(s, (zstd.HUFFMAN,))) for s in segments)
    both = sum(len(store(s, (zstd.HUFFMAN, further))) for s in segments)
    return (zstd.HUFFMAN, further) if both < (0.998 if further == _BEST else 0.995) * huffman else (zstd.HUFFMAN,)


def _cut_pays(
    chain: Chain, source: Joined, places: list[tuple[int, int]], sample: list[tuple[Array, Array | None]]
) -> bool:
    """Do the tensors of a stream differ so much that tables of their own are smaller?"""
    plain = cut = 0
    for (start, stop), (raw, old) in zip(places, sample, strict=True):
        cuts = cuts_in(source, start, stop, chain.width)
        for segment in chain.split(raw, old):
            best = len(store(segment, (zstd.HUFFMAN,)))
            plain += best
            whole = segment.size == raw.size // chain.width
            cut += min(best, len(store(segment, (), cuts=cuts))) if cuts and whole else best
    return cut < 0.998 * plain
