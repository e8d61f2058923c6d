"""Writes the shards of a merged model: untouched bytes are copied by the kernel, touched tensors computed in blocks.

Several workers share one list of work: spans to copy, and runs of blocks to compute. Memory holds a few
blocks for each worker and the factors of the tensors at hand, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from adapterpack import exactness, plan
from adapterpack.adapter import Block, Progress
from adapterpack.backend import Backend
from adapterpack.io.files import FileSpan, start_writeback, write
from adapterpack.layout import Segment, Shard, not_finite
from adapterpack.tensor import Source, chunks, nonfinite

_RUN = 16 << 20
"""Bytes of one piece of computing: enough blocks to be worth a turn, few enough to share a tensor among workers."""
_SPAN = 64 << 20
"""Bytes of one piece of copying: so often is progress told."""


_WRITEBACK = 64 << 20
"""Bytes that may wait before the disk is set to work."""
_TELL = 4 << 20
"""Bytes from one word of progress to the next."""
_FINISHERS = 8
"""How many shards may wait for the disk, or to be reported, while others are written."""

Finished = Callable[[Shard, list[str]], None]
"""What to do once a shard is durable; it is told which tensors really changed."""


def write_shards(
    stage: Path,
    shards: Sequence[Shard],
    backend: Future[Backend],
    *,
    jobs: int,
    once: bool,
    finished: Finished,
    progress: Progress | None = None,
) -> None:
    """Write shards into a directory, each durable before it is reported.

    Args:
        backend: Where changes are computed; as long as it is not there, spans are copied.
        jobs: Workers. One: all in the calling thread, in order.
        once: f64 and one rounding; else PEFT's arithmetic.

    Raises:
        InvalidFile: a result is not finite, or a source changed.
        OSError: the system refuses.
    """
    _keep_freed_memory()
    told = _Told(progress, sum(s.size for s in shards))
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(_Output(stage, s, told)) for s in shards]
        if jobs == 1:
            for output in outputs:
                for copy in _copies(output):
                    copy.run()
                for computation in _computations(output, backend.result(), once):
                    computation.run()
                output.finish(finished)
        else:
            _share(outputs, backend, jobs, once, finished)


def _share(outputs: list[_Output], backend: Future[Backend], jobs: int, once: bool, finished: Finished) -> None:
    queue = _Queue(outputs, backend, once)
    finishing: list[Future[None]] = []

    def loop() -> None:
        with _stopping(queue):
            while (work := queue.take()) is not None:
                work.run()
                if work.output.complete():
                    finishing.append(finisher.submit(finish, work.output))

    def finish(output: _Output) -> None:
        with _stopping(queue):
            output.finish(finished)

    # Some for finishing, too: one shard that waits to be reported does not keep others from the disk.
    with ThreadPoolExecutor(_FINISHERS) as finisher, ThreadPoolExecutor(jobs) as workers:
        running = [workers.submit(loop) for _ in range(jobs)]
        try:
            for future in running:
                future.result()
            for future in finishing:
                future.result()
            for output in outputs:
                if not any(s.tensor.nbytes for s in output.shard.segments):
                    output.finish(finished)
        finally:
            # Interrupted from outside: the pools wait for their threads, and those find nothing more to do.
            queue.stop()


@contextlib.contextmanager
def _stopping(queue: _Queue) -> Iterator[None]:
    """What fails here ends the work of all."""
    try:
        yield
    except BaseException:
        queue.stop()
        raise


def _keep_freed_memory() -> None:
    """Let the allocator keep what blocks free, for the next block: else each is paid for in page faults again.

    glibc takes the size of the largest mapping that was given back as a sign of what is short-lived.
    """
    del [bytearray(8 * exactness.BLOCK)][:]


class _Told:
    """Counts the bytes written and tells of them, whichever worker wrote them."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._done = self._last = 0
        self._lock = threading.Lock()

    def more(self, n: int) -> None:
        with self._lock:
            self._done += n
            if self._progress and (self._done == self._total or self._done - self._last > _TELL):
                self._last = self._done
                self._progress("merge", self._done, self._total)


