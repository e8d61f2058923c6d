"""FP8 (E4M3) weights with a scale for each block, row or tensor: value = q * scale, and back.

DeepSeek-V3 and Qwen3 (`fp8`: `weight_scale_inv` for each 128 x 128 block), per-tensor `fp8`, MXFP8,
compressed-tensors `float-quantized` and ModelOpt FP8 differ in the scale's name, dtype and shape alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.quantised._values import E8M0_BIAS, STEP, Packed, Parts, scales
from adapterpack.tensor import BF16, DTYPES, F16, F32, Shape, Tensor, numpy_dtype

if TYPE_CHECKING:
    from adapterpack.tensor import Array

E4M3 = DTYPES["F8_E4M3"]
MAX = 448.0
"""Largest E4M3 value."""
DEFAULT_BLOCK, MX_BLOCK = (128, 128), (1, 32)
"""What `fp8` and `mxfp8` mean where they name no block size."""
_OTHER_FP8 = tuple(DTYPES[name] for name in ("F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"))
_EXPONENTS = (DTYPES["F8_E8M0"], DTYPES["U8"])
_SCALES = (F32, BF16, F16, *_EXPONENTS)
_SCALE_ENDINGS = ("_scale_inv", "_scale")
_ACTIVATIONS = {
    *("input_scale", "output_scale", "input_scale_ub", "activation_scale"),
    *("gate_up_proj_activation_scale", "up_proj_activation_scale", "down_proj_activation_scale"),
    *("k_scale", "v_scale", "q_scale"),
}
_ELSEWHERE = "merge into the original 16-bit model, then quantise the result"


@dataclass(frozen=True)
class Blocks:
    """An FP8 tensor, (out, in) or a stack of such matrices, with a grid of scales; see `Packed`.

    Attributes:
        weight: F8_E4M3.
        scale: One value for each block, in reading order of the grids.
        out: Rows of one matrix.
        block: Rows and columns of one block; the last ones may be smaller.
    """

    name: str
    scale_name: str
    kind: str
    weight: Tensor = field(repr=False)
    scale: Tensor = field(repr=False)
    out: int
    block: tuple[int, int]

    @property
    def shape(self) -> Shape:
        return self.weight.shape

    @property
    def stored(self) -> tuple[str, ...]:
        return (self.name, self.scale_name)

    @property
    def _grid(self) -> tuple[int, int]:
        return -(-self.out // self.block[0]), -(-self.shape[-1] // self.block[1])

    @property
    def step(self) -> int:
        return max(1, STEP // self.shape[-1]) * self.shape[-1]

    def values(self, start: int, stop: int) -> Array:
        import numpy as np

        width = self.shape[-1]
        first, last = start // width, -(-stop // width)
        codes = np.arange(256, dtype=np.uint8).view(numpy_dtype(E4M3)).astype(np.float32)
        data = self.weight.source.read(first * width, last * width)
        rows = np.take(codes, np.frombuffer(data, np.uint8), mode="clip").reshape(-1, width)
        owner = self._owner(first, last)
        low, columns = int(owner[0]), self._grid[1]
        found = scales(self.scale, self.scale_name, low * columns, (int(owner[-1]) + 1) * columns)
        with np.errstate(over="ignore", invalid="ignore"):
            for part, factor in self._by_block(rows, found.reshape(-1, columns)[owner - low]):
                part *= factor
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def _owner(self, first: int, last: int) -> Array:
        """For each of the rows [first, last) the row of the stacked grids that scales it."""
        import numpy as np

        row = np.arange(first, last)
        return row // self.out * self._grid[0] + row % self.out // self.block[0]

    def _by_block(self, rows: Array, factor: Array) -> Iterator[tuple[Array, Array]]:
        """Views of rows cut at block columns, (n, blocks, columns), with what belongs to them, (n, blocks, 1).

        Whole blocks in one piece, then the last, smaller one: nothing is copied.
        """
        wide = self.block[1]
        whole = rows.shape[1] // wide
        if whole:
            yield rows[:, : whole * wide].reshape(len(rows), whole, wide), factor[:, :whole, None]
        if rows.shape[1] % wide:
            yield rows[:, None, whole * wide :], factor[:, whole:, None]

    # -- back --------------------------------------------------------------------------------------------

    def requantise(self, values: Array) -> dict[str, Array]:
        """FP8 codes and scales for new f32 values of this tensor.

        A block in which nothing changed keeps its codes and its scale, so that requantising what was read
        changes no byte. Else scale = amax / 448 in the scale's dtype (powers of two: the next one up; an
        all-zero block: 1), and codes are rounded to nearest even and saturate.

        Raises:
            Unsupported: a value that changed is infinite or NaN.
        """
        import numpy as np

        rows = values.reshape(-1, self.shape[-1])
        starts = np.arange(0, rows.shape[1], self.block[1])
        total = self.scale.numel // self._grid[1]
        amax = np.zeros((total, self._grid[1]), np.float32)
        changed = np.zeros(amax.shape, bool)
        for first, last in self._pieces(len(rows)):
            new, owner = rows[first:last], self._owner(first, last)
            old = self.values(first * rows.shape[1], last * rows.shape[1]).reshape(new.shape)
            other = (old != new) & ~(np.isnan(old) & np.isnan(new))
            np.logical_or.at(changed, owner, np.logical_or.reduceat(other, starts, axis=1))
            np.maximum.at(amax, owner, np.maximum.reduceat(np.abs(new), starts, axis=1))
        if not np.all(np.isfinite(amax[changed])):
            raise Unsupported(f"{self.name} would hold an infinity or a NaN, which FP8 has no place for")
        scale = np.frombuffer(self.scale.bytes(), numpy_dtype(self.scale.dtype)).reshape(amax.shape).copy()
        scale[changed] = self._scale_of(amax[changed])
        codes = np.frombuffer(self.weight.bytes(), np.uint8).reshape(rows.shape).copy()
        self._encode(rows, scale, changed, codes)
        return {
            self.name: codes.view(numpy_dtype(E4M3)).reshape(self.shape),
            self.scale_name: scale.reshape(self.scale.shape),
        }

    def _pieces(self, rows: int) -> Iterator[tuple[int, int]]:
        size = max(1, STEP // self.shape[-1])
        return ((first, min(first + size, rows)) for first in range(0, rows, size))

    def _scale_of(self, amax: Array) -> Array:
        """Scales for blocks whose largest magnitudes are these, in the stored dtype."""
        import numpy as np

        if self.scale.dtype in _EXPONENTS:
            fraction, exponent = np.frexp(amax / np.float32(MAX))
            exponent = np.clip(exponent - (fraction == 0.5), -E8M0_BIAS, E8M0_BIAS)
            exponent = np.where(amax == 0, 0, exponent)
            return (exponent + E8M0_BIAS).astype(np.uint8).view(numpy_dtype(self.scale.dtype))
        dtype = numpy_dtype(self.scale.dtype)
        # Below 2^-14 a scale in F16 loses bits, below 2^-126 any does: there a larger scale is the better one.
        least = np.float32(2.0**-14 if self.scale.dtype == F16 else 2.0**-126)
        wanted = np.maximum(amax / np.float32(MAX), least)
        if self.scale.dtype == F16:
            wanted = np.minimum(wanted, np.float32(65504))
        return np.where(amax == 0, np.float32(1), wanted).astype(dtype)

    def _encode(self, rows: Array, scale: Array, changed: Array, codes: Array) -> None:
        """Write the codes of changed blocks over the old ones."""
        import numpy as np

        if self.scale.dtype in _EXPONENTS:
            factor = np.ldexp(np.float32(1), scale.view(np.uint8).astype(np.int32) - E8M0_BIAS)
        else:
            factor = scale.astype(np.float32)
        for first, last in self._pieces(len(rows)):
            owner = self._owner(first, last)
            if not changed[owner].any():
                continue
            scaled = rows[first:last].astype(np.float32)
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                for part, by in self._by_block(scaled, factor[owner]):
                    part /= by
                np.clip(scaled, -MAX, MAX, out=scaled)
                new = scaled.astype(numpy_dtype(E4M3)).view(np.uint8)
            for (part, mask), (fresh, _) in zip(
                self._by_block(codes[first:last], changed[owner]), self._by_block(new, changed[owner]), strict=True
            ):
                np.copyto(part, fresh, where=mask)


# -- finding them ----------------------------------------------------------------------------------------


def read_fp8(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Parts:
    """`quant_method: fp8` and `mxfp8`.

    Raises:
        InvalidFile: an absurd block size, a scale that is missing or of another shape.
        Unsupported: FP4 experts or another kind of FP8.
    """
    if entry.get("expert_dtype", "fp8") != "fp8" or str(entry.get("fmt", "e4m3")).lower() != "e4m3":
        raise Unsupported("experts in FP4 or FP8 other than E4M3 cannot be dequantised here", hint=_ELSEWHERE)
    usual = MX_BLOCK if entry.get("quant_method") == "mxfp8" else DEFAULT_BLOCK
    return collect(tensors, _block(entry.get("weight_block_size", usual), "weight_block_size"))


def read_compressed(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Parts:
    """`quant_method: compressed-tensors`, where all groups are FP8.

    Raises:
        Unsupported: integers, FP4, groups of columns, zero points, sparsity or transforms.
        InvalidFile: as `read_fp8`.
    """
    groups = entry.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise InvalidFile("the quantization_config of config.json has no config_groups")
    sparsity = entry.get("sparsity_config")
    if entry.get("transform_config") or (isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense"):
        raise Unsupported("compressed-tensors with sparsity or transforms cannot be undone here", hint=_ELSEWHERE)
    blocks: set[tuple[int, int]] = set()
    for group in groups.values():
        weights, form = group.get("weights"), group.get("format") or entry.get("format")
        if weights is None:
            continue
        if not isinstance(weights, dict):
            raise InvalidFile("a group of the quantization_config has no object under weights")
        kind = (weights.get("type"), weights.get("num_bits"), weights.get("symmetric", True), form)
        if kind[:3] != ("float", 8, True) or form not in ("float-quantized", "naive-quantized"):
            raise Unsupported(
                f"compressed-tensors weights of the kind {kind} cannot be dequantised here", hint=_ELSEWHERE
            )
        strategy = weights.get("strategy") or "tensor"
        if strategy not in ("tensor", "channel", "block"):
            raise Unsupported(
                f"compressed-tensors strategy {strategy!r:.40} cannot be dequantised here", hint=_ELSEWHERE
            )
        if strategy == "block":
            found = _block(weights.get("block_structure"), "block_structure")
            if found is not None:
                blocks.add(found)
    if len(blocks) > 1:
        raise Unsupported("compressed-tensors with blocks of several sizes cannot be told apart", hint=_ELSEWHERE)
    return collect(tensors, blocks.pop() if blocks else None)


def read_modelopt(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Parts:
    """`quant_method: modelopt` with `quant_algo: FP8`: one scale for each tensor.

    Raises:
        Unsupported: another algorithm.
        InvalidFile: as `read_fp8`.
    """
    if entry.get("quant_algo") != "FP8":
        raise Unsupported(f"ModelOpt {entry.get('quant_algo')!r:.40} cannot be dequantised here", hint=_ELSEWHERE)
    return collect(tensors, None)


def unambiguous(tensors: Mapping[str, Tensor]) -> bool:
    """Without a word in config.json: has every FP8 tensor DeepSeek's scales, one for each 128 x 128 block?"""
    found = False
    for name, tensor in tensors.items():
        if tensor.dtype == E4M3:
            scale = tensors.get(f"{name}_scale_inv")
            if scale is None or f"{name}_scale" in tensors or len(tensor.shape) < 2:
                return False
            if scale.dtype not in (F32, BF16) or scale.shape != _grid_shape(tensor.shape, DEFAULT_BLOCK):
                return False
            found = True
    return found


