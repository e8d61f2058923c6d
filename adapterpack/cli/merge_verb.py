"""`adapterpack merge`."""

from __future__ import annotations

import re
from collections import Counter

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
@out.jobs_option
@click.option("--requantize", is_flag=True, help="Write an FP8 base as FP8 again, not in 16 bits.")
@click.option("--digest", is_flag=True, help="Record the SHA-256 of every file read and written in the lineage.")
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
    requantize: bool,
    digest: bool,
    subfolder: str | None,
    allow_pickle: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge adapters into the weights of a base model, shard by shard, into a new directory.

    Same shards and index; untouched tensors are the base's byte for byte; memory does not grow with the
    model. Every parameter of the adapter is used or the merge is refused. A run that was interrupted is taken
    up again by the same command. --dry-run prints the plan.
    """
    out.share_one_heap()
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
            requantize=requantize,
            digest=digest,
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
        ["would write" if dry_run else "output", r.output],
        ["modules merged", str(r.modules_merged)],
        ["tensors", f"{r.tensors_changed} changed, {r.tensors_copied} copied byte for byte"],
        ["bytes", out.size(r.bytes_written)],
    ]
    if dry_run:
        rows[2] = ["tensors", f"{r.tensors_changed} to compute, {r.tensors_copied} to copy byte for byte"]
        rows += [
            ["to compute", out.size(r.bytes_computed)],
            ["to copy", out.size(r.bytes_written - r.bytes_computed)],
            ["memory", f"about {out.size(r.memory)} at the peak"],
            ["arithmetic", r.arithmetic],
            ["touched", _grouped(r.touched)],
        ]
    if r.left:
        rows.append(["left out", ", ".join(r.left)])
    out.table(rows)
    out.say(r.notes)


def _grouped(names: tuple[str, ...]) -> str:
    """Tensor names with the numbers of their layers put together: `model.layers.*.self_attn.q_proj.weight x 22`."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return ", ".join(name if n == 1 else f"{name} x {n}" for name, n in counts.items())
