"""LoRA-XS against its own definition: PEFT has no such method, and misreads its files."""

from __future__ import annotations

import json
from pathlib import Path

import cases
import oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import save_file

import adapterpack
from adapterpack.errors import InvalidFile, Unsupported

_TARGETS = ["q_proj", "k_proj", "down_proj"]
_SPELLINGS = ("_lora_latent_mapping.weight", ".default_lora_latent_mapping.weight")


def _train(base: Path, directory: Path, spelling: str, **fields: object) -> dict[str, torch.Tensor]:
    """What the authors' code leaves: PEFT's LoRA with A and B from the SVD of the base and a module between them.

    Returns:
        The model's weights as the trained model computes with them, f32.
    """
    model = get_peft_model(
        oracle.load_base(base), LoraConfig(**{"r": 6, "lora_alpha": 9, "target_modules": _TARGETS, **fields})
    )
    g = torch.Generator().manual_seed(3)
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            w = layer.base_layer.weight.detach().float()
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
            rank = layer.r["default"]
            layer.lora_A["default"].weight.data = (s[:rank, None] * vh[:rank]).contiguous()
            layer.lora_B["default"].weight.data = u[:, :rank].contiguous()
            layer.default_lora_latent_mapping = torch.nn.Linear(rank, rank, bias=False)
            r = layer.default_lora_latent_mapping.weight
            r.data = torch.randn(r.shape, generator=g) * 0.3
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weights[f"{name.removeprefix('base_model.model.')}.weight"] = (
                w + (b @ r @ a).detach() * layer.scaling["default"]
            )
    # PEFT's own naming gives the newer spelling.
    state = {k: v.clone() for k, v in oracle.get_peft_model_state_dict(model).items()}
    assert sum(k.endswith(_SPELLINGS[1]) for k in state) == len(weights) == 6
    directory.mkdir()
    named = {k.replace(_SPELLINGS[1], spelling): v for k, v in state.items()}
    save_file(named, directory / "adapter_model.safetensors", {"format": "pt"})
    model.peft_config["default"].save_pretrained(directory)
    return weights


@pytest.fixture(params=_SPELLINGS, ids=["older", "newer"])
def trained(request, workshop, tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    base = workshop.base("llama")
    return tmp_path / "xs", base, _train(base, tmp_path / "xs", request.param)


def test_the_merge_is_the_definition_bit_for_bit(trained, files, tmp_path: Path) -> None:
    adapter, base, weights = trained
    result = adapterpack.merge(adapter, base, tmp_path / "m", verify="full")
    merged, original = files.tensors(tmp_path / "m"), files.tensors(base)
    assert result.tensors_changed == len(weights)
    assert all(files.same(merged[k], weights.get(k, original[k])) for k in original)
    assert adapterpack.verify(adapter, tmp_path / "m", base=base).equal


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_into_16_bits_it_is_rounded_once(dtype, workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama", dtype)
    weights = _train(base, tmp_path / "xs", _SPELLINGS[1])
    adapterpack.merge(tmp_path / "xs", base, tmp_path / "m", verify="full")
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], w.to(cases.DTYPES[dtype])) for k, w in weights.items())


def test_patterns_and_rslora(workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama")
    patterns = {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"down_proj": 30}, "use_rslora": True}
    weights = _train(base, tmp_path / "xs", _SPELLINGS[0], **patterns)
    assert adapterpack.inspect(tmp_path / "xs").ranks == {3: 2, 6: 4}
    adapterpack.merge(tmp_path / "xs", base, tmp_path / "m")
    assert all(files.same(files.tensors(tmp_path / "m")[k], w) for k, w in weights.items())


def test_as_plain_lora_peft_merges_it_to_the_same_bits(trained, files, tmp_path: Path) -> None:
    adapter, base, weights = trained
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora")
    assert (str(made.grade), made.max_rel_error) == ("equivalent", 0)
    merged = oracle.peft_merge(base, tmp_path / "lora")
    assert merged.load.clean
    assert all(files.same(merged[k], w) for k, w in weights.items())
    assert adapterpack.check(tmp_path / "lora", base=base).healthy
    assert adapterpack.inspect(tmp_path / "lora").method == "lora"


