"""`Tensor`: dtype, shape, and bytes on demand. Bytes, not floats, until maths is needed.

So bf16, fp8 and NaN payloads pass through untouched, and memory holds one tensor at a time.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from adapterpack import limits
from adapterpack.errors import InvalidFile

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class DType:
    """An element type of the safetensors format.

    Attributes:
        name: As the format spells it, `BF16`.
        bits: Bits per element.
        kind: `float`, `int`, `bool` or `complex`.
        numpy: numpy's (or ml_dtypes') name of it; None where neither has one element per byte.
    """

    name: str
    bits: int
    kind: str
    numpy: str | None

    def __str__(self) -> str:
        return self.name


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("BOOL", 8, "bool", "bool"),
        DType("F4", 4, "float", None),
        DType("F6_E2M3", 6, "float", None),
        DType("F6_E3M2", 6, "float", None),
        DType("U8", 8, "int", "uint8"),
        DType("I8", 8, "int", "int8"),
        DType("F8_E5M2", 8, "float", "float8_e5m2"),
        DType("F8_E4M3", 8, "float", "float8_e4m3fn"),
        DType("F8_E8M0", 8, "float", "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, "float", "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, "float", "float8_e5m2fnuz"),
        DType("I16", 16, "int", "int16"),
        DType("U16", 16, "int", "uint16"),
        DType("F16", 16, "float", "float16"),
        DType("BF16", 16, "float", "bfloat16"),
        DType("I32", 32, "int", "int32"),
        DType("U32", 32, "int", "uint32"),
        DType("F32", 32, "float", "float32"),
        DType("C64", 64, "complex", "complex64"),
        DType("F64", 64, "float", "float64"),
        DType("I64", 64, "int", "int64"),
        DType("U64", 64, "int", "uint64"),
    )
}
F32, F16, BF16 = DTYPES["F32"], DTYPES["F16"], DTYPES["BF16"]
CASTABLE = {"float32": F32, "bfloat16": BF16, "float16": F16, "fp32": F32, "bf16": BF16, "fp16": F16}
"""What `--dtype` takes."""


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The numpy dtype of one element.

    Raises:
        InvalidFile: there is none (sub-byte formats).
    """
    import ml_dtypes
    import numpy as np

    if dtype.numpy is None:
        raise InvalidFile(f"values of dtype {dtype} cannot be read one by one")
    return np.dtype(getattr(ml_dtypes, dtype.numpy, None) or dtype.numpy)


class Source(Protocol):
    """Where bytes come from: a range of a file, memory, or a recipe."""

    @property
    def nbytes(self) -> int: ...

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), all of them."""
        ...


@dataclass(frozen=True)
class Memory:
    """Bytes that are already here."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def read(self, start: int, stop: int) -> bytes:
        return self.data[start:stop]


class Joined:
    """Sources one behind the other."""

    def __init__(self, parts: Iterable[Source]) -> None:
        self._parts = [part for part in parts if part.nbytes]
        self._ends = list(itertools.accumulate(part.nbytes for part in self._parts))
        self.nbytes = self._ends[-1] if self._ends else 0

    def ends(self, start: int, stop: int) -> list[int]:
        """Where one part ends and the next begins, inside (start, stop)."""
        first, last = bisect.bisect_right(self._ends, start), bisect.bisect_left(self._ends, stop)
        return self._ends[first:last]

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), all of them."""
        found: list[bytes] = []
        n = bisect.bisect_right(self._ends, start)
        while start < min(stop, self.nbytes):
            first = self._ends[n] - self._parts[n].nbytes
            last = min(stop, self._ends[n])
            found.append(self._parts[n].read(start - first, last - first))
            start, n = last, n + 1
        return found[0] if len(found) == 1 else b"".join(found)


def chunks(source: Source, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The bytes [start, stop) of a source, by default all, a few MiB at a time."""
    stop = source.nbytes if stop is None else stop
    for first in range(start, stop, limits.CHUNK_BYTES):
        yield source.read(first, min(first + limits.CHUNK_BYTES, stop))


