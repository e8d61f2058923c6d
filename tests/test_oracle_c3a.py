"""C3A merges are PEFT's `merge_and_unload`, bit for bit: the same Fourier transforms, the same two roundings."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from bitexact import assert_merges_like_peft, codes
from peft import C3AConfig

import adapterpack
from adapterpack.errors import InvalidFile

_QKU = ["q_proj", "k_proj", "up_proj", "down_proj"]


def _c3a(**fields):
    return lambda: C3AConfig(**{"block_size": 16, "target_modules": _QKU, **fields})


CASES = (
    cases.Case("c3a-llama", _c3a()),
    cases.Case("c3a-block-of-1", _c3a(block_size=1)),
    cases.Case("c3a-patterns", _c3a(block_size_pattern={"k_proj": 8, "up_proj": 64})),
    cases.Case("c3a-opt-bias-all", _c3a(target_modules=["q_proj", "fc1"], bias="all"), "opt"),
    cases.Case(
        "c3a-odd",
        _c3a(target_modules=["project_in"], block_size=3),
        "opt",
        over={"hidden_size": 48, "word_embed_proj_dim": 9},
    ),
)
_KEY = "base_model.model.model.layers.0.self_attn.q_proj.c3a_kernel"


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


def test_the_change_is_made_of_circulants(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(CASES[0]), workshop.base_of(CASES[0])
    adapterpack.merge(adapter, base, tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    delta = files.tensors(tmp_path / "merged")[name].double() - files.tensors(base)[name].double()
    kernel = files.tensors(adapter)[_KEY].double()
    at = (torch.arange(16)[None, :] - torch.arange(16)[:, None]) % 16
    wanted = kernel[:, :, at].permute(0, 2, 1, 3).reshape(64, 64) / 64
    assert float((delta - wanted).norm() / wanted.norm()) < 1e-5


def test_a_moved_parameter_is_found_and_the_merge_is_equal(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(CASES[0]), workshop.base_of(CASES[0])
    moved = files.edited(adapter, tmp_path / "moved", {_KEY: files.tensors(adapter)[_KEY] * 1.01})
    found = adapterpack.verify(adapter, moved)
    assert not found.equal and found.modules[0].name == "model.layers.0.self_attn.q_proj.weight"
    adapterpack.merge(adapter, base, tmp_path / "merged")
    assert adapterpack.verify(adapter, tmp_path / "merged", base=base).equal
    assert not adapterpack.verify(moved, tmp_path / "merged", base=base).equal


@pytest.mark.parametrize(
    ("shape", "message"), [((64, 16), "is not"), ((4, 4, 0), "is not"), ((1, 1 << 20, 1), "no weight is that wide")]
)
def test_broken_kernels_are_refused(shape, message, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(CASES[0]), workshop.base_of(CASES[0])
    broken = files.edited(adapter, tmp_path / "broken", {_KEY: torch.ones(shape)})
    with pytest.raises(InvalidFile, match=message):
        adapterpack.merge(broken, base, tmp_path / "merged")
    assert "half-pair" in codes(adapterpack.check(broken))


def test_another_block_size_in_the_config_is_found(workshop, files, tmp_path: Path) -> None:
    assert adapterpack.check(workshop.adapter(CASES[2])).healthy
    adapter = workshop.adapter(CASES[0])
    exact = {"model.layers.0.self_attn.q_proj": 8}
    for n, config in enumerate(
        ({"block_size": 8}, {"block_size_pattern": {"self_attn.q_proj": 8}}, {"block_size_pattern": exact})
    ):
        found = adapterpack.check(files.edited(adapter, tmp_path / f"lying{n}", config=config))
        assert codes(found) == {"rank-mismatch"}
