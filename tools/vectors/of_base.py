"""Singular vectors for the methods whose parameters are read together with the base's weights.

The numbers are numpy's, in float64. Which way each pair of vectors points, numpy cannot know: where it matters,
torch's own float32 SVD is asked for that alone.
"""

from __future__ import annotations

import numpy as np
import torch

from vectors.common import f64

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def svd(w: torch.Tensor) -> Triple:
    """U, S, Vh of a matrix, thin; each pair points as in torch's float32 SVD on the CPU."""
    u, s, vh = np.linalg.svd(f64(w), full_matrices=False)
    return turned(u, s, vh, f64(torch.linalg.svd(w.float(), full_matrices=False)[0]))


def sketch(w: torch.Tensor, rank: int, steps: int, seed: int) -> Triple:
    """The same of `torch.svd_lowrank(w, rank, steps)` from a seed: a random matrix, power iterations, a small SVD."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theirs = torch.svd_lowrank(w.float(), rank, steps)[0]
        torch.manual_seed(seed)
        random = f64(torch.randn(min(w.shape), rank))
    tall = f64(w) if w.shape[0] >= w.shape[1] else f64(w).T
    q = np.linalg.qr(tall @ random)[0]
    for _ in range(steps):
        q = np.linalg.qr(tall @ np.linalg.qr(tall.T @ q)[0])[0]
    u, s, vh = np.linalg.svd(q.T @ tall, full_matrices=False)
    u = q @ u
    if w.shape[0] < w.shape[1]:
        u, vh = vh.T, u.T
    return turned(u, s, vh, f64(theirs))


def turned(u: np.ndarray, s: np.ndarray, vh: np.ndarray, reference: np.ndarray) -> Triple:
    """Pairs that point as the reference's columns do."""
    signs = np.where((u * reference).sum(0) < 0, -1.0, 1.0)
    return u * signs, s, vh * signs[:, None]
