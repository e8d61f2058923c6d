"""The merged directory: shards, untouched bytes, other files, tied embeddings, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import cases
import oracle
import pytest
import torch
from peft import LoraConfig, VBLoRAConfig, VeraConfig
from safetensors.torch import save_file

import adapterpack
from adapterpack.errors import (
    DestinationExists,
    InvalidFile,
    LossRefused,
    NothingChanged,
    Unsupported,
    UsageError,
    WrongBase,
)

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [90, 7, 1, 0, 33, 50, 8, 8]])


# -- the directory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", ["linear-llama", "conv1d-and-linear", "dora-linear", "full-k2", "projection-opt"])
def test_sharded_base_keeps_its_shards_index_and_headers(name, dtype, workshop, files, tmp_path: Path) -> None:
    case = cases.BY_NAME[name]
    adapter = workshop.adapter(case, dtype)
    base = workshop.base(case.kind, dtype, shard="60KB", **case.over)
    shards = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(shards) >= 3
    expected = workshop.peft_merge(workshop.base_of(case, dtype), adapter)
    result = adapterpack.merge(adapter, base, tmp_path / "m", verify="full")
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert names == {p.name for p in base.iterdir()} | {"adapterpack_lineage.json"}
    for name_of_file in (*shards, "model.safetensors.index.json", "config.json"):
        old, new = base / name_of_file, tmp_path / "m" / name_of_file
        if name_of_file in shards:
            assert files.header(new) == files.header(old)
        else:
            assert new.read_bytes() == old.read_bytes()
    merged = files.tensors(tmp_path / "m")
    assert merged.keys() == files.tensors(base).keys()
    assert all(files.same(merged[k], expected[k]) for k in merged)
    assert result.bytes_written == oracle.adapter_bytes(tmp_path / "m")


def test_shards_without_a_touched_tensor_are_the_very_bytes_of_the_base(workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama", shard="60KB")
    oracle.make_adapter(
        tmp_path / "a",
        LoraConfig(target_modules=r".*layers\.1\.self_attn\.q_proj"),
        base=oracle.load_base(base),
    )
    result = adapterpack.merge(tmp_path / "a", base, tmp_path / "m")
    assert (result.tensors_changed, result.modules_merged) == (1, 1)
    same = [p.name for p in base.glob("*.safetensors") if p.read_bytes() == (tmp_path / "m" / p.name).read_bytes()]
    assert len(same) == len(list(base.glob("*.safetensors"))) - 1


def test_header_bytes_and_metadata_of_the_base_survive(workshop, files, tmp_path: Path) -> None:
    """Order, padding and unknown metadata of the header are the base's, not ours."""
    adapter, original = workshop.pair("linear-llama")
    base = shutil.copytree(original, tmp_path / "base")
    weights = base / "model.safetensors"
    data = weights.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = {"format": "pt", "someone": "else's"}
    reversed_header = json.dumps(dict(reversed(header.items())), indent=1).encode() + b" " * 40
    weights.write_bytes(len(reversed_header).to_bytes(8, "little") + reversed_header + data[8 + size :])
    adapterpack.merge(adapter, base, tmp_path / "m")
    assert files.header(tmp_path / "m" / "model.safetensors") == files.header(weights)
    expected = workshop.peft_merge(original, adapter)
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[k]) for k in merged)


def test_other_files_are_carried_and_other_weights_left_out_and_named(workshop, tmp_path: Path) -> None:
    adapter, original = workshop.pair("linear-llama")
    base = shutil.copytree(original, tmp_path / "base")
    carried = {
        "tokenizer.json": b"{}",
        "vocab.txt": b"a\nb\n",
        "chat_template.jinja": b"{{ x }}",
        "modeling_custom.py": b"# code that the config names\n",
        "LICENSE": b"mine",
        "1_Pooling/config.json": b'{"x": 1}',
        ".gitattributes": b"* text\n",
    }
    left = {
        "pytorch_model.bin": b"pickle",
        "pytorch_model.bin.index.json": b"{}",
        "tf_model.h5": b"h5",
        "flax_model.msgpack": b"mp",
        "model.gguf": b"GGUF",
        "onnx/model.onnx": b"onnx",
        "consolidated.00.pth": b"pickle",
        "model.fp16.safetensors": b"not even read",
    }
    for name, data in (carried | left).items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(data)
    (base / ".git").mkdir()
    (base / ".git" / "HEAD").write_bytes(b"ref")
    result = adapterpack.merge(adapter, base, tmp_path / "m")
    assert set(left) <= set(result.left)
    assert not set(carried) & set(result.left)
    for name, data in carried.items():
        assert (tmp_path / "m" / name).read_bytes() == data
    assert not any((tmp_path / "m" / name).exists() for name in left)
    assert not (tmp_path / "m" / ".git").exists()


