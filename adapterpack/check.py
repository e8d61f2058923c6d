"""Is an adapter healthy: would PEFT load it, as it was trained, and does it do anything?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from adapterpack import containers, engines, hub, methods, sources
from adapterpack.adapter import Adapter, Finding, Method, Progress, Request
from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.engine_rules import Facts
from adapterpack.errors import AdapterpackError, InvalidFile, NoMergedWeight, Unsupported, WrongBase
from adapterpack.health import configs, naming, scope, values, weight

_FIX = "save the adapter again, by the code that trained it"
"""Where a finding knows no other way out."""


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
        c = stack.enter_context(opened(source, base, subfolder, allow_pickle=allow_pickle, fetch=fetch))
        c.prove()
        doctor = Doctor(base, stack, reader=reader, progress=progress)
        findings = [*weight.file_findings(c), *doctor.examine(c)]
        c.still_same()
    return health_of(findings, doctor.notes)


def health_of(findings: list[Finding], notes: list[str]) -> Health:
    """The verdict on findings; faults stand first."""
    ordered = sorted((replace(f, fix=f.fix or _FIX) for f in findings), key=lambda f: f.warning)
    return Health(all(f.warning for f in ordered), tuple(ordered), tuple(dict.fromkeys(notes)))


def opened(
    source: str | Path,
    base: str | Path | None,
    subfolder: str | None,
    *,
    allow_pickle: bool = False,
    fetch: bool = False,
) -> Checkpoint:
    """What is to be checked; of the Hub its headers, unless its values are wanted.

    Raises:
        InvalidFile: it cannot be read at all.
    """
    remote = None if fetch else sources.headers(source, subfolder)
    if remote is not None:
        return remote
    place = sources.here(source, subfolder)
    try:
        return containers.open_checkpoint(
            place, subfolder=subfolder, allow_pickle=allow_pickle, base=sources.base(base)
        )
    except InvalidFile as e:
        if e.hint is None and "safetensors file" in e.message:
            # The commonest fault of all: an upload or a save that ended too early.
            e.hint = "fetch or copy it again; if the original is as short, it has to be saved again"
        raise


class Doctor:
    """Examines a checkpoint, and again while it is mended: what was read once is not read twice.

    Args:
        base: As the user named it; None: the one that the adapter names, if it is here.
        stack: Closes the base.
        reader: The engine that it is for.

    Attributes:
        notes: What was looked at, and what not.
        model: The base, once it was needed.
    """

    def __init__(
        self,
        base: str | Path | None,
        stack: ExitStack,
        *,
        reader: engines.Engine | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.notes: list[str] = []
        self.model: Base | None = None
        self._base, self._stack, self._reader = base, stack, reader
        self._scans = values.Scans(progress)
        self._progress = progress
        self._asked = False

    def examine(self, c: Checkpoint) -> list[Finding]:
        """Every fault of a checkpoint, but for those of the files that it lies in."""
        findings = [*values.shape_findings(c), *configs.config_findings(c)]
        if c.at_hand:
            findings += values.value_findings(c, self._scans.of(c))
        else:
            self.notes.append("only headers and config were read: --fetch brings the values here and checks them too")
        method = methods.METHODS.get(c.peft_type)
        spelled = [] if method is None else list(naming.key_findings(method.keys, c))
        findings += spelled
        try:
            method, adapter = methods.parse(c)
        except Unsupported as e:
            findings += self._unread(c, e, known=method is not None, explained=bool(spelled))
        except InvalidFile as e:
            if not any(f.code == "duplicate-key" for f in spelled):
                findings.append(Finding("malformed", c.name, e.message, e.hint))
        else:
            findings += self._read(method, adapter)
        return findings

    def _unread(self, c: Checkpoint, e: Unsupported, *, known: bool, explained: bool) -> Iterator[Finding]:
        self.notes.append(f"only config and values were checked: {e.message}")
        if known and not explained and c.tensors:
            # LoRA-XS and its like have tensors that PEFT's class for `peft_type` does not: it drops them.
            yield Finding("not-read", "peft_type", e.message, e.hint, warning="holds no " not in e.message)
        if self._reader is not None:
            reason = f"not for {self._reader.name}: {e.message}"
            yield Finding("not-plain-lora", "peft_type", reason, e.hint)

    def _read(self, method: Method, a: Adapter) -> Iterator[Finding]:
        model = self._find_base(a)
        yield from _method_findings(method, a, model)
        yield from values.dtype_findings(a)
        near = model if self._base_is_near else None
        yield from weight.saved_findings(a, near, values=a.source.at_hand, progress=self._progress)
        try:
            yield from scope.scope_findings(a, model)
            yield from scope.scale_findings(method, a)
        except InvalidFile as e:
            yield Finding("malformed", a.source.name, e.message, e.hint)
        if self._reader is not None:
            yield from _engine_findings(self._reader, a, model)
            self.notes.append(f"{self._reader.name}: rules of version {self._reader.version} ({self._reader.proof})")

    def _find_base(self, a: Adapter) -> Base | None:
        if not self._asked:
            self._asked = True
            self.model, note = _model(self._base, a, self._stack)
            self.notes += [note] if note else []
        return self.model

    @property
    def _base_is_near(self) -> bool:
        """Are its values on this machine? To compare them with those on the Hub would fetch all of them."""
        return self.model is not None and self.model.path.is_dir()


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


def _method_findings(method: Method, a: Adapter, model: Base | None) -> Iterator[Finding]:
    try:
        yield from method.findings(a, model)
    except InvalidFile as e:
        yield Finding("malformed", a.source.name, e.message, e.hint)
    except Unsupported as e:
        yield Finding("not-read", a.source.name, e.message, e.hint, warning=True)
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
    """Keys and shapes that the base lacks, and keys that it has under other names."""
    fix = f"the adapter says its base is {a.config.get('base_model_name_or_path')!r}"
    try:
        missing = model.bind(a.targets())
    except WrongBase as e:
        yield Finding("ambiguous-names", a.source.name, e.message, e.hint or fix)
        return
    for target in missing:
        yield Finding("not-in-base", target, "the base has no such tensor", fix)
    yield from naming.base_name_findings(a, model)
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
