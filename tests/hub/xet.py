"""The bytes of Xet: xorbs (chunks, most of them compressed) and shards (which chunks make a file).

The layouts are those of xet-core (docs/xet, `metadata_shard`, `xorb_object`). Hashes are BLAKE3 trees, which the
standard library does not have: they are taken on trust, and the SHA-256 that a shard carries for each file is
checked instead, against the bytes that its chunks give.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_TAG = b"HFRepoMetaData\0"
_BOOKEND = b"\xff" * 32
_VERIFICATION, _METADATA = 1 << 31, 1 << 30
_RECORD = 48
_XORB_FOOTER = b"XETBLOB"


class Malformed(ValueError):
    pass


def hexed(raw: bytes) -> str:
    """How Xet spells a hash: four little-endian words, each in hex."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


@dataclass(frozen=True)
class Term:
    """Chunks `start` to `stop` (not included) of a xorb."""

    xorb: str
    size: int
    start: int
    stop: int


@dataclass(frozen=True)
class File:
    hash: str
    terms: tuple[Term, ...]
    sha256: str | None


@dataclass(frozen=True)
class Xorb:
    data: bytes
    offsets: tuple[int, ...]
    """Where each chunk begins, and where the last one ends."""

    @classmethod
    def parse(cls, data: bytes) -> Xorb:
        offsets = [0]
        while (at := offsets[-1]) < len(data) and data[at : at + len(_XORB_FOOTER)] != _XORB_FOOTER:
            if at + 8 > len(data):
                raise Malformed("a chunk's header is cut off")
            offsets.append(at + 8 + int.from_bytes(data[at + 1 : at + 4], "little"))
        if offsets[-1] > len(data) or len(offsets) == 1:
            raise Malformed("a chunk is cut off, or there is none")
        return cls(data, tuple(offsets))

    @classmethod
    def of(cls, data: bytes, size: int = 1 << 16) -> Xorb:
        """Plain chunks of an equal size."""
        out = bytearray()
        for at in range(0, len(data), size):
            length = len(data[at : at + size]).to_bytes(3, "little")
            out += b"\0" + length + b"\0" + length + data[at : at + size]
        return cls.parse(bytes(out))

    def decoded(self, start: int, stop: int) -> bytes:
        if not 0 <= start < stop < len(self.offsets):
            raise Malformed(f"no chunks {start} to {stop}")
        return b"".join(_chunk(self.data[self.offsets[i] : self.offsets[i + 1]]) for i in range(start, stop))


def _chunk(raw: bytes) -> bytes:
    version, scheme, size = raw[0], raw[4], int.from_bytes(raw[5:8], "little")
    if version != 0:
        raise Malformed(f"chunk version {version}")
    data = raw[8:]
    if scheme == 1:
        data = lz4_frame(data)
    elif scheme == 2:
        data = _ungrouped(lz4_frame(data))
    elif scheme != 0:
        raise Malformed(f"compression scheme {scheme}")
    if len(data) != size:
        raise Malformed(f"a chunk of {len(data)} bytes says {size}")
    return data


def _ungrouped(data: bytes) -> bytes:
    """The bytes of 4-byte words, back from four groups: all first bytes, all second bytes, and so on."""
    out = bytearray(len(data))
    at = 0
    for group in range(4):
        count = len(range(group, len(data), 4))
        out[group::4] = data[at : at + count]
        at += count
    return bytes(out)


def lz4_frame(data: bytes) -> bytes:
    """What an LZ4 frame holds. Its checksums are not looked at."""
    if data[:4] != b"\x04\x22\x4d\x18":
        raise Malformed("not an LZ4 frame")
    flags = data[4]
    at = 7 + (8 if flags & 0x08 else 0) + (4 if flags & 0x01 else 0)
    out = bytearray()
    while size := int.from_bytes(data[at : at + 4], "little"):
        block = data[at + 4 : at + 4 + (size & 0x7FFFFFFF)]
        if size & 0x80000000:
            out += block
        else:
            _lz4_block(block, out)
        at += 4 + len(block) + (4 if flags & 0x10 else 0)
    return bytes(out)


def _lz4_block(block: bytes, out: bytearray) -> None:
    """Appends to `out` what the block holds; matches may reach back into earlier blocks."""
    at = 0

    def length(nibble: int) -> int:
        nonlocal at
        total = nibble
        while nibble == 15:
            total += block[at]
            at += 1
            if block[at - 1] != 255:
                break
        return total

    while at < len(block):
        token = block[at]
        at += 1
        literals = length(token >> 4)
        out += block[at : at + literals]
        at += literals
        if at >= len(block):
            return
        distance = int.from_bytes(block[at : at + 2], "little")
        at += 2
        count = length(token & 15) + 4
        if not 0 < distance <= len(out):
            raise Malformed("an LZ4 match before the beginning")
        start = len(out) - distance
        # A match may overlap what it writes: then it repeats the last `distance` bytes.
        piece = bytes(out[start : start + count])
        out += (piece * (count // len(piece) + 1))[:count]


def shard_files(data: bytes) -> Iterator[File]:
    """The files that a shard describes. What it says of xorbs is in the xorbs themselves."""
    if data[: len(_TAG)] != _TAG:
        raise Malformed("not a shard")
    at = _RECORD

    def record() -> bytes:
        nonlocal at
        at += _RECORD
        if at > len(data):
            raise Malformed("the shard is cut off")
        return data[at - _RECORD : at]

    while (header := record())[:32] != _BOOKEND:
        flags, count = struct.unpack_from("<II", header, 32)
        terms = []
        for _ in range(count):
            entry = record()
            _, size, start, stop = struct.unpack_from("<IIII", entry, 32)
            terms.append(Term(hexed(entry[:32]), size, start, stop))
        if flags & _VERIFICATION:
            for _ in range(count):
                record()
        sha256 = hexed(record()[:32]) if flags & _METADATA else None
        yield File(hexed(header[:32]), tuple(terms), sha256)


def reconstruction(file: File, xorbs: dict[str, Xorb], url: str, span: tuple[int, int] | None, v2: bool) -> object:
    """Which bytes of which xorbs give the file, or the part of it that `span` names (its end included).

    Returns None if the span lies behind the file's end.
    """
    terms: list[Term] = []
    offset = at = 0
    for term in file.terms:
        if span is None or (at + term.size > span[0] and at <= span[1]):
            if not terms and span is not None:
                offset = span[0] - at
            terms.append(term)
        at += term.size
    if span is not None and span[0] >= at:
        return None
    fetch: dict[str, list[object]] = {}
    for term in dict.fromkeys(terms):
        offsets = xorbs[term.xorb].offsets
        chunks = {"start": term.start, "end": term.stop}
        span_of = {"start": offsets[term.start], "end": offsets[term.stop] - 1}
        address = f"{url}/xorbs/{term.xorb}"
        fetch.setdefault(term.xorb, []).append(
            {"url": address, "ranges": [{"chunks": chunks, "bytes": span_of}]}
            if v2
            else {"url": address, "url_range": span_of, "range": chunks}
        )
    listed = [{"hash": t.xorb, "unpacked_length": t.size, "range": {"start": t.start, "end": t.stop}} for t in terms]
    return {"offset_into_first_range": offset, "terms": listed, "xorbs" if v2 else "fetch_info": fetch}
