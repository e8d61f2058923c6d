"""Kills and failing system calls at every write and rename of five verbs: old or new, never torn.

Run by `make faults` (Linux, strace). Where strace cannot run these tests fail: a silent skip would prove nothing.

Every fault point is visited, none is drawn by lot: a first run is recorded, then each of its mutating system calls
fails (no space, I/O error) or is the last one (SIGKILL). That the tests of the order of syncs see what they should
is proven too: each sync and each check of what was written is taken out of the code in turn.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import oracle
import pytest
from nursery import SECONDS, Done, Nursery
from peft import LoraConfig, VBLoRAConfig

import adapterpack

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
JOBS = [
    *((verb, old) for verb in ("convert", "merge", "compress", "unpack") for old in (False, True)),
    ("compress-parent", False),
]
PACKS = ("compress", "compress-parent")
INPUTS = ("base", "lora", "vblora", "step-1", "step-2", "packs")
LITTER = re.compile(r"\.adapterpack-(?:new|old|part)-.*\.tmp")
_EVERY = {"openat", "write", "fsync"}
_CALLED = {
    "convert": {*_EVERY, "mkdir"},
    "merge": {*_EVERY, "mkdir", "pwrite64", "copy_file_range", "flock", "unlink", "utimensat"},
    "compress": _EVERY,
    "compress-parent": _EVERY,
    "unpack": {*_EVERY, "mkdir", "pwrite64"},
}
"""What each verb calls for certain: else the log is not read right."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    make_inputs(root)
    return root


def make_inputs(root: Path) -> None:
    """A base, adapters, two steps of a training run, and a pack of the second that needs the first."""
    oracle.save_base(oracle.tiny_model("llama"), root / "base", "150KB")
    oracle.make_adapter(root / "lora", LoraConfig(r=2, target_modules=["q_proj"]))
    vb = VBLoRAConfig(r=2, num_vectors=8, vector_length=16, target_modules=["q_proj"])
    oracle.make_adapter(root / "vblora", vb, scale=1.0)
    rng = np.random.default_rng(0)
    for name in ("step-1", "step-2"):
        shutil.copytree(root / "lora", root / name)
        (root / name / "optimizer.pt").write_bytes(rng.bytes(40_000))
        (root / name / "logs").mkdir()
        (root / name / "logs" / "events.txt").write_text("loss 1.0\n")
    # A few words of the weights differ: some tensors are the parent's, some are stored as the difference to it.
    weights = root / "step-2" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-64:] = rng.bytes(64)
    weights.write_bytes(data)
    (root / "packs").mkdir()
    adapterpack.compress(root / "step-2", root / "packs" / "step-2.apack", parent=root / "step-1")
    (root / "packs" / "step-1").symlink_to(root / "step-1")


def words(verb: str, place: Path, target: Path) -> list[str]:
    """A command line of a verb that writes to a target."""
    # One worker: all in the thread that strace watches, and in one order.
    one = ["--jobs", "1"]
    found = {
        "convert": ["convert", place / "vblora", target, "--to", "topk"],
        "merge": ["merge", place / "lora", "--into", place / "base", "--output", target, *one],
        "compress": ["compress", place / "step-2", target, *one],
        "compress-parent": ["compress", place / "step-2", target, "--parent", place / "step-1", *one],
        "unpack": ["unpack", place / "packs" / "step-2.apack", target, *one],
    }[verb]
    return [*map(str, found), "--quiet"]


def target_name(verb: str) -> str:
    """What the result of a verb may be called."""
    return "out.apack" if verb in PACKS else "out"