class _Output:
    """A shard on its way to the disk."""

    def __init__(self, stage: Path, shard: Shard, told: _Told) -> None:
        self.shard = shard
        self._path, self._told = stage / shard.name, told
        self._fd = -1
        self._left = shard.size
        self._waiting = 0
        self._changed: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _opened(self) -> int:
        with self._lock:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                write(self._fd, self.shard.header, 0)
                self._left -= len(self.shard.header)
                self._told.more(len(self.shard.header))
        return self._fd

    def put(self, data: object, at: int, n: int) -> None:
        write(self._opened(), data, at)
        self._wrote(n)

    def copy(self, source: FileSpan, start: int, stop: int, at: int) -> None:
        source.file.copy(source.offset + start, source.offset + stop, self._opened(), at)
        self._wrote(stop - start)

    def _wrote(self, n: int) -> None:
        with self._lock:
            self._left -= n
            self._waiting += n
            due = self._waiting >= _WRITEBACK
            if due:
                self._waiting = 0
        if due:
            start_writeback(self._opened())
        self._told.more(n)

    def is_changed(self, name: str) -> bool:
        return name in self._changed

    def changed(self, name: str) -> None:
        self._changed.add(name)

    def complete(self) -> bool:
        """Is all written? True for one caller only."""
        with self._lock:
            done = self._left == 0
            self._left -= done
            return done

    def finish(self, finished: Finished) -> None:
        os.fsync(self._opened())
        self.__exit__()
        finished(self.shard, [s.name for s in self.shard.segments if s.name in self._changed])


_Work: TypeAlias = "_Copy | _Compute | _Encode"


class _Queue:
    """What is left to do, in the order of the shards. Copying fills the time until the backend is there."""

    def __init__(self, outputs: list[_Output], backend: Future[Backend], once: bool) -> None:
        self._order = {id(o): n for n, o in enumerate(outputs)}
        self._copies = deque(w for o in outputs for w in _copies(o))
        self._backend = backend
        self._computations = self._all_computations(outputs, once)
        self._next: _Compute | _Encode | None = None
        self._lock = threading.Lock()
        self._stopped = False

    def _all_computations(self, outputs: list[_Output], once: bool) -> Iterator[_Compute | _Encode]:
        for output in outputs:
            yield from _computations(output, self._backend.result(), once)

    def stop(self) -> None:
        self._stopped = True

    def take(self) -> _Work | None:
        with self._lock:
            if self._stopped:
                return None
            if self._copies and not self._backend.done():
                return self._copies.popleft()
            if self._next is None:
                self._next = next(self._computations, None)
            work: _Work | None = self._next
            if self._copies and (work is None or self._rank(self._copies[0]) <= self._rank(work)):
                return self._copies.popleft()
            self._next = None
            return work

    def _rank(self, work: _Work) -> int:
        return self._order[id(work.output)]


@dataclass(frozen=True)
class _Copy:
    """Bytes of a source, as they are."""

    output: _Output
    source: Source
    start: int
    stop: int
    at: int

    def run(self) -> None:
        if isinstance(self.source, FileSpan):
            self.output.copy(self.source, self.start, self.stop, self.at)
            return
        at = self.at
        for chunk in chunks(self.source, start=self.start, stop=self.stop):
            self.output.put(chunk, at, len(chunk))
            at += len(chunk)


def _copies(output: _Output) -> Iterator[_Copy]:
    """The untouched segments; neighbours in one file are one span."""
    span: tuple[Source, int] | None = None
    for segment in output.shard.segments:
        if segment.touched or not segment.tensor.nbytes:
            continue
        here = segment.tensor.source, segment.at
        joined = None if span is None else _joined(span, here)
        if span is not None and joined is None:
            yield from _pieces(output, *span)
        span = joined or here
    if span is not None:
        yield from _pieces(output, *span)


