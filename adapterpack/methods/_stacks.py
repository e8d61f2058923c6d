"""Low-rank factors of several matrices of one shape, one for each expert, and where they come from."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from adapterpack.tensor import Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend


class Stack(Protocol):
    """Factors of `experts` matrices (out, in).

    Attributes:
        rank: Of one expert.
        torch: Do they take torch to put together?
    """

    @property
    def experts(self) -> int: ...
    @property
    def out(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def into(self) -> int: ...
    @property
    def torch(self) -> bool: ...

    def expert(self, xp: Backend, expert: int) -> tuple[Array, Array]:
        """(B, A) of one expert, f32, (out, r) and (r, in), row-major."""
        ...


_KEPT = 4


class Recent:
    """Factors read last: experts that lie apart on disk are merged one after the other, from the same two tensors."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, str], tuple[FileStack, tuple[Array, Array]]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, xp: Backend, stack: FileStack) -> tuple[Array, Array]:
        key = id(stack), xp.name
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][1]
            arrays = xp.f32(stack.b), xp.f32(stack.a)
            # The stack itself is kept too: no other can have its id meanwhile.
            self._kept[key] = stack, arrays
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return arrays


@dataclass(frozen=True)
class FileStack:
    """As `target_parameters` stores them.

    Attributes:
        a: (experts * r, in), expert by expert.
        b: (out, r * experts), rank by rank: in a row the experts change fastest.
    """

    a: Tensor
    b: Tensor
    experts: int
    recent: Recent = field(compare=False, repr=False)

    torch = False

    @property
    def out(self) -> int:
        return self.b.shape[0]

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    @property
    def into(self) -> int:
        return self.a.shape[1]

    def expert(self, xp: Backend, expert: int) -> tuple[Array, Array]:
        b, a = self.recent.read(xp, self)
        own = b.reshape(self.out, self.rank, self.experts)[:, :, expert]
        # A flat copy and back: both libraries lay it out row by row then.
        return own.reshape(-1).reshape(self.out, self.rank), a[expert * self.rank : (expert + 1) * self.rank]


@dataclass(frozen=True)
class JoinedStack:
    """Layers of experts that had a matrix each, put together for the fused parameter, as PEFT does it.

    [W1; W3] + [B1 0; 0 B3] @ [A1; A3] for a gate and its `up`; a single layer stays what it is.

    Attributes:
        layers: For each expert its layers, top to bottom: (A, B), (r, in) and (f, r).
    """

    layers: Sequence[Sequence[tuple[Tensor, Tensor]]]

    @property
    def torch(self) -> bool:
        return len(self.layers[0]) > 1

    @property
    def experts(self) -> int:
        return len(self.layers)

    @property
    def out(self) -> int:
        return sum(b.shape[0] for _, b in self.layers[0])

    @property
    def rank(self) -> int:
        return sum(a.shape[0] for a, _ in self.layers[0])

    @property
    def into(self) -> int:
        return self.layers[0][0][0].shape[1]

    def expert(self, xp: Backend, expert: int) -> tuple[Array, Array]:
        own = self.layers[expert]
        if len(own) == 1:
            return xp.f32(own[0][1]), xp.f32(own[0][0])
        b, a = [xp.f32(b) for _, b in own], [xp.f32(a) for a, _ in own]
        return xp.torch.block_diag(*b), xp.torch.cat(a)
