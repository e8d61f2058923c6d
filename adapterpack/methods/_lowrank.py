"""Algebra of low-rank changes that never forms the dense matrix. All in f64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterpack.adapter import LowRank
from adapterpack.errors import InvalidFile

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend


def _middle(xp: Backend, b: Array, a: Array) -> Array:
    """Small, with the singular values of b @ a: R of b times R of a, transposed."""
    qr = xp.torch.linalg.qr
    return qr(b, mode="r")[1] @ qr(a.T, mode="r")[1].T


def _f64(xp: Backend, values: Array) -> Array:
    """Where f64 is: not every device that holds factors has it."""
    return values.to(xp.device).double()


def norm(xp: Backend, f: LowRank) -> float:
    """Frobenius norm of scale * b @ a."""
    return abs(f.scale) * float(_middle(xp, _f64(xp, f.b), _f64(xp, f.a)).norm())


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
    return bool(xp.torch.equal(_f64(xp, x.b[:, :rank]) * x.scale, _f64(xp, y.b[:, :rank]) * y.scale))


def distance(xp: Backend, x: LowRank, y: LowRank) -> float:
    """Frobenius norm of the difference of two changes of one shape, from QR of the stacked factors."""
    b = xp.torch.cat([x.b.double() * x.scale, y.b.double() * -y.scale], dim=1)
    a = xp.torch.cat([x.a.double(), y.a.double()], dim=0)
    return float(_middle(xp, b, a).norm())


@dataclass(frozen=True)
class Compared:
    """Pairs of changes of one shape and one pair of ranks, compared: x, the reference, with y.

    Attributes:
        difference, norm_x, norm_y: Frobenius norms of x - y, x and y; each (n,), f64.
        inner: Sum of the products of their elements, (n,), f64.
        g, q: f64, (n, long, k) and (n, short, k): each x - y, or its transpose, is g @ q.mT. The columns of q are
            orthonormal, so that g is of the size of the difference however large x and y are.
    """

    difference: Array
    norm_x: Array
    norm_y: Array
    inner: Array
    g: Array
    q: Array


def compared(xp: Backend, xs: Sequence[LowRank], ys: Sequence[LowRank]) -> Compared:
    """From one QR of the stacked factors of the shorter side of each pair, batched, in f64.

    [Bx -By] @ [Ax; Ay] with [Ax; Ay].T = Q R is ([Bx -By] R.T) Q.T: the norms are those of the first factor. Sums of
    squares of Gram matrices would lose half of the digits (Golub and Van Loan, section 5.3.2).

    Args:
        xp: A backend that has f64.
        xs, ys: Factors (out, r) and (r, in), wherever they lie; each list has one shape and rank.
    """
    torch = xp.torch
    rank = xs[0].a.shape[0]

    def both(pick: Callable[[LowRank], Array], factor: Callable[[LowRank], float], dim: int) -> Array:
        sides = ([_f64(xp, pick(f)) * factor(f) for f in side] for side in (xs, ys))
        return torch.cat([torch.stack(side) for side in sides], dim=dim)

    b = both(lambda f: f.b, lambda f: f.scale, 2)
    a = both(lambda f: f.a, lambda f: 1.0, 1).mT
    short, long = (a, b) if a.shape[1] <= b.shape[1] else (b, a)
    q, r = torch.linalg.qr(short)
    own, other = (long[:, :, part] @ r[:, :, part].mT for part in (slice(0, rank), slice(rank, None)))
    g = own - other

    def norms(values: Array) -> Array:
        return torch.linalg.vector_norm(values, dim=(1, 2))

    return Compared(norms(g), norms(own), norms(other), (own * other).sum(dim=(1, 2)), g, q)


def singular_values(xp: Backend, f: LowRank, name: str) -> Array:
    """Those of scale * b @ a, f64, descending: min(out, r, in) of them.

    Args:
        name: Of the module, for the error.

    Raises:
        InvalidFile: a factor has NaN or infinite values.
    """
    middle = _middle(xp, f.b.double(), f.a.double())
    return xp.torch.linalg.svdvals(_finite(xp, middle, name)) * abs(f.scale)


def _finite(xp: Backend, middle: Array, name: str) -> Array:
    if not xp.finite(middle):
        raise InvalidFile(f"{name} has NaN or infinite values")
    return middle


def least_rank(values: Array, lost: float) -> int:
    """The least rank, 1 at least, that loses no more than this fraction of the squared singular values.

    Args:
        values: Descending, f64.
    """
    # tail[k]: what is lost when k singular values are kept.
    tail = (values**2).flip(0).cumsum(0).flip(0)
    return int((tail > lost * (values**2).sum()).sum()) or 1


@dataclass(frozen=True)
class Decomposed:
    """A change as its singular vectors and values, f64.

    Attributes:
        left: (out, k).
        values: (k,), descending, without the scale.
        right: (k, in).
    """

    left: Array
    values: Array
    right: Array

    def at(self, rank: int) -> tuple[Array, Array]:
        """The best factors (b, a) of that rank, k at most: (out, rank) and (rank, in).

        The error of their product is the optimum (Eckart and Young 1936), that of the dropped singular values.
        """
        root = self.values[:rank].sqrt()
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]


def decomposed(xp: Backend, f: LowRank, name: str) -> Decomposed:
    """The singular value decomposition of b @ a, without its scale; see `singular_values` for the error."""
    qb, rb = xp.torch.linalg.qr(f.b.double())
    qa, ra = xp.torch.linalg.qr(f.a.double().T)
    u, s, vh = xp.torch.linalg.svd(_finite(xp, rb @ ra.T, name), full_matrices=False)
    return Decomposed(qb @ u, s, vh @ qa.T)
