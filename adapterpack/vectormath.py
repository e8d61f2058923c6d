"""torch's logarithm and softmax in f32, to the bit, without torch: its import takes a second and 200 MB.

torch's logarithm is a routine of the MKL inside its largest library, which can be had alone; its softmax takes
Sleef's exponential, whose few steps numpy can take too. Nobody promises either: `exactness` asks torch first.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterpack.backend import Array

RESIDENT = 100 << 20
"""Bytes of memory that the library takes."""
_ACCURATE = 0x2 | 0x140000 | 0x100
"""As torch calls it: high accuracy, subnormal numbers kept, no word on errors."""
_EXP = (0.00139304355252534151, 0.00833336077630519867, 0.0416664853692054749, 0.166666671633720398, 0.5)
_EXP_FIRST = 0.000198527617612853646
_LN2 = (0.693145751953125, 1.428606765330187045e-06)
_LOG2E = 1.442695040888963407
_EXP_ZERO = -104.0
"""Below this Sleef's exponential is 0."""


def available() -> bool:
    """Is torch's logarithm to be had without torch?"""
    return _logarithm() is not None


@functools.cache
def _logarithm() -> Callable[..., None] | None:
    """vmsLn(n, from, to, mode); None where torch has none, as on processors that MKL does not know."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        found = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libtorch_cpu.so")).vmsLn
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    found.restype = None
    return found


def log(values: Array) -> Array:
    """torch.log of an f32 array."""
    import numpy as np

    compute = _logarithm()
    assert compute is not None, "ask `available` first"
    values = np.ascontiguousarray(values, np.float32)
    out = np.empty_like(values)
    compute(values.size, values.ctypes.data, out.ctypes.data, _ACCURATE)
    return out


def softmax_of_two(values: Array) -> Array:
    """torch.softmax over a last dimension of 2, of an f32 array. (The sum of more would have an order.)"""
    import numpy as np

    with np.errstate(all="ignore"):
        powers = _exp(values - values.max(-1, keepdims=True))
        # torch multiplies with the reciprocal.
        return powers * (np.float32(1) / (powers[..., :1] + powers[..., 1:]))


def _exp(x: Array) -> Array:
    """Sleef's expf of at most 1 unit in the last place, of what is not above 0."""
    import numpy as np

    f32 = np.float32
    bounded = np.maximum(x, f32(_EXP_ZERO - 1))
    whole = np.rint(bounded * f32(_LOG2E))
    rest = bounded
    for part in _LN2:
        rest = _fma(whole, f32(-part), rest)
    series: Any = np.full_like(x, _EXP_FIRST)
    for factor in _EXP:
        series = _fma(series, rest, f32(factor))
    power = f32(1) + _fma(rest * rest, series, rest)
    return np.where(x < _EXP_ZERO, f32(0), np.ldexp(power, whole.astype(np.int32)))


def _fma(a: Array, b: Any, c: Any) -> Array:
    """a * b + c, f32, rounded once: the product is exact in f64, and the sum rounded to odd on the way to f32."""
    import numpy as np

    product, c = a.astype(np.float64) * b, np.asarray(c, np.float64)
    total = product + c
    # What the sum has lost, exactly (Knuth's TwoSum); then Boldo and Melquiond 2008.
    other = total - product
    lost = (product - (total - other)) + (c - other)
    bits = total.view(np.int64)
    odd = np.where((lost > 0) == (total > 0), bits, bits - 1) | 1
    return np.where(lost != 0, odd.view(np.float64), total).astype(np.float32)
