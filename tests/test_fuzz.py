"""The targets of `make fuzz`, on their seeds and on some hundred changes of them: no atheris, the same every time."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator

import pytest
from fuzz.targets import TARGETS, judge

from adapterpack import limits
from adapterpack.codecs.chain import Chain
from adapterpack.containers.apack.manifest import Drawn, FromBase, FromParent, InStream, Lines, Manifest, Same
from adapterpack.containers.apack.parsing import parse
from adapterpack.errors import AdapterpackError, InvalidFile

_CHANGES = 600
_NUMBERS = (0, 1, 2, 7, 255, 256, 65_535, 1 << 31, 1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 64, -1, 10**12)
_WORDS = (b"null", b"true", b"[]", b"{}", b'""', b"NaN", b"1.5", b'"..\\/x"', b'"\\ud800"', b"[[[[[[[[", b"1e999")


def _flip(r: random.Random, data: bytearray) -> None:
    if data:
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)


def _cut(r: random.Random, data: bytearray) -> None:
    start = r.randrange(len(data) + 1)
    del data[start : start + r.choice((1, 2, 8, 100, len(data)))]


def _double(r: random.Random, data: bytearray) -> None:
    start = r.randrange(len(data) + 1)
    data[start:start] = data[start : start + r.choice((1, 8, 64))]


def _number(r: random.Random, data: bytearray) -> None:
    found = list(re.finditer(rb"\d+", data))
    if found:
        match = r.choice(found)
        data[match.start() : match.end()] = str(r.choice(_NUMBERS)).encode()


def _word(r: random.Random, data: bytearray) -> None:
    found = list(re.finditer(rb'"[^"]*"|\d+|true|false|null', data))
    if found:
        match = r.choice(found)
        data[match.start() : match.end()] = r.choice(_WORDS)


def _noise(r: random.Random, data: bytearray) -> None:
    start = r.randrange(len(data) + 1)
    data[start : start + 4] = r.randbytes(4)


CHANGES: tuple[Callable[[random.Random, bytearray], None], ...] = (_flip, _cut, _double, _number, _word, _noise)


def _changed(seeds: list[bytes], r: random.Random) -> Iterator[bytes]:
    for _ in range(_CHANGES):
        data = bytearray(r.choice(seeds))
        for _ in range(r.choice((1, 1, 2, 4))):
            r.choice(CHANGES)(r, data)
        yield bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_only_errors_for_users_escape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PATTERN_SECONDS", 0.05)
    target = TARGETS[name]
    seeds = list(target.seeds())
    assert seeds
    for data in [*seeds, b"", *_changed(seeds, random.Random(name))]:
        try:
            judge(target, data)
        except Exception as e:
            pytest.fail(f"{name}: {type(e).__name__}: {e} for {data!r:.2000}")


@pytest.mark.parametrize("name", TARGETS)
def test_some_seeds_are_accepted(name: str) -> None:
    """A target that refuses everything at its door tests only the door."""

    def accepted(data: bytes) -> bool:
        try:
            TARGETS[name].run(data)
        except Exception:
            return False
        return True

    assert any(map(accepted, TARGETS[name].seeds()))


def test_a_step_with_a_line_break_is_named_in_one_line() -> None:
    with pytest.raises(InvalidFile) as caught:
        Chain(4, ("rotate", "a\nb"))
    assert "\n" not in caught.value.message and "rotate a" in caught.value.message


def _manifests() -> Iterator[tuple[bytes, Manifest]]:
    """Those of the seeds that are well-formed, and what they say."""
    for data in TARGETS["manifest"].seeds():
        with contextlib.suppress(AdapterpackError):
            yield data, parse(data, "seed")


def test_what_only_equals_a_number_of_the_manifest_is_none() -> None:
    """`true` and `1.0` equal 1 for Python: what is written again would be another manifest."""
    lined = next(data for data, _ in _manifests() if b'["lines",0,' in data)
    for old, new in (
        (b'["lines",0,', b'["lines",false,'),
        (b'["lines",0,', b'["lines",0.0,'),
        (b'"apack":1', b'"apack":true'),
    ):
        with pytest.raises(AdapterpackError):
            parse(lined.replace(old, new), "input")


def test_the_packs_to_begin_with_have_every_place_and_most_steps() -> None:
    found = [m for _, m in _manifests()]
    places = {type(entry.place) for m in found for entry in m.tensors}
    assert places >= {InStream, Same, Drawn, FromBase, FromParent, Lines}
    steps = {step for m in found for stream in m.streams for step in stream.chain.steps}
    assert steps >= {"sub", "gaps", "narrow", "rotate", "planes", "bits"}
