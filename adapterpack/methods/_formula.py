"""Changes that a formula describes: written once, run in PEFT's dtypes for the merge and in f64 for the proof.

Most methods are a few lines of arithmetic on a handful of small tensors. A method gives that arithmetic as a
function of `Maths`; placing, cutting into blocks, rounding and the noise floor are the same for all of them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adapterpack import limits
from adapterpack.adapter import Block, Effect, Kind, Loaded, LowRank, Param, Product
from adapterpack.errors import InvalidFile, WrongBase
from adapterpack.methods._changes import linear_kind, transposed
from adapterpack.tensor import F32, DType, Shape, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

    Formula = Callable[["Maths"], Array]
    """The delta weight, logical: (out, in), (out, in, k...) of a convolution, (out,) of a bias."""
    Transform = Callable[["Maths", Array], Array]
    """The changed weight from the weight, both logical."""
    Added = Callable[["Maths", Array, float], Array]
    """The changed weight from the weight, both logical, and the user's weight of the change."""
    Derive = Callable[["Maths", Array, Mapping[str, Array] | None], Mapping[str, Array]]
    """What is found from the weight before the formula runs, by name; the last argument is what the run in f32 found,
    where this one is exact: signs and clusters must be the same for both."""
    Factors = Callable[["Maths"], tuple[Array, Array, float]]
    """(B, A, scale) with delta weight == scale * B @ A exactly, in real arithmetic."""

_EPS = 2.0**-24
_STRAY = 4.0
"""How much farther than our own f32 run another honest one may stray from f64: other orders of the same sums."""


@dataclass(frozen=True)
class Maths:
    """What a formula computes with.

    Attributes:
        xp: Where.
        tensors: Parameter name to values: floats as f32, or as f64 where the run is exact; integers as they are.
        exact: Is it f64 from end to end?
        dtype: Of the base tensor.
    """

    xp: Backend
    tensors: Mapping[str, Array]
    exact: bool
    dtype: DType

    @property
    def torch(self) -> Any:
        return self.xp.torch

    def __getitem__(self, name: str) -> Array:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def lift(self, values: Tensor | Array) -> Array:
        """In the float dtype of this run."""
        return self.xp.f64(values) if self.exact else self.xp.f32(values)

    def rounded(self, values: Array) -> Array:
        """In the dtype of the base, where PEFT casts on its way; f64 stays what it is."""
        return values if self.exact else self.xp.round(values, self.dtype)


def _maths(xp: Backend, params: Mapping[str, Param], given: Mapping[str, Tensor], exact: bool, dtype: DType) -> Maths:
    tensors = {name: p.tensor for name, p in params.items()} | dict(given)
    lift = xp.f64 if exact else xp.f32
    values = {n: lift(t) if t.dtype.kind == "float" else xp.native(t) for n, t in tensors.items()}
    return Maths(xp, values, exact, dtype)


def _place(target: str, own: Shape, shape: Shape, layer: Kind, conv1d: bool | None, fan_in_fan_out: bool) -> Kind:
    """How a stored tensor of this shape lies; the change's own shape may have a convolution's inputs flattened.

    A 0 in the change's shape stands for any size: of what only the base knows.
    """
    if layer is Kind.EMBEDDING:
        if len(shape) == 2 and _fits(shape[::-1], own):
            return Kind.EMBEDDING
    elif len(own) == 2 and len(shape) == 2:
        if own[0]:
            return linear_kind(target, shape, own[0], own[1] or None, conv1d, fan_in_fan_out)
        # Seen from the other side, where inputs are outputs.
        return linear_kind(target, shape[::-1], own[1], None, conv1d, fan_in_fan_out)
    elif len(own) < 2 or len(shape) < 3:
        if shape == own:
            return Kind.OTHER
    elif _fits(shape, own) or (shape[0] == own[0] and math.prod(shape) == math.prod(own)):
        return Kind.CONVOLUTION
    raise WrongBase(f"{target} has shape {shape}, the adapter's change {own}")


def _fits(shape: Shape, own: Shape) -> bool:
    return len(shape) == len(own) and all(o in (0, s) for s, o in zip(shape, own, strict=True))


def _logically(shape: Shape, w: Array, block: Block, f: Callable[[Array], Array]) -> Array:
    """f of the weight as it is meant, (out, in) or (out, in, k...), put back as it lies."""
    if transposed(block.kind):
        return f(w.T).T
    return f(w.reshape(shape) if block.kind is Kind.CONVOLUTION else w).reshape(w.shape)


