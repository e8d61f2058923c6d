"""The words of the house: `Adapter` and what methods say about it. No torch, no files.

A method turns a `Checkpoint` into an `Adapter` and back (`render(parse(c)) == c`, key for key), and an
`Adapter` into `Change`s, each of ONE base tensor, so that merge, verify and accounting have no special
cases for weights, biases, embedding rows and replaced tensors.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from adapterpack.checkpoint import Checkpoint
from adapterpack.tensor import DType, Shape, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend
    from adapterpack.experts import Inside
    from adapterpack.methods._keys import KeyTable
    from adapterpack.recipes import Recipe


Progress = Callable[[str, int, int], None]
"""How long work reports: what is done, how much of it, of how much."""


class Grade(enum.IntEnum):
    """What a conversion may lose. Ordered: more is better."""

    APPROXIMATE = 1
    """Within the stated error: casts, rank truncation."""
    EQUIVALENT = 2
    """The same change of W within 5e-6 relative; training state or form is gone."""
    LOSSLESS = 3
    """The files or the state dict come back bit for bit."""

    def __str__(self) -> str:
        return self.name.lower()


EQUIVALENT_ERROR = 5e-6
"""Largest relative Frobenius error of a module's change that still counts as the same change."""


class Need(enum.Flag):
    """What must be known of the base before work can begin."""

    NOTHING = 0
    SHAPES = enum.auto()
    WEIGHTS = enum.auto()


class Kind(enum.Enum):
    """Which layer a weight belongs to: it decides how the stored weight lies."""

    LINEAR = "linear"
    """(out, in)."""
    CONV1D = "conv1d"
    """GPT-2's Conv1D: (in, out)."""
    EMBEDDING = "embedding"
    """(entries, dim)."""
    CONVOLUTION = "convolution"
    """(out, in, kernel...)."""
    OTHER = "other"
    """Biases, norms and whatever is replaced as a whole."""


class Effect(enum.Enum):
    """How a change treats the weight."""

    ADD = "add"
    """W + delta, and the delta does not depend on W."""
    REPLACE = "replace"
    """New values."""
    TRANSFORM = "transform"
    """Anything else: it takes W to know the result."""


@dataclass(frozen=True)
class Block:
    """Rows of one stored base tensor, seen as a matrix whose rows lie along its last dimension.

    Attributes:
        kind: How the tensor lies.
        rows: Which rows; their bounds are given.
        whole: Are they all of the tensor?
        dtype: Of the base tensor: PEFT rounds some deltas to it before it adds.
    """

    kind: Kind
    rows: slice
    whole: bool
    dtype: DType


class Shapes(Protocol):
    """What a method may ask of a base without reading weights."""

    def shape(self, tensor: str) -> Shape:
        """Shape of a base tensor, named as the adapter names it. Raises WrongBase if there is none."""
        ...

    def has(self, tensor: str) -> bool: ...

    def tensor(self, target: str) -> Tensor:
        """A base tensor, for changes that take another one than the one they change. Raises WrongBase."""
        ...

    def modules(self) -> list[str]:
        """Its modules that have a matrix of weights, as the model calls them; empty if only its config is there."""
        ...

    def conv1d(self, module: str) -> bool | None:
        """Do its weights lie as (in, out), as GPT-2's Conv1D? None if the base's config does not tell."""
        ...

    def inside(self, tensor: str) -> Inside | None:
        """Where the weight of one expert's layer lies in a fused tensor; None: it does not."""
        ...

    @property
    def dtype(self) -> DType | None:
        """The dtype of its weights, None if it does not tell."""
        ...


@dataclass(frozen=True)
class Param:
    """One tensor of an adapter and the key under which its file has it."""

    key: str
    tensor: Tensor


