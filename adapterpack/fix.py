"""`check --fix`: a copy of an adapter without the faults that have one right repair; the others are reported."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from adapterpack import containers, engines, hub, methods, sources
from adapterpack.adapter import EQUIVALENT_ERROR, Adapter, Finding, Grade, Method, Progress, Request
from adapterpack.backend import TorchBackend
from adapterpack.check import Doctor, check, opened
from adapterpack.checkpoint import Checkpoint
from adapterpack.containers import apack
from adapterpack.conversion import inputs
from adapterpack.errors import AdapterpackError, LossRefused
from adapterpack.health import mending, weight
from adapterpack.pairs import compare, worst

_ROUNDS = 200
"""Repairs of one adapter: each is for all tensors or fields of its kind, so real ones need a few."""
_FILE_CODES = {"pickle", "no-format"}


@dataclass(frozen=True)
class Repaired:
    """One repair.

    Attributes:
        code, key: Of the finding that it is for.
        message: What was done.
    """

    code: str
    key: str
    message: str


@dataclass(frozen=True)
class Repair:
    """What `fix` made.

    Attributes:
        output: The new directory or pack.
        bytes_in, bytes_out: Sums of all files.
        fixed: What was mended, in order.
        dropped: Files that were left behind.
        max_rel_error: How far the change of W moved, relative, worst module; None where it could not be compared,
            for the source cannot be read as it is, or its modules have other names now.
        healthy, findings, notes: Of the result; see `check.Health`.
    """

    output: str
    bytes_in: int
    bytes_out: int
    fixed: tuple[Repaired, ...]
    dropped: tuple[str, ...]
    max_rel_error: float | None
    healthy: bool
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def fix(
    source: str | Path,
    destination: str | Path,
    *,
    base: str | Path | None = None,
    engine: str | None = None,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Repair:
    """Write a copy of an adapter in which every fault is mended that has one right repair.

    The change of W is the one that PEFT computed from the source; where PEFT failed on it, or dropped tensors
    silently, it is the one that was trained. The result is checked again.

    Args:
        source: It is only read.
        destination: The new directory or pack.
        base: Mend against this base, too: modules that it names otherwise; if it is on the Hub, its name is written
            where the config has none or a local path.
        engine: See `check`; its rules are checked, not mended: `convert --for` does that.

    Raises:
        InvalidFile: the source cannot be read at all.
        LossRefused: a repair moved the change of W after all; nothing is written.
        DestinationExists, UsageError, WriteFailed: see `io.atomic`.
    """
    if engine is not None:
        engines.named(engine)
    target, protected = Path(destination).expanduser(), inputs(sources.here(source, subfolder), base)
    containers.check_target(target, overwrite=overwrite, sources=protected)
    with ExitStack() as stack:
        before = stack.enter_context(opened(source, base, subfolder, allow_pickle=allow_pickle, fetch=True))
        before.prove()
        surgeon = _Surgeon(base, Doctor(base, stack, progress=progress))
        after, fixed = surgeon.operate(before)
        error, notes = _moved(before, after, surgeon, progress)
        dropped = tuple(f"file {name}" for name in before.left)
        facts = None if not fixed else _facts(before, after, dropped)
        size = containers.write_checkpoint(after, target, overwrite=overwrite, sources=protected, facts=facts)
        bytes_in = before.bytes
    health = check(target, base=base, engine=engine, progress=progress)
    return Repair(
        output=str(target),
        bytes_in=bytes_in,
        bytes_out=size,
        fixed=fixed,
        dropped=dropped,
        max_rel_error=error,
        healthy=health.healthy,
        findings=health.findings,
        notes=(*notes, *health.notes),
    )


class _Surgeon:
    """Mends one fault after the other, and looks again after each.

    Args:
        base: As the user named it.
    """

    def __init__(self, base: str | Path | None, doctor: Doctor) -> None:
        self.doctor = doctor
        on_hub = base is not None and hub.find(base) is not None
        self._base_name = sources.name_of(base) if on_hub and base is not None else None
        self._xp: TorchBackend | None = None

    def xp(self) -> TorchBackend:
        self._xp = self._xp or TorchBackend("cpu")
        return self._xp

    def operate(self, c: Checkpoint) -> tuple[Checkpoint, tuple[Repaired, ...]]:
        """The checkpoint without what could be mended, and what was done."""
        fixed: list[Repaired] = []
        for finding in weight.file_findings(c):
            if finding.code in _FILE_CODES and (made := mending.mend(self._patient(c), finding)) is not None:
                c = made[0]
                fixed.append(Repaired(finding.code, finding.key, made[1]))
        findings, hopeless = self.doctor.examine(c), set[tuple[str, str]]()
        for _ in range(_ROUNDS):
            left = [f for f in self._ordered(findings) if (f.code, f.key) not in hopeless]
            if not left:
                break
            finding = left[0]
            made = mending.mend(self._patient(c), finding)
            again = None if made is None else self.doctor.examine(made[0])
            same = finding.code, finding.key
            if made is None or again is None or same in {(f.code, f.key) for f in again}:
                hopeless.add(same)
                continue
            c, findings, hopeless = made[0], again, set()
            fixed.append(Repaired(*same, made[1]))
        return c, tuple(fixed)

    def _ordered(self, findings: list[Finding]) -> list[Finding]:
        order = list(mending.MENDERS)
        known = [f for f in findings if f.code in mending.MENDERS and f.code not in _FILE_CODES]
        return sorted(known, key=lambda f: order.index(f.code))

    def _patient(self, c: Checkpoint) -> mending.Patient:
        method, adapter = parsed(c)
        return mending.Patient(c, method, adapter, self.doctor.model, self._base_name, self.xp)


def parsed(c: Checkpoint) -> tuple[Method | None, Adapter | None]:
    """The method, if it is one that we know, and the adapter, if the keys can be read."""
    try:
        return methods.parse(c)
    except AdapterpackError:
        return methods.METHODS.get(c.peft_type), None


def _facts(before: Checkpoint, after: Checkpoint, dropped: tuple[str, ...]) -> apack.Facts | None:
    _, adapter = parsed(after)
    return None if adapter is None else apack.Facts.after(before, adapter, Grade.EQUIVALENT, 0.0, None, dropped)


def _moved(
    before: Checkpoint, after: Checkpoint, surgeon: _Surgeon, progress: Progress | None
) -> tuple[float | None, tuple[str, ...]]:
    """How far the change of W moved; None where the two cannot be compared.

    Raises:
        LossRefused: it did move.
    """
    (method, x), (_, y) = parsed(before), parsed(after)
    if method is None or x is None or y is None:
        return None, ()
    if x.targets() != y.targets():
        return None, ("modules have other names now: what each does to its weight was not touched",)
    request = Request(surgeon.xp(), surgeon.doctor.model)
    try:
        errors, found, _ = compare((method, replace(x)), (method, y), request, largest=False, progress=progress)
    except AdapterpackError:
        return None, ()
    error = worst(errors)
    if not math.isfinite(error) or any(f.code != "difference" for f in found):
        return None, ()
    if error > EQUIVALENT_ERROR:
        raise LossRefused(
            f"the repair would move the change of W by {error:.2g} (relative, worst module)",
            hint="adapterpack check SRC lists the faults: mend them by hand",
        )
    return error, ()
