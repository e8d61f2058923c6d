"""Is an adapter healthy: would PEFT load it, as it was trained, and does it do anything?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from adapterpack import containers, engines, hub, methods, sources
from adapterpack.adapter import Adapter, Finding, Method, Progress, Request
from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.engine_rules import Facts
from adapterpack.errors import AdapterpackError, InvalidFile, NoMergedWeight, Unsupported, WrongBase
from adapterpack.tensor import Tensor, chunks, numpy_dtype

_ZERO_MEANS_UNTRAINED = {"lora_B": "B", "lora_embedding_A": "A", "lambda_b": "lambda_b"}
"""Parameters that begin at zero: all zero still means that the module does nothing."""


@dataclass(frozen=True)
class Health:
    """What `check` found.

    Attributes:
        healthy: No faults; warnings may be among the findings.
        findings: Faults and warnings.
        notes: What was looked at, and what not.
    """

    healthy: bool
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def check(
    source: str | Path,
    *,
    base: str | Path | None = None,
    engine: str | None = None,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    fetch: bool = False,
    progress: Progress | None = None,
) -> Health:
    """Look for every fault that we know in an adapter.

    Args:
        base: Hold keys and shapes against this base; by default the one that the adapter names, if it is here.
        engine: Find, too, why this engine would reject it or load it as something else; see `engines`.
        fetch: Of an adapter on the Hub: fetch it and check the values, too, not only what its headers tell.

    Raises:
        UsageError: there is no such engine.
        InvalidFile: it cannot be read at all.
    """
    reader = None if engine is None else engines.named(engine)
    with ExitStack() as stack:
        opened = None if fetch else sources.headers(source, subfolder)
        if opened is None:
            place = sources.here(source, subfolder)
            opened = containers.open_checkpoint(
                place, subfolder=subfolder, allow_pickle=allow_pickle, base=sources.base(base)
            )
        c = stack.enter_context(opened)
        findings: list[Finding] = []
        notes: list[str] = []
        if c.at_hand:
            c.prove()
            findings += _values(c, progress)
        else:
            notes.append("only headers and config were read: --fetch brings the values here and checks them, too")
            findings += _no_tensors(c)
        try:
            method, adapter = methods.parse(c)
        except Unsupported as e:
            notes.append(f"only the values were checked: {e.message}")
            if reader is not None:
                findings.append(Finding("not-plain-lora", "peft_type", f"not for {reader.name}: {e.message}", e.hint))
        else:
            model, note = _model(base, adapter, stack)
            notes += [note] if note else []
            findings += _method_findings(method, adapter, model)
            if reader is not None:
                findings += _engine_findings(reader, adapter, model)
                notes.append(f"{reader.name}: rules of version {reader.version} ({reader.proof})")
        c.still_same()
    return Health(all(f.warning for f in findings), tuple(findings), tuple(notes))


def _model(base: str | Path | None, a: Adapter, stack: ExitStack) -> tuple[Base | None, str | None]:
    if base is not None:
        return stack.enter_context(Base(sources.base_headers(base), weights=False)), None
    path = hub.implied_base(a.config)
    if path is None:
        return None, "keys and shapes were not held against a base: name one with --base"
    try:
        model = stack.enter_context(Base(path, weights=False))
    except AdapterpackError as e:
        return None, f"the base that the adapter names cannot be read: {e.message}"
    return model, f"base: {path}, as the adapter names it"


def _values(c: Checkpoint, progress: Progress | None) -> Iterator[Finding]:
    total, done = sum(t.nbytes for t in c.tensors.values()), 0
    for key, tensor in c.tensors.items():
        if tensor.dtype.kind == "float" and tensor.dtype.numpy is not None:
            nan, infinite = _nonfinite(tensor)
            if nan:
                yield Finding("nan", key, f"{nan:,} of {tensor.numel:,} values are NaN", "train or save it again")
            if infinite:
                yield Finding(
                    "infinite", key, f"{infinite:,} of {tensor.numel:,} values are infinite", "train or save it again"
                )
        done += tensor.nbytes
        if progress:
            progress("values", done, total)
    yield from _no_tensors(c)


def _no_tensors(c: Checkpoint) -> Iterator[Finding]:
    if not c.tensors:
        yield Finding("empty", c.name, "it holds no tensors at all", "save the adapter again")


def _nonfinite(tensor: Tensor) -> tuple[int, int]:
    import numpy as np

    nan = infinite = 0
    for chunk in chunks(tensor.source):
        values = np.frombuffer(chunk, dtype=numpy_dtype(tensor.dtype))
        if tensor.dtype.bits < 32:
            values = values.astype(np.float32)
        nan += int(np.isnan(values).sum())
        infinite += int(np.isinf(values).sum())
    return nan, infinite


def _all_zero(tensor: Tensor) -> bool:
    import numpy as np

    dtype = numpy_dtype(tensor.dtype)
    return all(not np.frombuffer(chunk, dtype=dtype).astype(bool).any() for chunk in chunks(tensor.source))


def _method_findings(method: Method, a: Adapter, model: Base | None) -> Iterator[Finding]:
    try:
        yield from method.findings(a, model)
    except InvalidFile as e:
        yield Finding("malformed", a.source.name, e.message, e.hint)
    for module, params in a.modules.items():
        for name, p in params.items():
            may_be = a.source.at_hand and name in _ZERO_MEANS_UNTRAINED and p.tensor.numel
            if may_be and _all_zero(p.tensor):
                yield Finding(
                    "all-zero",
                    p.key,
                    f"{_ZERO_MEANS_UNTRAINED[name]} of {module} is all zero: the module changes nothing",
                    "was it trained, and saved after training?",
                )
    for key in a.extra:
        yield Finding(
            "unknown-key",
            key,
            "no rule knows this tensor: PEFT drops it silently",
            "merge with what wrote it, or remove it",
        )
    if model is not None:
        yield from _base_findings(method, a, model)


def _engine_findings(reader: engines.Engine, a: Adapter, model: Base | None) -> Iterator[Finding]:
    try:
        yield from engines.findings(reader, Facts.of(a, model))
    except InvalidFile as e:
        yield Finding("malformed", a.source.name, e.message, e.hint)


def _base_findings(method: Method, a: Adapter, model: Base) -> Iterator[Finding]:
    """Keys and shapes that the base lacks."""
    missing = model.bind(a.targets())
    fix = f"the adapter says its base is {a.config.get('base_model_name_or_path')!r}"
    for target in missing:
        yield Finding("not-in-base", target, "the base has no such tensor", fix)
    if missing or not model.tensors:
        return
    # Shapes are checked by the changes themselves, which read no values until they are loaded.
    try:
        for change in method.changes(a, Request(xp=None, shapes=model)):  # type: ignore[arg-type]
            try:
                change.place(model.shape(change.target), model.conv1d(change.module))
            except WrongBase as e:
                yield Finding("shape-not-in-base", change.target, e.message, fix)
    except NoMergedWeight as e:
        yield Finding("no-merged-weight", a.source.name, e.message, e.hint, warning=True)
    except (InvalidFile, Unsupported, WrongBase) as e:
        yield Finding("malformed", a.source.name, e.message, e.hint)
