"""`adapterpack check`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from adapterpack.check import check
from adapterpack.cli import _output as out

if TYPE_CHECKING:
    from adapterpack.adapter import Finding
    from adapterpack.fix import Repair

UNHEALTHY = 3
_SHOWN = 4
"""Findings of one kind that people are shown."""


@click.command("check")
@click.argument("source", metavar="SRC")
@click.option("--base", metavar="BASE", help="Hold keys and shapes against this base.")
@click.option(
    "--for", "engine", metavar="ENGINE", help="Would vllm, sglang, tgi, lorax, llamacpp, peft==0.10 read it?"
)
@click.option("--fix", "destination", metavar="DST", help="Write a copy in which is mended what can be mended.")
@click.option("--fetch", is_flag=True, help="Of an adapter on the Hub: fetch it and check its values, too.")
@out.source_options
@out.overwrite_option
@out.output_options
@click.pass_context
def command(
    ctx: click.Context,
    source: str,
    base: str | None,
    engine: str | None,
    destination: str | None,
    fetch: bool,
    subfolder: str | None,
    allow_pickle: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Look for every known fault of an adapter. Exit code 3 if there is one.

    Of an adapter on the Hub, headers and config are read, and values with --fetch.
    Without --base, the base that the adapter names is used if it is a local directory or in the Hub cache.
    With --for, each rule of the engine that it breaks is a finding: rejected, misread or ignored there.

    With --fix, faults that have one right repair are mended in a copy: prefixes of keys, names left in them, flags
    and ranks that contradict the tensors, nulls, patterns that overlap, target_modules, VB-LoRA's weights that load
    as NaN. What PEFT computed from SRC stays what it computes; where it failed, or dropped tensors silently, the
    copy computes what was trained. The copy is checked again, and exit code 3 says that faults are left.
    """
    if overwrite and destination is None:
        raise click.UsageError("--overwrite goes with --fix")
    with out.progress(quiet or as_json) as progress:
        if destination is not None:
            # Late: it takes the maths along.
            from adapterpack.fix import fix

            repair = fix(
                source,
                destination,
                base=base,
                engine=engine,
                subfolder=subfolder,
                allow_pickle=allow_pickle,
                overwrite=overwrite,
                progress=progress,
            )
        else:
            result = check(
                source,
                base=base,
                engine=engine,
                subfolder=subfolder,
                allow_pickle=allow_pickle,
                fetch=fetch,
                progress=progress,
            )
    found = repair if destination is not None else result
    if as_json:
        out.print_json("check", found)
    elif quiet and destination is not None:
        click.echo(repair.output)
    elif not quiet:
        if destination is not None:
            _print_repair(repair)
        _print_findings(found.findings)
        faults = sum(not f.warning for f in found.findings)
        verdict = "healthy" if found.healthy else f"unhealthy: {faults} fault{'s' * (faults != 1)}"
        if destination is None:
            verdict += _mendable(found.findings)
        click.echo(f"{'the copy is ' if destination is not None else ''}{verdict}")
        out.say(found.notes)
    if not found.healthy:
        ctx.exit(UNHEALTHY)


def _mendable(findings: Sequence[Finding]) -> str:
    """What a repair may help."""
    from adapterpack.health.mending import MENDERS

    codes = dict.fromkeys(f.code for f in findings if f.code in MENDERS)
    return f"; --fix DST tries to mend {', '.join(codes)}" if codes else ""


def _print_findings(findings: Sequence[Finding]) -> None:
    """A few of each kind, with one fix."""
    kinds: defaultdict[tuple[bool, str], list[Finding]] = defaultdict(list)
    for f in findings:
        kinds[f.warning, f.code].append(f)
    for (warning, code), same in kinds.items():
        for f in same[:_SHOWN]:
            click.echo(f"{'warning' if warning else 'fault'}: {code}: {f.key}: {f.message}")
        if len(same) > _SHOWN:
            click.echo(f"  ... and {len(same) - _SHOWN} more of this kind; --json has them all")
        for fix in dict.fromkeys(f.fix for f in same[:_SHOWN] if f.fix):
            click.echo(f"  fix: {fix}")


def _print_repair(r: Repair) -> None:
    for done in r.fixed:
        click.echo(f"mended: {done.code}: {done.key}: {done.message}")
    rows = [["output", r.output], ["bytes", f"{out.size(r.bytes_in)} -> {out.size(r.bytes_out)}"]]
    if not r.fixed:
        rows.append(["mended", "nothing: the result is a copy"])
    if r.max_rel_error is not None:
        rows.append(["change of W", f"moved by {out.number(r.max_rel_error)} (relative, worst module)"])
    if r.dropped:
        rows.append(["left behind", "; ".join(r.dropped)])
    out.table(rows)