def test_a_cache_like_base_of_links_becomes_plain_files(workshop, files, tmp_path: Path) -> None:
    adapter, original = workshop.pair("linear-llama")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for n, file in enumerate(sorted(original.iterdir())):
        shutil.copy(file, blobs / str(n))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(n))
    before = oracle.tree_hash(tmp_path / "blobs")
    adapterpack.merge(adapter, snapshot, tmp_path / "m")
    expected = workshop.peft_merge(original, adapter)
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[k]) for k in merged)
    assert not any(p.is_symlink() for p in (tmp_path / "m").iterdir())
    assert before == oracle.tree_hash(tmp_path / "blobs")


def test_the_result_loads_in_transformers_and_computes_what_peft_merged(workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair("conv1d-and-linear")
    adapterpack.merge(adapter, base, tmp_path / "m")
    ours, theirs = oracle.load_base(tmp_path / "m"), oracle.peft_merge(base, adapter).model
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_a_body_without_its_head_is_found_under_the_prefix(workshop, files, tmp_path: Path) -> None:
    """The adapter was trained on the model with a head; the base holds the body alone, names without `model.`."""
    adapter, base = workshop.pair("linear-llama")
    body = shutil.copytree(base, tmp_path / "body")
    tensors = {k.removeprefix("model."): v for k, v in files.tensors(base).items() if k != "lm_head.weight"}
    save_file(tensors, body / "model.safetensors", metadata={"format": "pt"})
    expected = workshop.peft_merge(base, adapter)
    result = adapterpack.merge(adapter, body, tmp_path / "m")
    merged = files.tensors(tmp_path / "m")
    assert merged.keys() == tensors.keys()
    assert all(files.same(merged[k], expected["model." + k]) for k in merged)
    assert any("model." in note for note in result.notes)


def test_two_merges_are_byte_identical(workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair("dora-linear")
    for name in ("one", "two"):
        adapterpack.merge(adapter, base, tmp_path / name)
    assert oracle.tree_hash(tmp_path / "one") == oracle.tree_hash(tmp_path / "two")


def test_dry_run_writes_nothing_and_tells_the_bytes(workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    plan = adapterpack.merge(adapter, base, tmp_path / "m", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    done = adapterpack.merge(adapter, base, tmp_path / "m")
    assert (plan.bytes_written, plan.modules_merged) == (done.bytes_written, done.modules_merged)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_rounding_once_is_the_correctly_rounded_exact_value(dtype, workshop, files, tmp_path: Path) -> None:
    """Held against integers-of-halves arithmetic: numpy float64 and one ml_dtypes rounding."""
    import ml_dtypes
    import numpy as np

    adapter, base = workshop.pair("patterns-rslora", dtype)
    adapterpack.merge(adapter, base, tmp_path / "m", rounding="once")
    a, w, merged = files.tensors(adapter), files.tensors(base), files.tensors(tmp_path / "m")
    module = "model.layers.0.mlp.up_proj"
    factors = [a[f"base_model.model.{module}.lora_{x}.weight"].double().numpy() for x in "BA"]
    exact = w[f"{module}.weight"].double().numpy() + factors[0] @ factors[1] * (16 / 4**0.5)
    target = ml_dtypes.bfloat16 if dtype == "bf16" else np.float16
    # ml_dtypes rounds f64 to bf16 in one step only if no f32 lies between: compare by distance instead.
    got = merged[f"{module}.weight"].double().numpy()
    unit = np.spacing(np.abs(got).astype(target)).astype(np.float64)
    assert (np.abs(got - exact) <= unit * 0.5000001).all()


# -- refusals --------------------------------------------------------------------------------------------


def test_an_existing_output_is_refused_and_overwrite_replaces_it(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").write_text("old")
    with pytest.raises(DestinationExists):
        adapterpack.merge(adapter, base, tmp_path / "m")
    assert (tmp_path / "m" / "precious").read_text() == "old"
    adapterpack.merge(adapter, base, tmp_path / "m", overwrite=True)
    assert not (tmp_path / "m" / "precious").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("inside", [False, True])
def test_overwrite_never_replaces_an_input(inside, workshop, tmp_path: Path) -> None:
    source, original = workshop.pair("linear-llama")
    base = shutil.copytree(original, tmp_path / "x" / "base")
    adapter = shutil.copytree(source, tmp_path / "x" / "adapter")
    before = oracle.tree_hash(tmp_path)
    for target in [tmp_path / "x"] if inside else [base, adapter]:
        with pytest.raises(adapterpack.AdapterpackError):
            adapterpack.merge(adapter, base, target, overwrite=True)
    assert before == oracle.tree_hash(tmp_path)


def test_modules_that_the_base_lacks_are_refused_with_the_list(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    with pytest.raises(WrongBase, match=r"down_proj.*\.\.\.") as e:
        adapterpack.merge(adapter, workshop.base("gpt2"), tmp_path / "m")
    assert e.value.exit_code == 1
    assert not (tmp_path / "m").exists()


def test_a_base_of_other_shapes_is_refused(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    with pytest.raises(WrongBase, match="shape"):
        adapterpack.merge(adapter, workshop.base("llama", hidden_size=32), tmp_path / "m")


def test_a_base_with_fewer_layers_is_refused(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    with pytest.raises(WrongBase, match=r"layers\.1"):
        adapterpack.merge(adapter, workshop.base("llama", num_hidden_layers=1), tmp_path / "m")


def test_lora_bias_into_a_base_without_bias_is_refused(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("lora-bias")
    with pytest.raises(WrongBase, match="bias"):
        adapterpack.merge(adapter, workshop.base("llama"), tmp_path / "m")


def test_parameters_that_would_go_unused_are_refused_with_the_list(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    odd = files.edited(
        adapter, tmp_path / "a", {"base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight": torch.ones(2)}
    )
    with pytest.raises(LossRefused, match="lora_C") as e:
        adapterpack.merge(odd, base, tmp_path / "m")
    assert e.value.exit_code == 4
    assert not (tmp_path / "m").exists()


def test_half_a_pair_is_refused_by_name(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    broken = files.edited(adapter, tmp_path / "a", {key: None})
    with pytest.raises(InvalidFile, match=r"layers\.0\.self_attn\.q_proj.*lora_B"):
        adapterpack.merge(broken, base, tmp_path / "m")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_values_that_are_not_finite_are_never_written(value, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama", "bf16")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    poisoned = files.tensors(adapter)[key].clone()
    poisoned[1, 1] = value
    broken = files.edited(adapter, tmp_path / "a", {key: poisoned * (1e5 if value == 1e38 else 1)})
    with pytest.raises(InvalidFile, match="q_proj"):
        adapterpack.merge(broken, base, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_an_untrained_adapter_changes_nothing_and_is_refused(workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    oracle.make_adapter(tmp_path / "a", LoraConfig(target_modules=["q_proj"]), base=oracle.load_base(base), scale=0.0)
    with pytest.raises(NothingChanged):
        adapterpack.merge(tmp_path / "a", base, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_weights_must_be_as_many_as_adapters(workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    with pytest.raises(UsageError):
        adapterpack.merge([adapter, adapter], base, tmp_path / "m", weights=[1.0])


def test_a_weight_has_no_meaning_for_dora(workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair("dora-linear")
    with pytest.raises(Unsupported):
        adapterpack.merge(adapter, base, tmp_path / "m", weights=[0.5])


def test_vera_seed_without_a_base_that_fits_is_no_guess(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("seed-mixed")
    with pytest.raises(WrongBase):
        adapterpack.merge(adapter, workshop.base("gpt2"), tmp_path / "m")


def test_the_base_may_be_read_only(workshop, tmp_path: Path) -> None:
    adapter, original = workshop.pair("linear-llama")
    base = shutil.copytree(original, tmp_path / "base")
    for file in base.iterdir():
        file.chmod(0o444)
    base.chmod(0o555)
    try:
        adapterpack.merge(adapter, base, tmp_path / "m")
    finally:
        base.chmod(0o755)
    (tmp_path / "m" / "new").write_text("the result is writable")
    assert os.access(tmp_path / "m" / "model.safetensors", os.W_OK)


# -- tied embeddings ---------------------------------------------------------------------------------------


def lora(**fields):
    return LoraConfig(r=4, lora_alpha=8, **fields)


TIED = {
    "head": ("llama", lora(target_modules=["lm_head", "q_proj"]), False),
    "input": ("llama", lora(target_modules=["embed_tokens", "q_proj"]), False),
    "both": ("llama", lora(target_modules=["embed_tokens", "lm_head"]), False),
    "head-gpt2": ("gpt2", lora(target_modules=["lm_head", "c_attn"]), False),
    "input-gpt2": ("gpt2", lora(target_modules=["wte", "c_attn"]), False),
    "head-opt": ("opt", lora(target_modules=["lm_head", "q_proj"]), False),
    "dora-head": ("llama", lora(target_modules=["lm_head"], use_dora=True), False),
    "modules-to-save-head": ("llama", lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), False),
    "modules-to-save-input": ("llama", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), False),
    "token-rows": ("llama", lora(target_modules=["q_proj"], trainable_token_indices=[5, 1, 90]), True),
    "token-rows-gpt2": ("gpt2", lora(target_modules=["c_attn"], trainable_token_indices=[5, 1, 90]), True),
    "elsewhere": ("llama", lora(target_modules=["q_proj"]), True),
    "vblora-head": (
        "llama",
        VBLoRAConfig(r=2, num_vectors=9, vector_length=16, target_modules=["lm_head", "q_proj"]),
        False,
    ),
    "vera-head": ("llama", VeraConfig(r=4, target_modules=["lm_head", "q_proj"]), False),
}


@pytest.mark.parametrize("shard", [None, "60KB"])
@pytest.mark.parametrize("name", TIED)
def test_a_tied_base_computes_what_the_unmerged_adapter_computes(
    name, shard, workshop, files, tmp_path: Path
) -> None:
    """PEFT merges into the shared tensor, so the side that was not adapted changes too; we let them part."""
    kind, config, stays_tied = TIED[name]
    base = workshop.base(kind, shard=shard, tie=True)
    oracle.make_adapter(tmp_path / "a", config, base=oracle.load_base(base), scale=0.2)
    result = adapterpack.merge(tmp_path / "a", base, tmp_path / "m", verify="full")
    unmerged, _ = oracle.peft_load(base, tmp_path / "a")
    merged = oracle.load_base(tmp_path / "m")
    with torch.no_grad():
        wanted, plain, got = unmerged(IDS).logits, oracle.load_base(base)(IDS).logits, merged(IDS).logits
    assert (wanted - plain).norm() > 1e-2 * plain.norm(), "the adapter does nothing: the case proves nothing"
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    assert merged.config.tie_word_embeddings is stays_tied
    head = merged.get_output_embeddings().weight
    assert (head.data_ptr() == merged.get_input_embeddings().weight.data_ptr()) is stays_tied
    if stays_tied:
        assert (tmp_path / "m" / "config.json").read_bytes() == (base / "config.json").read_bytes()
        assert files.tensors(tmp_path / "m").keys() == files.tensors(base).keys()
    else:
        assert any("tie_word_embeddings" in note for note in result.notes)
        assert len(files.tensors(tmp_path / "m")) == len(files.tensors(base)) + 1
    if shard:
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == files.tensors(tmp_path / "m").keys()
        total = sum(t.numel() * t.element_size() for t in files.tensors(tmp_path / "m").values())
        assert index["metadata"]["total_size"] == total
    assert adapterpack.verify(tmp_path / "a", tmp_path / "m", base=base).equal


def test_a_head_whose_change_is_zero_stays_tied(workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama", tie=True)

    def zero_head(model) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lm_head" in name and "lora_B" in name:
                    p.zero_()

    oracle.make_adapter(
        tmp_path / "a",
        lora(target_modules=["lm_head", "q_proj"]),
        base=oracle.load_base(base),
        post=zero_head,
    )
    adapterpack.merge(tmp_path / "a", base, tmp_path / "m")
    assert (tmp_path / "m" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert files.tensors(tmp_path / "m").keys() == files.tensors(base).keys()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_base_that_stores_both_copies_is_untied_in_the_config_too(
    target, workshop, files, tmp_path: Path
) -> None:
    """Else a loader that ties them would throw one of the two away."""
    tied = workshop.base("llama", tie=True)
    base = shutil.copytree(tied, tmp_path / "base")
    tensors = files.tensors(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    oracle.make_adapter(tmp_path / "a", lora(target_modules=[target]), base=oracle.load_base(tied), scale=0.2)
    adapterpack.merge(tmp_path / "a", base, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    unmerged, _ = oracle.peft_load(tied, tmp_path / "a")
    with torch.no_grad():
        wanted, got = unmerged(IDS).logits, oracle.load_base(tmp_path / "m")(IDS).logits
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_body_that_has_no_head_gets_none(workshop, files, tmp_path: Path) -> None:
    """BERT's config says that embeddings are tied, but this model has no output embeddings."""
    adapter, base = workshop.pair("embedding-bert")
    adapterpack.merge(adapter, base, tmp_path / "m")
    assert files.tensors(tmp_path / "m").keys() == files.tensors(base).keys()


# -- variants --------------------------------------------------------------------------------------------


def _variant(**fields):
    return lambda: LoraConfig(r=4, lora_alpha=8, **{"target_modules": ["q_proj"], **fields})


WRITTEN_BY_PEFT = {
    "pissa": _variant(init_lora_weights="pissa"),
    "pissa-niter": _variant(init_lora_weights="pissa_niter_4"),
    "olora": _variant(init_lora_weights="olora"),
    "alora": _variant(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
    "layer-replication": _variant(layer_replication=[[0, 2], [1, 2]]),
}


@pytest.mark.parametrize("name", WRITTEN_BY_PEFT)
def test_variants_that_peft_writes_are_never_taken_for_plain_lora(name, workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    oracle.make_adapter(tmp_path / "a", WRITTEN_BY_PEFT[name](), base=oracle.load_base(base))
    for job in (
        lambda: adapterpack.merge(tmp_path / "a", base, tmp_path / "m"),
        lambda: adapterpack.convert(tmp_path / "a", tmp_path / "m", dtype="float32"),
        lambda: adapterpack.compress(tmp_path / "a", tmp_path / "m", max_error=0.1),
        lambda: adapterpack.verify(tmp_path / "a", tmp_path / "a"),
    ):
        with pytest.raises(Unsupported) as e:
            job()
        assert e.value.hint
    assert not (tmp_path / "m").exists()
    assert adapterpack.inspect(tmp_path / "a").unsupported


CONFIG_VARIANTS = {
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq"},
    "lora-ga": {"init_lora_weights": "lora_ga"},
    "an unknown init": {"init_lora_weights": "tomorrow"},
    "arrow": {"arrow_config": {"top_k": 2}},
    "megatron": {"megatron_config": {"x": 1}},
    "a switch of tomorrow": {"use_hydralora": True},
}


@pytest.mark.parametrize("name", CONFIG_VARIANTS)
def test_variants_that_only_the_config_tells_are_refused(name, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    odd = files.edited(adapter, tmp_path / "a", config=CONFIG_VARIANTS[name])
    with pytest.raises(Unsupported):
        adapterpack.merge(odd, base, tmp_path / "m")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica", "eva"])
def test_inits_that_leave_the_base_alone_are_plain_lora(init, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    same = files.edited(adapter, tmp_path / "a", config={"init_lora_weights": init})
    adapterpack.merge(same, base, tmp_path / "m")


def test_a_pissa_adapter_that_peft_converted_is_plain_lora(workshop, files, tmp_path: Path) -> None:
    """PEFT's own way out: save with the initial adapter, and file + pristine base give the trained model."""
    base = workshop.base("llama")
    model = oracle.make_adapter(
        tmp_path / "start", _variant(init_lora_weights="pissa")(), base=oracle.load_base(base), scale=0.0
    )
    oracle.perturb(model, 0.1)
    # PEFT loads the initial adapter without its moved base: it must not say pissa any more.
    config = files.config(tmp_path / "start") | {"init_lora_weights": True}
    (tmp_path / "start" / "adapter_config.json").write_text(json.dumps(config))
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    trained = model.merge_and_unload().state_dict()
    adapterpack.merge(tmp_path / "a", base, tmp_path / "m", verify="full")
    merged = files.tensors(tmp_path / "m")
    assert all(torch.allclose(merged[k], trained[k], atol=2e-6) for k in merged)


@pytest.mark.parametrize("peft_type", ["ADALORA", "LOHA", "RANDLORA", "PVERA", "IA3", "SOMETHING_NEW"])
def test_other_methods_are_refused_by_name(peft_type, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    odd = files.edited(adapter, tmp_path / "a", config={"peft_type": peft_type})
    with pytest.raises(Unsupported, match=f"(?i){peft_type}"):
        adapterpack.merge(odd, base, tmp_path / "m")
    assert adapterpack.inspect(odd).method == peft_type.lower()
