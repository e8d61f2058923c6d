"""Write the packs under formats/apack/: the frozen vectors, and the malformed ones with the words of their errors.

usage: python tools/make_pack_vectors.py vectors     writes formats/apack/vectors/v1, which must not be there yet
       python tools/make_pack_vectors.py invalid     rewrites formats/apack/invalid

The vectors are packs that adapterpack writes, and packs put together by hand where it would not choose what is to be
tried. The malformed ones are put together by hand, each with one fault and a seal that is right.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import apack_decoder  # noqa: E402
import packs  # noqa: E402
from packs import Maker, Manifest, ramp, sha, small, zstd  # noqa: E402

ROOT = HERE.parent / "formats" / "apack"
Files = dict[str, bytes]


def text(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


# ---------------------------------------------------------------- malformed: the outer shape

Bad = dict[str, tuple[bytes, str, str]]
"""Case to (pack, code of the error, part of its message)."""


def outer_cases() -> Bad:
    good = small().pack()
    size = len(good)

    def edited(old: bytes, new: bytes) -> bytes:
        header = good[:384].replace(old, new)[:384].ljust(384)
        return header + good[384:]

    return {
        "empty": (b"", "invalid", "are too few"),
        "cut-in-header": (good[:300], "invalid", "are too few"),
        "cut-by-one": (good[:-1], "invalid", "its header accounts for"),
        "extended-by-one": (good + b"\0", "invalid", "its header accounts for"),
        "two-packs": (good + good, "invalid", "its header accounts for"),
        "header-length": (struct.pack("<Q", 377) + good[8:], "invalid", "its header is damaged"),
        "header-padding": (good[:383] + b"\n" + good[384:], "invalid", "its header is damaged"),
        "header-space": (edited(b'"1"}', b'"1" }'), "invalid", "its header is damaged"),
        "header-not-json": (edited(b'{"__meta', b"{'__meta"), "invalid", "its header is damaged"),
        "version-2": (edited(b'"apack":"1"', b'"apack":"2"'), "unsupported", "of version '2'"),
        "seal": (good[:-1] + bytes([good[-1] ^ 1]), "invalid", "its seal is broken"),
        "manifest-bit": (good[: size - 40] + bytes([good[-40] ^ 1]) + good[-39:], "invalid", "its seal is broken"),
        "frame-bit": (good[:384] + bytes([good[384] ^ 1]) + good[385:], "invalid", "is damaged between bytes 384"),
    }


# ---------------------------------------------------------------- malformed: the manifest as stored


def stored_cases() -> Bad:
    maker = small()
    plain = apack_decoder.canonical(maker.manifest)

    def packed(data: bytes) -> bytes:
        return packs.seal(maker.manifest, maker.frames, packed=data)

    def written(data: bytes) -> bytes:
        return packs.seal(data, maker.frames)

    good = zstd(plain, dictionary=True)
    digests = b"".join(hashlib.sha256(frame).digest() for frame in maker.frames)
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"skip"
    twice = plain.replace(b'"apack":1', b'"apack":1,"apack":1')
    return {
        "manifest-no-zstd": (packed(plain), "invalid", "manifest of"),
        "manifest-empty": (packed(b""), "invalid", "manifest of"),
        "manifest-no-size": (packed(zstd(plain, True, write_content_size=False)), "invalid", "state its size"),
        "manifest-trailing": (packed(good + b"\0"), "invalid", "manifest of"),
        "manifest-two-frames": (packed(good + zstd(b"")), "invalid", "manifest of"),
        "manifest-skippable-before": (packed(skippable + good), "invalid", "manifest of"),
        "manifest-skippable-behind": (packed(good + skippable), "invalid", "manifest of"),
        "manifest-cut": (packed(good[:-1]), "invalid", "manifest of"),
        "manifest-not-json": (written(plain[:-1]), "invalid", "manifest of"),
        "manifest-not-utf8": (written(plain.replace(b"by hand", b"by h\xffnd")), "invalid", "utf-8"),
        "manifest-list": (written(b"[]"), "invalid", "object is wanted"),
        "manifest-space": (written(plain.replace(b'"apack":1', b'"apack": 1')), "invalid", "not written as it"),
        "manifest-newline": (written(plain + b"\n"), "invalid", "not written as it"),
        "manifest-escape": (written(plain.replace(b"by hand", b"by\\u0020hand")), "invalid", "not written as it"),
        "manifest-slash": (written(plain.replace(b"runs/notes", b"runs\\/notes")), "invalid", "not written as it"),
        "manifest-key-order": (written(_swapped(plain)), "invalid", "not written as it"),
        "manifest-key-twice": (written(twice), "invalid", "'apack' stands twice"),
        "manifest-float": (
            written(plain.replace(b'"source_bytes":0', b'"source_bytes":0.0')),
            "invalid",
            "0.0 where",
        ),
        "manifest-exponent": (written(plain.replace(b'"apack":1', b'"apack":1e0')), "unsupported", "version 1.0"),
        "manifest-nan": (written(plain.replace(b'"source_bytes":0', b'"source_bytes":NaN')), "invalid", "NaN is not"),
        "manifest-surrogate": (written(plain.replace(b"by hand", b"by \\ud800")), "invalid", "surrogates"),
        "manifest-deep": (
            written(plain.replace(b'"dropped":[]', b'"dropped":' + b"[" * 99 + b"]" * 99)),
            "invalid",
            "nested deeper",
        ),
        "digests-cut": (packs.seal(maker.manifest, maker.frames, digests=digests[:-1]), "invalid", "list of frames"),
        "digest-missing": (packs.seal(maker.manifest, maker.frames, digests=digests[:-32]), "invalid", "of digests"),
        "digest-too-many": (packs.seal(maker.manifest, maker.frames, digests=digests * 2), "invalid", "of digests"),
        "frame-too-many": (packs.seal(maker.manifest, [*maker.frames, b"x"]), "invalid", "number of bytes"),
        "frames-missing": (packs.seal(maker.manifest, maker.frames[:-1]), "invalid", "number of bytes"),
    }


def _swapped(plain: bytes) -> bytes:
    """The same object with its last key first."""
    manifest = json.loads(plain)
    last = {key: manifest[key] for key in (*list(manifest)[-1:], *list(manifest)[:-1])}
    return apack_decoder.canonical(last, sort=False)


# ---------------------------------------------------------------- malformed: what the manifest says


def put(*keys: Any) -> Callable[[Manifest], object]:
    """Set what the path of all keys but the last leads to."""
    *way, last, value = keys

    def change(manifest: Manifest) -> None:
        place: Any = manifest
        for key in way:
            place = place[key]
        place[last] = copy.deepcopy(value)

    return change


def drop(*keys: Any) -> Callable[[Manifest], object]:
    *way, last = keys

    def change(manifest: Manifest) -> None:
        place: Any = manifest
        for key in way:
            place = place[key]
        del place[last]

    return change


def path(value: str) -> Callable[[Manifest], object]:
    return put("files", 2, "path", value)


def path_cases() -> dict[str, tuple[Callable[[Manifest], object], str]]:
    outside, unsafe = "leads outside", "on every system"
    return {
        "path-parent": (path("../README.md"), outside),
        "path-parent-inside": (path("runs/../../README.md"), outside),
        "path-dot": (path("./README.md"), outside),
        "path-absolute": (path("/etc/README.md"), "is not a file name"),
        "path-empty": (path(""), "is not a file name"),
        "path-empty-part": (path("runs//README.md"), "is not a file name"),
        "path-folder": (path("README.md/"), "is not a file name"),
        "path-backslash": (path("runs\\README.md"), outside),
        "path-drive": (path("C:README.md"), outside),
        "path-nul": (path("README\0.md"), "control characters"),
        "path-newline": (path("README\n.md"), "control characters"),
        "path-c1": (path("README\x85.md"), "control characters"),
        "path-wildcard": (path("README.*"), unsafe),
        "path-reserved": (path("runs/con"), unsafe),
        "path-reserved-suffix": (path("Lpt9.txt"), unsafe),
        "path-dot-at-end": (path("README.md."), unsafe),
        "path-space-at-end": (path("README.md "), unsafe),
        "path-long-part": (path("r" * 256), "is too long"),
        "path-long": (path("/".join(["r" * 250] * 17)), "at most 4,096 bytes"),
        "path-twice": (path("runs/notes.txt"), "restores one file twice"),
        "path-case": (path("Runs/NOTES.txt"), "restores one file twice"),
        "path-case-folded": (path("ADAPTER_config.json"), "restores one file twice"),
        "path-file-and-folder": (path("runs"), "a file where it has a directory"),
        "path-file-and-folder-case": (path("RUNS"), "a file where it has a directory"),
    }


def field_cases() -> dict[str, tuple[Callable[[Manifest], object], str]]:
    wanted = "are wanted"
    parent = {"depth": 1, "name": "before", "sha256": "0" * 64}
    return {
        "field-missing": (drop("grade"), wanted),
        "field-unknown": (put("more", 1), wanted),
        "file-field-missing": (drop("files", 2, "sha256"), wanted),
        "file-field-unknown": (put("files", 2, "mode", 420), wanted),
        "file-two-kinds": (put("files", 2, "text", "# A card"), wanted),
        "file-no-kind": (drop("files", 2, "stream"), wanted),
        "grade-unknown": (put("grade", "perfect"), "unknown grade"),
        "max-error-text": (put("max_error", "little"), "where a decimal number is wanted"),
        "error-negative": (put("error", "-0.5"), "where a decimal number is wanted"),
        "error-number": (put("error", 1), "where a text"),
        "producer-long": (put("producer", "p" * 513), "at most 512 bytes"),
        "method-null": (put("method", None), "where a text"),
        "dropped-number": (put("dropped", [1]), "where a text"),
        "source-bytes-true": (put("source_bytes", True), "where a whole number"),
        "source-bytes-negative": (put("source_bytes", -1), "where a whole number"),
        "sha-upper-case": (put("files", 0, "sha256", "A" * 64), "where a SHA-256"),
        "sha-short": (put("files", 0, "sha256", "0" * 63), "where a SHA-256"),
        "sha-other": (put("files", 0, "sha256", "0" * 64), "with other bytes than"),
        "size-other": (put("files", 0, "size", 7), "another size than its parts"),
        "size-huge": (put("files", 0, "size", 10**12 + 1), "where a whole number"),
        "sizes-huge": (put("files", 2, "size", 10**12), "more than packs may"),
        "config-in-stream": (_config_in_stream, "it has no adapter_config.json"),
        "config-missing": (drop("files", 0), "it has no adapter_config.json"),
        "tensors-in-two-files": (_two_files, "takes more than one file apart"),
        "tensors-too-few": (put("files", 1, "tensors", 3), "belong to no file"),
        "tensors-too-many": (put("files", 1, "tensors", 5), "belong to no file"),
        "metadata-twice": (put("files", 1, "metadata", [["a", "1"], ["a", "1"]]), "of one name twice"),
        "metadata-object": (put("files", 1, "metadata", {"format": "pt"}), "where a list"),
        "metadata-and-header": (put("files", 1, "header", [1, 8]), "both a stored header and metadata"),
        "header-stream": (_stored_header(9), "a stream that is not there"),
        "header-no-json": (_stored_header(1), "the stored header"),
        "parent-depth-0": (put("parent", {**parent, "depth": 0}), "a parent at no distance"),
        "parent-depth-65": (put("parent", {**parent, "depth": 65}), "where a whole number up to 64"),
        "parent-path": (put("parent", {**parent, "name": "../before"}), "leads outside"),
        "parent-field-missing": (put("parent", {"depth": 1, "name": "before"}), wanted),
    }


def _config_in_stream(manifest: Manifest) -> None:
    config = manifest["files"][0]
    manifest["files"][2] |= {"path": "adapter_config.json"}
    config["path"] = "other.json"


def _two_files(manifest: Manifest) -> None:
    manifest["files"].append({**manifest["files"][1], "path": "other.safetensors", "tensors": 0})


def _stored_header(stream: int) -> Callable[[Manifest], object]:
    def change(manifest: Manifest) -> None:
        manifest["files"][1] |= {"metadata": None, "header": [stream, 128]}
        manifest["tensors"][2][3] = ["same", 0]
        manifest["files"][1]["size"] = 128 + 4 * 128

    return change


def tensor_cases() -> dict[str, tuple[Callable[[Manifest], object], str]]:
    def place(value: Any) -> Callable[[Manifest], object]:
        return put("tensors", 2, 3, value)

    nowhere, unplaced = "has a tensor in", "cannot place the tensor"
    return {
        "name-twice": (put("tensors", 1, 0, packs.Q.format("A")), "two tensors of one name"),
        "name-empty": (put("tensors", 1, 0, ""), "its manifest has"),
        "name-control": (put("tensors", 1, 0, "a\tb"), "its manifest has"),
        "name-long": (put("tensors", 1, 0, "n" * 513), "at most 512 bytes"),
        "dtype-unknown": (put("tensors", 1, 1, "F31"), "unknown dtype"),
        "dtype-list": (put("tensors", 1, 1, ["F32"]), "unknown dtype"),
        "rank-9": (put("tensors", 1, 2, [1] * 9), "at most 8"),
        "dimension-huge": (put("tensors", 1, 2, [2**31 + 1, 0]), "where a whole number"),
        "dimension-true": (put("tensors", 1, 2, [True, 32]), "where a whole number"),
        "shape-huge": (put("tensors", 1, 2, [2**31] * 8), "where a whole number"),
        "half-a-byte": (put("tensors", 1, slice(1, 3), ["F4", [3]]), "no whole number of bytes"),
        "entry-short": (put("tensors", 1, ["a", "F32", [1]]), "where a list of 4"),
        "place-unknown": (place(["elsewhere"]), nowhere),
        "place-true": (place(True), "where a whole number"),
        "place-null": (place(None), nowhere),
        "place-stream-missing": (place(3), unplaced),
        "place-stream-negative": (place(-1), "where a whole number"),
        "place-other-stream": (place(0), "fills stream"),
        "same-forward": (place(["same", 3]), unplaced),
        "same-itself": (place(["same", 2]), unplaced),
        "same-true": (place(["same", True]), "where a whole number"),
        "same-other-size": (put("tensors", 1, 2, [8, 5]), unplaced),
        "recipe-missing": (place(["recipe", 0, "vera_A"]), unplaced),
        "parent-not-named": (place(["parent"]), unplaced),
        "base-digest": (place(["base", "w", "0"]), "where a SHA-256"),
        "lines-axis-2": (place(["lines", 2, [0] * 4, [0] * 4]), nowhere),
        "lines-axis-true": (place(["lines", True, [0] * 8, [0] * 8]), nowhere),
        "lines-axis-float": (_float_axis, nowhere),
        "lines-step-low": (place(["lines", 0, [0, 0, 0, -1025], [0] * 4]), "a step code that is none"),
        "lines-step-high": (place(["lines", 0, [0, 0, 0, 512], [0] * 4]), "a step code that is none"),
        "lines-no-class": (place(["lines", 0, [0] * 4, [0] * 4]), unplaced),
        "lines-too-few": (_lines([0] * 3, [0] * 4), unplaced),
        "lines-classes-too-few": (_lines([0] * 4, [0] * 3), unplaced),
        "lines-of-another-dtype": (_lines([0] * 4, [0] * 4, "I32"), unplaced),
        "class-low-14": (put("classes", [[14, 1, 1]]), "where a whole number up to 13"),
        "class-no-stream": (put("classes", [[0, 1, 3]]), "a stream that is not there"),
        "class-null": (put("classes", [[0, 1, None]]), "where a whole number"),
    }


def _float_axis(manifest: Manifest) -> bytes:
    manifest["tensors"][2][3] = ["lines", 0, [0] * 4, [0] * 4]
    return apack_decoder.canonical(manifest).replace(b'["lines",0,', b'["lines",0.0,')


def _lines(steps: list[int], classes: list[int], dtype: str = "F32") -> Callable[[Manifest], object]:
    def change(manifest: Manifest) -> None:
        manifest["classes"] = [[0, 1, 1]]
        manifest["tensors"][2] = [packs.K.format("A"), dtype, [4, 8], ["lines", 0, steps, classes]]

    return change


def stream_cases() -> dict[str, tuple[Callable[[Manifest], object], str]]:
    def steps(*names: str, width: int = 4) -> Callable[[Manifest], object]:
        def change(manifest: Manifest) -> None:
            manifest["streams"][0] |= {"steps": list(names), "width": width}

        return change

    frame = small().manifest["streams"][0]["frames"][0]
    chain, larger = "no chain of steps", "larger than it needs to be"
    return {
        "width-3": (steps(width=3), chain),
        "width-0": (steps(width=0), chain),
        "width-16": (steps(width=16), "where a whole number up to 8"),
        "step-unknown": (steps("planets"), chain),
        "step-twice": (steps("rotate", "rotate"), chain),
        "steps-in-another-order": (steps("planes", "rotate"), chain),
        "steps-gaps-and-mask": (steps("gaps", "mask"), chain),
        "steps-planes-and-bits": (steps("planes", "bits"), chain),
        "step-narrow-of-2": (steps("narrow", width=2), chain),
        "step-rotate-alone": (steps("rotate"), chain),
        "step-exponents-of-1": (steps("rotate", "exponents", "planes", width=1), chain),
        "step-exponents-alone": (steps("exponents", "planes"), chain),
        "step-grid-alone": (steps("grid"), chain),
        "step-grid-of-8": (steps("sub", "grid", width=8), chain),
        "step-grid-and-planes": (steps("sub", "planes", "grid"), chain),
        "step-grid-of-narrow": (steps("sub", "narrow", "grid"), chain),
        "step-palette-and-planes": (steps("planes", "palette"), chain),
        "step-palette-of-parent": (steps("sub", "palette"), chain),
        "step-palette-of-gaps": (steps("gaps", "palette"), chain),
        "step-palette-of-8": (steps("palette", width=8), chain),
        "step-palette-of-1": (steps("palette", width=1), chain),
        "step-sub-without-parent": (steps("sub", "planes"), "to a parent that it lacks"),
        "stream-field-missing": (drop("streams", 0, "width"), "are wanted"),
        "stream-not-used": (put("streams", 3, {"frames": [[1, 1, 1]], "steps": [], "width": 1}), "fills stream 3"),
        "frame-empty": (put("streams", 0, "frames", 0, []), "an empty frame"),
        "frame-of-nothing": (put("streams", 0, "frames", 0, [0]), "an empty frame"),
        "frame-half-a-segment": (put("streams", 0, "frames", 0, frame[:-1]), "half a segment"),
        "frame-bomb": (put("streams", 0, "frames", 0, 0, 1 << 30), "where a whole number up to 67,108,864"),
        "segment-bomb": (put("streams", 0, "frames", 0, 1, 1 << 26), larger),
        "segment-grows": (put("streams", 0, "frames", 0, slice(1, 3), [15, 16]), larger),
        "frame-cuts-a-word": (_cut_word, "cuts a word into two frames"),
        "frame-too-long": (put("streams", 0, "frames", 0, 0, 68), "fills stream 0"),
        "segment-missing": (put("streams", 0, "frames", 0, slice(1, 5), [32, 32]), "other segments than its chain"),
        "manifest-of-2-to-the-40": (put("files", 0, "size", 1 << 41), "where a whole number"),
    }


def _cut_word(manifest: Manifest) -> None:
    first, second = manifest["streams"][0]["frames"]
    first[0], second[0] = first[0] - 1, second[0] + 1


def manifest_cases() -> Bad:
    groups = (path_cases(), field_cases(), tensor_cases(), stream_cases())
    cases = {name: case for group in groups for name, case in group.items()}
    assert len(cases) == sum(map(len, groups))
    maker = small()
    # A list that `put` makes longer must be there.
    found: Bad = {}
    for name, (change, message) in cases.items():
        if name == "stream-not-used":
            found[name] = (_with_spare_stream(), "invalid", message)
        else:
            found[name] = (packs.changed(maker, change), "invalid", message)
    found["apack-2"] = (packs.changed(maker, put("apack", 2)), "unsupported", "of version 2")
    found["apack-true"] = (packs.changed(maker, put("apack", True)), "unsupported", "of version True")
    found["apack-text"] = (packs.changed(maker, put("apack", "1")), "unsupported", "of version '1'")
    return found


def _with_spare_stream() -> bytes:
    maker = small()
    maker.bytes(b"x")
    return maker.pack()


# ---------------------------------------------------------------- malformed: what the frames hold


def one_stream(width: int, steps: list[str], size: int, segments: list[bytes], raw: bytes | None = None) -> bytes:
    """A pack with one file whose stream is one frame of these segments, stored as they are where they are short."""
    maker = Maker()
    stream = maker.stream(width, steps, [(size, segments)])
    maker.config()
    maker.file("data.bin", bytes(size) if raw is None else raw, stream=stream)
    return maker.pack()


def raw_frame(data: bytes, size: int, steps: list[str] | None = None) -> bytes:
    """A pack with one file whose stream is one frame: one segment of `size` bytes, stored as `data`."""
    maker = Maker()
    maker.manifest["streams"].append({"frames": [[size, size, len(data)]], "steps": steps or [], "width": 1})
    maker.frames.append(data)
    maker.config()
    maker.file("data.bin", bytes(size), stream=0)
    return maker.pack()


def frame_cases() -> Bad:
    zeros = bytes(4096)
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"skip"
    wide = zstd(bytes(1 << 20) * 9, level=1, write_content_size=True)
    cases = {
        "zstd-garbage": raw_frame(b"no frame at all", 4096),
        "zstd-no-size": raw_frame(zstd(zeros, True, write_content_size=False), 4096),
        "zstd-other-size": raw_frame(zstd(zeros[:-1], True), 4096),
        "zstd-bomb": raw_frame(_claiming(zstd(zeros, True), 1 << 30), 4096),
        "zstd-holds-less": raw_frame(_claiming(zstd(zeros[:2048], True), 4096), 4096),
        "zstd-two-frames": raw_frame(zstd(zeros[:2048], True) * 2, 4096),
        "zstd-trailing": raw_frame(zstd(zeros, True) + b"\0", 4096),
        "zstd-skippable": raw_frame(skippable + zstd(zeros, True), 4096),
        "zstd-skippable-behind": raw_frame(zstd(zeros, True) + skippable, 4096),
        "zstd-cut": raw_frame(zstd(zeros, True)[:-1], 4096),
        "zstd-names-a-dictionary": raw_frame(_naming_dictionary(zstd(zeros)), 4096),
        "zstd-window": raw_frame(_window(wide), 9 << 20),
        "zstd-dictionary-where-none-is": one_dictionary(),
    }
    return {name: (data, "invalid", "stream 0: ") for name, data in cases.items()} | segment_cases()


def one_dictionary() -> bytes:
    """A frame of a stream with steps that only the dictionary decodes."""
    content = apack_decoder.DICTIONARY[:4096]
    return raw_frame(zstd(content, dictionary=True), 4096, ["planes"])


def _claiming(frame: bytes, size: int) -> bytes:
    """The same frame with another content size, in eight bytes."""
    at = 6 if not frame[4] & 0x20 else 5
    old = (1 if frame[4] & 0x20 else 0, 2, 4, 8)[frame[4] >> 6]
    return frame[:4] + bytes([frame[4] & 0x3F | 0xC0]) + frame[5:at] + struct.pack("<Q", size) + frame[at + old :]


def _naming_dictionary(frame: bytes) -> bytes:
    """The same frame, saying that it wants dictionary 7."""
    at = 6 if not frame[4] & 0x20 else 5
    return frame[:4] + bytes([frame[4] | 1]) + frame[5:at] + b"\x07" + frame[at:]


def _window(frame: bytes) -> bytes:
    """The same frame with a window of 16 MiB."""
    assert not frame[4] & 0x20
    return frame[:5] + bytes([(24 - 10) << 3]) + frame[6:]


def segment_cases() -> Bad:
    two, numbered = struct.pack("<2I", 0, 5), ["rotate", "exponents", "planes"]
    cases = {
        "gaps-beyond": (4, ["gaps"], 8, [b"\x02", two[4:]], "beyond the frame"),
        "gaps-open": (4, ["gaps"], 8, [b"\x01\xff", two[4:]], "lead to no word"),
        "gaps-zero-word": (4, ["gaps"], 8, [b"\x01", bytes(4)], "a zero word"),
        "gaps-too-few-words": (4, ["gaps"], 8, [b"\0\0", two[4:]], "of another length"),
        "mask-beyond": (4, ["mask"], 8, [b"\x06", two], "a mask of another length"),
        "mask-long": (4, ["mask"], 8, [b"\x02\0", two[4:]], "a mask of another length"),
        "mask-zero-word": (4, ["mask"], 8, [b"\x03", two], "a zero word"),
        "planes-short": (4, ["planes"], 8, [b"\0\0", b"\0\0", b"\0", b"\0\5"], "of another length"),
        "planes-too-few": (4, ["planes"], 8, [b"\0\0", b"\0\0", b"\0\0"], "other segments than"),
        "planes-too-many": (2, ["planes"], 4, [b"\0\0", b"\0\0", b"\0\0"], "other segments than"),
        "bits-beyond": (4, ["bits"], 8, [b"\x03", b"\x68"], "bits beyond the last word"),
        "bits-33": (4, ["bits"], 8, [b"\x21", bytes(9)], "packed words of another length"),
        "bits-short": (4, ["bits"], 8, [b"\x05", b"\1"], "packed words of another length"),
        "bits-no-count": (4, ["bits"], 8, [b"", bytes(1)], "the number of bits takes one byte"),
        "table-not-in-order": (2, numbered, 4, [b"\2\1", b"\0\0", b"\0\0"], "a table of exponents"),
        "table-twice": (2, numbered, 4, [b"\1\1", b"\0\0", b"\0\0"], "a table of exponents"),
        "table-empty": (2, numbered, 4, [b"", b"\0\0", b"\0\0"], "a table of exponents"),
        "table-of-nothing": (2, ["gaps", *numbered], 4, [b"", b"", b"", b""], "a table of exponents"),
        "exponent-beyond": (2, numbered, 4, [b"\1\2\3", b"\0\xc0", b"\0\0"], "an exponent beyond"),
        "exponent-low-bits": (2, numbered, 4, [b"\1\2", b"\0\x80", b"\1\0"], "an exponent beyond"),
        "tail-short": (4, ["planes"], 6, [b"\0"] * 4 + [b"\0"], "other segments than"),
        "tail-missing": (4, ["planes"], 6, [b"\0"] * 4, "other segments than"),
        "words-short": (4, ["mask"], 8, [b"\x02", bytes(3)], "of another length"),
    }
    return {
        name: (one_stream(width, steps, size, segments), "invalid", message)
        for name, (width, steps, size, segments, message) in cases.items()
    }


# ---------------------------------------------------------------- malformed: recipes and references


def recipe(**changed: Any) -> Manifest:
    """A recipe of two small draws; their digests are right if nothing is changed."""
    inner: Manifest = {
        "name": "uniform",
        "generator": "mt19937",
        "seed": 11,
        "draws": [
            {"name": "vera_A", "shape": [3, 24], "bound": (0.25).hex()},
            {"name": "vera_B", "shape": [16, 3], "bound": (1.5).hex()},
        ],
        "order": "row-major, one 32-bit draw per element, low 24 bits",
        "arithmetic": "fused",
        "through": "F32",
        "stored": "F32",
        "sha256": {"vera_A": "0" * 64, "vera_B": "0" * 64},
        "keys": {},
    }
    inner |= {key: value for key, value in changed.items() if key != "version"}
    if "sha256" not in changed:
        inner["sha256"] = {name: sha(data) for name, data in drawn(inner).items()}
    return {"version": changed.get("version", 1), "recipe": inner}


def drawn(inner: Manifest) -> dict[str, bytes]:
    """The draws of a recipe that is fused and rounded nowhere."""
    words = apack_decoder.mt19937(11, 120)
    out, at = {}, 0
    for name, count, bound in (("vera_A", 72, 0.25), ("vera_B", 48, 1.5)):
        u = (words[at : at + count] & 0xFFFFFF).astype(np.float64) / 2**24
        out[name] = (u * 2 * bound - bound).astype(np.float32).tobytes()
        at += count
    return out


def with_recipe(made: Manifest, name: str = "vera_A", dtype: str = "F32", shape: tuple[int, ...] = (3, 24)) -> bytes:
    maker = Maker()
    maker.manifest["recipes"] = [made]
    maker.config()
    size = apack_decoder.BITS[dtype] // 8 * int(np.prod(shape))
    data = drawn({})[name if name in ("vera_A", "vera_B") else "vera_A"][:size].ljust(size, b"\0")
    maker.tensor("base_model.vera_A", dtype, shape, data, ["recipe", 0, name])
    maker.model()
    return maker.pack()


def recipe_cases() -> Bad:
    good = recipe()
    huge = [
        {"name": "vera_A", "shape": [1 << 30, 24], "bound": (0.25).hex()},
        {"name": "vera_B", "shape": [16, 3], "bound": (1.5).hex()},
    ]
    digests = {"vera_A": "0" * 64, "vera_B": "0" * 64}
    extra = copy.deepcopy(good)
    extra["recipe"]["more"] = 1
    placed = "cannot place the tensor"
    return {
        "recipe-other-version": (with_recipe(recipe(version=2)), "unsupported", "has version 2"),
        "recipe-other-name": (with_recipe(recipe(name="normal")), "unsupported", "an unknown recipe"),
        "recipe-other-generator": (with_recipe(recipe(generator="philox")), "unsupported", "an unknown recipe"),
        "recipe-other-arithmetic": (with_recipe(recipe(arithmetic="exact")), "invalid", "unknown arithmetic"),
        "recipe-other-dtype": (with_recipe(recipe(stored="I32")), "invalid", "unknown arithmetic or dtype"),
        "recipe-seed-text": (with_recipe(recipe(seed="11")), "invalid", "not a recipe"),
        "recipe-field-unknown": (with_recipe(extra), "invalid", "a recipe that is not written"),
        "recipe-keys": (with_recipe(recipe(keys={"vera_A": "a"})), "invalid", "a recipe that is not written"),
        "recipe-other-digest": (with_recipe(recipe(sha256=digests)), "invalid", "gives another vera_A"),
        "recipe-no-digest": (with_recipe(recipe(sha256={"vera_A": "0" * 64})), "invalid", "one digest for each"),
        "recipe-no-such-draw": (with_recipe(good, "vera_C"), "invalid", placed),
        "recipe-other-shape": (with_recipe(good, shape=(24, 3)), "invalid", placed),
        "recipe-another-dtype": (with_recipe(good, dtype="I32"), "invalid", placed),
        "recipe-other-size": (with_recipe(good, shape=(3, 23)), "invalid", placed),
        "recipe-too-large": (with_recipe(recipe(draws=huge, sha256=digests)), "invalid", placed),
        "recipe-null": (with_recipe(None), "invalid", "object is wanted"),  # type: ignore[arg-type]
        "recipe-empty": (with_recipe({}), "unsupported", "has version None"),
    }


def with_parent(sha256: str = "0" * 64, *, sub: bool = False, **facts: Any) -> bytes:
    maker = Maker(parent={"depth": 1, "name": "before", "sha256": sha256, **facts})
    data = ramp(16, 16).tobytes()
    place: Any = ["parent"]
    if sub:
        place = maker.stream(4, ["sub", "bits"], [(len(data), [b"\0", b""])])
    maker.config()
    maker.tensor("w", "F32", (16, 16), data, place)
    maker.model()
    return maker.pack()


def before(name: str = "w", shape: tuple[int, ...] = (16, 16)) -> Files:
    model = packs.safetensors({name: ramp(*shape)}, {"format": "pt"})
    return {"before/adapter_config.json": packs.CONFIG, "before/adapter_model.safetensors": model}


def reference_cases() -> dict[str, tuple[bytes, str, str, Files]]:
    """Case to (pack, code, part of the message, other files)."""
    model = "before/adapter_model.safetensors"
    own, renamed, flat = before(), before("v"), before(shape=(256,))
    itself = sha(packs.safetensors({"w": ramp(16, 16)}))
    sums = {id(files): sha(files[model]) for files in (own, renamed, flat)}
    base = Maker(base="base")
    base.config()
    base.tensor("w", "F32", (16, 16), ramp(16, 16).tobytes(), ["base", "w", "0" * 64])
    base.model()
    shape = "another shape or dtype"
    return {
        "parent-absent": (with_parent(), "missing-reference", "which is not beside it", {}),
        "parent-other": (with_parent(), "missing-reference", "which is not beside it", own),
        "parent-without-tensor": (with_parent(sums[id(renamed)]), "invalid", "has no tensor 'w'", renamed),
        "parent-other-shape": (with_parent(sums[id(flat)]), "invalid", shape, flat),
        "parent-other-shape-sub": (with_parent(sums[id(flat)], sub=True), "invalid", shape, flat),
        "parent-itself": (with_parent(itself, name="pack.apack"), "invalid", "more than 64 packs", {}),
        "sub-of-a-file": (_sub_of_a_file(), "invalid", "something that is no tensor", own),
        **grid_cases(),
        "base-not-named": (packs.changed(base, put("base", None)), "invalid", "cannot place the tensor", {}),
        "base-absent": (base.pack(), "missing-reference", "from its base model, which is not here", {}),
    }


def on_grid(*segments: bytes, steps: tuple[str, ...] = ("sub", "grid")) -> tuple[bytes, Files]:
    """A pack of one tensor of six words on a grid, and its parent."""
    # Two that are on any grid of small steps, one on no line of it, one on the last line, the largest one, and zero.
    old = np.array([1, -1, 2.0**100, 2 - 2.0**-23, np.finfo(np.float32).max, 0], np.float32)
    model = packs.safetensors({"w": old}, {"format": "pt"})
    maker = Maker(parent={"depth": 1, "name": "before", "sha256": sha(model)})
    stream = maker.stream(4, list(steps), [(24, list(segments))])
    maker.config()
    maker.tensor("w", "F32", (6,), old.tobytes(), stream)
    maker.model({"format": "pt"})
    files = {"before/adapter_config.json": packs.CONFIG, "before/adapter_model.safetensors": model}
    return maker.pack(), files


def grid_cases() -> dict[str, tuple[bytes, str, str, Files]]:
    """Each with one fault; `right` is the tensor as the parent has it, on a grid of 2^-23."""
    whole = np.array([2.0**100, np.finfo(np.float32).max], "<f4").tobytes()
    right = [bytes([104]), b"\0\0\xff\0\xff\0", b"\0", whole, b"\0", b"\0", b"\0"]

    def but(at: int, segment: bytes, *more: tuple[int, bytes]) -> list[bytes]:
        changed = dict([(at, segment), *more])
        return [changed.get(n, part) for n, part in enumerate(right)]

    length, lines = "a grid of another length", "to or from beyond the grid"
    exponents, beside, bits = "below its first line", "words beside the grid", "between the lines"
    coarse = [bytes([250]), b"\0\0\0\0\x42\0", b"\x7f\x7f\xe3\x7f\0", b"", bytes(6), bytes(6), bytes(5)]
    cases = {
        "grid-without-step": (but(0, b""), length),
        "grid-two-steps": (but(0, b"hh"), length),
        "grid-moves-short": (but(1, b"\0\0\xff\0\xff"), length),
        "grid-from-no-line": (but(1, b"\0\0\0\0\xff\0", (3, whole[4:])), lines),
        "grid-to-no-line": (but(1, b"\0\0\xff\2\xff\0"), lines),
        "grid-beyond-the-exponents": (coarse, lines),
        "grid-exponent-missing": (but(2, b""), exponents),
        "grid-exponent-too-many": (but(2, b"\0\0"), exponents),
        "grid-exponent-on-a-line": (but(2, b"\x68"), exponents),
        "grid-whole-missing": (but(3, whole[4:]), beside),
        "grid-whole-too-many": (but(3, whole + whole), beside),
        "grid-whole-half": (but(3, whole[:-1]), beside),
        "grid-low-missing": (but(4, b""), bits),
        "grid-low-too-many": (but(4, b"\0\0"), bits),
        "grid-next-missing": (but(5, b""), bits),
        "grid-next-too-many": (but(5, b"\0\0"), bits),
        "grid-bits-missing": (but(6, b""), bits),
        "grid-bits-too-many": (but(6, b"\0\0"), bits),
        "grid-bits-unused": (but(6, b"\x80"), "beyond the last word of a grid"),
        "grid-segment-missing": (right[:-1], "other segments than"),
    }
    made = {name: (*on_grid(*segments), message) for name, (segments, message) in cases.items()}
    like = on_grid(b"\5", bytes([104]), b"\0", b"\0", b"", b"\0", b"\0", b"\0", steps=("sub", "gaps", "grid"))
    made["grid-kept-word-equal"] = (*like, "a word like the parent's")
    good, files = on_grid(*right)
    # All of them differ from one that is right.
    assert apack_decoder.decode(good, files) and all(data != good for data, _, _ in made.values())
    return {name: (data, "invalid", message, files) for name, (data, files, message) in made.items()}


def palette_cases() -> Bad:
    """Each with one fault; `right` has two runs of 300 words, a palette of three values and one of one."""
    words = np.array([0.5, -1, 3] * 100 + [7] * 300, np.float32)
    turned = [int(w) << 1 & 0xFFFFFFFF | int(w) >> 31 for w in words.view(np.uint32)]
    above, places = [], []
    for run in (turned[:300], turned[300:]):
        values = sorted(set(run))
        above += [b - a for a, b in pairwise([0, *values])]
        places += [values.index(w) for w in run]
    planes = [bytes(a >> shift & 255 for a in above) for shift in (24, 16, 8, 0)]

    def head(*sizes: int, run: int = 300) -> bytes:
        return run.to_bytes(4, "little") + bytes(sizes)

    def packed(indices: list[int], per: int = 4) -> bytes:
        rows = [indices[i : i + per] for i in range(0, len(indices), per)]
        return bytes(sum(value << 8 // per * i for i, value in enumerate(row)) for row in rows)

    def one(*segments: bytes, size: int = 2400) -> bytes:
        maker = Maker()
        stream = maker.stream(4, ["palette"], [(size, list(segments))])
        maker.config()
        maker.tensor("w", "F32", (size // 4,), words.tobytes()[:size], stream)
        maker.model()
        return maker.pack()

    right = [head(2, 0), *planes, packed(places)]
    assert apack_decoder.decode(one(*right))

    def but(at: int, segment: bytes) -> bytes:
        return one(*right[:at], segment, *right[at + 1 :])

    def other(place: int, value: int) -> bytes:
        return but(5, packed([*places[:place], value, *places[place + 1 :]]))

    def flat(*values: int, sizes: tuple[int, ...] = (2, 0)) -> bytes:
        return one(head(*sizes), *(bytes(v >> shift & 255 for v in values) for shift in (24, 16, 8, 0)), right[5])

    number, sizes, ascend = (
        "another number of words than the frame",
        "of other sizes than they say",
        "does not ascend",
    )
    beyond = "a place beyond its palette"
    odd = [head(2, run=599), *(plane[:3] for plane in planes), packed([*places[:299], 0, *[1] * 299])]
    cases = {
        "palette-runs-of-255": (one(head(2, 0, 0, run=255), *(p + b"\1" for p in planes), right[5]), number),
        "palette-runs-of-0": (but(0, head(2, 0, run=0)), number),
        "palette-without-runs": (but(0, head()[:3]), number),
        "palette-missing": (but(0, head(2)), number),
        "palette-too-many": (but(0, head(2, 0, 0)), number),
        "palette-short": (but(1, planes[0][:-1]), sizes),
        "palette-long": (but(4, planes[3] + b"\1"), sizes),
        "palette-smaller-than-said": (but(0, head(3, 0)), sizes),
        "palette-value-twice": (flat(above[0], above[1], 0, above[3]), ascend),
        "palette-descends": (flat(above[0], above[1], 2**32 - 5, above[3]), ascend),
        "palette-place-beyond": (other(7, 3), beyond),
        "palette-place-of-another-run": (other(450, 1), beyond),
        "palette-places-short": (but(5, right[5][:-1]), number),
        "palette-places-long": (but(5, right[5] + b"\0"), number),
        "palette-places-a-byte-each": (but(5, bytes(places)), number),
        "palette-places-unused": (
            one(*odd[:-1], odd[-1][:-1] + bytes([odd[-1][-1] | 192]), size=2396),
            "beyond the last",
        ),
        "palette-segment-missing": (one(*right[:-1]), "other segments than"),
        "palette-segment-too-many": (one(*right, b"\0"), "other segments than"),
    }
    return {name: (data, "invalid", message) for name, (data, message) in cases.items()}


def _sub_of_a_file() -> bytes:
    maker = Maker(parent={"depth": 1, "name": "before", "sha256": "0" * 64})
    stream = maker.stream(4, ["sub", "bits"], [(8, [b"\0", b""])])
    maker.config()
    maker.file("data.bin", bytes(8), stream=stream)
    return maker.pack()


def lines_cases() -> Bad:
    maker = Maker()
    high, low = maker.bytes(b"\1\2\3"), maker.bytes(b"\xff")
    maker.manifest["classes"] = [[1, high, low]]
    maker.config()
    maker.tensor("w", "F32", (1, 3), bytes(12), ["lines", 0, [0], [0]])
    maker.model()
    other = Maker()
    other.config()
    other.tensor("w", "F32", (4, 8), ramp(4, 8).tobytes(), 0)
    other.bytes(ramp(4, 8).tobytes())
    other.model(header=packs.safetensors({"w": ramp(8, 4)})[:-128])
    least = Maker()
    high, low = least.bytes(b"\xff"), least.bytes(b"\xff\x1f")
    least.manifest["classes"] = [[13, high, low]]
    least.config()
    least.tensor("w", "F32", (1, 1), np.float32(-(1 << 20)).tobytes(), ["lines", 0, [0], [0]])
    least.model()
    return {
        "lines-least-code": (least.pack(), "invalid", "a code beyond 1048575"),
        "lines-bits-beyond": (maker.pack(), "invalid", "bits beyond the last code"),
        "header-of-others": (other.pack(), "invalid", "is not that of its tensors"),
    }


def invalid() -> None:
    shutil.rmtree(ROOT / "invalid", ignore_errors=True)
    groups = (outer_cases(), stored_cases(), manifest_cases(), frame_cases(), recipe_cases(), lines_cases())
    groups += (palette_cases(),)
    cases = {name: (*case, {}) for group in groups for name, case in group.items()} | reference_cases()
    assert len(cases) == sum(map(len, groups)) + len(reference_cases())
    for name, (data, code, message, files) in cases.items():
        written = packs.write_tree(ROOT / "invalid" / name, {"pack.apack": data, **files})
        listed = sorted({"pack.apack", *files})
        (written / "expect.json").write_bytes(text({"error": code, "message": message, "files": listed}))
    print(f"{len(cases)} malformed packs, {sum(len(case[0]) for case in cases.values()):,} bytes")


# ---------------------------------------------------------------- vectors

CHAINS = [
    (width, [*sub, *places, *narrow, *end])
    for width in (1, 2, 4, 8)
    for sub in ([], ["sub"])
    for places in ([], ["gaps"], ["mask"])
    for narrow in ([], ["narrow"])
    for end in ([], ["bits"], ["planes"], ["rotate", "planes"], ["rotate", "exponents", "planes"])
    if (not narrow or width == 4) and ("exponents" not in end or width > 1)
] + [(width, ["sub", *places, "grid"]) for width in (2, 4) for places in ([], ["gaps"], ["mask"])]
CHAINS += [(width, ["palette"]) for width in (2, 4)]


def words(width: int, steps: list[str], count: int, seed: int) -> tuple[bytes, bytes]:
    """Words that suit a chain, and the parent's: near zero, floats, NaN, infinities, negative zeros, all bits."""
    rng = np.random.default_rng(seed)
    x = (
        rng.integers(0, 1 << 8 * width, count, np.uint64, endpoint=False)
        if width < 8
        else rng.integers(0, 2**63, count)
    )
    if width == 4:
        x = rng.standard_normal(count).astype(np.float32).view(np.uint32)
        x[:5] = 0x7FC00001, 0xFF800000, 0x80000000, 0xFFFFFFFF, 1
    x = x.astype(f"<u{width}")
    if "bits" in steps:
        x %= x.dtype.type(50)
    if "palette" in steps:
        x = x[rng.integers(0, 7, count)]
    if "narrow" in steps:
        x &= x.dtype.type(0xFFFF0000)
    if {"gaps", "mask"} & set(steps):
        x[rng.random(count) < 0.7] = 0
    before = x.copy() if "narrow" in steps else x + rng.integers(-3, 4, count).astype(x.dtype)
    if "grid" in steps:
        # Moves of all sizes, so that some words are below the first line and some beyond the last one.
        half = np.dtype(f"<u{width}")
        floats = rng.standard_normal((2, count)) * 2.0 ** rng.integers(-12, 3, (2, count))
        old, new = floats[0], floats[0] + floats[1] / 16
        x, before = ((v.astype("<f4").view("<u4") >> (32 - 8 * width)).astype(half) for v in (new, old))
        x[:5] = np.array([0x7FC00001, 0xFF800000, 0x80000000, 0xFFFFFFFF, 1]).astype("<u4") >> (32 - 8 * width)
        before[3:7] = x[3:7]
    if {"gaps", "mask"} & set(steps):
        before = np.where(rng.random(count) < 0.7, x, before).astype(x.dtype)
    return x.tobytes(), before.tobytes()


