"""`compress` to a directory: smaller, still the adapter, and read back by stock PEFT."""

from __future__ import annotations

import shutil
from pathlib import Path

import cases
import oracle
import pytest
import torch
from peft import LoraConfig
from test_convert import assert_loads_in_peft, relative

import adapterpack
from adapterpack.errors import DestinationExists, UsageError


def low_rank(workshop, files, name: str, where: Path, noise: float = 1e-3) -> Path:
    """A LoRA whose changes have one large singular value and small others, so that rank can be cut."""
    adapter, _ = workshop.pair(name)
    g = torch.Generator().manual_seed(2)
    edits = {}
    for key, t in files.tensors(adapter).items():
        if "lora_A" in key or "lora_embedding_A" in key:
            scale = torch.full((t.shape[0], 1), noise)
            scale[0] = 1.0
            edits[key] = torch.randn(t.shape, generator=g) * scale
    return files.edited(adapter, where, edits)


# -- by default ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [c.name for c in cases.VBLORA if c.name.startswith("full")])
def test_full_logits_become_topk(name, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    result = adapterpack.compress(adapter, tmp_path / "c")
    if name == "full-k-is-all":
        # All logits are kept, so indices would come on top.
        assert (result.encoding, result.grade) == ("full-logits", "lossless")
        return
    assert (result.encoding, result.grade) == ("topk", "equivalent")
    assert result.bytes_out < result.bytes_in
    assert result.bytes_out == oracle.adapter_bytes(tmp_path / "c")
    assert any("logits" in d for d in result.dropped)
    assert_loads_in_peft(workshop, base, tmp_path / "c", adapter)
    plain = files.tensors(base)
    assert relative(workshop.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "c"), plain, plain) <= 2e-6


