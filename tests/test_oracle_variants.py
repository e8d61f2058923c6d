"""LoRA's variants merge as PEFT merges them, bit for bit; those that no weight can take in say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import oracle
import pytest
import torch
from bitexact import assert_merges_like_peft, codes
from peft import LoraConfig, MontecloraConfig, PeftModel, VeloraConfig, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.lora.config import BdLoraConfig
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import save_file

import adapterpack
from adapterpack.errors import InvalidFile, NoMergedWeight, Unsupported

_QKU = ["q_proj", "k_proj", "up_proj", "down_proj"]


def move_buffers(model: PeftModel) -> None:
    """What training moves and no optimizer does."""
    g = torch.Generator().manual_seed(5)
    for name, buffer in model.named_buffers():
        if "lora_velora_embed" in name or "lora_monteclora" in name:
            buffer.add_((torch.randn(buffer.shape, generator=g) * 0.2).to(buffer.dtype))


def _bd(n: int = 2, strict: bool = True, **fields: Any) -> Any:
    own = {"target_modules_bd_a": ["q_proj", "down_proj"], "target_modules_bd_b": ["k_proj", "up_proj"]}
    own |= {k: fields.pop(k) for k in list(fields) if k in own}
    return cases.lora(
        use_bdlora=BdLoraConfig(nblocks=n, match_strict=strict, **own), target_modules=_QKU, **{"r": 8, **fields}
    )


def _velora(kind: str, **fields: Any) -> Any:
    own = VeloraConfig(num_groups=5, init_type=kind)
    return cases.lora(**{"velora_config": own, "target_modules": _QKU, **fields})


def _monteclora(**fields: Any) -> Any:
    own = MontecloraConfig(num_samples=3, buffer_size=1)
    return cases.lora(**{"monteclora_config": own, "target_modules": _QKU, **fields})


BDLORA = (
    cases.Case("bdlora-a-and-b", _bd()),
    cases.Case("bdlora-4-blocks", _bd(4, use_rslora=True)),
    cases.Case("bdlora-some-dense", _bd(strict=False, target_modules_bd_b=["mlp.up"])),
    cases.Case("bdlora-patterns", _bd(rank_pattern={"k_proj": 4}, alpha_pattern={"up_proj": 16})),
    cases.Case("bdlora-bias", _bd(target_modules_bd_b=None, strict=False, lora_bias=True, bias="all"), bias=True),
    cases.Case(
        "bdlora-dense-conv1d",
        cases.lora(use_bdlora=BdLoraConfig(match_strict=False), target_modules=["c_attn", "c_proj"]),
        "gpt2",
    ),
)
VELORA = (
    cases.Case("velora-random", _velora("random"), post=move_buffers),
    cases.Case("velora-average", _velora("batch_average"), post=move_buffers),
    cases.Case("velora-once-conv1d", _velora("batch_average_once", target_modules=["c_attn", "c_proj"]), "gpt2"),
    cases.Case("velora-bias", _velora("random", lora_bias=True), bias=True, post=move_buffers),
)
MONTECLORA = (
    cases.Case("monteclora", _monteclora(), post=move_buffers),
    cases.Case("monteclora-patterns", _monteclora(rank_pattern={"k_proj": 2}, use_rslora=True), post=move_buffers),
    cases.Case("monteclora-conv1d", _monteclora(target_modules=["c_attn", "c_proj"]), "gpt2", post=move_buffers),
)
MICA = (
    cases.Case("mica", cases.lora(init_lora_weights="mica", target_modules=_QKU)),
    cases.Case("mica-conv1d", cases.lora(init_lora_weights="mica", target_modules=["c_attn", "c_proj"]), "gpt2"),
    cases.Case("mica-embedding", cases.lora(init_lora_weights="mica", target_modules=["embed_tokens", "q_proj"])),
)
_HEAD = ["head.attention", "q_proj"]
ATTENTION = (
    cases.Case("attention", cases.lora(target_modules=_HEAD), "siglip"),
    cases.Case("attention-alone", cases.lora(target_modules=["head.attention"], use_rslora=True), "siglip"),
    cases.Case(
        "attention-patterns",
        cases.lora(
            target_modules=_HEAD,
            rank_pattern={"head.attention": 3},
            alpha_pattern={"attention": 5, "attention.out_proj": 40, "in_proj_weight": 30},
        ),
        "siglip",
    ),
    cases.Case("attention-bias-all", cases.lora(target_modules=_HEAD, bias="all"), "siglip"),
)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", [*BDLORA, *VELORA, *MONTECLORA, *MICA, *ATTENTION], ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


NARROW = (
    cases.Case("narrow-bdlora", _bd(), autocast=False),
    cases.Case("narrow-velora", _velora("random"), autocast=False),
    cases.Case("narrow-monteclora", _monteclora(), autocast=False),
    cases.Case("narrow-mica", cases.lora(init_lora_weights="mica", target_modules=_QKU), autocast=False),
    cases.Case("narrow-attention", cases.lora(target_modules=_HEAD), "siglip", autocast=False),
)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("case", NARROW, ids=str)
def test_merge_of_a_16_bit_file_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(case, dtype)
    assert {t.dtype for t in files.tensors(adapter).values()} == {cases.DTYPES[dtype]}
    assert_merges_like_peft(workshop, files, adapter, workshop.base_of(case, dtype), tmp_path)


# -- to plain LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*BDLORA[:5], *VELORA[:1], *MONTECLORA[:2]], ids=str)
def test_as_plain_lora_it_is_the_same_to_the_bit(case, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora")
    assert (str(made.grade), made.max_rel_error) == ("equivalent", 0)
    assert made.dropped
    assert adapterpack.verify(adapter, tmp_path / "lora").equal
    merged = oracle.peft_merge(base, tmp_path / "lora")
    assert merged.load.clean
    expected = workshop.peft_merge(base, adapter)
    assert all(files.same(merged[k], expected[k]) for k in expected)
    seen = adapterpack.inspect(tmp_path / "lora")
    assert (seen.method, seen.encoding) == ("lora", "lora")
    assert files.config(tmp_path / "lora")["rank_pattern"] == files.config(adapter)["rank_pattern"]


def test_blocks_keep_their_dtype(workshop, files, tmp_path: Path) -> None:
    adapterpack.convert(workshop.adapter(NARROW[0], "bf16"), tmp_path / "lora", to="lora")
    assert {t.dtype for t in files.tensors(tmp_path / "lora").values()} == {torch.bfloat16}


@pytest.mark.parametrize("case", [BDLORA[0], VELORA[0], MONTECLORA[0]], ids=str)
def test_an_engine_gets_plain_lora(case, workshop, files, tmp_path: Path) -> None:
    found = adapterpack.check(workshop.adapter(case), engine="vllm").findings
    assert any(case.name.partition("-")[0] in f.message for f in found)
    adapterpack.convert(workshop.adapter(case), tmp_path / "served", engine="vllm")
    assert adapterpack.check(tmp_path / "served", engine="vllm").healthy
    assert all(".lora_A." in k or ".lora_B." in k for k in files.tensors(tmp_path / "served"))


# -- QA-LoRA ---------------------------------------------------------------------------------------------


@pytest.fixture
def qalora(workshop, tmp_path: Path, monkeypatch) -> tuple[Path, PeftModel]:
    """An adapter of PEFT's own QA-LoRA layers, over plain linear ones: PEFT has them for GPTQ, which is not here."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=_QKU, use_qalora=True, qalora_group_size=8)
    with monkeypatch.context() as patch:
        patch.setattr(Linear, "resolve_lora_variant", lambda self, *, config, **_: QALoraLinearVariant())
        model = get_peft_model(oracle.load_base(workshop.base("llama")), config)
    oracle.perturb(model, 0.3)
    model.save_pretrained(tmp_path / "qa")
    return tmp_path / "qa", model.eval()