def _strayed(ours: Array, exact: Array) -> Array:
    """f32, broadcastable: what honest f32 arithmetic may lose where ours lost this much.

    Of a row the worst element and of a column too: the neighbours of an element went through the same sums.
    """
    lost = abs(ours - exact)
    if lost.ndim < 2:
        return lost.max() * _STRAY + abs(exact) * (_STRAY * _EPS)
    flat = lost.reshape(-1, lost.shape[-1])
    worst = flat.amax(1, keepdim=True) + flat.amax(0, keepdim=True)
    return worst.reshape(*lost.shape[:-1], -1) * _STRAY + abs(exact) * (_STRAY * _EPS)


@dataclass(frozen=True, kw_only=True)
class _FormulaChange:
    """What both kinds have in common; see `adapter.Change`.

    Attributes:
        module: Path of the module.
        part: Which of its tensors: `weight` or `bias`.
        params: Name to parameter; all count as used.
        shape: Logical (out, in); (out, in, k...) of a convolution, flattened at will; (out,) of a bias. 0 stands
            for a size that only the base knows, where no base was asked; see `_changes.weight_shape`.
        layer: LINEAR (or Conv1D, or a convolution: the base decides) or EMBEDDING.
        fan_in_fan_out: The config's word on how the weight lies, for square weights.
        given: More tensors for the formula, of the base or drawn from a seed.
        also: Keys of more tensors that count as used: `given` ones that the file holds, copies of others.
        settings: Numbers of the config that the formula goes by: without W at hand changes are compared by these too.
        reads: Base tensors other than the target that the change depends on.
    """

    module: str
    part: str = "weight"
    params: Mapping[str, Param]
    shape: Shape
    layer: Kind = Kind.LINEAR
    fan_in_fan_out: bool = False
    given: Mapping[str, Tensor] = field(default_factory=dict)
    also: frozenset[str] = frozenset()
    settings: Mapping[str, float] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()

    torch = True

    @property
    def target(self) -> str:
        return f"{self.module}.{self.part}"

    @property
    def uses(self) -> frozenset[str]:
        return frozenset(p.key for p in self.params.values()) | self.also

    def products(self, kind: Kind) -> tuple[Product, ...]:
        return ()

    def place(self, shape: Shape, conv1d: bool | None) -> Kind:
        return _place(self.target, self.shape, shape, self.layer, conv1d, self.fan_in_fan_out)

    def maths(self, xp: Backend, exact: bool, dtype: DType) -> Maths:
        return _maths(xp, self.params, self.given, exact, dtype)

    def parts(self, xp: Backend) -> Mapping[str, Array]:
        own = {name: xp.native(p.tensor) for name, p in self.params.items()}
        return own | {f"setting {n}": xp.torch.tensor(float(v)) for n, v in self.settings.items()}


@dataclass(frozen=True, kw_only=True)
class DenseChange(_FormulaChange):
    """W + scale * delta, where the delta does not depend on W.

    Attributes:
        delta: The formula.
        factors: Exact factors of the delta, where it has some.
        round_delta: PEFT rounds the delta to the base dtype before it adds.
        added: How PEFT adds it, where that is not one sum in f32.
        scale: A weight of the user's.
    """

    delta: Formula
    factors: Factors | None = None
    round_delta: bool = False
    added: Added | None = None
    scale: float = 1.0

    effect = Effect.ADD

    def whole(self, kind: Kind) -> bool:
        return self.added is not None

    def load(self, xp: Backend) -> Loaded:
        if math.prod(self.shape) > limits.CHANGE_ELEMENTS:
            raise InvalidFile(f"the change of {self.target} has shape {self.shape}: no weight is that large")
        return LoadedDense(xp, self)


