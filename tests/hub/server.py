"""A Hub on loopback for tests: the unmodified huggingface_hub client works with it, pushes and pulls.

    with LoopbackHub(tmp_path) as hub:
        hub.create("me/adapter", {"adapter_config.json": b"{}"})
        subprocess.run([...], env=hub.child_env(HF_TOKEN=hub.token))
        assert hub.files("me/adapter")["README.md"]

It speaks LFS (one part or several) and Xet over plain HTTP; it checks what it gets as the Hub does (digests, sizes,
paths, parent commits, card metadata, tokens), records every request and injects faults. Where the Hub's own behaviour
could not be measured the code says so. Nothing but the standard library and PyYAML, which the client itself needs.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from hub.access import STRANGER, User
from hub.api import Api
from hub.exchange import Fault, Faults, Host, Refusal, Reply, Request
from hub.state import Commit, Pull, Repo, Store
from hub.storage import Storage

# What a developer or a CI runner may have set, and would lead the client astray.
_CLEARED = """
    HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_TOKEN_PATH HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_HUB_CACHE
    HUGGINGFACE_HUB_CACHE HF_ASSETS_CACHE HF_XET_CACHE HF_HUB_DISABLE_XET HF_HUB_DISABLE_IMPLICIT_TOKEN
    HF_HUB_DISABLE_SYMLINKS HUGGINGFACE_CO_STAGING HF_DEBUG HTTP_PROXY HTTPS_PROXY ALL_PROXY http_proxy
    https_proxy all_proxy
