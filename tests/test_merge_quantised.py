"""Merging into quantised bases: 16 bits out by default, FP8 again on request, the rest refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import adapterpack
from adapterpack.errors import Unsupported, UsageError

VECTORS = Path(__file__).parent.parent / "formats" / "quantised" / "vectors"
CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "vocab_size": 96}
TARGETS = ["q_proj", "k_proj", "down_proj"]


def _block_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of 128 x 128 blocks, the plain way."""
    rows, columns = (-(-n // 128) for n in weight.shape)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale = weight[at].float().abs().max() / 448
            scales[i, j], codes[at] = scale, (weight[at].float() / scale).to(torch.float8_e4m3fn)
    return codes, scales


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 base in two shards, the same dequantised by hand, and an adapter for either."""
    root = tmp_path_factory.mktemp("quantised")
    oracle.save_base(oracle.tiny_model("llama", torch.bfloat16, **SIZES), root / "original")
    tensors = load_file(root / "original" / "model.safetensors")
    stored, plain = {}, {}
    for name, tensor in tensors.items():
        plain[name] = tensor
        stored[name] = tensor
        if name.endswith("_proj.weight"):
            codes, scales = _block_fp8(tensor)
            stored |= {name: codes, f"{name}_scale_inv": scales}
            lifted = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: tensor.shape[0], : tensor.shape[1]]
            plain[name] = (codes.float() * lifted).to(torch.bfloat16)
    config = json.loads((root / "original" / "config.json").read_text())
    for name in ("plain", "fp8"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    (root / "fp8" / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    save_file(plain, root / "plain" / "model.safetensors", metadata={"format": "pt"})
    names = sorted(stored)
    weight_map = {}
    for n in (1, 2):
        # A scale may lie in another shard than its weight.
        part = {name: stored[name] for name in names[n - 1 :: 2]}
        file = f"model-0000{n}-of-00002.safetensors"
        save_file(part, root / "fp8" / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in stored.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (root / "fp8" / "model.safetensors.index.json").write_text(json.dumps(index))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    oracle.make_adapter(root / "a", lora, base=oracle.load_base(root / "plain"), scale=0.1)
    return root


def test_the_result_is_what_peft_merges_into_the_dequantised_base(place: Path, files, tmp_path: Path) -> None:
    result = adapterpack.merge(place / "a", place / "fp8", tmp_path / "m", verify="full")
    expected = oracle.peft_merge(place / "plain", place / "a")
    merged = files.tensors(tmp_path / "m")
    assert merged.keys() == files.tensors(place / "plain").keys()
    assert all(files.same(merged[k], expected[k]) for k in merged)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == merged.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in merged.values())
    assert any("block FP8" in note for note in result.notes)
    assert adapterpack.verify(place / "a", tmp_path / "m", base=place / "fp8").equal
    assert adapterpack.verify(place / "a", tmp_path / "m").equal, "the lineage names the base"


def test_the_result_loads_in_transformers(place: Path, tmp_path: Path) -> None:
    adapterpack.merge(place / "a", place / "fp8", tmp_path / "m")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        ours, theirs = (
            oracle.load_base(tmp_path / "m")(ids).logits,
            oracle.peft_merge(place / "plain", place / "a").model(ids).logits,
        )
    assert torch.equal(ours, theirs)


def test_rounding_once_begins_from_the_values_and_not_from_their_16_bits(place: Path, files, tmp_path: Path) -> None:
    adapterpack.merge(place / "a", place / "fp8", tmp_path / "m", rounding="once", verify="full")
    stored = {}
    for file in place.glob("fp8/*.safetensors"):
        stored |= load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    w = (stored[name].float() * scale).double()
    a = files.tensors(place / "a")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    exact = w + 2 * (a[key.format("B")].double() @ a[key.format("A")].double())
    got = files.tensors(tmp_path / "m")[name].double()
    step = 2.0 ** torch.floor(torch.log2(got.abs())) * 2.0**-7
    assert ((got - exact).abs() <= step * 0.5000001).all()


def test_requantised_keeps_the_form_and_every_byte_that_is_not_touched(place: Path, files, tmp_path: Path) -> None:
    result = adapterpack.merge(place / "a", place / "fp8", tmp_path / "m", requantize=True, verify="full")
    shards = sorted(p.name for p in place.glob("fp8/*.safetensors"))
    changed = set()
    for shard in shards:
        assert files.header(tmp_path / "m" / shard) == files.header(place / "fp8" / shard)
        old, new = load_file(place / "fp8" / shard), load_file(tmp_path / "m" / shard)
        changed |= {n for n in old if not files.same(old[n].view(torch.uint8), new[n].view(torch.uint8))}
    touched = {f"model.layers.0.{m}.weight" for m in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")}
    assert changed <= touched | {f"{n}_scale_inv" for n in touched} and touched <= changed
    for name in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "m" / name).read_bytes() == (place / "fp8" / name).read_bytes()
    assert any("%" in note for note in result.notes), "what FP8 costs is said"
    assert adapterpack.verify(place / "a", tmp_path / "m", base=place / "fp8").equal
    merged = oracle.peft_merge(place / "plain", place / "a")
    for name in touched:
        again = {}
        for shard in shards:
            again |= load_file(tmp_path / "m" / shard)
        codes, scales = _block_fp8(merged[name])
        lifted = again[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        value = again[name].float() * lifted[: codes.shape[0], : codes.shape[1]]
        assert (value - merged[name].float()).abs().max() <= merged[name].float().abs().max() * 2.0**-4 * 1.1
        assert torch.allclose(scales, again[f"{name}_scale_inv"], rtol=1e-2)


@pytest.mark.parametrize("requantize", [False, True])
def test_jobs_do_not_change_the_bytes(requantize: bool, place: Path, tmp_path: Path) -> None:
    for jobs in (1, 3):
        adapterpack.merge(place / "a", place / "fp8", tmp_path / f"{jobs}", requantize=requantize, jobs=jobs)
    assert oracle.tree_hash(tmp_path / "1") == oracle.tree_hash(tmp_path / "3")


def test_the_dry_run_tells_the_bytes(place: Path, tmp_path: Path) -> None:
    for requantize in (False, True):
        plan = adapterpack.merge(place / "a", place / "fp8", tmp_path / "m", dry_run=True, requantize=requantize)
        done = adapterpack.merge(place / "a", place / "fp8", tmp_path / f"{requantize}", requantize=requantize)
        assert abs(plan.bytes_written - done.bytes_written) < 1000, "but for config.json and the index"
        assert not requantize or plan.bytes_written == done.bytes_written


def test_requantize_is_for_fp8_alone(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        adapterpack.merge(place / "a", place / "plain", tmp_path / "m", requantize=True)


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "something_new"])
def test_other_quantisations_are_refused_with_a_hint(method: str, place: Path, tmp_path: Path) -> None:
    base = shutil.copytree(place / "plain", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(Unsupported, match=method) as e:
        adapterpack.merge(place / "a", base, tmp_path / "m")
    assert e.value.hint
    assert not (tmp_path / "m").exists()


SCHEMES = sorted(p.name for p in VECTORS.iterdir() if (p / "expected.safetensors").exists())


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_merged_into(name: str, files, tmp_path: Path) -> None:
    """An adapter on one matrix of each vector: W, which the reference implementation dequantised, plus delta."""
    expected = load_file(VECTORS / name / "expected.safetensors")
    matrices = (n for n, t in expected.items() if t.dim() == 2 and n.endswith(".weight"))
    targets = [n for n in matrices if torch.isfinite(expected[n].float()).all()]
    if not targets:
        pytest.skip("it holds no matrix of a linear layer")
    base = shutil.copytree(VECTORS / name, tmp_path / "base")
    for extra in ("expected.safetensors", "exact.safetensors", "expect.json"):
        (base / extra).unlink(missing_ok=True)
    target = targets[0]
    out, into = expected[target].shape
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, into, generator=g), torch.randn(out, 2, generator=g)
    (tmp_path / "a").mkdir()
    module = target.removesuffix(".weight")
    tensors = {f"base_model.model.{module}.lora_{k}.weight": v for k, v in (("A", a), ("B", b))}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    adapterpack.merge(tmp_path / "a", base, tmp_path / "m", verify="full")
    merged = files.tensors(tmp_path / "m")
    assert merged.keys() >= expected.keys()
    for key, was in expected.items():
        if key == target:
            delta = b @ a
            want = (was.float() + delta).to(was.dtype)
            assert files.same(merged[key], want)
        else:
            nan = torch.isnan(was.float())
            assert merged[key].dtype == was.dtype
            assert np.array_equal(merged[key][~nan].float().numpy(), was[~nan].float().numpy())
