"""Where the maths runs: torch on a device, or numpy. The only module that imports torch for arithmetic, and late.

Methods do their arithmetic with the arrays that a `Backend` hands out, in the very operations that PEFT
uses, so that results agree with it bit for bit on the same machine. torch is what PEFT computes with;
numpy starts in a tenth of the time and memory and serves where `exactness` has seen it give the same bits.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

from adapterpack.errors import UsageError
from adapterpack.tensor import DTYPES, DType, Memory, Tensor, numpy_dtype, round_values

Array: TypeAlias = Any
"""A torch.Tensor or a numpy.ndarray; not named as one, so that nobody needs torch to read a signature."""

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


_EXPONENT = 0x7FF0000000000000
"""The bits of a double that are its exponent."""


class Backend(Protocol):
    """An array library, where it computes, and the few operations that the two spell differently.

    Attributes:
        name: `numpy`, `torch cpu`, `torch cuda:0`.
        torch: torch itself, for what only it can do: changes that say so never meet numpy.
        device: A torch device.
        block: Elements that are best computed at a time; None: what fits the cache of a core.
    """

    name: str
    block: int | None

    @property
    def torch(self) -> Any: ...
    @property
    def device(self) -> Any: ...

    def one_thread(self) -> AbstractContextManager[object]:
        """While this is open, an operation runs in the thread that calls it, and in no other."""
        ...

    def array(self, data: bytes, dtype: DType, shape: tuple[int, ...]) -> Array:
        """An array of these little-endian bytes. Not to be written to.

        Raises:
            UsageError: the library has no such dtype.
        """
        ...

    def native(self, tensor: Tensor) -> Array:
        """A tensor's values in their own dtype. Raises UsageError if the library has no such dtype."""
        ...

    def f32(self, values: Tensor | Array) -> Array:
        """The values as float32: PEFT lifts 16-bit adapters so when it loads them."""
        ...

    def f64(self, values: Tensor | Array) -> Array: ...

    def round(self, values: Array, dtype: DType) -> Array:
        """f32 or f64 values in `dtype`, to nearest even, rounded once; NaN stays NaN."""
        ...

    def add(self, values: Array, w: Array, dtype: DType) -> Array:
        """values + w in f32, rounded to `dtype` once.

        Args:
            values: f32; they may be overwritten.
            w: Of any float dtype that f32 holds; it is left as it is.
        """
        ...

    def full_precision(self) -> AbstractContextManager[object]:
        """While this is open, f32 products are f32 products: no TF32 on a GPU, no bf16 in oneDNN."""
        ...

    def for_proofs(self) -> Backend:
        """Where f64 is at hand: here, or on the CPU if this device knows none (Apple's)."""
        ...

    def finite(self, values: Array) -> bool:
        """Are all of them finite?"""
        ...

    def binade(self, values: Array) -> Array:
        """f64 values' magnitudes, rounded down to powers of two; 0 of 0, infinity of what is not finite."""
        ...

    def rows_norm(self, values: Array) -> Array:
        """The Euclidean norm of each row of a matrix, in the order of sums that the library has."""
        ...

    def buffer(self, values: Array) -> Any:
        """Their bytes as a flat numpy array of uint8, row-major, not copied where that can be helped."""
        ...

    def tensor(self, values: Array) -> Tensor:
        """A tensor in memory with these values and their dtype."""
        ...


