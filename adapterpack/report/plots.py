"""Inline SVG: how errors are spread, singular values, bytes. Shapes carry classes; colours are the style sheet's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapterpack.report import palette
from adapterpack.report.html import Html, count, join, number, short, tag

_POINTS = 64
"""Of a curve: more are thinned out."""
_WIDTHS = (1060, 660, 330)
"""Pixels of a picture whose text would be too small if it shrank with the page: the style sheet shows one of them."""
_HALVES = 40
"""Half powers of ten that a picture spans at most; what is less is counted with the least."""
_DEPTH = 1e-6
"""Of the largest singular value of all: what is less is drawn at the bottom."""


# -- how errors are spread ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """Half powers of ten, from `first` to `last`, a bar each; apart before them one for 0, if there are any."""

    first: int
    last: int
    zero: bool
    left: float
    width: float

    @property
    def one(self) -> float:
        """The width of a bar and its gap."""
        return self.width / (self.last - self.first + 1 + (1.75 if self.zero else 0))

    def x(self, halves: float | None) -> float:
        """Where a half power of ten lies, and where the bar of zeros begins."""
        if halves is None:
            return self.left
        return self.left + (halves - self.first + (1.75 if self.zero else 0)) * self.one


def spread(errors: Sequence[tuple[float, float | None]], bound: float | None, label: str) -> Html:
    """How many modules have which error, as bars over half powers of ten; drawn for wide, middling and narrow pages.

    Args:
        errors: Relative error and what is allowed, module by module. NaN and infinity are beyond all.
        bound: The bound that all have in common, drawn as a line; None: they have none.
    """
    bins: Counter[int | None] = Counter()
    colours: dict[int | None, Counter[int | str]] = {}
    finite = [e for e, _ in errors if math.isfinite(e) and e > 0]
    marks = [*finite, *([bound] if bound else [])]
    first = min((_half(v) for v in marks), default=-14)
    last = max((_half(v) for v in marks), default=-6)
    first = max(first, last - _HALVES)
    if last - first < 9:
        first, last = first - (9 - last + first) // 2, last + (10 - last + first) // 2
    if len(finite) < len([e for e, _ in errors if e != 0]):
        last += 1
    for error, allowed in errors:
        place = None if error == 0 else min(last, max(first, _half(error) if math.isfinite(error) else last))
        bins[place] += 1
        colours.setdefault(place, Counter())[palette.level(error, allowed)] += 1
    levels = {place: found.most_common(1)[0][0] for place, found in colours.items()}
    return join(_bars(bins, levels, first, last, bound, width, label) for width in _WIDTHS)


def _half(x: float) -> int:
    return math.floor(math.log10(x) * 2 + 1e-9)


def _bars(
    bins: Mapping[int | None, int],
    levels: Mapping[int | None, int | str],
    first: int,
    last: int,
    bound: float | None,
    width: int,
    label: str,
) -> Html:
    top, floor = 30, 150
    scale = _Scale(first, last, None in bins, 8, width - 16)
    most = max(bins.values(), default=1)
    one = scale.one
    shapes: list[Html] = [tag("line", x1=8, x2=width - 8, y1=floor, y2=floor, class_="axis")]
    for place, n in sorted(bins.items(), key=lambda kv: (kv[0] is not None, kv[0] or 0)):
        x = scale.x(place)
        height = max(3.0, (floor - top - 16) * n / most)
        said = f"{count(n, 'module')}: {_range(place, first, last)}"
        shapes.append(
            tag(
                "rect",
                tag("title", said),
                x=_xy(x + 1.5),
                y=_xy(floor - height),
                width=_xy(one - 3),
                height=_xy(height),
                rx=2,
                class_=f"bar e{levels[place]}",
            )
        )
        middle = _xy(x + one / 2)
        shapes.append(tag("text", f"{n:,}", x=middle, y=_xy(floor - height - 5), class_="count"))
    if None in bins:
        shapes.append(tag("text", "0", x=_xy(scale.x(None) + one / 2), y=floor + 17, class_="tick"))
    step = 2 if (last - first) * 24 < width else 4 if (last - first) * 12 < width else 8
    for half in range(first + first % 2, last + 2, step):
        x = scale.x(half)
        shapes.append(tag("line", x1=_xy(x), x2=_xy(x), y1=floor, y2=floor + 4, class_="axis"))
        if 16 < x < width - 16:
            shapes.append(tag("text", f"1e{half // 2}", x=_xy(x), y=floor + 17, class_="tick"))
    if bound:
        x = scale.x(math.log10(bound) * 2)
        near_end = x > width * 0.75
        shapes.append(tag("line", x1=_xy(x), x2=_xy(x), y1=top - 14, y2=floor, class_="bound"))
        shapes.append(
            tag(
                "text",
                f"allowed {short(bound)}",
                x=_xy(x - 6 if near_end else x + 6),
                y=top - 6,
                class_="bound end" if near_end else "bound",
            )
        )
    box = f"0 0 {width} {floor + 24}"
    return tag("svg", *shapes, role="img", aria_label=label, viewBox=box, width=width, class_=f"w{width}")


def _range(place: int | None, first: int, last: int) -> str:
    if place is None:
        return "no error at all"
    low, high = number(10 ** (place / 2)), number(10 ** ((place + 1) / 2))
    if place == first:
        return f"up to {high}"
    return f"from {low}" if place == last else f"from {low} to {high}"


def _xy(x: float) -> str:
    """A coordinate, short and without a needless `.0`."""
    return f"{x:.1f}".removesuffix(".0")


# -- singular values ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decades:
    """The scale that all curves share: the largest singular value at the top, `low` at the bottom."""

    high: float
    low: float

    @classmethod
    def of(cls, curves: Sequence[Sequence[float]]) -> Decades:
        high = max((v for c in curves for v in c if math.isfinite(v)), default=1.0) or 1.0
        low = min((v for c in curves for v in c if v >= high * _DEPTH), default=high)
        # Half of the least and less than a tenth of the largest: a flat curve is no line along the bottom.
        return cls(high, min(low / 2, high / 10))

    def y(self, value: float, height: float) -> float:
        if value <= self.low:
            return height
        span = max(1e-9, math.log10(self.high / self.low))
        return height * math.log10(self.high / value) / span


def curve(a: Sequence[float] | None, b: Sequence[float] | None, decades: Decades, label: str) -> Html:
    """Singular values of one module by their number: A's as an area, B's as a line on it."""
    width, height = 100, 30
    longest = max(len(a or ()), len(b or ()))
    shapes = []
    if a:
        line = _points(a, longest, decades, width, height)
        end = line.rpartition(" ")[2].partition(",")[0]
        shapes.append(tag("polygon", points=f"0,{height} {line} {end},{height}", class_="area"))
    if b:
        shapes.append(tag("polyline", points=_points(b, longest, decades, width, height), class_="side-b"))
    return tag(
        "svg",
        tag("title", label),
        *shapes,
        role="img",
        aria_label=label,
        viewBox=f"0 0 {width} {height}",
        preserveAspectRatio="none",
        class_="curve",
    )


def _points(values: Sequence[float], longest: int, decades: Decades, width: int, height: int) -> str:
    if len(values) == 1:
        values = [*values, *values]
    step = max(1, longest // _POINTS)
    kept = sorted({*range(0, len(values), step), len(values) - 1})
    last = max(1, longest - 1)
    # A pixel is kept free at the top and at the bottom, for the stroke.
    return " ".join(f"{_xy(width * n / last)},{_xy(1 + decades.y(values[n], height - 2))}" for n in kept)


# -- bytes -------------------------------------------------------------------------------------------------


def bar(share: float, class_: str) -> Html:
    """A bar as long as its share of the room that the table gives it; said in figures beside it."""
    percent = max(0.0, min(1.0, share)) * 100
    rect = tag("rect", width=f"{percent:.2f}%", height="100%", rx=2)
    return tag("svg", rect, class_=f"bytes {class_}", aria_hidden="true", width="100%", height=10)


def legend() -> Html:
    """What the colours of errors mean, from 0 over the bound to far beyond."""
    within = [tag("i", class_=f"swatch e{n}") for n in range(palette.WITHIN)]
    beyond = [tag("i", class_=f"swatch e{palette.WITHIN + n}") for n in range(3)]
    far = f"{round(10 ** (palette.STEP * (palette.WITHIN - 1)), -3):,.0f}"
    return tag(
        "div",
        tag("span", tag("i", "0", class_="swatch ezero"), " no error"),
        tag(
            "span",
            f"over {far}× below ",
            tag("span", *within, class_="ramp"),
            " at the bound",
        ),
        tag("span", "beyond it ", tag("span", *beyond, class_="ramp"), " over 100×"),
        class_="legend",
    )
