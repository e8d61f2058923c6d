"""One commit with the files of a list: all of it is there afterwards, or nothing."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterpack.errors import AdapterpackError, HubError
from adapterpack.hub import client, snapshot
from adapterpack.hub.references import Reference
from adapterpack.io.files import OpenFile
from adapterpack.tensor import chunks

_TRIES = 4
_STALE = (409, 412)


@dataclass(frozen=True)
class Target:
    """Where a push goes, as it is before.

    Attributes:
        reference: Repository and branch.
        head: The commit that the next one follows.
        created: Was the repository made for it?
    """

    reference: Reference
    head: str
    created: bool


@dataclass(frozen=True)
class Commit:
    """What a push made.

    Attributes:
        oid: The commit; the one before where nothing was to be changed.
        url: Its page.
        pull_request: The page of the pull request; None: there is none.
    """

    oid: str
    url: str
    pull_request: str | None


def prepare(reference: Reference, *, private: bool, create_pr: bool) -> Target:
    """Find the head of the branch that is pushed to; make the repository, and the branch, where there is none.

    Raises:
        HubError: no token, or not allowed, or the Hub does not answer.
    """
    if client.token() is None:
        raise HubError("to push takes a token", hint="`hf auth login`, HF_TOKEN in the environment, or --token")
    if client.offline():
        raise HubError("nothing can be pushed while HF_HUB_OFFLINE is set", hint="unset it")
    api, what = client.api(), str(reference)
    created = False
    head = _head(api, reference, private=private)
    if head is None:
        client.ask(
            reference.repo,
            lambda: api.create_repo(reference.repo, private=private or None, exist_ok=True),
            writing=True,
        )
        created = True
        head = _head(api, reference)
    if head is None and reference.revision is not None and not create_pr:
        client.ask(
            what, lambda: api.create_branch(reference.repo, branch=reference.revision, exist_ok=True), writing=True
        )
        head = _head(api, reference)
    if head is None:
        raise HubError(f"the Hub has no branch {what}", hint="a pull request is opened against one that is there")
    return Target(reference, head, created)


def _head(api: Any, reference: Reference, *, private: bool = False) -> str | None:
    """The commit of a branch; None: there is no such branch, or no such repository.

    Args:
        private: Refuse a repository that everybody can see.
    """
    from huggingface_hub import errors

    def find() -> str | None:
        try:
            info = api.model_info(reference.repo, revision=reference.revision)
            if private and info.private is False:
                raise HubError(
                    f"{reference.repo} is there already, and public", hint="name another, or hide it first"
                )
            return str(info.sha)
        except errors.GatedRepoError:
            raise
        except errors.RevisionNotFoundError:
            return None
        except errors.RepositoryNotFoundError:
            return None

    return client.ask(str(reference), find, writing=True)


def commit(
    target: Target,
    files: Mapping[str, Path],
    *,
    message: str,
    delete: Collection[str] = (),
    create_pr: bool = False,
) -> Commit:
    """Make one commit of these files: path in the repository to path here. `delete` names files that go.

    A fault on the way is followed by another try, and each try by a look at what is there: an answer that was lost
    never makes a second commit. Without Xet on the other side, or with a broken one, files go over LFS.

    Raises:
        HubError: it cannot be made; somebody else was quicker; the card is refused.
    """
    over_lfs, wait = False, client.FIRST_WAIT
    what = str(target.reference)
    for attempt in range(1, _TRIES + 1):
        try:
            return _commit(target, files, delete, message, create_pr=create_pr, over_lfs=over_lfs)
        except Exception as e:
            if isinstance(e, AdapterpackError):
                raise
            if not over_lfs and _by_xet(e):
                over_lfs = True
                continue
            pause = client.pause(e)
            made = None if create_pr else _made(target, files, delete, e)
            if made is not None:
                return made
            lost = create_pr and pause is not None and client.status(e) is None
            if lost:
                raise HubError(
                    f"the answer to the commit was lost; a pull request may be open at {what}",
                    hint=f"look at {client.endpoint()}/{target.reference.repo}/discussions before you push again",
                ) from e
            if pause is None or attempt == _TRIES:
                raise client.translate(e, what, writing=True) from e
            time.sleep(max(pause, wait))
            wait *= 2
    raise AssertionError("unreachable")


def _commit(
    target: Target,
    files: Mapping[str, Path],
    delete: Collection[str],
    message: str,
    *,
    create_pr: bool,
    over_lfs: bool,
) -> Commit:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with ExitStack() as stack:
        stack.enter_context(client.muted)
        # The client sends paths over Xet, and open files over LFS.
        operations = [
            CommitOperationAdd(path, stack.enter_context(place.open("rb")) if over_lfs else str(place))
            for path, place in files.items()
        ]
        operations += [CommitOperationDelete(path) for path in delete]
        made = client.api().create_commit(
            target.reference.repo,
            operations,
            commit_message=message,
            revision=target.reference.revision,
            create_pr=create_pr,
            parent_commit=target.head,
        )
    return Commit(str(made.oid), str(made.commit_url), None if made.pr_url is None else str(made.pr_url))


def _by_xet(e: BaseException) -> bool:
    """May the transfer over Xet have failed? The client asks for no sign that the other side has it.

    Its Xet part is the one that raises Python's own exceptions, HTTP errors among them; all else has those of HTTP.
    """
    return type(e).__module__ == "builtins" and isinstance(e, ConnectionError | TimeoutError | RuntimeError)


def _made(target: Target, files: Mapping[str, Path], delete: Collection[str], e: BaseException) -> Commit | None:
    """The commit, if it was made after all: its answer was lost, or a second try met its own work."""
    if client.pause(e) is None and client.status(e) not in _STALE:
        return None
    head = _head(client.api(), target.reference)
    if head is None or head == target.head:
        return None
    now = snapshot.look_up(target.reference.at(head), explicit=True)
    same = all(path in now.files and _same(now.files[path], place) for path, place in files.items())
    if not same or any(path in now.files for path in delete):
        raise HubError(
            f"{target.reference} was changed by somebody else meanwhile; nothing was pushed",
            hint="run it again: it looks anew",
        ) from e
    return Commit(head, f"{client.endpoint()}/{target.reference.repo}/commit/{head}", None)


def _same(entry: snapshot.Entry, place: Path) -> bool:
    with OpenFile(place) as file:
        found = snapshot.Digests(file.size)
        for chunk in chunks(file.whole()):
            found.update(chunk)
        return file.size == entry.size and found.agree(entry)
