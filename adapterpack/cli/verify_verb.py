"""`adapterpack verify`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click

from adapterpack import report as pages
from adapterpack.accuracy import ModuleError
from adapterpack.answers import Figures
from adapterpack.behaviour import Behaviour
from adapterpack.behaviour import compare as run_prompts
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
@click.option(
    "--prompts",
    metavar="FILE",
    help="Run base + A and the other side on these prompts, too: a text a line, or a .jsonl file with text or"
    " input_ids. Takes adapterpack[transformers] and --base.",
)
@click.option("--dtype", metavar="T", help="What models compute in, with --prompts; float32 if not given.")
@click.option("--report", metavar="FILE", help="Write all of it as one HTML page, too, with singular values.")
@click.option("--overwrite", is_flag=True, help="Replace the report if it exists.")
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
    prompts: str | None,
    dtype: str | None,
    report: str | None,
    overwrite: bool,
    device: str,
    subfolder: str | None,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Do A and B make the same change of W? Exit code 3 if not.

    A is the reference. B is an adapter, of any method and encoding, or the model that A was merged into,
    with the base given: then every tensor is compared, and nothing but the rounding of the dtype is allowed.
    With prompts the answers are compared as well, beside the noise of running one model twice.
    What --json prints is described by adapterpack/cli/schemas/verify.json.
    """
    if dtype is not None and prompts is None:
        raise click.UsageError("--dtype goes with --prompts", ctx)
    if prompts is not None and base is None:
        raise click.UsageError("--prompts runs models: name the base, with --base BASE", ctx)
    behaviour: Behaviour | None = None
    protected = tuple(Path(p).expanduser() for p in (a, b, base) if p is not None)
    if report is not None:
        pages.refuse(report, overwrite=overwrite, protected=protected)
    elif overwrite:
        raise click.UsageError("--overwrite goes with --report")
    with out.progress(quiet or as_json) as progress:
        result = verify(
            a,
            b,
            base=base,
            max_error=max_error,
            device=device,
            subfolder=subfolder,
            allow_pickle=allow_pickle,
            singular_values=report is not None,
            progress=progress,
        )
        if prompts is not None:
            behaviour = run_prompts(
                a,
                b,
                base=base,
                file=prompts,
                max_error=max_error,
                dtype=dtype or "float32",
                device=device,
                subfolder=subfolder,
                allow_pickle=allow_pickle,
                progress=progress,
            )
    if report is not None:
        pages.write(result, report, overwrite=overwrite, protected=protected)
    if as_json:
        out.print_json("verify", result, behaviour=behaviour)
    elif not quiet:
        _print(result)
        if behaviour is not None:
            _print_behaviour(behaviour)
    if not result.equal or (behaviour is not None and any(not f.warning for f in behaviour.findings)):
        ctx.exit(DIFFERENT)


def _print(r: Verification) -> None:
    bound = "" if math.isinf(r.max_error) else f", allowed {out.number(r.max_error)}"
    verdict = click.style("equal" if r.equal else "different", fg="green" if r.equal else "red", bold=True)
    faults = sum(not f.warning for f in r.findings)
    found = f"; {faults} findings" if faults else ""
    click.echo(
        f"{verdict}: {len(r.modules)} modules, worst relative error {out.number(r.max_rel_error)}{bound}{found}"
    )
    for f in r.findings[:_SHOWN]:
        click.echo(f"{'warning' if f.warning else 'finding'}: {f.code}: {f.key}: {f.message}")
    if len(r.findings) > _SHOWN:
        counts = Counter(f.code for f in r.findings[_SHOWN:])
        others = ", ".join(f"{n} {code}" for code, n in counts.most_common())
        click.echo(f"... and {len(r.findings) - _SHOWN} more findings ({others}); --json has them all")
    if r.modules:
        _print_modules(r)
    out.say(r.notes)


