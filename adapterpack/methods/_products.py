"""Products that several methods make of small tensors, and their exact low-rank factors.

A pair (b, a) are factors of one matrix, b @ a: (out, r) and (r, in).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

from adapterpack.adapter import Shapes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array

    Pair: TypeAlias = tuple[Array, Array]


def tucker(torch: Any, core: Array, left: Array, right: Array, *, right_first: bool) -> Array:
    """(out, in, k...) from a core (r, r, k...) and two factors, (r, out) and (r, in).

    Args:
        right_first: Which factor meets the core first: the bits depend on it.
    """
    if right_first:
        return torch.einsum("i j ..., j r, i p -> p r ...", core, right, left)
    return torch.einsum("i j ..., i p, j r -> p r ...", core, left, right)


def tucker_pair(torch: Any, core: Array, left: Array, right: Array) -> Pair:
    """(out, r) and (r, in * k...): what the left factor is multiplied with is one matrix."""
    return left.T, torch.einsum("i j ..., j r -> i r ...", core, right).flatten(1)


def hadamard_pair(x: Pair, y: Pair) -> Pair:
    """Of the elementwise product: row by row and column by column all products of the two; the ranks multiply."""
    b = (x[0][:, :, None] * y[0][:, None, :]).flatten(1)
    a = (x[1][:, None, :] * y[1][None, :, :]).flatten(0, 1)
    return b, a


def kronecker(torch: Any, x: Array, y: Array) -> Array:
    """`torch.kron` of any two tensors: torch fails on some strides of dimensions of length 1, which a copy mends."""
    whole = torch.contiguous_format
    return torch.kron(x.clone(memory_format=whole), y.clone(memory_format=whole))


def kronecker_pair(torch: Any, x: Pair, y: Pair) -> Pair:
    """Of the Kronecker product; the ranks multiply."""
    return kronecker(torch, x[0], y[0]), kronecker(torch, x[1], y[1])


def whole_pair(torch: Any, matrix: Array) -> Pair:
    """The matrix and a unit one, on the side where that is of the lesser rank."""
    out, into = matrix.shape
    unit = torch.eye(min(out, into), dtype=matrix.dtype, device=matrix.device)
    return (unit, matrix) if out <= into else (matrix, unit)


def least_pair(torch: Any, pair: Pair) -> Pair:
    """The pair, or one of a lesser rank where its own is more than such a matrix can have."""
    b, a = pair
    return pair if a.shape[0] <= min(b.shape[0], a.shape[1]) else whole_pair(torch, b @ a)


def on_diagonal(blocks: Array, *, at: int) -> Array:
    """Blocks (k, ...) with one dimension more, `at`, of length k: block i at place i, zeros elsewhere."""
    k, *rest = blocks.shape
    spread = blocks.new_zeros(k, *rest[: at - 1], k, *rest[at - 1 :])
    spread.diagonal(dim1=0, dim2=at).copy_(blocks.movedim(0, -1))
    return spread


def unflattened(own: Shape, target: str, shapes: Shapes | None) -> Shape:
    """The shape of a change, with the kernel of a convolution that the adapter's tensors hold flattened.

    Args:
        own: As the tensors say: (out, in * k...), or (out, in, k...) at will.
        shapes: Of the base; None: nothing is known, and the shape stays as it is.
    """
    if shapes is None or not shapes.has(target):
        return own
    stored = shapes.shape(target)
    kernel = len(stored) > 2 and stored[0] == own[0] and math.prod(stored) == math.prod(own)
    return stored if kernel else own
