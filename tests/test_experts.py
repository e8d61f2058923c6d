"""LoRA on bare parameters and on experts: bit for bit PEFT's merge, however the experts lie on disk."""

from __future__ import annotations

import json
from pathlib import Path

import cases
import oracle
import pytest
import torch
from safetensors.torch import save_file

import adapterpack
from adapterpack.errors import InvalidFile, Unsupported, WrongBase

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4", "granitemoe")


def _on(*parameters: str, modules: tuple[str, ...] = (), **fields):
    return cases.lora(target_modules=list(modules), target_parameters=list(parameters), **fields)


LARGE = {"hidden_size": 512, "num_hidden_layers": 1}
PARAMETERS = (
    *(cases.Case(f"experts-{kind}", _on(*BOTH), kind) for kind in MIXTURES),
    cases.Case("experts-and-modules", _on(*reversed(BOTH), modules=("q_proj", "o_proj")), "mixtral"),
    cases.Case("experts-short-names", _on("down_proj", "gate_up_proj", modules=("v_proj",)), "gpt_oss"),
    cases.Case("experts-down-only", _on("experts.down_proj", modules=("lm_head",)), "qwen3_moe"),
    cases.Case("experts-up-only", _on("experts.gate_up_proj"), "mixtral"),
    cases.Case("experts-rslora", _on(*BOTH, use_rslora=True, r=3), "qwen3_moe"),
    cases.Case(
        "experts-patterns",
        _on(
            *BOTH,
            modules=("q_proj",),
            rank_pattern={"gate_up_proj": 2, r"layers\.1\.mlp\.experts\.down_proj": 5},
            alpha_pattern={r"^model\.layers\.0\..*down_proj": 11},
        ),
        "mixtral",
    ),
    # Square in each way: only the model type tells which side is which.
    cases.Case("experts-square-down", _on(*BOTH), "gpt_oss", over={"intermediate_size": 32}),
    cases.Case("experts-square-up", _on(*BOTH), "gpt_oss", over={"intermediate_size": 16}),
    cases.Case("experts-square-straight", _on(*BOTH), "mixtral", over={"intermediate_size": 16}),
    cases.Case("experts-square-undeclared", _on(*BOTH), "llama4", over={"intermediate_size": 16}),
    # Four levels, two of them of one shape where hidden is twice the intermediate size.
    cases.Case(
        "experts-biases",
        _on("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
        "gpt_oss",
        over={"intermediate_size": 16},
    ),
    cases.Case("experts-one", _on(*BOTH), "mixtral", over={"num_local_experts": 1, "num_experts_per_tok": 1}),
    # The short name could be a parameter of the router as well.
    cases.Case("experts-router-short", _on("gate.weight", "down_proj"), "mixtral"),
    cases.Case("experts-router", _on("gate.weight", "experts.down_proj"), "mixtral"),
    cases.Case("matrix-parameter", _on("mlp.up_proj.weight", "k_proj.weight", modules=("q_proj",)), "llama"),
    cases.Case("matrix-parameter-conv1d", _on("attn.c_attn.weight"), "gpt2"),
    cases.Case(
        "experts-large", _on(*BOTH, r=16), "qwen3_moe", over={**LARGE, "moe_intermediate_size": 704, "num_experts": 3}
    ),
    cases.Case(
        "experts-large-fused",
        _on(*BOTH, r=16),
        "gpt_oss",
        over={**LARGE, "intermediate_size": 704, "num_local_experts": 3, "layer_types": ["full_attention"]},
    ),
)
BY_NAME = {c.name: c for c in PARAMETERS}
NARROW = cases.Case("experts-narrow", _on(*BOTH, modules=("q_proj",)), "mixtral", autocast=False)


def _peft_saves(workshop, files, base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The merged model as transformers writes it: experts apart where its format has them so."""
    where = workshop.root / "saved" / oracle.tree_hash(adapter)[:16] / base.name
    if not where.exists():
        merged = workshop.peft_merge(base, adapter)
        assert merged.load.clean, (merged.load.missing, merged.load.unexpected)
        oracle.save_base(merged.model, where)
    found: dict[str, torch.Tensor] = files.tensors(where)
    return found


def _assert_like_peft(workshop, files, base: Path, adapter: Path, tmp_path: Path) -> adapterpack.Merge:
    expected = _peft_saves(workshop, files, base, adapter)
    result = adapterpack.merge(adapter, base, tmp_path / "m", verify="full")
    merged, before = files.tensors(tmp_path / "m"), files.tensors(base)
    assert merged.keys() == before.keys() == expected.keys()
    # In a model of float16 transformers holds some norms in float32.
    assert not [k for k in merged if not files.same(merged[k], expected[k].to(merged[k].dtype))]
    changed = [k for k in merged if not files.same(merged[k], before[k])]
    assert len(changed) == result.tensors_changed > 0
    return result


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", PARAMETERS, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    _assert_like_peft(workshop, files, workshop.base_of(case, dtype), workshop.adapter(case, dtype), tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_16_bit_file_is_peft_bit_for_bit(dtype, workshop, files, tmp_path: Path) -> None:
    _assert_like_peft(workshop, files, workshop.base_of(NARROW, dtype), workshop.adapter(NARROW, dtype), tmp_path)


def test_a_large_stack_is_cut_within_its_experts(workshop) -> None:
    """What makes the large cases worth having: several blocks for each expert, by the bits of the whole."""
    from adapterpack import exactness
    from adapterpack.adapter import Product
    from adapterpack.backend import TorchBackend

    assert len(exactness.cut(1408, 512)) > 1
    assert exactness.splits(TorchBackend("cpu"), Product(1408, 16, 512, False, batched=True))


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("name", ["experts-mixtral", "experts-gpt_oss"])
def test_shards_and_workers_change_nothing(name, jobs, workshop, files, tmp_path: Path) -> None:
    case = BY_NAME[name]
    base = workshop.base(case.kind, "bf16", shard="20KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    expected = _peft_saves(workshop, files, workshop.base_of(case, "bf16"), workshop.adapter(case, "bf16"))
    adapterpack.merge(workshop.adapter(case, "bf16"), base, tmp_path / "m", jobs=jobs, verify="full")
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[k]) for k in merged)


def test_the_delta_is_rounded_before_it_is_added(workshop, files, tmp_path: Path) -> None:
    """PEFT's oddity that the SPEC tells of: one rounding would give other bits."""
    case = BY_NAME["experts-gpt_oss"]
    adapter, base = workshop.adapter(case, "bf16"), workshop.base_of(case, "bf16")
    adapterpack.merge(adapter, base, tmp_path / "m")
    adapterpack.merge(adapter, base, tmp_path / "once", rounding="once", verify="full")
    twice, once = files.tensors(tmp_path / "m"), files.tensors(tmp_path / "once")
    assert any(not files.same(twice[k], once[k]) for k in twice)
    assert all(torch.allclose(twice[k].float(), once[k].float(), rtol=2**-7, atol=2**-7) for k in twice)
    assert adapterpack.verify(adapter, tmp_path / "once", base=base, device="cpu").equal


def test_a_body_that_was_saved_alone_has_the_experts_too(workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["experts-mixtral"]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    model = oracle.load_base(base)
    oracle.save_base(model.model, tmp_path / "body")
    assert any(k.startswith("layers.0.block_sparse_moe.experts.0.") for k in files.tensors(tmp_path / "body"))
    expected = _peft_saves(workshop, files, base, adapter)
    adapterpack.merge(adapter, tmp_path / "body", tmp_path / "m", verify="full")
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[f"model.{k}"]) for k in merged)


def test_several_adapters_and_weights(workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["experts-mixtral"]
    adapter, base = workshop.adapter(case, "bf16"), workshop.base_of(case, "bf16")
    half = files.edited(adapter, tmp_path / "half", config={"lora_alpha": files.config(adapter)["lora_alpha"] / 2})
    adapterpack.merge(adapter, base, tmp_path / "m", weights=[0.5])
    expected, merged = _peft_saves(workshop, files, base, half), files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[k]) for k in merged)
    other = workshop.adapter(BY_NAME["experts-and-modules"], "bf16")
    adapterpack.merge([half, other], base, tmp_path / "both")
    expected, merged = _peft_saves(workshop, files, tmp_path / "m", other), files.tensors(tmp_path / "both")
    assert all(files.same(merged[k], expected[k]) for k in merged)


