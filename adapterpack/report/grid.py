"""Modules by layer and kind: `model.layers.3.self_attn.q_proj.weight` lies in row 3, column `self_attn.q_proj`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from adapterpack.report.html import Html, code, join, tag, text

_LAYER = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<layer>[0-9]{1,6})\.(?P<kind>.+)", re.S)
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")
_COLUMNS, _ROWS, _STACKS = 24, 400, 8
"""More columns are brought together: experts as one, the rarest as others. More rows or stacks are others too."""
_ORDER = (
    *(
        "qkv_proj",
        "c_attn",
        "q_proj",
        "query",
        "q",
        "k_proj",
        "key",
        "k",
        "v_proj",
        "value",
        "v",
        "o_proj",
        "out_proj",
    ),
    *("o", "dense", "c_proj", "gate_up_proj", "gate_proj", "up_proj", "c_fc", "fc1", "w1", "down_proj", "fc2", "w2"),
)


@dataclass
class Grid:
    """One stack of layers.

    Attributes:
        stack: What its modules' names begin with, `model.layers`.
        rows: Layer numbers, ascending.
        columns: Kinds of modules, attention first.
        cells: Row and column to names of modules: several where kinds were brought together.
    """

    stack: str
    rows: list[int] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    cells: dict[tuple[int, str], list[str]] = field(default_factory=dict)


def grids(names: Iterable[str]) -> tuple[list[Grid], list[str]]:
    """Stacks of layers, the largest first, and the names that belong to none."""
    found: dict[str, list[tuple[int, str, str]]] = {}
    rest: list[str] = []
    for name in names:
        m = _LAYER.fullmatch(name)
        if m is None:
            rest.append(name)
        else:
            kind = m["kind"].removesuffix(".weight")
            found.setdefault(m["stack"] or "", []).append((int(m["layer"]), kind, name))
    made: list[Grid] = []
    for stack, entries in sorted(found.items(), key=lambda kv: (-len(kv[1]), kv[0])):
        if len(made) == _STACKS:
            rest += [name for _, _, name in entries]
            continue
        grid, others = _grid(stack, entries)
        made.append(grid)
        rest += others
    return made, rest


def _grid(stack: str, entries: list[tuple[int, str, str]]) -> tuple[Grid, list[str]]:
    if len({kind for _, kind, _ in entries}) > _COLUMNS:
        entries = [(layer, _NUMBER.sub("*", kind), name) for layer, kind, name in entries]
    frequent = {kind for kind, _ in Counter(kind for _, kind, _ in entries).most_common(_COLUMNS)}
    rows = set(sorted({layer for layer, _, _ in entries})[:_ROWS])
    grid, rest = Grid(stack), []
    for layer, kind, name in entries:
        if kind in frequent and layer in rows:
            grid.cells.setdefault((layer, kind), []).append(name)
        else:
            rest.append(name)
    grid.rows = sorted({layer for layer, _ in grid.cells})
    grid.columns = sorted({kind for _, kind in grid.cells}, key=_place)
    return grid, rest


def _place(kind: str) -> tuple[bool, str, int, str]:
    parent, _, leaf = kind.rpartition(".")
    attends = "attn" in parent.lower() or "attention" in parent.lower()
    return not attends, parent, _ORDER.index(leaf) if leaf in _ORDER else len(_ORDER), leaf


def table(grid: Grid, cell: Callable[[Sequence[str]], Html], *, caption: object, class_: str) -> Html:
    """A grid as a table with headings for rows, columns and groups of columns; it scrolls where it is too wide.

    Args:
        cell: Makes a `td` of the names of its modules, of which there may be none.
    """
    groups: list[tuple[str, int]] = []
    for kind in grid.columns:
        parent = kind.rpartition(".")[0]
        if groups and groups[-1][0] == parent:
            groups[-1] = parent, groups[-1][1] + 1
        else:
            groups.append((parent, 1))
    grouped = any(parent for parent, _ in groups)
    head = tag("th", "layer", scope="col", class_="layer", rowspan=2 if grouped else None)
    first = [
        tag("th", code(p), scope="colgroup", colspan=n, class_="group") if p else tag("td", colspan=n)
        for p, n in groups
    ]
    leaves = [tag("th", code(kind.rpartition(".")[2]), scope="col") for kind in grid.columns]
    rows = [tag("tr", head, *first), tag("tr", *leaves)] if grouped else [tag("tr", head, *leaves)]
    body = [
        tag(
            "tr",
            tag("th", layer, scope="row", class_="layer"),
            *(cell(grid.cells.get((layer, kind), ())) for kind in grid.columns),
        )
        for layer in grid.rows
    ]
    whole = tag(
        "table",
        tag("caption", caption),
        tag("thead", *rows),
        tag("tbody", *body),
        class_=f"{class_} k{len(grid.columns)}",
    )
    return scrolling(whole, f"layers of {grid.stack}" if grid.stack else "layers")


def css() -> str:
    """Rules that keep columns wide enough to read, however many there are: narrower pages scroll."""
    return "".join(f".k{n}{{min-width:{3 + 4 * n}rem}}" for n in range(1, _COLUMNS + 1)) + "\n"


def scrolling(table: Html, label: str, *, tall: bool = False) -> Html:
    """A region that scrolls sideways, by keyboard too; a `tall` one also up and down."""
    return tag("div", table, class_="scroll tall" if tall else "scroll", role="region", aria_label=label, tabindex=0)


def named(stack: str) -> Html:
    """A heading's words for a stack."""
    return join(["Layers of ", code(stack)]) if stack else text("Layers")
