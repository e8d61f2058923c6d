"""LoRA on bare parameters (`target_parameters`): a matrix, or a stack of them, one for each expert.

    delta W[e] = s * B[:, :, e] @ A[e],   A as (experts, r, in), B as (out, r, experts)

PEFT rounds the delta to the parameter's dtype before it adds it. Reference: peft/tuners/lora/layer.py
(`ParamWrapper`), tuners_utils.py (`_inject_parameters`) and utils/transformers_weight_conversion.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterpack import exactness, limits
from adapterpack.adapter import Adapter, Block, Effect, Finding, Kind, Loaded, LowRank, Param, Product, Shapes
from adapterpack.errors import InvalidFile, Unsupported, WrongBase
from adapterpack.experts import ORDER
from adapterpack.io.patterns import Pattern
from adapterpack.methods._changes import LoadedLowRank, transposed
from adapterpack.methods._keys import flag, positive, require
from adapterpack.methods._lora_modules import IN_PROJ, OUT_PROJ, Scaling, first_match, pattern_field
from adapterpack.methods._stacks import FileStack, Recent, Stack
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

_WRAPPED = "base_layer"
_MOST = 6
"""Parameters of one module: their orders are tried one by one."""


# -- whose keys are they? ----------------------------------------------------------------------------------


def named(
    modules: Mapping[str, Mapping[str, Param]], config: Mapping[str, Any], known: Collection[str] = ()
) -> dict[str, tuple[str, ...]]:
    """Modules that wrap a parameter, and the base tensors that each may belong to.

    Several parameters of one module nest: the last one defined is outermost, `M.lora_A`, the one before it
    `M.base_layer.lora_A`. Which level is whose the file does not say.

    Args:
        known: Modules that wrap something else.

    Raises:
        Unsupported: a nested module is not one that `target_parameters` names.
    """
    wanted = config.get("target_parameters") or []
    if not isinstance(wanted, list) or not all(isinstance(w, str) for w in wanted):
        raise InvalidFile("target_parameters in adapter_config.json is no list of names")
    is_module = _targets_modules(config) if wanted else bool
    found: dict[str, tuple[str, ...]] = {}
    for module, own in _levels([m for m in modules if m not in known]).items():
        names = dict.fromkeys(f"{module}.{w.rpartition('.')[2]}" for w in wanted)
        parameters = tuple(n for n in names if any(n == w or n.endswith(f".{w}") for w in wanted))
        if len(parameters) > len(own):
            # A name without a path, `down_proj`, could be a parameter of any module; one with a path goes before.
            paths = tuple(n for n in parameters if any("." in w and f".{n}".endswith(f".{w}") for w in wanted))
            parameters = paths if len(paths) == len(own) else parameters
        if own != [module] and not parameters:
            raise Unsupported(
                f"{own[0]} wraps a wrapped module, and target_parameters does not name it: not read yet",
                hint="merge it with PEFT",
            )
        if parameters and (own != [module] or not is_module(module)):
            found |= dict.fromkeys(own, parameters)
    return found


def unwrapped(a: Adapter) -> Adapter:
    """The adapter with what wraps a parameter marked as such, and attention's layers under their own names.

    LoRA on torch's multi-head attention M changes two things: `in_proj_weight`, a parameter, whose factors are
    `M.lora_A` and `M.lora_B`; and the linear layer `out_proj`, whose factors stand within the wrapped M.

    Raises:
        Unsupported: see `named`.
    """
    wanted = a.config.get("target_parameters") or []
    inner = {f"{m}.{_WRAPPED}.{OUT_PROJ}": m for m in a.modules if f"{m}.{_WRAPPED}.{OUT_PROJ}" in a.modules}
    if isinstance(wanted, list):
        inner = {n: m for n, m in inner.items() if not any(f"{m}.{IN_PROJ}".endswith(str(w)) for w in wanted)}
    own = {inner_name: f"{m}.{OUT_PROJ}" for inner_name, m in inner.items()}
    modules = {own.get(name, name): params for name, params in a.modules.items()}
    if len(modules) != len(a.modules):
        raise InvalidFile(f"{min(own.values())} is adapted twice: within the attention and beside it")
    found = {m: (f"{m}.{IN_PROJ}",) for m in inner.values()}
    return replace(a, modules=modules, parameters=named(modules, a.config, found.keys()) | found)


def _targets_modules(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Is a module adapted as one, by `target_modules`? PEFT lets no parameter of it be adapted then."""
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return Pattern(targets, template=r"(?:{})\Z", where="target_modules").matches
    names = targets if isinstance(targets, list) else []
    return lambda module: any(module == t or module.endswith(f".{t}") for t in names)


