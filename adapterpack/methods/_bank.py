"""VB-LoRA's sub-vectors: softmax-weighted sums of vectors from a bank, in PEFT's operations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from adapterpack import vectormath
from adapterpack.errors import InvalidFile
from adapterpack.tensor import Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend


def rows(tensors: tuple[Tensor, ...], bank: Tensor, k: int, xp: Backend) -> Array:
    """The sub-vectors of one side, f32.

    Args:
        tensors: (logits,), or (indices, weights) of a top-k file.
    """
    if xp.name == "numpy":
        kept, weights = tensors
        return _rows_of_two(kept, weights, bank, xp)
    vectors = bank.shape[0]
    if len(tensors) == 1:
        logits = xp.f32(tensors[0])
    else:
        kept, weights = tensors
        found, logarithms = indices(kept, vectors, xp), xp.torch.log(all_weights(weights, xp))
        # As PEFT loads it: the dense matrix decides the order among equal weights.
        logits = xp.torch.full((*found.shape[:2], vectors), float("-inf"), device=xp.device)
        logits.scatter_(-1, found, logarithms)
    top, chosen = logits.topk(k, dim=-1)
    return (xp.torch.softmax(top, dim=-1).unsqueeze(-1) * xp.f32(bank)[chosen]).sum(-2)


def _rows_of_two(index: Tensor, weight: Tensor, bank: Tensor, xp: Backend) -> Array:
    """`rows` of a top-2 file, in numpy: a sum of two has no order that a dense matrix would have to decide."""
    import numpy as np

    chosen = index.numpy().astype(np.int64)
    _check(chosen, (chosen[..., :1] == chosen[..., 1:]).any(), bank.shape[0])
    vectors = xp.f32(bank)
    if not xp.finite(vectors):
        # For a weight of 0 PEFT takes any vector, and 0 * inf is NaN.
        raise InvalidFile("the vector bank has NaN or infinite values")
    first = xp.f32(weight)
    weights = np.concatenate([first, np.maximum(1 - first, 0)], -1)
    parts = vectormath.softmax_of_two(vectormath.log(weights))[..., None] * vectors[chosen]
    # torch's sums begin with 0, which makes 0 of -0.
    return parts[..., 0, :] + parts[..., 1, :] + np.float32(0)


def indices(tensor: Tensor, vectors: int, xp: Backend) -> Array:
    """Those of a top-k file. Raises InvalidFile if there are no such vectors."""
    found = xp.native(tensor).long()
    _check(found, (found.sort(-1).values.diff(dim=-1) == 0).any(), vectors)
    return found


def _check(found: Array, twice: Any, vectors: int) -> None:
    if math.prod(found.shape) and not (int(found.min()) >= 0 and int(found.max()) < vectors):
        raise InvalidFile(f"an index lies outside the bank of {vectors} vectors")
    if bool(twice):
        raise InvalidFile("a sub-vector names one vector of the bank twice")


def all_weights(tensor: Tensor, xp: Backend) -> Array:
    """All k weights. The last one is 1 - sum, and rounding may have made it negative: then it is 0."""
    weights = xp.f32(tensor)
    last = 1 - weights.sum(-1, keepdim=True)
    return xp.torch.cat([weights, last.clamp_min(0)], dim=-1)
