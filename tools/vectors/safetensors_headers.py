"""formats/safetensors: files that are no proper safetensors, written by hand."""

from __future__ import annotations

from vectors.hostile import Cases, framed

FORMAT = "safetensors"


def entry(name: str = "a", dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]", more: str = "") -> str:
    return f'"{name}":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def one(**fields: str) -> str:
    return "{" + entry(**fields) + "}"


def headers() -> dict[str, tuple[bytes, str, str]]:
    """Case to (file, part of the message, what the library does)."""
    b8 = bytes(8)
    good = one()
    rejected: dict[str, tuple[bytes, str]] = {
        # the frame
        "empty-file": (b"", "too few"),
        "seven-bytes": (bytes(7), "too few"),
        "header-length-zero": (bytes(8) + b"{}", "claims 0 bytes"),
        "header-longer-than-file": (framed(good, b8, 4096), "claims 4,096 bytes"),
        "header-over-100-mb": (framed(good, b8, 100_000_001), "claims 100,000,001 bytes"),
        "header-length-2-63": (framed(good, b8, 1 << 63), "claims 9,223,372,036,854,775,808 bytes"),
        "header-length-2-64": (framed(good, b8, (1 << 64) - 1), "claims 18,446,744,073,709,551,615 bytes"),
        "zip-prefix": (b"PK\x03\x04\x14\x00\x00\x00" + framed(good, b8), "pickle or a ZIP"),
        # the text
        "not-utf8": (framed(b'{"\xff":1}'), "utf-8"),
        "bom": (framed("\ufeff" + good, b8), "BOM"),
        "not-json": (framed("hello"), "header of"),
        "not-closed": (framed(good[:-1], b8), "header of"),
        "json-array": (framed("[]"), "object is wanted"),
        "json-null": (framed("null"), "object is wanted"),
        "json-string": (framed('"abc"'), "object is wanted"),
        "trailing-nul": (framed(good + "\0", b8), "header of"),
        "trailing-garbage": (framed(good + "x", b8), "header of"),
        "trailing-comma": (framed(good[:-1] + ",}", b8), "header of"),
        "comment": (framed("/* a */" + good, b8), "header of"),
        "nan-literal": (framed('{"a":NaN}'), "NaN is not JSON"),
        "infinity-literal": (framed('{"a":-Infinity}'), "Infinity is not JSON"),
        "number-too-large": (framed('{"a":1e999}'), "too large a number"),
        "leading-zero": (framed(one(shape="[02]"), b8), "header of"),
        "raw-newline-in-name": (framed(one(name="a\nb"), b8), "header of"),
        "deep-nesting": (framed('{"a":' + "[" * 200 + "]" * 200 + "}"), "nested deeper"),
        "lone-surrogate": (framed(one(name=r"\ud800"), b8), "surrogates"),
        # the entries
        "entry-not-object": (framed('{"a":[]}'), "exactly dtype, shape and data_offsets"),
        "duplicate-dtype": (framed(one(more=',"dtype":"F32"'), b8), "'dtype' stands twice"),
        "duplicate-metadata": (
            framed('{"__metadata__":{},"__metadata__":{},' + entry() + "}", b8),
            "'__metadata__' stands twice",
        ),
        "metadata-number": (framed('{"__metadata__":{"k":1},' + entry() + "}", b8), "names to strings"),
        "metadata-nested": (framed('{"__metadata__":{"k":{}},' + entry() + "}", b8), "names to strings"),
        "metadata-array": (framed('{"__metadata__":["k"],' + entry() + "}", b8), "names to strings"),
        "missing-dtype": (framed('{"a":{"shape":[2],"data_offsets":[0,8]}}', b8), "exactly dtype"),
        "missing-shape": (framed('{"a":{"dtype":"F32","data_offsets":[0,8]}}', b8), "exactly dtype"),
        "missing-offsets": (framed('{"a":{"dtype":"F32","shape":[2]}}', b8), "exactly dtype"),
        "unknown-dtype": (framed(one(dtype='"F31"'), b8), "unknown dtype"),
        "lower-case-dtype": (framed(one(dtype='"f32"'), b8), "unknown dtype"),
        "dtype-number": (framed(one(dtype="32"), b8), "unknown dtype"),
        "shape-number": (framed(one(shape="2"), b8), "lists of whole numbers"),
        "shape-negative": (framed(one(shape="[-2]"), b8), "negative"),
        "shape-minus-zero": (framed(one(shape="[-0]", offsets="[0,0]")), "negative"),
        "shape-float": (framed(one(shape="[2.0]"), b8), "whole numbers"),
        "shape-exponent": (framed(one(shape="[2e0]"), b8), "whole numbers"),
        "shape-string": (framed(one(shape='["2"]'), b8), "whole numbers"),
        "shape-boolean": (framed(one(shape="[true,2]"), b8), "whole numbers"),
        "shape-null": (framed(one(shape="[null]"), b8), "whole numbers"),
        "dimension-over-u64": (framed(one(shape="[18446744073709551616]"), b8), "absurd"),
        "dimension-of-5000-digits": (framed(one(shape=f"[{'9' * 5000}]"), b8), "header of"),
        "offset-negative": (framed(one(offsets="[-8,0]"), b8), "negative"),
        "offset-float": (framed(one(offsets="[0,8.0]"), b8), "whole numbers"),
        "offset-boolean": (framed(one(shape="[]", dtype='"U8"', offsets="[false,true]"), b"\0"), "whole numbers"),
        "one-offset": (framed(one(offsets="[8]"), b8), "[begin, end]"),
        "three-offsets": (framed(one(offsets="[0,4,8]"), b8), "[begin, end]"),
        "begin-after-end": (framed(one(offsets="[8,0]"), b8), "[begin, end]"),
        "past-the-end": (framed(one(shape="[4]", offsets="[0,16]"), b8), "accounts for"),
        "overlap-identical": (framed("{" + entry("a") + "," + entry("b") + "}", b8), "begins at byte 0"),
        "overlap-partial": (
            framed("{" + entry("a") + "," + entry("b", offsets="[4,12]") + "}", bytes(12)),
            "begins at byte 4",
        ),
        "hole-at-start": (framed(one(offsets="[8,16]"), bytes(16)), "begins at byte 8"),
        "hole-between": (
            framed("{" + entry("a") + "," + entry("b", offsets="[12,20]") + "}", bytes(20)),
            "begins at byte 12",
        ),
        "trailing-bytes": (framed(good, b8 + b"#!/bin/sh"), "accounts for"),
        "body-one-short": (framed(good, bytes(7)), "accounts for"),
        "span-too-long": (framed(one(offsets="[0,12]"), bytes(12)), "does not take 12 bytes"),
        "span-too-short": (framed(one(offsets="[0,4]"), bytes(4)), "does not take 4 bytes"),
        "shape-overflow": (framed(one(shape="[4294967296,4294967296,4294967296]"), b8), "absurd"),
        "byte-size-overflow": (
            framed(one(dtype='"F64"', shape="[2147483648,2147483648,2]", offsets="[0,0]")),
            "does not take 0 bytes",
        ),
        "f4-odd-count": (framed(one(dtype='"F4"', shape="[3]", offsets="[0,1]"), b"\0"), "does not take 1 bytes"),
        "offset-2-53": (framed(one(offsets="[9007199254740992,9007199254741000]"), b8), "begins at byte"),
    }
    huge = "18446744073709551615"
    accepted: dict[str, tuple[bytes, str]] = {
        "duplicate-key": (framed("{" + entry() + "," + entry() + "}", b8), "'a' stands twice"),
        "duplicate-key-two-shapes": (
            framed("{" + entry(shape="[2,1]") + "," + entry() + "}", b8),
            "'a' stands twice",
        ),
        "duplicate-key-escaped": (framed("{" + entry() + "," + entry(r"\u0061") + "}", b8), "'a' stands twice"),
        "duplicate-metadata-key": (
            framed('{"__metadata__":{"k":"1","k":"2"},' + entry() + "}", b8),
            "'k' stands twice",
        ),
        "metadata-null": (framed('{"__metadata__":null,' + entry() + "}", b8), "names to strings"),
        "unknown-field": (framed(one(more=',"strides":[1]'), b8), "exactly dtype"),
        "zero-times-overflow": (framed(one(shape=f"[0,{huge},{huge}]", offsets="[0,0]")), "absurd"),
        "dimension-over-2-31": (framed(one(shape="[0,2147483649]", offsets="[0,0]")), "absurd"),
        "rank-9": (framed(one(shape="[1,1,1,1,1,1,1,1,2]"), b8), "absurd"),
        "rank-10000": (framed(one(shape=f"[{'1,' * 9999}2]"), b8), "absurd"),
        "name-empty": (framed(one(name=""), b8), "name is empty"),
        "name-nul": (framed(one(name=r"a\u0000b"), b8), "control characters"),
        "name-control": (framed(one(name=r"a\u001b[31mb"), b8), "control characters"),
        "name-c1-control": (framed(one(name=r"a\u0085b"), b8), "control characters"),
        "name-513-bytes": (framed(one(name="a" * 513), b8), "longer than 512 bytes"),
        "name-171-wide-characters": (framed(one(name="層" * 171), b8), "longer than 512 bytes"),
    }
    return {case: (*found, "rejects") for case, found in rejected.items()} | {
        case: (*found, "accepts") for case, found in accepted.items()
    }


def invalid(cases: Cases) -> None:
    for case, (data, message, library) in headers().items():
        expect = {"error": "invalid", "message": message, "library": library}
        cases.write(case, {"model.safetensors": data}, expect)
