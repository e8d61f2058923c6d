"""Files of a repository, read where they lie: headers by ranged requests, values from the cache once they are needed.

A safetensors header, and what a pack says of itself, is a thousandth of the file: to know shapes, no more is fetched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapterpack import limits
from adapterpack.errors import HubError, InvalidFile
from adapterpack.hub import client
from adapterpack.hub.snapshot import Snapshot
from adapterpack.io.files import Folder, OpenFile

_FIRST = 16 << 10
"""What the first request for a file fetches (bytes): most headers of one shard of many, all of a small file's."""
_AT_ONCE = 8
_RANGED = (".safetensors", ".apack")
_SECONDS = 30.0


class RemoteFolder(Folder):
    """A folder of a repository at one commit."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.entries = snapshot.inside(snapshot.reference.path)
        # It is shown, and no more: nothing is at such a place.
        super().__init__(Path(str(snapshot.reference)))
        self._begun: dict[str, RemoteFile] = {}

    def is_there(self) -> bool:
        return bool(self.entries)

    def has(self, name: str) -> bool:
        return name in self.entries

    def names(self) -> list[str]:
        return sorted(self.entries)

    def sizes(self) -> dict[str, int]:
        """Name of each file to its bytes."""
        return {name: entry.size for name, entry in self.entries.items()}

    def open(self, name: str) -> OpenFile:
        if name in self._begun:
            return self._begun.pop(name)
        if name not in self.entries:
            raise InvalidFile(f"{self.path} has no file {name!r:.100}")
        path = self._path(name)
        if name.endswith(_RANGED) and self.snapshot.cached(path) is None:
            return RemoteFile(self.snapshot, path)
        # Weights in the cache were proven as they came; to hash them for the sake of a header takes too long.
        return OpenFile(self.snapshot.fetch([path], prove=not name.endswith(_RANGED)) / path)

    def expect(self, names: Iterable[str]) -> None:
        far = [n for n in names if n in self.entries and n.endswith(_RANGED)]
        far = [n for n in far if self.snapshot.cached(self._path(n)) is None]
        if len(far) < 2:
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            files = pool.map(lambda name: RemoteFile(self.snapshot, self._path(name)).begin(), far)
            self._begun = dict(zip(far, files, strict=True))

    def _path(self, name: str) -> str:
        return f"{self.snapshot.reference.path}/{name}".lstrip("/")


class RemoteFile(OpenFile):
    """A file of a repository: its header, or a pack's two ends, by ranges; anything else brings all of it here."""

    def __init__(self, snapshot: Snapshot, path: str) -> None:
        self.path = Path(f"{snapshot.reference.repo}@{snapshot.commit[:12]}", path)
        self.size = snapshot.files[path].size
        self.stamp = (self.size, 0)
        self._fd = -1
        self._snapshot, self._name = snapshot, path
        self._head, self._token = b"", client.token()
        self._local: OpenFile | None = None

    def begin(self) -> RemoteFile:
        """Fetch the header now."""
        if self.size >= 8:
            front = self._front()
            if front <= min(self.size, 8 + limits.HEADER_BYTES):
                self._extend(front)
        return self

    def read(self, start: int, stop: int) -> bytes:
        if self._local is None and self._local_not_needed(start, stop):
            if stop <= max(self._front(), 8):
                self._extend(stop)
                return self._head[start:stop]
            return self._range(start, stop)
        return self._here().read(start, stop)

    def _local_not_needed(self, start: int, stop: int) -> bool:
        if self.size < 8 or stop > self.size:
            return False
        tail = stop == self.size and self._name.endswith(".apack") and start >= self._front()
        return stop <= max(self._front(), 8) or tail

    def _front(self) -> int:
        """Where the header ends, by its first 8 bytes."""
        self._extend(8)
        return 8 + int.from_bytes(self._head[:8], "little")

    def _extend(self, stop: int) -> None:
        have = len(self._head)
        if have < stop:
            self._head += self._range(have, min(max(stop, _FIRST), self.size))

    def _range(self, start: int, stop: int) -> bytes:
        with client.credentials(self._token):
            return client.ask(str(self.path), lambda: _get(self._snapshot, self._name, start, stop))

    def _here(self) -> OpenFile:
        """The whole file, from the cache, proven."""
        if self._local is None:
            with client.credentials(self._token):
                self._local = OpenFile(self._snapshot.fetch([self._name]) / self._name)
        return self._local

    def copy(self, start: int, stop: int, fd: int, at: int) -> None:
        self._here().copy(start, stop, fd, at)

    def check_unchanged(self) -> None:
        """A commit never changes; its copy in the cache might."""
        if self._local is not None:
            self._local.check_unchanged()

    def close(self) -> None:
        if self._local is not None:
            self._local.close()


def _get(snapshot: Snapshot, path: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file, and no more of it."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(snapshot.reference.repo, path, revision=snapshot.commit, endpoint=client.endpoint())
    headers = build_hf_headers(token=client.token() or False, library_name="adapterpack")
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    whole = (start, stop) == (0, snapshot.files[path].size)
    # Tried again by the caller; the library would wait on its own.
    with http_stream_backoff("GET", url, headers=headers, timeout=_SECONDS, max_retries=0) as response:
        hf_raise_for_status(response)
        if response.status_code != 206 and not whole:
            raise HubError(
                f"the server of {path} does not give parts of files",
                hint="fetch all of it: adapterpack pull, or hf download",
            )
        found = bytearray()
        for part in itertools.chain(response.iter_bytes(), (b"",)):
            found += part
            if len(found) >= stop - start:
                break
    if len(found) != stop - start:
        raise ConnectionError(f"{len(found):,} of {stop - start:,} bytes came")
    return bytes(found)
