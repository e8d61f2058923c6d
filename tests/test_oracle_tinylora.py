"""TinyLoRA merges are PEFT's `merge_and_unload`, bit for bit, with saved projections and from the seed."""

from __future__ import annotations

from pathlib import Path

import cases
import oracle
import pytest
import torch
from bitexact import assert_merges_like_peft
from peft import TinyLoraConfig
from safetensors.torch import load_file, save_file

import adapterpack
from adapterpack import draws
from adapterpack.errors import AdapterpackError, InvalidFile, LossRefused, Unsupported
from adapterpack.methods import _model_order


def _tiny(save=True, **fields):
    return lambda: TinyLoraConfig(
        **{
            "r": 3,
            "u": 11,
            "save_projection": save,
            "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"],
            **fields,
        }
    )


CASES = tuple(
    case
    for save in (True, False)
    for word in ("tinylora-projection" if save else "tinylora-seed",)
    for case in (
        cases.Case(f"{word}-mixed", _tiny(save)),
        cases.Case(f"{word}-tied", _tiny(save, weight_tying=0.6, u=5, r=1)),
        cases.Case(f"{word}-all-tied", _tiny(save, weight_tying=1.0, projection_seed=2**33 + 1)),
        cases.Case(f"{word}-conv1d", _tiny(save, target_modules=["c_attn", "c_proj", "wte"], r=2), "gpt2"),
        cases.Case(f"{word}-opt", _tiny(save, target_modules=["q_proj", "k_proj", "fc1", "project_in"]), "opt"),
        cases.Case(f"{word}-embedding", _tiny(save, target_modules=["q_proj", "embed_tokens"])),
        cases.Case(f"{word}-square", _tiny(save, target_modules=["embed_tokens"]), over={"vocab_size": 64}),
        cases.Case(f"{word}-bert", _tiny(save, target_modules=["query", "word_embeddings", "pooler.dense"]), "bert"),
        cases.Case(f"{word}-bias-all", _tiny(save, bias="all", target_modules=["q_proj", "fc1"]), "opt"),
        cases.Case(f"{word}-modules-to-save", _tiny(save, modules_to_save=["lm_head"])),
    )
)
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


_KEPT = ["mixed", "tied", "conv1d", "opt", "embedding"]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", _KEPT)
def test_projections_go_and_come_back(name, dtype, workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(BY_NAME[f"tinylora-projection-{name}"], dtype)
    gone = adapterpack.convert(adapter, tmp_path / "seed", to="seed")
    assert str(gone.grade) == "lossless"
    assert any("normal draws" in note for note in gone.notes)
    assert not any(key.endswith("_P") for key in files.tensors(tmp_path / "seed"))
    back = adapterpack.convert(tmp_path / "seed", tmp_path / "back", to="projection")
    assert str(back.grade) == "lossless"
    before, after = files.tensors(adapter), files.tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(files.same(before[key], after[key]) for key in before)


@pytest.mark.parametrize("word", ["projection", "seed"])
@pytest.mark.parametrize("name", _KEPT)
def test_its_lora_merges_to_the_same_bits(name, word, workshop, files, tmp_path: Path) -> None:
    case = BY_NAME[f"tinylora-{word}-{name}"]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base)
    assert str(made.grade) == "equivalent"
    assert made.max_rel_error < 1e-6
    lora, tiny = workshop.peft_merge(base, tmp_path / "lora"), workshop.peft_merge(base, adapter)
    # PEFT multiplies the transposed factors of an embedding in the other order.
    for key in tiny:
        if "embed" in key or "wte" in key:
            assert torch.allclose(lora[key], tiny[key], atol=1e-6, rtol=0)
        else:
            assert files.same(lora[key], tiny[key]), key


def test_a_pack_keeps_the_projections(workshop, files, tmp_path: Path) -> None:
    """Another torch may draw other last bits: what a pack cannot give back on every machine, it stores."""
    adapter = workshop.adapter(BY_NAME["tinylora-projection-mixed"])
    adapterpack.compress(adapter, tmp_path / "a.apack")
    assert "recipe" not in adapterpack.inspect(tmp_path / "a.apack").pack.not_stored


def _renamed(adapter: Path, destination: Path, words: dict[str, str], files) -> Path:
    """The adapter with other names of its modules."""
    tensors = {}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        for old, new in words.items():
            key = key.replace(f".{old}.", f".{new}.")
        tensors[key] = tensor
    files.edited(adapter, destination)
    save_file(tensors, destination / "adapter_model.safetensors", metadata={"format": "pt"})
    return destination


_ODD = {"q_proj": "zig", "k_proj": "zag", "up_proj": "over", "down_proj": "under", "self_attn": "head", "mlp": "body"}


