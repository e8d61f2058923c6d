"""bitsandbytes: NF4 and FP4 in blocks of the flattened weight, and int8 by rows.

4-bit: `X.weight` (packed bytes, high nibble first), `.absmax`, `.quant_map` and one JSON blob
`.quant_state.bitsandbytes__nf4`; with double quantisation `.absmax` is U8 and `.nested_*` says what it stands for.
int8: `X.weight` I8 (out, in), `X.SCB` F32 (out,), `X.weight_format` 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from adapterpack import architectures, limits
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.io import json as strict_json
from adapterpack.quantised._values import STEP, Packed, Parts, check_scales, pairs, scales
from adapterpack.tensor import BF16, DTYPES, F16, F32, DType, Shape, Tensor

if TYPE_CHECKING:
    from adapterpack.tensor import Array

_STATE = ".quant_state.bitsandbytes__"
_STATE_BYTES = 1 << 12
"""Longest quant_state; real ones have about two hundred bytes."""
_STATE_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"float32": F32, "bfloat16": BF16, "float16": F16}
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB")
_127TH = 7.874015718698502e-3
"""1/127 as bitsandbytes has it: the product is rounded twice in f32, as there."""

# The values that its kernels use; the stored quant_map only repeats them.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_HALF = (0.0, 0.0052083334885537624, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
_TABLES = {"nf4": _NF4, "fp4": (*_FP4_HALF, 0.0, *(-v for v in _FP4_HALF[1:]))}


@dataclass(frozen=True, eq=False)
class _Nested:
    """What a byte of a doubly quantised absmax stands for: code * absmax of its block + offset."""

    name: str
    code: Array
    absmax: Tensor
    blocksize: int
    offset: float

    def decode(self, data: bytes, start: int) -> Array:
        """The absmax values whose bytes these are; `start` is the first one's index."""
        import numpy as np

        stop = start + len(data)
        first, last = start // self.blocksize, -(-stop // self.blocksize)
        blocks = scales(self.absmax, self.name, first, last)
        factor = np.repeat(blocks, self.blocksize)[start - first * self.blocksize :][: len(data)]
        values: Array = self.code[np.frombuffer(data, np.uint8)] * factor
        return values + np.float32(self.offset)


