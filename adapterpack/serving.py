"""Write an adapter for one serving engine: mend what its rules find, refuse what cannot be mended."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from adapterpack import engines, extras, onescale, peft_versions
from adapterpack.adapter import Adapter, Grade, Outcome, Replaced
from adapterpack.base import Base
from adapterpack.engine_rules import Facts, kind_of
from adapterpack.engines import Engine
from adapterpack.errors import Unsupported, UsageError

EXTRA = ("refuse", "split", "fold")


@dataclass(frozen=True)
class Prepared:
    """An adapter that an engine reads as PEFT does.

    Attributes:
        outcome: The result, and what was done.
        reference: What of the source it must be equal to.
        comparable: The same part of the result.
        error: Of what is not in these two: tensors that became LoRA.
    """

    outcome: Outcome
    reference: Adapter
    comparable: Adapter
    error: float = 0.0


def prepare(engine: Engine, source: Adapter, plain: Outcome, extra: str, base: Base | None) -> Prepared:
    """Make plain LoRA fit an engine.

    Args:
        source: As it was read, of any method.
        plain: What became of it: LoRA.
        extra: What to do with that which is no LoRA: `refuse`, `split` off or `fold`.
        base: For `fold`, and for rules that ask it.

    Raises:
        Unsupported: the engine cannot serve it right; by which rule.
        WrongBase: `fold` without weights of the base.
    """
    if extra not in EXTRA:
        raise UsageError(f"no way {extra!r:.20} with extra tensors", hint=f"one of {', '.join(EXTRA)}")
    a, copies = plain.adapter, list[str]()
    if "embeddings" not in engine.keeps:
        a, copies = extras.without_copies(a, base)
    reference = replace(source, replaced=a.replaced)
    taken: extras.Entries = {}
    if extra != "refuse":
        a, taken = extras.take(a, partial(_served, engine, a.config))
        reference = replace(source, replaced=a.replaced)
    dropped = [*plain.dropped, *(f"{target}: equal to the base's" for target in copies)]
    dropped += [*(f"{key}: no rule knows it, PEFT does not load it" for key in a.extra)]
    a = _config(engine, onescale.plain_keys(replace(a, extra={}, changed=True)))
    comparable, error, notes = a, 0.0, list(plain.notes)
    if engine.one_scale and not a.parameters:
        one = onescale.unify(a)
        notes += one.notes
        comparable = one.adapter
        if extra == "fold" and taken:
            folded = extras.fold(one, taken, base)
            one, error = folded.one, folded.error
            notes += folded.notes
        a = one.adapter
    elif extra == "fold" and taken:
        raise Unsupported(f"{engine.name} reads what would be folded; nothing was", hint="--extra split")
    a = _final(engine, a, base)
    _refuse_faults(engine, a, base)
    if extra == "split" and taken:
        a = _with_files(a, extras.files(taken))
        dropped += [f"{target}: it lies in {extras.DIRECTORY}/, for the base" for target in taken]
    a, left = _without_files(a, engine.drops)
    dropped += [f"file {name}: {engine.name} would take its tokens for new ones" for name in left]
    outcome = Outcome(a, min(plain.grade, Grade.EQUIVALENT), tuple(dropped), tuple(notes))
    return Prepared(outcome, reference, comparable, error)


def _served(engine: Engine, config: Mapping[str, Any], target: str, entry: Replaced) -> bool:
    return kind_of(target, entry, config) in engine.keeps or target.split(".")[-2] in engine.saves


def _config(engine: Engine, a: Adapter) -> Adapter:
    """Modules named one by one, where no pattern will be run."""
    if engine.keeps and not engine.one_scale:
        return a
    config: dict[str, Any] = {**a.config, "target_modules": onescale.named_targets(a), "init_lora_weights": True}
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        config.pop(name, None)
    return replace(a, config=config)


def _final(engine: Engine, a: Adapter, base: Base | None) -> Adapter:
    """The least config, with modules that came since among its targets."""
    lost = [] if engine.peft is None else peft_versions.lost(a.config, engine.peft)
    if lost:
        # A rule of the engine may know better what to do about it.
        _refuse_faults(engine, a, base, but=("lost-field", "unknown-field", "patterns"))
        raise Unsupported(
            f"{lost[0]}: the PEFT that {engine.name} reads the config with may not know it: it came with"
            f" {peft_versions.first_with(lost[0])}",
            hint="adapterpack merge it into the base",
        )
    config = peft_versions.minimal(a.config, engine.peft)
    if engine.one_scale and not a.parameters:
        config["target_modules"] = onescale.named_targets(a)
    if not config.get("target_modules") and not a.parameters:
        config["target_modules"] = sorted(a.modules)
    if engine.peft is None and engine.one_scale:
        config["use_rslora"] = False
    return replace(a, config=config, changed=True)


def _refuse_faults(engine: Engine, a: Adapter, base: Base | None, but: tuple[str, ...] = ()) -> None:
    """Raise Unsupported with the first rule that finds a fault; carried files are dropped later."""
    found = [f for f in engines.findings(engine, Facts.of(a, base)) if not f.warning]
    found = [f for f in found if f.code not in ("added-tokens", *but)]
    if found:
        more = f" (and {len(found) - 1} more; check --for {engine.name} lists them)" if len(found) > 1 else ""
        raise Unsupported(f"{found[0].key}: {found[0].message}{more}", hint=found[0].fix)


def _with_files(a: Adapter, files: dict[str, Any]) -> Adapter:
    return replace(a, source=replace(a.source, files={**a.source.files, **files}), changed=True)


def _without_files(a: Adapter, names: tuple[str, ...]) -> tuple[Adapter, list[str]]:
    hit = [n for n in names if n in a.source.files]
    if not hit:
        return a, hit
    kept = {n: f for n, f in a.source.files.items() if n not in hit}
    return replace(a, source=replace(a.source, files=kept)), hit


def command(engine: Engine, a: Adapter, path: Path) -> str:
    """How to serve it."""
    rank = engine.limit(Facts.of(a).rank)
    base = a.config.get("base_model_name_or_path") or "BASE"
    name = path.name or "adapter"
    if engine.name.startswith("peft"):
        return engine.command.format(path=str(path))
    words = {"base": str(base), "name": name, "path": str(path)}
    return engine.command.format(rank=rank, **{k: shlex.quote(v) for k, v in words.items()})


def advice(engine: Engine, a: Adapter) -> list[str]:
    """What else the engine goes by."""
    said = a.config.get("base_model_name_or_path")
    if engine.name == "vllm":
        return [f"vLLM's resolvers take it for --model {said or '(none is named)'} alone, string for string"]
    return []
