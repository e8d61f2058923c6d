"""Orthogonal maths that several methods share: rotations of the inputs of a weight, block by block, and reflections.

    Cayley:    R (I + Q) = I - Q, with Q skew-symmetric: orthogonal
    Neumann:   I + 2 Q + 2 Q^2 + ... + Q^n, a truncated series that is near to it (of -Q)
    reflection: I - 2 u u^T, ||u|| = 1

Each is written in PEFT's operations and order for the merge; the proof in f64 takes the short way that the dense
matrices of PEFT hide: block by block, vector by vector.
Reference: peft/tuners/oft/layer.py (`OFTRotationModule`), boft/layer.py (`cayley_batch`), hra/layer.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adapterpack.methods._formula import Maths

if TYPE_CHECKING:
    from adapterpack.backend import Array


def triangle_side(elements: int) -> int | None:
    """b, where a triangle without its diagonal has b (b - 1) / 2 elements; None: no triangle has that many."""
    side = (1 + math.isqrt(1 + 8 * elements)) // 2
    return side if side * (side - 1) // 2 == elements else None


def skew(m: Maths, packed: Array, side: int) -> Array:
    """Skew-symmetric (n, b, b) from the rows of their upper triangles, (n, b (b - 1) / 2)."""
    rows, columns = m.torch.triu_indices(side, side, 1, device=packed.device)
    upper = m.torch.zeros(packed.shape[0], side, side, dtype=packed.dtype, device=packed.device)
    upper[:, rows, columns] = packed
    return upper - upper.transpose(-2, -1)


def cayley(m: Maths, q: Array) -> Array:
    """(I - Q) (I + Q)^-1 of each matrix of a batch (n, b, b)."""
    identity = m.torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    return m.torch.linalg.solve(identity + q, identity - q, left=False)


def neumann(m: Maths, q: Array, terms: int) -> Array:
    """The first terms of the series, for a batch (n, b, b); the last one counts once (PEFT 0.18 and later)."""
    series = m.torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).repeat(q.shape[0], 1, 1)
    if terms > 1:
        series.add_(q, alpha=2.0)
    if terms > 2:
        power = m.torch.bmm(q, q)
        series.add_(power, alpha=2.0)
        for _ in range(3, terms - 1):
            power = m.torch.bmm(power, q)
            series.add_(power, alpha=2.0)
        series.add_(m.torch.bmm(power, q))
    return series


def rotate(m: Maths, blocks: Array, w: Array) -> Array:
    """W diag(R_1, R_2, ...)^T.

    Args:
        blocks: (n, b, b).
        w: (out, n * b).
    """
    if not m.exact:
        return m.torch.mm(m.torch.block_diag(*blocks), w.t()).t()
    n, b, _ = blocks.shape
    return m.torch.einsum("onj,nij->oni", w.reshape(-1, n, b), blocks).reshape(w.shape)


def butterfly(m: Maths, factors: Array, w: Array) -> Array:
    """W (P_k diag(R_k) P_k^T ... P_0 diag(R_0) P_0^T)^T, with the permutations P of block butterflies.

    Args:
        factors: (k, n, b, b).
        w: (out, n * b).
    """
    count, n, side, _ = factors.shape
    orders = [m.torch.tensor(o, device=w.device) for o in butterfly_orders(count, n, side)]
    if m.exact:
        for blocks, order in zip(factors, orders, strict=True):
            scattered = m.torch.empty_like(w)
            scattered[:, order] = w
            w = rotate(m, blocks, scattered)[:, order]
        return w
    matrix = None
    for blocks, order in zip(factors, orders, strict=True):
        factor = m.torch.block_diag(*blocks)[order][:, order]
        matrix = factor if matrix is None else factor @ matrix
    return m.torch.mm(matrix, w.t()).t()


def butterfly_orders(count: int, n: int, side: int) -> list[list[int]]:
    """Where each input of a factor comes from: pieces of half a block, those of even number first, in groups.

    Args:
        count: Factors; a single one leaves all in place.
        n, side: Blocks of a factor and their size; both even where there are several factors.
    """
    width = n * side
    if count == 1:
        return [list(range(width))]
    orders = []
    for level in range(count):
        group, piece = side << level, side // 2
        pieces = [*range(0, group, 2 * piece), *range(piece, group, 2 * piece)]
        order = [start + i for start in pieces for i in range(piece)]
        orders.append([base + i for base in range(0, width, group) for i in order])
    return orders


def reflect(m: Maths, u: Array, w: Array) -> Array:
    """W H_1 H_2 ... H_r, H_i = I - 2 u_i u_i^T, of the columns of u brought to length 1.

    Args:
        u: (in, r).
        w: (out, in).
    """
    u = u / u.norm(dim=0)
    columns = [u[:, i].view(-1, 1) for i in range(u.shape[1])]
    if m.exact:
        for c in columns:
            w = w - 2 * (w @ c) @ c.t()
        return w
    matrix = m.torch.eye(u.shape[0], dtype=u.dtype, device=u.device)
    for c in columns:
        matrix = matrix - 2 * matrix @ c @ c.t()
    return m.torch.mm(w, matrix)


def reflect_span(m: Maths, u: Array, w: Array) -> Array:
    """W (I - 2 Q Q^T), Q the columns of u made orthonormal one after the other (modified Gram-Schmidt).

    Args:
        u: (in, r).
        w: (out, in).
    """
    basis = [(u[:, 0] / u[:, 0].norm()).view(-1, 1)]
    for i in range(1, u.shape[1]):
        c = u[:, i].view(-1, 1)
        for before in basis:
            c = c - (before.t() @ c) * before
        basis.append((c / c.norm()).view(-1, 1))
    q = m.torch.cat(basis, dim=1)
    if m.exact:
        return w - 2 * (w @ q) @ q.t()
    identity = m.torch.eye(u.shape[0], dtype=u.dtype, device=u.device)
    return m.torch.mm(w, identity - 2 * q @ q.t())
