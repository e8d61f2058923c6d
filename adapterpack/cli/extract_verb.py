"""`adapterpack extract`."""

from __future__ import annotations

import click

from adapterpack.cli import _output as out
from adapterpack.extract import Extraction, extract

_SHOWN = 10


@click.command("extract")
@click.option("--base", metavar="BASE", required=True, help="The model that was tuned; it is only read.")
@click.option("--tuned", metavar="MODEL", required=True, help="What became of it: a full fine-tune.")
@click.option("--output", metavar="DST", required=True, help="The new adapter directory.")
@click.option("--rank", type=int, metavar="R", help="The rank of every module.")
@click.option("--energy", type=float, metavar="E", help="The least rank that keeps this part of the change, 0 to 1.")
@click.option("--max-rank", type=int, metavar="R", help="With --energy: no larger rank than this.")
@click.option("--dtype", default="float32", show_default=True, metavar="D", help="float32, bfloat16 or float16.")
@click.option("--embeddings", is_flag=True, help="LoRA for embeddings and the head too.")
@click.option(
    "--rest",
    type=click.Choice(["refuse", "keep", "drop"]),
    default="refuse",
    show_default=True,
    help="Changed embeddings, norms, biases and the like.",
)
@out.token_option
@out.device_option
@out.overwrite_option
@out.dry_run_option
@out.output_options
def command(
    base: str,
    tuned: str,
    output: str,
    rank: int | None,
    energy: float | None,
    max_rank: int | None,
    dtype: str,
    embeddings: bool,
    rest: str,
    device: str,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make a LoRA adapter of the difference between a base model and its full fine-tune.

    One matrix at a time. --energy 0.9 keeps 90 % of the squared singular values of each change; what the adapter
    leaves out is measured and printed, worst first.

    What changed and is no matrix of a linear layer is refused (exit code 4), unless --rest keep stores it whole
    (modules_to_save, and bias for adapted layers) or --rest drop leaves it out.
    """
    with out.progress(quiet or as_json) as progress:
        result = extract(
            base,
            tuned,
            output,
            rank=rank,
            energy=energy,
            max_rank=max_rank,
            dtype=dtype,
            embeddings=embeddings,
            rest=rest,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        out.print_json("extract", result)
    elif quiet:
        click.echo(result.output)
    else:
        _print(result, dry_run)


def _print(r: Extraction, dry_run: bool) -> None:
    out.modules(r.modules, planned=dry_run)
    facts = [
        ["would write" if dry_run else "output", r.output],
        ["modules", f"{len(r.modules)} as LoRA, {r.unchanged} unchanged"],
        ["bytes", out.size(r.bytes_out) if r.bytes_out else "known once the ranks are"],
    ]
    if r.max_rel_error is not None:
        facts.append(["error", out.number(r.max_rel_error) + " (relative, worst module)"])
    facts += [[what, _names(names)] for what, names in (("kept whole", r.kept), ("dropped", r.dropped)) if names]
    out.table(facts)
    out.say(r.notes)


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
