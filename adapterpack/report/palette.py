"""Colours of errors: blue up to the bound, the deeper the nearer; orange beyond it. Told apart without red and green.

Each level has its own colour in light and dark, and black or white upon it, whichever reads better (WCAG 2.2: a
contrast of 4.5 at least, which one of both always has).
"""

from __future__ import annotations

import math

WITHIN, STEP = 10, 0.5
"""Levels up to the bound, each half a power of ten."""
LIGHT = (
    *("#f1f6fb", "#e3eef8", "#d2e4f3", "#bdd8ee", "#a3c9e6", "#84b6dc", "#629fce", "#4287bd", "#2a6da6", "#17548a"),
    *("#f9b56c", "#e8741e", "#a83a00"),
)
DARK = (
    *("#161e29", "#182533", "#1a2d40", "#1d374f", "#214361", "#265175", "#2d628c", "#3876a6", "#4b8dc0", "#68a7d9"),
    *("#8a4208", "#d56a12", "#ffab5e"),
)
NONE, ZERO = "none", "zero"


def level(error: float, bound: float | None) -> int | str:
    """Which colour an error has.

    Args:
        error: Relative; NaN is beyond every bound.
        bound: What is allowed; None or infinite: it is not known, and 1 stands in for it.
    """
    if error == 0:
        return ZERO
    allowed = 1.0 if bound is None or not math.isfinite(bound) else bound
    if error != error or math.isinf(error) or allowed <= 0:
        return WITHIN + 2
    far = math.log10(error) - math.log10(allowed)
    if error <= allowed:
        return max(0, min(WITHIN - 1, WITHIN - 1 + math.ceil(far / STEP)))
    return WITHIN + min(2, int(far))


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """Between 1 and 21 (WCAG 2.2)."""
    x, y = sorted((luminance(a), luminance(b)))
    return (y + 0.05) / (x + 0.05)


def ink(colour: str) -> str:
    """Black or white, whichever reads better on it."""
    return max(("#10151b", "#ffffff"), key=lambda c: contrast(c, colour))


def css() -> str:
    """Rules for `.e0` and its like: `--cell` and `--ink`."""

    def rules(colours: tuple[str, ...]) -> str:
        return "".join(f".e{n}{{--cell:{c};--ink:{ink(c)}}}" for n, c in enumerate(colours))

    return f"{rules(LIGHT)}\n@media screen and (prefers-color-scheme:dark){{{rules(DARK)}}}\n"