_INFINITY = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits of positive infinity; NaN stands above it, and negative ones above those with the sign."""


def nonfinite(data: Array, dtype: DType) -> bool:
    """Are there infinities or NaN among these bytes (flat uint8) of F32, F16 or BF16 values?"""
    import numpy as np

    if not data.size:
        return False
    signed, unsigned = (np.int32, np.uint32) if dtype.bits == 32 else (np.int16, np.uint16)
    infinity = _INFINITY[dtype.name]
    sign = 1 << (dtype.bits - 1)
    # As signed numbers the negative floats are small, as unsigned ones they are the large ones.
    return int(data.view(signed).max()) >= infinity or int(data.view(unsigned).max()) >= sign | infinity


def digest(source: Source) -> str:
    """SHA-256 of all bytes of a source, in hex."""
    h = hashlib.sha256()
    for chunk in chunks(source):
        h.update(chunk)
    return h.hexdigest()


@dataclass(frozen=True)
class Tensor:
    """One tensor, unread.

    Attributes:
        dtype: Element type.
        shape: Dimensions, row-major; `()` is a scalar and a zero dimension is legal.
        source: Its little-endian bytes.
    """

    dtype: DType
    shape: Shape
    source: Source = field(repr=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def bytes(self) -> bytes:
        return self.source.read(0, self.source.nbytes)

    def digest(self) -> str:
        return digest(self.source)

    def numpy(self) -> Array:
        """The values in their own dtype, read-only (bf16 and fp8 through ml_dtypes)."""
        import numpy as np

        return np.frombuffer(self.bytes(), dtype=numpy_dtype(self.dtype)).reshape(self.shape)

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of the tensor seen as (numel / last dimension, last dimension)."""
        import numpy as np

        width = self.shape[-1] * self.dtype.bits // 8
        data = self.source.read(start * width, stop * width)
        return np.frombuffer(data, dtype=numpy_dtype(self.dtype)).reshape(-1, self.shape[-1])

    def equals(self, other: Tensor) -> bool:
        """The same dtype, shape and bytes."""
        return (
            self.dtype == other.dtype
            and self.shape == other.shape
            and all(a == b for a, b in zip(chunks(self.source), chunks(other.source), strict=True))
        )


def from_numpy(array: Array) -> Tensor:
    """A tensor in memory, from a numpy (or ml_dtypes) array.

    Raises:
        InvalidFile: the safetensors format has no such dtype.
    """
    import numpy as np

    for dtype in DTYPES.values():
        if dtype.numpy == array.dtype.name:
            return Tensor(dtype, array.shape, Memory(np.ascontiguousarray(array).tobytes()))
    raise InvalidFile(f"no safetensors dtype for {array.dtype}")


@dataclass(frozen=True)
class _Cast:
    """A tensor's values in another dtype, converted as they are read."""

    tensor: Tensor
    dtype: DType

    @property
    def nbytes(self) -> int:
        return self.tensor.numel * self.dtype.bits // 8

    def read(self, start: int, stop: int) -> bytes:
        import numpy as np

        new, old = self.dtype.bits // 8, self.tensor.dtype.bits // 8
        first, last = start // new, -(-min(stop, self.nbytes) // new)
        data = self.tensor.source.read(first * old, last * old)
        values = np.frombuffer(data, dtype=numpy_dtype(self.tensor.dtype))
        cast = round_values(values, self.dtype).tobytes()
        return cast[start - first * new : stop - first * new]


def round_values(values: Array, dtype: DType) -> Array:
    """Float values in another float dtype, to nearest even, rounded once; NaN stays NaN."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        if values.dtype == np.float64 and dtype is BF16:
            values = _to_odd(values)
        return values.astype(numpy_dtype(dtype), copy=False)


def _to_odd(values: Array) -> Array:
    """f64 as f32, rounded to odd, so that the next rounding alone decides (Boldo and Melquiond 2008).

    ml_dtypes goes from f64 to bf16 by way of f32, which would round twice.
    """
    import numpy as np

    f32 = values.astype(np.float32)
    inexact = (f32 != values) & np.isfinite(f32) & np.isfinite(values)
    away = np.abs(f32.astype(np.float64)) > np.abs(values)
    bits = f32.view(np.uint32)
    bits = np.where(inexact & away, bits - np.uint32(1), bits)
    return np.where(inexact, bits | np.uint32(1), bits).view(np.float32)


def cast(tensor: Tensor, dtype: DType) -> Tensor:
    """The same values rounded to nearest even in another float dtype, lazily."""
    return tensor if tensor.dtype == dtype else Tensor(dtype, tensor.shape, _Cast(tensor, dtype))


def narrowest(tensor: Tensor) -> DType:
    """The narrowest of F32, BF16 and F16 that holds every value of a float tensor exactly."""
    import numpy as np

    if tensor.dtype.kind != "float" or tensor.dtype.bits <= 16 or not tensor.numel:
        return tensor.dtype
    own = numpy_dtype(tensor.dtype)
    candidates = [d for d in (BF16, F16, F32) if d.bits < tensor.dtype.bits]
    for chunk in chunks(tensor.source):
        values = np.frombuffer(chunk, dtype=own)
        with np.errstate(over="ignore", invalid="ignore"):
            # Compared as bits: -0.0 and NaN payloads count.
            candidates = [d for d in candidates if values.astype(numpy_dtype(d)).astype(own).tobytes() == chunk]
        if not candidates:
            return tensor.dtype
    return min(candidates, key=lambda d: d.bits)
