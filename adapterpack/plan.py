"""Which base tensors an adapter changes, and how: the one plan that merge writes and verify holds it to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from adapterpack import exactness
from adapterpack.adapter import Adapter, Block, Change, Effect, Kind, Loaded, Method, Mixture, Product, Request
from adapterpack.backend import Array, Backend, NumpyBackend
from adapterpack.base import Base
from adapterpack.errors import LossRefused, Unsupported
from adapterpack.methods._changes import LoadedLowRank, LowRankChange, ReplaceChange, VectorChange
from adapterpack.methods._convolution import ConvolutionChange
from adapterpack.methods._formula import DenseChange, TransformChange
from adapterpack.methods._parameters import ParameterChange
from adapterpack.tensor import BF16, F16, F32, Shape, Tensor

_SHOWN = 5


@dataclass(frozen=True)
class Step:
    """One change of one base tensor, and how that tensor lies.

    Attributes:
        region: The rows that it is about, of one expert; None for all.
    """

    change: Change
    kind: Kind
    region: slice | None = None

    def covers(self, block: Block) -> bool:
        """Is the block in its region? (No block crosses the border of one.)"""
        return self.region is None or self.region.start <= block.rows.start < self.region.stop

    def block(self, block: Block) -> Block:
        """A block of the tensor, as this change sees it."""
        at = 0 if self.region is None else self.region.start
        return replace(block, kind=self.kind, rows=slice(block.rows.start - at, block.rows.stop - at))


@dataclass(frozen=True)
class Head:
    """Output embeddings that were tied to the input embeddings and may have to part from them.

    Attributes:
        name: On disk.
        steps: Their changes, beginning from the input embeddings.
        one: Were both trained as one (`ensure_weight_tying`)? Then they differ by rounding only.
    """

    name: str
    steps: tuple[Step, ...]
    one: bool


@dataclass(frozen=True)
class Plan:
    """What happens to a base.

    Attributes:
        steps: Name on disk to its changes, in order.
        head: None where nothing was tied or both stay one tensor.
        modules: How many modules are changed.
    """

    steps: Mapping[str, tuple[Step, ...]]
    head: Head | None
    modules: int

    def targets(self) -> set[str]:
        """Names on disk of all tensors that may change."""
        return {*self.steps, *([] if self.head is None else [self.head.name])}

    def all_steps(self) -> Iterator[Step]:
        for steps in self.steps.values():
            yield from steps
        if self.head is not None:
            yield from self.head.steps

    @property
    def torch(self) -> bool:
        """Does some change take torch?"""
        return any(s.change.torch for s in self.all_steps())

    @property
    def mixes(self) -> bool:
        """Does some change take a `Mixture`?"""
        return any(isinstance(s.change, LowRankChange) and s.change.mixes for s in self.all_steps())

    def questions(self) -> frozenset[Product | Mixture]:
        """What must be known of a library, for its bits to be PEFT's."""
        products = (p for s in self.all_steps() for p in s.change.products(s.kind))
        return frozenset([*products, *([Mixture()] if self.mixes else [])])


def make(
    adapters: Sequence[tuple[Method, Adapter]],
    base: Base,
    *,
    weights: Sequence[float] | None = None,
) -> Plan:
    """Plan the merge of adapters into a base, one after the other.

    Args:
        weights: One factor for each adapter's change; only changes that are added can have one.

    Raises:
        WrongBase: the base lacks modules, or their shapes are others; all are named.
        LossRefused: parameters of an adapter would go unused; all are named.
        Unsupported: weights of a dtype that nothing can be added to.
    """
    base.need_weights()
    # The last one binds for all: names of one base need one prefix.
    for _, adapter in adapters:
        base.require(adapter.targets(), adapter.config)
    base.bind(t for _, a in adapters for t in a.targets())
    steps: dict[str, list[Step]] = {}
    modules: set[str] = set()
    for n, (method, adapter) in enumerate(adapters):
        weight = 1.0 if weights is None else weights[n]
        before = {s.change.target for done in steps.values() for s in done}
        used: set[str] = set()
        for change in method.changes(adapter, Request(NumpyBackend(), shapes=base)):
            used |= change.uses
            _refuse_stale(change, before)
            scaled = change if weight == 1.0 else _scaled(change, weight)
            for name, step in steps_of(scaled, base):
                steps.setdefault(name, []).append(step)
            modules.add(change.module)
        _refuse_unused(adapter, used)
    one = any(a.config.get("ensure_weight_tying") is True for _, a in adapters)
    return _part_tied({name: tuple(s) for name, s in steps.items()}, base, len(modules), one)


