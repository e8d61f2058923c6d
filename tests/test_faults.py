"""Kills and failing system calls at every write and rename of convert and merge: old or new, never torn.

Run by `make faults` (Linux, strace). Where strace cannot run these tests fail: a silent skip would prove nothing.

Every fault point is visited, none is drawn by lot: a first run is recorded, then each of its mutating system calls
fails (no space, I/O error) or is the last one (SIGKILL). The command line runs in children of one process that has
imported everything, so that a run takes a moment and its system calls are its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import oracle
import pytest
from peft import LoraConfig, VBLoRAConfig

pytestmark = pytest.mark.faults

CALLS = ("openat", "write", "pwrite64", "fsync", "ftruncate", "copy_file_range", "mkdir", "rename", "renameat2")
FAULTS = ("error=ENOSPC", "error=EIO", "signal=SIGKILL")
_SECONDS = 120

_NURSERY = """
import ctypes, json, os, signal, sys
import torch
torch.set_num_threads(1)
from adapterpack.cli import main

def child(argv, out, err, traced):
    for path, fd in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), fd)
    if traced:
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))  # PR_SET_PTRACER, any: for kernels with Yama
        signal.sigwait({signal.SIGUSR1})
    sys.argv = ["adapterpack", *argv]
    try:
        main()
    except SystemExit as e:
        os._exit(e.code)

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            child(**json.loads(line))
        finally:
            os._exit(99)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """How a run ended, and its system calls."""

    code: int
    err: str
    log: str

    @property
    def hit(self) -> str | None:
        """The call that the fault hit."""
        lines = [line for line in self.log.splitlines() if "(INJECTED)" in line]
        if not lines and "+++ killed by SIGKILL +++" in self.log:
            lines = [line for line in self.log.splitlines() if "(" in line and not line.startswith("---")][-1:]
        return lines[0] if lines else None


