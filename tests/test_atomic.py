"""Old or new, never torn: destinations, inputs, leftovers and modes."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import oracle
import pytest

from adapterpack.errors import AdapterpackError, DestinationExists, UsageError, WriteFailed
from adapterpack.io import atomic


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own HOME and working directory, and a folder to write into."""
    for name in ("home", "work", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "out"


def _write(destination: Path, content: str = "new", **how: object) -> None:
    with atomic.staged_directory(destination, **how) as stage:  # type: ignore[arg-type]
        with atomic.create(stage / "file") as out:
            out.write(content.encode())
        (stage / "sub").mkdir()
        with atomic.create(stage / "sub" / "file") as out:
            out.write(content.encode())


def _old(destination: Path) -> Path:
    destination.mkdir()
    (destination / "old").write_text("old")
    return destination


def _names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@pytest.fixture(params=["exchange", "aside"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the exchange of names that Linux has, and as on systems without it."""
    if request.param == "aside":
        monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    yield request.param


# ---------------------------------------------------------------- new and over old


def test_a_new_directory_is_there_whole_and_nothing_else(place: Path, system: str) -> None:
    _write(place / "a")
    assert _names(place) == ["a"]
    assert _names(place / "a") == ["file", "sub"] and (place / "a" / "sub" / "file").read_text() == "new"


def test_an_existing_destination_is_refused_and_kept(place: Path, system: str) -> None:
    _old(place / "a")
    with pytest.raises(DestinationExists) as caught:
        _write(place / "a")
    assert caught.value.hint == "add --overwrite to replace it"
    assert _names(place) == ["a"] and _names(place / "a") == ["old"]


def test_overwriting_replaces_the_whole_directory(place: Path, system: str) -> None:
    _old(place / "a")
    _write(place / "a", overwrite=True)
    assert _names(place) == ["a"] and _names(place / "a") == ["file", "sub"]


def test_somebody_else_who_creates_the_destination_meanwhile_keeps_it(place: Path, system: str) -> None:
    with pytest.raises(DestinationExists), atomic.staged_directory(place / "a"):
        _old(place / "a")
    assert _names(place) == ["a"] and _names(place / "a") == ["old"]


def test_a_destination_that_appears_at_the_last_moment_is_not_replaced(
    place: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and the rename; an empty directory would be replaced by a plain rename."""
    real = atomic._rename_new

    def late(stage: Path, destination: Path) -> None:
        destination.mkdir()
        real(stage, destination)

    monkeypatch.setattr(atomic, "_rename_new", late)
    with pytest.raises(DestinationExists, match="by somebody else meanwhile"):
        _write(place / "a")
    assert _names(place) == ["a"] and _names(place / "a") == []


@pytest.mark.parametrize("kind", ["file", "link", "link-to-directory", "dangling", "fifo"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_directory_is_never_replaced(place: Path, kind: str, overwrite: bool) -> None:
    target, other = place / "a", place / "other"
    other.mkdir()
    if kind == "file":
        target.write_text("x")
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        (place / "x").write_text("x")
        target.symlink_to({"link": "x", "dangling": "nowhere"}.get(kind, "other"))
    before = target.lstat()
    with pytest.raises(DestinationExists, match="is no directory"):
        _write(target, overwrite=overwrite)
    assert target.lstat().st_ino == before.st_ino and not list(other.iterdir())


def test_a_link_in_the_parent_is_followed(place: Path) -> None:
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    _write(place / "link" / "a")
    assert _names(place / "real") == ["a"]


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, ".hidden", "a b\nc", "x.tmp", "*[a]?"])
def test_any_name_that_the_system_takes_can_be_written(place: Path, system: str, name: str) -> None:
    _write(place / name)
    _write(place / name, "again", overwrite=True)
    assert _names(place) == [name] and (place / name / "file").read_text() == "again"


# ---------------------------------------------------------------- what must not be harmed


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("where", [".", "..", "inside", "inside/deeper"])
def test_a_destination_that_is_holds_or_lies_in_an_input_is_refused(place: Path, where: str, overwrite: bool) -> None:
    source = place / "parent" / "src"
    (source / "inside").mkdir(parents=True)
    (source / "file").write_text("precious")
    before = oracle.tree_hash(place)
    with pytest.raises(UsageError, match="the input"):
        _write(source / where, overwrite=overwrite, protected=(source,))
    assert oracle.tree_hash(place) == before and _names(place) == ["parent"]


def test_an_input_by_another_name_is_the_same_input(place: Path, tmp_path: Path) -> None:
    source = _old(place / "src")
    (tmp_path / "alias").symlink_to(source)
    for protected, destination in ((tmp_path / "alias", source), (source, tmp_path / "work" / ".." / "out" / "src")):
        with pytest.raises(UsageError, match="is, or holds, the input"):
            _write(destination, overwrite=True, protected=(protected,))
    file = source / "old"
    with pytest.raises(UsageError):
        _write(source, overwrite=True, protected=(file,))
    assert _names(source) == ["old"]


def test_files_that_an_input_links_to_are_inputs(place: Path) -> None:
    """As in the Hub's cache, where a snapshot is a directory of links."""
    store, snapshot = _old(place / "store"), place / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to("../store/old")
    with pytest.raises(UsageError, match="is, or holds, the input"):
        _write(store, overwrite=True, protected=(snapshot,))
    assert (snapshot / "model.safetensors").read_text() == "old"


@pytest.mark.parametrize("what", ["home", "work", "above-home", "above-work", "git", "git-below", "git-file"])
def test_home_the_working_directory_and_repositories_are_never_replaced(
    tmp_path: Path, place: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = _old(place / "a")
    if what == "home":
        target = tmp_path / "home"
    elif what == "work":
        target = tmp_path / "work"
    elif what == "above-home":
        (target / "deep").mkdir()
        monkeypatch.setenv("HOME", str(target / "deep"))
    elif what == "above-work":
        (target / "deep").mkdir()
        monkeypatch.chdir(target / "deep")
    elif what == "git":
        (target / ".git").mkdir()
    elif what == "git-below":
        (target / "projects" / "one" / ".git").mkdir(parents=True)
    else:
        (target / "worktree").mkdir()
        (target / "worktree" / ".git").write_text("gitdir: elsewhere")
    inode = target.stat().st_ino
    with pytest.raises(UsageError, match="working directory, HOME or a repository"):
        _write(target, overwrite=True)
    assert target.stat().st_ino == inode


@pytest.mark.parametrize("destination", [".", "..", "/"])
def test_dots_and_the_root_are_refused(place: Path, destination: str) -> None:
    for overwrite in (True, False):
        with pytest.raises(AdapterpackError):
            _write(Path(destination), overwrite=overwrite)


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError, AdapterpackError, GeneratorExit])
@pytest.mark.parametrize("existing", [True, False])
def test_an_exception_leaves_the_old_thing_and_no_litter(
    place: Path, error: type[BaseException], existing: bool
) -> None:
    if existing:
        _old(place / "a")
    with (
        pytest.raises(WriteFailed if error is OSError else error),
        atomic.staged_directory(place / "a", overwrite=True) as stage,
        atomic.create(stage / "file") as out,
    ):
        out.write(b"half")
        raise error("stop")
    assert _names(place) == (["a"] if existing else [])
    assert not existing or _names(place / "a") == ["old"]


def test_a_parent_that_is_absent_or_no_directory_is_named(place: Path) -> None:
    (place / "file").write_text("x")
    for parent in ("nowhere", "file"):
        with pytest.raises(WriteFailed, match=f"{parent} is not a directory"):
            _write(place / parent / "a")
    assert _names(place) == ["file"]


def test_a_parent_that_may_not_be_written_is_an_error() -> None:
    """In a child without root's rights, for root may write everywhere."""
    driver = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from adapterpack.errors import WriteFailed\n"
        "from adapterpack.io import atomic\n"
        "os.getuid() or os.setresuid(65534, 65534, 65534)\n"
        "try:\n"
        "    with atomic.staged_directory(Path(sys.argv[1])): pass\n"
        "except WriteFailed as e:\n"
        "    print(e.message)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        target = f"{folder}/a"
        done = subprocess.run(
            [sys.executable, "-c", driver, target], capture_output=True, text=True, check=False, cwd="/"
        )
        assert done.stdout == f"cannot write {target}: Permission denied\n", done.stderr
        assert not list(Path(folder).iterdir())


def test_a_file_that_grows_too_large_leaves_the_old_thing(place: Path) -> None:
    _old(place / "a")
    driver = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from adapterpack.errors import WriteFailed\n"
        "from adapterpack.io import atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    with atomic.staged_directory(Path(sys.argv[1]), overwrite=True) as stage:\n"
        "        with atomic.create(stage / 'file') as out:\n"
        "            for _ in range(100): out.write(bytes(10_000))\n"
        "except WriteFailed as e:\n"
        "    print(e.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", driver, place / "a"], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.stdout.endswith(": File too large\n"), done.stderr
    assert _names(place) == ["a"] and _names(place / "a") == ["old"]


def test_a_failed_directory_sync_says_that_the_new_thing_is_in_place(
    place: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _old(place / "a")
    real = atomic.sync_directory

    def sync(directory: Path) -> None:
        if directory == place:
            raise OSError(5, "Input/output error")
        real(directory)

    monkeypatch.setattr(atomic, "sync_directory", sync)
    with pytest.raises(WriteFailed, match="is in place, but a power cut may undo that") as caught:
        _write(place / "a", overwrite=True)
    assert caught.value.hint != "nothing was changed"
    assert _names(place / "a") == ["file", "sub"]
    monkeypatch.undo()
    _write(place / "a", "again", overwrite=True)
    assert _names(place) == ["a"]


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_a_leftover_that_cannot_be_removed_is_no_failure_of_a_file(
    place: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    """Some systems say no even where nothing is left to remove: the file is in place all the same."""

    def unlink(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, "Input/output error", str(self))

    target = place / "out.apack"
    if old:
        target.write_bytes(b"old")
    monkeypatch.setattr(Path, "unlink", unlink)
    with atomic.staged_file(target, overwrite=True) as stage:
        atomic.write(stage, b"new")
    assert target.read_bytes() == b"new"
    with pytest.raises(WriteFailed, match="no room"), atomic.staged_file(target, overwrite=True) as stage:
        raise WriteFailed("no room")
    assert target.read_bytes() == b"new"


def test_a_second_rename_that_fails_puts_the_old_thing_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _old(place / "a")
    monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.startswith(".adapterpack-new-"):
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(WriteFailed, match="No space left"):
        _write(place / "a", overwrite=True)
    assert _names(place) == ["a"] and _names(place / "a") == ["old"]


# ---------------------------------------------------------------- leftovers of dead runs


def _aside(destination: Path) -> Path:
    aside = atomic._old_name(destination)
    destination.rename(aside)
    return aside


def test_an_old_directory_set_aside_by_a_killed_run_is_put_back(place: Path) -> None:
    _aside(_old(place / "a"))
    with pytest.raises(DestinationExists):
        _write(place / "a")
    assert _names(place) == ["a"] and _names(place / "a") == ["old"]


def test_an_old_directory_is_removed_once_the_new_one_is_there(place: Path) -> None:
    _aside(_old(place / "a"))
    (place / "a").mkdir()
    _write(place / "a", overwrite=True)
    assert _names(place) == ["a"] and _names(place / "a") == ["file", "sub"]


def test_what_another_destination_set_aside_is_left_alone(place: Path) -> None:
    long = "n" * 200
    aside = _aside(_old(place / (long + "1")))
    _write(place / (long + "2"))
    assert aside.exists() and _names(aside) == ["old"]


def _dead_pid() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


@pytest.mark.parametrize(
    ("dead", "hours", "file_hours", "swept"),
    [(True, 2, 2, True), (True, 0, 0, False), (False, 2, 2, False), (True, 2, 0, False)],
    ids=["dead-and-stale", "dead-but-fresh", "alive", "still-written-to"],
)
def test_only_stages_of_the_dead_that_nobody_writes_to_are_swept(
    place: Path, dead: bool, hours: int, file_hours: int, swept: bool
) -> None:
    stage = place / f".adapterpack-new-{_dead_pid() if dead else os.getpid()}-01234567-x.tmp"
    stage.mkdir()
    (stage / "file").write_text("half")
    now = time.time()
    os.utime(stage / "file", (now - 3600 * file_hours - 60,) * 2)
    os.utime(stage, (now - 3600 * hours - 60,) * 2)
    _write(place / "a")
    assert stage.exists() is not swept


@pytest.mark.parametrize("name", [".adapterpack-new-x-y-z.tmp", ".adapterpack-new-.tmp", "adapterpack-new-1-1-x.tmp"])
def test_what_only_looks_like_a_stage_is_left_alone(place: Path, name: str) -> None:
    (place / name).mkdir()
    os.utime(place / name, (0, 0))
    _write(place / "a")
    assert _names(place) == sorted(["a", name])


# ---------------------------------------------------------------- modes and files


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000, 0o027])
def test_modes_are_what_the_umask_says(place: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        _write(place / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((place / "a").stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((place / "a" / "file").stat().st_mode) == 0o666 & ~mask


def test_a_file_is_created_and_never_replaced_or_followed(place: Path) -> None:
    (place / "victim").write_text("precious")
    (place / "link").symlink_to("victim")
    for name in ("victim", "link"):
        with pytest.raises(WriteFailed, match="File exists"), atomic.create(place / name) as out:
            out.write(b"x")
    assert (place / "victim").read_text() == "precious"


def test_sixteen_writers_of_one_destination_leave_one_complete_winner(place: Path) -> None:
    driver = (
        "import sys\n"
        "from pathlib import Path\n"
        "from adapterpack.errors import DestinationExists\n"
        "from adapterpack.io import atomic\n"
        "sys.stdin.read()\n"
        "for overwrite in (False, True):\n"
        "    try:\n"
        "        with atomic.staged_directory(Path(sys.argv[1]), overwrite=overwrite) as stage:\n"
        "            for name in 'abc':\n"
        "                with atomic.create(stage / name) as out: out.write(sys.argv[2].encode())\n"
        "    except DestinationExists: pass\n"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", driver, place / "a", str(n)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
        )
        for n in range(16)
    ]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()
    errors = [writer.stderr.read().decode() for writer in writers if writer.stderr and writer.wait() is not None]
    assert [writer.returncode for writer in writers] == [0] * 16, [e for e in errors if e]
    assert _names(place) == ["a"]
    assert len({(place / "a" / name).read_text() for name in "abc"}) == 1
