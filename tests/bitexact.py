"""What the oracle tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle

import adapterpack


def assert_merges_like_peft(workshop: Any, files: Any, adapter: Path, base: Path, tmp_path: Path) -> None:
    """Merge, and hold every tensor of the result against PEFT's merge of the same adapter on this machine.

    The adapter must load in PEFT with nothing missing or unexpected, must really change something, every
    tensor must be there under the base's name and dtype, inputs must stay what they are, and the merge
    must agree with the independent f64 check.
    """
    expected = workshop.peft_merge(base, adapter)
    assert expected.load.clean, (expected.load.missing, expected.load.unexpected)
    before = oracle.tree_hash(adapter), oracle.tree_hash(base)
    result = adapterpack.merge(adapter, base, tmp_path / "merged", verify="full")
    merged, original = files.tensors(tmp_path / "merged"), files.tensors(base)
    assert merged.keys() == original.keys()
    wrong = [k for k in merged if not files.same(merged[k], expected[k])]
    assert not wrong
    changed = [k for k in merged if not files.same(merged[k], original[k])]
    assert len(changed) == result.tensors_changed > 0
    assert result.tensors_copied == len(merged) - len(changed)
    assert result.unmatched == ()
    assert before == (oracle.tree_hash(adapter), oracle.tree_hash(base))


_AMBIENT = {"base-reference", "scale-not-plain"}
"""Warnings that adapters of these tests have for where and how they were made: a local base, an edited rank."""


def codes(health: adapterpack.Health) -> set[str]:
    """Codes of the findings that are about the adapter itself."""
    return {f.code for f in health.findings if f.code not in _AMBIENT}