# -- how else they lie on disk -----------------------------------------------------------------------------


def _fused(workshop, base: Path, files, where: Path) -> Path:
    """The same model with its experts fused on disk, as its modules have them."""
    model = oracle.load_base(base)
    model.save_pretrained(where, save_original_format=False)
    assert any(k.endswith("mlp.experts.gate_up_proj") for k in files.tensors(where))
    return where


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    "name", ["experts-mixtral", "experts-qwen3_moe", "experts-patterns", "experts-square-straight"]
)
def test_fused_on_disk(name, dtype, workshop, files, tmp_path: Path) -> None:
    case = BY_NAME[name]
    adapter = workshop.adapter(case, dtype)
    base = _fused(workshop, workshop.base_of(case, dtype), files, tmp_path / "base")
    expected = oracle.peft_merge(base, adapter)
    assert expected.load.clean
    adapterpack.merge(adapter, base, tmp_path / "m", verify="full")
    merged = files.tensors(tmp_path / "m")
    assert merged.keys() == files.tensors(base).keys()
    assert all(files.same(merged[k], expected[k]) for k in merged)


LAYERS = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}


def _apart(kind: str, where: Path, *, only: tuple[str, ...] = (), experts: int = 4, **config) -> Path:
    """An adapter as transformers 4 and PEFT wrote it: a Linear for each layer of each expert."""
    path, layers = LAYERS[kind]
    layers = only or layers
    g = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(2):
        for expert in range(experts):
            for name in layers:
                out, into = (32, 24) if name in ("w2", "down_proj") else (24, 32)
                key = f"base_model.model.model.layers.{layer}.{path}.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(4, into, generator=g) * 0.3
                tensors[f"{key}.lora_B.weight"] = torch.randn(out, 4, generator=g) * 0.3
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, 32, generator=g) * 0.3
        tensors[f"{key}.lora_B.weight"] = torch.randn(32, 4, generator=g) * 0.3
    where.mkdir()
    save_file(tensors, where / "adapter_model.safetensors", metadata={"format": "pt"})
    written = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": [*layers, "q_proj"], **config}
    (where / "adapter_config.json").write_text(json.dumps(written))
    return where


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_adapters_of_single_experts_where_experts_lie_apart(kind, dtype, workshop, files, tmp_path: Path) -> None:
    """Names stand as they are: each is a linear layer, rounded once, as PEFT does it under transformers 4."""
    base, adapter = workshop.base(kind, dtype), _apart(kind, tmp_path / "a")
    result = adapterpack.merge(adapter, base, tmp_path / "m", verify="full")
    merged, before, own = files.tensors(tmp_path / "m"), files.tensors(base), files.tensors(adapter)
    assert result.tensors_changed == 2 * (4 * 3 + 1)
    for key, old in before.items():
        name = f"base_model.model.{key.removesuffix('.weight')}"
        new = old
        if f"{name}.lora_A.weight" in own:
            new = old.clone()
            new += own[f"{name}.lora_B.weight"] @ own[f"{name}.lora_A.weight"] * 1.5
        assert files.same(merged[key], new), key


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_adapters_of_single_experts_where_experts_are_fused(kind, dtype, workshop, files, tmp_path: Path) -> None:
    """PEFT joins them: blocks on a diagonal, twice the rank and alpha, and two roundings."""
    adapter = _apart(kind, tmp_path / "a")
    base = _fused(workshop, workshop.base(kind, dtype), files, tmp_path / "base")
    expected = oracle.peft_merge(base, adapter)
    assert expected.load.clean, (expected.load.missing, expected.load.unexpected)
    adapterpack.merge(adapter, base, tmp_path / "m", verify="full")
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[k]) for k in merged)
    assert adapterpack.check(adapter, base=base).healthy
    assert adapterpack.verify(adapter, tmp_path / "m", base=base, device="cpu").equal
    assert adapterpack.verify(adapter, adapter, base=base, device="cpu").equal


