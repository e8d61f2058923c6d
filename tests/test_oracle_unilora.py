"""UniLoRA merges are PEFT's `merge_and_unload`, bit for bit, with saved indices and from theta alone."""

from __future__ import annotations

from pathlib import Path

import cases
import numpy as np
import oracle
import pytest
import torch
from bitexact import assert_merges_like_peft, codes
from peft import UniLoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.tuners.unilora.model import UniLoraModel

import adapterpack
from adapterpack import draws
from adapterpack.errors import AdapterpackError, InvalidFile, LossRefused, Unsupported, WrongBase
from adapterpack.methods._targets import targeted


def _uni(save=True, **fields):
    return lambda: UniLoraConfig(
        **{
            "r": 3,
            "theta_d_length": 101,
            "save_indices": save,
            "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"],
            **fields,
        }
    )


CASES = tuple(
    case
    for save in (True, False)
    for word in ("unilora-projection" if save else "unilora-seed",)
    for case in (
        cases.Case(f"{word}-mixed", _uni(save), scale=0.5),
        # As many elements as places, and more of them: no rest, nothing but a rest.
        cases.Case(f"{word}-even", _uni(save, theta_d_length=96, r=2, proj_seed=7, target_modules=["q_proj"])),
        cases.Case(f"{word}-long", _uni(save, theta_d_length=20_000), scale=0.5),
        cases.Case(f"{word}-conv1d", _uni(save, target_modules=["c_attn", "c_proj"]), "gpt2", scale=0.5),
        cases.Case(f"{word}-opt", _uni(save, target_modules=["q_proj", "k_proj", "fc1", "project_in"]), "opt"),
        cases.Case(f"{word}-bert", _uni(save, target_modules=["query", "intermediate.dense"]), "bert", scale=0.5),
        cases.Case(f"{word}-regex", _uni(save, target_modules=r".*\.1\.self_attn\.[qv]_proj"), scale=0.5),
        cases.Case(f"{word}-layers", _uni(save, layers_to_transform=[1], layers_pattern="layers"), scale=0.5),
        cases.Case(f"{word}-all-linear", _uni(save, target_modules="all-linear"), scale=0.5),
        cases.Case(f"{word}-bias-all", _uni(save, bias="all", target_modules=["q_proj", "fc1"]), "opt"),
        cases.Case(f"{word}-modules-to-save", _uni(save, modules_to_save=["lm_head"]), scale=0.5),
    )
)
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


_KEPT = ["mixed", "even", "long", "conv1d", "opt", "bert"]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", _KEPT)
def test_indices_go_and_come_back(name, dtype, workshop, files, tmp_path: Path) -> None:
    case = BY_NAME[f"unilora-projection-{name}"]
    adapter = workshop.adapter(case, dtype)
    gone = adapterpack.convert(adapter, tmp_path / "seed", to="seed")
    assert str(gone.grade) == "lossless"
    assert list(files.tensors(tmp_path / "seed")) == ["base_model.unilora_theta_d"]
    # Where the recipe is recorded no base is needed, and PEFT draws the same.
    back = adapterpack.convert(tmp_path / "seed", tmp_path / "back", to="projection")
    assert str(back.grade) == "lossless"
    before, after = files.tensors(adapter), files.tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(files.same(before[key], after[key]) for key in before)
    base = workshop.base_of(case, dtype)
    one, other = workshop.peft_merge(base, tmp_path / "seed"), workshop.peft_merge(base, adapter)
    assert all(files.same(one[key], other[key]) for key in other)


@pytest.mark.parametrize("name", _KEPT)
def test_a_pack_has_no_indices(name, workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(BY_NAME[f"unilora-projection-{name}"])
    adapterpack.compress(adapter, tmp_path / "a.apack")
    places = adapterpack.inspect(tmp_path / "a.apack").pack.not_stored
    assert places == {"recipe": len(files.tensors(adapter)) - 1}
    adapterpack.unpack(tmp_path / "a.apack", tmp_path / "back")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (adapter / weights).read_bytes()


@pytest.mark.parametrize("word", ["projection", "seed"])
@pytest.mark.parametrize("name", _KEPT)
def test_its_lora_merges_to_the_same_bits(name, word, workshop, files, tmp_path: Path) -> None:
    case = BY_NAME[f"unilora-{word}-{name}"]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base)
    assert str(made.grade) == "equivalent"
    assert made.max_rel_error == 0
    lora, uni = workshop.peft_merge(base, tmp_path / "lora"), workshop.peft_merge(base, adapter)
    assert all(files.same(lora[key], uni[key]) for key in uni)