def _levels(modules: Iterable[str]) -> dict[str, list[str]]:
    """Module without its nesting to its levels, the deepest first."""
    levels: dict[str, list[str]] = {}
    for name in modules:
        plain = ".".join(part for part in name.split(".") if part != _WRAPPED)
        levels.setdefault(plain, []).append(name)
    return {plain: sorted(own, key=lambda n: -n.count(_WRAPPED)) for plain, own in levels.items()}


@dataclass(frozen=True)
class Level:
    """One wrapped parameter.

    Attributes:
        module: Path of the module, without nesting.
        parameter: Its name; None: only the base's shapes could tell.
        params: The tensors of the adapter.
        rank: As the config says, of each expert.
        known_as: Under which name the patterns of the config know it.
    """

    module: str
    parameter: str | None
    params: Mapping[str, Param]
    rank: int
    known_as: str

    @property
    def target(self) -> str:
        return f"{self.module}.{self.parameter or '?'}"

    def stack(self, experts: int | None, recent: Recent | None = None) -> FileStack:
        """Its factors.

        Args:
            experts: How many; None: as many as the rank says.

        Raises:
            InvalidFile: A and B do not fit each other, or the experts.
        """
        a, b = require(self.target, self.params, ("lora_A", "lora_B"))
        if self.params.keys() != {"lora_A", "lora_B"}:
            raise Unsupported(f"{self.target} is a parameter with more than A and B: PEFT knows no such thing")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise InvalidFile(
                f"{self.target}: A {a.shape} and B {b.shape} are not (r * experts, in) and (out, r * experts)"
            )
        if experts is None:
            experts = a.shape[0] // self.rank if a.shape[0] % self.rank == 0 else 0
        if not experts or a.shape[0] % experts:
            raise InvalidFile(f"{self.target}: A {a.shape} is not of rank {self.rank} for each expert")
        return FileStack(a, b, experts, recent or Recent())


def levels(a: Adapter, shapes: Shapes | None) -> Iterator[Level]:
    """Every wrapped parameter, by name where the names, or the base's shapes, tell which it is.

    Args:
        shapes: Of the base; None: without a name where it takes a base.

    Raises:
        WrongBase: the base does not have these parameters.
        Unsupported: the shapes fit in more than one way, and the names are unknown.
    """
    patterns, values = pattern_field(a.config, "rank_pattern")
    default = positive(a.config, "r", 8)
    for module, own in _levels(a.parameters).items():
        names = [n.rpartition(".")[2] for n in a.parameters[own[0]]]
        ordered = _assigned(module, [a.modules[n] for n in own], names, shapes) or ()
        for n, parameter in itertools.zip_longest(own, ordered):
            attention = parameter == IN_PROJ and f"{module}.{OUT_PROJ}" in a.modules
            known_as = module if attention else f"{module}.{parameter}"
            said = None if parameter is None else first_match(patterns, values, known_as)
            rank = default if said is None else said
            if type(rank) is not int or not 0 < rank <= limits.LORA_RANK:
                raise InvalidFile(f"rank_pattern gives {module}.{parameter} the rank {rank!r:.60}")
            yield Level(module, parameter, a.modules[n], rank, known_as)


def _assigned(
    module: str, own: Sequence[Mapping[str, Param]], names: Sequence[str], shapes: Shapes | None
) -> Sequence[str] | None:
    """The parameter of each level, the deepest first; None if that takes a base."""
    if shapes is None:
        return _in_order(names) if len(names) == len(own) else None
    for params in own:
        require(module, params, ("lora_A", "lora_B"))
    there = [n for n in names if shapes.has(f"{module}.{n}")]
    if len(there) != len(own) or len(own) > _MOST:
        raise WrongBase(f"{module} has {len(own)} adapted parameters, and the base {len(there)}: {', '.join(there)}")
    ways = [
        way
        for way in itertools.permutations(there)
        if all(_fits(params, shapes.shape(f"{module}.{n}")) for params, n in zip(own, way, strict=True))
    ]
    usual = _in_order(there)
    if len(ways) > 1 and usual is not None and tuple(usual) in ways:
        return usual
    if len(ways) > 1:
        raise Unsupported(
            f"which of {', '.join(there)} of {module} is which in the adapter? Their shapes are alike",
            hint="merge it with PEFT, which asks the model's code for their order",
        )
    if not ways:
        wanted = ", ".join(f"{n} {shapes.shape(f'{module}.{n}')}" for n in there)
        raise WrongBase(f"the parameters of {module} in the base do not fit the adapter's: {wanted}")
    return ways[0]


