"""README.md of an adapter: kept as it is, but for the front matter that a conversion made untrue."""

from __future__ import annotations

import re
from collections.abc import Mapping

from adapterpack.adapter import Adapter
from adapterpack.checkpoint import Checkpoint
from adapterpack.tensor import Memory, Source

CARD = "README.md"
_FRONT = re.compile(r"\A---\r?\n(.*?\r?\n)---\r?\n", re.DOTALL)


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
