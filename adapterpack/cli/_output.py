"""What all verbs share: options, JSON, tables and progress. stdout is the result, stderr is the talk."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from adapterpack.adapter import Progress
    from adapterpack.conversion import Conversion, FactoredModule


F = TypeVar("F", bound=Callable[..., Any])


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, in reading order."""

    def apply(f: F) -> F:
        for decorator in reversed(decorators):
            f = decorator(f)
        return f

    return apply


output_options = options(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of tables."),
    click.option("-q", "--quiet", is_flag=True, help="Print the resulting path at most."),
)
local_options = options(
    click.option("--subfolder", metavar="NAME", help="One adapter of several; '.' is the one at the top."),
    click.option("--allow-pickle", is_flag=True, help="Read adapter_model.bin, tensors only, in a separate process."),
)


def token_option(f: F) -> F:
    """`--token`, in use while the verb runs: no verb sees it, so none can print it. And bars for bytes."""

    @functools.wraps(f)
    def call(*args: Any, token: str | None, **kwargs: Any) -> Any:
        watched = sys.stderr.isatty() and not (kwargs.get("quiet") or kwargs.get("as_json"))
        if token is None and not watched:
            return f(*args, **kwargs)
        from adapterpack.hub import client

        with client.credentials(token), client.bars(watched):
            return f(*args, **kwargs)

    said = "Of the Hub, where HF_TOKEN and the login will not do: others may see it in the list of processes."
    return click.option("--token", metavar="TOKEN", help=said)(call)  # type: ignore[return-value]


def revision_option(f: F) -> F:
    """`--revision`, of the first input if that is on the Hub."""

    @functools.wraps(f)
    def call(*args: Any, revision: str | None, **kwargs: Any) -> Any:
        if revision is not None:
            name = next(n for n in ("source", "a", "adapters") if n in kwargs)
            first, *others = kwargs[name] if isinstance(kwargs[name], tuple) else (kwargs[name],)
            pinned = _at(first, revision)
            kwargs[name] = (pinned, *others) if isinstance(kwargs[name], tuple) else pinned
        return f(*args, **kwargs)

    said = "Branch, tag or commit of the first input, if it is on the Hub."
    return click.option("--revision", metavar="REV", help=said)(call)  # type: ignore[return-value]


def _at(source: str, revision: str) -> str:
    from adapterpack.hub import references

    found = references.find(source)
    if found is None:
        raise click.UsageError(f"--revision goes with a repository of the Hub; {source} is a local path")
    return f"{references.SCHEME}{found.at(revision)}"


