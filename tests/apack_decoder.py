"""A second reader of packs, written from formats/apack/SPEC.md alone: it imports nothing from adapterpack.

It is slow, holds everything in memory, and is strict: what the specification says a reader refuses raises `Refused`.
Its only purpose is to say whether the specification and the library mean the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

DTYPES = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "F16 BF16 I16 U16",
    32: "F32 I32 U32",
    64: "F64 I64 U64 C64",
}
BITS = {name: bits for bits, names in DTYPES.items() for name in names.split()}
MIB = 1 << 20
KEYS = (
    *("apack", "base", "classes", "dropped", "encoding", "error", "files", "grade", "max_error", "method", "parent"),
    *("producer", "recipes", "source_bytes", "streams", "tensors"),
)
STEPS = ["sub", "gaps", "mask", "narrow", "rotate", "exponents", "planes", "bits", "grid", "palette"]
RESERVED = {"con", "prn", "aux", "nul"} | {f"{device}{n}" for device in ("com", "lpt") for n in range(1, 10)}
DICTIONARY = (Path(__file__).parent.parent / "formats" / "apack" / "dictionary").read_bytes()


class Refused(ValueError):
    """The bytes are not a pack that this reader accepts."""


def must(condition: object, what: str) -> None:
    if not condition:
        raise Refused(what)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def number(value: Any, least: int = 0, most: int = 10**12) -> int:
    must(type(value) is int and least <= value <= most, f"not a whole number from {least} to {most}: {value!r:.40}")
    return int(value)


def text(value: Any, most: int = 512) -> str:
    must(type(value) is str and len(value.encode()) <= most, f"not a text of at most {most} bytes")
    return str(value)


def hex_digest(value: Any) -> str:
    must(type(value) is str and re.fullmatch("[0-9a-f]{64}", value), "not a SHA-256")
    return str(value)


def listing(value: Any, length: int | None = None) -> list[Any]:
    must(type(value) is list and length in (None, len(value)), f"not a list of {length}: {value!r:.60}")
    return list(value)


def fields(value: Any, *names: str) -> dict[str, Any]:
    must(type(value) is dict and sorted(value) == sorted(names), f"not an object of {names}: {value!r:.60}")
    return dict(value)


def canonical(value: Any, sort: bool = True) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort).encode()


def parse(data: bytes) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        must(len(items) == len({key for key, _ in items}), "a key stands twice")
        return dict(items)

    def refuse(what: str) -> Any:
        raise Refused(f"a number that is not whole: {what:.20}")

    try:
        return json.loads(data.decode(), object_pairs_hook=pairs, parse_float=refuse, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(f"no JSON: {error}") from error


# Section 1 -------------------------------------------------------------


def unzstd(data: bytes, most: int, dictionary: bool) -> bytes:
    """The content of one frame that fills `data`."""
    must(data[:4] == b"\x28\xb5\x2f\xfd", "no zstd frame")
    try:
        facts = zstandard.get_frame_parameters(data)
        must(facts.content_size <= most, "a frame larger than allowed, or of a size that it does not state")
        must(facts.window_size <= 8 * MIB and not facts.dict_id, "a window or dictionary")
        before = zstandard.ZstdCompressionDict(DICTIONARY, zstandard.DICT_TYPE_RAWCONTENT) if dictionary else None
        out = zstandard.ZstdDecompressor(dict_data=before).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Refused(f"zstd: {error}") from error
    must(len(out) == facts.content_size, "a frame that holds another size than it states")
    return out


def frame_header(f: int, d: int, m: int) -> bytes:
    ends = [0, f, f + d, f + d + m, f + d + m + 32]
    blobs = ",".join(
        f'"{3 - i}":{{"dtype":"U8","shape":[{end - begin}],"data_offsets":[{begin},{end}]}}'
        for i, (begin, end) in enumerate(pairwise(ends))
    )
    return (376).to_bytes(8, "little") + f'{{"__metadata__":{{"apack":"1"}},{blobs}}}'.encode().ljust(376)


def manifest_of(data: bytes) -> tuple[dict[str, Any], bytes, list[bytes]]:
    """The checked manifest, blob 3, and the digests of blob 2."""
    must(len(data) >= 416 and data[:8] == (376).to_bytes(8, "little"), "too short, or another header")
    header = parse(data[8:384])
    must(type(header) is dict and type(header.get("__metadata__")) is dict, "no metadata")
    must(header["__metadata__"].get("apack") == "1", "another version")
    try:
        f, d, m = (number(header[name]["shape"][0]) for name in "321")
    except (KeyError, TypeError, IndexError) as error:
        raise Refused("another header") from error
    must(data[:384] == frame_header(f, d, m) and len(data) == 384 + f + d + m + 32, "another header or size")
    digests, packed = data[384 + f : 384 + f + d], data[384 + f + d : -32]
    must(hashlib.sha256(data[:384] + digests + packed).digest() == data[-32:], "the seal")
    must(d % 32 == 0 and d // 32 <= 2**20, "the digests")
    plain = unzstd(packed, 64 * MIB, True)
    manifest = fields(parse(plain), *KEYS)
    try:
        must(canonical(manifest) == plain, "a manifest that is not canonical")
    except UnicodeEncodeError as error:
        raise Refused("half of a surrogate pair") from error
    return manifest, data[384 : 384 + f], [digests[i : i + 32] for i in range(0, d, 32)]


# Sections 5 and 6 ------------------------------------------------------


def bit_words(data: bytes, count: int, q: int) -> np.ndarray:
    """`count` words of q bits each, from the lowest bit of the first byte up."""
    must(len(data) == (count * q + 7) // 8, "packed bits of another length")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    must(not bits[count * q :].any(), "an unused bit is set")
    out = np.zeros(count, np.uint64)
    for i in range(q):
        out |= bits[: count * q].reshape(count, q)[:, i].astype(np.uint64) << np.uint64(i)
    return out


def undo_gaps(data: bytes, n: int) -> np.ndarray:
    """The places of the kept words."""
    places, at, gap = [], 0, 0
    for byte in data:
        gap += byte
        if byte < 255:
            places.append(at + gap)
            at, gap = at + gap + 1, 0
    must(gap == 0 and at <= n, "gaps that do not add up")
    return np.array(places, np.int64)


def undo_exponents(words: np.ndarray, width: int, table: np.ndarray) -> np.ndarray:
    k = len(table)
    must(k and (np.diff(table.astype(int)) > 0).all(), "a table that is empty or does not ascend")
    shift = np.uint64(8 * width - 16)
    top = words >> shift
    v = np.uint64(max(0, 7 - (k - 1).bit_length()))
    must(not (top & (np.uint64(1) << v) - np.uint64(1)).any(), "bits below an index")
    index = (top >> v >> np.uint64(8)).astype(int)
    must(index.max(initial=0) < k, "an index outside the table")
    h = table[index].astype(np.uint64) << np.uint64(8) | (top >> v) & np.uint64(255)
    return h << shift | words & (np.uint64(1) << shift) - np.uint64(1)


def undo_sub(words: np.ndarray, parent: np.ndarray, b: int) -> np.ndarray:
    all_ones, t = np.uint64(2**b - 1), np.uint64(2 ** (b - 1))
    one = np.uint64(1)
    d = np.where(words & one, ((words ^ all_ones) >> one) + t, words >> one)
    o = np.where(parent >= t, parent ^ all_ones, parent + t) + d & all_ones
    return np.where(o >= t, o - t, o ^ all_ones)


def grid_line(word: int, step: int, m: int) -> int | None:
    """The line of the grid at or before a word, m bits of which are the mantissa; None where there is none."""
    above = (word >> m & 255) - step
    if above > m:
        return None
    line = 0 if above < 0 else (2**m + word % 2**m) >> m - above
    return line if word < 2 ** (m + 8) else -1 - line


def undo_grid(parts: list[bytes], parent: list[int], width: int) -> list[int]:
    """The words of a frame one by one, from its seven segments and the parent's words."""
    m = 8 * width - 9
    must(len(parts[0]) == 1 and len(parts[1]) == len(parent), "a grid of another length")
    step = parts[0][0]
    exponents, low, high = iter(parts[2]), iter(parts[4]), iter(parts[5])
    whole = iter(to_words(parts[3][: len(parts[3]) // width * width], width).tolist())
    words: list[int] = []
    lengths: list[tuple[int, int]] = []
    for code, old in zip(parts[1], parent, strict=True):
        if code == 255:
            words.append(next(whole, -1))
            must(words[-1] >= 0, "a word that is stored whole is missing")
            continue
        line = grid_line(old, step, m)
        must(line is not None, "a move from where there is no line")
        line += -(code + 1) // 2 if code % 2 else code // 2  # type: ignore[operator]
        size = line if line >= 0 else -1 - line  # type: ignore[operator]
        must(size < 2 ** (m + 1), "a move to where there is no line")
        above = size.bit_length() - 1
        if size:
            exponent, free = step + above, m - above
            must(exponent < 256, "a move beyond the greatest exponent")
        else:
            exponent, free = next(exponents, 256), m
            must(exponent < step, "an exponent that is missing or not below the grid's")
        word = (size << free) % 2**m | exponent << m | (line < 0) << m + 8
        for place, bytes_left in enumerate((low, high)):
            if free >= 8 * place + 8:
                byte = next(bytes_left, -1)
                must(byte >= 0, "a byte between the lines is missing")
                word |= byte << 8 * place
        lengths.append((len(words), free))
        words.append(word)
    must(all(next(left, None) is None for left in (exponents, whole, low, high)), "a grid with something left")
    must(len(parts[3]) % width == 0, "half a word")
    rest = parts[6]
    for r in range(1, 8):
        places = [(at, free - r) for at, free in lengths if free % 8 == r]
        size = (len(places) * r + 7) // 8
        for (at, shift), value in zip(places, bit_words(rest[:size], len(places), r).tolist(), strict=True):
            words[at] |= value << shift
        rest = rest[size:]
    must(not rest, "bits between the lines that are too many")
    return words


def undo_palette(parts: list[bytes], n: int, width: int) -> np.ndarray:
    """The n words of a frame, run by run."""
    run = int.from_bytes(parts[0][:4], "little")
    must(len(parts[0]) >= 4 and run >= 256, "no length of runs, or one below 256")
    sizes = [byte + 1 for byte in parts[0][4:]]
    must(len(sizes) == (n + run - 1) // run, "another number of palettes than runs")
    above = [0] * sum(sizes)
    for plane in parts[1:-1]:
        must(len(plane) == len(above), "palettes of another length")
        above = [value << 8 | byte for value, byte in zip(above, plane, strict=True)]
    q = min(q for q in (1, 2, 4, 8) if max(sizes, default=1) <= 2**q)
    places = bit_words(parts[-1], n, q).astype(int).tolist()
    words: list[int] = []
    for size in sizes:
        steps, above = above[:size], above[size:]
        must(0 not in steps[1:], "a value twice")
        palette = np.cumsum(steps).tolist()
        must(palette[-1] < 2 ** (8 * width), "a value beyond the width")
        here, places = places[:run], places[run:]
        must(max(here) < size, "an index beyond its palette")
        words += [palette[place] for place in here]
    return np.array([word >> 1 | (word & 1) << 8 * width - 1 for word in words], np.uint64)


def to_words(data: bytes, width: int) -> np.ndarray:
    return np.frombuffer(data, f"<u{width}").astype(np.uint64)


def frame_bytes(parts: list[bytes], size: int, width: int, steps: list[str], parent: bytes) -> bytes:
    """What one frame decodes to, from its decoded segments."""
    rest, full, n = size % width, width, size // width
    segments = iter(parts)

    def take(length: int | None = None) -> bytes:
        part = next(segments, None)
        must(part is not None and length in (None, len(part)), "a segment is missing or has another length")
        return part  # type: ignore[return-value]

    kept, table, count = None, None, n
    if "gaps" in steps:
        kept = undo_gaps(take(), n)
    elif "mask" in steps:
        kept = np.flatnonzero(bit_words(take((n + 7) // 8), n, 1))
    if kept is not None:
        count = len(kept)
    if "grid" in steps:
        old = to_words(parent[: n * full], full)
        at = np.arange(n) if kept is None else kept
        words = np.array(undo_grid([take() for _ in range(7)], old[at].tolist(), width), np.uint64)
        must(kept is None or (words != old[at]).all(), "a kept word is the parent's")
        old[at] = words
        tail = take(rest) if rest else b""
        must(next(segments, None) is None, "a segment too many")
        return old.astype(f"<u{full}").tobytes() + tail
    if "narrow" in steps:
        width = 2
    if "exponents" in steps:
        table = np.frombuffer(take(), np.uint8)
    if "planes" in steps:
        words = np.zeros(count, np.uint64)
        for _ in range(width):
            words = words << np.uint64(8) | np.frombuffer(take(count), np.uint8)
    elif "palette" in steps:
        words = undo_palette([take() for _ in range(width + 2)], n, width)
    elif "bits" in steps:
        q = take(1)[0]
        must(q <= 8 * width, "words of too many bits")
        words = bit_words(take(), count, q)
    else:
        words = to_words(take(count * width), width)
    tail = take(rest) if rest else b""
    must(next(segments, None) is None, "a segment too many")
    if table is not None:
        words = undo_exponents(words, width, table)
    if "rotate" in steps:
        # The top 16 bits, or the one byte that there is.
        bits = np.uint64(min(16, 8 * width))
        below = np.uint64(8 * width) - bits
        top = words >> below
        top = top >> np.uint64(1) | (top & np.uint64(1)) << (bits - np.uint64(1))
        words = top << below | words & ((np.uint64(1) << below) - np.uint64(1))
    if "narrow" in steps:
        words = words << np.uint64(16)
    if kept is not None:
        must(words.all(), "a kept word is zero")
        spread = np.zeros(n, np.uint64)
        spread[kept] = words
        words = spread
    if "sub" in steps:
        words = undo_sub(words, to_words(parent[: n * full], full), 8 * full)
    return words.astype(f"<u{full}").tobytes() + tail


def check_steps(steps: list[Any], width: int) -> None:
    must(all(type(step) is str and step in STEPS for step in steps), "an unknown step")
    order = [STEPS.index(step) for step in steps]
    must(order == sorted(set(order)), "steps twice or in another order")
    must(not {"gaps", "mask"} <= set(steps), "gaps and a mask")
    must(len({"planes", "bits", "grid"} & set(steps)) <= 1, "two steps that end the chain")
    must("grid" not in steps or ("sub" in steps and width in (2, 4)), "grid without sub or of another width")
    must(not {"grid", "narrow"} <= set(steps), "a grid of narrow words")
    must(
        "palette" not in steps or (len(steps) == 1 and width in (2, 4)),
        "a palette beside others, or of another width",
    )
    must("narrow" not in steps or width == 4, "narrow of another width")
    must("rotate" not in steps or "planes" in steps, "rotate without planes")
    must("exponents" not in steps or ("rotate" in steps and width >= 2), "exponents without rotate or of bytes")


class Frames:
    """Blob 3 and the digests of its frames, taken one after the other."""

    def __init__(self, blob: bytes, digests: list[bytes]) -> None:
        self.blob, self.digests, self.at, self.count = blob, digests, 0, 0

    def take(self, size: int) -> tuple[bytes, bytes]:
        must(self.count < len(self.digests) and self.at + size <= len(self.blob), "more frames than are stored")
        self.at, self.count = self.at + size, self.count + 1
        return self.blob[self.at - size : self.at], self.digests[self.count - 1]


class Stream:
    """One stream: `size` bytes, decoded when first asked for."""

    def __init__(self, raw: Any, stored: Frames) -> None:
        facts = fields(raw, "frames", "steps", "width")
        self.width, self.steps = facts["width"], listing(facts["steps"])
        must(type(self.width) is int and self.width in (1, 2, 4, 8), "a width")
        check_steps(self.steps, self.width)
        self.frames: list[Any] = []
        self.at = self.size = 0
        self.parent, self.plain = b"", None
        for frame in listing(facts["frames"]):
            must(self.size % self.width == 0, "a frame that ends inside a word")
            must(type(frame) is list and len(frame) % 2, "a frame of another form")
            size, *pairs = [number(value) for value in frame]
            must(0 < size <= 64 * MIB and sum(pairs[::2]) <= 2 * size + 512, "a frame's size or segments")
            pairs = list(zip(pairs[::2], pairs[1::2], strict=True))
            must(all(s <= d for d, s in pairs), "a segment larger than what it holds")
            self.frames.append((size, pairs, *stored.take(sum(s for _, s in pairs))))
            self.size += size

    def decode(self) -> bytes:
        out = b""
        for size, pairs, data, sha in self.frames:
            must(hashlib.sha256(data).digest() == sha, "a frame's digest")
            parts, at = [], 0
            for d, s in pairs:
                parts.append(data[at : at + s] if s == d else unzstd(data[at : at + s], d, not self.steps))
                must(len(parts[-1]) == d, "a segment of another size")
                at += s
            out += frame_bytes(parts, size, self.width, self.steps, self.parent[len(out) : len(out) + size])
        return out

    def take(self, size: int) -> bytes:
        if self.plain is None:
            self.plain = self.decode()
        self.at += size
        must(self.at <= self.size, "a stream is too short")
        return self.plain[self.at - size : self.at]


# Recipes: formats/vera/SPEC.md and formats/peft/SPEC.md section 8 ------


def mt19937(seed: int, count: int) -> np.ndarray:
    """The first `count` outputs after init_genrand(seed)."""
    state = [seed & 0xFFFFFFFF]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) & 0xFFFFFFFF)
    out: list[int] = []
    while len(out) < count:
        for i in range(624):
            y = state[i] & 0x80000000 | state[(i + 1) % 624] & 0x7FFFFFFF
            state[i] = state[(i + 397) % 624] ^ y >> 1 ^ (0x9908B0DF if y & 1 else 0)
        for y in state:
            y ^= y >> 11
            y ^= y << 7 & 0x9D2C5680
            y ^= y << 15 & 0xEFC60000
            out.append(y ^ y >> 18)
    return np.array(out[:count], np.uint32)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to nearest even, still float32."""
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "F32":
        return values
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def stored(values: np.ndarray, through: str, dtype: str) -> bytes:
    """float32 values, rounded twice, as they lie in a file."""
    values = rounded(rounded(values.astype(np.float32), through), dtype)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(np.float16 if dtype == "F16" else np.float32).tobytes()


def size_of(draw: Any, rank: int) -> list[int]:
    return [number(x, 1, 2**31) for x in listing(draw["shape"], rank)]


def double(value: Any) -> float:
    return float.fromhex(text(value))


def bases(recipe: Any) -> list[tuple[str, str, list[int], bytes]]:
    ternary = recipe["law"] == "ternary"
    must((recipe["law"], recipe["drawn"]) in {("ternary", "F32"), ("uniform", "BF16"), ("uniform", "F16")}, "a law")
    listed = [fields(draw, "bound", "name", "shape", "std") for draw in listing(recipe["draws"])]
    counts = [int(np.prod(size_of(draw, 3), dtype=object)) for draw in listed]
    must(sum(counts) <= 2**24, "a recipe of too many elements for this reader")
    words, at, made = mt19937(number(recipe["seed"], -(2**63), 2**64 - 1), sum(counts)), 0, []
    for draw, count in zip(listed, counts, strict=True):
        rows, each, columns = size_of(draw, 3)
        bound, std = double(draw["bound"]), np.float32(double(draw["std"]))
        u = (words[at : at + count] & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
        at += count
        if ternary:
            values = np.where(u > np.float32(1 - bound), 1, np.where(u < np.float32(bound), -1, 0)).astype(np.float32)
            values = values.reshape(rows, each, columns)
        else:
            lo, hi = np.float32(-bound), np.float32(bound)
            if recipe["arithmetic"] == "fused":
                values = (u.astype(np.float64) * float(hi - lo) + float(lo)).astype(np.float32)
            else:
                values = u * (hi - lo) + lo
            values, ends = rounded(values, recipe["drawn"]), rounded(np.array([lo, hi]), recipe["drawn"])
            values = np.where(values >= ends[1], ends[0], values)
            # Base by base.
            values = values.reshape(each, rows, columns).transpose(1, 0, 2)
        values = rounded(np.ascontiguousarray(values / std), recipe["drawn"])
        data = stored(values, recipe["through"], recipe["stored"])
        made.append((draw["name"], recipe["stored"], draw["shape"], data))
    return made


def places(recipe: Any) -> list[tuple[str, str, list[int], bytes]]:
    made = []
    for draw in listing(recipe["draws"]):
        fields(draw, "count", "name", "shape")
        rows, columns = size_of(draw, 2)
        size, count = rows * columns, number(draw["count"], 1, 2**20)
        must(count <= size < (2**32 - 1) // 20, "a permutation that is too large for this reader")
        words = mt19937(number(recipe["seed"], -(2**63), 2**64 - 1), count)
        order = list(range(size))
        for i in range(min(count, size - 1)):
            j = i + int(words[i]) % (size - i)
            order[i], order[j] = order[j], order[i]
        flat = np.array(sorted(order[:count]))
        data = np.stack([flat // columns, flat % columns]).astype("<i4").tobytes()
        made.append((draw["name"], "I32", [2, count], data))
    return made


class Pcg:
    """Whole numbers below a limit from numpy's PCG64; of each 64 bits the lower half comes first."""

    def __init__(self, seed: int) -> None:
        self.bits, self.half = np.random.PCG64(seed), None  # type: ignore[var-annotated]

    def word(self) -> int:
        if self.half is not None:
            word, self.half = self.half, None
            return word
        whole = int(self.bits.random_raw())
        self.half = whole >> 32
        return whole & 0xFFFFFFFF

    def upto(self, most: int) -> int:
        """One of 0 to `most`, by Lemire's multiplication."""
        if not most:
            return 0
        m = self.word() * (most + 1)
        while m & 0xFFFFFFFF < (0xFFFFFFFF - most) % (most + 1):
            m = self.word() * (most + 1)
        return m >> 32

    def masked(self, most: int) -> int:
        """One of 0 to `most`, by as many bits as it has, until it fits."""
        mask = (1 << most.bit_length()) - 1
        value = self.word() & mask if most else 0
        while value > most:
            value = self.word() & mask
        return value

    def shuffle(self, items: list[int], below: Callable[[int], int], first: int = 1) -> list[int]:
        for i in range(len(items) - 1, first - 1, -1):
            j = below(i)
            items[i], items[j] = items[j], items[i]
        return items

    def choice(self, length: int, count: int) -> list[int]:
        if length > 10_000 and count > length // 50:
            return self.shuffle(list(range(length)), self.upto, max(length - count, 1))[length - count :]
        found: list[int] = []
        for j in range(length - count, length):
            value = self.upto(j)
            found.append(j if value in found else value)
        return self.shuffle(found, self.upto)


def balanced(recipe: Any) -> list[tuple[str, str, list[int], bytes]]:
    listed = [fields(draw, "name", "scales", "shape") for draw in listing(recipe["draws"])]
    counts = [int(np.prod(size_of(draw, 2), dtype=object)) for draw in listed]
    length, total = number(recipe["length"], 1, 2**20), sum(counts)
    must(total <= 2**20, "a recipe of too many elements for this reader")
    rng = Pcg(number(recipe["seed"], 0, 2**64 - 1))
    data = [i for i in range(length) for _ in range(total // length)]
    data += rng.choice(length, total % length) if total % length else []
    rng.shuffle(data, rng.masked)
    often = np.bincount(data, minlength=length).astype(np.float32)
    scales, at, made = np.float32(1) / np.sqrt(np.maximum(often, 1)), 0, []
    for draw, count in zip(listed, counts, strict=True):
        indices = np.array(data[at : at + count], "<i8")
        at += count
        made.append((draw["name"], "I64", draw["shape"], indices.tobytes()))
        kept = stored(scales[indices], recipe["through"], recipe["stored"])
        made.append((draw["scales"], recipe["stored"], draw["shape"], kept))
    return made


KINDS = {
    "bases": (bases, "mt19937", ("arithmetic", "drawn", "law", "seed", "stored", "through")),
    "places": (places, "mt19937", ("seed",)),
    "balanced": (balanced, "pcg64", ("length", "seed", "stored", "through")),
}


def draws(raw: Any) -> dict[str, tuple[str, list[int], bytes]]:
    """Name: (dtype, shape, bytes) of one recipe."""
    outer = fields(raw, "recipe", "version")
    must(number(outer["version"]) == 1, "a recipe of another version")
    must(type(outer["recipe"]) is dict, "not a recipe")
    kind = KINDS.get(outer["recipe"].get("name"))
    if kind is None:
        return uniform(outer["recipe"])
    make, generator, own = kind
    recipe = fields(outer["recipe"], "draws", "generator", "keys", "name", "sha256", *own)
    must(recipe["generator"] == generator and recipe["keys"] == {}, "another recipe")
    must({recipe.get("through", "F32"), recipe.get("stored", "F32")} <= {"F32", "BF16", "F16"}, "another dtype")
    made = make(recipe)
    if kind[0] is balanced:
        must(list(recipe["sha256"]) == ["*"], "other digests than one")
        must(digest(b"".join(data for *_, data in made)) == hex_digest(recipe["sha256"]["*"]), "another digest")
    else:
        must(sorted(recipe["sha256"]) == sorted(text(name) for name, *_ in made), "other digests than draws")
        must(all(digest(data) == hex_digest(recipe["sha256"][name]) for name, *_, data in made), "another digest")
    return {name: (dtype, shape, data) for name, dtype, shape, data in made}


def uniform(raw: Any) -> dict[str, tuple[str, list[int], bytes]]:
    """The draws of a recipe `uniform`."""
    names = ("arithmetic", "draws", "generator", "keys", "name", "order", "seed", "sha256", "stored", "through")
    recipe = fields(raw, *names)
    must((recipe["name"], recipe["generator"]) == ("uniform", "mt19937") and recipe["keys"] == {}, "another recipe")
    must(recipe["arithmetic"] in ("fused", "two-roundings"), "another arithmetic")
    must({recipe["through"], recipe["stored"]} <= {"F32", "BF16", "F16"}, "another dtype")
    listed = [fields(draw, "bound", "name", "shape") for draw in listing(recipe["draws"])]
    must(sorted(text(draw["name"]) for draw in listed) == sorted(recipe["sha256"]), "other digests than draws")
    counts = [int(np.prod([number(x, 0, 2**31) for x in listing(draw["shape"])], dtype=object)) for draw in listed]
    must(sum(counts) <= 2**24, "a recipe of too many elements for this reader")
    words = mt19937(number(recipe["seed"], -(2**63), 2**64 - 1), sum(counts))
    result, at = {}, 0
    for draw, count in zip(listed, counts, strict=True):
        bound = float.fromhex(text(draw["bound"]))
        must(np.isfinite(np.float32(bound)), "a bound that is not finite")
        lo, hi = np.float32(-bound), np.float32(bound)
        u = (words[at : at + count] & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
        if recipe["arithmetic"] == "fused":
            values = (u.astype(np.float64) * float(hi - lo) + float(lo)).astype(np.float32)
        else:
            values = u * (hi - lo) + lo
        values = rounded(rounded(values, recipe["through"]), recipe["stored"])
        as_dtype = {"F32": values, "F16": values.astype(np.float16)}.get(recipe["stored"])
        data = (values.view(np.uint32) >> 16).astype(np.uint16) if as_dtype is None else as_dtype
        must(digest(data.tobytes()) == hex_digest(recipe["sha256"][draw["name"]]), "a draw of another digest")
        result[draw["name"]] = (recipe["stored"], draw["shape"], data.tobytes())
        at += count
    return result


# Sections 3, 4, 7 and 8 ------------------------------------------------


def check_paths(paths: list[Any]) -> None:
    folders, files = set(), set()
    for path in paths:
        parts = text(path, 4096).split("/")
        for part in parts:
            must(part not in ("", ".", "..") and len(part.encode()) <= 255, f"a path: {path!r:.80}")
            must(not re.search(r'[\x00-\x1f\x7f-\x9f\\:*?"<>|]|[. ]$', part), f"a path: {path!r:.80}")
            must(part.lower().split(".")[0].rstrip() not in RESERVED, f"a reserved name: {path!r:.80}")
        folded = path.casefold().split("/")
        must("/".join(folded) not in files, "a path twice")
        files.add("/".join(folded))
        folders |= {"/".join(folded[:i]) for i in range(1, len(folded))}
    must(not files & folders, "a file where another path has a folder")


def entry_size(entry: list[Any]) -> int:
    name, dtype, shape, _ = entry
    must(text(name) and not re.search("[\x00-\x1f\x7f-\x9f]", name), "a tensor's name")
    must(type(dtype) is str and dtype in BITS and len(listing(shape)) <= 8, "a dtype or rank")
    bits = BITS[dtype]
    for dimension in shape:
        bits *= number(dimension, 0, 2**31)
    must(bits % 8 == 0, "a tensor that ends inside a byte")
    return bits // 8


def weights_header(metadata: Any, entries: list[list[Any]], sizes: list[int]) -> bytes:
    """The canonical header with its length bytes."""
    parts = []
    if metadata is not None:
        pairs = [(text(name, MIB), text(value, MIB)) for name, value in (listing(x, 2) for x in listing(metadata))]
        must(len(dict(pairs)) == len(pairs), "metadata twice")
        parts.append(b'"__metadata__":' + canonical(dict(pairs), sort=False))
    at = 0
    for (name, dtype, shape, _), size in zip(entries, sizes, strict=True):
        facts = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        parts.append(canonical(name) + b":" + canonical(facts, sort=False))
        at += size
    header = b"{" + b",".join(parts) + b"}"
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def header_says(header: bytes) -> list[tuple[Any, ...]]:
    """Name, dtype, shape and span of what a stored header lists, in the order of the data."""
    must(len(header) > 8 and int.from_bytes(header[:8], "little") == len(header) - 8 <= 16 * MIB, "a header's length")
    listed = parse(header[8:])
    must(type(listed) is dict, "a header that is no object")
    listed.pop("__metadata__", None)
    spans = [(key, fields(value, "dtype", "shape", "data_offsets")) for key, value in listed.items()]
    return [(key, facts["dtype"], facts["shape"], facts["data_offsets"]) for key, facts in spans]


def listed_in(file: bytes) -> dict[tuple[Any, ...], bytes]:
    """(name, dtype, shape) to bytes, of a safetensors file."""
    start = 8 + int.from_bytes(file[:8], "little")
    return {(n, d, tuple(s)): file[start + b : start + e] for n, d, s, (b, e) in header_says(file[:start])}


def tensors_of(file: bytes) -> dict[str, bytes]:
    return {key[0]: data for key, data in listed_in(file).items()}


def lines(place: list[Any], entry: list[Any], streams: list[Stream], classes: list[Any]) -> bytes:
    _, dtype, shape, _ = entry
    _, axis, steps, kinds = listing(place, 4)
    must(dtype == "F32" and type(axis) is int and axis in (0, 1), "lines of another dtype or axis")
    few = len(shape) < 2
    rows, columns = 1 if few else shape[0], int(np.prod(shape if few else shape[1:], dtype=object))
    count, length = (rows, columns) if axis == 0 or few else (columns, rows)
    out = np.zeros((count, length), np.float32)
    for i, (j, c) in enumerate(zip(listing(steps, count), listing(kinds, count), strict=True)):
        low, high_stream, low_stream = classes[number(c, 0, len(classes) - 1)]
        high = streams[high_stream].take(length)
        z = np.frombuffer(high, np.uint8).astype(np.int64) << low
        z |= bit_words(streams[low_stream].take((length * low + 7) // 8), length, low).astype(np.int64)
        q = np.where(z % 2 == 0, z // 2, -(z + 1) // 2)
        must((abs(q) < 2**20).all(), "a code beyond 20 bits")
        step = float(8 + number(j, -1024, 511) % 8) * 2.0 ** (j // 8 - 3)
        out[i] = q * step
    return np.ascontiguousarray(out if axis == 0 or few else out.T).tobytes()


class Decoder:
    """The parts of a manifest, and the tensors restored so far."""

    def __init__(self, data: bytes, parent: dict[str, bytes] | None, base: dict[str, bytes] | None) -> None:
        m, blob, digests = manifest_of(data)
        self.m, self.base, self.drawn = m, base, {}
        must(type(m["apack"]) is int and m["apack"] == 1, "another version")
        must(m["grade"] in ("lossless", "equivalent", "approximate"), "a grade")
        for key in ("encoding", "max_error", "error", "base"):
            must(m[key] is None or text(m[key]) is not None, key)
        text(m["producer"]), text(m["method"])
        for key in ("max_error", "error"):
            must(
                m[key] is None or re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,20})?(e[+-][0-9]{1,3})?", m[key]),
                "no decimal number",
            )
        number(m["source_bytes"])
        for line in listing(m["dropped"]):
            text(line, MIB)
        stored = Frames(blob, digests)
        self.streams = [Stream(raw, stored) for raw in listing(m["streams"])]
        must((stored.at, stored.count) == (len(blob), len(digests)), "frames that no stream has")
        for low, *pair in (listing(item, 3) for item in listing(m["classes"])):
            number(low, 0, 13), [self.stream(s) for s in pair]
        must(len(listing(m["tensors"])) <= 200_000, "too many tensors")
        self.sizes = [entry_size(listing(entry, 4)) for entry in m["tensors"]]
        must(len({entry[0] for entry in m["tensors"]}) == len(self.sizes), "a tensor twice")
        self.parent = None if m["parent"] is None else self.parent_tensors(m["parent"], parent)
        self.sub_words()

    def stream(self, value: Any) -> Stream:
        return self.streams[number(value, 0, len(self.streams) - 1)]

    def parent_tensors(self, raw: Any, files: dict[str, bytes] | None) -> dict[tuple[Any, ...], bytes]:
        facts = fields(raw, "depth", "name", "sha256")
        number(facts["depth"], 1, 64), text(facts["name"])
        found = [file for file in (files or {}).values() if digest(file) == hex_digest(facts["sha256"])]
        must(found, "the parent is missing")
        return listed_in(found[0])

    def of_parent(self, entry: list[Any]) -> bytes:
        key = (entry[0], entry[1], tuple(entry[2]))
        must(self.parent is not None and key in self.parent, "the parent has no such tensor")
        return self.parent[key]  # type: ignore[index]

    def sub_words(self) -> None:
        """Gives each stream with `sub` the bytes of the parent that belong to it."""
        subs = [s for s in self.streams if "sub" in s.steps]
        for entry in self.m["tensors"]:
            if type(entry[3]) is int and self.stream(entry[3]) in subs:
                self.stream(entry[3]).parent += self.of_parent(entry)
        must(all(len(s.parent) == s.size for s in subs), "a stream with `sub` that holds more than tensors")

    def tensor(self, i: int, before: list[bytes]) -> bytes:
        entry, size = self.m["tensors"][i], self.sizes[i]
        place = entry[3]
        if type(place) is int:
            return self.stream(place).take(size)
        must(type(place) is list and place, "a place")
        if place[0] == "same":
            out = before[number(listing(place, 2)[1], 0, i - 1)]
        elif place[0] == "recipe":
            _, r, name = listing(place, 3)
            if number(r, 0, len(listing(self.m["recipes"])) - 1) not in self.drawn:
                self.drawn[r] = draws(self.m["recipes"][r])
            dtype, shape, out = self.drawn[r].get(text(name), (None, None, b""))
            must((dtype, shape) == (entry[1], entry[2]), "a draw of another name, dtype or shape")
        elif place[0] == "base":
            _, name, sha = listing(place, 3)
            must(self.m["base"] is not None, "a base that is not named")
            must(text(name) in (self.base or {}), "a tensor of the base is missing")
            out = self.base[name]  # type: ignore[index]
            must(digest(out) == hex_digest(sha), "a tensor of the base has another digest")
        elif place[0] == "lines":
            out = lines(place, entry, self.streams, self.m["classes"])
        else:
            must(place == ["parent"], "a place")
            out = self.of_parent(entry)
        must(len(out) == size, "a tensor of another size")
        return out

    def weights(self, file: dict[str, Any]) -> bytes:
        entries = self.m["tensors"]
        must(type(file["tensors"]) is int and file["tensors"] == len(entries), "tensors that no file has")
        if file["header"] is None:
            header = weights_header(file["metadata"], entries, self.sizes)
        else:
            must(file["metadata"] is None, "a stored header and metadata")
            header = self.stream(listing(file["header"], 2)[0]).take(number(file["header"][1]))
        ends = np.cumsum([0, *self.sizes], dtype=object).tolist()
        want = [(n, d, s, [ends[i], ends[i + 1]]) for i, (n, d, s, _) in enumerate(entries)]
        must(sorted(header_says(header)) == sorted(want), "a header of other tensors")
        parts: list[bytes] = []
        for i in range(len(entries)):
            parts.append(self.tensor(i, parts))
        return header + b"".join(parts)

    def files(self) -> dict[str, bytes]:
        out: dict[str, bytes] = {}
        listed = listing(self.m["files"])
        must(all(type(file) is dict for file in listed), "a file that is no object")
        check_paths([file.get("path") for file in listed])
        must("adapter_config.json" in [file["path"] for file in listed], "no adapter_config.json")
        with_tensors = sum("tensors" in file for file in listed)
        must(with_tensors == 1 or (with_tensors == 0 and not self.sizes), "not one file with tensors")
        must(sum(number(file.get("size")) for file in listed) <= 10**12, "too many bytes")
        for file in listed:
            kind = next((kind for kind in ("text", "stream", "tensors") if kind in file), "text")
            more = ("metadata", "header") if kind == "tensors" else ()
            fields(file, "path", "sha256", "size", kind, *more)
            must(file["path"] != "adapter_config.json" or kind == "text", "adapter_config.json that is not text")
            if kind == "text":
                data = text(file["text"], 4 * MIB).encode()
            elif kind == "stream":
                data = self.stream(file["stream"]).take(file["size"])
            else:
                data = self.weights(file)
            must(len(data) == file["size"] and digest(data) == hex_digest(file["sha256"]), "a file of another digest")
            out[file["path"]] = data
        must(all(s.at == s.size for s in self.streams), "a stream that is not used up")
        return out


def decode(
    data: bytes, parent: dict[str, bytes] | None = None, base: dict[str, bytes] | None = None
) -> dict[str, bytes]:
    """Every file of a pack. `parent` holds the parent's files, `base` the bytes of the base's tensors by name."""
    return Decoder(data, parent, base).files()
