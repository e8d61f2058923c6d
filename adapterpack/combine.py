"""One LoRA adapter from several: their exact weighted sum, or PEFT's ways to mix them, without a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterpack import containers, methods
from adapterpack.adapter import EQUIVALENT_ERROR, Adapter, Grade, Outcome, Param, Progress, Replaced
from adapterpack.backend import TorchBackend
from adapterpack.card import CARD
from adapterpack.checkpoint import Checkpoint
from adapterpack.conversion import Conversion
from adapterpack.errors import LossRefused, Unsupported, UsageError
from adapterpack.measuring import Measured, publish
from adapterpack.methods import _lora_combining, _lora_resizing, lora
from adapterpack.methods._keys import PREFIX, flag
from adapterpack.methods._lora_combining import DENSE, FACTORS, TYPES, Sum, Way
from adapterpack.methods._lora_resizing import Cut
from adapterpack.resize import ModuleRank, refuse_other_methods
from adapterpack.sources import here
from adapterpack.tensor import F32, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Backend


@dataclass(frozen=True, kw_only=True)
class Combination(Conversion):
    """What `combine` made, or would make; see `Conversion` for the rest.

    `max_rel_error` is the distance from the exact weighted sum, which is what `exact`, `cat` and `svd` are for, and
    the other types are not.

    Attributes:
        type: How they were combined; PEFT's way with a single adapter is `linear` whatever was asked for.
        modules: One entry for each.
    """

    type: str
    modules: tuple[ModuleRank, ...]


def combine(
    sources: Sequence[str | Path],
    destination: str | Path,
    *,
    weights: Sequence[float] | None = None,
    type: str = "exact",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str | None = None,
    seed: int | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Combination:
    """Combine LoRA adapters of one base.

    Args:
        sources: The adapters; only read.
        destination: The new directory.
        weights: One for each; None: all are 1. They may be negative.
        type: `exact`, the weighted sum of the changes, or a `combination_type` of PEFT's `add_weighted_adapter`:
            `linear`, `cat`, `svd`, `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`, and each of the last four
            with `_svd`.
        rank: Of the result: with `exact` a ceiling, with svd the rank (the largest of the adapters by default).
        density: Fraction of the values that pruning keeps; ties, dare and magnitude_prune want it.
        majority_sign: `total` (the default) or `frequency`; for ties.
        seed: For dare: that of `torch.manual_seed` just before PEFT's call; 0 by default.

    Raises:
        UsageError: options that do not go together.
        Unsupported: what cannot be added up, with the reason.
        WrongBase: the adapters have modules of different shapes.
        LossRefused: float32 cannot hold the exact sum.
        See `convert` for the rest.
    """
    ways = _way(sources, weights, type, rank, density, majority_sign, seed)
    factors = [1.0] * len(sources) if weights is None else [float(w) for w in weights]
    target = Path(destination).expanduser()
    protected = tuple(here(s) for s in sources)
    containers.check_target(target, overwrite=overwrite, sources=protected)
    with ExitStack() as stack:
        opened = [stack.enter_context(containers.open_checkpoint(s, allow_pickle=allow_pickle)) for s in protected]
        adapters = [methods.parse(c)[1] for c in opened]
        for a in adapters:
            refuse_other_methods(a)
        xp = TorchBackend(device)
        sums = _lora_combining.sums(adapters, factors, ways.kind)
        frame = _frame(opened, adapters, sums)
        beside = _Beside(_replaced(adapters, factors), _biases(xp, sums, ways))
        made, errors = {}, {}
        for s, new in _lora_combining.combined(xp, adapters, sums, ways, progress):
            made[s.name], errors[s.name] = new, s.error(xp, new.b, new.a)
        most = max(errors.values())
        grade = Grade.EQUIVALENT if most <= EQUIVALENT_ERROR else Grade.APPROXIMATE
        if ways.kind == "exact" and rank is None and grade is Grade.APPROXIMATE:
            raise LossRefused(
                f"float32 factors move the sum by {most:.2g}: the adapters nearly cancel each other",
                hint="name a --rank to have it all the same, with the error measured",
            )
        dropped = tuple(f"unknown tensor {key}" for a in adapters for key in a.extra)
        outcome = Outcome(_result(frame, sums, made, beside), grade, dropped, _notes(adapters, sums, type, ways))
        done = publish(frame, outcome, Measured(grade, most), target, protected, overwrite=overwrite, dry_run=dry_run)
        modules = tuple(ModuleRank(s.name, s.rank, made[s.name].rank, errors[s.name]) for s in sums)
        return Combination(**vars(done), type=ways.kind, modules=modules)


def _way(
    sources: Sequence[str | Path],
    weights: Sequence[float] | None,
    kind: str,
    rank: int | None,
    density: float | None,
    majority: str | None,
    seed: int | None,
) -> Way:
    """The options, checked against each other."""
    if not sources:
        raise UsageError("no adapters to combine")
    if weights is not None and len(weights) != len(sources):
        raise UsageError(
            f"{len(weights)} weights for {len(sources)} adapters", hint="--weight: one for each, or none"
        )
    if any(not math.isfinite(w) for w in weights or ()):
        raise UsageError("a weight must be a finite number")
    if kind not in TYPES:
        raise UsageError(f"no type {kind!r:.40}", hint=f"one of {', '.join(TYPES)}")
    prunes = kind in DENSE or (kind in FACTORS and kind != "linear")
    if prunes != (density is not None):
        raise UsageError(f"--type {kind} {'wants' if prunes else 'takes no'} --density")
    if density is not None and not 0 < density <= 1:
        raise UsageError("--density is a fraction: more than 0, 1 at most")
    if majority is not None and ("ties" not in kind or majority not in ("total", "frequency")):
        raise UsageError("--majority-sign is total or frequency, and goes with ties")
    if seed is not None and not kind.startswith("dare"):
        raise UsageError("--seed goes with dare: nothing else draws random numbers")
    if rank is not None and (rank < 1 or not (kind == "exact" or kind.endswith("svd"))):
        raise UsageError("--rank is 1 or more, and goes with exact and svd")
    if kind != "exact" and len(sources) == 1:
        # _check_add_weighted_adapter: "if there is only one adapter, we can only use linear merging".
        return Way("linear")
    return Way(kind, rank, 1.0 if density is None else density, majority or "total", seed or 0)


def _notes(adapters: Sequence[Adapter], sums: Sequence[Sum], asked: str, way: Way) -> tuple[str, ...]:
    notes = []
    bases = list(dict.fromkeys(str(a.config.get("base_model_name_or_path")) for a in adapters))
    if len(bases) > 1:
        notes.append(f"the adapters name different bases: {', '.join(bases)}; the result names the first")
    if asked != way.kind:
        notes.append("PEFT combines a single adapter by linear, whatever is asked for; so does this")
    if way.kind != "exact" and any(flag(a.config, "use_rslora") for a in adapters[:1]):
        notes.append("PEFT leaves use_rslora on, which multiplies the result by the root of its rank; here it is off")
    if way.kind in (*FACTORS, *DENSE):
        notes.append(f"{way.kind} is not the sum of the changes; the error is its distance from that sum")
    if way.kind.startswith("dare") and not _lora_combining.draws_like_peft(sums, adapters, way):
        notes.append("in which order PEFT draws for these modules is not known: it may keep other values than this")
    return tuple(notes)


# -- all but the factors -----------------------------------------------------------------------------------


def _frame(opened: Sequence[Checkpoint], adapters: Sequence[Adapter], sums: Sequence[Sum]) -> Checkpoint:
    """What stands around the factors: config, files, and what was left behind.

    Raises:
        Unsupported: configs that no one config can stand for.
    """
    config = dict(adapters[0].config)
    config |= _targets(adapters, sums) | {
        "fan_in_fan_out": any(flag(a.config, "fan_in_fan_out") for a in adapters),
        "bias": _bias(adapters),
        "modules_to_save": _united([a.config.get("modules_to_save") for a in adapters]),
        "use_dora": False,
    }
    for field in ("trainable_token_indices", "ensure_weight_tying"):
        said = [a.config.get(field) for a in adapters if a.config.get(field)]
        some = field == "ensure_weight_tying" and 0 < len(said) < len(adapters)
        if some or any(value != said[0] for value in said):
            raise Unsupported(f"the adapters have different {field}: no one adapter can have both")
        if said:
            config[field] = said[0]
    first = opened[0]
    left = [f"{c.name}/{name}" for c in opened for name in c.left]
    left += [f"{c.name}/{name}" for c in opened for name in c.files if name == CARD or name not in first.files]

    def still_same() -> None:
        for c in opened:
            c.still_same()

    return Checkpoint(
        name=first.name,
        config=config,
        tensors={},
        metadata={k: v for k, v in first.metadata.items() if k != "adapterpack"},
        files={name: source for name, source in first.files.items() if name != CARD},
        left=tuple(dict.fromkeys(left)),
        bytes=sum(c.bytes for c in opened),
        still_same=still_same,
    )


def _united(lists: Sequence[Any]) -> list[str] | None:
    found = [str(name) for own in lists if isinstance(own, list) for name in own]
    return list(dict.fromkeys(found)) or None


_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def _targets(adapters: Sequence[Adapter], sums: Sequence[Sum]) -> dict[str, Any]:
    """The first adapter's word where all say the same, else every module by its full path."""

    def said(a: Adapter) -> list[Any]:
        values = (a.config.get(field) for field in _TARGETING)
        return [sorted(map(str, v)) if isinstance(v, list) else v for v in values]

    alike = all(said(a) == said(adapters[0]) and a.modules.keys() == adapters[0].modules.keys() for a in adapters)
    if alike:
        return {}
    return {"target_modules": [s.name for s in sums]} | dict.fromkeys(_TARGETING[1:])