def test_peft_misreads_it_and_check_says_so(trained, files) -> None:
    adapter, base, weights = trained
    loaded = oracle.peft_merge(base, adapter)
    assert len(loaded.load.unexpected) == len(weights), "PEFT drops what was trained"
    original = files.tensors(base)
    for name, right in weights.items():
        wrong = torch.linalg.norm(loaded[name] - right) / torch.linalg.norm(right - original[name])
        assert wrong > 0.5
    health = adapterpack.check(adapter, base=base)
    assert not health.healthy
    assert [f.code for f in health.findings] == ["misread-by-peft"]
    assert "--to lora" in str(health.findings[0].fix)


def test_the_file_comes_back_and_is_seen(trained, tmp_path: Path) -> None:
    adapter, _, _ = trained
    seen = adapterpack.inspect(adapter)
    assert (seen.method, seen.encoding, seen.ranks) == ("loraxs", "loraxs", {6: 6})
    adapterpack.compress(adapter, tmp_path / "a.apack")
    adapterpack.unpack(tmp_path / "a.apack", tmp_path / "back")
    assert oracle.tree_hash(tmp_path / "back") == oracle.tree_hash(adapter)
    adapterpack.convert(adapter, tmp_path / "half", dtype="bf16", max_error=0.05)
    assert adapterpack.inspect(tmp_path / "half").dtypes == {"BF16": 18}


def test_a_moved_latent_is_found(trained, files, tmp_path: Path) -> None:
    adapter, base, _ = trained
    key = next(k for k in files.tensors(adapter) if "latent" in k)
    moved = files.tensors(adapter)[key].clone()
    moved[1, 2] += 0.5
    odd = files.edited(adapter, tmp_path / "odd", {key: moved})
    assert not adapterpack.verify(adapter, odd).equal
    adapterpack.merge(adapter, base, tmp_path / "m")
    assert not adapterpack.verify(odd, tmp_path / "m", base=base).equal


FAULTS = {
    "no latent": (None, InvalidFile, "lacks latent"),
    "not square": (torch.zeros(6, 5), InvalidFile, "R"),
    "another rank": (torch.zeros(5, 5), InvalidFile, "R"),
    "three dimensions": (torch.zeros(6, 6, 1), InvalidFile, "R"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_latents_that_do_not_fit_are_refused(what, workshop, files, tmp_path: Path) -> None:
    value, error, message = FAULTS[what]
    base = workshop.base("llama")
    _train(base, tmp_path / "xs", _SPELLINGS[1])
    key = next(k for k in files.tensors(tmp_path / "xs") if "latent" in k)
    odd = files.edited(tmp_path / "xs", tmp_path / "odd", {key: value})
    with pytest.raises(error, match=message):
        adapterpack.merge(odd, base, tmp_path / "m")
    assert "half-pair" in {f.code for f in adapterpack.check(odd).findings}


def test_one_latent_under_two_names_and_dora_are_refused(workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama")
    _train(base, tmp_path / "xs", _SPELLINGS[1])
    key = next(k for k in files.tensors(tmp_path / "xs") if "latent" in k)
    twice = {key.replace(_SPELLINGS[1], _SPELLINGS[0]): torch.zeros(6, 6)}
    with pytest.raises(InvalidFile, match="two names"):
        adapterpack.merge(files.edited(tmp_path / "xs", tmp_path / "odd", twice), base, tmp_path / "m")
    dora = files.edited(tmp_path / "xs", tmp_path / "dora", config={"use_dora": True})
    with pytest.raises(Unsupported):
        adapterpack.merge(dora, base, tmp_path / "m")
    assert json.loads((dora / "adapter_config.json").read_text())["peft_type"] == "LORA"
