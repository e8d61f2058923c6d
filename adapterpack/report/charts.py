"""The two pictures that lie as the model does, layer by layer: errors as a heatmap, and singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adapterpack.accuracy import ModuleError
from adapterpack.report import grid, palette, plots
from adapterpack.report.facts import Facts
from adapterpack.report.html import Html, code, cosine, join, number, short, tag
from adapterpack.report.page import Section

_OTHERS = 60
"""Modules without layers that are shown."""


# -- errors ------------------------------------------------------------------------------------------------


def heatmap(f: Facts) -> list[Section]:
    """Relative errors by layer and kind of module, coloured against the bound."""
    names = [*f.by_name, *f.missing]
    if not names:
        return []
    stacks, others = grid.grids(names)

    def cell(found: Sequence[str]) -> Html:
        return _cell(f, found)

    parts: list[Html] = [plots.legend()]
    for stack in stacks:
        parts.append(tag("h3", grid.named(stack.stack)) if len(stacks) > 1 or others else Html())
        caption = join(["Relative error of each module of ", code(stack.stack or "the model"), ", layer by layer"])
        parts.append(grid.table(stack, cell, caption=caption, class_="heat"))
    if others:
        # The worst first; what has no figure at all before them.
        def badness(name: str) -> float:
            m = f.by_name.get(name)
            return -math.inf if m is None or m.rel_error != m.rel_error else -m.rel_error

        shown = sorted(others, key=badness)[:_OTHERS]
        rows = [tag("tr", tag("th", code(name), scope="row"), cell([name])) for name in shown]
        more = f", the worst {_OTHERS} of {len(others):,}" if len(others) > _OTHERS else ""
        head = tag("tr", tag("th", "module", scope="col"), tag("th", "error", scope="col"))
        caption = Html(f"Relative error of modules outside of layers{more}")
        whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *rows), class_="heat others")
        parts.append(tag("h3", "Other modules") if stacks else Html())
        parts.append(grid.scrolling(whole, "Other modules"))
    against = "what honest rounding of its dtype may leave" if f.merged else f"the bound of {short(f.v.max_error)}"
    lead = f"Relative error of each module against {against}. ▲ marks what lies beyond it or has a fault."
    return [Section("heatmap", "Error by layer", join(parts), lead)]


def _cell(f: Facts, names: Sequence[str]) -> Html:
    """The worst of a cell's modules."""
    if not names:
        return tag("td", tag("span", "none", class_="unseen"), class_="enone")
    alone = [n for n in names if n not in f.by_name]
    if alone:
        fault = f.faults.get(alone[0])
        code_ = fault.code if fault else "not compared"
        return tag("td", tag("a", "▲ ", code_.replace("-", " "), href="#findings"), class_="elost", title=alone[0])
    worst = max((f.by_name[n] for n in names), key=lambda m: math.inf if m.rel_error != m.rel_error else m.rel_error)
    bad = [f.by_name[n] for n in names if f.beyond(f.by_name[n])]
    shown = worst if not bad or worst in bad else bad[0]
    level = palette.level(shown.rel_error, f.bound(shown))
    value: Html | str = number(shown.rel_error)
    if bad:
        href = f"#{f.row[shown.name]}" if shown.name in f.row else "#findings"
        value = tag(
            "a", tag("span", "▲", aria_hidden="true"), tag("span", "beyond: ", class_="unseen"), value, href=href
        )
        if isinstance(level, int):
            level = max(level, palette.WITHIN)
    return tag("td", value, class_=f"e{level}" + (" bad" if bad else ""), title=_told(f, shown, len(names)))


def _told(f: Facts, m: ModuleError, n: int) -> str:
    """What a pointer that rests on a cell is told."""
    lines = [m.name if n == 1 else f"{m.name}, the worst of {n}", f"relative error {number(m.rel_error)}"]
    bound = f.bound(m)
    if bound is not None:
        lines[-1] += f", allowed {number(bound)}"
    lines.append(f"largest error of a weight {number(m.max_abs_error)}")
    if m.cosine is not None:
        lines.append(f"cosine {cosine(m.cosine)}")
    if m.mean_ulp is not None:
        lines.append(f"units in the last place: mean {number(m.mean_ulp)}, at most {number(m.max_ulp)}")
    if m.name in f.faults:
        lines.append(f"{f.faults[m.name].code}: {f.faults[m.name].message}")
    return "\n".join(lines)


# -- singular values ---------------------------------------------------------------------------------------


def spectra(f: Facts) -> list[Section]:
    """A curve for each module, all on one scale."""
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for s in f.v.spectra:
        found.setdefault(s.name, {})[s.side] = s.values
    if not found:
        return []
    decades = plots.Decades.of([s.values for s in f.v.spectra])
    stacks, others = grid.grids(found)

    def cell(names: Sequence[str]) -> Html:
        if not names:
            return tag("td", tag("span", "none", class_="unseen"), class_="enone")
        sides = found[names[0]]
        label = f"{names[0]}. {_curve_told(sides)}"
        return tag("td", plots.curve(sides.get("A"), sides.get("B"), decades, label))

    both = any(s.side == "B" for s in f.v.spectra)
    keys = [tag("span", tag("i", class_="key a"), " A")]
    keys += [tag("span", tag("i", class_="key b"), " B")] if both else []
    scale = f"from {number(decades.low)} at the bottom to {number(decades.high)} at the top"
    parts: list[Html] = [tag("div", *keys, class_="legend")]
    for stack in stacks:
        parts.append(tag("h3", grid.named(stack.stack)) if len(stacks) > 1 or others else Html())
        caption = join(["Singular values of each module of ", code(stack.stack or "the model")])
        parts.append(grid.table(stack, cell, caption=caption, class_="curves"))
    if others:
        rows = [tag("tr", tag("th", code(n), scope="row"), cell([n])) for n in sorted(others)[:_OTHERS]]
        head = tag("tr", tag("th", "module", scope="col"), tag("th", "singular values", scope="col"))
        caption = Html("Singular values of modules outside of layers")
        whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *rows), class_="curves others")
        parts.append(tag("h3", "Other modules") if stacks else Html())
        parts.append(grid.scrolling(whole, "Other modules"))
    lead = (
        f"Of each change of W, the largest on the left, on one logarithmic scale {scale}. Where a curve falls"
        " steeply, a lower rank would do."
    )
    if both:
        lead += " Where B's line follows the edge of A's area, both have the same."
    return [Section("spectra", "Singular values", join(parts), lead)]


def _curve_told(sides: dict[str, tuple[float, ...]]) -> str:
    return "; ".join(
        f"{side}: {len(v)} values from {number(max(v, default=0.0))} down to {number(min(v, default=0.0))}"
        for side, v in sorted(sides.items())
    )


def rank_for(values: Sequence[float], share: float = 0.99) -> int:
    """The least rank that keeps this share of the squares of the singular values; 0 where all are 0."""
    total, kept = math.fsum(v * v for v in values), 0.0
    if not total > 0:
        return 0
    for n, v in enumerate(values, 1):
        kept += v * v
        if kept >= share * total * (1 - 1e-12):
            return n
    return len(values)
