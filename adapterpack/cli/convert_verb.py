"""`adapterpack convert`."""

from __future__ import annotations

import click

from adapterpack import projections, serving
from adapterpack.cli import _output as out
from adapterpack.convert import convert


@click.command("convert")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option("--to", metavar="TARGET", help="full-logits, topk, projection, seed or lora.")
@click.option("--dtype", metavar="D", help="keep, float32, bfloat16 or float16.")
@click.option("--for", "engine", metavar="ENGINE", help="vllm, sglang, tgi, lorax, llamacpp, peft or peft==0.10.")
@click.option(
    "--extra",
    type=click.Choice(serving.EXTRA),
    default="refuse",
    show_default=True,
    help="With --for: replaced modules, embeddings and token rows that the engine has no place for.",
)
@click.option("--layout", type=click.Choice(projections.LAYOUTS), help="q, k, v and gate, up: apart or in one.")
@click.option("--base", metavar="BASE", help="The base model; shapes, seldom weights, are read.")
@click.option("--base-dtype", metavar="D", help="dtype of the base in training, where BASE does not tell.")
@click.option("--init", metavar="INIT", help="PiSSA, OLoRA, CorDA, LoRA-GA to lora: the adapter before training.")
@click.option("--rank", type=int, metavar="R", help="With --to lora: the nearest of this rank, where none is exact.")
@click.option("--energy", type=float, metavar="F", help="With --to lora: the rank that keeps F of the energy.")
@click.option(
    "--max-error", type=float, metavar="E", callback=out.error_bound, help="Largest relative error allowed."
)
@click.option("--warm-start", is_flag=True, help="With --to full-logits: make up the logits that top-k dropped.")
@out.device_option
@out.source_options
@out.overwrite_option
@out.dry_run_option
@out.output_options
def command(
    source: str,
    destination: str,
    to: str | None,
    dtype: str | None,
    engine: str | None,
    extra: str,
    layout: str | None,
    base: str | None,
    base_dtype: str | None,
    init: str | None,
    rank: int | None,
    energy: float | None,
    max_error: float | None,
    warm_start: bool,
    device: str,
    subfolder: str | None,
    allow_pickle: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert an adapter to another encoding, method or dtype, or for a serving engine.

    \b
    VB-LoRA  full-logits -> topk, lora;  topk -> lora, full-logits (with --warm-start)
    VeRA     projection -> seed, lora;   seed -> projection, lora (lora takes --base)
    PiSSA, OLoRA, CorDA, LoRA-GA -> lora: exact with --init; PiSSA and OLoRA also with --base
    LoHa, LoKr, AdaLoRA, ... -> lora: exact where the method has a low-rank form
    all      -> lora: the nearest one with --rank, --energy or --max-error (with --base, where it depends on W)
    all      --dtype, --for (plain LoRA that the engine reads as PEFT does), --layout

    What is lost is measured on the change of W. Beyond 5e-6 it is refused (exit code 4), save within
    --max-error.
    """
    with out.progress(quiet or as_json) as progress:
        result = convert(
            source,
            destination,
            to=to,
            dtype=None if dtype == "keep" else dtype,
            engine=engine,
            extra=extra,
            layout=layout,
            base=base,
            base_dtype=base_dtype,
            init=init,
            rank=rank,
            energy=energy,
            max_error=max_error,
            warm_start=warm_start,
            device=device,
            subfolder=subfolder,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    out.print_conversion("convert", result, dry_run=dry_run, as_json=as_json, quiet=quiet)
