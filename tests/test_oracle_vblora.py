"""VB-LoRA merges are PEFT's `merge_and_unload`, bit for bit, from full logits and from top-k files."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from bitexact import assert_merges_like_peft


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", cases.VBLORA, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("case", cases.WIDTHS, ids=str)
def test_every_index_width_merges_bit_for_bit(case, workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(case)
    vectors = files.config(adapter)["num_vectors"]
    kinds = {t.dtype for k, t in files.tensors(adapter).items() if k.endswith("_topk_indices")}
    if "topk" in case.name:
        assert kinds == {torch.uint8 if vectors < 256 else torch.int16 if vectors < 32768 else torch.int32}
    assert_merges_like_peft(workshop, files, adapter, workshop.base_of(case), tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("case", cases.NARROW_VBLORA, ids=str)
def test_equal_16_bit_logits_choose_the_vectors_that_peft_chooses(
    case, dtype, workshop, files, tmp_path: Path
) -> None:
    adapter = workshop.adapter(case, dtype)
    logits = [t for k, t in files.tensors(adapter).items() if "logits" in k]
    k = files.config(adapter)["topk"]
    top = torch.cat([t.float().flatten(0, 1).topk(k + 1).values for t in logits])
    assert (top[:, k - 1] == top[:, k]).any(), "no tie at the boundary: the case proves nothing"
    assert_merges_like_peft(workshop, files, adapter, workshop.base_of(case, dtype), tmp_path)
