"""`adapterpack compress`."""

from __future__ import annotations

import click

from adapterpack.cli import _output as out
from adapterpack.cli.convert_verb import print_conversion
from adapterpack.compress import compress


@click.command("compress")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option("--lossless", is_flag=True, help="Keep every tensor as it is: a clean copy.")
@click.option("--equivalent", is_flag=True, help="The same change of W in the most compact encoding (the default).")
@click.option(
    "--max-error",
    type=float,
    metavar="E",
    callback=out.error_bound,
    help="Cast to 16 bits and cut ranks as far as this relative error allows.",
)
@click.option("--base", metavar="BASE", help="Saved embeddings that equal this base's are left out.")
@out.device_option
@out.source_options
@out.overwrite_option
@out.dry_run_option
@out.output_options
def command(
    source: str,
    destination: str,
    lossless: bool,
    equivalent: bool,
    max_error: float | None,
    base: str | None,
    device: str,
    subfolder: str | None,
    allow_pickle: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the most compact PEFT directory that stock PEFT reads back as the same adapter.

    VB-LoRA keeps its top k, values that 16 bits hold exactly take 16 bits, copies go. VeRA keeps its
    projections: PEFT redraws them differently on other bases; `convert --to seed` drops them.
    """
    if lossless + equivalent + (max_error is not None) > 1:
        raise click.UsageError("--lossless, --equivalent and --max-error exclude each other")
    with out.progress(quiet or as_json) as progress:
        result = compress(
            source,
            destination,
            lossless=lossless,
            max_error=max_error,
            base=base,
            device=device,
            subfolder=subfolder,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    print_conversion("compress", result, dry_run=dry_run, as_json=as_json, quiet=quiet)