def steps_of(change: Change, base: Base) -> Iterator[tuple[str, Step]]:
    """The tensors on disk that a change is about, and its part in each: several where experts lie apart.

    Raises:
        WrongBase: the shapes are others.
        Unsupported: a dtype that nothing can be added to.
    """
    apart = base.apart(change.target) if isinstance(change, ParameterChange) else None
    if apart is not None and isinstance(change, ParameterChange):
        change.place(apart.shape, False)
        for piece in apart.pieces:
            _refuse_dtype(piece.name, base.tensors[piece.name])
            yield piece.name, Step(change.part(piece.expert, piece.rows), Kind.LINEAR)
        return
    tensor, name = base.tensor(change.target), base.on_disk(change.target) or base.head
    _refuse_dtype(change.target, tensor)
    kind = change.place(tensor.shape, base.conv1d(change.module))
    if not isinstance(change, ParameterChange):
        yield name, Step(change, kind)
        return
    height = as_matrix(tensor.shape)[0] // change.stack.experts
    for expert in range(change.stack.experts):
        yield name, Step(change.part(expert), kind, slice(expert * height, (expert + 1) * height))


def _refuse_stale(change: Change, before: set[str]) -> None:
    """Raise Unsupported for a change that is made of weights which an earlier adapter changes."""
    reads = change.reads if isinstance(change, DenseChange | TransformChange) else frozenset[str]()
    if isinstance(change, TransformChange) and change.derive is not None:
        reads |= {change.target}
    if stale := sorted(reads & before):
        raise Unsupported(
            f"the change of {change.target} is made of {stale[0]}, which an earlier adapter changes",
            hint="merge the adapters one by one, each into the model that the one before gave",
        )


def _refuse_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (F32, BF16, F16):
        raise Unsupported(
            f"{name} of the base is {tensor.dtype}: a quantised base cannot be merged into yet",
            hint="merge into the original 16-bit model",
        )


def _refuse_unused(adapter: Adapter, used: set[str]) -> None:
    unused = sorted(adapter.tensors().keys() - used)
    if unused:
        shown = ", ".join(unused[:_SHOWN]) + (", ..." if len(unused) > _SHOWN else "")
        raise LossRefused(
            f"{len(unused)} tensors of the adapter would go unused: {shown}",
            hint="they belong to a variant or version that is not known here; merge with what wrote them",
        )


def _scaled(change: Change, weight: float) -> Change:
    if isinstance(change, LowRankChange | VectorChange | ParameterChange | DenseChange) or (
        isinstance(change, ConvolutionChange) and change.effect is Effect.ADD
    ):
        return replace(change, scale=change.scale * weight)
    raise Unsupported(f"{change.target} is not merely added to: --weight has no meaning for it")


def _part_tied(steps: dict[str, tuple[Step, ...]], base: Base, modules: int, one: bool) -> Plan:
    """Let tied embeddings part where the adapter treats input and output differently.

    The trained model computes with W + delta on the side that was adapted and with W on the other. (PEFT
    merges into the shared tensor, which changes the other side too, or both twice over.) Trained token
    rows are both sides'.
    """
    embedding, head = base.embedding, base.head
    if not base.tied or embedding is None or not ({embedding, head} & steps.keys()):
        return Plan(steps, None, modules)
    rows = tuple(s for s in steps.get(embedding, ()) if _is_rows(s.change))
    head_steps = rows + steps.pop(head, ())
    if head_steps == steps.get(embedding, ()):
        if head in base.tensors:
            steps[head] = head_steps
        return Plan(steps, None, modules)
    return Plan(steps, Head(head, head_steps, one and head_steps != rows and embedding in steps), modules)


def _is_rows(change: Change) -> bool:
    return isinstance(change, ReplaceChange) and change.replaced.rows is not None


def blocks(tensor: Tensor, steps: Sequence[Step], xp: Backend, *, once: bool = False) -> list[Block]:
    """How a tensor is cut for these changes: into blocks of rows if that gives the bits of the whole.

    Args:
        once: Bits are not PEFT's in any case.
    """
    rows, width = as_matrix(tensor.shape)
    whole = any(s.change.whole(s.kind) for s in steps)
    cuts = once or all(exactness.splits(xp, p) for p in {p for s in steps for p in s.change.products(s.kind)})
    bounds: list[tuple[int, int]] = []
    for start, stop in [(0, rows)] if whole else _regions(rows, steps):
        inner = exactness.cut(stop - start, width, xp.block) if cuts and not whole else [(0, stop - start)]
        bounds += [(start + a, start + b) for a, b in inner]
    return [Block(Kind.OTHER, slice(*b), b == (0, rows), tensor.dtype) for b in bounds]