def _in_order(names: Sequence[str]) -> list[str] | None:
    """In the order of definition, which is that of nesting; None if that is not known."""
    if len(names) == 1:
        return list(names)
    return sorted(names, key=ORDER.index) if set(names) <= set(ORDER) else None


def _fits(params: Mapping[str, Param], shape: Shape) -> bool:
    a, b = (params[n].tensor.shape if n in params else () for n in ("lora_A", "lora_B"))
    if len(a) != 2 or len(b) != 2 or len(shape) not in (2, 3):
        return False
    sides = {(b[0], a[1])} if len(shape) == 2 else {(b[0], a[1]), (a[1], b[0])}
    return shape[-2:] in sides and (len(shape) == 2 or (shape[0] > 0 and a[0] % shape[0] == 0))


# -- what they do ------------------------------------------------------------------------------------------


def changes(a: Adapter, scaling: Scaling, shapes: Shapes | None) -> Iterator[ParameterChange]:
    """One change for each wrapped parameter."""
    if not a.parameters:
        return
    for field_name in ("use_dora", "lora_bias", "fan_in_fan_out"):
        if flag(a.config, field_name):
            raise Unsupported(f"{field_name} with bare parameters or multi-head attention: PEFT does not do that")
    recent = Recent()
    for level in levels(a, shapes):
        if level.parameter is None:
            raise WrongBase(
                f"only the base tells which parameter of {level.module} is which in the adapter", hint="--base BASE"
            )
        shape = None if shapes is None else shapes.shape(level.target)
        stack = level.stack(None if shape is None else shape[0] if len(shape) == 3 else 1, recent)
        yield ParameterChange(
            module=level.module,
            target=level.target,
            stack=stack,
            scale=scaling(level.known_as, stack.rank),
            uses=frozenset(p.key for p in level.params.values()),
        )


@dataclass(frozen=True)
class ParameterChange:
    """W[e] + scale * (B[e] @ A[e]), rounded before it is added.

    A merge takes it in parts, one for each expert, for experts may lie apart on disk.

    Attributes:
        module: Path of the module.
        target: The parameter.
        stack: The factors.
    """

    module: str
    target: str
    stack: Stack
    scale: float
    uses: frozenset[str]

    effect = Effect.ADD

    @property
    def torch(self) -> bool:
        return self.stack.torch

    @property
    def shape(self) -> Shape:
        """The logical matrices, one below the other: (experts * out, in)."""
        return self.stack.experts * self.stack.out, self.stack.into

    def whole(self, kind: Kind) -> bool:
        return False

    def products(self, kind: Kind) -> tuple[Product, ...]:
        s = self.stack
        return (Product(s.out, s.rank, s.into, transposed(kind), batched=s.experts > 1),)

    def place(self, shape: Shape, conv1d: bool | None) -> Kind:
        """LINEAR for matrices (out, in), CONV1D for (in, out)."""
        s = self.stack
        straight = shape in ((s.experts, s.out, s.into), (s.out, s.into) if s.experts == 1 else ())
        # A stack of one goes PEFT's way of a matrix, which knows no transposed one.
        crossed = s.experts > 1 and shape == (s.experts, s.into, s.out)
        if straight and crossed and conv1d is None:
            raise WrongBase(
                f"{self.target} has shape {shape}: only config.json of the base could tell how its experts lie"
            )
        if straight and not (crossed and conv1d):
            return Kind.LINEAR
        if crossed:
            return Kind.CONV1D
        raise WrongBase(
            f"{self.target} has shape {shape}, the adapter's change (experts, out, in) ="
            f" ({s.experts}, {s.out}, {s.into})"
        )

    def part(self, expert: int, rows: slice | None = None) -> ExpertChange:
        """The change of one expert's matrix, or of some of its rows (out)."""
        return ExpertChange(self, expert, slice(0, self.stack.out) if rows is None else rows)

    def load(self, xp: Backend) -> LoadedStack:
        return LoadedStack(xp, self.stack, self.scale)