def split(width: int, steps: list[str], raw: bytes, before: bytes = b"") -> list[bytes]:
    """What adapterpack's own chain makes of a frame."""
    from adapterpack.codecs.chain import Chain

    old = np.frombuffer(before, np.uint8) if before else None
    return [part.tobytes() for part in Chain(width, tuple(steps)).split(np.frombuffer(raw, np.uint8), old)]


def every_step() -> Files:
    """Each chain that needs no parent, with a frame of 60 words and one of a few and a part of a word."""
    maker, files = Maker(), []
    for n, (width, steps) in enumerate(chain for chain in CHAINS if "sub" not in chain[1]):
        raw, _ = words(width, steps, 66, n)
        raw += b"tail567"[: width - 1]
        parts = (raw[: 60 * width], raw[60 * width :])
        files.append(
            (f"{n:02}.bin", raw, maker.stream(width, steps, [(len(p), split(width, steps, p)) for p in parts]))
        )
    maker.config()
    for name, raw, stream in files:
        maker.file(name, raw, stream=stream)
    return {"pack.apack": maker.pack()}


def palettes() -> Files:
    """Runs of 256 words and a shorter one, of which the first has so many values; places of 1, 2, 4 and 8 bits."""
    from adapterpack.codecs.chain import Chain

    maker, files, rng = Maker(), [], np.random.default_rng(21)
    for width in (2, 4):
        for values in (1, 2, 3, 4, 5, 16, 17, 256):
            x = rng.integers(0, 1 << 8 * width, (3, values), np.uint64).astype(f"<u{width}")
            x[0, -1], x[2, 0] = 0, (1 << 8 * width) - 1
            used = [np.arange(256) % values, rng.integers(0, values, 256), rng.integers(0, values, 100)]
            raw = b"".join(row[at].tobytes() for row, at in zip(x, used, strict=True)) + b"rest"[: width - 1]
            chain = Chain(width, ("palette",), 256)
            segments = [part.tobytes() for part in chain.split(np.frombuffer(raw, np.uint8))]
            stream = maker.stream(width, ["palette"], [(len(raw), segments)])
            files.append((f"{width}-{values:03}.bin", raw, stream))
    maker.config()
    for name, raw, stream in files:
        maker.file(name, raw, stream=stream)
    return {"pack.apack": maker.pack()}