"""


class LoopbackHub:
    """See the module. All attributes may be changed while it runs.

    token, read_token, outsider_token: of the user (may write, save in the namespace `stranger`), of the same user
        with the role read, and of somebody who owns the namespace `stranger` alone.
    requests, faults, leaks: every request; faults to come; requests that carried a token of the Hub to the storage.
    xet: whether Xet is there, as on the Hub, for all files that are not in git itself. Else its token endpoint
        answers 404 and no file has a Xet hash.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests: list[Request] = []
        self.leaks: list[Request] = []
        self.faults = Faults()
        self.user = "me"
        self.token, self.read_token, self.outsider_token = (f"hf_{secrets.token_hex(17)}" for _ in range(3))
        self._store = Store(directory)
        self._storage = Storage(self._store.blobs)
        self._api = Api(self._store, self._storage)
        self._api.users = {
            self.token: User(self.user, "write"),
            self.read_token: User(self.user, "read"),
            self.outsider_token: User(STRANGER, "write"),
        }
        self._hosts = [
            Host("hub", self._api.answer, self._record, self.faults),
            Host("storage", self._store_answer, self._record, self.faults),
        ]
        self.url, self.storage_url = (host.url for host in self._hosts)
        self._api.url, self._storage.url = self.url, self.storage_url

    def __enter__(self) -> LoopbackHub:
        for host in self._hosts:
            host.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self._hosts:
            host.stop()
        if error is None:
            errors = [e for host in self._hosts for e in host.errors]
            if errors:
                raise AssertionError(f"the loopback Hub itself failed: {errors!r}") from errors[0]
            assert not self.leaks, f"the storage host saw a token of the Hub: {[str(x) for x in self.leaks]}"

    # For the client.

    def env(self) -> dict[str, str]:
        """What a process needs to talk to this Hub alone, with a home of its own. No token."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.directory / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def child_env(self, **more: str) -> dict[str, str]:
        """The environment of a child process: ours without what leads astray, with `env()` and `more`."""
        return {k: v for k, v in os.environ.items() if k not in self.cleared} | self.env() | more

    @property
    def cleared(self) -> tuple[str, ...]:
        """Variables that must not be set beside `env()`."""
        return tuple(_CLEARED.split())

    # Settings.

    @property
    def xet(self) -> bool:
        return self._api.xet

    @xet.setter
    def xet(self, there: bool) -> None:
        self._api.xet = there

    @property
    def binary_is_lfs(self) -> bool:
        """Whether small binary files go through LFS that no rule of .gitattributes names: servers differ."""
        return self._store.binary_is_lfs

    @binary_is_lfs.setter
    def binary_is_lfs(self, value: bool) -> None:
        self._store.binary_is_lfs = value

    def break_xet(self, status: int = 403) -> Fault:
        """Xet is announced and its tokens are given out, but the CAS answers everything with `status`.

        After a status that may pass (5xx, 429) the client tries for minutes, unless its environment has
        HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="2" and HF_XET_CLIENT_RETRY_BASE_DELAY="100ms".
        """
        return self.faults.status(status, r"^/v[12]/(?!telemetry)", host="storage", times=None)

    def set_limits(
        self,
        lfs: int | None = None,
        multipart: int | None = None,
        part: int | None = None,
        page: int | None = None,
    ) -> None:
        """Bytes above which a file must be LFS (10 MB), from which LFS has parts (16 MiB), a part's size (8 MiB); and
        how many entries a page of a tree has (1000)."""
        self._store.lfs_threshold = self._store.lfs_threshold if lfs is None else lfs
        self._api.multipart_threshold = self._api.multipart_threshold if multipart is None else multipart
        self._api.part_size = self._api.part_size if part is None else part
        self._api.page_size = self._api.page_size if page is None else page

    # What is there, past the client and without its checks.

    def create(
        self, repo_id: str, files: Mapping[str, bytes] | None = None, private: bool = False, gated: bool = False
    ) -> str:
        """Makes a repository with these files beside .gitattributes; the hash of its last commit.

        Paths and cards are not checked: a test may place what the Hub would refuse.
        """
        assert not self.exists(repo_id), f"{repo_id} is there already"
        with self._store.lock:
            repo = self._store.create(repo_id, private, gated, self.user)
        return self.commit(repo_id, files) if files else repo.branches["main"]

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        delete: Iterable[str] = (),
        revision: str = "main",
        message: str = "placed by the test",
    ) -> str:
        """A commit that somebody else made; its hash."""
        with self._store.lock:
            repo = self._repo(repo_id)
            head = repo.head(revision)
            tree = {path: entry for path, entry in head.tree.items() if path not in set(delete)}
            for path, data in (files or {}).items():
                lfs = self._store.wants_lfs(repo, revision, path, len(data), data[:512])
                tree[path] = self._store.entry(data, lfs and bool(data))
            commit = self._store.commit(repo, head, tree, message, self.user)
            repo.move(revision, commit.oid)
            return commit.oid

    def commit_hole(self, repo_id: str, path: str, beginning: bytes, size: int) -> str:
        """A commit with a file of any size that is zeros behind its beginning (a header); its hash.

        It can be read by ranges of up to 1 GiB. Its digest is made up and it is not in Xet, which would read it all.
        """
        with self._store.lock:
            repo = self._repo(repo_id)
            name = self._store.blobs.put_hole(beginning, size)
            self._storage.holes.add(name)
            head = repo.head("main")
            tree = {**head.tree, path: self._store.lfs_entry(name, size)}
            commit = self._store.commit(repo, head, tree, "placed by the test", self.user)
            repo.move("main", commit.oid)
            return commit.oid

    def rename(self, repo_id: str, name: str) -> None:
        """The old name then redirects to the new one."""
        repo = self._store.repos.pop(repo_id)
        repo.id = name
        self._store.repos[name], self._api.moved[repo_id] = repo, name

    def branch(self, repo_id: str, name: str, revision: str = "main") -> None:
        repo = self._repo(repo_id)
        repo.branches[name] = repo.head(revision).oid

    def tag(self, repo_id: str, name: str, revision: str = "main") -> None:
        repo = self._repo(repo_id)
        repo.tags[name] = repo.head(revision).oid

    def exists(self, repo_id: str) -> bool:
        return repo_id in self._store.repos

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a revision, .gitattributes among them."""
        with self._store.lock:
            tree = self._repo(repo_id).head(revision).tree
            return {path: self._store.blobs.read(tree[path].sha256) for path in sorted(tree)}

    def is_lfs(self, repo_id: str, path: str, revision: str = "main") -> bool:
        return self._repo(repo_id).head(revision).tree[path].lfs

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first; the last one is the Hub's own `initial commit`."""
        with self._store.lock:
            return self._repo(repo_id).history(revision)

    def pulls(self, repo_id: str) -> list[Pull]:
        return list(self._repo(repo_id).pulls.values())

    def repo(self, repo_id: str) -> Repo:
        return self._repo(repo_id)

    @property
    def unknown(self) -> list[Request]:
        """Requests for endpoints that this Hub does not have."""
        return self._api.unknown

    def asked(self, method: str | None = None, path: str = "", host: str | None = None) -> list[Request]:
        """The requests so far whose target holds `path`."""
        return [
            r
            for r in list(self.requests)
            if method in (None, r.method) and path in r.target and host in (None, r.host)
        ]

    def sent(self, path: str = "", host: str | None = None) -> int:
        """Bytes that went out in answers so far, headers not counted."""
        return sum(r.sent for r in self.asked(path=path, host=host))

    # Inside.

    def _repo(self, repo_id: str) -> Repo:
        return self._store.repos[repo_id]

    def _record(self, request: Request) -> None:
        self.requests.append(request)
        told = request.target + "\n" + "\n".join(request.headers.values())
        if request.host == "storage" and any(token in told for token in self._api.users):
            self.leaks.append(request)

    def _store_answer(self, request: Request, body: bytes) -> Reply:
        if request in self.leaks:
            raise Refusal(400, "A token of the Hub has no business here")
        with self._store.lock:
            return self._storage.answer(request, body)


__all__ = ["Commit", "Fault", "Faults", "LoopbackHub", "Pull", "Request"]
