"""check: each fault has its own finding, and what PEFT wrote is healthy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import oracle
import pytest
import torch
from peft import LoraConfig, VBLoRAConfig, VeraConfig
from safetensors.torch import load_file, save_file

import adapterpack

TARGETS = ["q_proj", "down_proj"]
Tensors = dict[str, torch.Tensor]
VB = {"r": 2, "num_vectors": 20, "vector_length": 16, "target_modules": TARGETS}
CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=TARGETS),
    "vblora": VBLoRAConfig(**VB),
    "topk": VBLoRAConfig(save_only_topk_weights=True, topk=3, **VB),
    "vera": VeraConfig(r=4, target_modules=TARGETS),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("check")
    oracle.save_base(oracle.tiny_model("llama"), root / "base")
    oracle.save_base(oracle.tiny_model("gpt2"), root / "other")
    for name, config in CONFIGS.items():
        oracle.make_adapter(root / name, config, scale=0.5)
    return root


def _codes(path: Path, base: Path | None = None) -> set[str]:
    health = adapterpack.check(path, base=base)
    codes = {f.code for f in health.findings if not f.warning}
    assert health.healthy == (not codes)
    return codes


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_wrote_is_healthy(place: Path, name: str) -> None:
    assert _codes(place / name, place / "base") == set()


def _set(ending: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Tensors, Any], None]:
    """Change, or drop, the first tensor with that ending."""

    def spoil(tensors: Tensors, config: Any) -> None:
        key = next(k for k in sorted(tensors) if k.endswith(ending))
        new = change(tensors[key].clone())
        if new is None:
            del tensors[key]
        else:
            tensors[key] = new

    return spoil


def _put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t.view(-1)[0] = value
        return t

    return change


FAULTS: dict[str, tuple[str, str, Callable[[Tensors, Any], Any]]] = {
    "NaN": ("lora", "nan", _set("lora_A.weight", _put(float("nan")))),
    "infinite": ("vera", "infinite", _set("lambda_d", _put(float("inf")))),
    "all-zero B": ("lora", "all-zero", _set("lora_B.weight", torch.zeros_like)),
    "all-zero lambda_b": ("vera", "all-zero", _set("lambda_b", torch.zeros_like)),
    "half a pair": ("lora", "half-pair", _set("lora_B.weight", lambda t: None)),
    "rank": ("lora", "rank-mismatch", lambda t, c: c.update(r=5)),
    "vera rank": ("vera", "rank-mismatch", lambda t, c: c.update(r=5)),
    "missing bank": ("vblora", "missing-bank", _set("vector_bank", lambda t: None)),
    "flag says full": ("topk", "wrong-topk-flag", lambda t, c: c.update(save_only_topk_weights=False)),
    "flag says topk": ("vblora", "wrong-topk-flag", lambda t, c: c.update(save_only_topk_weights=True)),
    "index outside": ("topk", "index-outside-bank", _set("topk_indices", _put(20))),
    "index twice": ("topk", "duplicate-index", _set("topk_indices", torch.zeros_like)),
    "16-bit weights": ("topk", "narrow-topk-weights", _set("topk_weights", lambda t: t.bfloat16())),
    "negative last": ("topk", "negative-topk-weight", _set("topk_weights", lambda t: t * 0 + 0.75)),
    "bank size": ("vblora", "bank-mismatch", lambda t, c: c.update(num_vectors=21)),
    "projections gone": ("vera", "wrong-projection-flag", lambda t, c: [t.pop(f"base_model.vera_{x}") for x in "AB"]),
    "projections ignored": ("vera", "wrong-projection-flag", lambda t, c: c.update(save_projection=False)),
    "unknown key": ("lora", "unknown-key", lambda t, c: t.update({"stranger": torch.ones(1)})),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_finding(place: Path, tmp_path: Path, fault: str) -> None:
    name, code, spoil = FAULTS[fault]
    tensors = load_file(place / name / "adapter_model.safetensors")
    config = json.loads((place / name / "adapter_config.json").read_text())
    spoil(tensors, config)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert code in _codes(tmp_path)


ROOT = Path(__file__).parent.parent
VECTORS = [
    p.parent
    for p in sorted((ROOT / "formats").glob("*/vectors/**/adapter_config.json"))
    # Those of packs are parents, and have tests of their own.
    if "apack" not in p.parts
]
FAULTY = {"unknown-keys": {"unknown-key"}}
"""Vectors that are odd on purpose."""


@pytest.fixture(scope="module")
def vector_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """The base that a vector's expect.json describes."""
    root = tmp_path_factory.mktemp("vector-bases")
    made: dict[str, Path] = {}

    def make(said: dict[str, Any]) -> Path:
        name = json.dumps(said, sort_keys=True)
        if name not in made:
            dtype = getattr(torch, said["dtype"])
            model = oracle.tiny_model(said["kind"], dtype, said["tie"], said["bias"], said["seed"], **said["config"])
            made[name] = oracle.save_base(model, root / str(len(made)))
        return made[name]

    return make


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: "/".join(p.relative_to(ROOT / "formats").parts))
def test_no_vector_that_peft_wrote_gives_a_false_alarm(path: Path, vector_base: Any) -> None:
    case = path if (path / "expect.json").exists() else path.parent
    said = json.loads((case / "expect.json").read_text())["base"]
    for base in (None, vector_base(said)):
        assert _codes(path, base) == FAULTY.get(case.name, set())