hub_options = options(revision_option, token_option)
source_options = options(local_options, hub_options)
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="D", help="auto, cpu, cuda, cuda:N or mps."
)
parent_option = click.option(
    "--parent",
    metavar="PREV",
    help="The checkpoint before this one (directory or pack), or a directory of packs.",
)
jobs_option = click.option(
    "--jobs", type=click.IntRange(min=1), metavar="N", help="Workers; else one a core, four at most."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, with bytes; write nothing.")


def error_bound(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """A relative error: finite and not negative."""
    if value is not None and not 0 <= value < math.inf:
        raise click.BadParameter("a number of 0 or more is wanted", ctx, param)
    return value


def share_one_heap() -> None:
    """Let all threads allocate from one heap: a heap for each would keep 20 MB that nobody uses.

    It is this process's own affair, so it stands here and not in the library.
    """
    with contextlib.suppress(OSError, AttributeError):
        # glibc, malloc.h: M_ARENA_MAX.
        ctypes.CDLL(None).mallopt(-8, 1)


def work_in_blocks() -> None:
    """What threads that work on blocks of a few MB each want of a process; its own affair, so it stands here.

    They ask for the interpreter often and briefly: a thread that has it gives it up after half a millisecond, not
    five. And freed blocks are used again instead of fetched from the system anew, which costs more than the work.
    """
    sys.setswitchinterval(0.0005)
    with contextlib.suppress(OSError, AttributeError):
        # glibc, malloc.h: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes.
        ctypes.CDLL(None).mallopt(-3, 64 << 20)
        ctypes.CDLL(None).mallopt(-1, 128 << 20)


def print_json(verb: str, result: Any, **more: Any) -> None:
    """The result of a verb as one JSON object, and others in it by name; non-finite numbers are null."""
    record = {"schema": f"adapterpack.{verb}/1", **_plain(dataclasses.asdict(result))}
    record |= {name: None if other is None else _plain(dataclasses.asdict(other)) for name, other in more.items()}
    click.echo(json.dumps(record, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None, *, right: Sequence[int] = ()) -> None:
    """A plain table on stdout, for people: no frame, columns aligned, wide names never cut."""
    lines = [list(header), *map(list, rows)] if header else [list(r) for r in rows]
    if not lines:
        return
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for n, line in enumerate(lines):
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        text = "  ".join(cells).rstrip()
        click.echo(click.style(text, bold=True) if header and n == 0 else text)


def say(lines: Sequence[str]) -> None:
    """Notes on stderr."""
    for line in lines:
        click.echo(f"note: {line}", err=True)


def print_conversion(verb: str, r: Conversion, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """What `convert` and `compress` print."""
    if as_json:
        print_json(verb, r)
        return
    if quiet:
        click.echo(r.output)
        return
    modules(r.factored)
    form = r.method + (f" ({r.encoding})" if r.encoding not in (r.method, None) else "")
    rows = [
        ["output" if not dry_run else "would write", r.output],
        ["form", form],
        ["bytes in", size(r.bytes_in)],
        ["bytes out", f"{size(r.bytes_out)}, {ratio(r.bytes_out, r.bytes_in)}"],
        ["grade", r.grade],
        ["error", number(r.max_rel_error) + ("" if r.grade == "lossless" else " (relative, worst module)")],
    ]
    if r.dropped:
        rows.append(["dropped", "; ".join(r.dropped)])
    if r.serve:
        rows.append(["serve with" if not r.serve.startswith("Peft") else "load with", r.serve])
    table(rows)
    say(r.notes)


_SHOWN = 10


def modules(found: Sequence[FactoredModule], *, planned: bool = False) -> None:
    """The worst modules of a LoRA that was factored."""
    if not found:
        return
    rows = [[m.name, str(m.rank or "?"), "?" if m.rel_error is None else number(m.rel_error)] for m in found[:_SHOWN]]
    table(rows, ["modules" if planned else "worst modules", "rank", "relative error"], right=(1, 2))
    if len(found) > _SHOWN:
        click.echo(f"... and {len(found) - _SHOWN} {'more' if planned else 'better ones'}; --json has them all")


def size(n: int) -> str:
    """Bytes for people, and exactly."""
    value, unit = float(n), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{n} B" if unit == "B" else f"{value:.2f} {unit} ({n:,} B)"


def ratio(bytes_out: int, bytes_in: int) -> str:
    """How much smaller or larger."""
    if not bytes_in:
        return "-"
    return f"{100 * bytes_out / bytes_in:.1f} %"


def number(x: float) -> str:
    """An error for people."""
    return "0" if x == 0 else f"{x:.2e}"


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr, none where nobody watches or where the work is short."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TextColumn("{task.fields[size]}"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, size="")
            bars.update(tasks[what], completed=done, total=total)
            task = bars.tasks[tasks[what]]
            if what in _BYTES:
                speed = f", {size(int(task.speed)).partition(' (')[0]}/s" if task.speed else ""
                bars.update(tasks[what], size=f"{done / 1e9:.2f} of {total / 1e9:.2f} GB{speed}")

        from adapterpack.hub.client import reporting

        with reporting(report):
            yield report


_BYTES = {"download", "merge", "pack", "unpack"}
"""Work that is counted in bytes."""