@pytest.mark.parametrize(
    ("length", "total"), [(5, 12), (101, 1), (1, 40), (96, 192), (20_000, 3_000), (11_000, 10_500)]
)
@pytest.mark.parametrize("seed", [0, 42, 2**40])
def test_balanced_draws_are_pefts(length, total, seed) -> None:
    theirs = UniLoraModel.generate_index(total, length, seed).numpy()
    assert np.array_equal(draws.balanced(length, total, seed), theirs)


def test_published_indices() -> None:
    assert draws.balanced(5, 12, 42).tolist() == [3, 3, 4, 1, 0, 3, 4, 0, 2, 1, 2, 0]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "fc1"]},
        {"target_modules": ["layers.1.self_attn.q_proj", "model.decoder.layers.0.fc1"]},
        {"target_modules": r".*\.(0|1)\.fc[12]"},
        {"target_modules": "fc1|.*fc2"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.k_proj"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["layers"]},
        {"target_modules": ["q_proj", "project_in"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "h"},
        {"target_modules": ["model.decoder.layers.1.fc1"], "layers_to_transform": [0]},
    ],
    ids=str,
)
def test_targets_are_pefts(fields) -> None:
    model = oracle.tiny_model("opt")
    names = [name for name, _ in model.named_modules()]
    later = ("layers_to_transform", "layers_pattern", "exclude_modules")
    config = UniLoraConfig(**{k: v for k, v in fields.items() if k not in later})
    for field in later:
        setattr(config, field, fields.get(field))
    theirs = [name for name in names if check_target_module_exists(config, name)]
    assert targeted(fields, names) == theirs


def test_a_base_that_is_no_more_than_a_config_is_refused(workshop, tmp_path: Path) -> None:
    adapter = workshop.adapter(BY_NAME["unilora-seed-mixed"])
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((workshop.base() / "config.json").read_bytes())
    with pytest.raises(WrongBase, match="none of the modules"):
        adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base)
    with pytest.raises(WrongBase, match="needs the base"):
        adapterpack.verify(adapter, adapter)


def test_an_order_that_nothing_tells_is_refused(files, tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zig, self.zag = torch.nn.Linear(6, 4), torch.nn.Linear(4, 6)

    for save in (True, False):
        made = get_peft_model(Odd(), _uni(save, target_modules=["zig", "zag"], theta_d_length=9)())
        made.save_pretrained(tmp_path / str(save))
    base = tmp_path / "base"
    base.mkdir()
    from safetensors.torch import save_file

    save_file(Odd().state_dict(), base / "model.safetensors")
    with pytest.raises(Unsupported, match="the order in which the model defines these modules is not known"):
        adapterpack.merge(tmp_path / "False", base, tmp_path / "m")
    # Saved indices need none.
    adapterpack.merge(tmp_path / "True", base, tmp_path / "m")
    with pytest.raises(LossRefused):
        adapterpack.convert(tmp_path / "True", tmp_path / "seed", to="seed")


def test_what_does_not_fit_is_refused(workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["unilora-projection-mixed"]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    tensors = files.tensors(adapter)
    key = next(k for k in tensors if k.endswith("q_proj.unilora_indices_A"))
    outside, negative = tensors[key].clone(), tensors[key].clone()
    outside[0, 0], negative[0, 0] = 101, -1
    edits = {
        "outside": {key: outside},
        "negative": {key: negative},
        "half": {key: None},
        "other-shape": {key: tensors[key][:, 1:]},
        "other-dtype": {key: tensors[key].int()},
        "no-theta": {"base_model.unilora_theta_d": None},
        "matrix": {"base_model.unilora_theta_d": tensors["base_model.unilora_theta_d"][None]},
    }
    for name, edit in edits.items():
        with pytest.raises(InvalidFile):
            adapterpack.merge(files.edited(adapter, tmp_path / name, edit), base, tmp_path / "m")
        assert not (tmp_path / "m").exists(), name
    seed = workshop.adapter(BY_NAME["unilora-seed-mixed"])
    for n, config in enumerate([{"proj_seed": -1}, {"r": 0}, {"target_modules": 5}, {"layers_to_transform": ["a"]}]):
        with pytest.raises(AdapterpackError):
            adapterpack.merge(files.edited(seed, tmp_path / str(n), config=config), base, tmp_path / "m")
    other = files.edited(seed, tmp_path / "longer", config={"theta_d_length": 5})
    assert "theta-length" in codes(adapterpack.check(other))


def test_a_moved_element_is_found(workshop, files, tmp_path: Path) -> None:
    for word in ("projection", "seed"):
        case = BY_NAME[f"unilora-{word}-mixed"]
        adapter, base = workshop.adapter(case), workshop.base_of(case)
        key = "base_model.unilora_theta_d"
        theta = files.tensors(adapter)[key].clone()
        theta[3] += 0.1
        moved = files.edited(adapter, tmp_path / word, {key: theta})
        assert adapterpack.verify(adapter, adapter, base=base).equal
        assert not adapterpack.verify(adapter, moved, base=base).equal
