"""A merge that was stopped: what is kept, who may go on with it, and what is never reused."""

from __future__ import annotations

import errno
import fcntl
import importlib
import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cases
import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterpack
from adapterpack import lineage
from adapterpack.errors import AdapterpackError, InvalidFile, WriteFailed
from adapterpack.io import atomic, resumable
from adapterpack.io.resumable import Part

merging = importlib.import_module("adapterpack.merge")
WEEK = 7 * 24 * 3600


@dataclass(frozen=True)
class Place:
    """Inputs, the result of a merge that nobody disturbed, and how many shards it has."""

    adapter: Path
    base: Path
    clean: Path
    shards: tuple[str, ...]


@pytest.fixture(scope="module")
def place(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("resume")
    adapter = workshop.adapter(cases.BY_NAME["linear-llama"], "bf16")
    base = workshop.base("llama", "bf16", shard="50KB")
    names = tuple(sorted(p.name for p in base.glob("*.safetensors")))
    assert 4 <= len(names) <= 8
    adapterpack.merge(adapter, base, root / "clean")
    return Place(adapter, base, root / "clean", names)


class Seen(NamedTuple):
    """What tells a file from one that was written again."""

    inode: int
    changed: int


def _seen(path: Path) -> Seen:
    now = path.stat()
    return Seen(now.st_ino, now.st_mtime_ns)


def _names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def _part(home: Path) -> Path:
    """The one part beside a destination."""
    (part,) = home.glob(".adapterpack-part-*.tmp")
    return part


def _recorded(home: Path) -> dict[str, Seen]:
    """The shards that the journal names, as they lie there."""
    first, *entries = map(json.loads, (_part(home) / "journal").read_text().splitlines())
    assert first["journal"] == "adapterpack.journal/1"
    return {e["shard"]: _seen(_part(home) / "model" / e["shard"]) for e in entries}


def _same_as_clean(place: Place, output: Path) -> bool:
    return oracle.tree_hash(output) == oracle.tree_hash(place.clean)


# -- stopped from outside ------------------------------------------------------------------------------------

_DRIVER = """
import os, signal, sys, threading, time
from adapterpack.io import atomic, resumable
from adapterpack.io.resumable import Part

how, number = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
record, one, count = Part.record, threading.Lock(), 0

def counted(self, entry):
    global count
    with one:
        record(self, entry)
        count += 1
        if count == number:
            if how == "wait":
                print("recorded", flush=True)
                sys.stdin.readline()
            elif how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                os.kill(os.getpid(), {"term": signal.SIGTERM, "int": signal.SIGINT}[how])
                # In another thread: until the main one has been told.
                time.sleep(0.3)

def torn(self, entry):
    global count
    with one:
        count += 1
        if count == number:
            with self._journal.open("ab") as journal:
                journal.write(b'{"shard": "model-0')
                journal.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        record(self, entry)

def publish(*args, real=atomic.publish, **how):
    real(*args, **how)
    os.kill(os.getpid(), signal.SIGKILL)

if how == "torn":
    Part.record = torn
elif how == "published":
    resumable.atomic.publish = publish
else:
    Part.record = counted
from adapterpack.cli import main
main()
"""


def _command(how: str, number: int, place: Place, output: Path, *more: str) -> list[str]:
    words = ["merge", str(place.adapter), "--into", str(place.base), "--output", str(output), *more]
    return [sys.executable, "-c", _DRIVER, how, str(number), *words]


def _run(how: str, number: int, place: Place, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = _command(how, number, place, output, *more)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("how", ["kill", "torn"])
def test_a_killed_run_is_taken_up_where_it_was(how: str, jobs: str, place: Place, tmp_path: Path) -> None:
    """Killed after every shard in turn; the next run has torch, where the killed one may have had numpy."""
    for number in range(1, len(place.shards) + 1):
        home = tmp_path / str(number)
        home.mkdir()
        assert _run(how, number, place, home / "m", "--jobs", jobs).returncode == -signal.SIGKILL
        assert not (home / "m").exists()
        kept = {} if (how, number) == ("torn", 1) else _recorded_whole(home)
        assert len(kept) == (number if how == "kill" else number - 1)
        result = adapterpack.merge(place.adapter, place.base, home / "m", jobs=int(jobs))
        assert sorted(result.reused) == sorted(kept)
        assert {name: _seen(home / "m" / name) for name in kept} == kept
        assert _same_as_clean(place, home / "m")
        assert _names(home) == ["m"]
        assert bool(kept) is any(f"{len(kept)} of {len(place.shards)} shards" in note for note in result.notes)
        assert result.tensors_changed == len(load_file(place.adapter / "adapter_model.safetensors")) // 2


def _recorded_whole(home: Path) -> dict[str, Seen]:
    """As `_recorded`, without a torn last line."""
    journal = _part(home) / "journal"
    lines = journal.read_bytes().split(b"\n")[1:-1]
    return {e["shard"]: _seen(_part(home) / "model" / e["shard"]) for e in map(json.loads, lines)}


def test_a_run_may_be_killed_again_and_again(place: Place, tmp_path: Path) -> None:
    kept: dict[str, Seen] = {}
    for _ in place.shards[:-1]:
        assert _run("kill", 1, place, tmp_path / "m", "--jobs", "1").returncode == -signal.SIGKILL
        now = _recorded(tmp_path)
        assert len(now) == len(kept) + 1 and kept.items() <= now.items()
        kept = now
    done = _run("none", 0, place, tmp_path / "m", "--json")
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(done.stdout)["reused"]) == sorted(kept)
    assert _same_as_clean(place, tmp_path / "m") and _names(tmp_path) == ["m"]


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize(("how", "code"), [("term", 143), ("int", 130)])
def test_a_run_that_was_asked_to_stop_keeps_what_it_has(
    how: str, code: int, jobs: str, place: Place, tmp_path: Path
) -> None:
    done = _run(how, 2, place, tmp_path / "m", "--jobs", jobs)
    assert done.returncode == code and "Traceback" not in done.stderr
    # After ^C click ends the line that it stands on.
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: ")
    assert str(_part(tmp_path)) in hint, "where it waits is said"
    assert not (tmp_path / "m").exists()
    kept = _recorded(tmp_path)
    assert len(kept) >= 2
    result = adapterpack.merge(place.adapter, place.base, tmp_path / "m")
    assert sorted(result.reused) == sorted(kept)
    assert {name: _seen(tmp_path / "m" / name) for name in kept} == kept
    assert _same_as_clean(place, tmp_path / "m") and _names(tmp_path) == ["m"]


def test_killed_when_the_new_one_was_in_place_already(place: Place, tmp_path: Path) -> None:
    """The old directory lies in the part then, and must not be taken for finished work."""
    (tmp_path / "m" / "sub").mkdir(parents=True)
    for name in (*place.shards, "sub/file"):
        (tmp_path / "m" / name).write_bytes(b"old")
    assert _run("published", 0, place, tmp_path / "m", "--overwrite").returncode == -signal.SIGKILL
    assert _same_as_clean(place, tmp_path / "m")
    assert (_part(tmp_path) / "model" / "sub" / "file").read_bytes() == b"old"
    result = adapterpack.merge(place.adapter, place.base, tmp_path / "m", overwrite=True)
    assert result.reused == ()
    assert _same_as_clean(place, tmp_path / "m") and _names(tmp_path) == ["m"]


def test_the_old_directory_in_a_part_may_hold_links(place: Place, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("precious")
    (tmp_path / "m" / "link").symlink_to(tmp_path / "elsewhere")
    assert _run("published", 0, place, tmp_path / "m", "--overwrite").returncode == -signal.SIGKILL
    adapterpack.merge(place.adapter, place.base, tmp_path / "m", overwrite=True)
    assert _same_as_clean(place, tmp_path / "m") and _names(tmp_path) == ["elsewhere", "m"]
    assert (tmp_path / "elsewhere" / "file").read_text() == "precious"


# -- two at once ------------------------------------------------------------------------------------------------


def test_while_one_process_writes_a_second_one_fails_and_harms_nothing(place: Place, tmp_path: Path) -> None:
    command = _command("wait", 2, place, tmp_path / "m", "--jobs", "1")
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdin is not None
    try:
        assert child.stdout.readline() == "recorded\n"
        before = oracle.tree_hash(tmp_path)
        with pytest.raises(WriteFailed, match="another process is writing") as caught:
            adapterpack.merge(place.adapter, place.base, tmp_path / "m")
        assert caught.value.exit_code == 1 and caught.value.hint
        second = _run("none", 0, place, tmp_path / "m", "--overwrite")
        assert second.returncode == 1
        assert second.stderr.startswith("error: another process is writing ")
        assert oracle.tree_hash(tmp_path) == before
        # Another destination is nobody's business, and a plan writes nothing.
        adapterpack.merge(place.adapter, place.base, tmp_path / "other")
        adapterpack.merge(place.adapter, place.base, tmp_path / "m", dry_run=True)
        shutil.rmtree(tmp_path / "other")
        assert oracle.tree_hash(tmp_path) == before
    finally:
        child.stdin.write("go on\n")
        child.stdin.close()
        assert child.wait(60) == 0
    assert _same_as_clean(place, tmp_path / "m") and _names(tmp_path) == ["m"]


def test_of_many_writers_at_once_each_succeeds_or_says_why(place: Place, tmp_path: Path) -> None:
    command = _command("none", 0, place, tmp_path / "m", "--overwrite", "--quiet", "--jobs", "1")
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    said = [(w.communicate(timeout=60)[1], w.returncode) for w in writers]
    assert any(code == 0 for _, code in said)
    for err, code in said:
        assert code == 0 or err.startswith("error: another process is writing "), err
    assert _same_as_clean(place, tmp_path / "m") and _names(tmp_path) == ["m"]


def test_the_lock_is_held_until_all_else_is_removed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next writer begins in a directory that is being removed under it."""
    real, seen = shutil.rmtree, []

    def rmtree(path: Path, *args: Any, **how: Any) -> None:
        lock = next(p for p in (Path(path), *Path(path).parents) if p.parent == tmp_path) / "lock"
        ours = ".adapterpack-part-" in lock.parent.name
        held = not ours or (lock.exists() and not _free_to_take(lock))
        real(path, *args, **how)
        seen.append((ours, held and (not ours or lock.exists())))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    (tmp_path / "m").mkdir()
    adapterpack.merge(place.adapter, place.base, tmp_path / "m", overwrite=True)
    assert (True, True) in seen and (True, False) not in seen
    assert _names(tmp_path) == ["m"]


def _free_to_take(lock: Path) -> bool:
    """Could somebody else take it?"""
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_the_file_system_knows_no_locks_a_merge_works_all_the_same(
    number: int, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    adapterpack.merge(place.adapter, place.base, tmp_path / "m")
    assert _same_as_clean(place, tmp_path / "m") and _names(tmp_path) == ["m"]


# -- who may go on ------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Seen]]:
    """Merge, interrupted after so many shards were recorded; what the journal holds then."""

    def interrupted(home: Path, *args: Any, after: int = 2, **options: Any) -> dict[str, Seen]:
        real, count = Part.record, 0

        def record(self: Part, entry: dict[str, Any]) -> None:
            nonlocal count
            real(self, entry)
            count += 1
            if count == after:
                raise KeyboardInterrupt

        with monkeypatch.context() as m:
            m.setattr(Part, "record", record)
            with pytest.raises(KeyboardInterrupt):
                adapterpack.merge(*args, jobs=1, **options)
        kept = _recorded(home)
        assert len(kept) == after
        return kept

    return interrupted


Interrupt = Callable[..., dict[str, Seen]]


def _edited(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


def _move(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] += 1


@pytest.mark.parametrize(
    "options", [{"verify": "full"}, {"verify": "off"}, {"digest": True}, {"jobs": 3}, {"device": "cpu"}], ids=str
)
def test_options_that_decide_no_bytes_do_not_matter(
    options: dict[str, Any], place: Place, tmp_path: Path, interrupt: Interrupt
) -> None:
    kept = interrupt(tmp_path, place.adapter, place.base, tmp_path / "m")
    result = adapterpack.merge(place.adapter, place.base, tmp_path / "m", **options)
    assert sorted(result.reused) == sorted(kept)
    for name in place.shards:
        assert (tmp_path / "m" / name).read_bytes() == (place.clean / name).read_bytes()
    assert _names(tmp_path) == ["m"]


@pytest.mark.parametrize(
    "change",
    [
        "rounding",
        "weight",
        "adapter",
        "adapter-config",
        "another-adapter-too",
        "base-touched",
        "base-edited",
        "base-config",
        "base-elsewhere",
        "version",
    ],
)
def test_other_work_starts_clean(
    change: str,
    place: Place,
    workshop: Any,
    tmp_path: Path,
    interrupt: Interrupt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    base = shutil.copytree(place.base, tmp_path / "base")
    adapters: list[Path] = [place.adapter]
    interrupt(home, adapters, base, home / "m")
    options: dict[str, Any] = {}
    last = base / place.shards[-1]
    if change == "rounding":
        options["rounding"] = "once"
    elif change == "weight":
        options["weights"] = [0.5]
    elif change == "adapter":
        adapters = [_edited(place.adapter, tmp_path / "a", _move)]
    elif change == "adapter-config":
        adapters = [shutil.copytree(place.adapter, tmp_path / "a")]
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    elif change == "another-adapter-too":
        adapters = [place.adapter, workshop.adapter(cases.BY_NAME["rslora"], "bf16")]
    elif change == "base-touched":
        os.utime(last, ns=(1, 1))
    elif change == "base-edited":
        data = bytearray(last.read_bytes())
        data[-1] ^= 1
        last.write_bytes(data)
    elif change == "base-config":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "more": 1}))
    elif change == "base-elsewhere":
        base = shutil.copytree(base, tmp_path / "copy")
    else:
        monkeypatch.setattr(merging, "__version__", "0.0.0")
    adapterpack.merge(adapters, base, tmp_path / "wanted", **options)
    result = adapterpack.merge(adapters, base, home / "m", **options)
    assert result.reused == ()
    assert oracle.tree_hash(home / "m") == oracle.tree_hash(tmp_path / "wanted")
    assert _names(home) == ["m"]


def test_an_adapter_by_another_name_is_the_same_work(place: Place, tmp_path: Path, interrupt: Interrupt) -> None:
    home = tmp_path / "home"
    home.mkdir()
    kept = interrupt(home, place.adapter, place.base, home / "m")
    copy = shutil.copytree(place.adapter, tmp_path / "copy")
    assert sorted(adapterpack.merge(copy, place.base, home / "m").reused) == sorted(kept)


def _lines(journal: Path) -> list[bytes]:
    return journal.read_bytes().splitlines(keepends=True)


def _rewrite(lines: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    def change(part: Path) -> None:
        (part / "journal").write_bytes(b"".join(lines(_lines(part / "journal"))))

    return change


JOURNALS: dict[str, tuple[int, Callable[[list[bytes]], list[bytes]]]] = {
    "as it was": (2, lambda x: x),
    "a torn line more": (2, lambda x: [*x, b'{"shard": "model-0000']),
    "a torn last line": (1, lambda x: [*x[:-1], x[-1][:-5]]),
    "without the last newline": (1, lambda x: [*x[:-1], x[-1].rstrip()]),
    "zeros after a power cut": (2, lambda x: [*x, bytes(100)]),
    "a line that is no object": (2, lambda x: [*x, b"[1]\n"]),
    "a line that is no JSON": (1, lambda x: [*x[:2], b"\xff\n", *x[2:]]),
    "another schema": (0, lambda x: [x[0].replace(b"journal/1", b"journal/2"), *x[1:]]),
    "another work": (0, lambda x: [b'{"journal": "adapterpack.journal/1", "work": "00"}\n', *x[1:]]),
    "no first line": (0, lambda x: x[1:]),
    "empty": (0, lambda x: []),
    "another file's name": (2, lambda x: [*x, b'{"shard": "../../m"}\n', b'{"shard": "config.json"}\n', b"{}\n"]),
    "another header": (1, lambda x: [*x[:-1], x[-1].replace(b'"header_sha256": "', b'"header_sha256": "0')]),
    "another size": (1, lambda x: [*x[:-1], x[-1].replace(b'"size": ', b'"size": 1')]),
    "another time": (1, lambda x: [*x[:-1], x[-1].replace(b'"mtime_ns": ', b'"mtime_ns": 1')]),
}


@pytest.mark.parametrize("what", JOURNALS)
def test_only_whole_lines_of_the_right_journal_count(
    what: str, place: Place, tmp_path: Path, interrupt: Interrupt
) -> None:
    interrupt(tmp_path, place.adapter, place.base, tmp_path / "m")
    count, change = JOURNALS[what]
    _rewrite(change)(_part(tmp_path))
    result = adapterpack.merge(place.adapter, place.base, tmp_path / "m")
    assert len(result.reused) == count
    assert _same_as_clean(place, tmp_path / "m") and _names(tmp_path) == ["m"]


def _spoil_truncated(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 1)


def _spoil_modified(shard: Path) -> None:
    with shard.open("r+b") as out:
        out.seek(-3, os.SEEK_END)
        out.write(b"\0\0\0")


def _spoil_replaced(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()
    (shard / "x").write_text("x")


SPOILT: dict[str, Callable[[Path], None]] = {
    "truncated": _spoil_truncated,
    "modified": _spoil_modified,
    "removed": Path.unlink,
    "a directory": _spoil_replaced,
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_shard_that_is_not_what_was_recorded_is_written_again(
    what: str, place: Place, tmp_path: Path, interrupt: Interrupt
) -> None:
    good, spoilt = interrupt(tmp_path, place.adapter, place.base, tmp_path / "m")
    SPOILT[what](_part(tmp_path) / "model" / spoilt)
    result = adapterpack.merge(place.adapter, place.base, tmp_path / "m")
    assert result.reused == (good,)
    assert _same_as_clean(place, tmp_path / "m") and _names(tmp_path) == ["m"]


def test_what_lies_in_a_part_and_was_not_recorded_goes(place: Place, tmp_path: Path, interrupt: Interrupt) -> None:
    interrupt(tmp_path, place.adapter, place.base, tmp_path / "m")
    model = _part(tmp_path) / "model"
    (model / "sub").mkdir()
    for name in ("stranger", "config.json", "sub/file", lineage.NAME):
        (model / name).write_text("stranger")
    assert len(adapterpack.merge(place.adapter, place.base, tmp_path / "m").reused) == 2
    assert _same_as_clean(place, tmp_path / "m") and _names(tmp_path) == ["m"]


def test_interrupted_before_it_knows_its_work_a_run_leaves_the_part_alone(
    place: Place, tmp_path: Path, interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapters are read before the journal is believed, and that may take a while."""
    kept = interrupt(tmp_path, place.adapter, place.base, tmp_path / "m")

    def of(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(lineage.Source, "of", of)
        with pytest.raises(KeyboardInterrupt):
            adapterpack.merge(place.adapter, place.base, tmp_path / "m")
    assert _recorded(tmp_path) == kept
    assert sorted(adapterpack.merge(place.adapter, place.base, tmp_path / "m").reused) == sorted(kept)


@pytest.mark.parametrize("jobs", [1, 2])
def test_interrupted_before_anything_was_finished_a_run_leaves_nothing(
    jobs: int, place: Place, tmp_path: Path
) -> None:
    def progress(*_: Any) -> None:
        raise KeyboardInterrupt

    # Told of the whole only: but by then a shard is not recorded that is not complete.
    with pytest.raises(KeyboardInterrupt):
        adapterpack.merge(place.adapter, place.base, tmp_path / "m", jobs=jobs, progress=progress)
    left = [p for p in tmp_path.iterdir() if not (p / "journal").exists()]
    assert not left


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which shards are recorded."""
    seen: list[str] = []
    real = Part.record

    def record(self: Part, entry: dict[str, Any]) -> None:
        real(self, entry)
        seen.append(entry["shard"])

    monkeypatch.setattr(Part, "record", record)
    return seen


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_removes_everything(
    jobs: int, resumed: bool, place: Place, tmp_path: Path, interrupt: Interrupt, records: list[str]
) -> None:
    """It would only happen again."""

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        # In the last shard.
        name = next(n for n in place.shards[::-1] if any("q_proj" in k for k in load_file(place.base / n)))
        module = next(k for k in load_file(place.base / name) if "q_proj" in k).removesuffix(".weight")
        tensors[f"base_model.model.{module}.lora_B.weight"][3, 1] = float("nan")

    adapter = _edited(place.adapter, tmp_path / "a", poison)
    home = tmp_path / "home"
    home.mkdir()
    if resumed:
        interrupt(home, adapter, place.base, home / "m", after=1)
    with pytest.raises(InvalidFile, match="q_proj"):
        adapterpack.merge(adapter, place.base, home / "m", jobs=jobs)
    assert jobs == 2 or records
    assert _names(home) == []


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_or_broken_disk_removes_everything(
    number: int,
    call: str,
    after: int,
    jobs: int,
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, old, calls = getattr(os, call), tmp_path / "m", itertools.count()
    old.mkdir()
    (old / "old").write_text("old")

    def fail(*args: Any) -> Any:
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))
        return real(*args)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(WriteFailed, match=os.strerror(number)):
        adapterpack.merge(place.adapter, place.base, tmp_path / "m", jobs=jobs, overwrite=True)
    monkeypatch.undo()
    assert _names(tmp_path) == ["m"] and _names(old) == ["old"]


@pytest.mark.parametrize("what", ["part", "lock", "model"])
def test_a_part_that_cannot_be_begun_leaves_nothing(
    what: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, open_ = Path.mkdir, os.open

    def make(self: Path, *args: Any, **how: Any) -> None:
        if (what == "part" and self.name.startswith(".adapterpack-part")) or (what, self.name) == ("model", "model"):
            raise OSError(errno.ENOSPC, "No space left on device")
        mkdir(self, *args, **how)

    def opened(path: Any, *args: Any, **how: Any) -> int:
        if what == "lock" and os.fspath(path).endswith("/lock"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_(path, *args, **how)

    monkeypatch.setattr(Path, "mkdir", make)
    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(WriteFailed, match="No space left"):
        adapterpack.merge(place.adapter, place.base, tmp_path / "m")
    monkeypatch.undo()
    assert _names(tmp_path) == []


def test_a_merge_that_does_not_verify_leaves_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slip in an offset, as the check after the merge would see it."""
    shards = importlib.import_module("adapterpack.shards")
    real = shards._Output.put

    def put(self: Any, data: Any, at: int, n: int) -> None:
        real(self, np.roll(data, 128), at, n)

    monkeypatch.setattr(shards._Output, "put", put)
    with pytest.raises(AdapterpackError, match="did not verify"):
        adapterpack.merge(place.adapter, place.base, tmp_path / "m")
    assert _names(tmp_path) == []


# -- room ------------------------------------------------------------------------------------------------------------


def _free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


@pytest.mark.parametrize("existing", [False, True])
def test_too_little_room_is_refused_before_anything_is_written(
    existing: bool, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if existing:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "old").write_text("old")
    needed = oracle.adapter_bytes(place.base)
    written: list[Any] = []
    real = merging.write_shards

    def write_shards(*args: Any, **how: Any) -> None:
        written.append(args)
        real(*args, **how)

    monkeypatch.setattr(merging, "write_shards", write_shards)
    _free(monkeypatch, needed - 1)
    with pytest.raises(WriteFailed, match=rf"{needed:,} bytes.*{needed - 1:,} left") as caught:
        adapterpack.merge(place.adapter, place.base, tmp_path / "m", overwrite=True)
    assert caught.value.exit_code == 1 and caught.value.hint
    assert not written
    assert _names(tmp_path) == (["m"] if existing else [])
    assert not existing or _names(tmp_path / "m") == ["old"]
    _free(monkeypatch, needed)
    adapterpack.merge(place.adapter, place.base, tmp_path / "m", overwrite=True)
    assert written and _same_as_clean(place, tmp_path / "m")


def test_what_is_there_already_needs_no_room(
    place: Place, tmp_path: Path, interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = interrupt(tmp_path, place.adapter, place.base, tmp_path / "m")
    there = sum((place.base / name).stat().st_size for name in kept)
    _free(monkeypatch, oracle.adapter_bytes(place.base) - there)
    assert len(adapterpack.merge(place.adapter, place.base, tmp_path / "m").reused) == 2


# -- modes and leftovers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_are_what_the_umask_says(mask: int, jobs: int, place: Place, tmp_path: Path) -> None:
    base = shutil.copytree(place.base, tmp_path / "base")
    (base / "sub").mkdir(mode=0o700)
    (base / "sub" / "file").write_text("x")
    for file in base.glob("*"):
        file.chmod(0o700 if file.is_dir() else 0o400)
    before = os.umask(mask)
    try:
        adapterpack.merge(place.adapter, base, tmp_path / "m", jobs=jobs)
    finally:
        os.umask(before)
    for path in (tmp_path / "m", *(tmp_path / "m").rglob("*")):
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~mask, path
    assert {p.name for p in (tmp_path / "m").iterdir()} == {*_names(base), lineage.NAME}


@dataclass(frozen=True)
class Leftover:
    """A part of another destination."""

    path: Path

    def aged(self, seconds: float) -> None:
        then = time.time() - seconds
        os.utime(self.path / "lock", (then, then))


@pytest.fixture
def leftover(place: Place, tmp_path: Path, interrupt: Interrupt) -> Iterator[Leftover]:
    interrupt(tmp_path, place.adapter, place.base, tmp_path / "another")
    yield Leftover(_part(tmp_path))


def test_an_old_part_that_nobody_holds_is_swept(place: Place, tmp_path: Path, leftover: Leftover) -> None:
    leftover.aged(WEEK + 60)
    adapterpack.merge(place.adapter, place.base, tmp_path / "m")
    assert _names(tmp_path) == ["m"]


def test_a_part_of_this_week_stays(place: Place, tmp_path: Path, leftover: Leftover) -> None:
    leftover.aged(WEEK - 3600)
    before = oracle.tree_hash(leftover.path)
    adapterpack.merge(place.adapter, place.base, tmp_path / "m")
    assert oracle.tree_hash(leftover.path) == before
    assert len(adapterpack.merge(place.adapter, place.base, tmp_path / "another").reused) == 2
    assert _names(tmp_path) == ["another", "m"]


def test_a_part_that_is_written_to_stays_however_old(place: Place, tmp_path: Path, leftover: Leftover) -> None:
    leftover.aged(5 * WEEK)
    before = oracle.tree_hash(leftover.path)
    with (leftover.path / "lock").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        adapterpack.merge(place.adapter, place.base, tmp_path / "m")
        assert oracle.tree_hash(leftover.path) == before
        with pytest.raises(WriteFailed, match="another process"):
            adapterpack.merge(place.adapter, place.base, tmp_path / "another")
    assert oracle.tree_hash(leftover.path) == before


def test_whoever_goes_on_makes_the_part_young_again(
    place: Place, tmp_path: Path, leftover: Leftover, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover.aged(WEEK - 60)
    monkeypatch.setattr(merging, "write_shards", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        adapterpack.merge(place.adapter, place.base, tmp_path / "another")
    assert (leftover.path / "lock").stat().st_mtime > time.time() - 3600


def test_a_part_whose_maker_died_before_it_had_a_lock_is_swept(place: Place, tmp_path: Path) -> None:
    empty = tmp_path / ".adapterpack-part-0123456789abcdef-x.tmp"
    empty.mkdir()
    strange = tmp_path / ".adapterpack-part-0123456789abcdef-y.tmp"
    strange.mkdir()
    (strange / "file").write_text("not ours")
    adapterpack.merge(place.adapter, place.base, tmp_path / "m")
    assert _names(tmp_path) == [strange.name, "m"]


def test_parts_of_long_names_that_begin_alike_are_kept_apart(place: Place) -> None:
    a, b = (atomic.fixed_name(Path("/x") / ("n" * 200 + end), "part") for end in "12")
    assert a != b and len(os.fsencode(a.name)) <= 255
    assert resumable._SCHEMA == "adapterpack.journal/1"