def _bias(adapters: Sequence[Adapter]) -> str:
    """`bias` of the result.

    Raises:
        Unsupported: `lora_only` of some adapters, while others adapt more modules.
    """
    said = {str(a.config.get("bias") or "none"): a for a in adapters}
    if "all" in said:
        return "all"
    if "lora_only" not in said:
        return "none"
    everywhere = {m for a in adapters for m in a.modules}
    if any(a.modules.keys() != everywhere for a in adapters if a.config.get("bias") == "lora_only"):
        raise Unsupported("an adapter has the biases of its own modules (lora_only), and others adapt more modules")
    return "lora_only"


def _replaced(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, tuple[Replaced, ...]]:
    """Base tensors with new values: kept where the weighted sum is those very values.

    Raises:
        Unsupported: it takes the base to say what the sum would be.
    """
    found: dict[str, list[tuple[Adapter, float, tuple[Replaced, ...]]]] = {}
    for a, weight in zip(adapters, weights, strict=True):
        for target, entries in a.replaced.items():
            found.setdefault(target, []).append((a, weight, entries))
    for target, own in found.items():
        _, _, first = own[0]
        equal = all(_same(first, entries) for _, _, entries in own)
        # PEFT saves the embeddings of the base beside adapters of them. Nobody trained those.
        frozen = all(".base_layer.weight" in e.param.key for e in first)
        total = sum(weight for _, weight, _ in own)
        if not equal or not (frozen or math.isclose(total, 1, rel_tol=1e-9)):
            why = "the adapters give it different values" if not equal else f"its weight is {total:g} in all, not 1"
            raise Unsupported(
                f"{first[0].param.key} replaces the base's {target}, and {why}: only the base knows what the sum is",
                hint="merge the adapters into the base instead: adapterpack merge A B --into BASE",
            )
        module = target.removesuffix(".weight")
        adapted = any(module in a.modules for a in adapters)
        if adapted and not frozen and not all(module in a.modules for a, _, _ in own):
            raise Unsupported(f"one adapter replaces {target}, another adapts it: PEFT loads no adapter with both")
    modules = {m for a in adapters for m in a.modules}
    return {target: tuple(_rekeyed(e, target, modules) for e in own[0][2]) for target, own in found.items()}