def _run_on_unit_vectors(model: PeftModel) -> dict[str, torch.Tensor]:
    """What each adapted layer adds, as a matrix (out, in), in f32."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            eye = torch.eye(layer.in_features)[None]
            with torch.no_grad():
                found[name.removeprefix("base_model.model.")] = (layer(eye) - layer.base_layer(eye))[0].T
    return found


def test_qalora_merges_what_its_layers_compute(qalora, workshop, files, tmp_path: Path) -> None:
    adapter, model = qalora
    base = workshop.base("llama")
    adapterpack.merge(adapter, base, tmp_path / "m", verify="full")
    merged, original = files.tensors(tmp_path / "m"), files.tensors(base)
    added = _run_on_unit_vectors(model)
    assert len(added) == 8
    for name, delta in added.items():
        found = (merged[f"{name}.weight"] - original[f"{name}.weight"]).double()
        assert torch.linalg.norm(found - delta.double()) < 1e-5 * torch.linalg.norm(delta.double())


def test_qalora_as_plain_lora(qalora, workshop, files, tmp_path: Path) -> None:
    adapter, _ = qalora
    base = workshop.base("llama")
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora")
    assert (str(made.grade), made.max_rel_error) == ("equivalent", 0)
    adapterpack.merge(adapter, base, tmp_path / "m")
    merged, expected = oracle.peft_merge(base, tmp_path / "lora"), files.tensors(tmp_path / "m")
    assert merged.load.clean
    assert all(files.same(merged[k], expected[k]) for k in expected)
    assert files.config(tmp_path / "lora")["use_qalora"] is False


def test_qalora_holds_its_shapes_against_the_base(qalora, workshop, files, tmp_path: Path) -> None:
    adapter, _ = qalora
    base = workshop.base("llama")
    assert adapterpack.check(adapter, base=base).healthy
    wide = files.edited(adapter, tmp_path / "a", config={"qalora_group_size": 16})
    assert "shape-not-in-base" in codes(adapterpack.check(wide, base=base))
    huge = files.edited(adapter, tmp_path / "b", config={"qalora_group_size": 10**9})
    with pytest.raises(InvalidFile, match="qalora_group_size"):
        adapterpack.convert(huge, tmp_path / "lora", to="lora")


# -- multi-head attention --------------------------------------------------------------------------------


def test_peft_adds_the_change_of_out_proj_twice(workshop, files) -> None:
    """What our merge repeats; it is PEFT's forward too, so that the model was trained with it."""
    case = ATTENTION[0]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    t, original = files.tensors(adapter), files.tensors(base)
    prefix = next(k for k in t if k.endswith("base_layer.out_proj.lora_A.weight")).removesuffix("lora_A.weight")
    once = t[f"{prefix}lora_B.weight"] @ t[f"{prefix}lora_A.weight"] * (6 / 4)
    name = next(k for k in original if k.endswith("attention.out_proj.weight"))
    found = workshop.peft_merge(base, adapter)[name] - original[name]
    assert torch.allclose(found, 2 * once, atol=1e-5)


