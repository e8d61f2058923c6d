"""RandLoRA merges are PEFT's `merge_and_unload`, bit for bit, from stored bases and from the seed alone."""

from __future__ import annotations

from pathlib import Path

import cases
import numpy as np
import peft.tuners.randlora.model as theirs
import pytest
import torch
from bitexact import assert_merges_like_peft
from peft import RandLoraConfig

import adapterpack
from adapterpack.errors import AdapterpackError, InvalidFile, LossRefused, WrongBase


def _randlora(save=True, **fields):
    return lambda: RandLoraConfig(
        **{
            "r": 5,
            "randlora_alpha": 12,
            "save_projection": save,
            "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"],
            **fields,
        }
    )


CASES = tuple(
    case
    for save in (True, False)
    for word in ("randlora-projection" if save else "randlora-seed",)
    for case in (
        cases.Case(f"{word}-mixed", _randlora(save), scale=0.1),
        cases.Case(f"{word}-key", _randlora(save, projection_prng_key=2**32 + 77, r=8), scale=0.1),
        cases.Case(f"{word}-sparse", _randlora(save, sparse=True), scale=0.1),
        cases.Case(f"{word}-very-sparse", _randlora(save, very_sparse=True), scale=0.1),
        cases.Case(f"{word}-conv1d", _randlora(save, target_modules=["c_attn", "c_proj"]), "gpt2", scale=0.1),
        cases.Case(f"{word}-opt", _randlora(save, target_modules=["q_proj", "fc1", "project_in"]), "opt", scale=0.1),
        cases.Case(f"{word}-bias-all", _randlora(save, bias="all", target_modules=["q_proj", "fc1"]), "opt"),
        cases.Case(f"{word}-modules-to-save", _randlora(save, modules_to_save=["lm_head"])),
    )
)
BY_NAME = {case.name: case for case in CASES}
NARROW = cases.Case("randlora-narrow", _randlora(), autocast=False, scale=0.1)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_merge_of_a_16_bit_file_is_peft_bit_for_bit(dtype, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(NARROW, dtype), workshop.base_of(NARROW, dtype)
    assert_merges_like_peft(workshop, files, adapter, base, tmp_path)


_KEPT = ["mixed", "key", "sparse", "very-sparse", "conv1d", "opt"]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", _KEPT)
def test_bases_go_and_come_back(name, dtype, workshop, files, tmp_path: Path) -> None:
    case = BY_NAME[f"randlora-projection-{name}"]
    adapter, base = workshop.adapter(case, dtype), workshop.base_of(case, dtype)
    gone = adapterpack.convert(adapter, tmp_path / "seed", to="seed", base=base)
    assert str(gone.grade) == "lossless"
    kept = files.tensors(tmp_path / "seed")
    assert kept and all(key.endswith(("randlora_lambda", "randlora_gamma")) for key in kept)
    back = adapterpack.convert(tmp_path / "seed", tmp_path / "back", to="projection", base=base)
    assert str(back.grade) == "lossless"
    before, after = files.tensors(adapter), files.tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(files.same(before[key], after[key]) for key in before)


def test_bases_of_an_accelerator_without_bfloat16(workshop, files, tmp_path: Path, monkeypatch) -> None:
    """PEFT draws in float16 there, and a converter elsewhere still finds how."""
    monkeypatch.setattr(theirs, "is_bf16_available", lambda: False)
    case = cases.Case("randlora-f16-gpu", _randlora())
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    gone = adapterpack.convert(adapter, tmp_path / "seed", to="seed", base=base)
    assert any("no bfloat16" in note for note in gone.notes)
    monkeypatch.undo()
    adapterpack.convert(tmp_path / "seed", tmp_path / "back", to="projection", base=base)
    before, after = files.tensors(adapter), files.tensors(tmp_path / "back")
    assert all(files.same(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", _KEPT)
def test_a_pack_has_no_bases(name, workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(BY_NAME[f"randlora-projection-{name}"])
    adapterpack.compress(adapter, tmp_path / "a.apack")
    places = adapterpack.inspect(tmp_path / "a.apack").pack.not_stored
    copies = [key for key in files.tensors(adapter) if key.endswith(("randlora_A", "randlora_B"))]
    assert places == {"recipe": 2, "equal": len(copies) - 2}
    adapterpack.unpack(tmp_path / "a.apack", tmp_path / "back")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (adapter / weights).read_bytes()


def test_bases_of_another_seed_are_stored_once(workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(BY_NAME["randlora-projection-mixed"])
    other = files.edited(adapter, tmp_path / "other", config={"projection_prng_key": 5})
    with pytest.raises(LossRefused, match="no recipe gives"):
        adapterpack.convert(other, tmp_path / "seed", to="seed", base=workshop.base())
    adapterpack.compress(other, tmp_path / "a.apack")
    copies = [key for key in files.tensors(adapter) if key.endswith(("randlora_A", "randlora_B"))]
    assert adapterpack.inspect(tmp_path / "a.apack").pack.not_stored == {"equal": len(copies) - 2}


def test_copies_that_differ_are_refused(workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["randlora-projection-mixed"]
    adapter = workshop.adapter(case)
    key = next(k for k in files.tensors(adapter) if k.endswith("q_proj.randlora_B"))
    other = files.edited(adapter, tmp_path / "other", {key: files.tensors(adapter)[key] * 2})
    with pytest.raises(InvalidFile, match="another randlora_B"):
        adapterpack.merge(other, workshop.base_of(case), tmp_path / "m")


def test_half_a_pair_is_refused(workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["randlora-projection-mixed"]
    adapter = workshop.adapter(case)
    tensors = files.tensors(adapter)
    for n, (gone, code) in enumerate(
        [("q_proj.randlora_gamma", "half-pair"), ("q_proj.randlora_lambda", "half-pair")]
    ):
        key = next(k for k in tensors if k.endswith(gone))
        assert code in {
            f.code for f in adapterpack.check(files.edited(adapter, tmp_path / str(n), {key: None})).findings
        }
    halves = {k: None for k in tensors if k.endswith("randlora_B")}
    with pytest.raises(InvalidFile, match="one projection of two"):
        adapterpack.merge(files.edited(adapter, tmp_path / "half", halves), workshop.base_of(case), tmp_path / "m")


def test_a_moved_parameter_is_found(workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["randlora-projection-mixed"]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    key = next(k for k in files.tensors(adapter) if k.endswith("k_proj.randlora_lambda"))
    moved = files.edited(adapter, tmp_path / "moved", {key: files.tensors(adapter)[key] * 1.01})
    found = adapterpack.verify(adapter, moved, base=base)
    assert adapterpack.verify(adapter, adapter, base=base).equal
    assert [m.name for m in found.modules if m.rel_error > 1e-6] == ["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(WrongBase, match="smaller side"):
        adapterpack.verify(adapter, moved)
    with pytest.raises(AdapterpackError):
        adapterpack.convert(adapter, tmp_path / "lora", to="lora")


@pytest.mark.parametrize("rows", [3, 64, 1000])
def test_deviations_are_torchs(rows) -> None:
    """The sum of squares in doubles, rounded once, is what torch gives for tensors of 16 bits."""
    g = torch.Generator().manual_seed(rows)
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.empty(rows, 7, dtype=dtype).uniform_(-0.4, 0.4, generator=g)
        ours = np.std(values.double().numpy(), ddof=1)
        assert torch.tensor(ours).to(dtype) == values.std()