def test_down_alone_can_be_joined(workshop, files, tmp_path: Path) -> None:
    adapter = _apart("mixtral", tmp_path / "a", only=("w2",))
    base = _fused(workshop, workshop.base("mixtral", "bf16"), files, tmp_path / "base")
    expected = oracle.peft_merge(base, adapter)
    assert expected.load.clean
    adapterpack.merge(adapter, base, tmp_path / "m", verify="full")
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[k]) for k in merged)


def test_what_cannot_be_joined_is_refused(workshop, files, tmp_path: Path) -> None:
    base = _fused(workshop, workshop.base("mixtral"), files, tmp_path / "base")
    half = _apart("mixtral", tmp_path / "half", only=("w1",))
    with pytest.raises(ValueError, match="without also targeting"):
        oracle.peft_merge(base, half)
    with pytest.raises(WrongBase, match="lacks 4 of its 8 parts"):
        adapterpack.merge(half, base, tmp_path / "m")
    with pytest.raises(WrongBase, match="lacks 2 of its 8 parts"):
        adapterpack.merge(_apart("mixtral", tmp_path / "few", experts=3), base, tmp_path / "m")
    with pytest.raises(Unsupported, match="rsLoRA"):
        adapterpack.merge(_apart("mixtral", tmp_path / "rs", use_rslora=True), base, tmp_path / "m")
    odd = _apart("mixtral", tmp_path / "alphas", alpha_pattern={r"experts\.2\.w1": 3})
    with pytest.raises(Unsupported, match="alphas"):
        adapterpack.merge(odd, base, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    # Where they lie apart nothing needs to be joined.
    for name in ("half", "few", "rs", "alphas"):
        adapterpack.merge(tmp_path / name, workshop.base("mixtral"), tmp_path / f"m-{name}", verify="full")


def test_single_experts_for_interleaved_gates_are_refused(workshop, tmp_path: Path) -> None:
    """gpt-oss has a gate's rows between those of `up`: joined one after the other they would be wrong."""
    with pytest.raises(Unsupported, match="cannot be joined"):
        adapterpack.merge(_apart("qwen3_moe", tmp_path / "a"), workshop.base("gpt_oss"), tmp_path / "m")


def test_the_router_has_two_names(workshop, files, tmp_path: Path) -> None:
    """transformers 4 and the files say `block_sparse_moe.gate`, transformers 5 says `mlp.gate`."""
    base, where = workshop.base("mixtral"), tmp_path / "a"
    where.mkdir()
    for path in ("block_sparse_moe", "mlp"):
        g = torch.Generator().manual_seed(5)
        key = f"base_model.model.model.layers.1.{path}.gate"
        tensors = {f"{key}.lora_A.weight": torch.randn(4, 32, generator=g)}
        tensors |= {f"{key}.lora_B.weight": torch.randn(4, 4, generator=g)}
        save_file(tensors, where / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["gate"]}
        (where / "adapter_config.json").write_text(json.dumps(config))
        adapterpack.merge(where, base, tmp_path / path, verify="full")
    one, two = files.tensors(tmp_path / "block_sparse_moe"), files.tensors(tmp_path / "mlp")
    assert all(files.same(one[k], two[k]) for k in one)


# -- the other verbs ---------------------------------------------------------------------------------------


def test_inspect_and_check_know_the_ranks(workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["experts-patterns"]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    assert adapterpack.inspect(adapter).ranks == {2: 2, 4: 3, 5: 1}
    assert "has all" in adapterpack.inspect(adapter, base=base).notes[0]
    assert adapterpack.check(adapter, base=base).healthy
    wrong = files.edited(adapter, tmp_path / "a", config={"rank_pattern": {}, "r": 3})
    assert adapterpack.inspect(wrong).notes
    assert {f.code for f in adapterpack.check(wrong, base=base).findings} >= {"half-pair", "rank-mismatch"}
    twice = files.edited(adapter, tmp_path / "b", config={"rank_pattern": {"gate_up_proj": 4}})
    assert "rank-mismatch" in {f.code for f in adapterpack.check(twice, base=base).findings}
    fewer = workshop.base("mixtral", num_local_experts=3)
    assert not adapterpack.check(adapter, base=fewer).healthy
    assert {f.code for f in adapterpack.check(adapter, base=workshop.base("llama")).findings} >= {"not-in-base"}


@pytest.mark.parametrize("name", ["experts-gpt_oss", "experts-patterns", "experts-biases", "matrix-parameter"])
def test_verify_and_casts(name, workshop, files, tmp_path: Path) -> None:
    case = BY_NAME[name]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    assert adapterpack.verify(adapter, adapter, device="cpu").equal
    made = adapterpack.convert(adapter, tmp_path / "cast", dtype="bfloat16", max_error=0.02)
    assert 0 < made.max_rel_error < 0.02
    assert {t.dtype for t in files.tensors(tmp_path / "cast").values()} == {torch.bfloat16}
    for against in (None, base):
        result = adapterpack.verify(adapter, tmp_path / "cast", base=against, device="cpu")
        assert not result.equal and 0 < result.max_rel_error < 0.02
        assert abs(result.max_rel_error - made.max_rel_error) < 1e-9
    assert _peft_saves(workshop, files, base, tmp_path / "cast")
    smaller = adapterpack.compress(adapter, tmp_path / "small", max_error=0.02)
    assert smaller.max_rel_error <= 0.02
    assert {t.dtype for t in files.tensors(tmp_path / "small").values()} <= {torch.bfloat16, torch.float16}


@pytest.mark.parametrize("name", ["experts-mixtral", "experts-gpt_oss"])
def test_a_planted_fault_in_one_expert_is_found(name, workshop, files, tmp_path: Path) -> None:
    case = BY_NAME[name]
    adapter, base = workshop.adapter(case, "bf16"), workshop.base_of(case, "bf16")
    adapterpack.merge(adapter, base, tmp_path / "m")
    assert adapterpack.verify(adapter, tmp_path / "m", base=base, device="cpu").equal
    merged = files.tensors(tmp_path / "m")
    key = next(k for k in merged if "layers.1" in k and ("experts.2.w3" in k or k.endswith("experts.gate_up_proj")))
    one = merged[key] if merged[key].ndim == 2 else merged[key][2]
    one.copy_(files.tensors(base)[key].reshape(-1, *one.shape)[-2 if merged[key].ndim == 3 else 0])
    save_file(merged, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    result = adapterpack.verify(adapter, tmp_path / "m", base=base, device="cpu")
    assert [f.key for f in result.findings] == [key]


def test_a_dry_run_says_that_experts_lie_apart(workshop, tmp_path: Path) -> None:
    case = BY_NAME["experts-mixtral"]
    planned = adapterpack.merge(workshop.adapter(case), workshop.base_of(case), tmp_path / "m", dry_run=True)
    assert any("apart" in note for note in planned.notes)
    assert len(planned.touched) == 2 * 4 * 3


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["use_dora", "lora_bias", "fan_in_fan_out"])
def test_what_peft_does_not_load_is_refused(field, workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["experts-mixtral"]
    odd = files.edited(workshop.adapter(case), tmp_path / "a", config={field: True})
    with pytest.raises((ValueError, RuntimeError)):
        oracle.peft_merge(workshop.base_of(case), odd)
    with pytest.raises(Unsupported, match=field):
        adapterpack.merge(odd, workshop.base_of(case), tmp_path / "m")


def test_levels_without_a_name_are_refused(workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["experts-mixtral"]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    odd = files.edited(adapter, tmp_path / "a", config={"target_parameters": ["router.weight"]})
    with pytest.raises(Unsupported, match="target_parameters does not name it"):
        adapterpack.merge(odd, base, tmp_path / "m")
    one = files.edited(adapter, tmp_path / "b", config={"target_parameters": ["experts.down_proj"]})
    with pytest.raises(WrongBase, match="2 adapted parameters"):
        adapterpack.merge(one, base, tmp_path / "m")
    text = files.edited(adapter, tmp_path / "c", config={"target_parameters": "experts.down_proj"})
    with pytest.raises(InvalidFile, match="target_parameters"):
        adapterpack.merge(text, base, tmp_path / "m")


def test_a_base_with_other_experts_is_refused(workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["experts-gpt_oss"]
    adapter = workshop.adapter(case)
    with pytest.raises(WrongBase):
        adapterpack.merge(adapter, workshop.base("gpt_oss", num_local_experts=3), tmp_path / "m")
    with pytest.raises(WrongBase):
        adapterpack.merge(adapter, workshop.base("gpt_oss", intermediate_size=40), tmp_path / "m")
    base = workshop.base("mixtral")
    torn = files.tensors(base)
    del torn["model.layers.1.block_sparse_moe.experts.3.w1.weight"]
    (tmp_path / "torn").mkdir()
    save_file(torn, tmp_path / "torn" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WrongBase, match="not all there"):
        adapterpack.merge(workshop.adapter(BY_NAME["experts-mixtral"]), tmp_path / "torn", tmp_path / "m")


def test_square_experts_of_an_unknown_model_are_refused(workshop, files, tmp_path: Path) -> None:
    case = BY_NAME["experts-square-down"]
    save_file(files.tensors(workshop.base_of(case)), _made(tmp_path / "base") / "model.safetensors")
    with pytest.raises(WrongBase, match="how its experts lie"):
        adapterpack.merge(workshop.adapter(case), tmp_path / "base", tmp_path / "m")


def _made(path: Path) -> Path:
    path.mkdir()
    return path