def test_projections_tell_an_order_that_no_name_does(workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(BY_NAME["tinylora-projection-mixed"])
    odd = _renamed(adapter, tmp_path / "odd", _ODD, files)
    adapterpack.convert(adapter, tmp_path / "lora", to="lora")
    adapterpack.convert(odd, tmp_path / "odd-lora", to="lora")
    known, found = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("lora", "odd-lora"))
    assert len(known) == len(found)
    for key, tensor in known.items():
        for old, new in _ODD.items():
            key = key.replace(f".{old}.", f".{new}.")
        assert torch.equal(tensor, found[key])


def test_an_order_that_nothing_tells_is_refused(workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(BY_NAME["tinylora-seed-mixed"])
    odd = _renamed(adapter, tmp_path / "odd", _ODD, files)
    with pytest.raises(Unsupported, match="the order in which the model defines these modules is not known"):
        adapterpack.convert(odd, tmp_path / "lora", to="lora", base_dtype="float32")
    assert any(f.code == "unknown-order" and f.warning for f in adapterpack.check(odd).findings)


@pytest.mark.parametrize("count", [1, 2, 7, 15, 16, 17, 31, 32, 33, 99, 256])
@pytest.mark.parametrize("seed", [0, 42, 2**40 + 5])
def test_near_normal_draws_are_torchs_to_a_few_units(count, seed) -> None:
    drawn = torch.normal(0.0, 0.7, (count,), generator=torch.Generator().manual_seed(seed)).double().numpy()
    near = draws.normal_near(seed, count, 0.7)
    assert len(near) == (count if count <= 32 else 8)
    assert abs(near - drawn[: len(near)]).max() < 2e-6


def test_projections_of_another_seed_stay(workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(BY_NAME["tinylora-projection-mixed"])
    other = files.edited(adapter, tmp_path / "other", config={"projection_seed": 1000})
    with pytest.raises(LossRefused, match="no recipe gives the stored projections"):
        adapterpack.convert(other, tmp_path / "seed", to="seed")
    # The order of these names is known all the same.
    base = workshop.base_of(BY_NAME["tinylora-projection-mixed"])
    adapterpack.merge(other, base, tmp_path / "m")
    adapterpack.merge(adapter, base, tmp_path / "n")
    assert oracle.tree_hash(tmp_path / "m" / "model.safetensors") == oracle.tree_hash(
        tmp_path / "n" / "model.safetensors"
    )


def test_what_does_not_fit_is_refused(workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["tinylora-projection-mixed"]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    tensors = files.tensors(adapter)
    p = next(k for k in tensors if k.endswith("tinylora_P"))
    edits = {
        "one-gone": {p: None},
        "not-square": {p: tensors[p][:, :2]},
        "longer": {p: torch.cat([tensors[p], tensors[p]])},
        "no-vector": {"base_model.tinylora_v.0": None},
        "matrix": {"base_model.tinylora_v.0": tensors["base_model.tinylora_v.0"][None]},
        "no-factor": {p.replace("_P", "_A"): None},
        "other-rank": {p.replace("_P", "_A"): tensors[p.replace("_P", "_A")][:2]},
    }
    for name, edit in edits.items():
        with pytest.raises(InvalidFile):
            adapterpack.merge(files.edited(adapter, tmp_path / name, edit), base, tmp_path / "m")
        assert not (tmp_path / "m").exists(), name
    with pytest.raises(InvalidFile, match="weight_tying"):
        adapterpack.merge(files.edited(adapter, tmp_path / "w", config={"weight_tying": 3}), base, tmp_path / "m")


def test_a_moved_vector_is_found(workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(BY_NAME["tinylora-projection-mixed"])
    key = "base_model.tinylora_v.2"
    moved = files.edited(adapter, tmp_path / "moved", {key: files.tensors(adapter)[key] * 1.01})
    found = adapterpack.verify(adapter, moved)
    assert adapterpack.verify(adapter, adapter).equal
    # The third module of the model.
    assert [m.name for m in found.modules if m.rel_error > 1e-6] == ["model.layers.0.mlp.up_proj.weight"]


def test_another_torch_is_noticed(workshop, files, tmp_path: Path, monkeypatch) -> None:
    adapterpack.convert(workshop.adapter(BY_NAME["tinylora-projection-mixed"]), tmp_path / "seed", to="seed")
    true = torch.normal
    monkeypatch.setattr(torch, "normal", lambda *a, **k: true(*a, **k) * (1 + 2**-23))
    with pytest.raises(AdapterpackError, match="another set of tensors") as caught:
        adapterpack.convert(tmp_path / "seed", tmp_path / "back", to="projection")
    assert "another build of torch" in caught.value.hint


def test_names_that_differ_in_a_number_have_an_order() -> None:
    assert _model_order.in_order(["b.lin10", "b.lin0", "b.lin2"]) == (["b.lin0", "b.lin2", "b.lin10"], True)
    assert _model_order.in_order(["a.lin2", "a.conv"])[1] is False
    assert _model_order.in_order(["zig1", "zig0"]) == (["zig0", "zig1"], True)
    assert _model_order.in_order(["zig", "zag"])[1] is False