@pytest.mark.parametrize(
    "name", ["linear-llama", "dora-conv1d", "topk-k2", "projection-mixed", "seed-mixed", "rslora"]
)
def test_where_nothing_is_gained_the_result_is_a_copy_and_says_so(name, workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair(name)
    result = adapterpack.compress(adapter, tmp_path / "c")
    assert oracle.tree_hash(tmp_path / "c") == oracle.tree_hash(adapter)
    assert (result.grade, result.max_rel_error, result.dropped) == ("lossless", 0, ())
    note = " ".join(result.notes)
    assert "copy" in note
    assert "--dtype" in note
    assert "--max-error" in note


def test_projections_stay_because_peft_redraws_them_by_base_and_cpu(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("projection-mixed", "bf16")
    adapterpack.compress(adapter, tmp_path / "c")
    assert {"base_model.vera_A", "base_model.vera_B"} <= files.tensors(tmp_path / "c").keys()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_projections_of_a_bf16_base_are_stored_in_16_bits_and_load_the_same(
    dtype, workshop, files, tmp_path: Path
) -> None:
    adapter, _ = workshop.pair("projection-mixed", "bf16")
    base = workshop.base_of(cases.BY_NAME["projection-mixed"], dtype)
    result = adapterpack.compress(adapter, tmp_path / "c")
    new = files.tensors(tmp_path / "c")
    assert (result.grade, result.max_rel_error) == ("equivalent", 0)
    assert new["base_model.vera_A"].dtype == torch.bfloat16
    old = files.tensors(adapter)
    assert 2 * new["base_model.vera_B"].nbytes == old["base_model.vera_B"].nbytes
    assert result.bytes_out < result.bytes_in
    a, b = workshop.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "c")
    assert all(files.same(a[k], b[k]) for k in a)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear-llama", "conv1d", "dora-embedding", "lora-bias"])
def test_float32_that_really_is_16_bits_is_narrowed_exactly(name, target, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    rounded = {k: t.to(target).float() for k, t in files.tensors(adapter).items() if "lora_" in k}
    wide = files.edited(adapter, tmp_path / "wide", rounded)
    result = adapterpack.compress(wide, tmp_path / "c")
    assert (result.grade, result.max_rel_error) == ("equivalent", 0)
    old, new = files.tensors(wide), files.tensors(tmp_path / "c")
    assert {new[k].dtype for k in rounded} == {target}
    assert all(torch.equal(new[k].float(), old[k].float()) for k in old)
    assert_loads_in_peft(workshop, base, tmp_path / "c", adapter)
    a, b = oracle.peft_merge(base, wide), oracle.peft_merge(base, tmp_path / "c")
    assert all(files.same(a[k], b[k]) for k in a)


def test_a_single_value_that_needs_32_bits_keeps_its_tensor_wide(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    rounded = {k: t.bfloat16().float() for k, t in files.tensors(adapter).items()}
    odd = next(k for k in rounded if "lora_B" in k)
    rounded[odd][1, 1] = 1 + 2**-20
    adapterpack.compress(files.edited(adapter, tmp_path / "wide", rounded), tmp_path / "c")
    kinds = {k: t.dtype for k, t in files.tensors(tmp_path / "c").items()}
    assert [k for k, d in kinds.items() if d == torch.float32] == [odd]


def test_16_bit_topk_weights_are_never_written(workshop, files, tmp_path: Path) -> None:
    """Weights of exactly 1/2 would fit in 16 bits, and PEFT could not load them."""
    adapter, base = workshop.pair("topk-k2")
    halves = {k: torch.full_like(t, 0.5) for k, t in files.tensors(adapter).items() if k.endswith("_topk_weights")}
    even = files.edited(adapter, tmp_path / "a", halves)
    adapterpack.compress(even, tmp_path / "c")
    assert {t.dtype for k, t in files.tensors(tmp_path / "c").items() if k.endswith("_topk_weights")} == {
        torch.float32
    }
    assert_loads_in_peft(workshop, base, tmp_path / "c")


# -- saved embeddings ------------------------------------------------------------------------------------


def test_saved_embeddings_that_are_the_base_s_own_are_dropped_with_base(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("saved-embeddings")
    saved = [k for k in files.tensors(adapter) if "lora_" not in k]
    assert saved
    result = adapterpack.compress(adapter, tmp_path / "c", base=base)
    assert result.bytes_out < result.bytes_in
    assert not set(saved) & files.tensors(tmp_path / "c").keys()
    assert all(any(k in d for d in result.dropped) for k in saved)
    load = oracle.peft_load(base, tmp_path / "c")[1]
    assert set(load.missing) <= set(saved)
    assert load.unexpected == []
    a, b = workshop.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "c")
    assert all(files.same(a[k], b[k]) for k in a)


def test_saved_embeddings_stay_without_a_base(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("saved-embeddings")
    adapterpack.compress(adapter, tmp_path / "c")
    assert oracle.tree_hash(tmp_path / "c") == oracle.tree_hash(adapter)


def test_saved_embeddings_that_were_trained_stay(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("saved-embeddings-changed")
    adapterpack.compress(adapter, tmp_path / "c", base=base)
    old, new = files.tensors(adapter), files.tensors(tmp_path / "c")
    changed = [k for k in old if "base_layer" in k]
    assert changed
    assert all(files.same(old[k], new[k]) for k in changed)


@pytest.mark.parametrize("name", ["modules-to-save-head", "bias-all-opt"])
def test_trained_tensors_stay_whatever_the_base(name, workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    adapterpack.compress(adapter, tmp_path / "c", base=base)
    assert oracle.tree_hash(tmp_path / "c") == oracle.tree_hash(adapter)


# -- within an error -------------------------------------------------------------------------------------

ADDITIVE = [
    "linear-llama",
    "conv1d",
    "embedding-llama",
    "rslora",
    "patterns-that-overlap",
    "patterns-rslora",
    "lora-bias",
    "saved-embeddings",
    "modules-to-save-head",
    "bias-all-opt",
]


@pytest.mark.parametrize("bound", [3e-3, 5e-2, 0.4])
@pytest.mark.parametrize("name", ADDITIVE)
def test_max_error_cuts_rank_and_dtype_and_keeps_its_word(name, bound, workshop, files, tmp_path: Path) -> None:
    adapter, base = low_rank(workshop, files, name, tmp_path / "a"), workshop.pair(name)[1]
    result = adapterpack.compress(adapter, tmp_path / "c", max_error=bound)
    assert (result.grade, result.method) == ("approximate", "lora")
    assert 0 < result.max_rel_error <= bound
    assert_loads_in_peft(workshop, base, tmp_path / "c")
    plain = files.tensors(base)
    a, b = oracle.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "c")
    assert relative(a, b, plain, plain) <= bound * 1.001
    assert sum(t.nbytes for k, t in files.tensors(tmp_path / "c").items() if "lora_" in k) <= 0.55 * sum(
        t.nbytes for k, t in files.tensors(adapter).items() if "lora_" in k
    )
    assert adapterpack.verify(adapter, tmp_path / "c", max_error=bound).equal
    assert adapterpack.check(tmp_path / "c", base=base).healthy
    replaced = [k for k in files.tensors(adapter) if "lora_" not in k]
    assert all(files.same(files.tensors(adapter)[k], files.tensors(tmp_path / "c")[k]) for k in replaced)


def test_a_larger_bound_never_gives_a_larger_file(workshop, files, tmp_path: Path) -> None:
    adapter = low_rank(workshop, files, "linear-llama", tmp_path / "a", noise=0.05)
    sizes = [
        adapterpack.compress(adapter, tmp_path / str(bound), max_error=bound).bytes_out
        for bound in (1e-9, 1e-4, 3e-3, 3e-2, 0.2, 0.9)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) >= 3


@pytest.mark.parametrize("name", ["full-k3", "topk-k3", "projection-mixed", "seed-mixed"])
def test_max_error_casts_other_methods_within_the_bound(name, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    result = adapterpack.compress(adapter, tmp_path / "c", max_error=2e-2, base=base)
    assert result.grade == "approximate"
    assert 0 < result.max_rel_error <= 2e-2
    assert_loads_in_peft(workshop, base, tmp_path / "c", adapter)
    plain = files.tensors(base)
    a, b = workshop.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "c")
    assert relative(a, b, plain, plain) <= 2e-2
    assert result.bytes_out < result.bytes_in


@pytest.mark.parametrize("bound", [1e-3, 1e-2, 0.2])
@pytest.mark.parametrize("name", ["dora-linear", "dora-conv1d", "dora-embedding"])
def test_dora_with_a_base_is_held_to_the_change_of_w_itself(name, bound, workshop, files, tmp_path: Path) -> None:
    """Its magnitudes are of the size of W: rounding them moves the small change of W far."""
    case = cases.BY_NAME[name]
    base = workshop.base_of(case)
    oracle.make_adapter(tmp_path / "a", case.config(), base=oracle.load_base(base), scale=0.01)
    result = adapterpack.compress(tmp_path / "a", tmp_path / "c", max_error=bound, base=base)
    plain = files.tensors(base)
    a, b = oracle.peft_merge(base, tmp_path / "a"), oracle.peft_merge(base, tmp_path / "c")
    assert relative(a, b, plain, plain) <= bound
    if result.grade == "approximate":
        assert result.max_rel_error == pytest.approx(relative(a, b, plain, plain), rel=0.05)


def test_dora_without_a_base_is_compared_by_parameter_and_says_so(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("dora-linear")
    result = adapterpack.compress(adapter, tmp_path / "c", max_error=1e-2)
    assert result.grade == "approximate"
    assert any("parameter" in note for note in result.notes)


def test_a_bound_that_nothing_meets_gives_a_copy(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    result = adapterpack.compress(adapter, tmp_path / "c", max_error=1e-6)
    assert (result.grade, result.max_rel_error) == ("lossless", 0)
    assert oracle.tree_hash(tmp_path / "c") == oracle.tree_hash(adapter)


# -- in general ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full-k2", "linear-llama", "projection-mixed", "saved-embeddings"])
def test_lossless_keeps_every_tensor_and_file(name, workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    result = adapterpack.compress(adapter, tmp_path / "c", lossless=True, base=base)
    assert result.grade == "lossless"
    assert oracle.tree_hash(tmp_path / "c") == oracle.tree_hash(adapter)


def test_lossless_and_max_error_exclude_each_other(workshop, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        adapterpack.compress(workshop.pair("full-k2")[0], tmp_path / "c", lossless=True, max_error=0.1)


WAYS = {"default": ("full-k3", {}), "cut": ("linear-llama", {"max_error": 0.3}), "vera": ("projection-mixed", {})}


@pytest.mark.parametrize("way", WAYS)
def test_deterministic_input_unchanged_dry_run_the_same(way, workshop, tmp_path: Path) -> None:
    name, how = WAYS[way]
    adapter, _ = workshop.pair(name)
    before = oracle.tree_hash(adapter)
    dry = adapterpack.compress(adapter, tmp_path / "one", dry_run=True, **how)
    assert list(tmp_path.iterdir()) == []
    wet = adapterpack.compress(adapter, tmp_path / "one", **how)
    adapterpack.compress(adapter, tmp_path / "two", **how)
    assert dry == wet
    assert oracle.tree_hash(tmp_path / "one") == oracle.tree_hash(tmp_path / "two")
    assert oracle.tree_hash(adapter) == before


def test_compressing_twice_gains_nothing_more(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("full-k3")
    adapterpack.compress(adapter, tmp_path / "one")
    again = adapterpack.compress(tmp_path / "one", tmp_path / "two")
    assert again.grade == "lossless"
    assert oracle.tree_hash(tmp_path / "one") == oracle.tree_hash(tmp_path / "two")


def test_existing_destinations_and_sources_are_safe(workshop, tmp_path: Path) -> None:
    adapter = shutil.copytree(workshop.pair("full-k2")[0], tmp_path / "a")
    before = oracle.tree_hash(adapter)
    (tmp_path / "c").mkdir()
    with pytest.raises(DestinationExists):
        adapterpack.compress(adapter, tmp_path / "c")
    with pytest.raises(adapterpack.AdapterpackError):
        adapterpack.compress(adapter, adapter, overwrite=True)
    adapterpack.compress(adapter, tmp_path / "c", overwrite=True)
    assert oracle.tree_hash(adapter) == before


def test_a_topk_file_that_peft_cannot_load_right_is_mended(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("topk-k3")
    broken = {
        k: torch.tensor([0.6, 0.4000001]).expand(t.shape).clone()
        for k, t in files.tensors(adapter).items()
        if k.endswith("logits_B_topk_weights")
    }
    odd = files.edited(adapter, tmp_path / "a", broken)
    assert any(torch.isnan(t).any() for t in oracle.peft_merge(base, odd).values())
    adapterpack.convert(odd, tmp_path / "c", to="topk")
    assert not any(torch.isnan(t).any() for t in oracle.peft_merge(base, tmp_path / "c").values())
    assert adapterpack.verify(odd, tmp_path / "c").equal


def test_trained_conv1d_of_square_shape_survives_a_cut(workshop, files, tmp_path: Path) -> None:
    base = workshop.base("gpt2")
    config = LoraConfig(r=4, target_modules=["attn.c_proj"])
    oracle.make_adapter(tmp_path / "a", config, "gpt2", base=oracle.load_base(base))
    adapterpack.compress(tmp_path / "a", tmp_path / "c", max_error=0.6)
    plain = files.tensors(base)
    a, b = oracle.peft_merge(base, tmp_path / "a"), oracle.peft_merge(base, tmp_path / "c")
    assert 1e-3 < relative(a, b, plain, plain) <= 0.6