@dataclass(frozen=True)
class Replaced:
    """A base tensor, or rows of it, with new values.

    Attributes:
        param: The new values.
        rows: Which rows are replaced, in the order of the values; None for all.
    """

    param: Param
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Adapter:
    """What a method makes of a checkpoint. Frozen and lazy.

    Attributes:
        method: Its `peft_type` in lower case, `lora`.
        encoding: Which equivalent set of parameters is stored, `topk`.
        config: adapter_config.json.
        modules: Module path in the base model to its parameters, under the papers' names.
        shared: Parameters that all modules use: vector bank, projections.
        parameters: Modules that wrap a bare parameter (LoRA's `target_parameters`) to the base tensors that each
            may belong to: the file does not always say which.
        replaced: Base tensor name to its new values: modules_to_save, biases, token rows, saved embeddings.
        extra: Keys that no rule knows: kept, never applied.
        source: The checkpoint it was parsed from: files to carry, metadata.
        changed: Was it made by a conversion? Then its files are written anew.
    """

    method: str
    encoding: str
    config: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, Param]]
    shared: Mapping[str, Param]
    replaced: Mapping[str, tuple[Replaced, ...]]
    extra: Mapping[str, Tensor]
    source: Checkpoint
    metadata: Mapping[str, str] = field(default_factory=dict)
    changed: bool = False
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def params(self) -> Iterator[Param]:
        """Every tensor that takes part, modules first."""
        for module in self.modules.values():
            yield from module.values()
        yield from self.shared.values()
        for entries in self.replaced.values():
            for entry in entries:
                yield entry.param

    def targets(self) -> list[str]:
        """The base tensors that it names: the weight of each module, and what is replaced."""
        weights = [f"{m}.weight" for m in self.modules if m not in self.parameters]
        # Where more could be meant than there are, only the base's shapes tell.
        levels = Counter(self.parameters.values())
        wrapped = [name for names, n in levels.items() if len(names) == n for name in names]
        return list(dict.fromkeys((*weights, *wrapped, *self.replaced)))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by key, `extra` too."""
        return {p.key: p.tensor for p in self.params()} | dict(self.extra)


@dataclass(frozen=True)
class Product:
    """B @ A, in f32, cut into blocks of rows, or of columns where W lies transposed.

    Attributes:
        out, rank, into: (out, r) by (r, in).
        columns: Is it cut into columns?
        norms: Are norms of its rows computed too?
        batched: Is it one of a batch of products, as those of experts are?
    """

    out: int
    rank: int
    into: int
    columns: bool
    norms: bool = False
    batched: bool = False


@dataclass(frozen=True)
class Mixture:
    """The softmax of the logarithms of two weights, in f32 (VB-LoRA)."""


@dataclass(frozen=True)
class LowRank:
    """delta == scale * (b @ a), logical orientation.

    Attributes:
        b: (out, r), f32.
        a: (r, in), f32.
    """

    b: Array
    a: Array
    scale: float


class Loaded(Protocol):
    """A change with its tensors read."""

    def low_rank(self) -> LowRank | None:
        """Exact factors of the change; None if it has none."""
        ...

    def delta(self, rows: slice) -> Array | None:
        """f64, rows of the logical (out, in) delta; None if the change is not additive."""
        ...

    def parts(self) -> Mapping[str, Array]:
        """What it consists of, scales included: to compare changes where W is not at hand."""
        ...

    def apply(self, w: Array, block: Block) -> Array:
        """The changed weight in PEFT's own arithmetic.

        Args:
            w: A block of the base tensor as stored, f32.
            block: Which one.

        Returns:
            f32 of the same shape: the caller rounds, once.
        """
        ...

    def exact(self, w: Array, block: Block) -> Array:
        """The same in f64 from end to end: what `apply` would give without any rounding."""
        ...

    def noise(self, w: Array, block: Block) -> Array:
        """f32: how far honest f32 arithmetic may stray from `exact`, element by element (broadcastable).

        Args:
            w: The block, f32.
        """
        ...


class Change(Protocol):
    """What the adapter does to ONE base tensor.

    Attributes:
        module: Path of the module that the tensor belongs to.
        target: The base tensor, named as the adapter names it.
        shape: Logical (out, in) of a matrix; the vector's shape; the shape of the new values.
        effect: How it treats the weight.
        uses: Keys of the adapter tensors that it consumes.
        torch: Does its arithmetic take torch? Else numpy can do it too.
    """

    @property
    def module(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def effect(self) -> Effect: ...
    @property
    def uses(self) -> frozenset[str]: ...
    @property
    def torch(self) -> bool: ...

    def whole(self, kind: Kind) -> bool:
        """Does it take all of W to compute a part of the result?"""
        ...

    def products(self, kind: Kind) -> tuple[Product, ...]:
        """The matrix products that it computes in f32 block by block: their bits depend on the library."""
        ...

    def place(self, shape: Shape, conv1d: bool | None) -> Kind:
        """How a base tensor of that shape lies for this change.

        Args:
            shape: Of the base tensor, as stored.
            conv1d: What the base knows of the module; None: nothing.

        Raises:
            WrongBase: the change does not fit.
        """
        ...

    def load(self, xp: Backend) -> Loaded:
        """Read its tensors, once."""
        ...


@dataclass(frozen=True)
class Finding:
    """A fault that `check` or `verify` found.

    Attributes:
        code: Short and stable, `missing-bank`.
        key: The tensor key, module or config field.
        message: What is wrong.
        fix: What to do, or None.
        warning: Worth knowing, but the adapter is not unhealthy for it.
    """

    code: str
    key: str
    message: str
    fix: str | None = None
    warning: bool = False


@dataclass(frozen=True)
class Request:
    """What a conversion may use.

    Attributes:
        xp: Where its maths runs.
        shapes: Of the base; None without one.
        base_dtype: As the user said; None: as the base says.
        max_error: How much may be lost; None: nothing beyond `equivalent`.
        warm_start: Fill in what is gone so that training can start again.
    """

    xp: Backend
    shapes: Shapes | None = None
    base_dtype: DType | None = None
    max_error: float | None = None
    warm_start: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a conversion made.

    Attributes:
        adapter: The result.
        grade: What it claims; the job measures it.
        dropped: What is gone, in words.
        notes: What the user should know.
    """

    adapter: Adapter
    grade: Grade
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Edge:
    """One conversion: from the encoding that it is filed under to another encoding or method.

    Attributes:
        to: Encoding or method that it makes.
        grade: The best grade that it can reach; it says the one reached in its `Outcome`.
        needs: Of the base.
        compact: Does `compress` take it? Only where stock PEFT reads the result the same on any base.
    """

    to: str
    grade: Grade
    run: Callable[[Adapter, Request], Outcome]
    needs: Need = Need.NOTHING
    compact: bool = False


class Method(Protocol):
    """A PEFT method: one file in `methods/`, one row in its table."""

    @property
    def peft_type(self) -> str: ...
    @property
    def edges(self) -> Mapping[str, tuple[Edge, ...]]: ...

    @property
    def keys(self) -> KeyTable: ...
    @property
    def keep_dtype(self) -> frozenset[str]:
        """Parameters that PEFT cannot load in another dtype."""
        ...

    def parse(self, c: Checkpoint) -> Adapter:
        """Sort the tensors by name. Raises Unsupported(reason) for variants that we would get wrong."""
        ...

    def changes(self, a: Adapter, request: Request) -> Iterator[Change]:
        """Raises WrongBase or Unsupported where `request` lacks what it needs."""
        ...

    def recipes(self, a: Adapter) -> Iterator[Recipe]:
        """How its seeded tensors might have been drawn; who uses one proves it by digest."""
        ...

    def findings(self, a: Adapter, shapes: Shapes | None) -> Iterator[Finding]: ...
    def ranks(self, a: Adapter) -> Mapping[str, int]: ...
