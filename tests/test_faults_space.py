"""A disk that is full: each verb that writes, on a tmpfs of every size between nothing and enough.

Run by `make faults` (Linux, user namespaces). The file system is mounted in a namespace of its own, without root.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
from nursery import Nursery
from test_faults import JOBS, Job, make_inputs, make_job, target_name, words

pytestmark = pytest.mark.faults

_BLOCK = 4096
_SIZES = 6
_PLENTY = 64 << 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("space")
    make_inputs(root)
    return root


@pytest.fixture(scope="module")
def nursery(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    assert shutil.which("unshare"), "make faults needs unshare"
    scratch = tmp_path_factory.mktemp("nursery")
    rehearsals = [words(verb, place, scratch / f"{verb}-{target_name(verb)}") for verb in dict(JOBS)]
    nursery = Nursery(scratch, rehearsals, prefix=["unshare", "-Urm"])
    yield nursery
    nursery.close()


def _blocks(path: Path) -> int:
    """The bytes that the files of a result take on a tmpfs."""
    files = [p for p in (path, *path.rglob("*")) if p.is_file()]
    return sum(-(-p.stat().st_size // _BLOCK) * _BLOCK for p in files)


@pytest.mark.parametrize("verb, existing", JOBS, ids=str)
def test_a_full_disk_leaves_the_old_thing_and_no_litter(
    nursery: Nursery, place: Path, tmp_path: Path, verb: str, existing: bool
) -> None:
    job = make_job(verb, existing, place, tmp_path / "home")
    job.clear()
    assert nursery.run(job.argv).code == 0
    new, needed = job.state(), _blocks(job.target)
    home = job.target.parent
    shutil.rmtree(home)
    ended = set()
    step = max(needed // _SIZES // _BLOCK, 1) * _BLOCK
    # Its own files, an old one, and some blocks for directories and a journal.
    for size in range(2 * _BLOCK, needed + 8 * _BLOCK + step, step):
        for blind in (False, True):
            ended.add((blind, _run(nursery, job, home, size, new, blind=blind)))
    assert ended == {(False, 0), (False, 1), (True, 0), (True, 1)}


def _run(nursery: Nursery, job: Job, home: Path, size: int, new: str | None, *, blind: bool) -> int:
    """A run on a disk of that size, and one more when there is room; the code of the first.

    Who asks first how much room there is never finds the disk full: `blind` says that there is enough.
    """
    home.mkdir(exist_ok=True)
    nursery.mount(home, size)
    # The same job, as the nursery sees what is there.
    seen = replace(job, target=nursery.seen(job.target))
    old = seen.prepare()
    inputs = job.input_state()
    done = nursery.run(job.argv, blind=blind)
    assert job.input_state() == inputs
    assert not seen.litter(), f"{size}: {seen.litter()}"
    if done.code == 0:
        assert seen.state() == new
        return 0
    assert done.code == 1 and seen.state() == old, f"{size}: {done.err}"
    assert re.fullmatch(r"error: [^\n]+\n(hint: [^\n]+\n)?", done.err), done.err
    asks = job.merges or job.verb == "unpack"
    said = r"No space left| has [\d,]+ (bytes )?left" if asks and not blind else "No space left"
    assert str(home) in done.err and re.search(said, done.err), done.err
    nursery.mount(home, _PLENTY, again=True)
    again = nursery.run(job.argv)
    assert again.code == 0 and seen.state() == new and not seen.litter(), f"{size}: {again.err}"
    return 1


def test_the_namespace_is_one_of_its_own(nursery: Nursery, tmp_path: Path) -> None:
    """What the test above looks at is the tmpfs, and the system outside has nothing of it."""
    home = tmp_path / "home"
    home.mkdir()
    nursery.mount(home, 1 << 20)
    (nursery.seen(home) / "file").write_bytes(b"here")
    assert oracle.tree_hash(nursery.seen(home)) and not list(home.iterdir())
    with pytest.raises(OSError, match="No space left"):
        (nursery.seen(home) / "large").write_bytes(bytes(2 << 20))
