"""What names a repository of the Hub, and what a local path. Nothing here needs the network or a library."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, unquote

from adapterpack.errors import InvalidFile, UsageError
from adapterpack.io.paths import plain_name

SCHEME = "hf://"
_ID = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
_REPO = re.compile(rf"{_ID}/{_ID}", re.ASCII)
# A branch may have slashes in its name; those of pull requests and conversions always do.
_REFERENCE = re.compile(
    rf"(?P<repo>{_ID}/{_ID})(?:@(?P<revision>refs/(?:pr/\d+|convert/[^/@]+)|[^/@]+))?(?:/(?P<path>[^@]+))?", re.ASCII
)
_REVISION = re.compile(r"[\w][\w./+-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_SUFFIXES = (".apack", ".safetensors", ".bin", ".gguf", ".npz", ".pt", ".pth", ".ckpt", ".json")
_OTHER_KINDS = ("datasets", "spaces", "kernels", "buckets")


@dataclass(frozen=True)
class Reference:
    """A repository, a revision of it, and a place in it.

    Attributes:
        repo: `org/name`.
        revision: A branch, tag or commit; None: `main`.
        path: A folder or a pack in it; empty: the top.
    """

    repo: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        at = (
            f"@{quote(self.revision, safe='/' if self.revision.startswith('refs/') else '')}" if self.revision else ""
        )
        return f"{self.repo}{at}" + (f"/{self.path}" if self.path else "")

    @property
    def pinned(self) -> bool:
        """Is the revision a commit, which nobody can move?"""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None

    def below(self, name: str | None) -> Reference:
        """The folder `name` in it; itself for None and `.`."""
        if name is None or name == ".":
            return self
        return replace(self, path=_checked(f"{self.path}/{name}".strip("/"), name))

    def at(self, revision: str) -> Reference:
        """The same at another revision."""
        return replace(self, revision=_revision(revision, str(self)))


def is_repo(text: str) -> bool:
    """Is it `org/name`, and no more?"""
    return _REPO.fullmatch(text) is not None and not Path(text).name.endswith(_FILE_SUFFIXES)


def find(source: str | Path) -> Reference | None:
    """The reference that a source is; None: it is a local path, which wins wherever it exists.

    Raises:
        UsageError: it begins with `hf://` and is none.
    """
    if isinstance(source, Path):
        return None
    if source.startswith(SCHEME):
        return parse(source)
    if source[:1] in ("", ".", "/", "~") or source.endswith(_FILE_SUFFIXES):
        return None
    if Path(source).expanduser().exists() or not _REFERENCE.fullmatch(source.rstrip("/")):
        return None
    return parse(source)


def parse(text: str) -> Reference:
    """`org/name[@revision][/folder]`, with `hf://` before it or without.

    Raises:
        UsageError: it is none.
    """
    plain = text.removeprefix(SCHEME).removeprefix("models/").rstrip("/")
    found = _REFERENCE.fullmatch(plain)
    if found is None or plain.partition("/")[0] in _OTHER_KINDS:
        raise UsageError(
            f"{text!r:.200} names no model repository of the Hub",
            hint="org/name, org/name@revision, org/name@revision/folder; hf:// may stand before it",
        )
    revision = found["revision"]
    return Reference(
        found["repo"],
        None if revision is None else _revision(unquote(revision), text),
        _checked(found["path"] or "", text),
    )


def _revision(revision: str, where: str) -> str:
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise UsageError(f"{where:.200}: {revision!r:.100} is no name of a branch, tag or commit")
    return revision


def _checked(path: str, where: str) -> str:
    """A path in a repository, each part of it a plain name."""
    for part in path.split("/") if path else ():
        try:
            plain_name(part, where)
        except InvalidFile as e:
            raise UsageError(e.message) from e
    return path
