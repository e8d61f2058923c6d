"""JSON as we accept it: no duplicate keys, no NaN, bounded depth, real text.

Python's own parser keeps the last of two equal keys, reads `NaN`, and recurses until the stack ends.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from adapterpack import limits
from adapterpack.errors import InvalidFile
from adapterpack.io.files import read_small


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r:.100} stands twice in one object")
            seen.add(key)
    return found


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        # 1e999 is good JSON, but what would be written again is not.
        raise ValueError(f"{digits:.40} is too large a number")
    return number


def _natural(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"{digits} is negative")
    return int(digits)


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _check_depth(value: Any) -> None:
    """Bounded depth, found level by level: recursion would end with the stack, and millions of steps take long."""
    level = [value]
    for _ in range(limits.JSON_DEPTH):
        children = (v.values() if type(v) is dict else v for v in level)
        level = [child for values in children for child in values if type(child) is dict or type(child) is list]
        if not level:
            return
    raise ValueError(f"nested deeper than {limits.JSON_DEPTH}")


def _check_text(text: str, value: Any) -> None:
    """Text that can be written again: half of a surrogate pair can only come in as an escape."""
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")


def parse(data: bytes, where: str, *, natural: bool = False) -> dict[str, Any]:
    """A JSON object.

    Args:
        data: UTF-8 text, already bounded in size by the caller.
        where: What the bytes are, for the error.
        natural: Refuse negative integers, `-0` too, as safetensors headers want it.

    Raises:
        InvalidFile: not UTF-8, not JSON, not an object, a duplicate key, NaN, Infinity or a number as
            large, a lone surrogate, or nested deeper than `limits.JSON_DEPTH`.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_natural if natural else None,
        )
        if not isinstance(value, dict):
            raise ValueError(f"a JSON object is wanted, not {type(value).__name__}")
        _check_depth(value)
        _check_text(text, value)
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
