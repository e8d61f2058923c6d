"""What a comparison can be shown with beside its errors: bytes by part, and singular values of both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapterpack import parts
from adapterpack.adapter import Adapter, Change, Method, Request
from adapterpack.base import Base
from adapterpack.errors import InvalidFile
from adapterpack.methods import _lowrank

_MOST = 1024
"""The largest rank whose singular values are worth their time."""


@dataclass(frozen=True)
class Side:
    """How large one of the two is, from its headers.

    Attributes:
        side: `A` or `B`.
        bytes: Of an adapter all its files, of a model the tensors of its weight files.
        tensors: How many there are.
        parts: Part (`lora_A`, `vector bank` ...) to bytes of tensors, the largest first. Of a merged model: `changed`
            and `not changed`.
        dtypes: dtype to number of tensors, the most frequent first.
    """

    side: str
    bytes: int
    tensors: int
    parts: dict[str, int]
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one side's change of one base tensor.

    Attributes:
        side: `A` or `B`.
        name: The base tensor.
        values: Descending, scale included: as many as the rank, or as the tensor has rows or columns.
    """

    side: str
    name: str
    values: tuple[float, ...]


def of_adapter(side: str, a: Adapter) -> Side:
    """Sizes of an adapter."""
    dtypes = Counter(t.dtype.name for t in a.tensors().values())
    return Side(side, a.source.bytes, dtypes.total(), parts.sizes(parts.of(a)), dict(dtypes.most_common()))


def of_model(side: str, path: Path, changed: Collection[str]) -> Side:
    """Sizes of a merged model.

    Args:
        changed: Names of the tensors that were to change.
    """
    with Base(path) as model:
        tensors = dict(model.stored)
    dtypes = Counter(t.dtype.name for t in tensors.values())
    sizes = parts.sizes(("changed" if n in changed else "not changed", t) for n, t in tensors.items())
    return Side(side, sum(sizes.values()), len(tensors), sizes, dict(dtypes.most_common()))


def spectra(side: str, method: Method, a: Adapter, request: Request) -> Iterator[Spectrum]:
    """Singular values of every change of W that is a product of factors, by QR: no dense matrix.

    Changes without exact factors (DoRA, OFT, bare vectors, stacks of experts), of several parts or of a rank above
    1024 are left out, and so are those with NaN or infinite values.
    """
    grouped: dict[str, list[Change]] = {}
    for change in method.changes(a, request):
        grouped.setdefault(change.target, []).append(change)
    xp = request.xp.for_proofs()
    for target, changes in grouped.items():
        if len(changes) > 1:
            continue
        factors = changes[0].load(xp).low_rank()
        if factors is None or factors.a.shape[0] > _MOST:
            continue
        wide = replace(factors, b=xp.f64(factors.b), a=xp.f64(factors.a))
        try:
            values = _lowrank.singular_values(xp, wide, target)
        except InvalidFile:
            continue
        yield Spectrum(side, target, tuple(values.tolist()))


def all_spectra(sides: Sequence[tuple[str, Method, Adapter]], request: Request) -> tuple[Spectrum, ...]:
    """Those of every side."""
    return tuple(s for side, method, a in sides for s in spectra(side, method, a, request))
