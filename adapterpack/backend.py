"""Where the maths runs: torch on a device. The only module that imports torch for arithmetic, and late.

Methods do their arithmetic with the arrays that a `Backend` hands out, in the very operations that PEFT
uses, so that results agree with it bit for bit on the same machine.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from adapterpack.errors import UsageError
from adapterpack.tensor import DTYPES, DType, Memory, Tensor

Array: TypeAlias = Any
"""A torch.Tensor; not named as one, so that nobody needs torch to read a signature."""

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


class Backend:
    """torch on one device.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        jobs: CPU threads; None leaves it to torch.

    Raises:
        UsageError: there is no such device here.
    """

    def __init__(self, device: str = "cpu", jobs: int | None = None) -> None:
        import torch

        self.torch = torch
        if jobs is not None:
            torch.set_num_threads(jobs)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise UsageError(f"no device {device!r} here", hint="--device cpu always works") from e

    def native(self, tensor: Tensor) -> Array:
        """The values in their own dtype, writable.

        Raises:
            UsageError: torch has no such dtype.
        """
        name = _TORCH_NAMES.get(tensor.dtype.name)
        if name is None:
            raise UsageError(f"torch has no dtype {tensor.dtype}")
        dtype = getattr(self.torch, name)
        if not tensor.numel:
            return self.torch.empty(tensor.shape, dtype=dtype, device=self.device)
        data = self.torch.frombuffer(bytearray(tensor.bytes()), dtype=dtype)
        return data.reshape(tensor.shape).to(self.device)

    def f32(self, tensor: Tensor) -> Array:
        """The values as float32: PEFT lifts 16-bit adapters so when it loads them."""
        return self.native(tensor).to(self.torch.float32)

    def dtype(self, dtype: DType) -> Any:
        return getattr(self.torch, _TORCH_NAMES[dtype.name])

    def round(self, values: Array, dtype: DType) -> Array:
        """f32 or f64 values in `dtype`, to nearest even, rounded once.

        torch goes from f64 to 16 bits by way of f32, which rounds twice: the first rounding is made
        to odd here, and then the second one alone decides (Boldo and Melquiond 2008).
        """
        if values.dtype == self.torch.float64 and dtype.bits == 16:
            values = self._to_odd(values)
        return values.to(self.dtype(dtype))

    def _to_odd(self, values: Array) -> Array:
        torch = self.torch
        f32 = values.to(torch.float32)
        inexact = (f32.to(torch.float64) != values) & torch.isfinite(f32) & torch.isfinite(values)
        away = f32.to(torch.float64).abs() > values.abs()
        bits = f32.view(torch.int32)
        # Truncate towards zero, then set the last bit of what is inexact.
        bits = torch.where(inexact & away, bits - 1, bits)
        return torch.where(inexact, bits | 1, bits).view(torch.float32)

    def tensor(self, values: Array) -> Tensor:
        """A tensor in memory with these values and their dtype."""
        name = str(values.dtype).removeprefix("torch.")
        ours = next(ours for ours, theirs in _TORCH_NAMES.items() if theirs == name)
        data = values.detach().cpu().contiguous()
        raw = data.reshape(-1).view(self.torch.uint8) if data.numel() else data.new_empty(0)
        return Tensor(DTYPES[ours], tuple(values.shape), Memory(raw.numpy().tobytes()))
