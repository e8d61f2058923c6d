"""`adapterpack push`."""

from __future__ import annotations

import click

from adapterpack.cli import _output as out
from adapterpack.push import Push, push


@click.command("push")
@click.argument("source", metavar="SRC")
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made.")
@click.option("--revision", metavar="BRANCH", help="The branch to push to; made if it is not there.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--path-in-repo", metavar="NAME", help="A folder for this adapter, where there are several.")
@click.option("--commit-message", metavar="TEXT", help="Of the commit.")
@click.option("--base-model", metavar="ID", help="The base on the Hub, org/name[@commit]; mends config and card.")
@click.option("--license", metavar="ID", help="For the card: apache-2.0, mit, ...")
@click.option("--with-pack", is_flag=True, help="The lossless pack beside the files that PEFT reads.")
@click.option("--pack-only", is_flag=True, help="The pack alone, which PEFT does not read.")
@click.option("--allow-references", is_flag=True, help="Push a pack, too, that needs a parent or its base.")
@click.option("--include", multiple=True, metavar="GLOB", help="More files to push, by name.")
@out.local_options
@out.token_option
@out.dry_run_option
@out.output_options
def command(
    source: str,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    path_in_repo: str | None,
    commit_message: str | None,
    base_model: str | None,
    license: str | None,
    with_pack: bool,
    pack_only: bool,
    allow_references: bool,
    include: tuple[str, ...],
    subfolder: str | None,
    allow_pickle: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Push an adapter to the Hub in one commit: checked, as compact as stock PEFT reads it, with a true card.

    The repository is made if there is none. Config, weights, tokenizer, card and license are pushed, and
    nothing else that lies there. --dry-run sends nothing and asks nobody.
    """
    # No bar of ours: the client draws those of the upload, and two would write over one another.
    result = push(
        source,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        path_in_repo=path_in_repo,
        commit_message=commit_message,
        base_model=base_model,
        license=license,
        with_pack=with_pack,
        pack_only=pack_only,
        allow_references=allow_references,
        include=include,
        subfolder=subfolder,
        allow_pickle=allow_pickle,
        dry_run=dry_run,
    )
    if as_json:
        out.print_json("push", result)
    elif quiet:
        click.echo(result.url or result.repo_id)
    else:
        _print(result, dry_run)


def _print(r: Push, dry_run: bool) -> None:
    where = r.repo_id + (f" ({r.revision})" if r.revision else "")
    rows = [
        ["would push to" if dry_run else "pushed to", where + (", which was made" if r.created else "")],
        ["form", r.method + (f" ({r.encoding})" if r.encoding not in (r.method, None) else "")],
        ["bytes", f"{out.size(r.bytes_out)} in {len(r.files)} files, of {out.size(r.bytes_in)}"],
        ["grade", r.grade + (f", error {out.number(r.max_rel_error)}" if r.grade != "lossless" else "")],
    ]
    if r.commit is not None:
        rows.append(["commit", r.commit if r.changed else f"{r.commit}: everything was there already"])
        rows.append(["see", r.pull_request or r.url or ""])
    if r.removed:
        rows.append(["removed there", ", ".join(r.removed)])
    if r.left_out:
        rows.append(["left out", ", ".join(r.left_out)])
    out.table(rows)
    if dry_run:
        click.echo()
        out.table(
            [[f.path, f"{f.bytes:,}", f.sha256[:16]] for f in r.files], ["file", "bytes", "SHA-256"], right=(1,)
        )
    out.say(r.notes)