def test_attention_is_told_by_its_own_names(workshop, files, tmp_path: Path) -> None:
    case = ATTENTION[2]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    assert adapterpack.inspect(adapter).ranks == {3: 2, 4: 1}
    for place in (None, base):
        assert adapterpack.check(adapter, base=place).healthy
    targets = {m.name for m in adapterpack.verify(adapter, adapter).modules}
    assert {t.rpartition("head.")[2] for t in targets if "head." in t} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    adapterpack.compress(adapter, tmp_path / "a.apack")
    adapterpack.unpack(tmp_path / "a.apack", tmp_path / "back")
    assert oracle.tree_hash(tmp_path / "back") == oracle.tree_hash(adapter)


@pytest.mark.parametrize("ending", ["attention.lora_B.weight", "base_layer.out_proj.lora_A.weight"])
def test_a_moved_parameter_of_attention_is_found(ending, workshop, files, tmp_path: Path) -> None:
    case = ATTENTION[0]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    key = next(k for k in files.tensors(adapter) if k.endswith(ending))
    moved = files.tensors(adapter)[key].clone()
    moved[0, 0] += 0.1
    odd = files.edited(adapter, tmp_path / "odd", {key: moved})
    result = adapterpack.verify(adapter, odd)
    assert not result.equal
    assert sum(m.rel_error > 0 for m in result.modules) == 1
    adapterpack.merge(adapter, base, tmp_path / "m")
    assert adapterpack.verify(adapter, tmp_path / "m", base=base).equal
    assert not adapterpack.verify(odd, tmp_path / "m", base=base).equal


def test_half_of_attention_and_biases_of_it_are_refused(workshop, files, tmp_path: Path) -> None:
    case = ATTENTION[1]
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    half = files.edited(
        adapter, tmp_path / "half", {k: None for k in files.tensors(adapter) if k.endswith("attention.lora_A.weight")}
    )
    assert "half-pair" in codes(adapterpack.check(half))
    with pytest.raises(InvalidFile, match="lora_A"):
        adapterpack.merge(half, base, tmp_path / "m")
    biased = files.edited(adapter, tmp_path / "biased", config={"lora_bias": True})
    with pytest.raises(Unsupported, match="lora_bias"):
        adapterpack.merge(biased, base, tmp_path / "m")