def _joined(a: tuple[Source, int], b: tuple[Source, int]) -> tuple[Source, int] | None:
    """Two spans as one, if b begins where a ends, in the old file and in the new one."""
    (x, at), (y, then) = a, b
    if not (isinstance(x, FileSpan) and isinstance(y, FileSpan)) or x.file is not y.file:
        return None
    if (y.offset, then) != (x.offset + x.nbytes, at + x.nbytes):
        return None
    return FileSpan(x.file, x.offset, x.nbytes + y.nbytes), at


def _pieces(output: _Output, source: Source, at: int) -> Iterator[_Copy]:
    for start in range(0, source.nbytes, _SPAN):
        yield _Copy(output, source, start, min(start + _SPAN, source.nbytes), at + start)


class _Reading:
    """The changes of one tensor, read when the first block is computed and let go with the last."""

    def __init__(self, segment: Segment, xp: Backend, once: bool) -> None:
        self.segment, self._xp, self.once = segment, xp, once
        self._lock = threading.Lock()
        self._loaded: plan.LoadedSteps | None = None

    def loaded(self) -> plan.LoadedSteps:
        with self._lock:
            if self._loaded is None:
                s = self.segment
                self._loaded = plan.LoadedSteps.read(s.tensor, s.steps, self._xp, s.origin)
            return self._loaded


_one_whole = threading.Lock()
"""Tensors that cannot be cut are computed one at a time: memory holds the largest, not one for each worker."""


def _quiet() -> contextlib.AbstractContextManager[object]:
    """numpy warns of NaN and infinity on the way; what comes out is looked at."""
    import numpy as np

    return np.errstate(all="ignore")


@dataclass(frozen=True)
class _Compute:
    """A run of blocks of one touched tensor."""

    output: _Output
    reading: _Reading
    blocks: tuple[Block, ...]

    def run(self) -> None:
        large = self.blocks[0].whole and self.reading.segment.tensor.nbytes > _RUN
        with _one_whole if large else contextlib.nullcontext(), _quiet():
            loaded = self.reading.loaded()
            for block in self.blocks:
                self._block(loaded, block)

    def _block(self, loaded: plan.LoadedSteps, block: Block) -> None:
        segment, xp = self.reading.segment, loaded.xp
        before = loaded.base(block)
        after = xp.buffer(loaded.changed(before, block, once=self.reading.once))
        if nonfinite(after, segment.tensor.dtype):
            raise not_finite(segment.steps, segment.tensor)
        if not self.output.is_changed(segment.name):
            old = xp.buffer(xp.round(before, segment.tensor.dtype))
            if not (after == old).all():
                self.output.changed(segment.name)
        row = segment.tensor.nbytes // plan.as_matrix(segment.tensor.shape)[0]
        self.output.put(after, segment.at + block.rows.start * row, after.nbytes)


@dataclass(frozen=True)
class _Encode:
    """A stored tensor of a changed tensor that is quantised again."""

    output: _Output
    segment: Segment
    xp: Backend
    once: bool

    def run(self) -> None:
        assert self.segment.encoding is not None
        with _one_whole, _quiet():
            data = self.segment.encoding.take(self.segment.name, self.xp, self.once)
        if data.tobytes() != self.segment.tensor.bytes():
            self.output.changed(self.segment.name)
        self.output.put(data, self.segment.at, data.nbytes)


def _computations(output: _Output, xp: Backend, once: bool) -> Iterator[_Compute | _Encode]:
    for segment in output.shard.segments:
        if segment.encoding is not None:
            yield _Encode(output, segment, xp, once)
            continue
        if not segment.steps or not segment.tensor.nbytes:
            continue
        blocks = plan.blocks(segment.tensor, segment.steps, xp, once=once)
        reading = _Reading(segment, xp, once)
        per = max(1, _RUN * len(blocks) // segment.tensor.nbytes)
        for first in range(0, len(blocks), per):
            yield _Compute(output, reading, tuple(blocks[first : first + per]))
