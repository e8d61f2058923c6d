"""README.md of an adapter: what the user wrote is kept byte for byte, and what became untrue of it is mended.

Front matter is edited line by line and not written anew: a YAML writer would lose comments, quotes and layout.
A YAML parser reads it before and after: if the edit did not do exactly what it should, the writer is used after all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterpack.errors import InvalidFile
from adapterpack.tensor import Memory, Source

if TYPE_CHECKING:
    from adapterpack.adapter import Adapter
    from adapterpack.checkpoint import Checkpoint

CARD = "README.md"
_FRONT = re.compile(r"\A(?:\ufeff)?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_TOP_KEY = re.compile(r"""(?:"(?P<a>[^"]*)"|'(?P<b>[^']*)'|(?P<c>[^\s#:\-][^:#]*?))[ \t]*:(?=\s|$)""")
_BEGIN, _END = "<!-- adapterpack: this part is written by `adapterpack push` -->", "<!-- /adapterpack -->"
_FRONT_CHARS = 64 << 10


def mended(files: Mapping[str, Source], before: Checkpoint, after: Adapter) -> dict[str, Source]:
    """The carried files with a card whose method tag is the new method's.

    Only the tag line is touched, and only in the front matter; a card that is no UTF-8 stays as it is.
    """
    result = dict(files)
    old, new = before.peft_type.lower(), after.method
    if CARD not in files or old == new:
        return result
    source = files[CARD]
    try:
        text = source.read(0, source.nbytes).decode()
    except UnicodeDecodeError:
        return result
    front = _FRONT.match(text)
    if front is None:
        return result
    tags = re.sub(rf"^(\s*-\s*){re.escape(old)}(\s*)$", rf"\g<1>{new}\g<2>", front[1], flags=re.M | re.I)
    result[CARD] = Memory((text[: front.start(1)] + tags + text[front.end(1) :]).encode())
    return result


def fields(text: str) -> dict[str, Any]:
    """The front matter; empty if there is none.

    Raises:
        InvalidFile: it is no YAML mapping, or one that would take long to look at.
    """
    front = _FRONT.match(text)
    return {} if front is None else _parse(front[1])


def with_fields(text: str, changes: Mapping[str, Any]) -> str:
    """The card with other values of some fields, and all else as it is.

    Raises:
        InvalidFile: as `fields`.
    """
    old = fields(text)
    changes = {key: value for key, value in changes.items() if not (key in old and _is(old[key], value))}
    if not changes:
        return text
    front = _FRONT.match(text)
    line_end = "\r\n" if "\r\n" in text.partition("\n")[0] + "\n" else "\n"
    if front is None:
        between = line_end if text else ""
        return f"---{line_end}{_dump(changes, line_end)}---{line_end}{between}{text}"
    edited = _edited(front[1], changes, line_end)
    wanted = {**old, **changes}
    try:
        same = _parse(edited) == wanted
    except InvalidFile:
        same = False
    if not same:
        edited = _dump(wanted, line_end)
    return text[: front.start(1)] + edited + text[front.end(1) :]


def with_section(text: str, section: str) -> str:
    """The card with our part in place of the one that an earlier push wrote, else at its end."""
    part = f"{_BEGIN}\n{section.strip()}\n{_END}"
    begin, end = text.find(_BEGIN), text.find(_END)
    if 0 <= begin < end:
        return text[:begin] + part + text[end + len(_END) :]
    return f"{text.rstrip()}\n\n{part}\n"


def section(text: str) -> str:
    """Our part of the card; empty if there is none."""
    begin, end = text.find(_BEGIN), text.find(_END)
    return text[begin + len(_BEGIN) : end].strip() if 0 <= begin < end else ""


def _is(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _parse(block: str) -> dict[str, Any]:
    import yaml

    if len(block) > _FRONT_CHARS:
        raise InvalidFile(f"the front matter of {CARD} has {len(block):,} characters; {_FRONT_CHARS:,} are read")

    class Plain(yaml.SafeLoader):  # type: ignore[misc]
        """Without aliases, by which a short text becomes a thing that takes for ever to look at."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias stands in it")
            return super().compose_node(parent, index)

    try:
        found = yaml.load(block, Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InvalidFile(f"the front matter of {CARD} is no YAML: {reason}", hint="mend it, or remove it") from e
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InvalidFile(f"the front matter of {CARD} is no mapping", hint="mend it, or remove it")
    return found


def _dump(values: Mapping[str, Any], line_end: str) -> str:
    import yaml

    text = str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000))
    if yaml.safe_load(text) != dict(values):
        # The writer leaves some line ends of Unicode as they are, and reads them back as spaces.
        text = str(yaml.safe_dump(dict(values), sort_keys=False, width=1000))
    return text.replace("\n", line_end)


def _edited(block: str, changes: Mapping[str, Any], line_end: str) -> str:
    """The front matter with the lines of some top-level keys replaced, and new keys at the end."""
    lines = block.splitlines(keepends=True)
    starts = [(n, _key(line)) for n, line in enumerate(lines) if _key(line) is not None]
    left = dict(changes)
    result = lines[: starts[0][0]] if starts else lines
    ends = [*(n for n, _ in starts[1:]), len(lines)]
    for (start, key), stop in zip(starts, ends[: len(starts)], strict=True):
        if key not in left:
            result += lines[start:stop]
            continue
        last = max(n for n in range(start, stop) if lines[n].strip() and not lines[n].lstrip().startswith("#"))
        result += [_dump({key: left.pop(key)}, line_end), *lines[last + 1 : stop]]
    return "".join(result) + (_dump(left, line_end) if left else "")


def _key(line: str) -> str | None:
    found = _TOP_KEY.match(line)
    return None if found is None else next(g for g in found.groups() if g is not None)