def collect(tensors: Mapping[str, Tensor], block: tuple[int, int] | None) -> Parts:
    """Pair every FP8 tensor with its scale.

    Args:
        block: The declared block; None if there are scales by row or tensor only.

    Raises:
        InvalidFile: a scale is missing, there twice, of a wrong dtype or shape, or belongs to nothing.
        Unsupported: FP8 of another kind.
    """
    packed: dict[str, Packed] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in _OTHER_FP8:
            raise Unsupported(f"{name} is {tensor.dtype}: weights are read in F8_E4M3 only", hint=_ELSEWHERE)
        if tensor.dtype == E4M3:
            names = [name + ending for ending in _SCALE_ENDINGS if name + ending in tensors]
            if len(names) != 1:
                raise InvalidFile(f"{name} is FP8 and has {len(names)} scales beside it ({name}_scale_inv or _scale)")
            packed[name] = _layout(name, tensor, names[0], tensors[names[0]], block)
    used = {stored for p in packed.values() for stored in p.stored}
    dropped = tuple(n for n, t in tensors.items() if n not in used and _of_activations(n, t))
    accounted = used.union(dropped)
    for name in tensors:
        if name.endswith(("weight_scale", "weight_scale_inv", "proj_scale_inv")) and name not in accounted:
            raise InvalidFile(f"{name} is the scale of no FP8 tensor")
    return Parts(packed, dropped)