@dataclass(frozen=True, eq=False)
class FourBit:
    """A 4-bit weight; see `Packed`.

    Attributes:
        weight: Packed bytes, whatever dtype they are stored as.
        table: The 16 values, f32.
        absmax: One for each block of the flattened weight: F32, or U8 if nested.
    """

    name: str
    quant_type: str
    shape: Shape
    blocksize: int
    weight: Tensor = field(repr=False)
    absmax: Tensor = field(repr=False)
    nested: _Nested | None = field(repr=False)
    step: int = STEP

    @property
    def kind(self) -> str:
        return f"bitsandbytes {self.quant_type.upper()}"

    @property
    def stored(self) -> tuple[str, ...]:
        nested = ("nested_absmax", "nested_quant_map") if self.nested else ()
        parts = ("absmax", "quant_map", *nested, f"quant_state.bitsandbytes__{self.quant_type}")
        return (self.name, *(f"{self.name}.{part}" for part in parts))

    def values(self, start: int, stop: int) -> Array:
        import numpy as np

        size = self.blocksize
        first, last = start // size, -(-stop // size)
        data = self.weight.source.read(first * size // 2, min(last * size // 2, self.weight.nbytes))
        codes = np.zeros((last - first) * size // 2, np.uint8)
        codes[: len(data)] = np.frombuffer(data, np.uint8)
        both = pairs(np.array(_TABLES[self.quant_type], np.float32), low_first=False)
        blocks = np.take(both, codes, mode="clip").view(np.float32).reshape(-1, size)
        with np.errstate(over="ignore"):
            blocks *= self._absmax(first, last)[:, None]
        return blocks.reshape(-1)[start - first * size : stop - first * size]

    def _absmax(self, first: int, last: int) -> Array:
        import numpy as np

        name = f"{self.name}.absmax"
        if self.nested is None:
            return scales(self.absmax, name, first, last)
        found = self.nested.decode(self.absmax.source.read(first, last), first)
        # A small absmax may well come back below zero.
        check_scales(np.abs(found), name)
        return found


@dataclass(frozen=True)
class Int8:
    """An int8 weight, (out, in), with the absmax of each row; see `Packed`."""

    name: str
    weight: Tensor = field(repr=False)
    scb: Tensor = field(repr=False)
    kind: str = "bitsandbytes int8"

    @property
    def shape(self) -> Shape:
        return self.weight.shape

    @property
    def step(self) -> int:
        return max(1, STEP // max(1, self.shape[1])) * max(1, self.shape[1])

    @property
    def stored(self) -> tuple[str, ...]:
        return (self.name, f"{self.name.removesuffix('.weight')}.SCB")

    def values(self, start: int, stop: int) -> Array:
        import numpy as np

        width = self.shape[1]
        first, last = start // width, -(-stop // width)
        rows: Array = self.weight.rows(first, last).astype(np.float32)
        with np.errstate(over="ignore"):
            rows *= scales(self.scb, self.stored[1], first, last)[:, None]
        rows *= np.float32(_127TH)
        return rows.reshape(-1)[start - first * width : stop - first * width]


# -- finding them ----------------------------------------------------------------------------------------


def read(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Parts:
    """Find the quantised weights.

    Raises:
        InvalidFile: a part is missing, malformed, or belongs to no weight.
        Unsupported: a layout or an orientation that cannot be told.
    """
    packed: dict[str, Packed] = {}
    dropped: list[str] = []
    dtypes: set[DType] = set()
    for state_name in tensors:
        name, found, quant_type = state_name.rpartition(_STATE)
        if found:
            if name in packed:
                raise InvalidFile(f"{name} has two quant_states")
            packed[name], dtype = _four_bit(name, quant_type, tensors)
            dtypes.add(dtype)
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if name != stem and f"{stem}.SCB" in tensors and name not in packed:
            packed[name] = _int8(name, tensor, tensors[f"{stem}.SCB"])
            if f"{stem}.weight_format" in tensors:
                _check_format(f"{stem}.weight_format", tensors)
                dropped.append(f"{stem}.weight_format")
    for name in packed:
        if architectures.is_conv1d(architectures.text_config(config), name.removesuffix(".weight")):
            raise Unsupported(
                f"{name} is a Conv1D, which bitsandbytes stores transposed",
                hint="merge into the original 16-bit model, then quantise the result",
            )
    used = {stored for p in packed.values() for stored in p.stored}
    for name in tensors:
        if name.endswith(_PARTS) and name not in used:
            raise InvalidFile(f"{name} belongs to no quantised weight: its quant_state or its weight is missing")
    return Parts(packed, tuple(dropped), dtypes.pop() if len(dtypes) == 1 else None)


def _int8(name: str, weight: Tensor, scb: Tensor) -> Int8:
    if weight.dtype != DTYPES["I8"] or len(weight.shape) != 2:
        raise InvalidFile(f"{name} is {weight.dtype} {weight.shape}; with an SCB, I8 (out, in) is wanted")
    if scb.dtype != F32 or scb.shape != weight.shape[:1]:
        stem = name.removesuffix(".weight")
        raise InvalidFile(f"{stem}.SCB is {scb.dtype} {scb.shape}; F32 {weight.shape[:1]} is wanted")
    return Int8(name, weight, scb)


def _check_format(name: str, tensors: Mapping[str, Tensor]) -> None:
    tensor = tensors[name]
    if tensor.nbytes > 8 or any(tensor.bytes()):
        raise Unsupported(f"{name}: int8 weights are read in row order (0) only")


def _four_bit(name: str, quant_type: str, tensors: Mapping[str, Tensor]) -> tuple[FourBit, DType]:
    if quant_type not in _TABLES:
        raise Unsupported(f"{name}: bitsandbytes stores nf4 and fp4, not {quant_type!r:.40}")
    state = _state(f"{name}{_STATE}{quant_type}", quant_type, tensors)
    weight, absmax = _part(name, tensors), _part(f"{name}.absmax", tensors)
    shape, blocksize = tuple(state["shape"]), state["blocksize"]
    count = math.prod(shape)
    if weight.nbytes != -(-count // 2):
        raise InvalidFile(
            f"{name} has {weight.nbytes:,} bytes; 4-bit values of the shape {shape} take {-(-count // 2):,}"
        )
    blocks = -(-count // blocksize)
    wanted = DTYPES["U8"] if "nested_offset" in state else F32
    if absmax.dtype != wanted or absmax.numel != blocks:
        raise InvalidFile(f"{name}.absmax is {absmax.dtype} {absmax.shape}; {wanted} of {blocks:,} is wanted")
    _check_map(f"{name}.quant_map", tensors, quant_type)
    nested = _nested(name, state, blocks, tensors) if "nested_offset" in state else None
    return FourBit(name, quant_type, shape, blocksize, weight, absmax, nested), _DTYPES[state["dtype"]]


def _part(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise InvalidFile(f"{name} is missing: the quant_state beside it needs it")
    return tensors[name]


def _small(name: str, tensors: Mapping[str, Tensor], count: int) -> Array:
    """A short F32 tensor, finite."""
    import numpy as np

    tensor = _part(name, tensors)
    if tensor.dtype != F32 or tensor.numel != count:
        raise InvalidFile(f"{name} is {tensor.dtype} {tensor.shape}; F32 of {count} is wanted")
    values = tensor.numpy().reshape(-1)
    if not np.all(np.isfinite(values)):
        raise InvalidFile(f"{name} holds an infinity or a NaN")
    return values


def _check_map(name: str, tensors: Mapping[str, Tensor], quant_type: str) -> None:
    """bitsandbytes decodes by the type's own table, so a map that says something else would be ignored there."""
    import numpy as np

    if not np.allclose(_small(name, tensors, 16), _TABLES[quant_type], rtol=0, atol=1e-6):
        raise InvalidFile(f"{name} is not the table of {quant_type}")


def _nested(name: str, state: Mapping[str, Any], count: int, tensors: Mapping[str, Tensor]) -> _Nested:
    absmax = _part(f"{name}.nested_absmax", tensors)
    blocks = -(-count // state["nested_blocksize"])
    if absmax.dtype != F32 or absmax.numel != blocks:
        raise InvalidFile(f"{name}.nested_absmax is {absmax.dtype} {absmax.shape}; F32 of {blocks:,} is wanted")
    code = _small(f"{name}.nested_quant_map", tensors, 256)
    return _Nested(f"{name}.nested_absmax", code, absmax, state["nested_blocksize"], float(state["nested_offset"]))


def _state(name: str, quant_type: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The quant_state in its tensor, checked."""

    def bad(reason: str) -> NoReturn:
        raise InvalidFile(f"{name}: {reason}")

    tensor = tensors[name]
    if tensor.dtype != DTYPES["U8"] or tensor.nbytes > _STATE_BYTES:
        bad(f"{tensor.dtype} of {tensor.nbytes:,} bytes; U8 of at most {_STATE_BYTES:,} is read")
    state = strict_json.parse(tensor.bytes(), name)
    nested = state.keys() & _NESTED_KEYS
    if state.keys() - nested != _STATE_KEYS or nested not in (set(), _NESTED_KEYS):
        bad(f"it has the fields {sorted(state)!r:.200}")
    if state["quant_type"] != quant_type:
        bad(f"its quant_type is {state['quant_type']!r:.40}")
    if str(state["dtype"]) not in _DTYPES or (nested and state["nested_dtype"] != "float32"):
        bad(f"its dtype is {state['dtype']!r:.40}, {state.get('nested_dtype')!r:.40}")
    for key in ("blocksize", *(("nested_blocksize",) if nested else ())):
        if type(state[key]) is not int or state[key] not in _BLOCKSIZES:
            bad(f"its {key} is {state[key]!r:.40}")
    shape = state["shape"]
    if not isinstance(shape, list) or not 1 <= len(shape) <= limits.RANK:
        bad(f"its shape is {shape!r:.100}")
    if not all(type(n) is int and 0 < n <= limits.DIMENSION for n in shape):
        bad(f"its shape is {shape!r:.100}")
    if nested and (type(state["nested_offset"]) not in (int, float) or abs(state["nested_offset"]) > 3e38):
        bad(f"its nested_offset is {state['nested_offset']!r:.40}")
    return state