@dataclass(frozen=True)
class LoadedStack:
    """All experts at hand, to compare with another adapter; see `adapter.Loaded`. A merge takes parts."""

    xp: Backend
    stack: Stack
    scale: float

    def low_rank(self) -> LowRank | None:
        return None

    def low_ranks(self) -> Iterator[LowRank]:
        """Of each expert."""
        for expert in range(self.stack.experts):
            yield LowRank(*self.stack.expert(self.xp, expert), self.scale)

    def delta(self, rows: slice) -> Array | None:
        """f64, rows of (experts * out, in)."""
        out = self.stack.out
        stop = min(rows.stop, out * self.stack.experts)
        found = []
        for expert in range(rows.start // out, -(-stop // out)):
            b, a = self.stack.expert(self.xp, expert)
            first, last = max(rows.start - expert * out, 0), min(stop - expert * out, out)
            found.append((self.xp.f64(b[first:last]) @ self.xp.f64(a)) * self.scale)
        return found[0] if len(found) == 1 else self.xp.torch.cat(found)

    def parts(self) -> Mapping[str, Array]:
        b, a = zip(*(self.stack.expert(self.xp, e) for e in range(self.stack.experts)), strict=True)
        return {"B": self.xp.torch.stack(b) * self.scale, "A": self.xp.torch.stack(a)}

    def apply(self, w: Array, block: Block) -> Array:
        raise NotImplementedError("a merge takes it in parts")

    exact = noise = apply


@dataclass(frozen=True)
class ExpertChange:
    """The change of one matrix of a stack; `rows` are rows of its logical (out, in)."""

    whole_stack: ParameterChange
    expert: int
    rows: slice

    effect = Effect.ADD

    @property
    def module(self) -> str:
        return self.whole_stack.module

    @property
    def target(self) -> str:
        return self.whole_stack.target

    @property
    def uses(self) -> frozenset[str]:
        return self.whole_stack.uses

    @property
    def torch(self) -> bool:
        return self.whole_stack.torch

    @property
    def shape(self) -> Shape:
        return self.rows.stop - self.rows.start, self.whole_stack.stack.into

    def whole(self, kind: Kind) -> bool:
        return False

    def products(self, kind: Kind) -> tuple[Product, ...]:
        return self.whole_stack.products(kind)

    def place(self, shape: Shape, conv1d: bool | None) -> Kind:
        return Kind.LINEAR

    def load(self, xp: Backend) -> Loaded:
        b, a = self.whole_stack.stack.expert(xp, self.expert)
        low_rank = LowRank(b[self.rows], a, self.whole_stack.scale)
        return _LoadedExpert(xp, low_rank, round_delta=True, full=b, rows=self.rows, products=self.products)


@dataclass(frozen=True, kw_only=True)
class _LoadedExpert(LoadedLowRank):
    """Its factors at hand. Where a product cannot be cut into rows it is computed in full, whatever is asked for."""

    full: Array
    rows: slice
    products: Callable[[Kind], tuple[Product, ...]]

    def stored_delta(self, block: Block) -> Array:
        (product,) = self.products(block.kind)
        if exactness.splits(self.xp, product):
            return super().stored_delta(block)
        full = exactness.multiply(self.xp, self.full, self.factors.a, batched=product.batched)
        delta = full.T[block.rows] if transposed(block.kind) else full[self.rows][block.rows]
        return delta * self.factors.scale


def ranks(a: Adapter) -> Iterator[tuple[str, int]]:
    """Each wrapped parameter and the rank of one expert, as the config says."""
    for n, level in enumerate(levels(a, None)):
        name = level.target if level.parameter is not None else f"{level.module} ({n})"
        yield name, level.stack(None).rank


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    """Half pairs, and ranks that the config does not say."""
    for level in levels(a, None):
        try:
            stack = level.stack(None)
        except InvalidFile as e:
            yield Finding("half-pair", level.target, e.message, "train or save the adapter again")
            continue
        experts = None
        # A base of which only config.json is at hand does not tell.
        with contextlib.suppress(WrongBase):
            if shapes is not None and level.parameter is not None and shapes.has(level.target):
                shape = shapes.shape(level.target)
                experts = shape[0] if len(shape) == 3 else 1
        if experts is not None and experts != stack.experts:
            yield Finding(
                "rank-mismatch",
                level.target,
                f"the config says rank {level.rank}, the tensors have {stack.a.shape[0]} for {experts} experts:"
                " PEFT refuses to load it",
                "train or save the adapter again",
            )