# -- what is refused -------------------------------------------------------------------------------------

NO_WEIGHT = {
    "aLoRA": {"alora_invocation_tokens": [1, 2]},
    "Arrow": {"arrow_config": {"top_k": 2}},
    "layers": {"layer_replication": [[0, 2], [1, 2]]},
    "Lily": {"peft_type": "LILY"},
    "X-LoRA": {"peft_type": "XLORA"},
    "Poly": {"peft_type": "POLY"},
    "prompt tuning": {"peft_type": "PROMPT_TUNING"},
    "prefix tuning": {"peft_type": "PREFIX_TUNING"},
    "p-tuning": {"peft_type": "P_TUNING"},
    "multitask": {"peft_type": "MULTITASK_PROMPT_TUNING"},
    "LLaMA-Adapter": {"peft_type": "ADAPTION_PROMPT"},
    "context-aware": {"peft_type": "CPT"},
    "cartridge": {"peft_type": "CARTRIDGE"},
    "Shadow": {"peft_type": "SHADOW"},
}


@pytest.mark.parametrize("what", NO_WEIGHT)
def test_what_no_weight_can_take_in_says_so(what, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    odd = files.edited(adapter, tmp_path / "a", config=NO_WEIGHT[what])
    with pytest.raises(NoMergedWeight, match=what) as caught:
        adapterpack.merge(odd, base, tmp_path / "m")
    assert caught.value.hint
    with pytest.raises(NoMergedWeight, match=what):
        adapterpack.convert(odd, tmp_path / "lora", to="lora")
    assert adapterpack.inspect(odd).unsupported
    assert adapterpack.check(odd).healthy
    adapterpack.compress(odd, tmp_path / "a.apack")


MIXTURES = {
    "two variants": {"velora_config": {"num_groups": 2}},
    "DoRA": {"use_dora": True},
    "MiCA": {"init_lora_weights": "mica"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "a switch of tomorrow": {"use_hydralora": True},
    "an unknown field": {"use_bdlora": {"nblocks": 2, "match_strict": False, "axis": 1}},
    "parameters": {"target_parameters": ["q_proj.weight"], "target_modules": []},
}


@pytest.mark.parametrize("what", MIXTURES)
def test_mixtures_are_refused(what, workshop, files, tmp_path: Path) -> None:
    odd = files.edited(workshop.adapter(BDLORA[0]), tmp_path / "a", config=MIXTURES[what])
    with pytest.raises(Unsupported):
        adapterpack.merge(odd, workshop.base("llama"), tmp_path / "m")


BAD_BLOCKS = {
    "no object": True,
    "no whole number": {"nblocks": 2.0},
    "no blocks at all": {"nblocks": 0},
    "blocks that do not divide": {"nblocks": 3},
    "more blocks than there are": {"nblocks": 1 << 40},
    "no list": {"target_modules_bd_a": "q_proj"},
    "both lists": {"target_modules_bd_b": ["q_proj"]},
    "no list names it": {"target_modules_bd_b": []},
}


@pytest.mark.parametrize("what", BAD_BLOCKS)
def test_blocks_that_do_not_fit_are_refused(what, workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(BDLORA[0])
    own = BAD_BLOCKS[what]
    own = files.config(adapter)["use_bdlora"] | own if isinstance(own, dict) else own
    odd = files.edited(adapter, tmp_path / "a", config={"use_bdlora": own})
    with pytest.raises(InvalidFile):
        adapterpack.merge(odd, workshop.base("llama"), tmp_path / "m")
    if isinstance(own, dict):
        assert not adapterpack.check(odd).healthy


def test_a_lying_header_allocates_nothing(files, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    a, b = torch.zeros(65536, 1), torch.zeros(1, 65536)
    tensors = {f"{prefix}lora_A.weight": a, f"{prefix}lora_B.weight": b}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 65536, "use_bdlora": {"nblocks": 65536, "target_modules_bd_a": ["q_proj"]}}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidFile, match="written out"):
        adapterpack.convert(tmp_path / "a", tmp_path / "lora", to="lora")


@pytest.mark.parametrize("case", [BDLORA[0], VELORA[0], MONTECLORA[0]], ids=str)
def test_findings(case, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    assert adapterpack.check(adapter, base=base).healthy
    key = next(k for k in files.tensors(adapter) if "k_proj.lora_A" in k)
    half = files.edited(adapter, tmp_path / "half", {key: None})
    assert "half-pair" in codes(adapterpack.check(half))
    rank = files.edited(adapter, tmp_path / "rank", config={"r": 16})
    assert codes(adapterpack.check(rank)) == {"rank-mismatch"}


@pytest.mark.parametrize(("case", "part"), [(VELORA[0], "velora_embed"), (MONTECLORA[0], "gaussian_var_prior")])
def test_training_tensors_that_peft_would_not_load(case, part, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    key = next(k for k in files.tensors(adapter) if part in k)
    odd = files.edited(adapter, tmp_path / "odd", {key: torch.zeros(2)})
    assert ("shape-mismatch", key) in [(f.code, f.key) for f in adapterpack.check(odd).findings]
    with pytest.raises(RuntimeError, match="size mismatch"):
        oracle.peft_load(base, odd)


def test_groups_are_healthy_and_have_no_merged_weight(workshop, tmp_path: Path) -> None:
    base = workshop.base("convnext")
    oracle.make_adapter(
        tmp_path / "a", LoraConfig(r=20 * 2 * 3 * 4, target_modules=["dwconv"]), base=oracle.load_base(base)
    )
    health = adapterpack.check(tmp_path / "a", base=base)
    assert health.healthy
    assert codes(health) == {"no-merged-weight"}
    assert set(adapterpack.inspect(tmp_path / "a").ranks) == {480}
    with pytest.raises(NoMergedWeight, match="groups"):
        adapterpack.merge(tmp_path / "a", base, tmp_path / "m")


class _Small(torch.nn.Module):
    """Convolutions with kernels of one, which PEFT's own matrix lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = torch.nn.Conv1d(6, 10, 1)
        self.square = torch.nn.Conv2d(6, 10, 1)
        self.deep = torch.nn.Conv3d(6, 10, (3, 1, 1))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_kernels_of_one(dtype, dora, files, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = _Small().to(cases.DTYPES[dtype])
    (tmp_path / "base").mkdir()
    original = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(original, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, use_dora=dora, target_modules=[*_SMALL]))
    oracle.perturb(adapted, 0.3)
    adapted.save_pretrained(tmp_path / "a")
    adapterpack.merge(tmp_path / "a", tmp_path / "base", tmp_path / "m", verify="full")
    expected, merged = adapted.merge_and_unload().state_dict(), files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], expected[k]) for k in merged)
    assert sum(not files.same(merged[k], original[k]) for k in merged) == len(_SMALL)


_SMALL = ("flat", "square", "deep")


def test_adapters_that_are_tied_are_added_once_to_what_stays_one_tensor(workshop, files, tmp_path: Path) -> None:
    """`ensure_weight_tying`: the file has one change under two names. PEFT's merge adds it twice to the tensor; the
    model was trained with it once on either side, and so it is merged."""
    base = workshop.base("llama", tie=True)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    oracle.make_adapter(tmp_path / "a", config, base=oracle.load_base(base), scale=0.2)
    assert {k.rpartition(".lora_")[0].rpartition("model.")[2] for k in files.tensors(tmp_path / "a")} >= {"lm_head"}
    model, load = oracle.peft_load(base, tmp_path / "a")
    assert load.clean
    adapterpack.merge(tmp_path / "a", base, tmp_path / "m", verify="full")
    assert "lm_head.weight" not in files.tensors(tmp_path / "m"), "one tensor, as in the base"
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        trained, merged = model(tokens).logits, oracle.load_base(tmp_path / "m")(tokens).logits
    assert torch.linalg.norm(merged - trained) < 1e-5 * torch.linalg.norm(trained)


@pytest.mark.parametrize("case", [BDLORA[0], VELORA[0], MONTECLORA[0]], ids=str)
def test_verify_finds_a_moved_factor_and_lets_training_state_be(case, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    adapterpack.merge(adapter, base, tmp_path / "m")
    assert adapterpack.verify(adapter, tmp_path / "m", base=base).equal
    for key in files.tensors(adapter):
        if "layers.1" in key or "k_proj" not in key:
            continue
        moved = files.tensors(adapter)[key] + 0.25
        odd = files.edited(adapter, tmp_path / key, {key: moved})
        trained = "lora_A." in key or "lora_B." in key
        assert adapterpack.verify(adapter, odd).equal is not trained, key
        assert adapterpack.verify(odd, tmp_path / "m", base=base).equal is not trained, key