class Nursery:
    """The process that has imported everything; its children are the runs."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-c", _NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )

    def run(self, argv: list[str], *strace: str) -> Done:
        """Run the command line; traced if options for strace are given."""
        assert self._process.stdin is not None and self._process.stdout is not None
        out, err, log = (self._scratch / name for name in ("out", "err", "log"))
        log.write_text("")
        order = {"argv": argv, "out": str(out), "err": str(err), "traced": bool(strace)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        if strace:
            tracer = subprocess.Popen(
                ["strace", "-p", str(pid), "-o", str(log), "-s", "0", "-y", *strace],
                stderr=subprocess.PIPE,
                text=True,
            )
            assert tracer.stderr is not None
            said = tracer.stderr.readline()
            assert "attached" in said, f"strace cannot trace here: {said}"
            os.kill(pid, signal.SIGUSR1)
            tracer.communicate(timeout=_SECONDS)
        code = int(self._process.stdout.readline())
        return Done(code, err.read_text(), log.read_text())

    def close(self) -> None:
        self._process.communicate(timeout=_SECONDS)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    assert shutil.which("strace"), "make faults needs strace"
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    oracle.save_base(oracle.tiny_model("llama"), root / "base", "150KB")
    oracle.make_adapter(root / "lora", LoraConfig(r=2, target_modules=["q_proj"]))
    vb = VBLoRAConfig(r=2, num_vectors=8, vector_length=16, target_modules=["q_proj"])
    oracle.make_adapter(root / "vblora", vb, scale=1.0)
    return root


@dataclass(frozen=True)
class Job:
    """One command, the place that it writes to, and what it must leave alone."""

    argv: list[str]
    target: Path
    inputs: tuple[Path, ...]
    existing: bool

    def clear(self) -> str | None:
        """Before each run: nothing there, or an old directory; its hash."""
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir(parents=True)
        if not self.existing:
            return None
        self.target.mkdir()
        (self.target / "old").write_text("old")
        return oracle.tree_hash(self.target)

    def state(self) -> str | None:
        return oracle.tree_hash(self.target) if self.target.exists() else None

    def input_state(self) -> list[str]:
        return [oracle.tree_hash(path) for path in self.inputs]


@pytest.fixture(params=[(job, old) for job in ("convert", "merge") for old in (False, True)], ids=str)
def job(request: pytest.FixtureRequest, place: Path, tmp_path: Path) -> Job:
    verb, existing = request.param
    target = tmp_path / "home" / "out"
    argv = {
        "convert": ["convert", place / "vblora", target, "--to", "topk"],
        "merge": ["merge", place / "lora", "--into", place / "base", "--output", target, "--device", "cpu"],
    }[verb]
    words = [*map(str, argv), "--quiet", *(["--overwrite"] if existing else [])]
    return Job(words, target, tuple(place / name for name in ("base", "lora", "vblora")), existing)


def _points(log: str, call: str) -> list[int]:
    """Which occurrences of a call change anything: of `openat`, those that create a file or open a directory."""
    lines = [line for line in log.splitlines() if line.startswith(f"{call}(")]
    return [n for n, line in enumerate(lines, 1) if call != "openat" or "O_CREAT" in line or "O_DIRECTORY" in line]


@pytest.mark.parametrize("call", CALLS)
def test_old_or_new_and_never_torn(nursery: Nursery, job: Job, call: str) -> None:
    inputs = job.input_state()
    job.clear()
    assert nursery.run(job.argv).code == 0
    new = job.state()
    job.clear()
    recorded = nursery.run(job.argv, "-e", f"trace={call}")
    assert recorded.code == 0 and job.state() == new
    points = _points(recorded.log, call)
    if call in ("write", "fsync", "mkdir"):
        assert points, f"{call} is never called: is the log read right?"
    for fault in FAULTS:
        for n in points:
            old = job.clear()
            done = nursery.run(job.argv, "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={n}")
            assert done.hit is not None, f"{call} {n}: the fault was not hit"
            _judge(done, job, old, new, killed="SIGKILL" in fault)
            assert job.input_state() == inputs, f"{done.hit}: an input changed"
            again = nursery.run(job.argv if job.state() != new or job.existing else [*job.argv, "--overwrite"])
            assert again.code == 0 and job.state() == new, f"{done.hit}: the next run fails: {again.err}"


def _judge(done: Done, job: Job, old: str | None, new: str | None, *, killed: bool) -> None:
    state, where = job.state(), done.hit or ""
    assert state in (old, new), f"{where}: torn"
    if killed:
        assert done.code == -signal.SIGKILL
    elif done.code == 0:
        # Another way was found: a rename without the exchange, a leftover that could not be removed.
        assert state == new, where
    else:
        assert done.code == 1, f"{where}: {done.err}"
        assert re.fullmatch(r"error: [^\n]+\n(hint: [^\n]+\n)?", done.err), f"{where}: {done.err!r}"
        # The new thing may be there only if the error says so, or came when the result was printed.
        assert state == old or "is in place" in done.err or "/out/" not in where, f"{where}: {done.err}"
        assert "is in place" not in done.err or state == new, f"{where}: {done.err}"
        left = [p.name for p in job.target.parent.iterdir() if p != job.target]
        assert not left or "O_DIRECTORY" in where, f"{where}: litter: {left}"


def test_everything_is_durable_before_it_is_named_and_the_name_before_success(nursery: Nursery, job: Job) -> None:
    """write* < fsync(file) < fsync(its directory) < rename < fsync(parent), for every file of the result."""
    job.clear()
    done = nursery.run(job.argv, "-e", "trace=openat,write,fsync,fdatasync,ftruncate,rename,renameat,renameat2")
    assert done.code == 0
    lines = done.log.splitlines()
    stage = re.compile(re.escape(str(job.target.parent)) + r"/\.adapterpack-new-[^/>\"]*\.tmp")
    renames = [
        n for n, line in enumerate(lines) if line.startswith("rename") and stage.search(line) and "= 0" in line
    ]
    assert len(renames) == 1 and (("RENAME_EXCHANGE" in lines[renames[0]]) == job.existing)
    named = renames[0]
    files = [p for p in job.target.rglob("*") if p.is_file()]
    directories = [job.target, *(p for p in job.target.rglob("*") if p.is_dir())]
    assert len(files) >= 3

    def events(call: str, path: Path) -> list[int]:
        below = path.relative_to(job.target).as_posix()
        ending = "" if below == "." else f"/{below}"
        pattern = re.compile(rf"{call}\(\d+<{stage.pattern}{re.escape(ending)}>")
        return [n for n, line in enumerate(lines) if pattern.match(line)]

    for file in files:
        writes, syncs = events("write", file), events("fsync", file)
        assert file.stat().st_size == 0 or writes, file
        assert len(syncs) == 1 and max(writes, default=-1) < syncs[0] < named, file
        assert syncs[0] < events("fsync", file.parent)[-1], file
    for directory in directories:
        assert events("fsync", directory)[-1] < named, directory
    parent = [
        n for n, line in enumerate(lines) if re.match(rf"fsync\(\d+<{re.escape(str(job.target.parent))}>", line)
    ]
    assert parent and parent[0] > named
    printed = [n for n, line in enumerate(lines) if re.match(r"write\(1<", line)]
    assert printed and printed[0] > parent[-1], "success was announced before it was durable"


@pytest.mark.parametrize(
    ("inject", "code"),
    [
        ("fsync:error=EIO:when=1", 1),
        ("fsync:error=ENOSPC:when=2", 1),
        ("mkdir:error=ENOSPC:when=1", 1),
        ("fsync:signal=SIGKILL:when=1", -signal.SIGKILL),
        ("renameat2:signal=SIGKILL:when=1", -signal.SIGKILL),
    ],
)
def test_the_command_itself_leaves_nothing_torn(place: Path, tmp_path: Path, inject: str, code: int) -> None:
    """The same without the nursery, as a user runs it."""
    target = tmp_path / "out"
    command = [sys.executable, "-B", "-m", "adapterpack.cli", "convert", place / "vblora", target, "--to", "topk"]
    strace = ["strace", "-f", "-qq", "-o", tmp_path / "log", "-e", f"trace={inject.split(':')[0]}"]
    done = subprocess.run(
        [*strace, "-e", f"inject={inject}", *command], capture_output=True, text=True, check=False, timeout=_SECONDS
    )
    assert done.returncode == code, done.stderr
    assert not target.exists()
    assert code < 0 or re.fullmatch(r"error: cannot write [^\n]+\nhint: nothing was changed\n", done.stderr)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    assert done.returncode == 0 and target.is_dir(), done.stderr
