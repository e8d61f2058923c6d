"""`adapterpack inspect`."""

from __future__ import annotations

import click

from adapterpack.cli import _output as out
from adapterpack.inspect import Inspection, PackFacts, inspect


@click.command("inspect")
@click.argument("source", metavar="SRC")
@click.option("--base", metavar="BASE", help="Say whether the base has the adapter's modules, from its headers.")
@out.source_options
@out.output_options
def command(
    source: str, base: str | None, subfolder: str | None, allow_pickle: bool, as_json: bool, quiet: bool
) -> None:
    """Say what an adapter is: method, encoding, ranks, bytes by part, what could go.

    Reads headers and config alone.
    """
    result = inspect(source, base=base, subfolder=subfolder, allow_pickle=allow_pickle)
    if as_json:
        out.print_json("inspect", result)
    elif not quiet:
        _print(result)


def _print(r: Inspection) -> None:
    rows = [
        ["method", r.method + (f" ({r.encoding})" if r.encoding and r.encoding != r.method else "")],
        ["base model", r.base_model or "not named"],
        ["modules", str(r.modules)],
        ["rank", ", ".join(f"{rank} ({n} modules)" for rank, n in r.ranks.items()) or "-"],
        ["tensors", f"{r.tensors} ({', '.join(f'{n} {d}' for d, n in r.dtypes.items())})"],
        ["size", out.size(r.bytes)],
        ["resumable", "yes" if r.resumable else "no: logits beyond the top k are gone"],
    ]
    if r.training_state:
        rows.append(["training state", ", ".join(r.training_state)])
    if r.unsupported:
        rows.append(["not convertible", r.unsupported])
    out.table(rows)
    click.echo()
    out.table([[part, f"{n:,}"] for part, n in r.parts.items()], ["part", "bytes"], right=(1,))
    if r.pack is not None:
        click.echo()
        _print_pack(r.pack)
    if r.savings:
        click.echo()
        click.echo("could go: " + "\n          ".join(r.savings))
    out.say(r.notes)


def _print_pack(p: PackFacts) -> None:
    rows = [
        ["pack", f"{out.size(p.bytes)}, {out.ratio(p.bytes, p.source_bytes)} of its source"],
        ["restores", f"{len(p.files)} files: {', '.join(p.files[:10])}{', ...' if len(p.files) > 10 else ''}"],
        [
            "grade",
            p.grade + (f", error {p.error}" if p.error else "") + (f" of {p.max_error}" if p.max_error else ""),
        ],
    ]
    if p.not_stored:
        rows.append(["not stored", ", ".join(f"{n} {name}" for name, n in p.not_stored.items())])
    if p.depth:
        rest = " ..., not all beside it" if len(p.parents) < p.depth else ""
        rows.append(["needs", f"{' <- '.join(p.parents)}{rest} ({p.depth} in the chain)"])
    if p.base:
        rows.append(["needs", f"tensors of {p.base}"])
    if p.dropped:
        rows.append(["left out", "; ".join(p.dropped)])
    out.table([*rows, ["written by", p.producer]])
