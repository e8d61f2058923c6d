"""`adapterpack merge`."""

from __future__ import annotations

import click

from adapterpack.cli import _output as out
from adapterpack.merge import Merge, merge


@click.command("merge")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@click.option("--into", "base", metavar="BASE", required=True, help="The base model; it is only read.")
@click.option("--output", metavar="DIR", required=True, help="The new model directory.")
@click.option("--weight", "weights", type=float, multiple=True, metavar="W", help="A factor; once for each ADAPTER.")
@click.option(
    "--rounding",
    type=click.Choice(["peft", "once"]),
    default="peft",
    show_default=True,
    help="peft: the bits of merge_and_unload; once: f64 and one rounding.",
)
@click.option(
    "--verify",
    type=click.Choice(["sample", "full", "off"]),
    default="sample",
    show_default=True,
    help="Read merged tensors back and check them before anything is published.",
)
@out.device_option
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="CPU threads for the arithmetic.")
@out.source_options
@out.overwrite_option
@out.dry_run_option
@out.output_options
def command(
    adapters: tuple[str, ...],
    base: str,
    output: str,
    weights: tuple[float, ...],
    rounding: str,
    verify: str,
    device: str,
    jobs: int | None,
    subfolder: str | None,
    allow_pickle: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge adapters into the weights of a base model, shard by shard, into a new directory.

    Same shards and index; untouched tensors are the base's byte for byte; memory holds one tensor. Every
    parameter of the adapter is used or the merge is refused.
    """
    with out.progress(quiet or as_json) as progress:
        result = merge(
            adapters,
            base,
            output,
            weights=weights or None,
            rounding=rounding,
            verify=verify,
            device=device,
            jobs=jobs,
            subfolder=subfolder,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        out.print_json("merge", result)
    elif quiet:
        click.echo(result.output)
    else:
        _print(result, dry_run)


def _print(r: Merge, dry_run: bool) -> None:
    rows = [
        ["output" if not dry_run else "would write", r.output],
        ["modules merged", str(r.modules_merged)],
        ["tensors", f"{r.tensors_changed} changed, {r.tensors_copied} copied byte for byte"],
        ["bytes", out.size(r.bytes_written)],
    ]
    if r.left:
        rows.append(["left out", ", ".join(r.left)])
    out.table(rows)
    out.say(r.notes)
