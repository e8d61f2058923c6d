"""Which ways to compute a product of matrices give the bits that PEFT gets, on this machine.

PEFT multiplies whole matrices with torch. A f32 product depends on the order of its sums, and that order on
the library, the processor and the shape; never on the values. So what was seen to agree for a shape agrees:
- cut into blocks of rows: tried once per shape in each run (milliseconds);
- numpy in place of torch: tried in a process of its own while numpy already computes, and remembered for this
  processor and these versions, so that later runs can do without torch (a second, 200 MB).
The functions of `vectormath` do depend on the values: they are tried there too, with weights of all sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from adapterpack import vectormath
from adapterpack.adapter import Mixture, Product
from adapterpack.tensor import F32

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

BLOCK = 1 << 18
"""Elements of a block: 1 MiB of f32, so that a few of them stay in the cache of one core."""
_MIN_ROWS = 16
"""A matrix of one row or of few goes through other kernels, with other sums."""
_PROBE = 1 << 21
"""Elements of the largest product that is tried whole: 8 MiB of f32."""
_WEIGHTS = 1 << 15
"""Pairs of weights of each kind that are tried."""
_FORMAT = 1


def cut(rows: int, width: int, block: int | None = None) -> list[tuple[int, int]]:
    """Where a matrix is cut into blocks of rows: all of one height, or one row more.

    Args:
        block: Elements of a block at most, if a block of few rows is not larger; None: `BLOCK`.
    """
    per = max(_MIN_ROWS, (block or BLOCK) // max(width, 1))
    count = max(1, -(-rows // per))
    return [(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def splits(xp: Backend, product: Product) -> bool:
    """Does `xp` compute this product block by block to the bits of the whole? Tried once per shape."""
    if xp.name != "torch cpu":
        return True
    if product not in _tried:
        b, a, bounds = _trial(product)
        factors = xp.array(*b), xp.array(*a)
        _tried[product] = _agree(xp, factors, xp, factors, bounds, product)
    return _tried[product]


_tried: dict[Product, bool] = {}


def multiply(xp: Backend, b: Array, a: Array, *, batched: bool) -> Array:
    """b @ a, in PEFT's order of sums: one of a batch goes another way where the matrices are tiny."""
    return xp.torch.bmm(b[None], a[None])[0] if batched and xp.name != "numpy" else b @ a