@pytest.fixture(scope="module")
def nursery(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    assert shutil.which("strace"), "make faults needs strace"
    scratch = tmp_path_factory.mktemp("nursery")
    verbs = dict(JOBS)
    nursery = Nursery(scratch, [words(verb, place, scratch / f"{verb}-{target_name(verb)}") for verb in verbs])
    yield nursery
    nursery.close()


@dataclass(frozen=True)
class Job:
    """One command, the place that it writes to, and what it must leave alone."""

    verb: str
    argv: list[str]
    target: Path
    inputs: tuple[Path, ...]
    existing: bool

    def clear(self) -> str | None:
        """Before each run: nothing there, or an old thing; its hash."""
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir(parents=True)
        return self.prepare()

    def prepare(self) -> str | None:
        """Put the old thing where there should be one; its hash."""
        if not self.existing:
            return None
        if self.packs:
            self.target.write_bytes(b"old")
        else:
            self.target.mkdir()
            (self.target / "old").write_text("old")
        return self.state()

    def state(self) -> str | None:
        return oracle.tree_hash(self.target) if self.target.exists() else None

    @property
    def merges(self) -> bool:
        return self.verb == "merge"

    @property
    def packs(self) -> bool:
        return self.verb in PACKS

    def litter(self) -> list[str]:
        """What lies beside the target."""
        return [p.name for p in self.target.parent.iterdir() if p != self.target]

    def input_state(self) -> list[str]:
        return [oracle.tree_hash(path) for path in self.inputs]

    def check(self, nursery: Nursery, scratch: Path) -> None:
        """Is what lies there whole, as the program and its inputs say?"""
        source = next(path for path in self.inputs if path.name == "step-2")
        if self.packs:
            (self.target.parent / "step-1").symlink_to(source.with_name("step-1"))
            for argv in (["check", str(self.target)], ["unpack", str(self.target), str(scratch / "again")]):
                done = nursery.run(argv)
                assert done.code == 0, done.err
            assert oracle.tree_hash(scratch / "again") == oracle.tree_hash(source)
        elif self.verb == "unpack":
            assert self.state() == oracle.tree_hash(source)
        elif not self.merges:
            assert nursery.run(["check", str(self.target)]).code == 0


def make_job(verb: str, existing: bool, place: Path, home: Path) -> Job:
    """A job that writes to a new directory `home`."""
    target = home / target_name(verb)
    argv = [*words(verb, place, target), *(["--overwrite"] if existing else [])]
    return Job(verb, argv, target, tuple(place / name for name in INPUTS), existing)


@pytest.fixture(params=JOBS, ids=lambda job: f"{job[0]}-{'old' if job[1] else 'new'}")
def job(request: pytest.FixtureRequest, place: Path, tmp_path: Path) -> Job:
    return make_job(*request.param, place, tmp_path / "home")


def _points(log: str, call: str) -> list[int]:
    """Which occurrences of a call change anything: of `openat`, those that create a file or open a directory."""
    lines = [line for line in log.splitlines() if line.startswith(f"{call}(")]
    return [n for n, line in enumerate(lines, 1) if call != "openat" or "O_CREAT" in line or "O_DIRECTORY" in line]


@pytest.mark.parametrize("call", CALLS)
def test_old_or_new_and_never_torn(nursery: Nursery, job: Job, call: str, tmp_path: Path) -> None:
    inputs = job.input_state()
    job.clear()
    assert nursery.run(job.argv).code == 0
    new = job.state()
    if call == "fsync":
        job.check(nursery, tmp_path)
    job.clear()
    recorded = nursery.run(job.argv, "-e", f"trace={call}")
    assert recorded.code == 0 and job.state() == new
    points = _points(recorded.log, call)
    if call in _CALLED[job.verb] or (call == "rmdir" and job.existing and not job.packs):
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
    assert all(map(LITTER.fullmatch, job.litter())), f"{where}: {job.litter()}"
    if killed:
        assert done.code == -signal.SIGKILL
    elif done.code == 0:
        # Another way was found: a rename without the exchange, a leftover that could not be removed.
        assert state == new, where
    else:
        assert done.code == 1, f"{where}: {done.err}"
        assert re.fullmatch(r"error: [^\n]+\n(hint: [^\n]+\n)?", done.err), f"{where}: {done.err!r}"
        # The new thing may be there only if the error says so, or came when the result was printed.
        assert state == old or "is in place" in done.err or where.startswith("write(1<"), f"{where}: {done.err}"
        assert "is in place" not in done.err or state == new, f"{where}: {done.err}"
        # Who cannot look into a directory cannot empty it; and what cannot be locked may be somebody else's.
        may_stay = "O_DIRECTORY" in where or where.startswith("flock")
        assert not job.litter() or may_stay, f"{where}: litter: {job.litter()}"


_ORDERED = "openat,write,pwrite64,pread64,copy_file_range,fsync,fdatasync,ftruncate,rename,renameat,renameat2"


def test_everything_is_durable_before_it_is_named_and_the_name_before_success(nursery: Nursery, job: Job) -> None:
    job.clear()
    done = nursery.run(job.argv, "-e", f"trace={_ORDERED}")
    assert done.code == 0
    _check_order(done.log.splitlines(), job)


def _check_order(lines: list[str], job: Job) -> None:
    """write* < fsync(file) < fsync(its directory) < rename < fsync(parent), for every file of the result.

    A pack is read back whole between its fsync and the rename, a file that comes from one after its last write.
    """
    stage = re.compile(re.escape(str(job.target.parent)) + r"/\.adapterpack-(?:new|part)-[^/>\"]*\.tmp")
    renames = [
        n for n, line in enumerate(lines) if line.startswith("rename") and stage.search(line) and "= 0" in line
    ]
    exchanged = job.existing and not job.packs
    assert len(renames) == 1 and (("RENAME_EXCHANGE" in lines[renames[0]]) == exchanged)
    named = renames[0]
    files = [p for p in (job.target, *job.target.rglob("*")) if p.is_file()]
    directories = [p for p in (job.target, *job.target.rglob("*")) if p.is_dir()]
    assert len(files) >= (1 if job.packs else 3)
    into = {
        "write": r"(?:p?write(?:64)?\(|copy_file_range\(\d+<[^>]*>, \[\d+\], )",
        "fsync": r"fsync\(",
        "read": r"pread64\(",
    }

    def events(call: str, path: Path) -> list[int]:
        below = path.relative_to(job.target).as_posix()
        ending = ("/model" if job.merges else "") + ("" if below == "." else f"/{below}")
        pattern = re.compile(rf"{into[call]}\d+<{stage.pattern}{re.escape(ending)}>")
        return [n for n, line in enumerate(lines) if pattern.match(line)]

    for file in files:
        writes, syncs = events("write", file), events("fsync", file)
        assert file.stat().st_size == 0 or writes, file
        assert len(syncs) == 1 and max(writes, default=-1) < syncs[0] < named, file
        assert job.packs or syncs[0] < (events("fsync", file.parent) or [-1])[-1], file
        if job.packs or job.verb == "unpack":
            begin = syncs[0] if job.packs else max(writes, default=-1)
            read = [lines[n] for n in events("read", file) if begin < n < named]
            assert _covered(read) == file.stat().st_size, f"{file} is not read back"
    for directory in directories:
        assert (events("fsync", directory) or [named])[-1] < named, directory
    if job.merges:
        _check_journal(lines, stage, [f.name for f in files if f.suffix == ".safetensors"])
    parent = [
        n for n, line in enumerate(lines) if re.match(rf"fsync\(\d+<{re.escape(str(job.target.parent))}>", line)
    ]
    assert parent and parent[0] > named
    printed = [n for n, line in enumerate(lines) if re.match(r"write\(1<", line)]
    assert printed and printed[0] > parent[-1], "success was announced before it was durable"


def _covered(reads: list[str]) -> int:
    """How many bytes from the start of a file some calls of pread64 gave."""
    found = [re.search(r", (\d+)\) += (\d+)$", line) for line in reads]
    end = 0
    for start, got in sorted((int(m[1]), int(m[2])) for m in found if m):
        if start > end:
            break
        end = max(end, start + got)
    return end


def _check_journal(lines: list[str], stage: re.Pattern[str], shards: list[str]) -> None:
    """Each line of the journal comes when a shard and its name are durable, and is durable before the next."""
    part = stage.pattern
    order = [
        *(rf"fsync\(\d+<{part}/model/(?:{'|'.join(map(re.escape, shards))})>", rf"fsync\(\d+<{part}/model>"),
        *(rf"write\(\d+<{part}/journal>", rf"fsync\(\d+<{part}/journal>"),
    ]
    seen = [n for line in lines for n, pattern in enumerate(order) if re.match(pattern, line)]
    assert seen[: 4 * len(shards)] == [0, 1, 2, 3] * len(shards)


_MUTATED = {
    "adapterpack.io.atomic": [],
    "adapterpack.containers.apack.writer": ["outer.read(file)"],
    "adapterpack.unpack": [],
    "adapterpack.io.resumable": [],
    "adapterpack.shards": [],
}
"""Modules, and what is deleted in them beside every call of one of `_SYNCS`."""
_SYNCS = {"fsync", "flush", "sync_directory", "_sync_tree", "_sync_published", "_read_back", "check_file"}


@dataclass(frozen=True)
class Mutant:
    """A module with one statement replaced."""

    module: str
    line: int
    statement: str
    source: str

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]}-{self.line}-{self.statement}"


