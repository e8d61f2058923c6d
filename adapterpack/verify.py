"""Do two adapters, or an adapter and a merged model, compute the same change of W?"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from adapterpack import (
    accuracy,
    containers,
    evidence,
    lineage,
    merged_model,
    methods,
    pairs,
    plan,
    regeneration,
    sources,
)
from adapterpack.accuracy import ModuleError, Pooled
from adapterpack.adapter import EQUIVALENT_ERROR, Adapter, Finding, Method, Progress, Request
from adapterpack.backend import Backend, TorchBackend
from adapterpack.base import Base
from adapterpack.errors import AdapterpackError, InvalidFile, UsageError
from adapterpack.evidence import Side, Spectrum
from adapterpack.regeneration import Regenerated


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        equal: Every error within the bound and no findings.
        max_error: The bound: largest rel_error allowed.
        max_abs_error, max_rel_error: The largest of a module.
        modules: One entry for each changed base tensor, worst first.
        findings: Missing modules, other shapes, NaN; for a merged model what went wrong, tensor by tensor, and what
            they have in common.
        notes: How it was compared, where that is not plain.
        a, b, base: What was compared, as it was named; no base: None.
        against: `adapter` or `merged`: what B is.
        method_a, method_b: `lora`; B's is None for a merged model.
        encoding_a, encoding_b: `topk`.
        device: Where it was computed, `torch cpu`.
        pooled: All modules as one.
        regenerated: Seeded tensors that were drawn again, and what they agree with.
        sides: How large A and B are, part by part.
        spectra: Singular values of the changes of both, where they are low-rank; only if they were asked for.
    """

    equal: bool
    max_error: float
    max_abs_error: float
    max_rel_error: float
    modules: tuple[ModuleError, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    a: str
    b: str
    base: str | None
    against: str
    method_a: str
    method_b: str | None
    encoding_a: str
    encoding_b: str | None
    device: str
    pooled: Pooled
    regenerated: tuple[Regenerated, ...] = ()
    sides: tuple[Side, ...] = ()
    spectra: tuple[Spectrum, ...] = ()


def verify(
    a: str | Path,
    b: str | Path,
    *,
    base: str | Path | None = None,
    max_error: float | None = None,
    device: str = "auto",
    subfolder: str | None = None,
    allow_pickle: bool = False,
    singular_values: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Compare adapter A, the reference, with adapter B, or with the merged model B of `base`.

    Args:
        a: The reference adapter.
        b: An adapter, or a model directory when `base` is given.
        base: The base model; needed for changes that depend on W (DoRA), and for a merged model that has no
            lineage.
        max_error: Largest relative error of a module that counts as equal. None: 5e-6 between adapters, and
            nothing beyond the rounding of the dtype for a merged model.
        device: Where the maths runs.
        subfolder: Which adapter of A, if there are several.
        singular_values: Find those of every low-rank change of both, for a report.

    Raises:
        UsageError: B is a model and no base is given.
        WrongBase, InvalidFile, Unsupported: one of them cannot be read.
    """
    xp = TorchBackend(device)
    named = str(a), str(b), None if base is None else str(base)
    with ExitStack() as stack:
        here = sources.base(base)
        a, b = sources.here(a, subfolder), sources.model_here(b)
        source = stack.enter_context(
            containers.open_checkpoint(a, subfolder=subfolder, allow_pickle=allow_pickle, base=here, foreign=True)
        )
        source.prove()
        method_a, adapter_a = methods.parse(source)
        model = sources.open_base(base, stack)
        if sources.is_model(b):
            found = _against_model((method_a, adapter_a), b, model, xp, max_error, stack, progress)
            return _verdict(found, named, xp, [("A", method_a, adapter_a)], model, singular_values, merged=b)
        other = stack.enter_context(containers.open_checkpoint(b, allow_pickle=allow_pickle, base=here))
        other.prove()
        method_b, adapter_b = methods.parse(other)
        bound = EQUIVALENT_ERROR if max_error is None else max_error
        request = Request(xp=xp, shapes=model, max_error=bound)
        if model is not None:
            model.bind([*adapter_a.targets(), *adapter_b.targets()])
        errors, findings, notes = pairs.compare(
            (method_a, adapter_a), (method_b, adapter_b), request, model=model, progress=progress
        )
        found = _Found(errors, findings, notes, bound)
        sides = [("A", method_a, adapter_a), ("B", method_b, adapter_b)]
        return _verdict(found, named, xp, sides, model, singular_values)


@dataclass(frozen=True)
class _Found:
    """Errors, findings and notes of a comparison, and its bound: infinite where findings alone decide."""

    errors: list[ModuleError]
    findings: list[Finding]
    notes: list[str]
    bound: float


def _against_model(
    a: tuple[Method, Adapter],
    path: Path,
    model: Base | None,
    xp: Backend,
    max_error: float | None,
    stack: ExitStack,
    progress: Progress | None,
) -> _Found:
    """Hold a merged model against what the adapter makes of the base, and against its own lineage."""
    merged = stack.enter_context(Base(path))
    story = lineage.read(path)
    notes = ["errors of a merged model hold the rounding of its dtype; findings are what goes beyond it"]
    if model is None and story is not None:
        # Named by a file, not by the user: nothing is fetched for it.
        model = stack.enter_context(Base(sources.base_at_hand(story.base, story.commit)))
        notes.append(f"base: {story.base}, as {lineage.NAME} says")
    if model is None:
        raise UsageError(f"{path} is a model: name what it was merged into", hint="--base BASE")
    adapters, weights = [a], [1.0]
    if story is not None:
        notes += _changes_since(story, merged, model)
        adapters, weights = _merged_with(a, story, stack)
        if a[1].source.digest() not in [s.sha256 for s in story.adapters]:
            said = ", ".join(s.reference for s in story.adapters)
            notes.append(f"{lineage.NAME} says that other files were merged: {said}")
        elif len(adapters) > 1:
            notes.append(f"merged from {len(adapters)} adapters, as {lineage.NAME} says; all were applied, in order")
    merge_plan = plan.make(adapters, model, weights=weights)
    errors, findings = merged_model.compare(
        merge_plan,
        model,
        merged,
        xp.for_proofs(),
        max_error=max_error or 0.0,
        rslora=a[1].config.get("use_rslora") is True,
        progress=progress,
    )
    return _Found(errors, findings, notes + merged_model.told(errors), math.inf)


def _changes_since(story: lineage.Lineage, merged: Base, model: Base) -> list[str]:
    """Weight files that are not those of the merge any more. Their tensors may be: that is compared."""
    sides = (("the merged model", story.shards, merged), ("the base", story.base_shards, model))
    return [
        f"{name} of {side} has another size or header than the merge recorded"
        for side, recorded, now in sides
        for name in lineage.differences(recorded, now)
    ]


def _merged_with(
    a: tuple[Method, Adapter], story: lineage.Lineage, stack: ExitStack
) -> tuple[list[tuple[Method, Adapter]], list[float]]:
    """All adapters of a merge and their weights, if A is among them; else A alone."""
    sha256 = a[1].source.digest()
    if sha256 not in [s.sha256 for s in story.adapters]:
        return [a], [1.0]
    adapters = []
    for source in story.adapters:
        if source.sha256 == sha256:
            adapters.append(a)
            continue
        hint = f"the model was merged from {len(story.adapters)} adapters; put it where it was"
        try:
            checkpoint = stack.enter_context(containers.open_checkpoint(sources.here(source.reference, cached=True)))
        except AdapterpackError as e:
            raise InvalidFile(f"{source.reference}, merged too, cannot be read: {e.message}", hint=hint) from e
        found = lineage.Source.of(source.reference, checkpoint, source.weight)
        if found != source:
            raise InvalidFile(f"{source.reference} is not the adapter that was merged", hint=hint)
        adapters.append(methods.parse(checkpoint))
    return adapters, [s.weight for s in story.adapters]


def _verdict(
    found: _Found,
    named: tuple[str, str, str | None],
    xp: Backend,
    sides: list[tuple[str, Method, Adapter]],
    model: Base | None,
    spectra: bool,
    merged: Path | None = None,
) -> Verification:
    request = Request(xp=xp, shapes=model)
    drawn = [r for side, method, adapter in sides for r in regeneration.regenerate(side, method, adapter, request)]
    seeds = [regeneration.wrong_seed(side, adapter) for side, _, adapter in sides]
    findings = [*found.findings, *(f for f in seeds if f is not None)]
    notes = [*found.notes, *regeneration.told(drawn)]
    worst = sorted(found.errors, key=lambda e: -e.rel_error if e.rel_error == e.rel_error else -math.inf)
    pooled = accuracy.pooled(found.errors)
    max_rel = max((e.rel_error for e in found.errors), default=0.0)
    sizes = [evidence.of_adapter(side, adapter) for side, _, adapter in sides]
    if merged is not None:
        sizes.append(evidence.of_model("B", merged, {e.name for e in found.errors}))
    (_, _, a), b = sides[0], sides[1][2] if len(sides) > 1 else None
    return Verification(
        equal=all(f.warning for f in findings) and max_rel <= found.bound,
        max_error=found.bound,
        max_abs_error=pooled.max_abs_error,
        max_rel_error=max_rel,
        modules=tuple(worst),
        findings=tuple(findings),
        notes=tuple(notes),
        a=named[0],
        b=named[1],
        base=named[2],
        against="merged" if b is None else "adapter",
        method_a=a.method,
        method_b=None if b is None else b.method,
        encoding_a=a.encoding,
        encoding_b=None if b is None else b.encoding,
        device=xp.name,
        pooled=pooled,
        regenerated=tuple(drawn),
        sides=tuple(sizes),
        spectra=evidence.all_spectra(sides, request) if spectra else (),
    )