def _rekeyed(entry: Replaced, target: str, modules: set[str]) -> Replaced:
    """The bias of a module that another adapter adapts lies below its `base_layer` from now on."""
    module = target.removesuffix(".bias")
    if module == target or module not in modules or ".base_layer." in entry.param.key:
        return entry
    return replace(entry, param=Param(f"{PREFIX}{module}.base_layer.bias", entry.param.tensor))


def _same(x: tuple[Replaced, ...], y: tuple[Replaced, ...]) -> bool:
    return len(x) == len(y) and all(
        p.rows == q.rows and p.param.tensor.equals(q.param.tensor) for p, q in zip(x, y, strict=True)
    )


def _biases(xp: Backend, sums: Sequence[Sum], way: Way) -> dict[str, Tensor]:
    """The weighted sums of `lora_bias`, at the scale of each sum; empty where no adapter has any.

    Raises:
        Unsupported: PEFT drops them, or they are not there for all modules.
    """
    having = [s for s in sums if any("lora_bias" in x.part.module.params for x in s.summands)]
    if not having:
        return {}
    if way.kind != "exact":
        raise Unsupported(f"PEFT loses lora_bias in {way.kind}", hint="--type exact")
    if len(having) < len(sums):
        raise Unsupported("only some of the modules have a lora_bias: in PEFT it is all or none")
    found = {}
    for s in sums:
        own = [(x, x.part.module.params.get("lora_bias")) for x in s.summands]
        terms = [xp.f64(p.tensor) * (x.factor / s.scale) for x, p in own if p is not None]
        found[s.name] = xp.tensor(xp.round(sum(terms[1:], terms[0]), F32))
    return found


@dataclass(frozen=True)
class _Beside:
    """What an adapter has beside its factors."""

    replaced: Mapping[str, tuple[Replaced, ...]]
    biases: Mapping[str, Tensor]


def _result(frame: Checkpoint, sums: Sequence[Sum], made: Mapping[str, Cut], beside: _Beside) -> Adapter:
    """The new adapter."""
    ranks = {name: new.rank for name, new in made.items()}
    stated = _lora_resizing.stated(ranks, {s.name: s.scale for s in sums}, frame.config)
    params = {}
    for s in sums:
        embedding = s.part.module.embedding
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        tensors = dict(zip(names, (made[s.name].a, made[s.name].b), strict=True))
        if beside.biases:
            tensors["lora_bias"] = beside.biases[s.name]
        params[s.name] = {name: Param(lora.keys.key(s.name, name), tensor) for name, tensor in tensors.items()}
    return Adapter(
        method="lora",
        encoding="lora",
        config={**frame.config, **stated, "lora_bias": bool(beside.biases)},
        modules=params,
        shared={},
        replaced=beside.replaced,
        extra={},
        source=frame,
        metadata=frame.metadata,
        changed=True,
    )
