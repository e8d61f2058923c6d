"""HTML built from values: what is no `Html` already is escaped, so that a name from a file can never be markup."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable

_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\uffff\ud800-\udfff]"
)
"""Controls, marks that turn the direction of text around, and what UTF-8 cannot hold."""
_VOID = {"meta", "wbr", "br", "hr", "input", "col"}
_NAME = 300
"""Characters of a name that are shown."""

Attribute = str | int | float | bool | None


class Html(str):
    """Markup that is safe to put into a page as it is."""

    __slots__ = ()


def text(value: object) -> Html:
    """Escaped for elements and attributes; hidden characters are spelled out."""
    said = _HIDDEN.sub(lambda m: f"\\u{ord(m[0]):04x}", str(value))
    return Html(html.escape(said, quote=True))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Markup one after the other; what is none is escaped."""
    return Html(text(between).join(p if isinstance(p, Html) else text(p) for p in parts))


def tag(element: str, *children: object, **attributes: Attribute) -> Html:
    """One element.

    Args:
        children: Markup, or text, which is escaped. None is left out.
        attributes: `class_` is `class`, `aria_label` is `aria-label`; None and False are left out, True has no value.
    """
    said = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        said += f" {name}" if value is True else f' {name}="{text(value)}"'
    if element in _VOID:
        return Html(f"<{element}{said}>")
    return Html(f"<{element}{said}>{join(c for c in children if c is not None)}</{element}>")


def code(name: str, *, breaks: bool = True) -> Html:
    """A name from a file, which may break after its dots and slashes."""
    short_name = name if len(name) <= _NAME else f"{name[:_NAME]}…"
    if not breaks:
        return tag("code", short_name)
    pieces = re.split(r"(?<=[./])", short_name)
    return tag("code", Html(tag("wbr").join(text(p) for p in pieces)))


# -- numbers for people ------------------------------------------------------------------------------------


def number(x: float | None, digits: int = 2) -> str:
    """An error, `3.1e-7`; an empty text for None."""
    if x is None:
        return ""
    if x != x:
        return "NaN"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if x == 0:
        return "0"
    if 0.01 <= abs(x) < 10_000:
        return f"{x:.{digits + 1}g}" if abs(x) < 1000 else f"{x:.0f}"
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def short(x: float) -> str:
    """A bound, `5e-6`."""
    return number(x).replace(".0e", "e")


def cosine(x: float | None) -> str:
    """`1 − 3e-9` and not 1.000000: that is where it tells anything."""
    if x is None:
        return ""
    gap = 1 - x
    return "1" if gap <= 0 else f"1 − {number(gap)}" if gap < 1e-3 else f"{x:.4f}"


def size(n: int) -> str:
    """Bytes, `8.39 MB`."""
    value, unit = float(n), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{n} B" if unit == "B" else f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def count(n: int, one: str, many: str | None = None) -> str:
    """`1 module`, `1,024 modules`."""
    return f"{n:,} {one if n == 1 else many or f'{one}s'}"
