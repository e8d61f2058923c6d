"""Which ways to compute a product of matrices give the bits that PEFT gets, on this machine.

PEFT multiplies whole matrices with torch. A f32 product depends on the order of its sums, and that order on
the library, the processor and the shape; never on the values. So what was seen to agree for a shape agrees:
- cut into blocks of rows: tried once per shape in each run (milliseconds);
- numpy in place of torch: tried when a run has torch at hand, and remembered for this processor and these
  versions, so that later runs can do without importing it (a second, 200 MB).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Product

if TYPE_CHECKING:
    from adapterpack.backend import Backend

BLOCK = 1 << 18
"""Elements of a block: 1 MiB of f32, so that a few of them stay in the cache of one core."""
_MIN_ROWS = 16
"""A matrix of one row or of few goes through other kernels, with other sums."""
_PROBE = 1 << 21
"""Elements of the largest product that is tried whole: 8 MiB of f32."""
_FORMAT = 1


def cut(rows: int, width: int) -> list[tuple[int, int]]:
    """Where a matrix is cut into blocks of rows: all of one height, or one row more."""
    per = max(_MIN_ROWS, BLOCK // max(width, 1))
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


def _trial(product: Product) -> tuple[Any, Any, list[tuple[int, int]]]:
    """Random factors, as arguments of `Backend.array`, and the blocks; a large product is cut off after some."""
    import numpy as np

    from adapterpack.tensor import from_numpy

    rows, width = (product.into, product.out) if product.columns else (product.out, product.into)
    bounds = cut(rows, width)
    bounds = bounds[: max(2, _PROBE // max(1, width * bounds[0][1]))]
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

    full = factors[0] @ factors[1]
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


def numpy_proven(products: Iterable[Product]) -> bool:
    """Has numpy been seen to give torch's bits for all of these, on this processor with these versions?"""
    wanted = {_name(p) for p in products}
    known = _read() if wanted else {}
    return all(known.get(name) is True for name in wanted)


def prove_numpy(torch: Backend, products: Iterable[Product]) -> None:
    """Try the products that have not been tried and remember what came of it. Never fails: it only saves time."""
    from adapterpack.backend import NumpyBackend

    known = _read()
    found: dict[str, bool] = {}
    numpy = NumpyBackend()
    with numpy.one_thread():
        for product in products:
            name = _name(product)
            if name not in known and name not in found:
                b, a, bounds = _trial(product)
                ours = numpy.array(*b), numpy.array(*a)
                found[name] = _agree(torch, (torch.array(*b), torch.array(*a)), numpy, ours, bounds, product)
    if found:
        _write({**known, **found})


def _name(p: Product) -> str:
    return f"{p.out}x{p.rank}x{p.into}{'c' if p.columns else 'r'}{'n' if p.norms else ''}"


def _path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(cache) if cache else Path.home() / ".cache"
    return root / "adapterpack" / f"numpy-is-torch-{_machine()[:16]}.json"


def _machine() -> str:
    """What the order of sums may depend on: processor, libraries, and the switches that they obey."""
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


def _read() -> dict[str, bool]:
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(_path().read_text())
        if isinstance(record, dict):
            return {k: v for k, v in record.items() if isinstance(v, bool)}
    return {}


def _write(record: dict[str, bool]) -> None:
    path = _path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(dict(sorted(record.items())), indent=0))
        aside.replace(path)
