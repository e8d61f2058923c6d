"""`verify`: honest copies are equal, every planted fault is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cases
import numpy as np
import oracle
import pytest
import torch
from peft import LoraConfig, VBLoRAConfig, VeraConfig
from safetensors.torch import load_file, save_file
from test_convert import relative

import adapterpack
from adapterpack.adapter import Param
from adapterpack.errors import UsageError, WrongBase
from adapterpack.tensor import from_numpy

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

# -- adapter against adapter -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*cases.LORA, *cases.VBLORA, *cases.VERA], ids=str)
def test_every_adapter_equals_itself(case, workshop) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    result = adapterpack.verify(adapter, adapter, base=base)
    assert result.equal
    assert (result.max_rel_error, result.max_abs_error, result.findings) == (0, 0, ())
    assert len(result.modules) > 0


@pytest.mark.parametrize("name", ["full-k3", "topk-k3", "full-conv1d", "full-bias-all", "full-modules-to-save"])
def test_encodings_and_methods_of_one_vblora_are_equal(name, workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    other = {"to": "topk"} if name.startswith("full") else {"to": "full-logits", "warm_start": True}
    adapterpack.convert(adapter, tmp_path / "encoding", **other)
    adapterpack.convert(adapter, tmp_path / "lora", to="lora")
    for a, b in [
        (adapter, tmp_path / "encoding"),
        (adapter, tmp_path / "lora"),
        (tmp_path / "lora", adapter),
        (tmp_path / "lora", tmp_path / "encoding"),
    ]:
        for with_base in (None, base):
            result = adapterpack.verify(a, b, base=with_base)
            assert result.equal, (a, b, result.findings)
            assert result.max_rel_error <= 2e-6


@pytest.mark.parametrize("name", ["projection-mixed", "projection-conv1d", "projection-bias-all"])
def test_encodings_and_methods_of_one_vera_are_equal(name, workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    adapterpack.convert(adapter, tmp_path / "seed", to="seed")
    adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base)
    for a, b in [
        (adapter, tmp_path / "seed"),
        (tmp_path / "seed", tmp_path / "lora"),
        (tmp_path / "lora", adapter),
    ]:
        for with_base in (None, base):
            result = adapterpack.verify(a, b, base=with_base)
            assert result.equal, (a, b, result.findings)
            assert result.max_rel_error == 0


def test_lora_of_another_rank_and_scale_is_equal_if_it_changes_w_the_same(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("rslora")
    tensors = files.tensors(adapter)
    doubled = {k: torch.cat([t, t], 0 if "lora_A" in k else 1) for k, t in tensors.items()}
    r, alpha = 4, 6
    scale = alpha / r**0.5
    config = {"r": 2 * r, "lora_alpha": scale * r, "use_rslora": False}
    result = adapterpack.verify(adapter, files.edited(adapter, tmp_path / "b", doubled, config))
    assert result.equal
    assert result.max_rel_error < 1e-6


@pytest.mark.parametrize("by", [1e-6, 3e-6, 2e-5, 1e-2])
def test_the_error_is_that_of_the_dense_change_and_the_bound_decides(by, workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    key = f"{Q0}.lora_B.weight"
    g = torch.Generator().manual_seed(1)
    old = files.tensors(adapter)
    moved = old[key] * (1 + by * torch.randn(old[key].shape, generator=g))
    other = files.edited(adapter, tmp_path / "b", {key: moved})
    a = old[f"{Q0}.lora_A.weight"].double()
    x, y = (b.double() @ a * 1.5 for b in (old[key], moved))
    dense = float((x - y).norm() / x.norm())
    result = adapterpack.verify(adapter, other)
    assert result.equal is (dense <= 5e-6)
    assert result.max_rel_error == pytest.approx(dense, rel=1e-3)
    assert result.max_abs_error == pytest.approx(float((x - y).abs().max()), rel=1e-3)
    worst = result.modules[0]
    assert worst.name == "model.layers.0.self_attn.q_proj.weight"
    assert [m.rel_error for m in result.modules[1:]] == [0.0] * (len(result.modules) - 1)
    assert adapterpack.verify(adapter, other, max_error=dense * 1.01).equal
    assert not adapterpack.verify(adapter, other, max_error=dense * 0.99).equal


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_missing_module_is_a_finding_on_either_side(side, workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    less = files.edited(adapter, tmp_path / "b", {f"{Q0}.lora_{x}.weight": None for x in "AB"})
    pair = (less, adapter) if side == "A" else (adapter, less)
    result = adapterpack.verify(*pair)
    assert not result.equal
    assert [(f.code, f.key) for f in result.findings] == [
        ("missing-module", "model.layers.0.self_attn.q_proj.weight")
    ]
    assert side in result.findings[0].message


def test_another_shape_is_a_finding(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    key = f"{Q0}.lora_B.weight"
    narrow = files.edited(adapter, tmp_path / "b", {key: files.tensors(adapter)[key][:32].clone()})
    result = adapterpack.verify(adapter, narrow)
    assert not result.equal
    assert [f.code for f in result.findings] == ["other-shape"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("both", [False, True])
def test_nan_and_infinity_are_never_equal(value, both, workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    key = f"{Q0}.lora_A.weight"
    poisoned = files.tensors(adapter)[key].clone()
    poisoned[0, 0] = value
    broken = files.edited(adapter, tmp_path / "b", {key: poisoned})
    result = adapterpack.verify(broken if both else adapter, broken, max_error=1e9)
    assert not result.equal
    assert "q_proj" in result.findings[0].key


def test_two_zero_changes_are_equal_and_something_against_nothing_is_not(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    key = f"{Q0}.lora_B.weight"
    zero = files.edited(adapter, tmp_path / "b", {key: torch.zeros_like(files.tensors(adapter)[key])})
    assert adapterpack.verify(zero, zero).equal
    result = adapterpack.verify(zero, adapter, max_error=1e9)
    assert not result.equal
    assert result.findings[0].key == "model.layers.0.self_attn.q_proj.weight"
    assert adapterpack.verify(adapter, zero).max_rel_error == pytest.approx(1)


REPLACED = [
    ("modules-to-save-head", "lm_head.weight"),
    ("bias-all-opt", "fc2.bias"),
    ("token-rows-list", "trainable_tokens_delta"),
    ("saved-embeddings-changed", "lm_head.base_layer.weight"),
    ("full-modules-to-save", "lm_head.weight"),
    ("projection-bias-all", "fc1.base_layer.bias"),
]


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("name, ending", REPLACED)
def test_replaced_tensors_take_part(name, ending, with_base, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    key = next(k for k in files.tensors(adapter) if k.endswith(ending))
    moved = files.tensors(adapter)[key].clone()
    moved.view(-1)[0] += 0.1
    result = adapterpack.verify(
        adapter, files.edited(adapter, tmp_path / "b", {key: moved}), base=base if with_base else None
    )
    assert not result.equal
    assert result.modules[0].rel_error > 1e-4
    gone = adapterpack.verify(adapter, files.edited(adapter, tmp_path / "c", {key: None}))
    assert not gone.equal


def test_the_same_values_in_other_rows_are_a_difference(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("token-rows-list")
    rows = files.config(adapter)["trainable_token_indices"]
    other = files.edited(adapter, tmp_path / "b", config={"trainable_token_indices": [rows[0], rows[1], 55]})
    for with_base in (None, base):
        result = adapterpack.verify(adapter, other, base=with_base)
        assert not result.equal
        assert "different rows" in result.findings[0].message


def test_the_same_rows_in_another_order_are_the_same_change(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("token-rows-list")
    rows = files.config(adapter)["trainable_token_indices"]
    key = next(k for k in files.tensors(adapter) if k.endswith("trainable_tokens_delta"))
    values = files.tensors(adapter)[key]
    turned = files.edited(adapter, tmp_path / "b", {key: values.flip(0)}, {"trainable_token_indices": rows[::-1]})
    wrong = files.edited(adapter, tmp_path / "c", {key: values.flip(0)})
    for with_base in (None, base):
        assert adapterpack.verify(adapter, turned, base=with_base).equal
        assert not adapterpack.verify(adapter, wrong, base=with_base).equal


@pytest.mark.parametrize("field, value", [("lora_alpha", 7), ("use_rslora", True), ("alpha_pattern", {"q_proj": 1})])
def test_another_scale_in_the_config_is_another_change(field, value, workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    result = adapterpack.verify(adapter, files.edited(adapter, tmp_path / "b", config={field: value}))
    assert not result.equal
    assert result.max_rel_error > 0.05


def test_dora_is_compared_through_the_weights_with_a_base(workshop, files, tmp_path: Path) -> None:
    case = cases.BY_NAME["dora-linear"]
    base = workshop.base_of(case)
    oracle.make_adapter(tmp_path / "a", case.config(), base=oracle.load_base(base), scale=0.01)
    key = f"{Q0}.lora_magnitude_vector"
    moved = files.tensors(tmp_path / "a")[key] * 1.001
    other = files.edited(tmp_path / "a", tmp_path / "b", {key: moved})
    plain = files.tensors(base)
    a, b = oracle.peft_merge(base, tmp_path / "a"), oracle.peft_merge(base, other)
    result = adapterpack.verify(tmp_path / "a", other, base=base)
    assert result.max_rel_error == pytest.approx(relative(a, b, plain, plain), rel=1e-3)
    assert not result.equal
    alone = adapterpack.verify(tmp_path / "a", other)
    assert not alone.equal
    assert any("parameter" in note for note in alone.notes)


def test_a_model_without_its_base_is_wrong_usage(workshop) -> None:
    adapter, base = workshop.pair("linear-llama")
    with pytest.raises(UsageError, match="merged"):
        adapterpack.verify(adapter, base)


# -- adapter and base against a merged model -----------------------------------------------------------------

HONEST = [
    "linear-llama",
    "conv1d-and-square-linear",
    "embedding-llama",
    "embedding-gpt2",
    "lora-bias",
    "patterns-rslora",
    "bias-all-opt",
    "modules-to-save-head",
    "token-rows-list",
    "saved-embeddings-changed",
    "dora-linear",
    "dora-conv1d",
    "dora-embedding",
    "full-k3",
    "topk-conv1d",
    "projection-mixed",
    "seed-opt",
]


def save_model(merged: oracle.Merged, where: Path) -> Path:
    return oracle.save_base(merged.model, where)


@pytest.mark.parametrize("safe_merge", [False, True], ids=["default", "safe"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", HONEST)
def test_honest_merges_by_peft_are_equal(name, dtype, safe_merge, workshop, tmp_path: Path) -> None:
    """`safe_merge=True` rounds the delta first: other bits, and just as honest."""
    adapter, base = workshop.pair(name, dtype)
    save_model(oracle.peft_merge(base, adapter, safe_merge=safe_merge), tmp_path / "m")
    result = adapterpack.verify(adapter, tmp_path / "m", base=base)
    assert result.equal, result.findings
    assert result.max_rel_error < {"f32": 1e-5, "bf16": 0.1, "f16": 0.02}[dtype]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("scale", [3e-3, 1e-2, 3e-2])
def test_honest_merges_of_small_changes_are_equal(scale, dtype, workshop, tmp_path: Path) -> None:
    """The change drowns in the rounding of the dtype, and no false alarm is raised."""
    base = workshop.base("llama", dtype)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"])
    for seed in range(3):
        where = tmp_path / str(seed)
        oracle.make_adapter(where / "a", config, base=oracle.load_base(base), scale=scale, seed=seed)
        for safe in (False, True):
            save_model(oracle.peft_merge(base, where / "a", safe_merge=safe), where / f"m{safe}")
            result = adapterpack.verify(where / "a", where / f"m{safe}", base=base)
            assert result.equal, (seed, safe, result.findings)


@pytest.mark.parametrize("rounding", ["peft", "once"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(
    "name", ["linear-llama", "dora-linear", "full-k3", "projection-opt", "saved-embeddings-changed"]
)
def test_our_own_merges_are_equal_sharded_too(name, dtype, rounding, workshop, tmp_path: Path) -> None:
    case = cases.BY_NAME[name]
    base = workshop.base(case.kind, dtype, shard="60KB")
    adapterpack.merge(workshop.adapter(case, dtype), base, tmp_path / "m", rounding=rounding)
    result = adapterpack.verify(workshop.adapter(case, dtype), tmp_path / "m", base=base)
    assert result.equal, result.findings


Tensors = dict[str, torch.Tensor]
Fault = Callable[[Tensors, Tensors], None]
"""Changes merged tensors in place; gets those of the base too."""

Q = "model.layers.0.self_attn.q_proj.weight"


def _delta(m: Tensors, w: Tensors, factor: float) -> None:
    for k in m:
        m[k] = (w[k].double() + (m[k].double() - w[k].double()) * factor).to(m[k].dtype)


def _skip_one(m: Tensors, w: Tensors) -> None:
    m[Q] = w[Q].clone()


def _one_weight(m: Tensors, w: Tensors) -> None:
    m[Q][7, 11] += 0.05


def _units_off(m: Tensors, w: Tensors) -> None:
    """Beyond the rounding of the dtype; in float32 the order of a sum alone moves a value by some units."""
    flat = m[Q].view(-1)
    n = int(flat.abs().argmax())
    for _ in range(50 if flat.dtype == torch.float32 else 3):
        flat[n] = torch.nextafter(flat[n], torch.tensor(9.0, dtype=flat.dtype))


def _untouched(m: Tensors, w: Tensors) -> None:
    key = "model.layers.1.input_layernorm.weight"
    m[key][3] = torch.nextafter(m[key][3], torch.tensor(9.0, dtype=m[key].dtype))


def _swapped(m: Tensors, w: Tensors) -> None:
    other = Q.replace("layers.0", "layers.1")
    m[Q], m[other] = m[other], m[Q]


def _transposed(m: Tensors, w: Tensors) -> None:
    m[Q] = (w[Q].float() + (m[Q].float() - w[Q].float()).T).to(w[Q].dtype)


def _nan(m: Tensors, w: Tensors) -> None:
    m[Q][0, 0] = float("nan")


def _missing(m: Tensors, w: Tensors) -> None:
    del m[Q]


def _added(m: Tensors, w: Tensors) -> None:
    m["stale.weight"] = torch.ones(2, 2)


def _other_dtype(m: Tensors, w: Tensors) -> None:
    m[Q] = m[Q].to(torch.float64)


FAULTS: dict[str, Fault] = {
    "one module skipped": _skip_one,
    "nothing merged": lambda m, w: m.update({k: v.clone() for k, v in w.items()}),
    "scale lost": lambda m, w: _delta(m, w, 1 / 1.5),
    "twice": lambda m, w: _delta(m, w, 2.0),
    "nine tenths": lambda m, w: _delta(m, w, 0.9),
    "sign flipped": lambda m, w: _delta(m, w, -1.0),
    "one weight": _one_weight,
    "a weight some units off": _units_off,
    "an untouched tensor": _untouched,
    "layers swapped": _swapped,
    "transposed": _transposed,
    "nan": _nan,
    "a tensor missing": _missing,
    "a tensor added": _added,
    "another dtype": _other_dtype,
}


def faulty(files, base: Path, merged: Path, where: Path, fault: Fault) -> Path:
    where.mkdir()
    shutil.copy(base / "config.json", where)
    m = {k: v.clone() for k, v in files.tensors(merged).items()}
    fault(m, files.tensors(base))
    save_file({k: v.contiguous() for k, v in m.items()}, where / "model.safetensors", metadata={"format": "pt"})
    return where


@pytest.fixture(scope="session")
def honest(workshop, tmp_path_factory):
    """(adapter, base, merged) by dtype, each made once; the adapter's alpha / r is 1.5."""
    made = {}

    def make(dtype: str) -> tuple[Path, Path, Path]:
        if dtype not in made:
            adapter, base = workshop.pair("linear-llama", dtype)
            merged = tmp_path_factory.mktemp("honest") / "m"
            adapterpack.merge(adapter, base, merged)
            made[dtype] = adapter, base, merged
        return made[dtype]

    return make


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, dtype, honest, files, tmp_path: Path) -> None:
    adapter, base, merged = honest(dtype)
    assert adapterpack.verify(adapter, merged, base=base).equal
    result = adapterpack.verify(adapter, faulty(files, base, merged, tmp_path / "m", FAULTS[name]), base=base)
    assert not result.equal
    keys = {f.key for f in result.findings}
    if name in ("one module skipped", "one weight", "a weight some units off", "nan", "transposed"):
        assert keys == {Q}
    if name == "an untouched tensor":
        assert keys == {"model.layers.1.input_layernorm.weight"}
    if name == "a tensor added":
        assert keys == {"stale.weight"}


