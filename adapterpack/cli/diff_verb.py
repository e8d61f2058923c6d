"""`adapterpack diff`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from adapterpack.cli import _output as out
from adapterpack.diff import Difference, FieldChange, TensorChange, diff
from adapterpack.movement import ModuleMove

_SHOWN = 10
_WIDE = 120


@click.command("diff")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--base", metavar="BASE", help="The base model: for DoRA and its like, and tensors that are replaced.")
@click.option("--all", "everything", is_flag=True, help="Print every line, not the ten that changed most.")
@out.device_option
@out.source_options
@out.output_options
def command(
    a: str,
    b: str,
    base: str | None,
    everything: bool,
    device: str,
    subfolder: str | None,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """What changed from A to B: config, tensors, files, and the modules that moved most.

    A and B are adapters of any method, also of ones that are not read: those are compared tensor by tensor.
    This is a report and no verdict: the exit code is 0 whatever differs. `verify` gives a verdict.
    """
    with out.progress(quiet or as_json) as progress:
        result = diff(
            a, b, base=base, device=device, subfolder=subfolder, allow_pickle=allow_pickle, progress=progress
        )
    if as_json:
        out.print_json("diff", result)
    elif not quiet:
        _print(result, None if everything else _SHOWN)


def _print(r: Difference, limit: int | None) -> None:
    sides = (r.a, r.b)
    out.table(
        [
            ["checkpoint", *(s.name for s in sides)],
            [
                "method",
                *(s.method + (f" ({s.encoding})" if s.encoding not in (s.method, None) else "") for s in sides),
            ],
            ["base model", *(s.base_model or "not named" for s in sides)],
            ["tensors", *(f"{s.tensors:,}" for s in sides)],
            ["bytes", *(out.size(s.bytes) for s in sides)],
        ],
        ["", "A", "B"],
    )
    _config(r.config, limit)
    _tensors(r, limit)
    _modules(r.modules, limit)
    if r.files:
        click.echo()
        rows = [[f.name, f.kind, *("-" if n is None else f"{n:,}" for n in (f.bytes_a, f.bytes_b))] for f in r.files]
        out.table(rows[:limit], ["files", "", "bytes of A", "bytes of B"], right=(2, 3))
        _rest(len(rows), limit)
    click.echo()
    click.echo("nothing differs" if r.same else _summary(r))
    out.say(r.notes)


def _summary(r: Difference) -> str:
    counts = (
        (len(r.config), "config fields"),
        (len(r.tensors), f"of {len(r.tensors) + r.equal_tensors} tensors"),
        (len(r.files), "files"),
    )
    return "differ: " + ", ".join(f"{n} {what}" for n, what in counts)


def _config(changes: Sequence[FieldChange], limit: int | None) -> None:
    if not changes:
        return
    click.echo()
    out.table([[c.name, c.kind, _change(c)] for c in changes[:limit]], ["config", "", "A -> B"])
    _rest(len(changes), limit)


def _change(c: FieldChange) -> str:
    lists = isinstance(c.before, list) and isinstance(c.after, list)
    if lists and all(isinstance(v, str) for v in (*c.before, *c.after)) and "(order)" not in c.name:
        gone, new = (sorted({*x} - {*y}) for x, y in ((c.before, c.after), (c.after, c.before)))
        return _short(" ".join([*(f"-{v}" for v in gone), *(f"+{v}" for v in new)]))
    before, after = ("nothing" if k == c.kind else _text(v) for k, v in (("added", c.before), ("removed", c.after)))
    return f"{before} -> {after}"


def _text(value: Any) -> str:
    return _short(json.dumps(value, ensure_ascii=False))


def _short(text: str) -> str:
    return text if len(text) <= _WIDE else f"{text[: _WIDE - 3]}..."


def _tensors(r: Difference, limit: int | None) -> None:
    if not r.tensors:
        return
    click.echo()
    rows = [[t.key, _what(t), *map(_number, (t.relative, t.max_abs))] for t in r.tensors[:limit]]
    out.table(rows, ["tensors", "", "relative change", "largest change"], right=(2, 3))
    _rest(len(r.tensors), limit)


def _what(t: TensorChange) -> str:
    if t.kind == "shape":
        return f"shape {t.shape_a} -> {t.shape_b}"
    if t.dtype_a and t.dtype_b and t.dtype_a != t.dtype_b:
        return f"{t.dtype_a} -> {t.dtype_b}" + (", same values" if t.kind == "dtype" else "")
    return t.kind


def _modules(moves: Sequence[ModuleMove], limit: int | None) -> None:
    moved = [m for m in moves if m.norm_difference != 0]
    if not moved:
        return
    click.echo()
    rows = []
    for m in moved[:limit]:
        name = m.name if m.measure == "change of W" else f"{m.name} ({m.measure})"
        numbers = (m.norm_a, m.norm_b, m.norm_difference, m.relative)
        rows.append([name, *map(_number, numbers), "-" if m.cosine is None else f"{m.cosine:.4f}", m.note or ""])
    header = ["moved most", "norm of A", "norm of B", "difference", "relative", "cosine", ""]
    out.table(rows, header, right=(1, 2, 3, 4, 5))
    _rest(len(moved), limit)


def _number(x: float | None) -> str:
    return "-" if x is None else out.number(x)


def _rest(total: int, limit: int | None) -> None:
    if limit is not None and total > limit:
        click.echo(f"... and {total - limit} more; --all or --json has them")
