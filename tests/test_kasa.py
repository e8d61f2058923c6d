"""KaSA: LoRA on a base that lost its least singular directions."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from bitexact import assert_merges_like_peft
from peft import KasaConfig

import adapterpack
from adapterpack.errors import AdapterpackError, InvalidFile, Unsupported, WrongBase

_QU = ["q_proj", "up_proj", "k_proj"]


def _kasa(**fields):
    return lambda: cases.lora(kasa_config=KasaConfig(), **{"target_modules": _QU, **fields})()


CASES = (
    cases.Case("kasa-llama", _kasa()),
    cases.Case("kasa-bert", _kasa(target_modules=["query", "intermediate.dense"], bias="lora_only"), "bert"),
    cases.Case("kasa-bias", _kasa(lora_bias=True, target_modules=["fc1", "q_proj"]), "opt"),
    cases.Case("kasa-patterns", _kasa(rank_pattern={"k_proj": 9}, alpha_pattern={"q_proj": 3}, use_rslora=True)),
    cases.Case("kasa-head", _kasa(target_modules=["q_proj"], modules_to_save=["lm_head"])),
)


@pytest.fixture
def made(workshop):
    return workshop.adapter(CASES[0]), workshop.base_of(CASES[0])


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


def test_verify_finds_a_diagonal_that_moved(made, files, tmp_path: Path) -> None:
    adapter, base = made
    key = max(k for k in files.tensors(adapter) if k.endswith("lora_diag"))
    other = files.edited(adapter, tmp_path / "other", {key: files.tensors(adapter)[key] * 1.01})
    adapterpack.merge(adapter, base, tmp_path / "merged")
    assert adapterpack.verify(adapter, tmp_path / "merged", base=base).equal
    assert adapterpack.verify(other, tmp_path / "merged", base=base).findings
    for known in ({"base": base}, {}):
        assert adapterpack.verify(adapter, adapter, **known).equal
        assert not adapterpack.verify(adapter, other, **known).equal


def test_the_nearest_lora_has_the_lost_directions_too(made, tmp_path: Path) -> None:
    adapter, base = made
    result = adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base, max_error=5e-6)
    assert result.max_rel_error < 5e-6
    assert set(adapterpack.inspect(tmp_path / "lora").ranks) == {8}
    assert adapterpack.verify(adapter, tmp_path / "lora", base=base).equal


def test_no_other_job_takes_it_for_plain_lora(made, tmp_path: Path) -> None:
    adapter, base = made
    assert adapterpack.inspect(adapter).method == "kasa"
    for job in (
        lambda: adapterpack.resize(adapter, tmp_path / "a", rank=2),
        lambda: adapterpack.combine([adapter, adapter], tmp_path / "b"),
        lambda: adapterpack.convert(adapter, tmp_path / "c", to="lora"),
        lambda: adapterpack.convert(adapter, tmp_path / "d", engine="vllm"),
        lambda: adapterpack.convert(adapter, tmp_path / "e", layout="fused", base=base),
    ):
        with pytest.raises(AdapterpackError):
            job()
    assert not list(tmp_path.iterdir())
    assert not adapterpack.check(adapter, engine="vllm").healthy


@pytest.mark.parametrize(
    ("tensors", "message"),
    [({"lora_diag": None}, "lacks lora_diag"), ({"lora_diag": torch.ones(5)}, r"are not \(r, in\)")],
)
def test_tensors_that_do_not_fit_are_refused_and_found(tensors, message, made, files, tmp_path: Path) -> None:
    adapter, base = made
    key = max(k for k in files.tensors(adapter) if k.endswith("lora_diag"))
    bad = files.edited(adapter, tmp_path / "bad", {key: tensors["lora_diag"]})
    with pytest.raises(InvalidFile, match=message):
        adapterpack.merge(bad, base, tmp_path / "merged")
    assert "half-pair" in {f.code for f in adapterpack.check(bad).findings}


@pytest.mark.parametrize(
    "config", [{"kasa_config": {"beta": 1e-4, "delta": 2}}, {"use_dora": True}, {"init_lora_weights": "pissa"}]
)
def test_what_peft_does_not_load_is_refused(config, made, files, tmp_path: Path) -> None:
    adapter, base = made
    bad = files.edited(adapter, tmp_path / "bad", config=config)
    with pytest.raises(Unsupported):
        adapterpack.merge(bad, base, tmp_path / "merged")


def test_a_diagonal_without_the_config_is_refused(made, files, tmp_path: Path) -> None:
    """PEFT would leave the base whole, and drop the diagonal."""
    adapter, base = made
    bad = files.edited(adapter, tmp_path / "bad", config={"kasa_config": None})
    with pytest.raises(InvalidFile, match="kasa_config"):
        adapterpack.merge(bad, base, tmp_path / "merged")


def test_conv1d_and_layers_without_enough_directions_are_refused(workshop, files, tmp_path: Path) -> None:
    case = cases.Case("kasa-wide", _kasa(r=31, target_modules=["k_proj"]))
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    tensors = files.tensors(adapter)
    more = {k: torch.cat([t, t], 1 if "lora_B" in k else 0) for k, t in tensors.items()}
    wide = files.edited(adapter, tmp_path / "wide", more, {"r": 62})
    with pytest.raises(WrongBase, match="nothing is left of it"):
        adapterpack.merge(wide, base, tmp_path / "merged")
