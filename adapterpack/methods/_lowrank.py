"""Algebra of low-rank changes that never forms the dense matrix. All in f64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterpack.adapter import LowRank

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend


def _core(xp: Backend, b: Array, a: Array) -> tuple[Array, Array, Array]:
    """(Qb, R, Qa) with b @ a == Qb @ R @ Qa.T; R is small."""
    qb, rb = xp.torch.linalg.qr(b)
    qa, ra = xp.torch.linalg.qr(a.T)
    return qb, rb @ ra.T, qa


def norm(xp: Backend, f: LowRank) -> float:
    """Frobenius norm of scale * b @ a."""
    return abs(f.scale) * float(_core(xp, f.b.double(), f.a.double())[1].norm())


def same(xp: Backend, x: LowRank, y: LowRank) -> bool:
    """The very same finite product: the same factors, wherever the scale stands, and zeros beyond the lower rank."""
    rank = min(x.a.shape[0], y.a.shape[0])
    # What is beyond adds nothing only if it is finite; 0 * inf is NaN.
    if not all(bool(f.isfinite().all()) for f in (x.b, x.a, y.b, y.a)):
        return False
    if x.b[:, rank:].any() or y.b[:, rank:].any() or not xp.torch.equal(x.a[:rank], y.a[:rank]):
        return False
    if x.scale == y.scale:
        return bool(xp.torch.equal(x.b[:, :rank], y.b[:, :rank]))
    return bool(xp.torch.equal(x.b[:, :rank].double() * x.scale, y.b[:, :rank].double() * y.scale))


def distance(xp: Backend, x: LowRank, y: LowRank) -> float:
    """Frobenius norm of the difference of two changes of one shape, from QR of the stacked factors."""
    b = xp.torch.cat([x.b.double() * x.scale, y.b.double() * -y.scale], dim=1)
    a = xp.torch.cat([x.a.double(), y.a.double()], dim=0)
    return float(_core(xp, b, a)[1].norm())


def truncate(xp: Backend, f: LowRank, max_error: float) -> tuple[Array, Array]:
    """The least rank whose relative Frobenius error is at most `max_error`, and the best factors of it.

    Returns:
        (b, a) in f32 with f.scale * b @ a near f.scale * f.b @ f.a; the rank is at least 1. The error is
        the optimum (Eckart and Young 1936): that of the dropped singular values.
    """
    qb, core, qa = _core(xp, f.b.double(), f.a.double())
    u, s, vh = xp.torch.linalg.svd(core)
    energy = (s**2).sum()
    # tail[k]: what is lost when k singular values are kept.
    tail = (s**2).flip(0).cumsum(0).flip(0)
    kept = int((tail > max_error**2 * energy).sum()) or 1
    root = s[:kept].sqrt()
    return (qb @ u[:, :kept] * root).float(), ((root[:, None] * vh[:kept]) @ qa.T).float()
