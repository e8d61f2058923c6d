"""Packs, written: frames are coded, proven and hashed by several threads, and written in order.

The same input, options and zstd give the same bytes, whatever the number of threads: what is chosen
depends on the bytes alone, and the order of everything is the plan's.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterpack.checkpoint import Checkpoint
from adapterpack.codecs import chain as chains
from adapterpack.containers.apack import choosing, layout, manifest, parsing
from adapterpack.containers.apack import file as outer
from adapterpack.containers.apack.choosing import Choice
from adapterpack.containers.apack.facts import Facts, References
from adapterpack.containers.apack.manifest import Frame, Manifest, Stream
from adapterpack.containers.apack.placing import Placing, StreamPlan, place
from adapterpack.errors import AdapterpackError, InvalidFile, WriteFailed
from adapterpack.io import atomic, zstd
from adapterpack.io.files import OpenFile
from adapterpack.tensor import Joined, Source, digest
from adapterpack.version import __version__

if TYPE_CHECKING:
    from adapterpack.adapter import Progress
    from adapterpack.tensor import Array

_MANIFEST_LEVEL = 19


@dataclass(frozen=True)
class _Coded:
    """A frame as it is stored."""

    frame: Frame
    data: bytes
    digest: bytes


class _Coder:
    """One stream of the plan, ready to be coded."""

    def __init__(self, plan: StreamPlan) -> None:
        self.plan = plan
        self.source = Joined(plan.parts)
        self.before: Source | None = None if plan.before is None else Joined(plan.before)
        self.choice: Choice | None = None

    def choose(self, total: int) -> None:
        self.choice = choosing.choose(self.plan, self.source, self.before, total)

    @property
    def chain(self) -> chains.Chain:
        assert self.choice is not None
        return self.choice.chain

    def spans(self) -> Iterator[tuple[int, int]]:
        assert self.choice is not None
        for start in range(0, self.source.nbytes, self.choice.frame):
            yield start, min(start + self.choice.frame, self.source.nbytes)

    def code(self, start: int, stop: int) -> _Coded:
        """One frame, decoded again and compared before anybody believes it."""
        import numpy as np

        assert self.choice is not None
        raw = np.frombuffer(self.source.read(start, stop), np.uint8)
        before: Array | None = None
        if self.chain.from_parent and self.before is not None:
            before = np.frombuffer(self.before.read(start, stop), np.uint8)
        segments = self.chain.split(raw, before)
        cuts = choosing.cuts_in(self.source, start, stop, self.chain.width) if self.choice.cut else []
        stored = self.choice.store(segments, cuts, raw.size // self.chain.width)
        dictionary = outer.dictionary_of(self.chain)
        again = [chains.restore(s, g.size, "a new frame", dictionary) for s, g in zip(stored, segments, strict=True)]
        if not np.array_equal(self.chain.join(again, raw.size, before), raw):
            raise WriteFailed("a frame does not decode to what was coded: memory or this version is faulty")
        sizes = tuple((g.size, len(s)) for s, g in zip(stored, segments, strict=True))
        data = b"".join(stored)
        return _Coded(Frame(raw.size, sizes), data, hashlib.sha256(data).digest())


def write(
    c: Checkpoint,
    destination: Path,
    files: dict[str, Source],
    facts: Facts,
    references: References,
    *,
    overwrite: bool,
    protected: tuple[Path, ...],
    jobs: int,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> tuple[Manifest, int]:
    """Write a pack, read it back and publish it.

    Args:
        c: The adapter: config and tensors.
        destination: The new file.
        files: All other files to carry, by path.
        facts: What it shall say of its making.
        references: What need not be stored, because it is elsewhere.
        jobs: Threads.
        dry_run: Only find out how large it would be.

    Returns:
        Its manifest and its bytes.

    Raises:
        ChangedWhileReading: the source changed meanwhile.
        WriteFailed: the system refuses, or what was written reads back otherwise.
    """
    plan = place(c, files, references)
    coders = [_Coder(stream) for stream in plan.streams]
    with ThreadPoolExecutor(jobs) as pool:
        hashes = [pool.submit(digest, source) for source in plan.sources]
        try:
            total = sum(coder.source.nbytes for coder in coders)
            for choosing_one in [pool.submit(coder.choose, total) for coder in coders]:
                choosing_one.result()
            frames = _ahead(pool, coders, jobs)
            if dry_run:
                made = _collect(coders, _reported(frames, coders, progress), lambda _: None)
                found = _manifest(plan, coders, made, [h.result() for h in hashes], facts, references)
                return found, sum(map(len, _ends(found, made))) + sum(frame.stored for frame in found.frames())
            with atomic.staged_file(destination, overwrite=overwrite, protected=protected) as stage:
                with atomic.create(stage) as out:
                    out.seek(outer.HEAD_BYTES)
                    made = _collect(coders, _reported(frames, coders, progress), out.write)
                    found = _manifest(plan, coders, made, [h.result() for h in hashes], facts, references)
                    head, tail = _ends(found, made)
                    out.write(tail)
                    # Last, so that what was cut off before has no header.
                    out.seek(0)
                    out.write(head)
                c.still_same()
                _read_back(stage, [coded for frames in made for coded in frames], pool)
                return found, stage.stat().st_size
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@dataclass(frozen=True)
class _Written:
    """What is kept of a frame once it is written."""

    frame: Frame
    digest: bytes


def _collect(
    coders: list[_Coder], frames: Iterator[tuple[int, _Coded]], write: Callable[[bytes], object]
) -> list[list[_Written]]:
    made: list[list[_Written]] = [[] for _ in coders]
    for n, coded in frames:
        write(coded.data)
        made[n].append(_Written(coded.frame, coded.digest))
    return made


def _reported(
    frames: Iterator[tuple[int, _Coded]], coders: list[_Coder], progress: Progress | None
) -> Iterator[tuple[int, _Coded]]:
    done, total = 0, sum(coder.source.nbytes for coder in coders)
    for n, coded in frames:
        yield n, coded
        done += coded.frame.size
        if progress is not None:
            progress("pack", done, total)


def _ahead(pool: ThreadPoolExecutor, coders: list[_Coder], jobs: int) -> Iterator[tuple[int, _Coded]]:
    """Frames in order, a few of them coded ahead of the one that is asked for."""
    waiting: deque[tuple[int, Future[_Coded]]] = deque()
    for n, coder in enumerate(coders):
        for span in coder.spans():
            waiting.append((n, pool.submit(coder.code, *span)))
            if len(waiting) > 2 * jobs:
                number, future = waiting.popleft()
                yield number, future.result()
    while waiting:
        number, future = waiting.popleft()
        yield number, future.result()


def _manifest(
    plan: Placing,
    coders: list[_Coder],
    made: list[list[_Written]],
    hashes: list[str],
    facts: Facts,
    references: References,
) -> Manifest:
    from_parent = plan.uses_parent or any(coder.chain.from_parent for coder in coders)
    streams = [
        Stream(coder.chain, tuple(w.frame for w in written)) for coder, written in zip(coders, made, strict=True)
    ]
    return Manifest(
        producer=f"adapterpack {__version__}, zstd {zstd.version()}",
        method=facts.method,
        encoding=facts.encoding,
        grade=facts.grade,
        files=tuple(replace(file, sha256=h) for file, h in zip(plan.files, hashes, strict=True)),
        tensors=tuple(plan.tensors),
        streams=tuple(streams),
        recipes=tuple(plan.recipes),
        classes=tuple(plan.classes),
        parent=references.parent if from_parent else None,
        base=references.base if plan.uses_base else None,
        max_error=facts.max_error,
        error=facts.error,
        source_bytes=facts.source_bytes,
        dropped=facts.dropped,
    )


def _ends(m: Manifest, made: list[list[_Written]]) -> tuple[bytes, bytes]:
    """What comes before the frames, and what comes after them."""
    frames = sum(frame.stored for frame in m.frames())
    text = manifest.dump(m)
    try:
        # Whatever a reader would refuse is not written either.
        layout.account(parsing.parse(text, "the new pack"), "the new pack", frames)
    except AdapterpackError as e:
        raise WriteFailed(f"this adapter does not fit in a pack: {e.message}") from e
    stored = zstd.compress(text, _MANIFEST_LEVEL, outer.dictionary())
    digests = b"".join(w.digest for written in made for w in written)
    header = outer.head(frames, len(digests), len(stored))
    return header, digests + stored + outer.seal(header, digests, stored)


def _read_back(stage: Path, frames: list[_Written], pool: ThreadPoolExecutor) -> None:
    """What lies there now, against what was meant: the seal, and every frame."""
    otherwise = WriteFailed(f"{stage} does not read back as it was written", hint="the disk may be failing")
    with OpenFile(stage) as file:
        try:
            outer.read(file)
        except InvalidFile as e:
            # Of a file that was fetched the reader would say: fetch it again.
            raise otherwise from e

        def check(first: int, stop: int, digest: bytes) -> bool:
            return hashlib.sha256(file.read(first, stop)).digest() == digest

        at, waiting = outer.HEAD_BYTES, []
        for written in frames:
            waiting.append(pool.submit(check, at, at + written.frame.stored, written.digest))
            at += written.frame.stored
        if not all(future.result() for future in waiting):
            raise otherwise
