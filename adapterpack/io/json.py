"""JSON as we accept it: no duplicate keys, no NaN, bounded depth, real text.

Python's own parser keeps the last of two equal keys, reads `NaN`, and recurses until the stack ends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapterpack import limits
from adapterpack.errors import InvalidFile
from adapterpack.io.files import read_small


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in one object")
        found[key] = value
    return found


def _natural(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"{digits} is negative")
    return int(digits)


def _check(value: Any) -> None:
    """Bounded depth and text that can be written again, found without recursion."""
    todo = [(value, 1)]
    while todo:
        value, depth = todo.pop()
        if isinstance(value, str):
            value.encode("utf-8")
        elif isinstance(value, dict | list):
            if depth > limits.JSON_DEPTH:
                raise ValueError(f"nested deeper than {limits.JSON_DEPTH}")
            if isinstance(value, dict):
                todo += [(key, depth) for key in value]
                value = value.values()
            todo += [(child, depth + 1) for child in value]


def parse(data: bytes, where: str, *, natural: bool = False) -> dict[str, Any]:
    """A JSON object.

    Args:
        data: UTF-8 text, already bounded in size by the caller.
        where: What the bytes are, for the error.
        natural: Refuse negative integers, `-0` too, as safetensors headers want it.

    Raises:
        InvalidFile: not UTF-8, not JSON, not an object, a duplicate key, NaN or Infinity, a lone
            surrogate, or nested deeper than `limits.JSON_DEPTH`.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_natural if natural else None,
        )
        if not isinstance(value, dict):
            raise ValueError(f"a JSON object is wanted, not {type(value).__name__}")
        _check(value)
    except (ValueError, RecursionError) as e:
        raise InvalidFile(f"{where}: {e}") from e
    return value


def read(path: Path, limit: int = limits.CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file; see `parse`."""
    return parse(read_small(path, limit), str(path))


def dump(value: Any) -> bytes:
    """JSON in the layout that PEFT and transformers write, keys in the order given.

    The order is kept because it means something: of two overlapping `alpha_pattern`s the first one wins.
    """
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
