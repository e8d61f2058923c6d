"""`adapterpack check`."""

from __future__ import annotations

import click

from adapterpack.check import check
from adapterpack.cli import _output as out

UNHEALTHY = 3


@click.command("check")
@click.argument("source", metavar="SRC")
@click.option("--base", metavar="BASE", help="Hold keys and shapes against this base.")
@click.option(
    "--for", "engine", metavar="ENGINE", help="Would vllm, sglang, tgi, lorax, llamacpp, peft==0.10 read it?"
)
@click.option("--fetch", is_flag=True, help="Of an adapter on the Hub: fetch it and check its values, too.")
@out.source_options
@out.output_options
@click.pass_context
def command(
    ctx: click.Context,
    source: str,
    base: str | None,
    engine: str | None,
    fetch: bool,
    subfolder: str | None,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Look for every known fault of an adapter. Exit code 3 if there is one.

    Of an adapter on the Hub, headers and config are read, and values with --fetch.
    Without --base, the base that the adapter names is used if it is a local directory or in the Hub cache.
    With --for, each rule of the engine that it breaks is a finding: rejected, misread or ignored there.
    """
    with out.progress(quiet or as_json) as progress:
        result = check(
            source,
            base=base,
            engine=engine,
            subfolder=subfolder,
            allow_pickle=allow_pickle,
            fetch=fetch,
            progress=progress,
        )
    if as_json:
        out.print_json("check", result)
    elif not quiet:
        for f in result.findings:
            click.echo(f"{'warning' if f.warning else 'fault'}: {f.code}: {f.key}: {f.message}")
            if f.fix:
                click.echo(f"  fix: {f.fix}")
        faults = sum(not f.warning for f in result.findings)
        click.echo("healthy" if result.healthy else f"unhealthy: {faults} fault{'s' * (faults != 1)}")
        out.say(result.notes)
    if not result.healthy:
        ctx.exit(UNHEALTHY)
