"""Checkpoints of VB-LoRA's own NLU code become PEFT directories that compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import transformers
from safetensors.torch import save_file

import adapterpack
from adapterpack.errors import InvalidFile, PickleRefused, Unsupported

_B, _N, _R, _K = 16, 12, 3, 2
_MODULES = [f"roberta.encoder.layer.{n}.attention.self.{m}" for n in (0, 1) for m in ("query", "value")]
_CONFIG = {"rank": _R, "topk": _K, "num_vectors": _N, "vector_length": _B, "vb_module": "query,value"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    config = transformers.RobertaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        max_position_embeddings=40,
        num_labels=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = transformers.RobertaForSequenceClassification(config)
    return oracle.save_base(model, tmp_path_factory.mktemp("roberta") / "base")


def _state(base: Path, files) -> dict[str, torch.Tensor]:
    """The state dict that the authors' trainer leaves: the bank stands under every layer that uses it."""
    g = torch.Generator().manual_seed(4)
    state = dict(files.tensors(base))
    bank = torch.randn(_N, _B, generator=g) * 0.1
    for module in _MODULES:
        state[f"{module}.logits_A"] = torch.randn(64 // _B, _R, _N, generator=g)
        state[f"{module}.logits_B"] = torch.randn(64 // _B, _R, _N, generator=g)
        state[f"{module}.vector_bank"] = bank.clone()
    state["vector_bank"] = bank.clone()
    for name in [n for n in state if n.startswith("classifier.")]:
        state[name] = state[name] + torch.randn(state[name].shape, generator=g) * 0.1
    return state


def _write(directory: Path, base: Path, state: dict[str, torch.Tensor], **config: object) -> Path:
    directory.mkdir()
    own = json.loads((base / "config.json").read_text()) | {"_name_or_path": "roberta-base"} | _CONFIG | config
    (directory / "config.json").write_text(json.dumps(own))
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    (directory / "vocab.json").write_text("{}")
    return directory


def _delta(state: dict[str, torch.Tensor], module: str) -> np.ndarray:
    """x @ A @ B of the authors' forward, as a change of W, (out, in), f64."""

    def mixed(logits: np.ndarray) -> np.ndarray:
        order = np.argsort(-logits, axis=-1, kind="stable")[..., :_K]
        chosen = np.take_along_axis(logits, order, -1)
        weights = np.exp(chosen - chosen.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights[..., None] * state["vector_bank"].double().numpy()[order]).sum(-2)

    a = mixed(state[f"{module}.logits_A"].double().numpy())
    b = mixed(state[f"{module}.logits_B"].double().numpy())
    a = a.transpose(0, 2, 1).reshape(-1, _R)
    b = b.transpose(1, 0, 2).reshape(_R, -1)
    return (a @ b).T


@pytest.mark.parametrize("to", ["full-logits", "topk", "lora"])
def test_it_becomes_what_peft_reads(to, base, files, tmp_path: Path) -> None:
    state = _state(base, files)
    source = _write(tmp_path / "original", base, state)
    before = oracle.tree_hash(source)
    made = adapterpack.convert(source, tmp_path / "a", to=to)
    assert made.grade == "equivalent" and made.max_rel_error < 5e-6
    assert any("not trained" in d for d in made.dropped)
    assert oracle.tree_hash(source) == before
    model, load = oracle.peft_load(base, tmp_path / "a")
    assert load.clean
    adapterpack.merge(tmp_path / "a", base, tmp_path / "m", verify="full")
    merged, original = files.tensors(tmp_path / "m"), files.tensors(base)
    for module in _MODULES:
        # (PEFT cannot merge VB-LoRA beside a saved module that has layers of its own.)
        delta = model.get_submodule(f"base_model.model.{module}").get_delta_weight("default").detach()
        assert torch.equal(original[f"{module}.weight"] + delta, merged[f"{module}.weight"])
    for name in original:
        found = merged[name] - original[name]
        if name.startswith("classifier."):
            assert torch.equal(merged[name], state[name])
        elif name.removesuffix(".weight") in _MODULES:
            wanted = torch.from_numpy(_delta(state, name.removesuffix(".weight")))
            assert torch.linalg.norm(found - wanted) < 1e-5 * torch.linalg.norm(wanted)
        else:
            assert not found.any()
    assert adapterpack.verify(source, tmp_path / "a").equal
    assert adapterpack.check(tmp_path / "a", base=base).healthy


def test_what_it_is_is_told_and_its_config_is_peft_s(base, files, tmp_path: Path) -> None:
    source = _write(tmp_path / "original", base, _state(base, files))
    seen = adapterpack.inspect(source)
    assert (seen.method, seen.encoding, seen.ranks) == ("vblora", "full-logits", {_R: 4})
    assert any("other code than PEFT" in n for n in seen.notes)
    adapterpack.convert(source, tmp_path / "a", to="full-logits")
    config = files.config(tmp_path / "a")
    assert config["peft_type"] == "VBLORA" and config["base_model_name_or_path"] == "roberta-base"
    assert {k: config[k] for k in ("r", "topk", "num_vectors", "vector_length")} == {
        "r": _R,
        "topk": _K,
        "num_vectors": _N,
        "vector_length": _B,
    }
    assert sorted(config["target_modules"]) == sorted(_MODULES)
    assert config["modules_to_save"] == ["classifier"]
    assert not any("dense.weight" in k and "encoder" in k for k in files.tensors(tmp_path / "a"))


def test_a_pickle_is_read_on_request_alone(base, files, tmp_path: Path) -> None:
    source = _write(tmp_path / "original", base, _state(base, files))
    adapterpack.convert(source, tmp_path / "a", to="lora")
    torch.save(files.tensors(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(PickleRefused):
        adapterpack.convert(source, tmp_path / "b", to="lora")
    adapterpack.convert(source, tmp_path / "b", to="lora", allow_pickle=True)
    assert files.tensors(tmp_path / "a").keys() == files.tensors(tmp_path / "b").keys()
    assert all(files.same(t, files.tensors(tmp_path / "b")[k]) for k, t in files.tensors(tmp_path / "a").items())


def test_other_jobs_ask_for_the_conversion(base, files, tmp_path: Path) -> None:
    source = _write(tmp_path / "original", base, _state(base, files))
    for job in (
        lambda: adapterpack.compress(source, tmp_path / "x.apack"),
        lambda: adapterpack.merge(source, base, tmp_path / "m"),
        lambda: adapterpack.check(source),
    ):
        with pytest.raises(Unsupported, match="own code") as caught:
            job()
        assert "convert" in str(caught.value.hint)


def _other_bank(state: dict[str, torch.Tensor]) -> None:
    state[f"{_MODULES[1]}.vector_bank"] = state["vector_bank"] + 1


def _no_bank(state: dict[str, torch.Tensor]) -> None:
    for name in [n for n in state if n.endswith("vector_bank")]:
        del state[name]


def _flat(state: dict[str, torch.Tensor]) -> None:
    state[f"{_MODULES[0]}.logits_A"] = torch.zeros(4, _N)


def _other_vectors(state: dict[str, torch.Tensor]) -> None:
    state[f"{_MODULES[0]}.logits_B"] = torch.zeros(4, _R, _N + 1)


def _other_rank(state: dict[str, torch.Tensor]) -> None:
    for side in "AB":
        state[f"{_MODULES[0]}.logits_{side}"] = torch.zeros(4, _R + 1, _N)


@pytest.mark.parametrize("fault", [_other_bank, _no_bank, _flat, _other_vectors, _other_rank])
def test_faults_are_named(fault, base, files, tmp_path: Path) -> None:
    state = _state(base, files)
    fault(state)
    source = _write(tmp_path / "original", base, state)
    with pytest.raises(InvalidFile):
        adapterpack.convert(source, tmp_path / "a", to="lora")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("topk", [0, 2.0, None, 13])
def test_a_senseless_topk_is_refused(topk, base, files, tmp_path: Path) -> None:
    source = _write(tmp_path / "original", base, _state(base, files), topk=topk)
    with pytest.raises(InvalidFile, match="topk"):
        adapterpack.convert(source, tmp_path / "a", to="lora")
