"""A repository at one commit: what is in it, and its files in the Hub's cache, each proven by its digest.

The client's plain HTTP download accepts a damaged file of the right size, so every file that it brings is hashed
and compared with what the commit's tree says: SHA-256 of large files, git's SHA-1 of small ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterpack import limits
from adapterpack.errors import HubError, InvalidFile
from adapterpack.hub import client
from adapterpack.hub.references import COMMIT, Reference
from adapterpack.io.files import OpenFile
from adapterpack.io.paths import plain_name
from adapterpack.tensor import chunks

_NEITHER = "no such file or directory, and "


@dataclass(frozen=True)
class Entry:
    """A file of a commit.

    Attributes:
        size: Bytes.
        sha256: Of a large file (LFS, Xet); None: it is a plain one.
        git_sha1: git's name of a plain file; None: it is a large one.
    """

    size: int
    sha256: str | None = None
    git_sha1: str | None = None


class Digests:
    """What a file's bytes are called: fed with them, compared with an `Entry`."""

    def __init__(self, size: int) -> None:
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    def update(self, data: bytes) -> None:
        self._sha256.update(data)
        self._git.update(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def agree(self, entry: Entry) -> bool:
        """Are these the bytes that the commit names?"""
        if entry.sha256 is not None:
            return self.sha256 == entry.sha256
        return entry.git_sha1 is None or self._git.hexdigest() == entry.git_sha1


class Snapshot:
    """A repository at one commit.

    Attributes:
        reference: With the commit for a revision.
        asked: The branch or tag that meant this commit; it is found offline by that, too.
        files: Path to entry, of all files of the repository.
    """

    def __init__(self, reference: Reference, files: Mapping[str, Entry], asked: str | None = None) -> None:
        self.reference = reference
        self.files = files
        self._asked = asked

    @property
    def commit(self) -> str:
        return str(self.reference.revision)

    def inside(self, path: str) -> dict[str, Entry]:
        """The files directly in a folder, by name."""
        start = f"{path}/" if path else ""
        return {
            name[len(start) :]: entry
            for name, entry in self.files.items()
            if name.startswith(start) and "/" not in name[len(start) :]
        }

    def cached(self, path: str) -> Path | None:
        """Where a file lies in the cache; None: it does not."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.reference.repo, path, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, paths: Iterable[str], *, prove: bool = True) -> Path:
        """Have files in the cache, and compare them with their digests.

        Args:
            prove: Compare those, too, that were in the cache before.

        Returns:
            The directory in the cache that is the top of this commit. What lies in it are links: nobody may write
            through them.

        Raises:
            HubError: it cannot be had.
            InvalidFile: what comes is not what the commit names, or has a name that no file should have.
        """
        missing: dict[str, bool] = {}
        for path in paths:
            for part in path.split("/"):
                plain_name(part, str(self.reference))
            here = self.cached(path)
            if here is None or (prove and not _is(here, self.files[path])):
                missing[path] = here is not None
        meter = client.Meter(sum(self.files[path].size for path in missing))
        for path, again in missing.items():
            self._download(path, meter, again=again)
        self._remember()
        return self.folder

    def _remember(self) -> None:
        """Note what the branch or tag means now where the client would, for runs without the network."""
        if self._asked is None or not self.folder.is_dir():
            return
        place = _storage(self.reference.repo) / "refs" / self._asked
        # A cache that others own is as good without.
        with contextlib.suppress(OSError):
            if place.is_file() and place.read_text() == self.commit:
                return
            place.parent.mkdir(parents=True, exist_ok=True)
            new = place.with_name(f"{place.name}.{os.getpid()}.incomplete")
            new.write_text(self.commit)
            new.replace(place)

    @property
    def folder(self) -> Path:
        """The directory in the cache that is the top of this commit."""
        return _storage(self.reference.repo) / "snapshots" / self.commit

    def _download(self, path: str, meter: client.Meter, *, again: bool) -> None:
        from huggingface_hub import hf_hub_download

        what, bar = f"{self.reference.repo}@{self.commit[:12]}/{path}", meter.bar()
        for force in (again, True):

            def get(force: bool = force) -> str:
                return str(
                    hf_hub_download(
                        self.reference.repo,
                        path,
                        revision=self.commit,
                        force_download=force,
                        token=client.token() or False,
                        endpoint=client.endpoint(),
                        library_name="adapterpack",
                        tqdm_class=bar,
                    )
                )

            if client.offline():
                raise HubError(
                    f"{what} is not in the local Hub cache, or damaged there; HF_HUB_OFFLINE is set",
                    hint="fetch it while online",
                )
            if _is(Path(client.ask(what, get)), self.files[path]):
                return
        raise InvalidFile(
            f"{what} arrives with other bytes than the commit names, twice",
            hint="a proxy or mirror may be damaging it: try another network, or HF_ENDPOINT",
        )


def _is(path: Path, entry: Entry) -> bool:
    with OpenFile(path) as file:
        if file.size != entry.size:
            return False
        found = Digests(file.size)
        for chunk in chunks(file.whole()):
            found.update(chunk)
    return found.agree(entry)


def _storage(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def look_up(reference: Reference, *, explicit: bool = False, cached: bool = False) -> Snapshot:
    """Find the commit that a reference means now, and what is in it.

    Args:
        explicit: Was it marked as a reference? Else a local path may have been meant, and errors say so.
        cached: Ask nobody: only what an earlier run left in the cache counts, as with HF_HUB_OFFLINE.

    Raises:
        HubError: there is none, it may not be seen, or nobody answers.
    """
    where = "" if explicit else _NEITHER
    if cached or client.offline():
        return _in_cache(reference, where)
    api = client.api()
    what, asked = str(reference), None
    if not reference.pinned:
        info = client.ask(what, lambda: api.model_info(reference.repo, revision=reference.revision), where=where)
        commit = str(info.sha)
        if not COMMIT.fullmatch(commit):
            raise HubError(f"{what}: the Hub names no commit")
        asked, reference = reference.revision or "main", replace(reference, revision=commit)
    return Snapshot(reference, client.ask(what, lambda: _tree(api, reference), where=where), asked)


def _tree(api: Any, reference: Reference) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for item in api.list_repo_tree(reference.repo, recursive=True, revision=reference.revision):
        if getattr(item, "blob_id", None) is None:
            continue
        if len(found) >= limits.REPO_FILES:
            raise InvalidFile(f"{reference} has more than {limits.REPO_FILES:,} files")
        large = item.lfs
        if large is None:
            found[item.path] = Entry(item.size, git_sha1=item.blob_id)
        else:
            found[item.path] = Entry(large.size, sha256=large.sha256)
    return found


def _in_cache(reference: Reference, where: str) -> Snapshot:
    """What an earlier run left in the cache. Blobs are called by their digests there."""
    storage = _storage(reference.repo)
    commit = reference.revision or "main"
    if not reference.pinned:
        try:
            commit = (storage / "refs" / commit).read_text().strip()
        except OSError:
            commit = ""
    folder = storage / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not folder.is_dir():
        raise HubError(
            f"{where}no such repository in the local Hub cache: {reference}",
            hint=f"fetch it while online: hf download {reference.repo}",
        )
    files: dict[str, Entry] = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory, name)
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = _named_by_blob(path)
    return Snapshot(replace(reference, revision=commit), files)


def _named_by_blob(path: Path) -> Entry:
    # One step only: the blob may be a link itself, into what repositories share under other names.
    blob, size = path.readlink().name if path.is_symlink() else "", path.stat().st_size
    hexadecimal = all(c in "0123456789abcdef" for c in blob)
    if hexadecimal and len(blob) == 64:
        return Entry(size, sha256=blob)
    return Entry(size, git_sha1=blob if hexadecimal and len(blob) == 40 else None)
