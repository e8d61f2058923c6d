"""What models are asked: prompts from a file, one a line, as text or as token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapterpack import limits
from adapterpack.errors import InvalidFile
from adapterpack.io import json as strict_json
from adapterpack.io.files import read_small

LINES_OF_JSON = (".jsonl", ".ndjson")
"""Files whose lines are objects; the lines of any other are texts, whatever they look like."""
_HINT = 'a line of JSON is {"text": "..."} or {"input_ids": [1, 2]}'


@dataclass(frozen=True)
class Prompt:
    """One line.

    Attributes:
        line: Its number in the file, from 1.
        text: None where the file gives the ids.
        ids: Its tokens; empty until a tokenizer has made them.
    """

    line: int
    text: str | None
    ids: tuple[int, ...] = ()


def read(path: str | Path) -> list[Prompt]:
    """The prompts of a file, in order; lines without a character but spaces are none.

    Args:
        path: UTF-8 text; of a name in `LINES_OF_JSON` each line is an object with `text` or `input_ids`.

    Raises:
        InvalidFile: it cannot be read, is too large, not UTF-8, has no prompt, or a line that is none.
    """
    place = Path(path).expanduser()
    try:
        text = read_small(place, limits.PROMPTS_BYTES).decode("utf-8")
    except UnicodeDecodeError as e:
        raise InvalidFile(f"{place} is not UTF-8: byte {e.start}", hint="one prompt a line, as UTF-8") from e
    # Not `splitlines`, which parts at characters that may stand inside a prompt.
    lines = [(n, line.removesuffix("\r")) for n, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1)]
    as_json = place.suffix.lower() in LINES_OF_JSON
    found = [_parsed(line, n, place) if as_json else Prompt(n, line) for n, line in lines if line.strip()]
    if not found:
        raise InvalidFile(f"{place} has no prompt", hint="one prompt a line")
    if len(found) > limits.PROMPTS:
        raise InvalidFile(f"{place} has {len(found):,} prompts; at most {limits.PROMPTS:,} are run")
    return found


def _parsed(line: str, n: int, place: Path) -> Prompt:
    where = f"{place}, line {n}"
    record = strict_json.parse(line.encode(), where)
    text, ids = record.get("text"), record.get("input_ids")
    if isinstance(text, str) and text and ids is None:
        return Prompt(n, text)
    if text is not None or not isinstance(ids, list) or not ids:
        raise InvalidFile(f"{where}: either text or input_ids is wanted, and not empty", hint=_HINT)
    if any(type(i) is not int or i < 0 for i in ids):
        raise InvalidFile(f"{where}: input_ids are whole numbers of 0 or more", hint=_HINT)
    return Prompt(n, None, tuple(ids))


def encode(
    prompts: Sequence[Prompt], tokenizer: Callable[[], Callable[[str], list[int]]], vocabulary: int, longest: int
) -> list[Prompt]:
    """Prompts with their ids.

    Args:
        tokenizer: Finds what makes ids of a text; asked only if there is a text.
        vocabulary: How many ids the model knows.
        longest: The most tokens that it takes.

    Raises:
        InvalidFile: a prompt is too long, has no token, or one that the model does not know.
    """
    ids_of = tokenizer() if any(p.text is not None for p in prompts) else None
    made = []
    for p in prompts:
        ids = p.ids if ids_of is None or p.text is None else tuple(ids_of(p.text))
        if not 0 < len(ids) <= longest:
            raise InvalidFile(f"the prompt in line {p.line} has {len(ids):,} tokens; 1 to {longest:,} can be run")
        if max(ids) >= vocabulary:
            raise InvalidFile(f"the prompt in line {p.line} has the token {max(ids)}; the model has {vocabulary}")
        made.append(replace(p, ids=ids))
    return made
