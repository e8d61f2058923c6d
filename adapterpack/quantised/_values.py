"""From stored bytes to values: what every scheme shares. A range costs its own rows or blocks, nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from adapterpack.errors import InvalidFile
from adapterpack.tensor import BF16, F16, F32, DType, Shape, Tensor, numpy_dtype, round_values

if TYPE_CHECKING:
    from adapterpack.tensor import Array

STEP = 1 << 20
"""About how many values are decoded at a time: a few MiB of f32."""
E8M0_BIAS = 127


class Packed(Protocol):
    """A tensor of the unquantised model, in its quantised form.

    Attributes:
        shape: Of the unquantised tensor.
        step: How many elements are best decoded at once.
        kind: What its quantisation is called, `block FP8`.
        stored: Names of the stored tensors that it is made of.
    """

    @property
    def shape(self) -> Shape: ...
    @property
    def step(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def stored(self) -> tuple[str, ...]: ...

    def values(self, start: int, stop: int) -> Array:
        """The elements [start, stop), row-major, in f32.

        Raises:
            InvalidFile: a scale that they need is not one.
        """
        ...


@dataclass(frozen=True)
class Parts:
    """What a scheme makes of a checkpoint.

    Attributes:
        packed: Name in the unquantised model to its quantised form.
        dropped: Stored tensors that only serve the quantised form and hold no weight.
        dtype: What the checkpoint says its weights were, if it says so beside config.json.
    """

    packed: dict[str, Packed]
    dropped: tuple[str, ...] = ()
    dtype: DType | None = None


@dataclass(frozen=True)
class Dequantised:
    """The source of a dequantised tensor: decoded as it is read, rounded once."""

    packed: Packed
    dtype: DType

    @property
    def nbytes(self) -> int:
        count = 1
        for n in self.packed.shape:
            count *= n
        return count * self.dtype.bits // 8

    def read(self, start: int, stop: int) -> bytes:
        import numpy as np

        stop = min(stop, self.nbytes)
        if start >= stop:
            return b""
        size, step = self.dtype.bits // 8, self.packed.step
        first, last = start // size, -(-stop // size)
        out = np.empty(last - first, numpy_dtype(self.dtype))
        at = first
        while at < last:
            end = min(last, (at // step + 1) * step)
            out[at - first : end - first] = round_values(self.packed.values(at, end), self.dtype)
            at = end
        return out.view(np.uint8)[start - first * size : stop - first * size].tobytes()


def check_scales(values: Array, name: str) -> Array:
    """The same scales, if all are finite and none is negative.

    Raises:
        InvalidFile: else; `name` is that of the tensor which holds them.
    """
    import numpy as np

    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise InvalidFile(f"{name} holds a scale that is negative, infinite or NaN")
    return values


def scales(tensor: Tensor, name: str, start: int, stop: int) -> Array:
    """The elements [start, stop) of a tensor of scales, in f32.

    U8 and F8_E8M0 are exponents of two with a bias of 127, as the OCP microscaling formats have them.

    Raises:
        InvalidFile: one of them is no scale.
    """
    import numpy as np

    size = tensor.dtype.bits // 8
    data = tensor.source.read(start * size, stop * size)
    if tensor.dtype in (F32, BF16, F16):
        found: Array = np.frombuffer(data, numpy_dtype(tensor.dtype)).astype(np.float32)
        return check_scales(found, name)
    exponents = np.frombuffer(data, np.uint8)
    if np.any(exponents == 255):
        raise InvalidFile(f"{name} holds a scale that is NaN (255)")
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - E8M0_BIAS)


def pairs(table: Array, low_first: bool) -> Array:
    """What each byte of two 4-bit codes stands for.

    Args:
        table: The 16 values, f32.
        low_first: Does the low nibble come first?

    Returns:
        (256,) complex64: both values as one element, so that one look-up gives both.
    """
    import numpy as np

    byte = np.arange(256)
    codes = (byte & 15, byte >> 4) if low_first else (byte >> 4, byte & 15)
    return np.ascontiguousarray(np.stack([table[c] for c in codes], axis=-1)).view(np.complex64).reshape(256)