class NumpyBackend:
    """numpy on the CPU; bf16 and fp8 through ml_dtypes."""

    name = "numpy"
    block: int | None = None

    @property
    def torch(self) -> Any:
        raise NotImplementedError("numpy was chosen for what takes torch")

    device = torch

    def one_thread(self) -> AbstractContextManager[object]:
        import numpy  # noqa: F401 - its BLAS must be there to be limited
        from threadpoolctl import threadpool_limits

        limits: AbstractContextManager[object] = threadpool_limits(1, "blas")
        return limits

    def full_precision(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def for_proofs(self) -> Backend:
        return self

    def array(self, data: bytes, dtype: DType, shape: tuple[int, ...]) -> Array:
        import numpy as np

        return np.frombuffer(data, dtype=numpy_dtype(dtype)).reshape(shape)

    def native(self, tensor: Tensor) -> Array:
        return tensor.numpy()

    def f32(self, values: Tensor | Array) -> Array:
        return self._to(values, "float32")

    def f64(self, values: Tensor | Array) -> Array:
        return self._to(values, "float64")

    def _to(self, values: Tensor | Array, name: str) -> Array:
        if isinstance(values, Tensor):
            values = values.numpy()
        return values.astype(name, copy=False)

    def round(self, values: Array, dtype: DType) -> Array:
        return round_values(values, dtype)

    def add(self, values: Array, w: Array, dtype: DType) -> Array:
        import numpy as np

        # One pass, which lifts and rounds a piece that fits the innermost cache: half as long as three.
        out = np.empty(w.shape, numpy_dtype(dtype))
        with np.errstate(over="ignore", invalid="ignore"):
            return np.add(values, w, out=out, dtype=np.float32, casting="unsafe")

    def finite(self, values: Array) -> bool:
        import numpy as np

        return bool(np.isfinite(values).all())

    def binade(self, values: Array) -> Array:
        import numpy as np

        return (np.ascontiguousarray(values).view(np.int64) & _EXPONENT).view(np.float64)

    def rows_norm(self, values: Array) -> Array:
        import numpy as np

        return np.sqrt((values * values).sum(axis=1))

    def buffer(self, values: Array) -> Any:
        import numpy as np

        return np.ascontiguousarray(values).reshape(-1).view(np.uint8)

    def tensor(self, values: Array) -> Tensor:
        ours = next(d for d in DTYPES.values() if d.numpy == values.dtype.name)
        return Tensor(ours, tuple(values.shape), Memory(self.buffer(values).tobytes() if values.size else b""))


class TorchBackend:
    """torch on one device.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        UsageError: there is no such device here.
    """

    def __init__(self, device: str = "cpu") -> None:
        import torch

        self._torch = torch
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._device = torch.device(device)
            torch.empty(0, device=self._device)
        except (RuntimeError, AssertionError) as e:
            raise UsageError(f"no device {device!r} here", hint="--device cpu always works") from e
        self.name = f"torch {self._device}"
        # A device of its own wants much to do for each call: 64 MiB of f32.
        self.block: int | None = None if self._device.type == "cpu" else 1 << 24
        with warnings.catch_warnings():
            # torch warns, once, of memory that may not be written to: nobody writes to what `array` gives.
            warnings.simplefilter("ignore")
            torch.frombuffer(b"\0", dtype=torch.uint8)

    @property
    def torch(self) -> Any:
        return self._torch

    @property
    def device(self) -> Any:
        return self._device

    @contextlib.contextmanager
    def one_thread(self) -> Iterator[None]:
        before = self._torch.get_num_threads()
        self._torch.set_num_threads(1)
        try:
            yield
        finally:
            self._torch.set_num_threads(before)

    def array(self, data: bytes | bytearray, dtype: DType, shape: tuple[int, ...]) -> Array:
        name = _TORCH_NAMES.get(dtype.name)
        if name is None:
            raise UsageError(f"torch has no dtype {dtype}")
        own = getattr(self.torch, name)
        if not data:
            return self.torch.empty(shape, dtype=own, device=self.device)
        return self.torch.frombuffer(data, dtype=own).reshape(shape).to(self.device)

    def native(self, tensor: Tensor) -> Array:
        # Memory of its own, that may be written to.
        return self.array(bytearray(tensor.bytes()), tensor.dtype, tensor.shape)

    def f32(self, values: Tensor | Array) -> Array:
        return self._to(values, self.torch.float32)

    def f64(self, values: Tensor | Array) -> Array:
        return self._to(values, self.torch.float64)

    def _to(self, values: Tensor | Array, dtype: Any) -> Array:
        return (self.native(values) if isinstance(values, Tensor) else values).to(dtype)

    def round(self, values: Array, dtype: DType) -> Array:
        # torch goes from f64 to 16 bits by way of f32, which rounds twice: the first rounding is made
        # to odd here, and then the second one alone decides (Boldo and Melquiond 2008).
        if values.dtype == self.torch.float64 and dtype.bits == 16:
            values = self._to_odd(values)
        return values.to(getattr(self.torch, _TORCH_NAMES[dtype.name]))

    def add(self, values: Array, w: Array, dtype: DType) -> Array:
        # torch is slow where the dtypes of a sum differ.
        values += self.f32(w)
        return self.round(values, dtype)

    def _to_odd(self, values: Array) -> Array:
        torch = self.torch
        f32 = values.to(torch.float32)
        inexact = (f32.to(torch.float64) != values) & torch.isfinite(f32) & torch.isfinite(values)
        away = f32.to(torch.float64).abs() > values.abs()
        bits = f32.view(torch.int32)
        # Truncate towards zero, then set the last bit of what is inexact.
        bits = torch.where(inexact & away, bits - 1, bits)
        return torch.where(inexact, bits | 1, bits).view(torch.float32)

    def finite(self, values: Array) -> bool:
        return bool(self.torch.isfinite(values).all())

    def binade(self, values: Array) -> Array:
        bits = values.contiguous().view(self.torch.int64)
        return (bits & _EXPONENT).view(self.torch.float64)

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        before = self._torch.get_float32_matmul_precision()
        self._torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            self._torch.set_float32_matmul_precision(before)

    def for_proofs(self) -> Backend:
        try:
            self._torch.zeros(1, dtype=self._torch.float64, device=self._device)
        except (TypeError, RuntimeError):
            return TorchBackend("cpu")
        return self

    def rows_norm(self, values: Array) -> Array:
        return self.torch.linalg.norm(values, dim=1)

    def buffer(self, values: Array) -> Any:
        data = values.detach().cpu().contiguous().reshape(-1)
        return (data.view(self.torch.uint8) if data.numel() else data.new_empty(0, dtype=self.torch.uint8)).numpy()

    def tensor(self, values: Array) -> Tensor:
        name = str(values.dtype).removeprefix("torch.")
        ours = next(ours for ours, theirs in _TORCH_NAMES.items() if theirs == name)
        return Tensor(DTYPES[ours], tuple(values.shape), Memory(self.buffer(values).tobytes()))
