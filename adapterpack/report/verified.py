"""The page of a comparison: the verdict, then what leads to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adapterpack.report import charts, plots, tables
from adapterpack.report.facts import Facts
from adapterpack.report.html import Html, code, cosine, count, join, number, short, tag
from adapterpack.report.page import Section
from adapterpack.report.page import page as whole
from adapterpack.verify import Verification

_TICK = "M4 12.5l5 5L20 6.5"
_CROSS = "M6 6l12 12M18 6L6 18"


def page(v: Verification, *, when: str | None = None) -> str:
    """The whole file; see `report.render`."""
    facts = Facts(v)
    sections = [
        Section("compared", "What was compared", _compared(v)),
        *tables.findings(v),
        *charts.heatmap(facts),
        *tables.modules(facts),
        *tables.sizes(facts),
        *charts.spectra(facts),
        *tables.regenerated(v),
        *_notes(v),
    ]
    return whole(f"{'Equal' if v.equal else 'Different'}: adapterpack verify", _verdict(facts), sections, when=when)


# -- the verdict -------------------------------------------------------------------------------------------


def _verdict(f: Facts) -> Html:
    v = f.v
    if f.merged:
        title = (
            "The merged model is the base with A in it"
            if v.equal
            else "The merged model is not the base with A in it"
        )
    else:
        title = "A and B make the same change of W" if v.equal else "A and B do not make the same change of W"
    mark = tag(
        "svg",
        tag("path", d=_TICK if v.equal else _CROSS),
        viewBox="0 0 24 24",
        width=28,
        height=28,
        aria_hidden="true",
        class_="mark",
    )
    said = tag("p", mark, tag("strong", "Equal" if v.equal else "Different"), class_="badge")
    words = [tag("p", sentence) for sentence in _sentences(f)]
    errors = [(m.rel_error, f.bound(m)) for m in v.modules]
    picture = None
    if errors:
        caption = tag("figcaption", "Modules by their relative error")
        label = f"How many modules have which relative error. {_in_words(f)}"
        picture = tag("figure", caption, plots.spread(errors, f.common, label))
    inner = [said, tag("h1", title), tag("div", *words, class_="words"), _tiles(f), picture]
    return tag("div", *inner, class_=f"verdict {'equal' if v.equal else 'different'}")


def _in_words(f: Facts) -> str:
    errors = [m.rel_error for m in f.v.modules]
    zero = sum(e == 0 for e in errors)
    beyond = sum(map(f.beyond, f.v.modules))
    return f"{len(errors)} in all, {zero} without any error, {beyond} with a fault."


def _sentences(f: Facts) -> list[Html]:
    v = f.v
    said: list[Html] = []
    beyond = sum(map(f.beyond, v.modules))
    alone = len(f.missing)
    every = count(len(v.modules), "tensor" if f.merged else "module")
    if not v.modules:
        said.append(join(["Nothing could be compared."]))
    elif not f.merged:
        over = sum(not m.rel_error <= v.max_error for m in v.modules)
        if over:
            start = f"{over:,} of {every} {'lies' if over == 1 else 'lie'} beyond the allowed error of "
        else:
            start = f"{every}: {'it' if len(v.modules) == 1 else 'each'} lies within the allowed error of "
        said.append(join([start, tag("b", short(v.max_error)), _distance(v), "."]))
    elif beyond:
        has = "has" if beyond == 1 else "have"
        said.append(join([f"{beyond:,} of {every} {has} a fault that rounding does not explain."]))
    else:
        said.append(join([f"{every}: what differs is the rounding of the dtype, and nothing beyond it."]))
    worst = next(filter(f.beyond, v.modules), v.modules[0] if v.modules else None)
    if worst is not None and worst.rel_error != 0:
        said.append(
            join(["The worst is ", _linked(f, worst.name), f", off by {_share(worst.rel_error)} of its change."])
        )
    if alone:
        said.append(join([f"{count(alone, 'more tensor')} could not be compared at all: the findings say why."]))
    faults = sum(not x.warning for x in v.findings)
    if faults:
        codes = list(dict.fromkeys(x.code for x in v.findings if not x.warning))
        more = ", …" if len(codes) > 3 else ""
        said.append(join([tag("a", count(faults, "finding"), href="#findings"), f": {', '.join(codes[:3])}{more}."]))
    return said


def _distance(v: Verification) -> str:
    """How far the worst is from the bound, in words."""
    if not (v.max_error > 0 and math.isfinite(v.max_rel_error)):
        return ""
    if v.max_rel_error == 0:
        return ", without any difference"
    times = v.max_rel_error / v.max_error
    if times > 1:
        return f", the worst {_times(times)} the bound"
    return f", the worst {_times(1 / times)} below it" if times <= 0.5 else ", the worst close to it"


def _share(x: float) -> str:
    return f"{100 * x:.3g}\u00a0%" if 0.01 <= x < 100 else number(x)


def _times(x: float) -> str:
    return f"{x:.1f} times" if x < 10 else f"{x:,.0f} times" if x < 1e6 else f"{number(x)} times"


def _linked(f: Facts, name: str) -> Html:
    return tag("a", code(name), href=f"#{f.row[name]}") if name in f.row else code(name)


def _tiles(f: Facts) -> Html:
    v, p = f.v, f.v.pooled
    allowed = f"allowed {short(f.common)}" if f.common is not None else "of one tensor"
    tiles: list[tuple[str, str, str] | None] = [
        ("Worst relative error", number(v.max_rel_error), allowed),
        ("Pooled relative error", number(p.rel_error), f"{count(p.modules, 'module')} as one") if p.modules else None,
        ("Largest error of a weight", number(v.max_abs_error), "absolute"),
        ("Cosine", cosine(p.cosine), "of both changes, pooled") if p.cosine is not None else None,
        ("Units in the last place", number(p.mean_ulp), f"mean; at most {number(p.max_ulp)}")
        if p.mean_ulp is not None
        else None,
        ("Weights compared", _many(p.elements), f"in {count(p.modules, 'module')}") if p.elements else None,
    ]
    return tag(
        "dl",
        *(
            tag("div", tag("dt", name), tag("dd", tag("b", figure), tag("span", note)))
            for name, figure, note in filter(None, tiles)
        ),
        class_="tiles",
    )


def _many(n: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if n >= unit:
            return f"{n / unit:.3g} {name}"
    return f"{n:,}"


# -- what was compared, notes ------------------------------------------------------------------------------


def _compared(v: Verification) -> Html:
    sides: list[Sequence[object] | None] = [
        ("A, the reference", code(v.a), _form(v.method_a, v.encoding_a)),
        ("B, a merged model" if v.method_b is None else "B", code(v.b), _form(v.method_b, v.encoding_b)),
        ("Base", code(v.base), "") if v.base is not None else ("Base", "none was given", ""),
        ("Device", v.device, ""),
    ]
    rows = [
        tag("div", tag("dt", name), tag("dd", what, tag("span", form, class_="form") if form else None))
        for name, what, form in filter(None, sides)
    ]
    return tag("dl", *rows, class_="compared")


def _form(method: str | None, encoding: str | None) -> str:
    if method is None:
        return ""
    return f"{method}, {encoding}" if encoding and encoding != method else method


def _notes(v: Verification) -> list[Section]:
    if not v.notes:
        return []
    return [Section("notes", "Notes", tag("ul", *(tag("li", n) for n in v.notes), class_="notes"))]
