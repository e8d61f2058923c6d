"""Runs of the command line whose system calls can be counted, failed and watched: for the fault tests.

One process imports everything; the runs are its children, so that each takes a moment and its calls are its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 120

_PROGRAM = """
import contextlib, ctypes, faulthandler, importlib, inspect, io, json, os, shutil, signal, subprocess, sys, types
from concurrent.futures import Executor, Future
faulthandler.dump_traceback_later(180, exit=True)  # until it is ready: whoever waits for it would wait for ever
import torch
torch.set_num_threads(1)
from adapterpack.cli import main

class Later(Future):
    def __init__(self, work, args):
        super().__init__()
        self._todo = work, args
    def run(self):
        work, args = self._todo
        if not self.done() and self.set_running_or_notify_cancel():
            try:
                self.set_result(work(*args))
            except BaseException as e:
                self.set_exception(e)
    def result(self, timeout=None):
        self.run()
        return super().result()

class Here(Executor):
    # What threads would do, when somebody asks for it and in the thread that strace watches: the n-th call is
    # always the same one.
    def __init__(self, *_):
        self._todo = []
    def submit(self, work, /, *args):
        self._todo.append(Later(work, args))
        return self._todo[-1]
    def shutdown(self, wait=True, *, cancel_futures=False):
        for later in self._todo:
            later.cancel() if cancel_futures else later.run()

def functions(module):
    for thing in vars(module).values():
        members = vars(thing).values() if inspect.isclass(thing) else [thing]
        for function in map(inspect.unwrap, filter(callable, members)):
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                yield function.__qualname__, function

def mutate(name, source):
    # New code in old functions, so that whoever has imported one has the mutant.
    module = importlib.import_module(name)
    other = type(module)(name)
    other.__file__ = module.__file__
    sys.modules[name] = other  # dataclasses look it up
    exec(compile(source, module.__file__, "exec"), vars(other))
    sys.modules[name] = module
    new = dict(functions(other))
    for qualname, function in functions(module):
        function.__code__ = new[qualname].__code__

def child(ready, argv, out, err, traced, mutant, blind):
    for path, fd in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), fd)
    signal.alarm(60)
    if mutant:
        mutate(*mutant)
    if blind:
        os.statvfs = lambda _: types.SimpleNamespace(f_bavail=1 << 40, f_frsize=4096)
        shutil.disk_usage = lambda _: types.SimpleNamespace(free=1 << 52)
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

for name in ("adapterpack.containers.apack.writer", "adapterpack.unpack"):
    module = importlib.import_module(name)
    assert hasattr(module, "ThreadPoolExecutor"), name
    module.ThreadPoolExecutor = Here
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
# What is imported and looked up late is so now: else which call is the n-th would depend on it.
for argv in json.loads(sys.argv[1]):
    sys.argv = ["adapterpack", *argv]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as e:
        assert not e.code, argv
faulthandler.cancel_dump_traceback_later()
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "mount" in order:
        subprocess.run(["mount", "-t", "tmpfs", *order["mount"]], check=True)
        print("mounted", flush=True)
        continue
    told, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(ready, **order)
        finally:
            os._exit(99)
    # Not before its own files are open: those calls are not to be counted.
    os.close(ready)
    os.read(told, 1)
    os.close(told)
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

    def __init__(self, scratch: Path, rehearsals: list[list[str]], prefix: Sequence[str] = ()) -> None:
        """Start it.

        Args:
            scratch: Where it writes; existing.
            rehearsals: Command lines that are run in it first.
            prefix: A command that starts it, such as `unshare`.
        """
        self._scratch = scratch
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-B", "-c", _PROGRAM, json.dumps(rehearsals)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        assert self._answer() == "ready", f"cannot run {' '.join(prefix) or 'the rehearsals'} here"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _order(self, **order: object) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def run(self, argv: list[str], *strace: str, mutant: tuple[str, str] | None = None, blind: bool = False) -> Done:
        """Run a command line.

        Args:
            argv: Without the program.
            strace: Its options; none: it is not traced.
            mutant: The name of a module, and another source for it.
            blind: The disk says that it has room without end.
        """
        out, err, log = (self._scratch / name for name in ("out", "err", "log"))
        log.write_text("")
        order = {"argv": argv, "out": str(out), "err": str(err), "mutant": mutant, "blind": blind}
        pid = int(self._order(**order, traced=bool(strace)))
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
            tracer.communicate(timeout=SECONDS)
        code = int(self._answer())
        return Done(code, err.read_text(), log.read_text())

    def mount(self, directory: Path, size: int, *, again: bool = False) -> None:
        """A tmpfs of so many bytes at a directory, for the nursery alone; `again`: the same with another size."""
        options = f"{'remount,' if again else ''}size={size}"
        assert self._order(mount=["-o", options, "tmpfs", str(directory)]) == "mounted"

    def seen(self, path: Path) -> Path:
        """A path as the nursery has it: what is mounted there, nobody else sees."""
        return Path(f"/proc/{self._process.pid}/root") / path.relative_to("/")

    def close(self) -> None:
        self._process.communicate(timeout=SECONDS)
