"""The best low-rank form of a dense matrix: exact where it is small, sketched where it is large.

Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1: a random projection of the range, power
iterations, and the SVD of what is left. The random matrix is seeded: the same matrix gives the same factors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

EXACT = 512
"""Up to this many rows or columns the SVD is exact, in f64."""
_POWERS = 4
_SEED = 0x5EED
_ROWS = 512
_BLOCK = 1 << 20
"""Elements of a block that is compared at a time."""
_FIRST = 64
"""The rank that a sketch for an energy starts with."""


def at_rank(xp: Backend, d: Array, rank: int) -> tuple[Array, Array]:
    """The best factors of that rank (Eckart and Young 1936), or nearly so where the matrix is large.

    Args:
        d: (out, in), f32 or f64; a transposed view will do.
        rank: At most min(out, in).

    Returns:
        B (out, rank) and A (rank, in) with B @ A near d, in f32 or f64, the singular values shared among both.
    """
    small = min(d.shape)
    wide = rank + max(16, rank // 2)
    u, s, vh = _exact(xp, d) if small <= EXACT or 2 * wide > small else _sketch(xp, d, wide)
    return _shared(u, s, vh, rank)


def at_energy(xp: Backend, d: Array, energy: float, most: int | None = None) -> tuple[Array, Array]:
    """Factors of the least rank that keeps a fraction of the squared singular values.

    The whole is known exactly, as the Frobenius norm. A sketch grows until it holds the fraction, or until an exact
    SVD is cheaper. Singular values of a sketch are never too large, so it never keeps too little.

    Args:
        d: (out, in), f32 or f64.
        energy: In (0, 1].
        most: The largest rank; None: min(out, in).
    """
    small = min(d.shape)
    most = small if most is None else min(most, small)
    total = sum(_energy(row) for row in d.split(_ROWS))
    rank = _FIRST
    while small > EXACT and 2 * (wide := rank + rank // 2) <= small:
        u, s, vh = _sketch(xp, d, wide)
        # The last third of a sketch is no good for itself.
        kept = _least(s, energy, total, rank)
        if kept is not None or rank >= most:
            return _shared(u, s, vh, min(kept or most, most))
        rank *= 2
    u, s, vh = _exact(xp, d)
    kept = _least(s, energy, _energy(s), small)
    return _shared(u, s, vh, min(kept or small, most))


def lost(d: Array, b: Array, a: Array) -> float:
    """The relative Frobenius error of b @ a against d, block by block, in f64 (on the CPU where the device has none).

    0/0 is 0, x/0 is infinite.
    """
    place = "cpu" if d.device.type == "mps" else d.device
    b, a = b.to(place).double(), a.to(place).double()
    missed = whole = 0.0
    step = max(1, _BLOCK // d.shape[1])
    for start in range(0, d.shape[0], step):
        block = d[start : start + step].to(place).double()
        whole += float((block**2).sum())
        missed += float(((block - b[start : start + step] @ a) ** 2).sum())
    return math.sqrt(missed / whole) if whole else (0.0 if not missed else math.inf)


def _energy(values: Array) -> float:
    """The sum of squares, in f64."""
    return float((values.cpu().double() ** 2).sum())


def _least(s: Array, energy: float, total: float, most: int) -> int | None:
    """How many singular values it takes; None if `most` of them do not."""
    left = total - (s.cpu().double() ** 2).cumsum(0)[:most]
    enough = (left <= (1 - energy) * total).nonzero()
    return int(enough[0]) + 1 if len(enough) else None


def _shared(u: Array, s: Array, vh: Array, rank: int) -> tuple[Array, Array]:
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _exact(xp: Backend, d: Array) -> tuple[Array, Array, Array]:
    wide = d.double() if min(d.shape) <= EXACT and d.device.type != "mps" else d
    u, s, vh = xp.torch.linalg.svd(wide, full_matrices=False)
    return u, s, vh


def _sketch(xp: Backend, d: Array, wide: int) -> tuple[Array, Array, Array]:
    """The leading singular triples, `wide` of them."""
    torch = xp.torch
    # Drawn on the CPU: no device has the same generator.
    g = torch.Generator().manual_seed(_SEED)
    test = torch.randn(d.shape[1], wide, generator=g, dtype=torch.float32).to(d.device, d.dtype)
    q = torch.linalg.qr(d @ test).Q
    for _ in range(_POWERS):
        q = torch.linalg.qr(d.T @ q).Q
        q = torch.linalg.qr(d @ q).Q
    u, s, vh = torch.linalg.svd(q.T @ d, full_matrices=False)
    return q @ u, s, vh
