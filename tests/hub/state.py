"""What the Hub holds: blobs by their SHA-256, and repositories with commits, branches, tags and pull requests."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hub.exchange import Refusal

_LFS_PATTERNS = """
    *.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz
    *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar
    *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*
"""
GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LFS_PATTERNS.split()
).encode()
_HASH = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")


@dataclass(frozen=True)
class Entry:
    """One file of a commit."""

    sha256: str
    size: int
    lfs: bool
    oid: str
    """git's name for the blob: of the content, or of the LFS pointer."""

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    date: str
    author: str
    tree: Mapping[str, Entry]


@dataclass
class Pull:
    num: int
    title: str
    description: str
    base: str
    author: str
    date: str
    status: str = "draft"
    merged: str | None = None

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    id: str
    private: bool
    gated: bool
    created: str
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)
    pull_heads: dict[str, str] = field(default_factory=dict)

    def head(self, revision: str) -> Commit:
        """The commit of a branch, a tag, `refs/pr/N`, `refs/heads/…`, or a (shortened) hash."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        oid = self.branches.get(name) or self.tags.get(name) or self.pull_heads.get(revision)
        if oid is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            oid = next((x for x in self.commits if x.startswith(revision)), None)
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        found = [self.head(revision)]
        while found[-1].parent is not None:
            found.append(self.commits[found[-1].parent])
        return found

    def move(self, revision: str, oid: str) -> None:
        """Points a branch or a pull request at a commit; nothing else can be committed to."""
        if revision in self.pull_heads:
            self.pull_heads[revision] = oid
        elif revision.removeprefix("refs/heads/") in self.branches:
            self.branches[revision.removeprefix("refs/heads/")] = oid
        else:
            raise Refusal(400, f"Can only commit to a branch or a pull request, not to {revision}")


class Blobs:
    """Content by its SHA-256, one file each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        if not self.has(name):
            scratch = self.directory / f".{name}.{threading.get_ident()}"
            scratch.write_bytes(data)
            scratch.replace(self.directory / name)
        return name

    def put_hole(self, beginning: bytes, size: int) -> str:
        """A file that is zeros behind its beginning and takes no room. Its name is no digest of it."""
        name = hashlib.sha256(b"hole %d " % size + beginning).hexdigest()
        with (self.directory / name).open("wb") as f:
            f.write(beginning)
            f.truncate(size)
        return name

    def has(self, sha256: str) -> bool:
        return (self.directory / sha256).exists()

    def size(self, sha256: str) -> int:
        return (self.directory / sha256).stat().st_size

    def read(self, sha256: str, start: int = 0, stop: int | None = None) -> bytes:
        with (self.directory / sha256).open("rb") as f:
            f.seek(start)
            return f.read(None if stop is None else stop - start)


class Store:
    """All repositories. Its lock is held by every request that reads or writes them."""

    def __init__(self, directory: Path) -> None:
        self.blobs = Blobs(directory / "blobs")
        self.repos: dict[str, Repo] = {}
        self.lock = threading.RLock()
        self.lfs_threshold = 10_000_000
        self.binary_is_lfs = True
        self._ticks = 0

    def now(self) -> str:
        """A clock of its own: each look is a second later, so that dates are in order and the same in each run."""
        self._ticks += 1
        moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self._ticks)
        # The client parses exactly this form; an offset like +00:00 makes it fail.
        return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")

    def create(self, repo_id: str, private: bool, gated: bool, author: str) -> Repo:
        if not _REPO.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith((".git", ".", "-")):
            raise Refusal(400, f"Invalid repository name: {repo_id}")
        repo = Repo(repo_id, private, gated, self.now())
        self.repos[repo_id] = repo
        first = self.commit(
            repo, None, {".gitattributes": self.entry(GITATTRIBUTES, False)}, "initial commit", author
        )
        repo.branches["main"] = first.oid
        return repo

    def entry(self, data: bytes, lfs: bool) -> Entry:
        sha256 = self.blobs.put(data)
        return self.lfs_entry(sha256, len(data)) if lfs else Entry(sha256, len(data), False, git_oid(data))

    def lfs_entry(self, sha256: str, size: int) -> Entry:
        return Entry(sha256, size, True, git_oid(pointer(sha256, size)))

    def commit(
        self,
        repo: Repo,
        parent: Commit | None,
        tree: Mapping[str, Entry],
        title: str,
        author: str,
        description: str = "",
    ) -> Commit:
        """A new commit that no branch points at yet."""
        date = self.now()
        told = [repo.id, parent and parent.oid, title, description, date, {k: v.oid for k, v in sorted(tree.items())}]
        oid = hashlib.sha1(json.dumps(told).encode()).hexdigest()
        commit = Commit(oid, parent.oid if parent else None, title, description, date, author, dict(tree))
        repo.commits[oid] = commit
        return commit

    def open_pull(self, repo: Repo, title: str, description: str, base: Commit, author: str) -> Pull:
        pull = Pull(len(repo.pulls) + 1, title, description, "refs/heads/main", author, self.now())
        repo.pulls[pull.num] = pull
        repo.pull_heads[pull.ref] = base.oid
        return pull

    def wants_lfs(self, repo: Repo, revision: str, path: str, size: int, sample: bytes) -> bool:
        """Large, or named in the revision's .gitattributes, or binary.

        The last is a guess, and can be turned off: what the Hub does with a small binary file that no rule names
        could not be measured.
        """
        if size > self.lfs_threshold or (self.binary_is_lfs and b"\0" in sample):
            return True
        rules = repo.head(revision).tree.get(".gitattributes")
        text = self.blobs.read(rules.sha256).decode("utf-8", "replace") if rules else ""
        return any(_attribute(line, path) for line in text.splitlines())


def _attribute(line: str, path: str) -> bool:
    pattern, *attributes = line.split() or [""]
    if "filter=lfs" not in attributes:
        return False
    return fnmatch.fnmatchcase(path if "/" in pattern else path.rsplit("/", 1)[-1], pattern.replace("**/", "*"))


def pointer(sha256: str, size: int) -> bytes:
    """The text that git keeps in the place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def checked_path(path: object) -> str:
    """A path that a commit may name."""
    bad = (
        not isinstance(path, str)
        or not path
        or path.startswith(("/", ".cache/huggingface/"))
        or any(c in path for c in "\\\0\n\r")
        or any(part in ("", ".", "..") or part.lower() == ".git" for part in path.split("/"))
        or len(os.fsencode(path)) > 1024
    )
    if bad:
        raise Refusal(400, f"Invalid path in the commit: {path!r}")
    return str(path)


def no_clashes(paths: Iterable[str]) -> None:
    """Nothing is a file and a folder at once."""
    names = set(paths)
    for path in names:
        parts = path.split("/")
        if any("/".join(parts[:i]) in names for i in range(1, len(parts))):
            raise Refusal(400, f"A parent of {path!r} is a file")
