"""`adapterpack resize`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from adapterpack.cli import _output as out
from adapterpack.resize import ModuleRank, resize

_SHOWN = 10


@click.command("resize")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option("--rank", type=click.IntRange(min=1), metavar="R", help="No module keeps a higher rank.")
@click.option("--energy", type=float, metavar="E", help="Fraction of the squared singular values to keep, as 0.99.")
@click.option(
    "--max-error",
    type=float,
    metavar="E",
    callback=out.error_bound,
    help="Largest relative error of a module's change.",
)
@click.option("--max-bytes", type=click.IntRange(min=1), metavar="N", help="Most bytes of all files of the result.")
@click.option(
    "--global",
    "one_level",
    is_flag=True,
    help="One threshold for the singular values of all modules; the goal is that of all together.",
)
@out.device_option
@out.source_options
@out.overwrite_option
@out.dry_run_option
@out.output_options
def command(
    source: str,
    destination: str,
    rank: int | None,
    energy: float | None,
    max_error: float | None,
    max_bytes: int | None,
    one_level: bool,
    device: str,
    subfolder: str | None,
    allow_pickle: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Lower the ranks of a LoRA adapter: the smallest possible error in every module, measured.

    Give one of --rank, --energy, --max-error and --max-bytes. Modules whose rank is not lowered stay as they
    are, bit for bit; no rank is raised. Different ranks are written as patterns that PEFT reads back right.
    """
    with out.progress(quiet or as_json) as progress:
        result = resize(
            source,
            destination,
            rank=rank,
            energy=energy,
            max_error=max_error,
            max_bytes=max_bytes,
            one_level=one_level,
            device=device,
            subfolder=subfolder,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    out.print_conversion("resize", result, dry_run=dry_run, as_json=as_json, quiet=quiet)
    if not as_json and not quiet:
        print_modules(result.modules)
        click.echo(f"error of all modules together: {out.number(result.total_rel_error)}")


def print_modules(modules: Sequence[ModuleRank]) -> None:
    """The worst modules as a table."""
    click.echo()
    worst = sorted(modules, key=lambda m: -m.rel_error)
    rows = [[m.name, str(m.rank_before), str(m.rank), out.number(m.rel_error)] for m in worst[:_SHOWN]]
    out.table(rows, ["worst modules", "rank", "new rank", "relative error"], right=(1, 2, 3))
    if len(worst) > _SHOWN:
        click.echo(f"... and {len(worst) - _SHOWN} better ones; --json has them all")