@pytest.mark.parametrize("factor, said", [(2.0, "factor 2"), (0.9, "factor 0.9"), (-1.0, "factor -1")])
def test_a_wrong_scale_is_called_by_its_name(factor, said, honest, files, tmp_path: Path) -> None:
    adapter, base, merged = honest("f32")
    wrong = faulty(files, base, merged, tmp_path / "m", lambda m, w: _delta(m, w, factor))
    assert said in adapterpack.verify(adapter, wrong, base=base).findings[0].message


SMALL: dict[str, float] = {"nothing merged": 0.0, "twice": 2.0, "sign flipped": -1.0, "half": 0.5, "nine tenths": 0.9}


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", SMALL)
def test_a_fault_below_the_rounding_of_the_dtype_is_found(name, dtype, workshop, files, tmp_path: Path) -> None:
    """Each single weight lies within the rounding: only all of them together show that the scale is wrong."""
    base = workshop.base("llama", dtype)
    w = files.tensors(base)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"])
    scale = {"bf16": 4e-4, "f16": 5e-5}[dtype]
    oracle.make_adapter(tmp_path / "a", config, base=oracle.load_base(base), scale=scale)
    a = files.tensors(tmp_path / "a")
    wrong = {k: v.clone() for k, v in w.items()}
    for key in [k for k in a if "lora_B" in k]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        delta = a[key].double() @ a[key.replace("lora_B", "lora_A")].double()
        weight = w[f"{module}.weight"]
        unit = weight.double().abs() * {"bf16": 2.0**-8, "f16": 2.0**-11}[dtype]
        assert (delta.abs() < unit).double().mean() > 0.5, "the change is not below the rounding"
        wrong[f"{module}.weight"] = (weight.double() + delta * SMALL[name]).float().to(weight.dtype)
    shutil.copytree(base, tmp_path / "m")
    save_file(wrong, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    assert not adapterpack.verify(tmp_path / "a", tmp_path / "m", base=base).equal
    save_model(oracle.peft_merge(base, tmp_path / "a"), tmp_path / "honest")
    assert adapterpack.verify(tmp_path / "a", tmp_path / "honest", base=base).equal


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_a_model_merged_twice_is_found(dtype, honest, tmp_path: Path) -> None:
    adapter, base, merged = honest(dtype)
    adapterpack.merge(adapter, merged, tmp_path / "twice")
    assert not adapterpack.verify(adapter, tmp_path / "twice", base=base).equal


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_a_model_merged_from_another_base_is_found(dtype, honest, workshop, tmp_path: Path) -> None:
    adapter, base, _ = honest(dtype)
    other = workshop.base("llama", dtype, seed=99)
    adapterpack.merge(adapter, other, tmp_path / "m")
    result = adapterpack.verify(adapter, tmp_path / "m", base=base)
    assert not result.equal
    assert "model.embed_tokens.weight" in {f.key for f in result.findings}


def test_a_model_of_another_architecture_is_refused_or_found(honest, workshop) -> None:
    adapter, base, _ = honest("f32")
    assert not adapterpack.verify(adapter, workshop.base("gpt2"), base=base).equal
    with pytest.raises(WrongBase):
        adapterpack.verify(adapter, workshop.base("gpt2"), base=workshop.base("gpt2"))


def test_a_stale_head_and_a_drifted_head_of_a_tied_base_are_found(workshop, files, tmp_path: Path) -> None:
    """PEFT merges the input embeddings' change into the shared tensor: then the head computes something else."""
    base = workshop.base("llama", tie=True)
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    oracle.make_adapter(tmp_path / "a", config, base=oracle.load_base(base), scale=0.2)
    adapterpack.merge(tmp_path / "a", base, tmp_path / "ours")
    assert adapterpack.verify(tmp_path / "a", tmp_path / "ours", base=base).equal
    drifted = shutil.copytree(tmp_path / "ours", tmp_path / "drifted")
    tensors = files.tensors(drifted)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, drifted / "model.safetensors", metadata={"format": "pt"})
    result = adapterpack.verify(tmp_path / "a", drifted, base=base)
    assert {f.key for f in result.findings} == {"lm_head.weight"}
    tied = shutil.copytree(base, tmp_path / "tied")
    tensors = files.tensors(tmp_path / "ours")
    del tensors["lm_head.weight"]
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    assert not adapterpack.verify(tmp_path / "a", tied, base=base).equal