def _regions(rows: int, steps: Sequence[Step]) -> list[tuple[int, int]]:
    """Between the borders of all regions."""
    borders = {0, rows, *(b for s in steps if s.region is not None for b in (s.region.start, s.region.stop))}
    return list(itertools.pairwise(sorted(borders)))


_PART = 1 << 16


def parts(block: Block, shape: Shape) -> Iterator[Block]:
    """A block in pieces of a few rows, where bits do not matter and every element takes a dozen f64 copies."""
    height = max(1, _PART // max(1, as_matrix(shape)[1]))
    if block.whole:
        yield block
        return
    for start in range(block.rows.start, block.rows.stop, height):
        yield replace(block, rows=slice(start, min(start + height, block.rows.stop)))


def as_matrix(shape: Shape) -> tuple[int, int]:
    """Rows and their width, along the last dimension; a vector is a column."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


@dataclass(frozen=True)
class LoadedSteps:
    """The changes of one base tensor, read and ready.

    Attributes:
        tensor: As the base has it.
        steps: Its changes, in order.
        xp: Where they compute.
        origin: Where its values are read from: f32 ones of a quantised base, else the tensor itself.
    """

    tensor: Tensor
    steps: tuple[tuple[Loaded, Step], ...]
    xp: Backend
    origin: Tensor

    @classmethod
    def read(cls, tensor: Tensor, steps: Sequence[Step], xp: Backend, origin: Tensor | None = None) -> LoadedSteps:
        return cls(tensor, tuple((s.change.load(xp), s) for s in steps), xp, origin or tensor)

    def _at(self, block: Block) -> Iterator[tuple[Loaded, Step]]:
        return (s for s in self.steps if s[1].covers(block))

    def base(self, block: Block) -> Array:
        """A block of the tensor as the base has it, in the dtype of its origin."""
        _, width = as_matrix(self.tensor.shape)
        dtype = self.origin.dtype
        size = width * dtype.bits // 8
        data = self.origin.source.read(block.rows.start * size, block.rows.stop * size)
        height = block.rows.stop - block.rows.start
        return self.xp.array(data, dtype, (height, width) if len(self.tensor.shape) > 1 else (height,))

    def changed(self, w: Array, block: Block, *, once: bool = False) -> Array:
        """A block with its changes, in the dtype of the base.

        Args:
            w: As the base has it.
            once: f64 throughout and one rounding at the end; else PEFT's own arithmetic.
        """
        xp, dtype = self.xp, self.tensor.dtype
        if once:
            w = xp.f64(w)
            for change, step in self._at(block):
                w = change.exact(w, step.block(block))
            return xp.round(w, dtype)
        # A quantised base is dequantised to 16 bits before it is merged into.
        w = xp.round(w, dtype)
        # PEFT rounds after each change, for each is stored before the next one comes.
        for change, step in self._at(block):
            if isinstance(change, LoadedLowRank):
                w = change.rounded(w, step.block(block), dtype)
            else:
                w = xp.round(change.apply(xp.f32(w), step.block(block)), dtype)
        return w

    def values(self, w: Array, block: Block, *, once: bool = False) -> Array:
        """A block with its changes in f32, for those who round it themselves."""
        xp = self.xp
        if once:
            w = xp.f64(w)
            for change, step in self._at(block):
                w = change.exact(w, step.block(block))
        else:
            w = xp.f32(w)
            for change, step in self._at(block):
                w = change.apply(w, step.block(block))
        return xp.f32(w)

    def chain(self, w: Array, block: Block) -> Iterator[tuple[Array, Effect]]:
        """The block in f64 after each of its changes, one after the other."""
        w = self.xp.f64(w)
        for change, step in self._at(block):
            w = change.exact(w, step.block(block))
            yield w, step.change.effect

    def exact(self, w: Array, block: Block) -> Array:
        """The changed block in f64."""
        stages = [changed for changed, _ in self.chain(w, block)]
        return stages[-1] if stages else self.xp.f64(w)

    def noise(self, w: Array, block: Block) -> Array:
        """How far f32 arithmetic may stray from `exact`, element by element, f32."""
        w = self.xp.f32(w)
        noise = w * 0
        for change, step in self._at(block):
            own = step.block(block)
            noise = noise + change.noise(w, own)
            # The next change is of what this one left.
            w = self.xp.f32(self.xp.round(change.apply(w, own), self.tensor.dtype))
        return noise
