"""Who asks, for what, and whether they may. The rest of the Hub's own host stands on this."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hub.exchange import Refusal, Request
from hub.state import Commit, Repo, Store
from hub.storage import Storage

STRANGER = "stranger"
"""The one namespace that is not the user's own: its private repositories are hidden, nothing can be written to it."""


@dataclass(frozen=True)
class User:
    name: str
    role: str

    def owns(self, repo_id: str) -> bool:
        return (repo_id.split("/")[0] == STRANGER) == (self.name == STRANGER)


@dataclass
class Call:
    """One request, with what its path named."""

    request: Request
    body: bytes
    user: User | None
    repo: Repo
    rest: list[str]

    @property
    def json(self) -> dict[str, Any]:
        return parsed(self.body)

    @property
    def create_pr(self) -> bool:
        return self.request.query.get("create_pr") in ("1", "true")


def parsed(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError as error:
        raise Refusal(400, f"The body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refusal(400, "The body is not a JSON object")
    return value


class Access:
    """The settings are attributes: a test may change them at any time."""

    def __init__(self, store: Store, storage: Storage) -> None:
        self.store, self.storage = store, storage
        self.url = ""
        self.users: dict[str, User] = {}
        self.xet = True
        self.page_size = 1000
        self.multipart_threshold = 16 << 20
        self.part_size = 8 << 20
        self.unknown: list[Request] = []
        self.moved: dict[str, str] = {}
        """New names of repositories that were renamed, by their old ones."""

    def _user(self, request: Request) -> User | None:
        if "authorization" not in request.headers:
            return None
        user = self.users.get(request.bearer or "")
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _visible(self, repo_id: str, user: User | None) -> Repo:
        """The repository. Who may not know that it exists gets the same answer as when it does not."""
        repo = self.store.repos.get(repo_id)
        if repo is None or (repo.private and not (user and user.owns(repo_id))):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writer(self, call: Call) -> User:
        if call.user is None:
            raise Refusal(401, "Invalid username or password.")
        self._may_write(call.user, call.repo.id)
        return call.user

    def _may_write(self, user: User, repo_id: str) -> None:
        if not user.owns(repo_id):
            raise Refusal(403, f"You don't have the rights to write under the namespace {repo_id.split('/')[0]!r}")
        if user.role != "write":
            raise Refusal(403, "Forbidden: your token must have the role write")

    def _open(self, call: Call) -> None:
        """Files of a gated repository are for those who were let in: here, its owner."""
        if call.repo.gated and not (call.user and call.user.owns(call.repo.id)):
            raise Refusal(403 if call.user else 401, f"Access to model {call.repo.id} is restricted.", "GatedRepo")

    def _head(self, call: Call) -> Commit:
        return call.repo.head(call.rest[0] if call.rest else "main")
