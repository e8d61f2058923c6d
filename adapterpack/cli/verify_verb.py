"""`adapterpack verify`."""

from __future__ import annotations

import click

from adapterpack.cli import _output as out
from adapterpack.verify import Verification, verify

DIFFERENT = 3
_SHOWN = 10


@click.command("verify")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--base", metavar="BASE", help="The base model: for a merged model B, and for DoRA.")
@click.option(
    "--max-error",
    type=float,
    metavar="E",
    callback=out.error_bound,
    help="Largest relative error of a module that counts as equal; 5e-6 between adapters.",
)
@out.device_option
@out.source_options
@out.output_options
@click.pass_context
def command(
    ctx: click.Context,
    a: str,
    b: str,
    base: str | None,
    max_error: float | None,
    device: str,
    subfolder: str | None,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Do A and B make the same change of W? Exit code 3 if not.

    A is the reference. B is an adapter, of any method and encoding, or the model that A was merged into,
    with the base given: then every tensor is compared, and nothing but the rounding of the dtype is allowed.
    """
    with out.progress(quiet or as_json) as progress:
        result = verify(
            a,
            b,
            base=base,
            max_error=max_error,
            device=device,
            subfolder=subfolder,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if as_json:
        out.print_json("verify", result)
    elif not quiet:
        _print(result)
    if not result.equal:
        ctx.exit(DIFFERENT)


def _print(r: Verification) -> None:
    for f in r.findings[:_SHOWN]:
        click.echo(f"finding: {f.code}: {f.key}: {f.message}")
    if len(r.findings) > _SHOWN:
        click.echo(f"... and {len(r.findings) - _SHOWN} more findings; --json has them all")
    if r.modules:
        rows = [[m.name, out.number(m.rel_error), out.number(m.max_abs_error)] for m in r.modules[:_SHOWN]]
        out.table(rows, ["worst modules", "relative error", "largest error"], right=(1, 2))
        if len(r.modules) > _SHOWN:
            click.echo(f"... and {len(r.modules) - _SHOWN} better ones")
    bound = "" if r.max_error == float("inf") else f", allowed {out.number(r.max_error)}"
    verdict = "equal" if r.equal else "different"
    click.echo(f"{verdict}: {len(r.modules)} modules, worst relative error {out.number(r.max_rel_error)}{bound}")
    out.say(r.notes)