def test_weights_that_parted_under_a_config_that_ties_them_are_found(workshop, tmp_path: Path) -> None:
    """Right tensors, but config.json still says tied: a loader would throw the head away."""
    base = workshop.base("llama", tie=True)
    config = LoraConfig(r=4, target_modules=["lm_head"])
    oracle.make_adapter(tmp_path / "a", config, base=oracle.load_base(base), scale=0.2)
    adapterpack.merge(tmp_path / "a", base, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    assert not adapterpack.verify(tmp_path / "a", tmp_path / "m", base=base).equal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_logits_prove_a_model_that_was_merged_from_their_topk(dtype: torch.dtype, tmp_path: Path) -> None:
    base = oracle.save_base(oracle.tiny_model("llama", dtype), tmp_path / "base")
    config = VBLoRAConfig(r=4, num_vectors=60, vector_length=16, topk=3, target_modules=["q_proj", "down_proj"])
    oracle.make_adapter(tmp_path / "a", config, dtype=dtype, scale=1.0)
    adapterpack.compress(tmp_path / "a", tmp_path / "top")
    adapterpack.merge(tmp_path / "top", base, tmp_path / "m")
    assert adapterpack.verify(tmp_path / "a", tmp_path / "m", base=base).equal


def test_a_module_that_only_the_vera_side_has_is_a_finding_without_any_base(tmp_path: Path) -> None:
    base = oracle.save_base(oracle.tiny_model("llama"), tmp_path / "base")
    oracle.make_adapter(tmp_path / "a", VeraConfig(r=4, target_modules=["q_proj", "down_proj"]), scale=0.3)
    adapterpack.convert(tmp_path / "a", tmp_path / "lora", to="lora", base=base)
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    assert adapterpack.verify(tmp_path / "a", tmp_path / "lora").equal
    gone = "model.layers.1.mlp.down_proj"
    save_file({k: v for k, v in load_file(weights).items() if gone not in k}, weights, metadata={"format": "pt"})
    for a, b in (("a", "lora"), ("lora", "a")):
        result = adapterpack.verify(tmp_path / a, tmp_path / b)
        assert [(f.code, f.key) for f in result.findings] == [("missing-module", f"{gone}.weight")]


# -- figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", ["linear-llama", "conv1d", "embedding-llama", "dora-linear"])
def test_figures_are_those_of_dense_arithmetic(name, dtype, workshop, files, tmp_path: Path) -> None:
    """Norms, cosine and units in the last place, against the merged weights of both in f64."""
    adapter, base = workshop.pair(name, dtype)
    moved = {k: t * 1.01 for k, t in files.tensors(adapter).items() if "lora_B" in k or "embedding_B" in k}
    other = files.edited(adapter, tmp_path / "b", moved)
    w = {k: t.double() for k, t in files.tensors(workshop.base(cases.BY_NAME[name].kind, dtype)).items()}
    result = adapterpack.verify(adapter, other, base=base, device="cpu")
    assert result.against == "adapter" and result.base == str(base) and result.device == "torch cpu"
    merged = [oracle.peft_merge(oracle.load_base(base, torch.float64), d, autocast=False) for d in (adapter, other)]
    kind = cases.DTYPES[dtype]
    squares = {"d": 0.0, "x": 0.0}
    for module in result.modules:
        key = next(k for k in w if k.endswith(module.name))
        x, y = (m[next(k for k in m if k.endswith(module.name))].double() for m in merged)
        dx, dy, d = x - w[key], y - w[key], y - x
        assert module.norm == pytest.approx(float(dx.norm()), rel=1e-4)
        assert module.norm_b == pytest.approx(float(dy.norm()), rel=1e-4)
        assert module.difference == pytest.approx(float(d.norm()), rel=1e-3)
        assert module.cosine == pytest.approx(float((dx * dy).sum() / dx.norm() / dy.norm()), abs=1e-6)
        top = torch.maximum(x.abs(), w[key].abs()).to(kind)
        below = top.double() > torch.maximum(x.abs(), w[key].abs())
        top = torch.where(below, torch.nextafter(top, torch.zeros_like(top)), top)
        units = d.abs() / (torch.nextafter(top, torch.full_like(top, 9)).double() - top.double())
        assert module.mean_ulp == pytest.approx(float(units.mean()), rel=2e-3)
        assert module.max_ulp == pytest.approx(float(units.max()), rel=2e-2)
        assert module.dtype == {"f32": "F32", "bf16": "BF16", "f16": "F16"}[dtype]
        squares = {"d": squares["d"] + float(d.norm()) ** 2, "x": squares["x"] + float(dx.norm()) ** 2}
    assert result.pooled.rel_error == pytest.approx((squares["d"] / squares["x"]) ** 0.5, rel=1e-3)
    assert result.pooled.modules == len(result.modules)
    assert result.pooled.max_ulp == max(m.max_ulp for m in result.modules)


def test_ranks_are_told_and_parameters_are_not_called_norms_of_a_change(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    tensors = files.tensors(adapter)
    doubled = {k: torch.cat([t, t], 0 if "lora_A" in k else 1) for k, t in tensors.items()}
    result = adapterpack.verify(adapter, files.edited(adapter, tmp_path / "b", doubled, {"r": 8, "lora_alpha": 6}))
    assert {(m.rank_a, m.rank_b) for m in result.modules} == {(4, 8)}
    dora, _ = workshop.pair("dora-linear")
    alone = adapterpack.verify(dora, dora)
    assert alone.equal and alone.pooled.modules == 0
    assert {(m.norm, m.cosine, m.mean_ulp) for m in alone.modules} == {(None, None, None)}


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_a_merged_model_is_told_beside_what_rounding_leaves(dtype, honest) -> None:
    adapter, base, merged = honest(dtype)
    result = adapterpack.verify(adapter, merged, base=base, device="cpu")
    assert result.against == "merged" and result.method_b is None
    for m in result.modules:
        assert m.rel_error <= m.bound and m.factor == pytest.approx(1, abs=1e-3)
        assert m.rank_a == 4 and m.arithmetic == "once"
        if dtype != "f32":
            assert m.rel_error == pytest.approx(m.floor, rel=0.15)
            assert m.mean_ulp == pytest.approx(0.25, abs=0.02)
            assert 0.49 < m.max_ulp <= 0.51
    assert any("rounded once" in note for note in result.notes)


# -- seeds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_how_seeded_tensors_were_drawn_is_found_and_said(dtype, workshop) -> None:
    adapter, base = workshop.pair("projection-key", dtype)
    result = adapterpack.verify(adapter, adapter, base=base, device="cpu")
    through = {"f32": "F32", "bf16": "BF16", "f16": "F16"}[dtype]
    drawn = [r for r in result.regenerated if r.side == "A"]
    assert {(r.name, r.by) for r in drawn} == {(n, b) for n in ("vera_A", "vera_B") for b in ("numpy", "torch cpu")}
    numpy = {(r.arithmetic, r.through, r.against, r.agrees) for r in drawn if r.by == "numpy"}
    assert len(numpy) == 1
    arithmetic, *rest = numpy.pop()
    assert rest == [through, "stored tensor", True] and arithmetic in ("fused", "two-roundings")
    assert any(f"in {arithmetic} arithmetic" in n and "give the same bits" in n for n in result.notes)


def test_projections_of_no_known_seed_are_a_note_and_no_fault(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("projection-key")
    other = files.edited(adapter, tmp_path / "b", config={"projection_prng_key": 9})
    result = adapterpack.verify(other, other, device="cpu")
    assert result.equal
    assert any("no known arithmetic" in n for n in result.notes)
    assert {r.agrees for r in result.regenerated} == {False}


@pytest.mark.parametrize("arithmetic", ["fused", "two-roundings"])
@pytest.mark.parametrize("through", ["F32", "BF16", "F16"])
def test_the_arithmetic_of_a_recipe_on_a_device_is_that_of_numpy(arithmetic, through) -> None:
    from adapterpack import regeneration
    from adapterpack.backend import TorchBackend
    from adapterpack.methods import METHODS
    from adapterpack.tensor import DTYPES

    bank = {"vera_A": (5, 301), "vera_B": (203, 5)}
    shared = {n: Param(f"base_model.{n}", from_numpy(np.zeros(s, np.float32))) for n, s in bank.items()}
    a = SimpleNamespace(encoding="projection", shared=shared, config={"projection_prng_key": 77, "r": 5}, modules={})
    a.modules["m"] = {"lambda_b": Param("b", from_numpy(np.zeros(203, np.float32)))}
    a.modules["m"] |= {"lambda_d": Param("d", from_numpy(np.zeros(5, np.float32)))}
    found = [r for r in METHODS["VERA"].recipes(a) if (r.arithmetic, r.through) == (arithmetic, DTYPES[through])]
    assert len(found) == 1
    drawn = regeneration.on_device(TorchBackend("cpu"), found[0])
    assert {n: t.digest() for n, t in drawn.items()} == {n: t.digest() for n, t in found[0].draw().items()}