@pytest.mark.parametrize("case", [*cases.LORA, *cases.VBLORA, *cases.WIDTHS, *cases.VERA], ids=str)
def test_no_adapter_of_the_cases_gives_a_false_alarm(case: Any, workshop: Any) -> None:
    assert _codes(workshop.adapter(case), workshop.base_of(case)) == set()


def test_peft_s_own_topk_of_peaked_logits_is_flagged_and_mended(tmp_path: Path) -> None:
    """PEFT saves it without a word and loads it as NaN."""

    def peak(model: torch.nn.Module) -> None:
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "logits" in name:
                    p.copy_(torch.rand(p.shape, generator=g) * 300)

    config = VBLoRAConfig(**{**VB, "r": 4, "num_vectors": 60, "topk": 4}, save_only_topk_weights=True)
    oracle.make_adapter(tmp_path / "a", config, post=peak)
    base = oracle.tiny_model("llama")
    assert any(bool(t.isnan().any()) for t in oracle.peft_merge(base, tmp_path / "a").values())
    assert _codes(tmp_path / "a") == {"negative-topk-weight"}
    adapterpack.convert(tmp_path / "a", tmp_path / "mended", to="topk")
    assert _codes(tmp_path / "mended") == set()
    mended = oracle.peft_merge(oracle.tiny_model("llama"), tmp_path / "mended")
    assert all(bool(t.isfinite().all()) for t in mended.values())


def test_what_it_says_names_the_tensor_and_a_way_out(place: Path, tmp_path: Path) -> None:
    tensors = load_file(place / "lora" / "adapter_model.safetensors")
    key = sorted(tensors)[0]
    tensors[key].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_bytes((place / "lora" / "adapter_config.json").read_bytes())
    [finding] = [f for f in adapterpack.check(tmp_path).findings if not f.warning]
    assert (finding.code, finding.key) == ("nan", key)
    assert finding.fix
    assert "1 of" in finding.message


@pytest.mark.parametrize("name", CONFIGS)
def test_a_base_without_the_modules_is_a_finding(place: Path, name: str) -> None:
    assert _codes(place / name, place / "other") == {"not-in-base"}


def test_a_base_of_another_size_is_a_finding(place: Path, tmp_path: Path) -> None:
    oracle.save_base(oracle.tiny_model("llama", hidden_size=32, intermediate_size=48), tmp_path / "base")
    assert _codes(place / "lora", tmp_path / "base") == {"shape-not-in-base"}
