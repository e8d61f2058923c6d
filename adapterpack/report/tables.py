"""The parts of a page that are tables: findings, modules, bytes, regenerated tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from adapterpack.accuracy import ModuleError
from adapterpack.adapter import Finding
from adapterpack.report import charts, palette, plots
from adapterpack.report.facts import ROWS, Facts
from adapterpack.report.grid import scrolling
from adapterpack.report.html import Html, code, cosine, count, join, number, size, tag
from adapterpack.report.page import Section
from adapterpack.verify import Verification

_FINDINGS = 100
"""Findings of one kind that are shown."""


# -- findings ----------------------------------------------------------------------------------------------


def findings(v: Verification) -> list[Section]:
    """What was found, one card for each kind of fault, with what to do about it."""
    if not v.findings:
        return []
    kinds: dict[tuple[bool, str], list[Finding]] = {}
    for f in v.findings:
        kinds.setdefault((f.warning, f.code), []).append(f)
    cards = [
        _card(code_, found, warning) for (warning, code_), found in sorted(kinds.items(), key=lambda kv: kv[0][0])
    ]
    faults = sum(not f.warning for f in v.findings)
    title = "Findings" if faults else "Warnings"
    return [Section("findings", title, tag("div", *cards, class_="cards"))]


def _card(code_: str, found: list[Finding], warning: bool) -> Html:
    fixes = list(dict.fromkeys(f.fix for f in found if f.fix))
    common = fixes[0] if len(fixes) == 1 else None
    entries = [
        tag(
            "li",
            code(f.key),
            tag("p", f.message),
            tag("p", tag("b", "Fix: "), f.fix, class_="fix") if f.fix and not common else None,
        )
        for f in found[:_FINDINGS]
    ]
    left = len(found) - _FINDINGS
    return tag(
        "article",
        tag(
            "h3",
            tag("span", "Warning" if warning else "Fault", class_="tag"),
            " ",
            code_,
            tag("span", f" × {len(found):,}", class_="times") if len(found) > 1 else None,
        ),
        tag("ul", *entries),
        tag("p", f"… and {left:,} more of this kind; --json has them all.") if left > 0 else None,
        tag("p", tag("b", "Fix: "), common, class_="fix") if common else None,
        class_="card warning" if warning else "card",
    )


# -- modules -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A column of the table of modules.

    Attributes:
        title: Its heading.
        shown: What a cell shows.
        value: What it is sorted by; None comes last.
        low: Do the low ones come first when it is sorted first?
    """

    title: str
    shown: Callable[[ModuleError], str]
    value: Callable[[ModuleError], float | None]
    low: bool = False


def _columns(f: Facts) -> list[_Column]:
    ranks: dict[str, dict[str, int]] = {}
    for s in f.v.spectra:
        ranks.setdefault(s.name, {})[s.side] = charts.rank_for(s.values)

    def kept(m: ModuleError) -> list[int]:
        return list(ranks.get(m.name, {}).values())

    columns = [
        _Column("relative error", lambda m: number(m.rel_error), lambda m: m.rel_error),
        _Column("allowed", lambda m: number(m.bound), lambda m: m.bound),
        _Column("rounding leaves", lambda m: number(m.floor), lambda m: m.floor),
        _Column("largest error", lambda m: number(m.max_abs_error), lambda m: m.max_abs_error),
        _Column("cosine", lambda m: cosine(m.cosine), lambda m: m.cosine, low=True),
        _Column("mean ulp", lambda m: number(m.mean_ulp), lambda m: m.mean_ulp),
        _Column("max ulp", lambda m: number(m.max_ulp), lambda m: m.max_ulp),
        _Column("norm A", lambda m: number(m.norm, 3), lambda m: m.norm),
        _Column("norm B", lambda m: number(m.norm_b, 3), lambda m: m.norm_b),
        _Column("rank", lambda m: _pair(m.rank_a, m.rank_b), lambda m: m.rank_a),
        _Column("rank for 99 %", lambda m: _pair(*kept(m)), lambda m: next(iter(kept(m)), None)),
        _Column("factor", lambda m: number(m.factor, 3), lambda m: m.factor),
        _Column("shape", lambda m: " × ".join(map(str, m.shape)), lambda m: float(math.prod(m.shape)) or None),
    ]
    shown = f.v.modules[:ROWS]
    return [c for c in columns if any(c.shown(m) for m in shown)]


def _pair(*values: int | None) -> str:
    return " / ".join(str(v) for v in dict.fromkeys(v for v in values if v is not None))


def modules(f: Facts) -> list[Section]:
    """Every module with all its figures; it can be sorted and searched."""
    if not f.v.modules:
        return []
    columns = _columns(f)
    head = [
        _heading("module", "name", None),
        *(
            _heading(c.title, "low" if c.low else "high", "descending" if c.title == "relative error" else None)
            for c in columns
        ),
    ]
    rows = [_row(f, m, columns) for m in f.v.modules[:ROWS]]
    total = len(f.v.modules)
    left = f"; the {ROWS:,} worst of {total:,} are shown, --json has them all" if total > ROWS else ""
    caption = tag("caption", f"{count(total, 'module')}, the worst first{left}")
    table = tag(
        "table", caption, tag("thead", tag("tr", *head)), tag("tbody", *rows), id="modules-table", class_="figures"
    )
    search = tag(
        "form",
        tag("label", "Search modules ", tag("input", type="search", id="modules-search", autocomplete="off")),
        tag("span", role="status", id="modules-status"),
        hidden=True,
        role="search",
        class_="search",
    )
    return [Section("modules", "All modules", join([search, scrolling(table, "All modules", tall=True)]))]


