"""Sums of task tensors that are pruned first: TIES (Yadav et al. 2023), DARE (Yu et al. 2023), magnitude pruning.

In PEFT's operations and order, f32, so that the bits are the same. Reference: peft/utils/merge_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterpack.backend import Array

Pruning = Callable[["Array"], "Array"]


def keep_largest(torch: Any, density: float) -> Pruning:
    """Keep that fraction of the values, the largest ones."""

    def prune(x: Array) -> Array:
        mask = torch.zeros_like(x).reshape(-1)
        mask[torch.topk(x.abs().reshape(-1), k=int(density * x.numel()), largest=True)[1]] = 1
        return x * mask.reshape(x.shape)

    return (lambda x: x) if density >= 1 else prune


def keep_some(torch: Any, density: float) -> Pruning:
    """Keep each value with that probability, drawn from torch's global generator of the CPU, and make up for it."""

    def prune(x: Array) -> Array:
        probability = torch.full_like(x, density, device="cpu")
        return x * torch.bernoulli(probability).to(x.device) / density

    return (lambda x: x) if density >= 1 else prune


def weighted_sum(
    torch: Any, tensors: Sequence[Array], weights: Sequence[float], prune: Pruning, majority: str | None
) -> Array:
    """The weighted sum of pruned tensors of one shape.

    Args:
        majority: `total` or `frequency`: only values of the sign that most of them have take part, and their
            sum is divided by their number. None: all take part, and the sum stays one.
    """
    stacked = torch.stack([prune(x) for x in tensors], dim=0)
    factors = torch.tensor(weights).to(stacked.device).view(-1, *(1,) * (stacked.dim() - 1))
    if majority is None:
        return (stacked * factors).sum(dim=0)
    sign = stacked.sign()
    elected = (stacked if majority == "total" else sign).sum(dim=0)
    agree = sign == torch.where(elected >= 0, 1, -1)
    return (stacked * factors * agree).sum(dim=0) / torch.clamp(agree.sum(dim=0), min=1.0)
