"""The outer shape of a pack: a safetensors file of four blobs, and the seal over all but the frames."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from adapterpack import limits
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.io import zstd
from adapterpack.io.files import OpenFile
from adapterpack.io.safetensors import METADATA

if TYPE_CHECKING:
    from adapterpack.codecs.chain import Chain

SUFFIX = ".apack"
VERSION = "1"
HEAD_BYTES = 384
"""The header with its length and padding: always as long, so that it can be written last."""
SEAL_BYTES = DIGEST_BYTES = 32
SEAL, MANIFEST, DIGESTS, FRAMES = "0", "1", "2", "3"
_MARK = b'{"__metadata__":{"apack":'


def is_pack(path: Path) -> bool:
    """Is it called a pack, or does it begin like one?"""
    if path.suffix == SUFFIX:
        return True
    if not path.is_file():
        return False
    with OpenFile(path) as file:
        return file.read(8, min(file.size, 8 + len(_MARK))) == _MARK if file.size > 8 else False


@functools.cache
def dictionary() -> bytes:
    """What small files and manifests have in common: part of the format, and of the package."""
    return Path(__file__).with_name("dictionary").read_bytes()


def dictionary_of(chain: Chain) -> bytes:
    """What zstd frames of a chain are coded with."""
    return dictionary() if chain.text else b""


def head(frames: int, digests: int, manifest: int) -> bytes:
    """The 8 length bytes and the header for blobs of these sizes; frames lie first, the seal last."""
    entries: dict[str, object] = {METADATA: {"apack": VERSION}}
    end = 0
    for name, size in ((FRAMES, frames), (DIGESTS, digests), (MANIFEST, manifest), (SEAL, SEAL_BYTES)):
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    return (HEAD_BYTES - 8).to_bytes(8, "little") + text.ljust(HEAD_BYTES - 8)


def seal(header: bytes, digests: bytes, manifest: bytes) -> bytes:
    """SHA-256 of the header with its length bytes, the digests of the frames, and the manifest as stored."""
    return hashlib.sha256(header + digests + manifest).digest()


@dataclass(frozen=True)
class Outer:
    """A pack, its seal checked.

    Attributes:
        frames: Bytes of all frames; they begin at byte `HEAD_BYTES`.
        digests: SHA-256 of each frame, one behind the other.
        manifest: Its JSON.
    """

    frames: int
    digests: bytes
    manifest: bytes


def read(file: OpenFile) -> Outer:
    """Read everything of a pack but its frames.

    Raises:
        InvalidFile: no pack, truncated, extended, or damaged.
        Unsupported: of another version.
    """
    where = str(file.path)

    def bad(reason: str) -> NoReturn:
        raise InvalidFile(f"{where} is no whole pack: {reason}", hint="fetch it again, or restore it from a copy")

    if file.size < HEAD_BYTES:
        bad(f"{file.size} bytes are too few")
    header = file.read(0, HEAD_BYTES)
    sizes = _sizes(header, where)
    if sizes is None or header != head(*sizes):
        bad("its header is damaged, or of another file")
    frames, digests, manifest = sizes
    if file.size != HEAD_BYTES + frames + digests + manifest + SEAL_BYTES:
        bad(f"it has {file.size:,} bytes, its header accounts for {HEAD_BYTES + sum(sizes) + SEAL_BYTES:,}")
    if manifest > limits.MANIFEST_BYTES or digests > limits.FRAMES * DIGEST_BYTES or digests % DIGEST_BYTES:
        bad("its manifest or its list of frames is too long")
    tail = file.read(HEAD_BYTES + frames, file.size)
    listed, stored, mark = tail[:digests], tail[digests:-SEAL_BYTES], tail[-SEAL_BYTES:]
    if seal(header, listed, stored) != mark:
        bad("its seal is broken: the header, the manifest or the list of frames is damaged")
    size = zstd.stated_size(stored, f"manifest of {where}")
    if size > limits.MANIFEST_BYTES:
        bad(f"its manifest claims {size:,} bytes; at most {limits.MANIFEST_BYTES:,} are read")
    return Outer(frames, listed, zstd.decompress(stored, size, f"manifest of {where}", dictionary()))


def _sizes(header: bytes, where: str) -> tuple[int, int, int] | None:
    """Bytes of frames, digests and manifest as the header has them; None if it makes no sense."""
    try:
        entries = json.loads(header[8:])
        version = entries[METADATA]["apack"]
        if version != VERSION:
            raise Unsupported(
                f"{where} is a pack of version {version!r:.40}; this adapterpack reads version {VERSION}",
                hint="update adapterpack",
            )
        found = [entries[name]["shape"][0] for name in (FRAMES, DIGESTS, MANIFEST)]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    if not all(type(n) is int and 0 <= n <= limits.PACK_BYTES for n in found):
        return None
    return found[0], found[1], found[2]
