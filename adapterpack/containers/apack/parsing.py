"""A manifest from its JSON: strictly, so that every number in it is bounded before anybody works with it."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from adapterpack import limits
from adapterpack.codecs.chain import Chain
from adapterpack.containers.apack.manifest import (
    VERSION,
    Class,
    Drawn,
    Entry,
    File,
    Frame,
    FromBase,
    FromParent,
    InStream,
    Lines,
    Manifest,
    Parent,
    Place,
    Same,
    Stream,
    Tensors,
    Text,
    canonical,
)
from adapterpack.errors import AdapterpackError, InvalidFile, Unsupported
from adapterpack.io import json as strict_json
from adapterpack.io import safetensors
from adapterpack.io.paths import plain_name
from adapterpack.tensor import DTYPES

if TYPE_CHECKING:
    from adapterpack import recipes

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DECIMAL = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?(e[+-][0-9]{1,3})?")
_GRADES = ("lossless", "equivalent", "approximate")


def _shown(value: Any) -> str:
    """A value for an error. What is long is not spelled out: that alone could take seconds."""
    if isinstance(value, (list, dict, str)) and len(value) > 1000:
        return f"a {type(value).__name__} of {len(value):,}"
    return f"{value!r:.40}"


class _Reader:
    """Takes a parsed manifest apart; everything unexpected is an error that names the pack."""

    def __init__(self, where: str) -> None:
        self.where = where

    def bad(self, reason: str) -> InvalidFile:
        return InvalidFile(f"{self.where}: its manifest {reason}")

    def number(self, value: Any, most: int = limits.PACK_BYTES) -> int:
        if type(value) is not int or not 0 <= value <= most:
            raise self.bad(f"has {_shown(value)} where a whole number up to {most:,} is wanted")
        return value

    def text(self, value: Any, most: int = limits.NAME_BYTES) -> str:
        if not isinstance(value, str) or len(value.encode()) > most:
            raise self.bad(f"has {_shown(value)} where a text of at most {most:,} bytes is wanted")
        return value

    def decimal(self, value: Any) -> str:
        if not _DECIMAL.fullmatch(self.text(value, 40)):
            raise self.bad(f"has {_shown(value)} where a decimal number is wanted")
        return str(value)

    def sha256(self, value: Any) -> str:
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise self.bad(f"has {_shown(value)} where a SHA-256 is wanted")
        return value

    def items(self, value: Any, most: int = limits.TENSORS) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise self.bad(f"has {_shown(value)} where a list of at most {most:,} is wanted")
        return value

    def row(self, value: Any, length: int) -> list[Any]:
        if not isinstance(value, list) or len(value) != length:
            raise self.bad(f"has {_shown(value)} where a list of {length} is wanted")
        return value

    def record(self, value: Any, keys: set[str]) -> dict[str, Any]:
        if not isinstance(value, dict) or value.keys() != keys:
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise self.bad(f"has {found!r:.80} where {sorted(keys)} are wanted")
        return value

    def manifest(self, r: dict[str, Any]) -> Manifest:
        optional = {k: None if r[k] is None else self.text(r[k]) for k in ("encoding", "base")}
        optional |= {k: None if r[k] is None else self.decimal(r[k]) for k in ("max_error", "error")}
        if r["grade"] not in _GRADES:
            raise self.bad(f"has an unknown grade {r['grade']!r:.40}")
        return Manifest(
            producer=self.text(r["producer"]),
            method=self.text(r["method"]),
            grade=r["grade"],
            files=tuple(map(self.file, self.items(r["files"]))),
            tensors=tuple(map(self.tensor, self.items(r["tensors"]))),
            streams=tuple(map(self.stream, self.items(r["streams"]))),
            recipes=tuple(map(self.recipe, self.items(r["recipes"], 1000))),
            classes=tuple(map(self.klass, self.items(r["classes"], 1000))),
            parent=None if r["parent"] is None else self.parent(r["parent"]),
            source_bytes=self.number(r["source_bytes"]),
            dropped=tuple(self.text(text, limits.METADATA_BYTES) for text in self.items(r["dropped"])),
            **optional,
        )

    def file(self, value: Any) -> File:
        kinds = {"text": {"text"}, "stream": {"stream"}, "tensors": {"tensors", "metadata", "header"}}
        kind = next((k for k in kinds if isinstance(value, dict) and k in value), "text")
        r = self.record(value, {"path", "size", "sha256"} | kinds[kind])
        content: Text | InStream | Tensors
        if kind == "text":
            content = Text(self.text(r["text"], limits.CONFIG_BYTES))
        elif kind == "stream":
            content = InStream(self.number(r["stream"]))
        else:
            header = None if r["header"] is None else self.row(r["header"], 2)
            content = Tensors(
                self.number(r["tensors"]),
                None if r["metadata"] is None else tuple(map(self.pair, self.items(r["metadata"]))),
                None if header is None else (self.number(header[0]), self.number(header[1], limits.HEADER_BYTES + 8)),
            )
            if len(dict(content.metadata or ())) != len(content.metadata or ()):
                raise self.bad("has metadata of one name twice")
            if content.metadata is not None and content.header is not None:
                raise self.bad("has both a stored header and metadata")
        return File(self.path(r["path"]), self.number(r["size"]), self.sha256(r["sha256"]), content)

    def pair(self, value: Any) -> tuple[str, str]:
        name, text = self.row(value, 2)
        return self.text(name, limits.METADATA_BYTES), self.text(text, limits.METADATA_BYTES)

    def path(self, value: Any) -> str:
        path = self.text(value, 4096)
        for part in path.split("/"):
            plain_name(part, self.where)
        return path

    def tensor(self, value: Any) -> Entry:
        name, dtype, shape, place = self.row(value, 4)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self.bad(f"has an unknown dtype {dtype!r:.40}")
        dims = tuple(self.number(n, limits.DIMENSION) for n in self.items(shape, limits.RANK))
        if math.prod(dims) * DTYPES[dtype].bits % 8:
            raise self.bad(f"has {dtype} {dims}, which is no whole number of bytes")
        if fault := safetensors.fault_of_name(self.text(name)):
            raise self.bad(f"has {fault}")
        entry = Entry(name, DTYPES[dtype], dims, self.place(place))
        self.number(entry.nbytes)
        return entry

    def place(self, value: Any) -> Place:
        match value:
            case int():
                return InStream(self.number(value))
            case ["same", tensor]:
                return Same(self.number(tensor))
            case ["recipe", recipe, name]:
                return Drawn(self.number(recipe), self.text(name))
            case ["base", name, sha256]:
                return FromBase(self.text(name), self.sha256(sha256))
            case ["parent"]:
                return FromParent()
            case ["lines", int(axis), steps, classes] if type(axis) is int and axis in (0, 1):
                # Late, here and below: few packs have lines, and these bring numpy along.
                from adapterpack.codecs.lines import STEPS

                if any(type(j) is not int or j not in STEPS for j in self.items(steps, limits.DIMENSION)):
                    raise self.bad("has a step code that is none")
                numbers = tuple(self.number(c) for c in self.items(classes, limits.DIMENSION))
                return Lines(axis, tuple(steps), numbers)
        raise self.bad(f"has a tensor in {_shown(value)}")

    def stream(self, value: Any) -> Stream:
        r = self.record(value, {"width", "steps", "frames"})
        steps = self.items(r["steps"], 8)
        width, names = self.number(r["width"], 8), tuple(self.text(s) for s in steps)
        try:
            chain = Chain(width, names)
        except InvalidFile as e:
            raise self.bad(f"has {e.message}") from e
        return Stream(chain, tuple(map(self.frame, self.items(r["frames"], limits.FRAMES))))

    def frame(self, value: Any) -> Frame:
        size, *rest = [self.number(n, limits.FRAME_BYTES) for n in self.items(value, 40)] or [0]
        if not size or len(rest) % 2:
            raise self.bad("has an empty frame, or half a segment")
        segments = tuple(zip(rest[::2], rest[1::2], strict=True))
        if any(stored > decoded for decoded, stored in segments) or sum(d for d, _ in segments) > 2 * size + 512:
            raise self.bad("has a segment that is larger than it needs to be")
        return Frame(size, segments)

    def recipe(self, value: Any) -> recipes.Recipe:
        from adapterpack import recipes

        text = json.dumps(value, separators=(",", ":"), sort_keys=True)
        try:
            recipe = recipes.from_metadata({recipes.METADATA_KEY: text})
        except AdapterpackError as e:
            raise type(e)(f"{self.where}: a recipe of its manifest: {e.message}", hint=e.hint) from e
        if recipe is None or recipe.keys or recipe.takes_torch or recipe.takes_base or recipe.to_metadata() != text:
            raise self.bad("has a recipe that is not written as it should be")
        return recipe

    def klass(self, value: Any) -> Class:
        from adapterpack.codecs.lines import MOST_LOW_BITS

        low, high_stream, low_stream = self.row(value, 3)
        return Class(self.number(low, MOST_LOW_BITS), self.number(high_stream), self.number(low_stream))

    def parent(self, value: Any) -> Parent:
        r = self.record(value, {"name", "sha256", "depth"})
        depth = self.number(r["depth"], limits.PARENTS)
        if not depth:
            raise self.bad("has a parent at no distance")
        return Parent(plain_name(r["name"], self.where), self.sha256(r["sha256"]), depth)


_KEYS = {
    *("apack", "producer", "method", "encoding", "grade", "files", "tensors", "streams", "recipes", "classes"),
    *("parent", "base", "max_error", "error", "source_bytes", "dropped"),
}


def parse(data: bytes, where: str) -> Manifest:
    """A manifest from its JSON; `account` checks what it says against itself.

    Raises:
        InvalidFile: not canonical, or nonsense in it.
        Unsupported: of another version.
    """
    if data.count(b"[") + data.count(b"{") > limits.MANIFEST_LISTS:
        raise InvalidFile(f"{where}: its manifest has more than {limits.MANIFEST_LISTS:,} lists")
    record = strict_json.parse(data, f"manifest of {where}")
    if type(record.get("apack")) is not int or record["apack"] != VERSION:
        raise Unsupported(
            f"{where} is a pack of version {record.get('apack')!r:.40}; this adapterpack reads version {VERSION}",
            hint="update adapterpack",
        )
    reader = _Reader(where)
    reader.record(record, _KEYS)
    if canonical(record) != data:
        raise reader.bad("is not written as it should be")
    return reader.manifest(record)
