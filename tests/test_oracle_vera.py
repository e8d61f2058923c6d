"""VeRA merges are PEFT's `merge_and_unload`, bit for bit, from stored projections and from the seed alone."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
from bitexact import assert_merges_like_peft

import adapterpack

HALVES = ["bf16", "f16"]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", cases.VERA, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", cases.NARROW_VERA, ids=str)
def test_merge_of_a_16_bit_file_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("loading", ["f32", "bf16"])
def test_stored_projections_count_whatever_the_loading_base(loading, workshop, files, tmp_path: Path) -> None:
    """Trained on one dtype, merged into another: with projections in the file both are well defined."""
    case = cases.BY_NAME["projection-mixed"]
    trained = "bf16" if loading == "f32" else "f32"
    assert_merges_like_peft(
        workshop, files, workshop.adapter(case, trained), workshop.base_of(case, loading), tmp_path
    )


def test_a_wider_base_than_the_projections_is_refused(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("projection-mixed")
    wide = workshop.base("llama", hidden_size=256, intermediate_size=128)
    with pytest.raises(adapterpack.AdapterpackError) as e:
        adapterpack.merge(adapter, wide, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert e.value.exit_code == 1
