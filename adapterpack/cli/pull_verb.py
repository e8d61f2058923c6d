"""`adapterpack pull`."""

from __future__ import annotations

import click

from adapterpack.cli import _output as out
from adapterpack.pull import pull


@click.command("pull")
@click.argument("source", metavar="REF")
@click.argument("destination", metavar="DST")
@click.option("--subfolder", metavar="NAME", help="One adapter of several.")
@click.option(
    "--expect-sha256", metavar="HEX", help="Of the pack, or of adapter_model.safetensors: refuse any other."
)
@click.option("--base", metavar="BASE", help="The base model, where a pack takes tensors from it.")
@out.hub_options
@out.jobs_option
@out.overwrite_option
@out.output_options
def command(
    source: str,
    destination: str,
    subfolder: str | None,
    expect_sha256: str | None,
    base: str | None,
    jobs: int | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fetch an adapter from the Hub into the directory DST, each file proven by its digest; packs are unpacked.

    REF is org/name, org/name@revision or org/name@revision/folder. The commit is printed: name it to get the
    same again. HF_HUB_OFFLINE=1 takes what is in the cache. Pickles are never fetched.
    """
    with out.progress(quiet or as_json) as progress:
        result = pull(
            source,
            destination,
            subfolder=subfolder,
            expect_sha256=expect_sha256,
            base=base,
            jobs=jobs,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        out.print_json("pull", result)
        return
    if quiet:
        click.echo(result.output)
        return
    proof = "the commit and the manifest of the push" if result.manifest else "the commit"
    rows = [
        ["output", result.output],
        ["from", result.reference],
        ["fetched", f"{len(result.files)} files, {out.size(sum(f.bytes for f in result.files))}, as {proof} say"],
    ]
    if result.unpacked:
        rows.append(["unpacked", f"{out.size(result.bytes)}, {result.grade}"])
    out.table(rows)
    out.say(result.notes)
