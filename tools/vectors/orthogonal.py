"""Rotations in float64, as matrices: what the formulas of OFT and BOFT share."""

from __future__ import annotations

import numpy as np


def skew(packed: np.ndarray) -> np.ndarray:
    """The skew-symmetric matrix whose upper triangle, row by row, is `packed`."""
    side = next(b for b in range(1, 2 * len(packed) + 3) if b * (b - 1) // 2 == len(packed))
    q = np.zeros((side, side))
    q[np.triu_indices(side, 1)] = packed
    return q - q.T


def cayley(q: np.ndarray) -> np.ndarray:
    identity = np.eye(len(q))
    return (identity - q) @ np.linalg.inv(identity + q)


def series(q: np.ndarray, terms: int) -> np.ndarray:
    """I + 2 Q + 2 Q^2 + ... with the last power once, from three terms on."""
    powers = [np.linalg.matrix_power(q, n) for n in range(max(terms, 1))]
    factors = [1.0] + [2.0] * (len(powers) - 1)
    if terms == 3:
        powers, factors = [*powers, np.linalg.matrix_power(q, 3)], [1.0, 2.0, 2.0, 1.0]
    elif terms > 3:
        factors[-1] = 1.0
    return np.asarray(sum(f * p for f, p in zip(factors, powers, strict=True)))


def diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    side = len(blocks[0])
    out = np.zeros((side * len(blocks),) * 2)
    for n, block in enumerate(blocks):
        out[n * side : (n + 1) * side, n * side : (n + 1) * side] = block
    return out
