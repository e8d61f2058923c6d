"""check: each fault has its own finding, and what PEFT wrote is healthy.

`planted.FAULTS` is the table of what is found: each row is planted here, and mended in test_fix.py where it can be.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import oracle
import planted
import pytest
import torch
from peft import LoraConfig, VBLoRAConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from planted import CONFIGS, FAULTS, VB, Draft
from safetensors.torch import load_file, save_file

import adapterpack
from adapterpack.health import fields

READ = ("lora", "ranks", "rslora", "dora", "biased", "saved", "loha", "vblora", "topk", "vera", "vera16", "seed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.make(tmp_path_factory.mktemp("check"))


_codes = planted.codes


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_wrote_is_healthy(place: Path, name: str) -> None:
    assert _codes(place / name, planted.base_of(place, name)) == set()


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_has_its_finding(place: Path, tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    faulty = planted.plant(place, fault, tmp_path / "a")
    before = oracle.tree_hash(faulty)
    against = planted.base_of(place, fault.source) if fault.base else None
    health = adapterpack.check(faulty, base=against)
    found = [f for f in health.findings if f.code == fault.code]
    assert found, health.findings
    assert all(f.warning == fault.warning and f.fix for f in found)
    assert health.healthy == fault.warning
    assert oracle.tree_hash(faulty) == before
    # And it is the fault that is found, not what it was planted in.
    if fault.spoil is planted.as_it_is:
        return
    clean = {f.code for f in adapterpack.check(place / fault.source, base=against).findings}
    assert fault.code not in clean or fault.code in ("scale-not-plain", "base-reference")


def _defaults(config: Any) -> dict[str, Any]:
    found = {}
    for f in dataclasses.fields(config):
        value = f.default if f.default is not dataclasses.MISSING else None
        if f.default_factory is not dataclasses.MISSING:
            value = f.default_factory()
        value = {} if dataclasses.is_dataclass(value) else value
        found[f.name] = value.value if isinstance(value, enum.Enum) else value
    return found


@pytest.mark.parametrize("peft_type", PEFT_TYPE_TO_CONFIG_MAPPING)
def test_the_table_of_config_fields_is_peft_s(peft_type: Any) -> None:
    assert fields.known(str(peft_type.value)) == _defaults(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type])


def test_a_truncated_file_is_named_and_a_header_alone_is_empty(place: Path, tmp_path: Path) -> None:
    """As left by an upload that ended early, and by a save of nothing: 40 bytes."""
    for name, data in {
        "cut": (place / "lora" / "adapter_model.safetensors").read_bytes()[:-100],
        "short": b"",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_bytes((place / "lora" / "adapter_config.json").read_bytes())
        (tmp_path / name / "adapter_model.safetensors").write_bytes(data)
        with pytest.raises(adapterpack.AdapterpackError, match="bytes") as caught:
            adapterpack.check(tmp_path / name)
        assert caught.value.hint
    nothing = planted.plant(place, FAULTS["no tensors"], tmp_path / "nothing")
    assert (nothing / "adapter_model.safetensors").stat().st_size == 40
    assert _codes(nothing) >= {"empty"}


def test_pickles_are_named(place: Path, tmp_path: Path) -> None:
    directory = Draft.read(place / "lora").write(tmp_path / "a")
    for name in ("training_args.bin", "optimizer.pt"):
        (directory / name).write_bytes(b"x")
    [finding] = [f for f in adapterpack.check(directory).findings if f.code == "pickles-beside"]
    assert "training_args.bin" in finding.message and "optimizer.pt" in finding.message
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()
    findings = adapterpack.check(directory, allow_pickle=True).findings
    assert "pickle" in {f.code for f in findings}


def test_holes_in_the_layers_are_seen_without_a_base(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"])
    oracle.make_adapter(tmp_path / "a", config, num_hidden_layers=8, scale=0.5)
    assert "missing-modules" not in _codes(tmp_path / "a", warnings=True)
    for n, mark in enumerate(("layers.5.", "layers.4.self_attn.k_proj")):
        d = Draft.read(tmp_path / "a")
        d.tensors = {k: t for k, t in d.tensors.items() if mark not in k}
        holed = d.write(tmp_path / f"h{n}")
        [finding] = [f for f in adapterpack.check(holed).findings if f.code == "missing-modules"]
        assert mark.strip(".") in finding.message


def test_only_some_layers_are_a_choice_and_no_hole(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 2, 4, 5, 7])
    oracle.make_adapter(tmp_path / "a", config, num_hidden_layers=8, scale=0.5, base_dir=tmp_path / "base")
    for base in (None, tmp_path / "base"):
        assert "missing-modules" not in _codes(tmp_path / "a", base, warnings=True)


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
    said = json.loads((case / "expect.json").read_text())
    # What PEFT cannot read as it was meant is no false alarm.
    wanted = FAULTY.get(case.name, set()) | set(said.get("findings", ()))
    for base in (None, vector_base(said["base"])):
        assert _codes(path, base) == wanted


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


@pytest.mark.parametrize("name", READ)
def test_a_base_without_the_modules_is_a_finding(place: Path, name: str) -> None:
    assert _codes(place / name, place / "other") == {"not-in-base"}


def test_a_base_of_another_size_is_a_finding(place: Path, tmp_path: Path) -> None:
    oracle.save_base(oracle.tiny_model("llama", hidden_size=32, intermediate_size=48), tmp_path / "base")
    assert _codes(place / "lora", tmp_path / "base") == {"shape-not-in-base"}
