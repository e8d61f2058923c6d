"""Kills and failing system calls at every write and rename of convert and merge: old or new, never torn.

Run by `make faults` (Linux, strace). Where strace cannot run these tests fail: a silent skip would prove nothing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
from peft import LoraConfig, VBLoRAConfig

pytestmark = pytest.mark.faults

CALLS = ("write", "fsync", "rename", "renameat2", "mkdir")
FAULTS = ("error=ENOSPC", "error=EIO", "signal=SIGKILL")
_MOST = 40
_DRIVER = "import sys, adapterpack; {call}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    targets = ["q_proj"]
    oracle.save_base(oracle.tiny_model("llama"), root / "base")
    oracle.make_adapter(root / "lora", LoraConfig(r=2, target_modules=targets))
    vb = VBLoRAConfig(r=2, num_vectors=8, vector_length=16, target_modules=targets)
    oracle.make_adapter(root / "vblora", vb, scale=1.0)
    return root


def _convert(place: Path, target: Path) -> str:
    return f"adapterpack.convert({str(place / 'vblora')!r}, {str(target)!r}, to='topk', overwrite=True)"


def _merge(place: Path, target: Path) -> str:
    args = f"{str(place / 'lora')!r}, {str(place / 'base')!r}, {str(target)!r}"
    return f"adapterpack.merge({args}, verify='off', overwrite=True)"


def _run(call: str, target: Path, inject: str | None) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-B", "-c", _DRIVER.format(call=call)]
    if inject is not None:
        # Only what touches the destination or its neighbours counts: -P follows paths below it.
        name, fault, when = inject.split("|")
        log = target.parent.parent / "strace.log"
        words = [
            *("strace", "-f", "-qq", "-o", str(log), "-e", f"trace={name}"),
            *("-e", f"inject={name}:{fault}:when={when}", *words),
        ]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("job", [_convert, _merge], ids=["convert", "merge"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "over-old"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CALLS)
def test_old_or_new_and_never_torn(
    place: Path, tmp_path: Path, job: Callable[[Path, Path], str], existing: bool, fault: str, name: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    target = home / "out"
    call = job(place, target)
    assert _run(call, target, None).returncode == 0
    new = oracle.tree_hash(target)
    inputs = {p: oracle.tree_hash(p) for p in (place / "base", place / "lora", place / "vblora")}
    clean = 0
    for n in range(1, _MOST):
        subprocess.run(["rm", "-rf", str(home)], check=True)
        home.mkdir()
        old = None
        if existing:
            target.mkdir()
            (target / "old").write_text("old")
            old = oracle.tree_hash(target)
        done = _run(call, target, f"{name}|{fault}|{n}")
        assert "strace:" not in done.stderr or "exited" in done.stderr, done.stderr
        state = oracle.tree_hash(target) if target.exists() else None
        assert state in (old, new), f"{name} {n}: torn"
        if done.returncode == 0:
            assert state == new
            clean += 1
        assert inputs == {p: oracle.tree_hash(p) for p in inputs}
        assert _run(call, target, None).returncode == 0
        assert oracle.tree_hash(target) == new
        if clean:
            break
    assert clean, "the fault was still hit: raise _MOST"
