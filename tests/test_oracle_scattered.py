"""FourierFT, WaveFT and SHiRA merges are PEFT's `merge_and_unload`, bit for bit; their places come from the seed."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from bitexact import assert_merges_like_peft, codes
from peft import FourierFTConfig, ShiraConfig, WaveFTConfig
from peft.tuners.waveft.wavelet import wavelist

import adapterpack
from adapterpack import draws
from adapterpack.errors import AdapterpackError, InvalidFile, Unsupported, WrongBase
from adapterpack.methods._wavelets import LOWPASS

_QKUD = ["q_proj", "k_proj", "up_proj", "down_proj"]


def _fourier(**fields):
    return lambda: FourierFTConfig(**{"n_frequency": 100, "target_modules": _QKUD, **fields})


def _wave(**fields):
    return lambda: WaveFTConfig(**{"n_frequency": 100, "target_modules": _QKUD, **fields})


def _shira(**fields):
    return lambda: ShiraConfig(**{"r": 3, "target_modules": _QKUD, **fields})


CASES = (
    cases.Case("fourierft-llama", _fourier()),
    cases.Case("fourierft-conv1d", _fourier(target_modules=["c_attn", "c_proj"], scaling=30.5), "gpt2"),
    cases.Case("fourierft-opt", _fourier(target_modules=["q_proj", "fc1", "project_in"], random_loc_seed=3), "opt"),
    cases.Case("fourierft-patterns", _fourier(n_frequency_pattern={"k_proj": 7, "layers.1.mlp.up_proj": 2048})),
    cases.Case("fourierft-bias-all", _fourier(target_modules=["q_proj", "fc1"], bias="all"), "opt"),
    cases.Case("fourierft-modules-to-save", _fourier(modules_to_save=["lm_head"])),
    cases.Case("waveft-llama", _wave()),
    cases.Case("waveft-direct", _wave(use_idwt=False, random_loc_seed=2**40 + 1)),
    cases.Case("waveft-conv1d", _wave(target_modules=["c_attn", "c_proj"], wavelet_family="db3"), "gpt2"),
    cases.Case("waveft-opt", _wave(target_modules=["q_proj", "fc1", "project_in"], wavelet_family="sym4"), "opt"),
    cases.Case("waveft-coif", _wave(wavelet_family="coif2", n_frequency_pattern={"k_proj": 7})),
    cases.Case("waveft-proportional", _wave(proportional_parameters=True, wavelet_family="db10")),
    # Odd sides: a row and a column too many come back, and are cut off.
    cases.Case("waveft-odd", _wave(target_modules=["embed_out", "lm_head", "q_proj"]), over={"vocab_size": 97}),
    cases.Case("shira-llama", _shira()),
    cases.Case("shira-seed", _shira(random_seed=5)),
    cases.Case("shira-opt", _shira(target_modules=["q_proj", "fc1", "project_in"]), "opt"),
    cases.Case("shira-bert", _shira(target_modules=["query", "intermediate.dense"]), "bert"),
    cases.Case("shira-modules-to-save", _shira(modules_to_save=["lm_head"])),
)
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("family", sorted(LOWPASS))
def test_every_wavelet_is_pefts(family, workshop, files, tmp_path: Path) -> None:
    case = cases.Case(f"waveft-{family}", _wave(wavelet_family=family, target_modules=["k_proj"], n_frequency=900))
    assert_merges_like_peft(workshop, files, workshop.adapter(case), workshop.base_of(case), tmp_path)


def test_all_wavelets_that_peft_can_use_are_known() -> None:
    assert set(wavelist()) - {"haar"} - set(LOWPASS) == {"coif5"}


@pytest.mark.parametrize("family", ["coif5", "db11", "sym11", "haar2"])
def test_a_wavelet_that_peft_cannot_use_is_refused(family, workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["waveft-llama"]
    other = files.edited(workshop.adapter(case), tmp_path / "other", config={"wavelet_family": family})
    with pytest.raises(Unsupported, match="PEFT cannot reconstruct with it"):
        adapterpack.merge(other, workshop.base_of(case), tmp_path / "m")
    assert any(f.code == "unknown-wavelet" for f in adapterpack.check(other).findings)


@pytest.mark.parametrize("size", [1, 2, 10, 97, 4096, 50_000])
@pytest.mark.parametrize("seed", [0, 777, -1, 2**40 + 3, draws.DEFAULT_SEED])
def test_places_are_the_first_of_torchs_permutation(size, seed) -> None:
    whole = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    for count in {0, 1, min(5, size), size - 1, size}:
        assert draws.permutation(size, count, seed).tolist() == whole[:count]
    assert (
        draws.permutation(97, 97, draws.DEFAULT_SEED).tolist()
        == torch.randperm(97, generator=torch.Generator()).tolist()
    )


def test_a_large_permutation_is_torchs_other_shuffle(monkeypatch) -> None:
    """From 214,748,364 on: what torch 2.13 gave there, and the same code on a small one held to its definition."""
    assert draws.permutation(214_748_363, 4, 777).tolist() == [11440646, 199500216, 10121607, 3119241]
    monkeypatch.setattr(draws, "_LARGE", 10)
    draws.permutation.cache_clear()
    raw = draws.mt19937(3).random_raw(2 * 5000).tolist()
    whole = list(range(5000))
    for i in range(5000):
        z = (raw[2 * i] << 32 | raw[2 * i + 1]) % (i + 1)
        whole[i], whole[z] = whole[z], i
    try:
        for count in (1, 40, 5000):
            assert draws.permutation(5000, count, 3).tolist() == whole[:count]
    finally:
        draws.permutation.cache_clear()


def test_the_first_of_a_large_permutation() -> None:
    assert draws.permutation(214_748_364, 4, 777).tolist() == [150358698, 199533091, 83306822, 145970095]


@pytest.mark.parametrize("name", ["fourierft-llama", "waveft-llama", "shira-llama"])
def test_a_moved_parameter_is_found(name, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(BY_NAME[name]), workshop.base_of(BY_NAME[name])
    assert adapterpack.verify(adapter, adapter, base=base).equal
    key = next(k for k in files.tensors(adapter) if k.endswith(("spectrum", "shira_weight")))
    moved = files.edited(adapter, tmp_path / "moved", {key: files.tensors(adapter)[key] * 1.01})
    found = adapterpack.verify(adapter, moved, base=base)
    assert not found.equal
    assert [m.name for m in found.modules if m.rel_error > 1e-6] == [
        key.removeprefix("base_model.model.").rpartition(".")[0] + ".weight"
    ]
    with pytest.raises(WrongBase, match="needs the shapes"):
        adapterpack.verify(adapter, moved)


@pytest.mark.parametrize("name", ["fourierft-llama", "waveft-llama", "shira-llama"])
def test_there_is_no_exact_lora(name, workshop, tmp_path: Path) -> None:
    with pytest.raises(AdapterpackError):
        adapterpack.convert(workshop.adapter(BY_NAME[name]), tmp_path / "lora", to="lora")


@pytest.mark.parametrize(("change", "code"), [("longer", "frequency-mismatch"), ("square", "spectrum-shape")])
@pytest.mark.parametrize("name", ["fourierft-llama", "waveft-llama"])
def test_other_spectra_are_findings(name, change, code, workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(BY_NAME[name])
    key = next(k for k in files.tensors(adapter) if k.endswith("spectrum"))
    spectrum = files.tensors(adapter)[key]
    other = torch.cat([spectrum, spectrum]) if change == "longer" else spectrum.reshape(10, 10)
    edited = files.edited(adapter, tmp_path / "edited", {key: other})
    assert code in codes(adapterpack.check(edited))


@pytest.mark.parametrize("how", ["outside", "twice", "negative", "float64", "short"])
def test_indices_that_make_no_sense_are_refused(how, workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["shira-llama"]
    adapter = workshop.adapter(case)
    key = next(k for k in files.tensors(adapter) if k.endswith("shira_indices"))
    indices = files.tensors(adapter)[key].clone()
    if how == "short":
        indices = indices[:, 1:]
    elif how == "float64":
        indices = indices.double()
    elif how == "twice":
        indices[:, 1] = indices[:, 0]
    else:
        indices[0, 0] = 10**6 if how == "outside" else -1
    edited = files.edited(adapter, tmp_path / "edited", {key: indices})
    with pytest.raises(InvalidFile):
        adapterpack.merge(edited, workshop.base_of(case), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_indices_as_windows_saves_them(workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["shira-llama"]
    adapter = workshop.adapter(case)
    floats = {k: t.float() for k, t in files.tensors(adapter).items() if k.endswith("shira_indices")}
    assert_merges_like_peft(
        workshop, files, files.edited(adapter, tmp_path / "windows", floats), workshop.base_of(case), tmp_path
    )


@pytest.mark.parametrize("name", ["shira-llama", "shira-seed", "shira-opt"])
def test_a_pack_has_no_indices_that_the_seed_gives(name, workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(BY_NAME[name])
    adapterpack.compress(adapter, tmp_path / "a.apack")
    found = adapterpack.inspect(tmp_path / "a.apack").pack
    assert found is not None
    indices = [k for k in files.tensors(adapter) if k.endswith("shira_indices")]
    assert found.not_stored["recipe"] + found.not_stored.get("equal", 0) == len(indices)
    assert found.not_stored["recipe"] == len({files.tensors(adapter)[k].numpy().tobytes() for k in indices})
    adapterpack.unpack(tmp_path / "a.apack", tmp_path / "back")
    assert (tmp_path / "back/adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()