def _heading(title: str, kind: str, order: str | None) -> Html:
    return tag("th", tag("button", title, type="button"), scope="col", aria_sort=order, data_kind=kind)


def _row(f: Facts, m: ModuleError, columns: list[_Column]) -> Html:
    bad = f.beyond(m)
    level = palette.level(m.rel_error, f.bound(m))
    if bad and isinstance(level, int):
        level = max(level, palette.WITHIN)
    mark = tag("span", tag("i", class_=f"swatch e{level}"), class_="level")
    beyond = (
        tag("span", "▲ ", tag("span", "beyond what is allowed: ", class_="unseen"), class_="beyond") if bad else None
    )
    cells = []
    for c in columns:
        first = c.title == "relative error"
        cells.append(tag("td", mark if first else None, c.shown(m), data_v=_sortable(c.value(m))))
    return tag(
        "tr", tag("th", beyond, code(m.name, breaks=False), scope="row", data_v=m.name), *cells, id=f.row[m.name]
    )


def _sortable(x: float | None) -> str:
    """NaN is worse than all."""
    if x is None:
        return ""
    return "Infinity" if x != x or x == math.inf else f"{x:.17g}"


# -- bytes -------------------------------------------------------------------------------------------------


def sizes(f: Facts) -> list[Section]:
    """Bytes by part, A before, B after."""
    sides = f.v.sides
    if not sides:
        return []
    names = list(dict.fromkeys(name for s in sides for name in s.parts))
    most = max((n for s in sides for n in s.parts.values()), default=1) or 1
    rows = []
    for name in names:
        cells = [tag("th", name, scope="row")]
        for s in sides:
            n = s.parts.get(name)
            text = size(n) if n is not None else "–"
            cells.append(tag("td", tag("span", text), plots.bar((n or 0) / most, f"side-{s.side.lower()}")))
        rows.append(tag("tr", *cells))
    foot = [
        tag(
            "tr",
            tag("th", "all files" if not f.merged else "together", scope="row"),
            *(tag("td", _total(s.bytes)) for s in sides),
        ),
        tag("tr", tag("th", "tensors", scope="row"), *(tag("td", _tensors(s.tensors, s.dtypes)) for s in sides)),
    ]
    head = tag("tr", tag("th", "part", scope="col"), *(tag("th", s.side, scope="col") for s in sides))
    table = tag(
        "table",
        tag("caption", "Bytes by part"),
        tag("thead", head),
        tag("tbody", *rows),
        tag("tfoot", *foot),
        class_="sizes",
    )
    return [Section("sizes", "Size", scrolling(table, "Bytes by part"), _smaller(f))]


def _smaller(f: Facts) -> str | None:
    if f.merged or len(f.v.sides) < 2 or not all(s.bytes for s in f.v.sides):
        return None
    a, b = (s.bytes for s in f.v.sides)
    if a == b:
        return "Both are of the same size."
    times = max(a, b) / min(a, b)
    if times < 1.05:
        return f"B takes {abs(a - b):,} bytes {'less' if b < a else 'more'} than A."
    return f"{'A' if b < a else 'B'} is {times:,.1f} times as large as {'B' if b < a else 'A'}."


def _total(n: int) -> Html:
    return tag("span", size(n), " ", tag("small", f"{n:,} B") if n >= 1000 else None)


def _tensors(n: int, dtypes: dict[str, int]) -> str:
    return (
        f"{n:,}: {', '.join(f'{m:,} {d}' for d, m in dtypes.items())}"
        if len(dtypes) != 1
        else f"{n:,} {next(iter(dtypes))}"
    )


# -- regenerated tensors -----------------------------------------------------------------------------------


def regenerated(v: Verification) -> list[Section]:
    """Seeded tensors that were drawn again."""
    if not v.regenerated:
        return []
    titles = ("side", "tensor", "drawn by", "seed", "arithmetic", "through", "against", "same bits", "SHA-256")
    rows = [
        tag(
            "tr",
            tag("td", r.side),
            tag("th", code(r.name), scope="row"),
            *(tag("td", "–" if x is None else x) for x in (r.by, r.seed, r.arithmetic, r.through, r.against)),
            tag("td", "yes" if r.agrees else "▲ no"),
            tag("td", tag("code", r.sha256[:16], "…", title=r.sha256) if r.sha256 else "–"),
        )
        for r in v.regenerated[:ROWS]
    ]
    head = tag("tr", *(tag("th", t, scope="col") for t in titles))
    caption = tag("caption", "Seeded tensors, drawn again and compared")
    table = tag("table", caption, tag("thead", head), tag("tbody", *rows), class_="plain")
    return [Section("regenerated", "Regenerated tensors", scrolling(table, "Regenerated tensors"))]
