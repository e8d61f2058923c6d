"""What methods share whose parameters mean something only together with the base's weights.

An SVD has signs (and, where singular values meet, rotations) that its library chooses. Where they matter, the choice
is the one of the run in f32, which is PEFT's own; the exact run computes in f64 and turns its vectors the same way.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Finding, Param, Request
from adapterpack.errors import InvalidFile, WrongBase
from adapterpack.methods._changes import weight_shape
from adapterpack.methods._lora_modules import rank_findings

if TYPE_CHECKING:
    from adapterpack.backend import Array

    Triple = tuple[Array, Array, Array]

_generator = threading.Lock()
"""torch.svd_lowrank draws from the one generator that all threads share."""


def linear_shape(
    a: Adapter, module: str, request: Request, *, out: int = 0, into: int = 0, conv1d: bool = False
) -> tuple[int, int]:
    """(out, in) of a linear layer's weight. Without a base: what the file says, 0 for what it does not.

    Args:
        out, into: What the file says; 0: nothing.
        conv1d: Does PEFT have the method for Conv1D too?

    Raises:
        WrongBase: the base's weight is no such layer's, or has another shape.
    """
    shapes = request.shapes
    if shapes is not None:
        stored = shapes.shape(f"{module}.weight")
        if len(stored) != 2:
            raise WrongBase(f"{module}.weight has shape {stored}: {a.method} is for linear layers")
        if not conv1d and shapes.conv1d(module):
            raise WrongBase(
                f"{module} of the base is a Conv1D, which lies as (in, out): PEFT has {a.method} for Linear only",
                hint="is it the base that was trained on?",
            )
    found = weight_shape(a, module, shapes, out=out or None, into=into or None, conv1d=conv1d)
    return found[0], found[1]


def number(config: Mapping[str, Any], field: str, default: float) -> float:
    """A finite number other than 0 from the config. Raises InvalidFile for anything else."""
    value = config.get(field, default)
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 < abs(value) < 1e9:
        raise InvalidFile(f"{field} in adapter_config.json is {value!r:.60}; a finite number other than 0 is wanted")
    return float(value)


def choice(config: Mapping[str, Any], field: str, default: str, known: Sequence[str]) -> str:
    """One of the words that PEFT knows for a switch. Raises InvalidFile for any other, as PEFT does."""
    value = config.get(field, default)
    if value not in known:
        raise InvalidFile(f"{field} in adapter_config.json is {value!r:.60}; PEFT knows {', '.join(known)}")
    return str(value)


def seed(config: Mapping[str, Any], field: str, default: int = 0) -> int:
    """A seed that torch takes. Raises InvalidFile for anything else."""
    value = config.get(field, default)
    if type(value) is not int or not -(1 << 63) <= value < 1 << 64:
        raise InvalidFile(f"{field} in adapter_config.json is {value!r:.60}; a whole number of 64 bits is wanted")
    return value


def pair_findings(
    a: Adapter, rank_of: Callable[[str, Mapping[str, Param]], int | None], default: int
) -> Iterator[Finding]:
    """Modules whose tensors do not fit, and ranks that the config does not say.

    Args:
        rank_of: Of a module and its parameters the rank, None if it has none; it raises InvalidFile for misfits.
        default: Of PEFT, where the config has no `r`.
    """
    found = {}
    for module, params in a.modules.items():
        try:
            rank = rank_of(module, params)
        except InvalidFile as e:
            yield Finding("half-pair", module, e.message, e.hint or "train or save the adapter again")
            continue
        if rank is not None:
            found[module] = rank
    yield from rank_findings(a.config, found, default, pattern=False)


def lowrank_svd(torch: Any, w: Array, rank: int, niter: int, seed: int) -> Triple:
    """U (out, rank), S (rank,), Vh (rank, in) as `torch.svd_lowrank` finds them from this seed, on the CPU.

    Args:
        w: (out, in). f32: torch's own function. f64: the same algorithm (Halko et al. 2011, 4.4 and 5.1) from the
            same random matrix, which is drawn in f32.
    """
    w = w.cpu()
    with _seeded(torch, seed):
        if w.dtype == torch.float32:
            u, s, v = torch.svd_lowrank(w, q=rank, niter=niter)
            return u, s, v.T
        test = torch.randn(min(w.shape), rank, dtype=torch.float32)
    tall = w if w.shape[0] >= w.shape[1] else w.T
    q = torch.linalg.qr(tall @ test.double()).Q
    for _ in range(niter):
        q = torch.linalg.qr(tall.T @ q).Q
        q = torch.linalg.qr(tall @ q).Q
    u, s, vh = torch.linalg.svd(q.T @ tall, full_matrices=False)
    u = q @ u
    return (u, s, vh) if tall is w else (vh.T, s, u.T)


@contextlib.contextmanager
def _seeded(torch: Any, seed: int) -> Iterator[None]:
    with _generator, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def signs(columns: Array, reference: Array) -> Array:
    """f64, one sign for each column: what turns it the way that the reference's column points."""
    return ((columns * reference.double()).sum(0) >= 0).double() * 2 - 1