def _of_activations(name: str, tensor: Tensor) -> bool:
    """One value, or one for each expert or head, under a name that FP8 schemes use."""
    last = name.rpartition(".")[2]
    return last in _ACTIVATIONS and tensor.dtype.kind == "float" and tensor.numel <= max((1, *tensor.shape))


def _block(value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, list | tuple) else ()
    if len(pair) != 2 or not all(type(n) is int and 0 < n <= 1 << 20 for n in pair):
        raise InvalidFile(f"{where} of config.json is {value!r:.60}: two positive whole numbers are wanted")
    return pair[0], pair[1]


def _grid_shape(shape: Shape, block: tuple[int, int]) -> Shape:
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _layout(name: str, weight: Tensor, scale_name: str, scale: Tensor, block: tuple[int, int] | None) -> Blocks:
    shape, found = weight.shape, scale.shape
    if len(shape) not in (2, 3) or 0 in shape:
        raise InvalidFile(f"{name} is FP8 and of the shape {shape}; (out, in) or (experts, out, in) is wanted")
    if scale.dtype not in _SCALES:
        raise InvalidFile(f"{scale_name} is {scale.dtype}, which no scale is")
    *_, out, width = shape
    if scale.numel == 1 and len(found) <= len(shape):
        every = math.prod(shape[:-1])
        return Blocks(name, scale_name, "per-tensor FP8", weight, scale, every, (every, width))
    if block is not None and found == _grid_shape(shape, block):
        return Blocks(name, scale_name, "block FP8", weight, scale, out, block)
    if found == (*shape[:-1], 1):
        return Blocks(name, scale_name, "per-channel FP8", weight, scale, out, (1, width))
    if found == (*shape[:-2], 1, 1):
        return Blocks(name, scale_name, "per-tensor FP8", weight, scale, out, (out, width))
    wanted = f"{_grid_shape(shape, block)} for blocks of {block}" if block else f"(), (1,) or {(*shape[:-1], 1)}"
    raise InvalidFile(f"{scale_name} has the shape {found}, which does not fit {name} {shape}: {wanted} is wanted")