def _mutants() -> Iterator[Mutant]:
    """Each without one of its syncs, or one of its looks at what was written."""
    for name, more in _MUTATED.items():
        source = _source(name)
        for node in ast.walk(ast.parse(source)):
            # A statement that is a call: what it gives is not used, so something else must be the reason for it.
            if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
                continue
            called, statement = node.value.func, ast.unparse(node)
            last = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if last in _SYNCS or statement in more:
                yield Mutant(name, node.lineno, statement, _replaced(source, node, "None"))


def _replaced(source: str, node: ast.stmt, code: str) -> str:
    lines = source.splitlines(keepends=True)
    assert node.end_lineno is not None
    before, after = lines[: node.lineno - 1], lines[node.end_lineno :]
    return "".join([*before, " " * node.col_offset + code + "\n", *after])


def _source(module: str) -> str:
    file = importlib.import_module(module).__file__
    assert file is not None
    return Path(file).read_text()


MUTANTS = list(_mutants())


def test_there_is_something_to_delete_in_every_module() -> None:
    assert {m.module for m in MUTANTS} == set(_MUTATED)
    assert all(any(m.statement == s for m in MUTANTS) for more in _MUTATED.values() for s in more)


@pytest.mark.parametrize("module", _MUTATED)
def test_a_mutant_that_is_none_passes(nursery: Nursery, place: Path, tmp_path: Path, module: str) -> None:
    """It is the missing statement that is found out below, not the exchange of the code."""
    for verb in ("compress", "unpack", "merge", "convert"):
        job = make_job(verb, False, place, tmp_path / "home")
        job.clear()
        done = nursery.run(job.argv, "-e", f"trace={_ORDERED}", mutant=(module, _source(module)))
        assert done.code == 0, done.err
        _check_order(done.log.splitlines(), job)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_whoever_deletes_a_sync_or_a_look_back_is_found_out(
    nursery: Nursery, place: Path, tmp_path: Path, mutant: Mutant
) -> None:
    """The test of the order fails for some verb: nobody can delete a sync and have all tests pass."""
    for verb in ("compress", "unpack", "merge", "convert"):
        job = make_job(verb, False, place, tmp_path / "home")
        job.clear()
        assert nursery.run(job.argv).code == 0
        new = job.state()
        job.clear()
        done = nursery.run(job.argv, "-e", f"trace={_ORDERED}", mutant=(mutant.module, mutant.source))
        # It does its work, as long as the current does not fail.
        assert done.code == 0 and job.state() == new, done.err
        try:
            _check_order(done.log.splitlines(), job)
        except AssertionError:
            return
    pytest.fail("nobody noticed")


