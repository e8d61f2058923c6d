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

CALLS = (
    "openat",
    "write",
    "pwrite64",
    "copy_file_range",
    "fsync",
    "ftruncate",
    "mkdir",
    "rename",
    "renameat2",
    "unlink",
    "unlinkat",
    "rmdir",
    "flock",
    "utimensat",
)
FAULTS = ("error=ENOSPC", "error=EIO", "signal=SIGKILL")
_SECONDS = 120

_NURSERY = """
import contextlib, ctypes, io, json, os, signal, sys
import torch
torch.set_num_threads(1)
from adapterpack.cli import main

def child(ready, argv, out, err, traced):
    for path, fd in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), fd)
    if traced:
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))  # PR_SET_PTRACER, any: for kernels with Yama
    os.write(ready, b".")
    if traced:
        signal.sigwait({signal.SIGUSR1})
    sys.argv = ["adapterpack", *argv]
    try:
        main()
    except SystemExit as e:
        os._exit(e.code)

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
# What is imported and looked up late is so now: else which call is the n-th would depend on it.
for argv in json.loads(sys.argv[1]):
    sys.argv = ["adapterpack", *argv]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as e:
        assert not e.code
for line in sys.stdin:
    told, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(ready, **json.loads(line))
        finally:
            os._exit(99)
    # Not before its own files are open: those calls are not to be counted.
    os.read(told, 1)
    os.close(told)
    os.close(ready)
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

    def __init__(self, scratch: Path, rehearsals: list[list[str]]) -> None:
        self._scratch = scratch
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-c", _NURSERY, json.dumps(rehearsals)],
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
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    oracle.save_base(oracle.tiny_model("llama"), root / "base", "150KB")
    oracle.make_adapter(root / "lora", LoraConfig(r=2, target_modules=["q_proj"]))
    vb = VBLoRAConfig(r=2, num_vectors=8, vector_length=16, target_modules=["q_proj"])
    oracle.make_adapter(root / "vblora", vb, scale=1.0)
    return root


def _words(verb: str, place: Path, target: Path) -> list[str]:
    words = {
        "convert": ["convert", place / "vblora", target, "--to", "topk"],
        # One worker: all in the thread that strace watches, and in one order.
        "merge": ["merge", place / "lora", "--into", place / "base", "--output", target, "--jobs", "1"],
    }[verb]
    return [*map(str, words), "--quiet"]


@pytest.fixture(scope="module")
def nursery(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    assert shutil.which("strace"), "make faults needs strace"
    scratch = tmp_path_factory.mktemp("nursery")
    nursery = Nursery(scratch, [_words(verb, place, scratch / verb) for verb in ("convert", "merge")])
    yield nursery
    nursery.close()


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

    @property
    def merges(self) -> bool:
        return self.argv[0] == "merge"

    def litter(self) -> list[str]:
        """What lies beside the target."""
        return [p.name for p in self.target.parent.iterdir() if p != self.target]

    def input_state(self) -> list[str]:
        return [oracle.tree_hash(path) for path in self.inputs]


@pytest.fixture(params=[(job, old) for job in ("convert", "merge") for old in (False, True)], ids=str)
def job(request: pytest.FixtureRequest, place: Path, tmp_path: Path) -> Job:
    verb, existing = request.param
    target = tmp_path / "home" / "out"
    words = [*_words(verb, place, target), *(["--overwrite"] if existing else [])]
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
    always = ["openat", "write", "fsync", "mkdir", "rmdir"] if job.existing else ["openat", "write", "fsync", "mkdir"]
    if call in (*always, *(["pwrite64", "copy_file_range", "flock", "unlink", "utimensat"] if job.merges else [])):
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
            # What a killed merge left for the next one, the next one has used or removed.
            assert not job.merges or not job.litter(), f"{done.hit}: {job.litter()}"


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
        # Who cannot look into a directory cannot empty it; and what cannot be locked may be somebody else's.
        may_stay = "O_DIRECTORY" in where or where.startswith("flock")
        assert not job.litter() or may_stay, f"{where}: litter: {job.litter()}"


def test_everything_is_durable_before_it_is_named_and_the_name_before_success(nursery: Nursery, job: Job) -> None:
    """write* < fsync(file) < fsync(its directory) < rename < fsync(parent), for every file of the result."""
    job.clear()
    calls = "openat,write,pwrite64,copy_file_range,fsync,fdatasync,ftruncate,rename,renameat,renameat2"
    done = nursery.run(job.argv, "-e", f"trace={calls}")
    assert done.code == 0
    lines = done.log.splitlines()
    stage = re.compile(re.escape(str(job.target.parent)) + r"/\.adapterpack-(?:new|part)-[^/>\"]*\.tmp")
    renames = [
        n for n, line in enumerate(lines) if line.startswith("rename") and stage.search(line) and "= 0" in line
    ]
    assert len(renames) == 1 and (("RENAME_EXCHANGE" in lines[renames[0]]) == job.existing)
    named = renames[0]
    files = [p for p in job.target.rglob("*") if p.is_file()]
    directories = [job.target, *(p for p in job.target.rglob("*") if p.is_dir())]
    assert len(files) >= 3
    into = {"write": r"(?:p?write(?:64)?\(|copy_file_range\(\d+<[^>]*>, \[\d+\], )", "fsync": r"fsync\("}

    def events(call: str, path: Path) -> list[int]:
        below = path.relative_to(job.target).as_posix()
        ending = ("/model" if job.merges else "") + ("" if below == "." else f"/{below}")
        pattern = re.compile(rf"{into[call]}\d+<{stage.pattern}{re.escape(ending)}>")
        return [n for n, line in enumerate(lines) if pattern.match(line)]

    for file in files:
        writes, syncs = events("write", file), events("fsync", file)
        assert file.stat().st_size == 0 or writes, file
        assert len(syncs) == 1 and max(writes, default=-1) < syncs[0] < named, file
        assert syncs[0] < events("fsync", file.parent)[-1], file
    for directory in directories:
        assert events("fsync", directory)[-1] < named, directory
    if job.merges:
        _check_journal(lines, stage, [f.name for f in files if f.suffix == ".safetensors"])
    parent = [
        n for n, line in enumerate(lines) if re.match(rf"fsync\(\d+<{re.escape(str(job.target.parent))}>", line)
    ]
    assert parent and parent[0] > named
    printed = [n for n, line in enumerate(lines) if re.match(r"write\(1<", line)]
    assert printed and printed[0] > parent[-1], "success was announced before it was durable"


def _check_journal(lines: list[str], stage: re.Pattern[str], shards: list[str]) -> None:
    """Each line of the journal comes when a shard and its name are durable, and is durable before the next."""
    part = stage.pattern
    order = [
        *(rf"fsync\(\d+<{part}/model/(?:{'|'.join(map(re.escape, shards))})>", rf"fsync\(\d+<{part}/model>"),
        *(rf"write\(\d+<{part}/journal>", rf"fsync\(\d+<{part}/journal>"),
    ]
    seen = [n for line in lines for n, pattern in enumerate(order) if re.match(pattern, line)]
    assert seen[: 4 * len(shards)] == [0, 1, 2, 3] * len(shards)


KILLED = -signal.SIGKILL


@pytest.mark.parametrize(
    ("verb", "inject", "code"),
    [
        ("convert", "fsync:error=EIO:when=1", 1),
        ("convert", "fsync:error=ENOSPC:when=2", 1),
        ("convert", "mkdir:error=ENOSPC:when=1", 1),
        ("convert", "fsync:signal=SIGKILL:when=1", KILLED),
        ("convert", "renameat2:signal=SIGKILL:when=1", KILLED),
        ("merge", "pwrite64:error=ENOSPC:when=1", 1),
        ("merge", "copy_file_range:error=EIO:when=1", 1),
        ("merge", "copy_file_range:error=EXDEV:when=1+", 0),
        ("merge", "fsync:error=EIO:when=1", 1),
        ("merge", "flock:error=ENOSYS:when=1+", 0),
        ("merge", "pwrite64:signal=SIGKILL:when=2", KILLED),
        ("merge", "renameat2:signal=SIGKILL:when=1", KILLED),
    ],
)
def test_the_command_itself_leaves_nothing_torn(
    place: Path, tmp_path: Path, verb: str, inject: str, code: int
) -> None:
    """The same without the nursery, as a user runs it: merge with several workers and with a process that proves."""
    home = tmp_path / "home"
    home.mkdir()
    target = home / "out"
    words = [word for word in _words(verb, place, target) if word not in ("--jobs", "1")]
    command = [sys.executable, "-B", "-m", "adapterpack.cli", *words]
    strace = ["strace", "-f", "-qq", "-o", tmp_path / "log", "-e", f"trace={inject.split(':')[0]}"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [*strace, "-e", f"inject={inject}", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS,
        env=environment,
    )
    assert done.returncode == code, done.stderr
    assert "INJECTED" in (tmp_path / "log").read_text() or code == KILLED
    assert target.exists() is (code == 0)
    assert code <= 0 or re.fullmatch(r"error: cannot write [^\n]+\nhint: nothing was changed\n", done.stderr)
    assert code < 0 or [p.name for p in home.iterdir()] == ["out"] * (code == 0)
    if code == 0:
        return
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS, env=environment)
    assert done.returncode == 0 and target.is_dir(), done.stderr
    assert verb == "convert" or [p.name for p in home.iterdir()] == ["out"]
