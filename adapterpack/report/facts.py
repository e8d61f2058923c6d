"""A verification, and what the parts of its page want to know of it more than once."""

from __future__ import annotations

import math
from functools import cached_property

from adapterpack.accuracy import ModuleError
from adapterpack.adapter import Finding
from adapterpack.verify import Verification

ROWS = 2000
"""Modules that the table shows, the worst ones."""
_ALONE = {"missing-module", "other-shape", "not-comparable", "missing-tensor", "other-tensor"}
"""Findings of tensors that have no figures."""


class Facts:
    """A verification and what a page wants to know of it more than once.

    Attributes:
        v: The verification.
        merged: Is B a merged model?
    """

    def __init__(self, v: Verification) -> None:
        self.v = v
        self.merged = v.against == "merged"
        self.common = v.max_error if math.isfinite(v.max_error) else None
        """The bound that all modules have in common."""

    def bound(self, m: ModuleError) -> float | None:
        """What is allowed of a module."""
        return m.bound if self.merged else self.common

    @cached_property
    def faults(self) -> dict[str, Finding]:
        """Module or key to the first finding that is no warning."""
        found: dict[str, Finding] = {}
        for f in self.v.findings:
            if not f.warning:
                found.setdefault(f.key, f)
        return found

    @cached_property
    def by_name(self) -> dict[str, ModuleError]:
        return {m.name: m for m in self.v.modules}

    @cached_property
    def row(self) -> dict[str, str]:
        """Name of each module that the table shows to the id of its row."""
        return {m.name: f"m{n}" for n, m in enumerate(self.v.modules[:ROWS])}

    @cached_property
    def missing(self) -> list[str]:
        """Tensors that have no figures at all, for a finding says that they cannot have any."""
        return [f.key for f in self.v.findings if f.code in _ALONE and f.key not in self.by_name]

    def beyond(self, m: ModuleError) -> bool:
        """Is it one that makes the verdict?"""
        return m.name in self.faults or (not self.merged and not m.rel_error <= self.v.max_error)
