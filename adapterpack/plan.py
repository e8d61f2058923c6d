"""Which base tensors an adapter changes, and how: the one plan that merge writes and verify holds it to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adapterpack.adapter import EQUIVALENT_ERROR, Adapter, Change, Effect, Kind, Method, Request
from adapterpack.backend import Array, Backend
from adapterpack.base import Base
from adapterpack.errors import InvalidFile, LossRefused, Unsupported
from adapterpack.methods._changes import LowRankChange, ReplaceChange, VectorChange
from adapterpack.tensor import BF16, F16, F32, Tensor

_SHOWN = 5


@dataclass(frozen=True)
class Step:
    """One change of one base tensor, and how that tensor lies."""

    change: Change
    kind: Kind


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


def make(
    adapters: Sequence[tuple[Method, Adapter]],
    base: Base,
    xp: Backend,
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
    # The last one binds for all: names of one base need one prefix.
    for _, adapter in adapters:
        base.require(adapter.targets(), adapter.config)
    base.bind(t for _, a in adapters for t in a.targets())
    steps: dict[str, list[Step]] = {}
    modules: set[str] = set()
    for n, (method, adapter) in enumerate(adapters):
        weight = 1.0 if weights is None else weights[n]
        used: set[str] = set()
        for change in method.changes(adapter, Request(xp=xp, shapes=base)):
            used |= change.uses
            scaled = change if weight == 1.0 else _scaled(change, weight)
            tensor = base.tensor(change.target)
            if tensor.dtype not in (F32, BF16, F16):
                raise Unsupported(
                    f"{change.target} of the base is {tensor.dtype}: a quantised base cannot be merged into yet",
                    hint="merge into the original 16-bit model",
                )
            kind = change.place(tensor.shape, base.conv1d(change.module))
            steps.setdefault(_disk_name(change.target, base), []).append(Step(scaled, kind))
            modules.add(change.module)
        _refuse_unused(adapter, used)
    one = any(a.config.get("ensure_weight_tying") is True for _, a in adapters)
    return _part_tied({name: tuple(s) for name, s in steps.items()}, base, len(modules), one)


def _disk_name(target: str, base: Base) -> str:
    return base.on_disk(target) or base.head


def _refuse_unused(adapter: Adapter, used: set[str]) -> None:
    unused = sorted(adapter.tensors().keys() - used)
    if unused:
        shown = ", ".join(unused[:_SHOWN]) + (", ..." if len(unused) > _SHOWN else "")
        raise LossRefused(
            f"{len(unused)} tensors of the adapter would go unused: {shown}",
            hint="they belong to a variant or version that is not known here; merge with what wrote them",
        )


def _scaled(change: Change, weight: float) -> Change:
    if isinstance(change, LowRankChange | VectorChange):
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


def compute(tensor: Tensor, steps: Sequence[Step], xp: Backend, *, once: bool = False) -> Array:
    """The changed tensor, in the dtype of the base.

    Args:
        tensor: As the base has it.
        once: f64 throughout and one rounding at the end; else PEFT's own arithmetic.

    Raises:
        InvalidFile: the result is not finite: NaN in the adapter, or too large for the dtype.
    """
    w = xp.native(tensor)
    for step in steps:
        change = step.change.load(xp)
        # PEFT rounds after each change, for each is stored before the next one comes.
        w = change.exact(w, step.kind) if once else xp.round(change.apply(w, step.kind), tensor.dtype)
    w = xp.round(w, tensor.dtype)
    if not bool(xp.torch.isfinite(w).all()):
        raise InvalidFile(
            f"merging {steps[0].change.module} gives values that are NaN, infinite or too large for {tensor.dtype}",
            hint="adapterpack check names the broken tensors",
        )
    return w


def exact(tensor: Tensor, steps: Sequence[Step], xp: Backend) -> tuple[Array, Array]:
    """The changed tensor in f64, not rounded, and the sum of the magnitudes that an honest merge rounds on the way.

    Each step's result is rounded; and some tools round an added delta before they add it.
    """
    w = xp.native(tensor).double()
    rounded = xp.torch.zeros_like(w)
    for step in steps:
        changed = step.change.load(xp).exact(w, step.kind)
        rounded += changed.abs()
        if step.change.effect is not Effect.REPLACE:
            rounded += (changed - w).abs()
        w = changed
    return w, rounded


def noise(tensor: Tensor, steps: Sequence[Step], xp: Backend) -> Array:
    """How far f32 arithmetic may stray from `exact`, element by element, f32."""
    w = xp.native(tensor)
    return sum(
        (s.change.load(xp).noise(w, s.kind) for s in steps), start=xp.torch.zeros(tensor.shape, device=xp.device)
    )


def rounding_apart(x: Array, y: Array, w: Array) -> bool:
    """Are two f64 results of one weight the same but for the order of f32 sums?"""
    return float((x - y).norm()) <= EQUIVALENT_ERROR * float((x - w.double()).norm())
