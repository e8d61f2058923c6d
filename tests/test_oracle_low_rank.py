"""AdaLoRA, DeLoRA and GraLoRA: merges are PEFT's `merge_and_unload`, bit for bit; each is LoRA in another form."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from bitexact import assert_merges_like_peft, codes
from peft import AdaLoraConfig, DeloraConfig, GraloraConfig

import adapterpack
from adapterpack.errors import InvalidFile, Unsupported

_QKU = ["q_proj", "k_proj", "up_proj", "down_proj"]


def _adalora(**fields):
    return lambda: AdaLoraConfig(**{"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 32, **fields})


def _delora(**fields):
    return lambda: DeloraConfig(**{"r": 4, "init_weights": False, **fields})


def _gralora(**fields):
    return lambda: GraloraConfig(**{"r": 4, "alpha": 7, "init_weights": False, **fields})


def _prune(model) -> None:
    """Prune some triples, and all of one module, as `update_and_allocate` leaves them."""
    g = torch.Generator().manual_seed(1)
    kept = {}
    for name, e in model.named_parameters():
        if ".lora_E." not in name:
            continue
        mask = torch.rand(len(e), generator=g) > (2 if "layers.0.self_attn.q" in name else 0.5)
        with torch.no_grad():
            e.masked_fill_(~mask[:, None], 0)
        kept[name.removeprefix("base_model.model.")] = mask.tolist()
    model.peft_config["default"].rank_pattern = kept


def _shrink(model) -> None:
    """A row and a column whose norm is below the least one."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "delora_A" in name:
                p[1] *= 1e-6
            if "delora_B" in name:
                p[:, 2] *= 1e-6


ADALORA = (
    cases.Case("adalora-llama", _adalora(target_modules=_QKU)),
    cases.Case("adalora-pruned", _adalora(target_modules=_QKU), post=_prune),
    cases.Case("adalora-gpt2", _adalora(target_modules=["c_attn", "c_proj"]), "gpt2"),
    cases.Case("adalora-opt-bias-all", _adalora(target_modules=["q_proj", "fc1"], bias="all"), "opt"),
    cases.Case("adalora-no-alpha", _adalora(target_modules=_QKU, lora_alpha=0), post=_prune),
    cases.Case("adalora-many", _adalora(target_modules=["k_proj"], init_r=300)),
    cases.Case("adalora-conv2d", _adalora(target_modules=["convolution"]), "resnet"),
    # Switches of LoRA's that mean nothing here.
    cases.Case("adalora-of-lora", _adalora(target_modules=_QKU, use_rslora=True, alpha_pattern={"q_proj": 99}, r=3)),
)
DELORA = (
    cases.Case("delora-llama", _delora(target_modules=_QKU)),
    cases.Case(
        "delora-patterns", _delora(target_modules=_QKU, rank_pattern={"k_proj": 2}, lambda_pattern={"up_proj": 3})
    ),
    cases.Case("delora-opt-bias-only", _delora(target_modules=["q_proj", "fc1"], bias="delora_only"), "opt"),
    cases.Case("delora-tiny-norms", _delora(target_modules=_QKU), post=_shrink),
)
GRALORA = (
    cases.Case("gralora-llama", _gralora(target_modules=_QKU)),
    cases.Case("gralora-k4", _gralora(target_modules=_QKU, gralora_k=4, r=8)),
    cases.Case("gralora-hybrid", _gralora(target_modules=_QKU, hybrid_r=3)),
    cases.Case("gralora-gpt2", _gralora(target_modules=["c_attn", "c_proj"], hybrid_r=2), "gpt2"),
    cases.Case("gralora-bert-bias-all", _gralora(target_modules=["query"], bias="all"), "bert"),
)
CASES = (*ADALORA, *DELORA, *GRALORA)
_BY_NAME = {c.name: c for c in CASES}


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize(("ours", "theirs"), [("f32", "bf16"), ("bf16", "f32"), ("f32", "f16")])
@pytest.mark.parametrize("name", ["adalora-pruned", "delora-llama", "gralora-hybrid"])
def test_a_base_of_another_dtype_is_merged_as_peft_does_it(
    name, ours, theirs, workshop, files, tmp_path: Path
) -> None:
    case = _BY_NAME[name]
    assert_merges_like_peft(workshop, files, workshop.adapter(case, ours), workshop.base_of(case, theirs), tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_its_lora_computes_the_same_and_peft_loads_it(case, workshop, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base)
    assert str(made.grade) == "equivalent"
    assert made.max_rel_error < 1e-6
    expected, plain = workshop.peft_merge(base, adapter), workshop.peft_merge(base, tmp_path / "lora")
    assert plain.load.clean
    assert all(
        float((plain[k] - expected[k]).abs().max()) < 2e-5 for k in expected if expected[k].is_floating_point()
    )


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("adalora-llama", {6}), ("delora-patterns", {4, 2}), ("gralora-k4", {32}), ("gralora-hybrid", {11})],
)
def test_its_lora_needs_no_base_and_has_the_rank_of_the_formula(name, ranks, workshop, tmp_path: Path) -> None:
    made = adapterpack.convert(workshop.adapter(_BY_NAME[name]), tmp_path / "lora", to="lora")
    assert str(made.grade) == "equivalent"
    assert {int(r) for r in adapterpack.inspect(tmp_path / "lora").ranks} == ranks


_Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("adalora-llama", "lora_E"), ("delora-llama", "delora_lambda"), ("gralora-hybrid", "gralora_B_general.weight")],
)
def test_a_moved_parameter_is_found_and_the_merge_is_equal(name, parameter, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME[name]), workshop.base_of(_BY_NAME[name])
    key = f"{_Q}.{parameter}"
    moved = files.edited(adapter, tmp_path / "moved", {key: files.tensors(adapter)[key] * 1.01})
    for where in (None, base):
        found = adapterpack.verify(adapter, moved, base=where)
        assert not found.equal and found.modules[0].name == "model.layers.0.self_attn.q_proj.weight"
    adapterpack.merge(adapter, base, tmp_path / "merged")
    assert adapterpack.verify(adapter, tmp_path / "merged", base=base).equal
    assert not adapterpack.verify(moved, tmp_path / "merged", base=base).equal


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adalora-llama", {"lora_E": None}, "lacks E"),
        ("adalora-llama", {"lora_E": (6,)}, "are not"),
        ("adalora-llama", {"lora_B": (64, 5)}, "are not"),
        ("adalora-llama", {"lora_A": (6, 8, 8)}, "are not"),
        ("delora-llama", {"delora_w_norm": None}, "lacks w_norm"),
        ("delora-llama", {"delora_w_norm": (63,)}, "are not"),
        ("delora-llama", {"delora_lambda": (4,)}, "are not"),
        ("delora-llama", {"delora_A": (0, 64), "delora_B": (64, 0)}, "are not"),
        ("gralora-llama", {"gralora_A": (2, 32, 3)}, "do not fit"),
        ("gralora-llama", {"gralora_A": (2, 32, 3), "gralora_B": (2, 3, 32)}, "do not fit"),
        ("gralora-llama", {"gralora_B": None}, "lacks B"),
        ("gralora-hybrid", {"gralora_A_general.weight": None}, "lacks A_general"),
        ("gralora-hybrid", {"gralora_A_general.weight": (2, 64)}, "do not fit"),
    ],
)
def test_broken_shapes_are_refused(name, change, message, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(_BY_NAME[name]), workshop.base_of(_BY_NAME[name])
    edited = {f"{_Q}.{n}": None if s is None else torch.ones(s) for n, s in change.items()}
    broken = files.edited(adapter, tmp_path / "broken", edited)
    with pytest.raises(InvalidFile, match=message):
        adapterpack.merge(broken, base, tmp_path / "merged")
    assert "half-pair" in codes(adapterpack.check(broken))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("adalora-llama", {"init_r": 7}),
        ("adalora-pruned", {"rank_pattern": None}),
        ("delora-llama", {"r": 3}),
        ("gralora-llama", {"r": 8}),
        ("gralora-llama", {"gralora_k": 4}),
    ],
)
def test_another_rank_in_the_config_is_found(name, config, workshop, files, tmp_path: Path) -> None:
    lying = files.edited(workshop.adapter(_BY_NAME[name]), tmp_path / "lying", config=config)
    assert codes(adapterpack.check(lying)) == {"rank-mismatch"}


@pytest.mark.parametrize(
    ("name", "config", "error"),
    [
        ("adalora-pruned", {"init_r": 7}, InvalidFile),
        ("adalora-pruned", {"rank_pattern": []}, None),
        ("adalora-pruned", {"rank_pattern": [1]}, InvalidFile),
        ("adalora-llama", {"lora_alpha": "32"}, InvalidFile),
        ("adalora-llama", {"lora_alpha": True}, InvalidFile),
        ("adalora-llama", {"use_dora": True}, Unsupported),
        ("adalora-llama", {"layer_replication": [[0, 2]]}, Unsupported),
        ("gralora-hybrid", {"hybrid_r": 0}, InvalidFile),
        ("gralora-llama", {"hybrid_r": False}, InvalidFile),
        ("gralora-llama", {"hybrid_r": 1}, InvalidFile),
        ("gralora-llama", {"alpha": [7]}, InvalidFile),
    ],
)
def test_what_the_config_cannot_mean_is_refused(name, config, error, workshop, files, tmp_path: Path) -> None:
    lying = files.edited(workshop.adapter(_BY_NAME[name]), tmp_path / "lying", config=config)
    if error is None:
        adapterpack.merge(lying, workshop.base_of(_BY_NAME[name]), tmp_path / "merged")
        return
    with pytest.raises(error):
        adapterpack.merge(lying, workshop.base_of(_BY_NAME[name]), tmp_path / "merged")


def test_a_hybrid_rank_that_the_tensors_lack_is_found(workshop, files, tmp_path: Path) -> None:
    lying = files.edited(workshop.adapter(_BY_NAME["gralora-llama"]), tmp_path / "lying", config={"hybrid_r": 2})
    assert any("hybrid_r is 2" in f.message for f in adapterpack.check(lying).findings)
