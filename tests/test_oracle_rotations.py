"""Rotations and reflections (OFT, BOFT, HRA, RoAd): merges are PEFT's `merge_and_unload`, bit for bit."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from bitexact import assert_merges_like_peft, codes
from peft import BOFTConfig, HRAConfig, OFTConfig, RoadConfig

import adapterpack
from adapterpack.errors import InvalidFile, Unsupported, WrongBase

_QKU = ["q_proj", "k_proj", "up_proj", "down_proj"]
_OPT = ["q_proj", "fc1", "fc2", "project_in"]


def _oft(**fields):
    return lambda: OFTConfig(**{"oft_block_size": 16, "target_modules": _QKU, **fields})


def _boft(**fields):
    return lambda: BOFTConfig(**{"boft_block_size": 8, "target_modules": _QKU, **fields})


def _hra(**fields):
    return lambda: HRAConfig(**{"r": 4, "target_modules": _QKU, **fields})


def _road(**fields):
    return lambda: RoadConfig(**{"group_size": 16, "target_modules": _OPT, **fields})


_EXACT = {"use_cayley_neumann": False}
OFT = (
    *(cases.Case(f"oft-{n}-terms", _oft(num_cayley_neumann_terms=n)) for n in (2, 3, 4, 5, 7)),
    cases.Case("oft-cayley", _oft(**_EXACT)),
    cases.Case("oft-block-count", _oft(oft_block_size=0, r=4, bias="oft_only", target_modules=_OPT), "opt"),
    cases.Case("oft-share", _oft(block_share=True)),
    cases.Case("oft-share-cayley", _oft(block_share=True, **_EXACT)),
    cases.Case("oft-coft", _oft(coft=True, eps=0.5)),
    cases.Case("oft-coft-share", _oft(coft=True, eps=10.0, block_share=True, **_EXACT)),
    cases.Case("oft-embedding", _oft(target_modules=["embed_tokens", "q_proj"])),
    cases.Case("oft-embedding-share", _oft(target_modules=["embed_tokens"], block_share=True, **_EXACT)),
    cases.Case("oft-conv2d", _oft(target_modules=["convolution"], oft_block_size=4), "resnet"),
    cases.Case(
        "oft-conv2d-share", _oft(target_modules=["convolution"], oft_block_size=4, block_share=True), "resnet"
    ),
    cases.Case("oft-bert", _oft(target_modules=["query", "output.dense"]), "bert"),
    cases.Case("oft-modules-to-save", _oft(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    cases.Case("oft-one-block", _oft(oft_block_size=0, r=1, target_modules=["k_proj"])),
    cases.Case("oft-blocks-of-one", _oft(oft_block_size=1, target_modules=["k_proj"], bias="all"), bias=True),
    cases.Case("oft-narrow", _oft(), autocast=False),
)
BOFT = (
    cases.Case("boft-llama", _boft()),
    cases.Case("boft-block-count", _boft(boft_block_size=0, boft_block_num=4, target_modules=_OPT), "opt"),
    cases.Case("boft-one-block", _boft(boft_block_size=0, boft_block_num=1, target_modules=["q_proj"])),
    cases.Case("boft-conv2d", _boft(target_modules=["layer.1.convolution"], boft_block_size=3), "resnet"),
    cases.Case("boft-bias", _boft(target_modules=["query"], bias="boft_only"), "bert"),
)
HRA = (
    cases.Case("hra-llama", _hra()),
    cases.Case("hra-odd", _hra(r=5, target_modules=_OPT), "opt"),
    cases.Case("hra-span", _hra(apply_GS=True)),
    cases.Case("hra-conv2d", _hra(target_modules=["convolution"]), "resnet"),
    cases.Case("hra-conv2d-span", _hra(target_modules=["convolution"], apply_GS=True, r=3), "resnet"),
    cases.Case("hra-bias", _hra(target_modules=["query"], bias="hra_only", r=1), "bert"),
)
ROAD = (
    *(cases.Case(f"{v}-biases", _road(variant=v), "opt") for v in ("road_1", "road_2", "road_4")),
    *(cases.Case(f"{v}-llama", _road(variant=v, target_modules=_QKU, group_size=32)) for v in ("road_1", "road_4")),
    cases.Case("road_2-pairs", _road(variant="road_2", group_size=2, target_modules=["query"]), "bert"),
    cases.Case("road_1-narrow", _road(), "opt", autocast=False),
)
CASES = (*OFT, *BOFT, *HRA, *ROAD)
BY_NAME = {c.name: c for c in CASES}


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("name", ["oft-5-terms", "oft-share", "boft-llama", "hra-llama", "road_4-biases"])
def test_verify_finds_one_moved_parameter(name, workshop, files, tmp_path: Path) -> None:
    case = BY_NAME[name]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    key = min(k for k in files.tensors(adapter) if "layers.1" in k)
    moved = files.tensors(adapter)[key].clone()
    moved.view(-1)[1] += 0.01
    other = files.edited(adapter, tmp_path / "other", {key: moved})
    for how in ({}, {"base": base}):
        result = adapterpack.verify(adapter, other, **how)
        assert not result.equal
        assert {m.name.rpartition(".")[0] for m in result.modules if m.rel_error} == {
            key.removeprefix("base_model.model.").partition(f".{name.split('-')[0].split('_')[0]}_")[0]
        }
        assert adapterpack.verify(adapter, adapter, **how).equal
    adapterpack.merge(adapter, base, tmp_path / "merged")
    assert adapterpack.verify(adapter, tmp_path / "merged", base=base).equal
    assert not adapterpack.verify(other, tmp_path / "merged", base=base).equal


@pytest.mark.parametrize("factors", [2, 3])
def test_butterflies_of_several_factors(factors, workshop, files, tmp_path: Path, monkeypatch) -> None:
    """PEFT has them with its CUDA extension only: what that computes, a block diagonal, stands in for it."""
    from peft.tuners.boft import layer

    class Extension:
        @staticmethod
        def forward(blocks):
            return [torch.stack([torch.block_diag(*b) for b in blocks])]

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: Extension)
    case = cases.Case(f"boft-{factors}-factors", _boft(boft_n_butterfly_factor=factors, boft_block_size=4))
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    assert {t.shape[0] for k, t in files.tensors(adapter).items() if "boft_R" in k} == {factors}
    assert_merges_like_peft(workshop, files, adapter, base, tmp_path)
    health = adapterpack.check(adapter)
    assert health.healthy
    assert codes(health) == {"butterfly"}


def test_parameters_of_older_versions_are_refused(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(BY_NAME["oft-5-terms"]), workshop.base_of(BY_NAME["oft-5-terms"])
    old = files.edited(adapter, tmp_path / "series", config={"peft_version": "0.17.1"})
    with pytest.raises(Unsupported, match="last term twice"):
        adapterpack.merge(old, base, tmp_path / "merged")
    assert "other-series" in codes(adapterpack.check(old))
    # The exact transform is the same in all versions.
    cayley = workshop.adapter(BY_NAME["oft-cayley"])
    adapterpack.merge(files.edited(cayley, tmp_path / "same", config={"peft_version": None}), base, tmp_path / "fine")
    tensors = files.tensors(adapter)
    whole = dict.fromkeys(tensors) | {k.replace("oft_R.weight", "oft_r"): torch.zeros(4, 16, 16) for k in tensors}
    with pytest.raises(Unsupported, match=r"before 0\.16"):
        adapterpack.merge(files.edited(adapter, tmp_path / "whole", whole), base, tmp_path / "merged")


_BROKEN = [
    ("oft-5-terms", {"num_cayley_neumann_terms": 10**9}, None, InvalidFile, "num_cayley_neumann_terms"),
    ("oft-5-terms", {"block_share": True}, None, InvalidFile, "block_share"),
    ("oft-5-terms", {"coft": True, "eps": "big"}, None, InvalidFile, "eps"),
    ("oft-5-terms", {}, (4, 119), InvalidFile, "q_proj"),
    ("oft-5-terms", {}, (3, 120), WrongBase, "q_proj"),
    ("oft-share", {}, (1, 66), WrongBase, "multiple of 12"),
    ("boft-llama", {}, (3, 8, 8, 7), InvalidFile, "butterfly|boft_R"),
    ("boft-llama", {}, (9, 12, 2, 2), InvalidFile, "no butterfly"),
    ("boft-llama", {}, (1, 4, 8, 8), WrongBase, "q_proj"),
    ("hra-llama", {}, (64,), InvalidFile, "hra_u"),
    ("hra-llama", {}, (63, 4), WrongBase, "q_proj"),
    ("road_1-biases", {"variant": "road_3"}, None, Unsupported, "road_3"),
    ("road_1-biases", {"group_size": 7}, None, InvalidFile, "group_size"),
    ("road_1-biases", {"variant": "road_2"}, None, WrongBase, r"fc1\.weight has shape"),
    ("road_1-biases", {"group_size": 48}, None, InvalidFile, "groups of 48"),
]


@pytest.mark.parametrize(("name", "config", "shape", "error", "says"), _BROKEN)
def test_what_does_not_fit_is_refused(name, config, shape, error, says, workshop, files, tmp_path: Path) -> None:
    case = BY_NAME[name]
    adapter = workshop.adapter(case)
    key = next(k for k in files.tensors(adapter) if "q_proj" in k and not k.endswith("boft_s"))
    new = {} if shape is None else {key: torch.zeros(shape)}
    broken = files.edited(adapter, tmp_path / "broken", new, config)
    with pytest.raises(error, match=says):
        adapterpack.merge(broken, workshop.base_of(case), tmp_path / "merged")
    assert not adapterpack.check(broken, base=workshop.base_of(case)).healthy


def test_half_a_pair_is_a_finding(workshop, files, tmp_path: Path) -> None:
    for name, ending in (("boft-llama", "boft_s"), ("road_1-biases", "road_alpha")):
        adapter = workshop.adapter(BY_NAME[name])
        key = next(k for k in files.tensors(adapter) if k.endswith(ending))
        half = files.edited(adapter, tmp_path / name, {key: None})
        assert "half-pair" in codes(adapterpack.check(half))
        with pytest.raises(InvalidFile, match="lacks"):
            adapterpack.merge(half, workshop.base_of(BY_NAME[name]), tmp_path / "merged")


def test_reflections_are_low_rank_once_the_base_is_known(workshop, tmp_path: Path) -> None:
    case = BY_NAME["hra-llama"]
    made = adapterpack.convert(
        workshop.adapter(case), tmp_path / "lora", to="lora", base=workshop.base_of(case), rank=4
    )
    assert made.max_rel_error < 1e-6