@dataclass(frozen=True)
class LoadedDense:
    """See `adapter.Loaded`. The delta is computed once, for all blocks, when the first one asks for it."""

    xp: Backend
    change: DenseChange
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _kept: dict[tuple[bool, DType], Array] = field(default_factory=dict)

    def _delta(self, exact: bool, dtype: DType) -> Array:
        with self._lock:
            if (exact, dtype) not in self._kept:
                delta = self.change.delta(self.change.maths(self.xp, exact, dtype))
                if self.change.scale != 1:
                    delta = delta * self.change.scale
                self._kept[exact, dtype] = delta
            return self._kept[exact, dtype]

    def _stored(self, delta: Array, w: Array, block: Block) -> Array:
        """The rows of the block, as the weight lies."""
        if w.ndim < 2:
            return delta.reshape(-1)[block.rows]
        if transposed(block.kind):
            return delta.T[block.rows]
        return delta.reshape(-1, w.shape[-1])[block.rows]

    def low_rank(self) -> LowRank | None:
        if self.change.factors is None:
            return None
        b, a, scale = self.change.factors(self._free)
        return LowRank(b, a, scale * self.change.scale)

    @cached_property
    def _free(self) -> Maths:
        return self.change.maths(self.xp, False, F32)

    def delta(self, rows: slice) -> Array | None:
        exact = self._delta(True, self._free.dtype)
        return exact.reshape(exact.shape[0], -1)[rows] if exact.ndim > 1 else exact[rows]

    def parts(self) -> Mapping[str, Array]:
        return self.change.parts(self.xp)

    def apply(self, w: Array, block: Block) -> Array:
        if (added := self.change.added) is not None:
            maths = self.change.maths(self.xp, False, block.dtype)
            return _logically(self.change.shape, w, block, lambda v: maths.lift(added(maths, v, self.change.scale)))
        delta = self._stored(self._delta(False, block.dtype), w, block)
        if self.change.round_delta:
            delta = self.xp.f32(self.xp.round(delta, block.dtype))
        return w + delta

    def exact(self, w: Array, block: Block) -> Array:
        return w + self._stored(self._delta(True, block.dtype), w, block)

    def noise(self, w: Array, block: Block) -> Array:
        if self.change.added is not None:
            return self.xp.f32(_strayed(self.apply(w, block), self.exact(w, block)))
        ours = self._stored(self._delta(False, block.dtype), w, block)
        return self.xp.f32(_strayed(ours, self._stored(self._delta(True, block.dtype), w, block)))


@dataclass(frozen=True, kw_only=True)
class TransformChange(_FormulaChange):
    """W' = f(W), of the whole tensor at once.

    Attributes:
        transform: The formula.
        derive: What it takes from W beforehand, an SVD for example; it finds that in its `Maths` by name.
    """

    transform: Transform
    derive: Derive | None = None

    effect = Effect.TRANSFORM

    def whole(self, kind: Kind) -> bool:
        return True

    def load(self, xp: Backend) -> Loaded:
        return _LoadedTransform(xp, self)


@dataclass(frozen=True)
class _LoadedTransform:
    """See `adapter.Loaded`."""

    xp: Backend
    change: TransformChange
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _kept: dict[bool, tuple[Array, Mapping[str, Array]]] = field(default_factory=dict)

    def low_rank(self) -> LowRank | None:
        return None

    def delta(self, rows: slice) -> Array | None:
        return None

    def parts(self) -> Mapping[str, Array]:
        return self.change.parts(self.xp)

    def _run(self, w: Array, block: Block, exact: bool) -> Array:
        maths = self.change.maths(self.xp, exact, block.dtype)

        def changed(v: Array) -> Array:
            return maths.lift(self.change.transform(self._prepared(maths, v), v))

        return _logically(self.change.shape, w, block, changed)

    def _prepared(self, maths: Maths, w: Array) -> Maths:
        """With what the formula takes from W: found once for each run, which may take long."""
        if self.change.derive is None:
            return maths
        rough = self.change.maths(self.xp, False, maths.dtype) if maths.exact else maths
        with self._lock:
            found = self._found(rough, self.xp.f32(self.xp.round(w, maths.dtype)), None)
            if maths.exact:
                found = self._found(maths, w, found)
        return replace(maths, tensors={**maths.tensors, **found})

    def _found(self, maths: Maths, w: Array, before: Mapping[str, Array] | None) -> Mapping[str, Array]:
        assert self.change.derive is not None
        kept = self._kept.get(maths.exact)
        # Of another W (several changes of one tensor) it would be something else.
        if kept is None or not self.xp.torch.equal(kept[0], w):
            # Merge, verify and convert must find the same: signs and last bits depend on the number of threads.
            with self.xp.one_thread():
                kept = self._kept[maths.exact] = w, self.change.derive(maths, w, before)
        return kept[1]

    def apply(self, w: Array, block: Block) -> Array:
        return self._run(w, block, exact=False)

    def exact(self, w: Array, block: Block) -> Array:
        return self._run(self.xp.f64(w), block, exact=True)

    def noise(self, w: Array, block: Block) -> Array:
        return self.xp.f32(_strayed(self.apply(w, block), self.exact(w, block)))