def _trial(product: Product) -> tuple[Any, Any, list[tuple[int, int]]]:
    """Random factors, as arguments of `Backend.array`, and the blocks; a large product is cut off after some."""
    import numpy as np

    from adapterpack.tensor import from_numpy

    rows, width = (product.into, product.out) if product.columns else (product.out, product.into)
    bounds = cut(rows, width)
    most = max(2, _PROBE // max(1, width * bounds[0][1]))
    if len(bounds) > most:
        # Where a block begins makes no difference to its sums; how high it is may.
        heights = itertools.cycle(sorted({stop - start for start, stop in bounds}))
        bounds = list(itertools.pairwise([0, *itertools.accumulate(next(heights) for _ in range(most))]))
    out, into = (product.out, bounds[-1][1]) if product.columns else (bounds[-1][1], product.into)
    rng = np.random.default_rng(product.rank)
    factors = (
        from_numpy(rng.standard_normal(shape, dtype=np.float32))
        for shape in ((out, product.rank), (product.rank, into))
    )
    b, a = ((t.bytes(), t.dtype, t.shape) for t in factors)
    return b, a, bounds


def _agree(
    whole: Backend,
    factors: tuple[Any, Any],
    cutter: Backend,
    others: tuple[Any, Any],
    bounds: list[tuple[int, int]],
    product: Product,
) -> bool:
    """Are the blocks that `cutter` computes the very bits of the whole product of `whole`?"""
    import numpy as np

    full = multiply(whole, *factors, batched=product.batched)
    b, a = others
    for start, stop in bounds:
        if product.columns:
            part, reference = b @ a[:, start:stop], full[:, start:stop]
        else:
            part, reference = b[start:stop] @ a, full[start:stop]
        if not np.array_equal(cutter.buffer(part), whole.buffer(reference)):
            return False
        if product.norms and not np.array_equal(
            cutter.buffer(cutter.rows_norm(part)), whole.buffer(whole.rows_norm(reference))
        ):
            return False
    return True


# -- numpy for torch -------------------------------------------------------------------------------------


def numpy_known(questions: Iterable[Product | Mixture]) -> bool | None:
    """Does numpy give torch's bits for all of these, as far as is remembered? None: not all were tried."""
    known = _read()
    found = [known.get(_name(q)) for q in questions]
    if False in found:
        return False
    return None if None in found else True


class Proof:
    """Asks torch in a process of its own: this one need not wait for torch, nor hold it."""

    def __init__(self, questions: Iterable[Product | Mixture]) -> None:
        known = _read()
        self._questions = [q for q in questions if _name(q) not in known]
        self._result: bool | None = None
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        # -P: nothing is imported from the working directory, which may be anybody's.
        call = "import sys, adapterpack.exactness as e; e.try_all(sys.stdin, sys.stdout)"
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable or "", "-P", "-c", call],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            assert self._process.stdin is not None
            json.dump([dataclasses.astuple(q) for q in self._questions], self._process.stdin)
            self._process.stdin.close()

    def succeeds(self) -> bool:
        """Wait for it, and remember what came of it. If it fails to run, nothing is proven."""
        with self._lock:
            if self._result is None:
                self._result = self._process is not None and self._learn(self._process)
            return self._result

    def _learn(self, process: subprocess.Popen[str]) -> bool:
        assert process.stdout is not None
        try:
            results = json.loads(process.stdout.read())
        except ValueError:
            return False
        answered = isinstance(results, list) and all(isinstance(r, bool) for r in results)
        if process.wait() != 0 or not answered or len(results) != len(self._questions):
            return False
        _write({**_read(), **{_name(q): r for q, r in zip(self._questions, results, strict=True)}})
        return all(results)

    def close(self) -> None:
        """Stop it, if nobody has waited for it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()


def try_all(questions: TextIO, answers: TextIO) -> None:
    """What the process of a `Proof` does: questions in, true or false out, as JSON."""
    from adapterpack.backend import NumpyBackend, TorchBackend

    torch, numpy = TorchBackend("cpu"), NumpyBackend()
    found = []
    with numpy.one_thread():
        for question in json.load(questions):
            if not question:
                found.append(_mixes_alike(torch))
                continue
            product = Product(*question)
            b, a, bounds = _trial(product)
            theirs, ours = ((xp.array(*b), xp.array(*a)) for xp in (torch, numpy))
            found.append(_agree(torch, theirs, numpy, ours, bounds, product))
    json.dump(found, answers)


def _mixes_alike(torch: Backend) -> bool:
    """Are logarithm and softmax of `vectormath` those of torch, whatever the two weights?"""
    import numpy as np

    if not vectormath.available():
        return False
    even = np.random.default_rng(0).random(_WEIGHTS, dtype=np.float32)
    small = np.exp2(-150 * even)
    first = np.concatenate([even, small, 1 - small, np.array([0, 0.5, 1], np.float32)])
    weights = np.stack([first, 1 - first], -1)
    ours = vectormath.softmax_of_two(vectormath.log(weights))
    theirs = torch.torch.softmax(torch.torch.log(torch.array(weights.tobytes(), F32, weights.shape)), -1)
    return bool(torch.buffer(theirs).tobytes() == ours.tobytes())


def _name(p: Product | Mixture) -> str:
    if isinstance(p, Mixture):
        return "mixture"
    return f"{p.out}x{p.rank}x{p.into}{'c' if p.columns else 'r'}{'n' if p.norms else ''}{'b' if p.batched else ''}"


def _path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(cache) if cache else Path.home() / ".cache"
    return root / "adapterpack" / f"numpy-is-torch-{_machine()[:16]}.json"


def _machine() -> str:
    """What the order of sums may depend on: processor, libraries, and the switches that they obey."""
    # Late: it takes as long to load as all methods together.
    from importlib.metadata import version

    facts = [str(_FORMAT), platform.machine(), _processor(), str(BLOCK)]
    for package in ("torch", "numpy"):
        # Two builds of one version differ in their libraries: where it lies and when it came tell them apart.
        spec = importlib.util.find_spec(package)
        facts.append(f"{package} {version(package)}")
        if spec is not None and spec.origin is not None:
            facts += [spec.origin, str(Path(spec.origin).stat().st_mtime_ns)]
    switches = ("OPENBLAS_CORETYPE", "OPENBLAS_VERBOSE", "ATEN_CPU_CAPABILITY", "NPY_DISABLE_CPU_FEATURES")
    facts += [f"{k}={os.environ[k]}" for k in sorted(os.environ) if k in switches or k.startswith(("MKL_", "DNNL_"))]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _processor() -> str:
    """Model and features. Without them nothing is remembered that another processor could not claim too."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        kept = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
        return "\n".join(line for line in lines if line.partition(":")[0].strip() in kept)
    return platform.processor()


_NO_RECORD = (OSError, ValueError, RuntimeError)
"""No file or no good one; JSON nested too deeply, and a user without a home, are RuntimeErrors."""


def _read() -> dict[str, bool]:
    with contextlib.suppress(*_NO_RECORD):
        record = json.loads(_path().read_text())
        if isinstance(record, dict):
            return {k: v for k, v in record.items() if isinstance(v, bool)}
    return {}


def _write(record: dict[str, bool]) -> None:
    with contextlib.suppress(*_NO_RECORD):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        try:
            aside.write_text(json.dumps(dict(sorted(record.items())), indent=0))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