UNSIGNED = {1: "U8", 2: "U16", 4: "F32", 8: "U64"}


def every_step_from_a_parent() -> Files:
    """Each chain with `sub`: two tensors in one stream, cut into frames elsewhere."""
    maker, old = Maker(), Maker()
    for n, (width, steps) in enumerate(chain for chain in CHAINS if "sub" in chain[1]):
        raw, before = words(width, steps, 40, 100 + n)
        cuts = (slice(0, 32 * width), slice(32 * width, None))
        frames = [(len(raw[cut]), split(width, steps, raw[cut], before[cut])) for cut in cuts]
        stream = maker.stream(width, steps, frames)
        for part, cut in (("a", slice(0, 16 * width)), ("b", slice(16 * width, None))):
            shape = [len(raw[cut]) // width]
            maker.tensor(f"{n:02}.{part}", UNSIGNED[width], shape, raw[cut], stream)
            old.tensor(f"{n:02}.{part}", UNSIGNED[width], shape, before[cut], 0)
    maker.config()
    model = old.model({"format": "pt"})
    maker.manifest["parent"] = {"depth": 1, "name": "before", "sha256": sha(model)}
    maker.model({"format": "pt"})
    where = "parent/before"
    return {
        "pack.apack": maker.pack(),
        f"{where}/adapter_config.json": packs.CONFIG,
        f"{where}/adapter_model.safetensors": model,
    }


def every_dtype() -> Files:
    maker = Maker()
    rng = np.random.default_rng(1)
    shapes: tuple[list[int], ...] = ([], [4], [0], [2, 0, 3], [2, 4], [1] * 8)
    for n, dtype in enumerate(sorted(apack_decoder.BITS)):
        for shape in shapes:
            size = apack_decoder.BITS[dtype] * int(np.prod(shape, dtype=int))
            if size % 8 == 0 and (shape != shapes[5] or n % 5 == 0):
                data = rng.bytes(size // 8)
                maker.tensor(f"{dtype}.{'x'.join(map(str, shape))}", dtype, shape, data, maker.bytes(data))
    maker.config()
    maker.model()
    return {"pack.apack": maker.pack()}


def headers() -> dict[str, Files]:
    """Canonical headers with and without metadata, and headers that are stored."""
    found: dict[str, Files] = {}
    listed: dict[str, dict[str, str] | None] = {
        "none": None,
        "empty": {},
        "several": {"z": "1", "a": "\u00e9\n", "": "2"},
    }
    for name, metadata in listed.items():
        maker = Maker()
        data = ramp(2, 3).tobytes()
        maker.tensor("b", "F32", (2, 3), data, maker.bytes(data))
        maker.tensor('a "\\\u2028', "F32", (6,), data, ["same", 0])
        maker.config()
        maker.model(metadata)
        found[f"header-{name}"] = {"pack.apack": maker.pack()}
    maker = Maker()
    data = ramp(2, 3).tobytes()
    maker.tensor("b", "F32", (2, 3), data, maker.bytes(data))
    maker.tensor("a", "F32", (6,), data, ["same", 0])
    maker.config()
    entries = {
        "a": {"shape": [6], "dtype": "F32", "data_offsets": [24, 48]},
        "b": {"data_offsets": [0, 24], "dtype": "F32", "shape": [2, 3]},
        "__metadata__": {"format": "pt"},
    }
    header = json.dumps(entries, indent=1).encode() + b" \n\t"
    maker.model(header=struct.pack("<Q", len(header)) + header)
    found["header-stored"] = {"pack.apack": maker.pack()}
    return found


def texts() -> Files:
    maker = Maker(dropped=["file \u00e4\u2028.bin", 'folder "x"/'], encoding=None, method="\u00fc\u1e9e")
    config = '{"peft_type": "\u00dc\u1e9e",\t"note": "\u2028\\u0001 \U0001f600 \x7f"}\r\n'.encode()
    stream = maker.bytes(b"abc" * 3)
    empty = maker.bytes(b"")
    maker.config(config)
    for path in ("\u00e9/\u6f22 \U0001f600.md", "a/b/c/d/e.txt", ".hidden"):
        maker.file(path, b"abc", stream=stream)
    maker.file("nothing", b"", stream=empty)
    maker.file("control.txt", b'\0\1\x1f\x7f\b\f\\"', text='\0\1\x1f\x7f\b\f\\"')
    return {"pack.apack": maker.pack()}


def made_recipes() -> Files:
    """Every arithmetic and dtype, and seeds below zero and above 32 bits."""
    import torch

    from adapterpack.recipes import Uniform, UniformRecipe
    from adapterpack.tensor import DTYPES

    assert torch
    maker = Maker()
    kinds = (
        (11, "fused", "F32", "F32"),
        (-5, "two-roundings", "F32", "F32"),
        (2**32 + 77, "fused", "BF16", "F32"),
        (0, "fused", "F16", "F32"),
        (3, "two-roundings", "BF16", "BF16"),
        (4, "fused", "F32", "F16"),
    )
    for n, (seed, arithmetic, through, stored) in enumerate(kinds):
        draws = (Uniform("vera_A", (3, 40), 0.3), Uniform("vera_B", (24, 3), 1.5))
        made = UniformRecipe(seed, draws, arithmetic, DTYPES[through], DTYPES[stored])
        tensors = {name: tensor.source.read(0, tensor.nbytes) for name, tensor in made.draw().items()}
        record = json.loads(made.to_metadata())
        record["recipe"]["sha256"] = {name: sha(data) for name, data in tensors.items()}
        maker.manifest["recipes"].append(record)
        for draw in draws:
            maker.tensor(f"{n}.{draw.name}", stored, draw.shape, tensors[draw.name], ["recipe", n, draw.name])
    maker.config()
    maker.model()
    return {"pack.apack": maker.pack()}


def quantised() -> dict[str, Files]:
    from adapterpack import containers
    from adapterpack.codecs.lines import Quantised
    from adapterpack.containers import apack
    from adapterpack.tensor import F32, Tensor

    rng = np.random.default_rng(12)
    sources = []
    for axis, tops in ((0, [3, 100, 3, 100, 0]), (1, [2000, 1 << 19, 1, (1 << 20) - 1]), (0, [])):
        codes = np.zeros((len(tops), 23), np.int32)
        for line, top in zip(codes, tops, strict=True):
            line[:] = rng.integers(-top, top + 1, 23)
        sources.append(Quantised(codes, tuple([-1024, 511, -77, 0, 8][: len(tops)]), axis))
    tensors = {}
    for n, source in enumerate(sources):
        shape = source.codes.shape if source.axis == 0 else source.codes.shape[::-1]
        tensors[f"w{n}"] = Tensor(F32, (int(shape[0]), int(shape[1])), source)
    with tempfile.TemporaryDirectory() as where:
        c = containers.Checkpoint(name="made", config=json.loads(packs.CONFIG), tensors=tensors)
        facts = apack.Facts("other", None, "approximate", 1, "0.01", "0.00123")
        target = Path(where) / "pack.apack"
        apack.write_pack(c, target, {}, facts, apack.References(), overwrite=False, protected=(), jobs=1)
        made = target.read_bytes()
    # By hand: all numbers of low bits in one tensor, columns, and a tensor of one dimension. 255 is the least code.
    maker = Maker(grade="approximate", max_error="0.01", error="1.5e-05")
    high, low = maker.bytes(bytes([1, 2, 255] * 19)), maker.bytes(_low_bits())
    maker.manifest["classes"] = [[low_bits, high, low] for low_bits in range(14)]
    maker.config()
    steps = [-1024, -1, 0, 1, 7, 8, 511, *range(20, 27)]
    values = [_line(low_bits, step) for low_bits, step in zip(range(14), steps, strict=True)]
    grid = np.array(values, np.float32)
    maker.tensor("columns", "F32", (3, 14), grid.T.tobytes(), ["lines", 1, steps, list(range(14))])
    for n, shape in enumerate(((3,), (3,), (1, 3, 1), (3, 1, 1), (1, 1, 3), (0, 2, 3), (2, 0))):
        flat = np.array(_line(0, 0), np.float32).tobytes() if 0 not in shape else b""
        lines = {5: 6, 6: 2}.get(n, 1)
        # Where no line has a byte, there are lines nevertheless.
        axis = {1: 1, 3: 1, 5: 1}.get(n, 0)
        maker.tensor(f"flat-{n}", "F32", shape, flat, ["lines", axis, [0] * lines, [0] * lines])
    maker.model()
    return {"lines": {"pack.apack": made}, "lines-by-hand": {"pack.apack": maker.pack()}}


def _low_bits() -> bytes:
    """For each number of bits, three codes whose lower parts are 0, all ones, and alternating."""
    out = b""
    for n in range(14):
        number = (((1 << n) - 1) << n) | ((0x1555 & ((1 << n) - 1)) << 2 * n)
        out += number.to_bytes(-(-3 * n // 8), "little")
    return out


def _line(n: int, j: int) -> list[float]:
    codes = []
    for high, low in zip((1, 2, 255), (0, (1 << n) - 1, 0x1555 & ((1 << n) - 1)), strict=True):
        z = (high << n) + low
        codes.append(z // 2 if z % 2 == 0 else -(z + 1) // 2)
    return [q * (8 + j % 8) * 2.0 ** (j // 8 - 3) for q in codes]


def directories() -> dict[str, Files]:
    """What adapterpack makes of directories."""
    import adapterpack

    formats = ROOT.parent
    rng = np.random.default_rng(9)
    a = (rng.standard_normal((4, 300)) * 0.1).astype(np.float32)
    b = rng.standard_normal((300, 4)).astype(np.float32)
    later = {
        packs.Q.format("A"): a + (rng.standard_normal(a.shape) * 1e-6).astype(np.float32),
        packs.Q.format("B"): b,
    }
    last = {**later, packs.Q.format("A"): later[packs.Q.format("A")] + np.float32(1e-6)}
    first = {packs.Q.format("A"): a, packs.Q.format("B"): b}
    state = {"optimizer.pt": rng.bytes(500) + bytes(900), "trainer_state.json": b"{}", "runs/1/events": b"e" * 99}
    found: dict[str, Files] = {}
    with tempfile.TemporaryDirectory() as where:
        root = Path(where)

        def pack(name: str, source: Path, *more: Path, **options: Any) -> Path:
            target = root / "made" / f"{name}.apack"
            target.parent.mkdir(exist_ok=True)
            adapterpack.compress(source, target, jobs=1, **options)
            found[name] = {"pack.apack": target.read_bytes()}
            for path in more:
                inside = packs.tree(path) if path.is_dir() else {"": path.read_bytes()}
                found[name] |= {f"parent/{path.name}/{p}".rstrip("/"): data for p, data in inside.items()}
            return target

        steps = [packs.adapter(root / f"step-{n}", arrays) for n, arrays in enumerate((first, later, last))]
        pack("lora", adapter(formats / "lora" / "vectors" / "linear-llama", root / "lora"))
        pack("vblora", adapter(formats / "vblora" / "vectors" / "topk-k2", root / "vblora"))
        pack("vera", adapter(formats / "vera" / "vectors" / "projection-bf16-base", root / "vera"))
        pack(
            "trainer",
            packs.adapter(
                root / "trainer", {"w": b, "same": b, "narrow": narrow(b), "i": (b * 3).astype(np.int32)}, state
            ),
        )
        grids = {n.format(m): coarse(rng, m, b) for n, b in ((packs.Q, 4), (packs.K, 8)) for m in "AB"}
        pack("few-values", packs.adapter(root / "few-values", grids))
        pickle = packs.write_tree(root / "pickle", {"adapter_config.json": packs.LORA, "adapter_model.bin": b"\x80"})
        pack("pickle", pickle)
        whole = pack("series-0", steps[0])
        between = pack("series-1", steps[1], whole, parent=whole)
        pack("series-2", steps[2], whole, between, parent=between)
        pack("after-a-directory", steps[1], steps[0], parent=steps[0])
        model = packs.write_tree(root / "base", {"model.safetensors": packs.safetensors({"embed.weight": b}, {})})
        tied = packs.adapter(root / "tied", {"w": a, "saved": b})
        base_pack = pack("base", tied, base=model)
        found["base"] |= {"base/model.safetensors": (model / "model.safetensors").read_bytes()}
        found["base"]["pack.apack"] = _portable(base_pack.read_bytes(), str(model))
    return found


def adapter(vector: Path, destination: Path) -> Path:
    """The adapter of another format's vector, without what is expected of it."""
    files = {path: data for path, data in packs.tree(vector).items() if path.startswith("adapter_")}
    return packs.write_tree(destination, files)


def coarse(rng: np.random.Generator, kind: str, bits: int) -> np.ndarray:
    """Values of so many bits: rows of one scale each, or a tensor of one."""
    x = rng.standard_normal((4, 600) if kind == "A" else (600, 4)).astype(np.float32)
    scale = np.abs(x).max(axis=1 if kind == "A" else None, keepdims=True) / np.float32(2 ** (bits - 1) - 1)
    return np.round(x / scale) * scale


def narrow(array: np.ndarray) -> np.ndarray:
    return (array.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _portable(data: bytes, name: str) -> bytes:
    """The same pack with another name for its base: where it lay is of no interest."""
    manifest, frames = packs.take_apart(data)
    assert manifest["base"] == name
    return packs.seal({**manifest, "base": "tiny/base"}, frames)


def vectors() -> None:
    where = ROOT / "vectors" / "v1"
    if where.exists():
        sys.exit(f"{where} is there: vectors are written once and never again")
    made = {
        "every-step": every_step(),
        "every-step-from-a-parent": every_step_from_a_parent(),
        "palettes": palettes(),
        "every-dtype": every_dtype(),
        "texts": texts(),
        "recipes": made_recipes(),
        **headers(),
        **quantised(),
        **directories(),
    }
    total = 0
    for name, files in made.items():
        restored, plain = packs.read_case(files)
        expect = {"files": {path: sha(data) for path, data in sorted(restored.items())}, "manifest": sha(plain)}
        packs.write_tree(where / name, {**files, "expect.json": text(expect)})
        size = sum(map(len, files.values()))
        total += size
        print(f"{name:28}{size:8,} bytes, {len(restored)} files")
    print(f"{len(made)} packs, {total:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["vectors", "invalid"])
    {"invalid": invalid, "vectors": vectors}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
