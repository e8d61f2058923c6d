"""`adapterpack compress`."""

from __future__ import annotations

import click

from adapterpack.cli import _output as out
from adapterpack.compress import compress


@click.command("compress")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option("--lossless", is_flag=True, help="Every file back byte for byte (the default for .apack).")
@click.option(
    "--equivalent", is_flag=True, help="The same change of W in the most compact encoding (the default else)."
)
@click.option(
    "--max-error",
    type=float,
    metavar="E",
    callback=out.error_bound,
    help="Cut ranks and cast to 16 bits, in a pack quantise, as far as this relative error allows.",
)
@out.parent_option
@click.option("--base", metavar="BASE", help="Tensors that equal this base's are left out, or referred to by a pack.")
@click.option("--adapter-only", is_flag=True, help="Leave training state out of a pack.")
@out.jobs_option
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
    parent: str | None,
    base: str | None,
    adapter_only: bool,
    jobs: int | None,
    device: str,
    subfolder: str | None,
    allow_pickle: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write an adapter as small as it goes: as a pack if DST ends in .apack, else as a PEFT directory.

    A pack gives every file back byte for byte (`unpack`); with --parent it stores what changed since the
    checkpoint before. With --max-error it holds quantised values.

    A directory is the most compact one that stock PEFT reads back as the same adapter: VB-LoRA keeps its
    top k, values that 16 bits hold exactly take 16 bits, copies go. VeRA keeps its projections: PEFT
    redraws them differently on other bases; `convert --to seed` drops them.
    """
    out.work_in_blocks()
    with out.progress(quiet or as_json) as progress:
        result = compress(
            source,
            destination,
            lossless=lossless,
            equivalent=equivalent,
            max_error=max_error,
            parent=parent,
            base=base,
            adapter_only=adapter_only,
            jobs=jobs,
            device=device,
            subfolder=subfolder,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    out.print_conversion("compress", result, dry_run=dry_run, as_json=as_json, quiet=quiet)