def _print_modules(r: Verification) -> None:
    """The worst modules and all of them as one: only columns that somebody has something in."""
    merged = r.against == "merged"
    columns: list[tuple[str, Callable[[ModuleError], str], str]] = [
        ("relative error", lambda m: out.number(m.rel_error), out.number(r.pooled.rel_error)),
        ("rounding leaves", lambda m: _or_nothing(m.floor if merged else None), ""),
        ("largest error", lambda m: out.number(m.max_abs_error), out.number(r.pooled.max_abs_error)),
        ("cosine", lambda m: _cosine(m.cosine), _cosine(r.pooled.cosine)),
        ("mean ulp", lambda m: _or_nothing(m.mean_ulp), _or_nothing(r.pooled.mean_ulp)),
        ("max ulp", lambda m: _or_nothing(m.max_ulp), _or_nothing(r.pooled.max_ulp)),
        ("rank", lambda m: _ranks(m), ""),
    ]
    shown = r.modules[:_SHOWN]
    used = [c for c in columns if any(c[1](m) for m in shown)]
    rows = [[m.name, *(cell(m) for _, cell, _ in used)] for m in shown]
    if r.pooled.modules > 1:
        rows.append([f"all {r.pooled.modules} pooled", *(pooled for _, _, pooled in used)])
    out.table(rows, ["worst modules", *(name for name, _, _ in used)], right=range(1, len(used) + 1))
    if len(r.modules) > _SHOWN:
        click.echo(f"... and {len(r.modules) - _SHOWN} better ones; --json has them all")


_WHAT = {
    "causal-lm": "logits",
    "masked-lm": "logits",
    "token-classification": "logits",
    "sequence-classification": "logits of classes",
    "encoder": "last hidden states",
}


def _print_behaviour(r: Behaviour) -> None:
    """The verdict, then A against B beside all that it is to be held against."""
    verdict = click.style(
        "within noise" if r.within else "beyond noise", fg="green" if r.within else "red", bold=True
    )
    part = "" if r.of_effect is None else f", {100 * r.of_effect:.2g} % of A's own effect"
    click.echo(f"behaviour {verdict}: {_WHAT[r.kind]} differ by {out.number(r.difference.rms)}{part}")
    for f in r.findings:
        click.echo(f"{'warning' if f.warning else 'finding'}: {f.code}: {f.key}: {f.message}")
    named = [
        ("A and B" if r.against == "adapter" else "A and merged B", r.difference),
        ("A and base alone", r.effect),
    ]
    named += [(f"A twice: {n.name}", n.figures) for n in r.noise]
    columns: list[tuple[str, Callable[[Figures], str]]] = [
        ("rms", lambda f: out.number(f.rms)),
        ("mean", lambda f: out.number(f.mean_abs)),
        ("largest", lambda f: out.number(f.max_abs)),
        ("mean KL", lambda f: _or_nothing(f.kl_mean)),
        ("largest KL", lambda f: _or_nothing(f.kl_max)),
        ("same top-1", lambda f: "" if f.top1 is None else f"{100 * f.top1:.2f} %"),
        ("cosine", lambda f: _cosine(f.cosine)),
    ]
    used = [c for c in columns if any(c[1](f) for _, f in named)]
    rows = [[name, *(cell(f) for _, cell in used)] for name, f in named]
    where = f"{r.prompts} prompts, {r.positions} positions"
    out.table(rows, [where, *(name for name, _ in used)], right=range(1, len(used) + 1))
    out.say([f"run with transformers {r.transformers} in {r.dtype} on {r.device}, as {r.architecture}", *r.notes])


def _or_nothing(x: float | None) -> str:
    return "" if x is None else out.number(x)


def _cosine(x: float | None) -> str:
    """1 - 3e-9 and not 1.000000: that is where it tells anything."""
    if x is None:
        return ""
    gap = 1 - x
    return "1" if gap <= 0 else f"1 - {gap:.1e}" if gap < 1e-3 else f"{x:.4f}"


def _ranks(m: ModuleError) -> str:
    ranks = [str(r) for r in dict.fromkeys((m.rank_a, m.rank_b)) if r is not None]
    return ", ".join(ranks)
