"""An adapter from the Hub: pinned to a commit, only what is needed, every byte proven before it is in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterpack import hub, limits, release, sources
from adapterpack.containers import apack, peft
from adapterpack.errors import InvalidFile, UsageError
from adapterpack.io import atomic
from adapterpack.io.files import OpenFile, read_small
from adapterpack.io.paths import plain_name
from adapterpack.tensor import chunks
from adapterpack.unpack import unpack

if TYPE_CHECKING:
    from adapterpack.adapter import Progress


@dataclass(frozen=True)
class PulledFile:
    """A file that was pulled.

    Attributes:
        name: In the destination.
        bytes: Its size.
        sha256: Its digest, of the bytes as they were written.
    """

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Pull:
    """What `pull` brought.

    Attributes:
        output: The new directory, or pack.
        reference: With the commit: the same again at any time.
        commit: The commit.
        unpacked: Was it a pack, and is it a directory now?
        grade: Of a pack: what was lost when it was made; None for others.
        files: What was fetched.
        bytes: Of all files in the destination.
        manifest: Did a manifest of `push` say what the files should be?
        notes: What the user should know.
    """

    output: str
    reference: str
    commit: str
    unpacked: bool
    grade: str | None
    files: tuple[PulledFile, ...]
    bytes: int
    manifest: bool
    notes: tuple[str, ...]


def pull(
    reference: str,
    destination: str | Path,
    *,
    subfolder: str | None = None,
    expect_sha256: str | None = None,
    token: str | None = None,
    base: str | Path | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Pull:
    """Fetch an adapter from the Hub into a directory.

    Files come through the Hub's cache. Each is held against the digest that the commit names, and against the
    manifest that `push` wrote, if there is one. A pickle is never fetched.

    Args:
        reference: `org/name`, `org/name@revision`, `org/name@revision/folder`, or a pack in it.
        destination: The new directory; a name that ends in `.apack` keeps a pack as it is.
        subfolder: Which adapter of several.
        expect_sha256: Of adapter_model.safetensors, or of the pack: digests in a repository tell accidents alone.
        token: Of the Hub; None: HF_TOKEN, else the login.
        base: The base model, where a pack takes tensors from it.
        jobs: Threads, to unpack.

    Raises:
        HubError: there is no such adapter, it may not be seen, or nobody answers.
        InvalidFile: what came is not what the commit, the manifest or the user says.
        PickleRefused: there is nothing but a pickle.
    """
    target = Path(destination).expanduser()
    found = hub.parse(reference).below(subfolder)
    as_pack = target.suffix == apack.SUFFIX
    atomic.check_destination(target.absolute(), overwrite=overwrite, file=as_pack)
    with hub.credentials(token), hub.reporting(progress):
        snapshot = hub.look_up(found, explicit=True)
        folder = snapshot.reference.path
        wanted = sources.needed(snapshot, folder)
        packed = len(wanted) == 1
        if as_pack and not packed:
            hint = f"pull it into a directory, then compress that to {target.name}"
            raise UsageError(f"{snapshot.reference} is no pack", hint=hint)
        names = _names(wanted, snapshot)
        top = snapshot.fetch([sources.join(folder, name) for name in wanted])
        places = {name: top / sources.join(folder, path) for name, path in zip(names, wanted, strict=True)}
        wishes = _Wishes(snapshot, _manifest(snapshot, folder), expect_sha256)
        grade = None
        if packed and not as_pack:
            ((name, place),) = places.items()
            files: tuple[PulledFile, ...] = (wishes.check(name, place),)
            sources.fetch_parents(snapshot, place)
            result = unpack(place, target, base=base, jobs=jobs, overwrite=overwrite, progress=progress)
            size, grade = result.bytes, result.grade
        else:
            files = _copy(places, target, wishes, as_pack=as_pack, overwrite=overwrite)
            size = sum(f.bytes for f in files)
        return Pull(
            output=str(target),
            reference=str(snapshot.reference),
            commit=snapshot.commit,
            unpacked=packed and not as_pack,
            grade=grade,
            files=files,
            bytes=size,
            manifest=wishes.said is not None,
            notes=wishes.notes,
        )


def _names(wanted: list[str], snapshot: hub.Snapshot) -> list[str]:
    """The names that files will have: safe on every system, and no two alike."""
    own = snapshot.reference.path.rpartition("/")[2]
    names = [plain_name(name or own, str(snapshot.reference)) for name in wanted]
    if len({name.casefold() for name in names}) != len(names):
        raise InvalidFile(f"{snapshot.reference} has two files whose names differ in case alone")
    return names


def _manifest(snapshot: hub.Snapshot, folder: str) -> Mapping[str, tuple[int, str]] | None:
    """What `push` said of the files in a folder, by name; None: nothing of ours is there."""
    place = folder.rpartition("/")[0] if folder.endswith(apack.SUFFIX) else folder
    # A pack beside an adapter lies in a folder of its own, and is listed above it.
    for start in dict.fromkeys((place, place.rpartition("/")[0])):
        path = sources.join(start, peft.MANIFEST)
        if path in snapshot.files and snapshot.files[path].size <= limits.CONFIG_BYTES:
            said = release.read_manifest(read_small(snapshot.fetch([path]) / path, limits.CONFIG_BYTES), path)
            below = place[len(start) :].strip("/")
            inside = {n[len(below) :].lstrip("/"): f for n, f in said.items() if n.startswith(below)}
            if start == place or inside:
                return inside
    return None


@dataclass(frozen=True)
class _Wishes:
    """What files should be: by the commit, by the manifest, by the user."""

    snapshot: hub.Snapshot
    said: Mapping[str, tuple[int, str]] | None
    expected: str | None

    @property
    def notes(self) -> tuple[str, ...]:
        return () if self.said is not None else ("no manifest of a push is there: the commit's digests alone agree",)

    def check(self, name: str, place: Path, to: Path | None = None) -> PulledFile:
        """Hash a file of the cache, as it is copied where it shall be copied.

        Raises:
            InvalidFile: it is another one.
        """
        with OpenFile(place) as file:
            digests = hub.Digests(file.size)
            if to is None:
                for chunk in chunks(file.whole()):
                    digests.update(chunk)
            else:
                with atomic.create(to) as out:
                    for chunk in chunks(file.whole()):
                        digests.update(chunk)
                        out.write(chunk)
            size, sha256 = file.size, digests.sha256
        if not digests.agree(self.snapshot.files[place.relative_to(self.snapshot.folder).as_posix()]):
            raise InvalidFile(f"{name} changed in the cache meanwhile", hint="pull it again")
        wanted = self.expected if _is_adapter(name) and name != peft.CONFIG else None
        if wanted is not None and sha256 != wanted.strip().lower():
            raise InvalidFile(
                f"{name} has SHA-256 {sha256}, not the expected {wanted:.80}",
                hint="it is another file than the one that was promised",
            )
        known = self.said or {}
        unlisted = self.said is not None and name not in known and _is_adapter(name)
        if unlisted or known.get(name, (size, sha256)) != (size, sha256):
            raise InvalidFile(
                f"{name} is not the file that was pushed: {peft.MANIFEST} names another, or none",
                hint="somebody changed it on the Hub since; pull the commit of the push, or push it again",
            )
        return PulledFile(name, size, sha256)


def _is_adapter(name: str) -> bool:
    return name in (peft.CONFIG, peft.WEIGHTS) or name.endswith(apack.SUFFIX)


def _copy(
    places: Mapping[str, Path], target: Path, wishes: _Wishes, *, as_pack: bool, overwrite: bool
) -> tuple[PulledFile, ...]:
    """Real files of the links of the cache, hashed once more as they are written."""
    protected = (wishes.snapshot.folder,)
    if as_pack:
        ((name, place),) = places.items()
        with atomic.staged_file(target, overwrite=overwrite, protected=protected) as stage:
            return (wishes.check(name, place, stage),)
    with atomic.staged_directory(target, overwrite=overwrite, protected=protected) as stage:
        return tuple(wishes.check(name, place, stage / name) for name, place in places.items())
