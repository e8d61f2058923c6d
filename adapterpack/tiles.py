"""Pairs of low-rank changes, compared many at a time in bounded memory; no dense change is ever whole in it.

Small modules are put together by shape, so that a device has enough to do. Norms come from QR in f64. The largest
element of a difference is found exactly in f64 all the same: f32 tiles tell where it can be, with a bound on their
rounding, and only those rows are computed in f64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapterpack.accuracy import Sums
from adapterpack.adapter import LowRank
from adapterpack.methods import _lowrank

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

_HOST, _DEVICE = 48 << 20, 2 << 30
"""Bytes that factors of pairs and their f64 copies may take at a time, in the CPU's memory and in a device's."""
_TILE = 1 << 21
"""Elements of a tile on the CPU: 8 MiB of f32."""
_SMALL = 1 << 18
"""Elements of a difference that is not worth a search: it is computed in f64 at once, in a batch."""
_NEGLIGIBLE = 1e-13
"""Of the norm of g: columns that are left out of the search, not of the result."""


@dataclass
class Lot:
    """Pairs that wait for others of their shape.

    Attributes:
        xp: Where the factors are and tiles are computed.
        largest: Find the largest absolute difference too; else it is NaN.
        done: Called with the number of pairs that were finished.
    """

    xp: Backend
    largest: bool = True
    done: Callable[[int], None] = lambda n: None
    _waiting: dict[tuple[int, ...], list[tuple[Sums, LowRank, LowRank]]] = field(default_factory=dict)
    _bytes: int = 0

    def __post_init__(self) -> None:
        self._proofs = self.xp.for_proofs()
        self._room = _HOST if self._proofs.device.type == "cpu" else _DEVICE

    def add(self, sums: Sums, x: LowRank, y: LowRank) -> None:
        """Compare x, the reference, with y; the result is added to `sums`, now or at `finish`."""
        key = (x.b.shape[0], x.a.shape[1], x.a.shape[0], y.a.shape[0])
        self._waiting.setdefault(key, []).append((sums, x, y))
        self._bytes += _bytes(key)
        if len(self._waiting[key]) * _bytes(key) * 6 > self._room:
            self._flush(key)
        while self._bytes > self._room:
            self._flush(max(self._waiting, key=lambda k: len(self._waiting[k]) * _bytes(k)))

    def finish(self) -> None:
        """Compare all that still wait."""
        for key in list(self._waiting):
            self._flush(key)

    def _flush(self, key: tuple[int, ...]) -> None:
        pairs = self._waiting.pop(key)
        self._bytes -= len(pairs) * _bytes(key)
        with self.xp.full_precision():
            found = _lowrank.compared(self._proofs, [x for _, x, _ in pairs], [y for _, _, y in pairs])
            most = self._most(found)
        columns = [v.tolist() for v in (found.difference, found.norm_x, found.norm_y, found.inner)]
        for (sums, _, _), *figures, max_abs in zip(pairs, *columns, most, strict=True):
            sums.add_norms(*figures, max_abs)
        self.done(len(pairs))

    def _most(self, found: _lowrank.Compared) -> list[float]:
        n, long, short = found.g.shape[0], found.g.shape[1], found.q.shape[1]
        if not self.largest:
            return [math.nan] * n
        if long * short > _SMALL:
            return [largest(self.xp, self._proofs, g, q) for g, q in zip(found.g, found.q, strict=True)]
        step = max(1, self._room // (long * short * 16))
        parts = [(found.g[i : i + step] @ found.q[i : i + step].mT).abs().amax((1, 2)) for i in range(0, n, step)]
        return [float(m) for part in parts for m in part.tolist()]


def _bytes(key: tuple[int, ...]) -> int:
    """Of the f32 factors of a pair."""
    out, into, rank_x, rank_y = key
    return (out + into) * (rank_x + rank_y) * 4


def largest(xp: Backend, proofs: Backend, g: Array, q: Array) -> float:
    """The largest magnitude of an element of g @ q.T, as f64 has it, without the whole product.

    An f32 sum of k products is off by at most (k + 2) 2^-24 times the norms of the row and the column (Higham 2002,
    section 3.1, with Cauchy and Schwarz). The rows that may hold the largest element for all of that are computed in
    f64. Rows and columns come by their norms, largest first: what the product of norms rules out is not computed.

    Args:
        xp: Where f32 tiles are computed.
        proofs: Where g and q are.
        g, q: f64, (long, k) and (short, k); the columns of q are orthonormal.
    """
    torch = proofs.torch
    rows, columns = (torch.linalg.vector_norm(f, dim=1) for f in (g, q))
    top = float(rows.max())
    if not (0 < top < math.inf) or not proofs.finite(columns):
        return 0.0 if top == 0 else math.nan
    weights = torch.linalg.vector_norm(g, dim=0)
    kept = weights > _NEGLIGIBLE * weights.max()
    dropped = float(weights[~kept].sum()) / top
    rows, row_order = torch.sort(rows / top, descending=True)
    columns, column_order = torch.sort(columns, descending=True)
    near = (g[row_order][:, kept] / top).float().to(xp.device)
    far = q[column_order][:, kept].float().to(xp.device).T.contiguous()
    widest = float(columns[0])
    strays = rows * (widest * (int(kept.sum()) + 2) * 2.0**-24) + (dropped + 2.0**-60)
    found = torch.zeros_like(rows)
    height = max(16, (xp.block or _TILE) // len(columns))
    floor, stop = 0.0, 0
    descending = columns.cpu()
    for start in range(0, len(rows), height):
        highest = float(rows[start])
        if highest * widest <= floor:
            break
        stop = min(start + height, len(rows))
        # Columns that could still hold more than what is sure by now.
        width = int((descending * highest > floor).sum())
        tile = near[start:stop] @ far[:, :width]
        found[start:stop] = tile.abs_().amax(1).to(proofs.device).double()
        floor = max(floor, float((found[start:stop] - strays[start:stop]).max()))
    candidates = row_order[:stop][found[:stop] + strays[:stop] >= floor]
    most = 0.0
    for part in candidates.split(max(1, (proofs.block or _TILE) // (2 * len(columns)))):
        most = max(most, float((g[part] @ q.T).abs().max()))
    return most
