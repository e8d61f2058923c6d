"""`adapterpack combine`."""

from __future__ import annotations

import click

from adapterpack.cli import _output as out
from adapterpack.cli.resize_verb import print_modules
from adapterpack.combine import combine

_TYPES = (
    "exact", "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd",
    "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip


@click.command("combine")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@click.option("--output", metavar="DST", required=True, help="The new adapter directory.")
@click.option("--weight", "weights", type=float, multiple=True, metavar="W", help="A factor; once for each ADAPTER.")
@click.option(
    "--type",
    "kind",
    type=click.Choice(_TYPES),
    default="exact",
    show_default=True,
    help="exact: the weighted sum of the changes; else as PEFT's add_weighted_adapter does.",
)
@click.option("--rank", type=click.IntRange(min=1), metavar="R", help="Of the result: for exact and svd.")
@click.option("--density", type=float, metavar="D", help="Fraction of the values that pruning keeps.")
@click.option("--majority-sign", type=click.Choice(["total", "frequency"]), help="For ties; total by default.")
@click.option("--seed", type=int, metavar="N", help="For dare: torch.manual_seed before PEFT's call; 0 by default.")
@out.device_option
@click.option("--allow-pickle", is_flag=True, help="Read adapter_model.bin, tensors only, in a separate process.")
@out.overwrite_option
@out.dry_run_option
@out.output_options
def command(
    adapters: tuple[str, ...],
    output: str,
    weights: tuple[float, ...],
    kind: str,
    rank: int | None,
    density: float | None,
    majority_sign: str | None,
    seed: int | None,
    device: str,
    allow_pickle: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Combine LoRA adapters of one base into one, without the base.

    The exact sum has the ranks of all together; --rank cuts it, at the least error. What is not low-rank
    (modules_to_save, biases, token rows) is kept where its sum is known without the base, else refused.
    """
    with out.progress(quiet or as_json) as progress:
        result = combine(
            adapters,
            output,
            weights=weights or None,
            type=kind,
            rank=rank,
            density=density,
            majority_sign=majority_sign,
            seed=seed,
            device=device,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    out.print_conversion("combine", result, dry_run=dry_run, as_json=as_json, quiet=quiet)
    if not as_json and not quiet:
        print_modules(result.modules)
