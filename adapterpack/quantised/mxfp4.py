"""MXFP4 as gpt-oss stores its experts: 32 FP4 values share one power of two.

`X_blocks` U8 (E, out, in / 32, 16), two E2M1 codes to a byte, low nibble first; `X_scales` U8 (E, out, in / 32),
an exponent with a bias of 127. The unquantised checkpoint holds `X` as (E, in, out): the transpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterpack.errors import InvalidFile
from adapterpack.quantised._values import STEP, Packed, Parts, scales
from adapterpack.tensor import DTYPES, Shape, Tensor

if TYPE_CHECKING:
    from adapterpack.tensor import Array

_GROUP, _BYTES = 32, 16
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SLAB_BYTES = 1 << 20
"""How much of an expert is read and transposed at a time."""
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class Experts:
    """The FP4 experts of one layer, seen transposed; see `Packed`.

    Attributes:
        name: Name of the unquantised tensor, (E, in, out).
        blocks: U8 (E, out, in / 32, 16).
        scales: U8 (E, out, in / 32).
    """

    name: str
    blocks: Tensor = field(repr=False)
    scales: Tensor = field(repr=False)
    kind: str = "MXFP4"

    @property
    def shape(self) -> Shape:
        experts, out, groups, _ = self.blocks.shape
        return (experts, groups * _GROUP, out)

    @property
    def step(self) -> int:
        # Whole groups of rows: a group's codes lie in the same bytes.
        group = _GROUP * max(1, self.shape[2])
        return max(1, 4 * STEP // group) * group

    @property
    def stored(self) -> tuple[str, ...]:
        return (self.name + _BLOCKS, self.name + _SCALES)

    def values(self, start: int, stop: int) -> Array:
        import numpy as np

        _, width, out = self.shape
        first, last = start // out, -(-stop // out)
        # Whole groups of 32 rows are decoded, and what is not asked for is cut off.
        low, high = first // _GROUP, -(-last // _GROUP)
        rows = np.empty(((high - low), _BYTES, 2, out), np.float32)
        at, groups = low, width // _GROUP
        while at < high:
            expert, group = divmod(at, groups)
            end = min(high, (expert + 1) * groups)
            self._expert(expert, group, rows[at - low : end - low])
            at = end
        skipped = low * _GROUP * out
        return rows.reshape(-1)[start - skipped : stop - skipped]

    def _expert(self, expert: int, low: int, into: Array) -> None:
        """Groups of one expert, from group `low` on, into an f32 array (groups, 16, 2, out).

        The codes are transposed as bytes, an eighth of what their values would be.
        """
        import numpy as np

        _, out, groups, _ = self.blocks.shape
        table = np.array([*_E2M1, *(-v for v in _E2M1)], np.float32)
        byte = np.arange(256)
        halves = (table[byte & 15], table[byte >> 4])
        high = low + len(into)
        slab = max(1, _SLAB_BYTES // (groups * _BYTES))
        for top in range(0, out, slab):
            bottom = min(out, top + slab)
            begin, end = (expert * out + top) * groups, (expert * out + bottom) * groups
            data = self.blocks.source.read(begin * _BYTES, end * _BYTES)
            codes = np.frombuffer(data, np.uint8).reshape(bottom - top, groups, _BYTES)[:, low:high]
            factor = scales(self.scales, self.name + _SCALES, begin, end).reshape(bottom - top, groups)
            across = np.ascontiguousarray(codes.transpose(1, 2, 0))
            by = np.ascontiguousarray(factor[:, low:high].T)[:, None]
            with np.errstate(over="ignore"):
                for n, half in enumerate(halves):
                    np.multiply(np.take(half, across, mode="clip"), by, out=into[:, :, n, top:bottom])


def read(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Parts:
    """Find the experts.

    Raises:
        InvalidFile: half a pair, other dtypes or shapes, or the unquantised tensor beside them.
    """
    u8 = DTYPES["U8"]
    packed: dict[str, Packed] = {}
    for blocks_name, blocks in tensors.items():
        if not blocks_name.endswith(_BLOCKS):
            continue
        name = blocks_name.removesuffix(_BLOCKS)
        found = tensors.get(name + _SCALES)
        if found is None:
            raise InvalidFile(f"{blocks_name} has no {name}{_SCALES} beside it")
        if name in tensors:
            raise InvalidFile(f"{name} is there twice: as it is, and as {blocks_name}")
        if blocks.dtype != u8 or len(blocks.shape) != 4 or blocks.shape[3] != _BYTES:
            raise InvalidFile(
                f"{blocks_name} is {blocks.dtype} {blocks.shape}; U8 (experts, out, in / 32, 16) is wanted"
            )
        if found.dtype != u8 or found.shape != blocks.shape[:3]:
            raise InvalidFile(f"{name}{_SCALES} is {found.dtype} {found.shape}; U8 {blocks.shape[:3]} is wanted")
        packed[name] = Experts(name, blocks, found)
    for scales_name, tensor in tensors.items():
        name = scales_name.removesuffix(_SCALES)
        if scales_name.endswith(_SCALES) and tensor.dtype == u8 and name not in packed:
            raise InvalidFile(f"{scales_name} has no {name}{_BLOCKS} beside it")
    return Parts(packed)
