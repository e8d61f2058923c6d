"""`adapterpack unpack`."""

from __future__ import annotations

import os
import sys

import click

from adapterpack.cli import _output as out
from adapterpack.unpack import unpack


@click.command("unpack")
@click.argument("source", metavar="SRC.apack")
@click.argument("destination", metavar="DST")
@out.parent_option
@click.option("--base", metavar="BASE", help="The base model, where the pack takes tensors from it.")
@click.option("--expect-sha256", metavar="HEX", help="Refuse any other file than the one with this SHA-256.")
@out.hub_options
@out.jobs_option
@out.overwrite_option
@out.output_options
def command(
    source: str,
    destination: str,
    parent: str | None,
    base: str | None,
    expect_sha256: str | None,
    jobs: int | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Restore every file of a pack into the directory DST, each proven by its SHA-256."""
    out.work_in_blocks()
    # Shorter still: frames are decoded while numpy is loaded, which has the interpreter work all the time.
    sys.setswitchinterval(0.0001)
    # numpy multiplies no matrices here, and to start the threads for that takes longer than many a pack.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with out.progress(quiet or as_json) as progress:
        result = unpack(
            source,
            destination,
            parent=parent,
            base=base,
            expect_sha256=expect_sha256,
            jobs=jobs,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        out.print_json("unpack", result)
        return
    if quiet:
        click.echo(result.output)
        return
    exact = "every file as it was packed, byte for byte"
    bound = f"the change of W within {out.number(result.error or 0)} of the adapter that was packed (relative)"
    rows = [
        ["output", result.output],
        ["files", f"{result.files}, {out.size(result.bytes)}, SHA-256 checked"],
        ["grade", f"{result.grade}: {exact if result.grade == 'lossless' else bound}"],
    ]
    if result.grade == "equivalent":
        rows[2] = ["grade", "equivalent: the same change of W; not the files that it was made from"]
    if result.dropped:
        rows.append(["not in the pack", "; ".join(result.dropped)])
    out.table(rows)
