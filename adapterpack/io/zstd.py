"""zstd frames: one way in, and the one way out that hostile bytes do not get past.

The library's one-shot reader allocates whatever a frame claims and ignores what follows it; its streaming
readers take a truncated frame for a short one.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from adapterpack import limits
from adapterpack.errors import InvalidFile

HUFFMAN = 0
"""A "level": literals only, through zstd's Huffman coder. Matches in noise cost more than they save."""

_local = threading.local()


@functools.cache
def _parameters(level: int) -> Any:
    import zstandard

    if level != HUFFMAN:
        parameters = zstandard.ZstdCompressionParameters.from_level(level, write_content_size=1, write_checksum=0)
        if parameters.window_log <= limits.ZSTD_WINDOW_LOG:
            return parameters
        return zstandard.ZstdCompressionParameters.from_level(
            level, window_log=limits.ZSTD_WINDOW_LOG, write_content_size=1, write_checksum=0
        )
    return zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        window_log=17,
        hash_log=6,
        chain_log=6,
        search_log=1,
        min_match=7,
        # Any other target length switches the Huffman coding of literals off in this strategy.
        target_length=0,
        write_content_size=1,
        write_checksum=0,
    )


def version() -> str:
    """Of the zstd that compresses here: another one may write other bytes for the same content."""
    import zstandard

    return ".".join(map(str, zstandard.ZSTD_VERSION))


@functools.lru_cache(maxsize=4)
def _dictionary(content: bytes) -> Any:
    import zstandard

    return zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def _mine(kind: str, make: Callable[[], Any], *key: object) -> Any:
    """One per thread: they are not to be shared, and making one costs more than a small frame."""
    kept = _local.__dict__.setdefault(kind, {})
    if key not in kept:
        kept[key] = make()
    return kept[key]


def compress(data: bytes, level: int, dictionary: bytes = b"", cuts: Sequence[int] = ()) -> bytes:
    """One frame that states its content size; no checksum, since a SHA-256 guards the stored bytes.

    Args:
        data: The content.
        level: 1 to 22, or `HUFFMAN`.
        dictionary: What is taken to stand before it, without any header.
        cuts: Positions in it, ascending, at which a new block begins: with a Huffman table of its own, if that pays.
    """
    import zstandard

    compressor = _mine(
        "compressors",
        lambda: zstandard.ZstdCompressor(
            compression_params=_parameters(level), dict_data=_dictionary(dictionary) if dictionary else None
        ),
        level,
        dictionary,
    )
    if cuts:
        stream, parts = compressor.compressobj(size=len(data)), []
        for start, stop in itertools.pairwise((0, *cuts)):
            parts += [stream.compress(data[start:stop]), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
        return b"".join((*parts, stream.compress(data[cuts[-1] :]), stream.flush()))
    result: bytes = compressor.compress(data)
    return result


def stated_size(data: bytes, where: str) -> int:
    """How many bytes a frame says that it holds. Raises InvalidFile: it is no frame, or does not say."""
    import zstandard

    try:
        size = int(zstandard.get_frame_parameters(data).content_size)
    except zstandard.ZstdError as e:
        raise InvalidFile(f"{where}: {e}") from e
    if size == zstandard.CONTENTSIZE_UNKNOWN:
        raise InvalidFile(f"{where}: a zstd frame that does not state its size")
    return size


def decompress(data: bytes | memoryview, size: int, where: str, dictionary: bytes = b"") -> bytes:
    """The content of exactly one frame of exactly `size` bytes.

    Args:
        data: The stored frame.
        size: What the manifest says that it holds; bounded by the caller.
        where: What is read, for the error.
        dictionary: The one that it was compressed with, if any.

    Raises:
        InvalidFile: no frame, another size stated or held, a dictionary, a window beyond `limits`, truncated, or
            anything behind it.
    """
    import zstandard

    try:
        seen = zstandard.get_frame_parameters(data)
        if seen.content_size != size or seen.dict_id or seen.window_size > 1 << limits.ZSTD_WINDOW_LOG:
            raise InvalidFile(f"{where}: a zstd frame with another size, window or dictionary than it should have")
        decoder = _mine(
            "decoders",
            lambda: zstandard.ZstdDecompressor(dict_data=_dictionary(dictionary) if dictionary else None),
            dictionary,
        )
        # In one piece only now: it allocates what the frame states, whatever limit it is given.
        result: bytes = decoder.decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise InvalidFile(f"{where}: {e}") from e
    if len(result) != size:
        raise InvalidFile(f"{where}: a zstd frame that holds {len(result):,} bytes instead of {size:,}")
    return result
