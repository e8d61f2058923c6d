"""An adapter to the Hub: checked, compact, with a card that is true, in one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterpack import card, hub, release, sources
from adapterpack.check import check
from adapterpack.containers import peft
from adapterpack.errors import HubError, Unhealthy, UsageError
from adapterpack.hub import upload
from adapterpack.io.files import OpenFile, read_small
from adapterpack.limits import CARD_BYTES, CONFIG_BYTES
from adapterpack.release import PushedFile
from adapterpack.staging import Staged, Wish, join, pushed, text_of
from adapterpack.tensor import chunks

if TYPE_CHECKING:
    from adapterpack.adapter import Progress


@dataclass(frozen=True)
class Push:
    """What `push` did, or would do.

    Attributes:
        repo_id: The repository.
        revision: The branch; None: the main one.
        commit: The commit that holds it; None: nothing was pushed.
        url: The page of the commit; None: nothing was pushed.
        pull_request: The page of the pull request, where one was asked for.
        created: Was the repository made for it?
        changed: Was there anything to commit?
        method: Of the adapter.
        encoding: As it is stored there.
        bytes_in: Of the source's files.
        bytes_out: Of the files that were pushed.
        grade: What was lost.
        max_rel_error: Largest relative error of a module's change.
        files: What was pushed.
        removed: What an earlier push had left there and this commit took away.
        left_out: What lies beside the adapter and was not pushed.
        notes: What the user should know.
    """

    repo_id: str
    revision: str | None
    commit: str | None
    url: str | None
    pull_request: str | None
    created: bool
    changed: bool
    method: str
    encoding: str | None
    bytes_in: int
    bytes_out: int
    grade: str
    max_rel_error: float
    files: tuple[PushedFile, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    removed: tuple[str, ...] = ()


def push(
    source: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    path_in_repo: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    with_pack: bool = False,
    pack_only: bool = False,
    allow_references: bool = False,
    include: tuple[str, ...] = (),
    token: str | None = None,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Push:
    """Push an adapter to a repository of the Hub.

    Args:
        source: The adapter; only read. Only config, weights, tokenizer, card and license of it are pushed.
        repo_id: `org/name`; it is made if it is not there.
        private: Make it private, if it is made.
        revision: The branch to push to.
        create_pr: Open a pull request.
        path_in_repo: The folder of this adapter among several, as PEFT's `subfolder` and vLLM want it.
        commit_message: Of the commit.
        base_model: The base on the Hub, `org/name` or `org/name@commit`; config and card are mended.
        license: For the card.
        with_pack: The lossless pack beside the files that PEFT reads.
        pack_only: The pack alone.
        allow_references: Push a pack, too, that needs a parent or its base to be unpacked.
        include: Names of more files to push, with wildcards.
        token: Of the Hub; None: HF_TOKEN, else the login.
        dry_run: Say what would be pushed; nothing is sent, and nobody asked.

    Raises:
        Unhealthy: it has faults; `check` lists them.
        UsageError: its base is named by a local path, or options exclude each other.
        HubError: the Hub refuses, or does not answer.
    """
    wish = _wish(
        repo_id, revision, path_in_repo, base_model, license, with_pack, pack_only, allow_references, include
    )
    with hub.credentials(token), ExitStack() as stack:
        place = sources.here(source, subfolder)
        _refuse_unhealthy(place, subfolder, allow_pickle, progress)
        stage = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adapterpack-push-")))
        staged = Staged.of(place, subfolder, allow_pickle, wish, stage, progress)
        if dry_run:
            files, notes = staged.with_cards({})
            return _result(wish, staged, files, None, None, notes)
        target = upload.prepare(wish.target, private=private, create_pr=create_pr)
        try:
            there = hub.look_up(target.reference.at(target.head), explicit=True)
            files, notes = staged.with_cards(_cards(there, wish))
            removed = _superseded(there, wish, files)
            _refuse_secrets(files)
            message = commit_message or f"Upload {staged.release.method} adapter with adapterpack"
            made = upload.commit(target, files, message=message, delete=removed, create_pr=create_pr)
        except KeyboardInterrupt as e:
            made_it = f"the repository {repo_id} was made; " if target.created else ""
            e.add_note(f"{made_it}the commit was on its way: it is in {repo_id} as a whole, or not at all")
            raise
        return replace(_result(wish, staged, files, target, made, notes), removed=removed)


def _wish(
    repo_id: str,
    revision: str | None,
    path_in_repo: str | None,
    base_model: str | None,
    license: str | None,
    with_pack: bool,
    pack_only: bool,
    allow_references: bool,
    include: tuple[str, ...],
) -> Wish:
    if with_pack and pack_only:
        raise UsageError("--with-pack and --pack-only exclude each other")
    target = hub.parse(repo_id)
    if target.path or target.revision:
        raise UsageError(
            f"REPO_ID is org/name, not {repo_id}", hint="--revision names a branch, --path-in-repo a folder"
        )
    if revision is not None:
        target = target.at(revision)
    folder = (path_in_repo or "").strip("/")
    if any(part.startswith(".") for part in folder.split("/") if folder):
        raise UsageError(f"--path-in-repo {folder}: no part of it may begin with a dot")
    target = target.below(folder or None)
    return Wish(target, base_model, license, not pack_only, with_pack or pack_only, allow_references, include)


def _refuse_unhealthy(place: Path, subfolder: str | None, allow_pickle: bool, progress: Progress | None) -> None:
    health = check(place, subfolder=subfolder, allow_pickle=allow_pickle, progress=progress)
    faults = [f for f in health.findings if not f.warning]
    if faults:
        more = f", and {len(faults) - 1} more faults" if len(faults) > 1 else ""
        raise Unhealthy(
            f"{faults[0].key}: {faults[0].message}{more}; nothing was pushed", hint=f"adapterpack check {place}"
        )


def _cards(there: hub.Snapshot, wish: Wish) -> dict[str, str]:
    """The cards that the repository has already: what the user wrote there is kept."""
    found = {}
    for path in dict.fromkeys((card.CARD, join(wish.target.path, card.CARD))):
        if path in there.files:
            found[path] = text_of(read_small(there.fetch([path]) / path, CARD_BYTES))
    return found


def _superseded(there: hub.Snapshot, wish: Wish, files: Mapping[str, Path]) -> tuple[str, ...]:
    """What an earlier push left in this place and this one does not replace: else two adapters would lie there.

    Raises:
        UsageError: an adapter that no push made would stand before the pack.
    """
    folder = wish.target.path
    manifest, before = join(folder, peft.MANIFEST), set[str]()
    if manifest in there.files:
        data = read_small(there.fetch([manifest]) / manifest, CONFIG_BYTES)
        before = {join(folder, name) for name in release.read_manifest(data, manifest)}
    others = [join(folder, name) for name in (peft.CONFIG, peft.WEIGHTS, peft.PICKLE)]
    stays = [path for path in others if path in there.files and path not in before]
    if not wish.native and stays:
        raise UsageError(
            f"{wish.target} holds {stays[0]}, which would be read in place of the pack",
            hint="--with-pack replaces it; --path-in-repo puts the pack beside it",
        )
    return tuple(sorted(path for path in before if path in there.files and path not in files))


def _refuse_secrets(files: Mapping[str, Path]) -> None:
    """Raise HubError if the token in use stands in a file that is about to be shown to everybody."""
    token = (hub.token() or "").encode()
    if not token:
        return
    for path, place in files.items():
        before = b""
        with OpenFile(place) as file:
            for chunk in chunks(file.whole()):
                if token in before + chunk:
                    raise HubError(f"{path} holds your token of the Hub; nothing was pushed", hint="remove it there")
                before = chunk[-len(token) :]


def _result(
    wish: Wish,
    staged: Staged,
    files: Mapping[str, Path],
    target: upload.Target | None,
    made: upload.Commit | None,
    notes: tuple[str, ...],
) -> Push:
    known = staged.release
    listed = pushed(files)
    return Push(
        repo_id=wish.target.repo,
        revision=wish.target.revision,
        commit=None if made is None else made.oid,
        url=None if made is None else made.url,
        pull_request=None if made is None else made.pull_request,
        created=target is not None and target.created,
        changed=made is not None and target is not None and made.oid != target.head,
        method=known.method,
        encoding=known.encoding,
        bytes_in=known.bytes_in,
        bytes_out=sum(f.bytes for f in listed),
        grade=known.grade,
        max_rel_error=known.error,
        files=listed,
        left_out=tuple(staged.left),
        notes=notes,
    )