@pytest.mark.parametrize("existing", [False, True], ids=["new", "old"])
@pytest.mark.parametrize(
    ("verb", "module", "last", "fd", "at"),
    [
        # The header, a frame, and the seal.
        *(
            ("compress", "adapterpack.io.atomic", "os.fsync(file.fileno())", "file.fileno()", at)
            for at in (9, 999, -5)
        ),
        *(
            ("unpack", "adapterpack.unpack", "write_at(self.opened[file], data, at)", "self.opened[file]", at)
            for at in (0, -1)
        ),
    ],
)
def test_a_disk_that_keeps_something_else_is_found_out(
    nursery: Nursery,
    place: Path,
    tmp_path: Path,
    verb: str,
    module: str,
    last: str,
    fd: str,
    at: int,
    existing: bool,
) -> None:
    """What is read back is compared, all of it: a byte is changed after the last thing that is done to it."""
    job = make_job(verb, existing, place, tmp_path / "home")
    old = job.clear()
    source = _source(module)
    (node,) = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Expr) and ast.unparse(n) == last]
    spoil = f"os.pwrite({fd}, b'\\xa5', {at if at >= 0 else f'os.fstat({fd}).st_size - {-at}'})"
    done = nursery.run(job.argv, mutant=(module, _replaced(source, node, f"{last}; {spoil}")))
    assert done.code == 1 and re.fullmatch(r"error: [^\n]+\n(hint: [^\n]+\n)?", done.err), done.err
    assert ("read back" if job.packs else "other bytes") in done.err
    assert job.state() == old and not job.litter()


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
        ("compress", "fsync:error=EIO:when=1", 1),
        ("compress", "renameat2:signal=SIGKILL:when=1", KILLED),
        ("unpack", "pwrite64:error=ENOSPC:when=1", 1),
        ("unpack", "fsync:error=EIO:when=1", 1),
        ("unpack", "pwrite64:signal=SIGKILL:when=2", KILLED),
        ("unpack", "renameat2:signal=SIGKILL:when=1", KILLED),
    ],
)
def test_the_command_itself_leaves_nothing_torn(
    place: Path, tmp_path: Path, verb: str, inject: str, code: int
) -> None:
    """The same without the nursery, as a user runs it: several threads, and merge with a process that proves."""
    home = tmp_path / "home"
    home.mkdir()
    target = home / target_name(verb)
    argv = [word for word in words(verb, place, target) if word not in ("--jobs", "1")]
    command = [sys.executable, "-B", "-m", "adapterpack.cli", *argv]
    strace = ["strace", "-f", "-qq", "-o", tmp_path / "log", "-e", f"trace={inject.split(':')[0]}"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [*strace, "-e", f"inject={inject}", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        env=environment,
    )
    assert done.returncode == code, done.stderr
    assert "INJECTED" in (tmp_path / "log").read_text() or code == KILLED
    assert target.exists() is (code == 0)
    assert code <= 0 or re.fullmatch(r"error: cannot write [^\n]+\nhint: nothing was changed\n", done.stderr)
    assert code < 0 or [p.name for p in home.iterdir()] == [target.name] * (code == 0)
    if code == 0:
        return
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS, env=environment)
    assert done.returncode == 0 and target.exists(), done.stderr
    assert verb != "merge" or [p.name for p in home.iterdir()] == ["out"]
    assert all(LITTER.fullmatch(p.name) for p in home.iterdir() if p != target)
