"""Adapters for serving engines: what each engine's formula makes of the result is what PEFT makes of the source."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from peft import LoraConfig, VBLoRAConfig, VeraConfig
from safetensors.torch import load_file

import adapterpack
from adapterpack import engines, peft_versions
from adapterpack.errors import LossRefused, Unsupported, UsageError, WrongBase

ATTENTION = ["q_proj", "k_proj", "v_proj"]
ALL = [*ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj"]
SERVED = ["vllm", "sglang", "tgi", "lorax", "llamacpp"]
EVERY = [*SERVED, "peft", "peft==0.4", "peft==0.10", "peft==0.13.2", "peft==0.15"]
Delta = Mapping[str, torch.Tensor]


# -- engines, each in a line --------------------------------------------------------------------------------


def _plain(config: Mapping[str, Any], rank: int, name: str) -> float:
    """SGLang 0.5.23, lora.py: one factor for the whole adapter."""
    return float(config["lora_alpha"]) / int(config["r"])


def _punica(config: Mapping[str, Any], rank: int, name: str) -> float:
    """LoRAX and TGI, adapters/lora.py: the same, rsLoRA known."""
    r = config["r"]
    return float(config["lora_alpha"]) / (math.sqrt(r) if config.get("use_rslora") else r)


def _llamacpp(config: Mapping[str, Any], rank: int, name: str) -> float:
    """convert_lora_to_gguf.py writes lora_alpha; the engine divides by the rank of each tensor."""
    return float(config["lora_alpha"]) / rank


NAIVE: Mapping[str, Callable[[Mapping[str, Any], int, str], float]] = {
    "vllm": _punica,  # before it read patterns
    "sglang": _plain,
    "tgi": _punica,
    "lorax": _punica,
    "llamacpp": _llamacpp,
}


def naive(directory: Path, engine: str) -> dict[str, torch.Tensor]:
    """The change of each weight as that engine computes it, f64."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{name}.weight"] = NAIVE[engine](config, a.shape[0], name) * (b.double() @ a.double())
    return found


def true(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The change of each weight that PEFT's merge makes."""
    plain = oracle.load_base(base).state_dict()
    merged = oracle.peft_merge(base, adapter)
    return {n: merged[n].double() - w.double() for n, w in plain.items() if not torch.equal(merged[n], w)}


def error(ours: Delta, theirs: Delta) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - d).norm() / d.norm()) for n, d in theirs.items())


ROUNDING = 5e-6
"""Of PEFT's own f32 merge, against which a change is seen."""

LORA = {"r": 4, "lora_alpha": 6, "target_modules": ALL}
SOURCES: Mapping[str, tuple[Any, set[str]]] = {
    # the config, and the engines that misread the source
    "plain": (lambda: LoraConfig(**LORA), set()),
    "rslora": (lambda: LoraConfig(**{**LORA, "r": 3}, use_rslora=True), {"sglang", "llamacpp"}),
    "alpha": (lambda: LoraConfig(**LORA, alpha_pattern={"k_proj": 12, "up_proj": 3}), set(SERVED)),
    "alpha-odd": (lambda: LoraConfig(**LORA, alpha_pattern={"k_proj": 9, "up_proj": 3.3}), set(SERVED)),
    "ranks": (lambda: LoraConfig(**LORA, rank_pattern={"v_proj": 2, "o_proj": 7}), set(SERVED) - {"llamacpp"}),
    "ranks-rslora": (lambda: LoraConfig(**LORA, use_rslora=True, rank_pattern={"v_proj": 2}), set(SERVED)),
    "regex": (
        lambda: LoraConfig(**{**LORA, "target_modules": r".*\.[qkvo]_proj"}, use_rslora=True),
        {"sglang", "llamacpp"},
    ),
    "vblora": (lambda: VBLoRAConfig(r=2, num_vectors=20, vector_length=16, target_modules=ALL), set()),
    "vera": (lambda: VeraConfig(r=4, target_modules=ALL), set()),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engines")
    base = oracle.save_base(oracle.tiny_model("llama"), root / "base")
    for name, (config, _) in SOURCES.items():
        oracle.make_adapter(root / name, config(), scale=0.3, base_dir=base)
        oracle.make_adapter(
            root / f"{name}-bf16",
            config(),
            "llama",
            torch.bfloat16,
            scale=0.3,
            autocast=False,
            base_dir=root / "base16",
        )
    return root


@pytest.mark.parametrize("engine", EVERY)
@pytest.mark.parametrize("name", SOURCES)
def test_peft_reads_the_result_as_the_source(place: Path, tmp_path: Path, name: str, engine: str) -> None:
    base, out = place / "base", tmp_path / "out"
    result = adapterpack.convert(place / name, out, engine=engine, base=base)
    assert result.grade == "equivalent" and result.max_rel_error <= 1e-7
    assert str(out) in str(result.serve)
    assert oracle.peft_load(base, out)[1].clean
    assert error(true(base, out), true(base, place / name)) <= ROUNDING
    assert adapterpack.check(out, engine=engine, base=base).healthy
    assert adapterpack.verify(place / name, out, base=base).equal
    config = json.loads((out / "adapter_config.json").read_text())
    assert not config.get("use_rslora") or engine in ("peft", "peft==0.15")
    assert config["base_model_name_or_path"] == str(base)
    if engine in SERVED:
        assert not {"rank_pattern", "alpha_pattern"} & config.keys()
        assert isinstance(config["target_modules"], list)
        ranks = {t.shape[0] for k, t in load_file(out / "adapter_model.safetensors").items() if "lora_A" in k}
        assert ranks == {config["r"]}


@pytest.mark.parametrize("engine", SERVED)
@pytest.mark.parametrize("name", [n for n in SOURCES if n not in ("vblora", "vera")])
def test_the_engine_s_own_formula(place: Path, tmp_path: Path, name: str, engine: str) -> None:
    """It gives PEFT's change for the result, and another one for a source that it would misread, as check says."""
    base = place / "base"
    wanted = true(base, place / name)
    adapterpack.convert(place / name, tmp_path / "out", engine=engine, base=base)
    assert error(naive(tmp_path / "out", engine), wanted) <= ROUNDING
    misread = engine in SOURCES[name][1]
    assert (error(naive(place / name, engine), wanted) > 0.1) == misread
    codes = {f.code for f in adapterpack.check(place / name, engine=engine, base=base).findings}
    assert bool(codes & {"scale", "mixed-ranks", "patterns"}) >= misread


@pytest.mark.parametrize("name", [n for n in SOURCES if n not in ("vblora", "vera")])
def test_16_bits_are_folded_exactly_or_widened(place: Path, tmp_path: Path, name: str) -> None:
    source, out = place / f"{name}-bf16", tmp_path / "out"
    result = adapterpack.convert(source, out, engine="vllm")
    before, after = (load_file(d / "adapter_model.safetensors") for d in (source, out))
    dtypes = {t.dtype for t in after.values()}
    widened = any("F32" in n for n in result.notes)
    assert {t.dtype for t in before.values()} == {torch.bfloat16}
    assert widened == (torch.float32 in dtypes) == (name in ("alpha-odd", "ranks", "ranks-rslora"))
    assert result.max_rel_error <= (1e-7 if widened else 0 if name in ("plain", "alpha") else 1e-15)
    assert adapterpack.verify(source, out).max_rel_error <= 1e-7


def test_folding_into_16_bits_on_request_is_measured(place: Path, tmp_path: Path) -> None:
    source = place / "alpha-odd-bf16"
    with pytest.raises(LossRefused) as e:
        adapterpack.convert(source, tmp_path / "out", engine="vllm", dtype="bfloat16")
    assert e.value.exit_code == 4
    result = adapterpack.convert(source, tmp_path / "out", engine="vllm", dtype="bfloat16", max_error=4e-3)
    assert result.grade == "approximate" and 1e-4 < result.max_rel_error < 4e-3


def test_one_scale_costs_nothing_where_one_is_enough(place: Path, tmp_path: Path) -> None:
    for name in ("plain", "rslora"):
        adapterpack.convert(place / name, tmp_path / name, engine="llamacpp")
        before, after = (load_file(d / "adapter_model.safetensors") for d in (place / name, tmp_path / name))
        assert all(torch.equal(before[k], t) for k, t in after.items())
    config = json.loads((tmp_path / "rslora" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(6 / math.sqrt(3), rel=1e-15)
    assert config["use_rslora"] is False


# -- what is no LoRA ---------------------------------------------------------------------------------------


def _adapter(root: Path, name: str, config: LoraConfig, post: Any = None, **how: Any) -> tuple[Path, Path]:
    base = root / f"base-{name}"
    oracle.make_adapter(root / name, config, scale=0.3, base_dir=base, post=post, **how)
    return base, root / name


def test_token_rows_and_heads_are_folded_into_lora(tmp_path: Path) -> None:
    base, source = _adapter(
        tmp_path, "a", LoraConfig(**LORA, trainable_token_indices={"embed_tokens": [3, 90], "lm_head": [5]})
    )
    with pytest.raises(Unsupported, match="rows have new values") as e:
        adapterpack.convert(source, tmp_path / "no", engine="vllm", base=base)
    assert "--extra split" in str(e.value.hint)
    with pytest.raises(WrongBase, match="base"):
        # It names its base, but nothing is read of one that was not asked for.
        adapterpack.convert(source, tmp_path / "no", engine="vllm", extra="fold")
    result = adapterpack.convert(source, tmp_path / "out", engine="vllm", base=base, extra="fold")
    assert result.grade == "equivalent" and result.max_rel_error <= 1e-7
    load = oracle.peft_load(base, tmp_path / "out")[1]
    # PEFT would save the embeddings themselves too, where it adapts them; what it misses are the base's own.
    assert not load.unexpected and all(k.endswith("base_layer.weight") for k in load.missing)
    assert error(true(base, tmp_path / "out"), true(base, source)) <= ROUNDING
    assert adapterpack.check(tmp_path / "out", engine="vllm", base=base).healthy


def test_changed_embeddings_under_lora_are_folded_with_it(tmp_path: Path) -> None:
    def move(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("base_layer.weight") and ("lm_head" in name or "embed" in name):
                    p[[2, 7]] += 0.5

    config = LoraConfig(**{**LORA, "target_modules": ["q_proj", "v_proj", "lm_head", "embed_tokens"]})
    base = tmp_path / "base"
    oracle.save_base(oracle.tiny_model("llama"), base)
    oracle.make_adapter(tmp_path / "a", config, scale=0.3, base_dir=base, post=move)
    result = adapterpack.convert(tmp_path / "a", tmp_path / "out", engine="vllm", base=base, extra="fold")
    assert result.max_rel_error <= 1e-7
    assert error(true(base, tmp_path / "out"), true(base, tmp_path / "a")) <= ROUNDING


def test_saved_embeddings_that_are_the_base_s_are_left_out(tmp_path: Path) -> None:
    config = LoraConfig(**{**LORA, "target_modules": ["q_proj", "v_proj", "lm_head"]})
    base, source = _adapter(tmp_path, "a", config)
    assert any("lm_head.base_layer" in k for k in load_file(source / "adapter_model.safetensors"))
    result = adapterpack.convert(source, tmp_path / "out", engine="vllm", base=base)
    assert any("equal to the base's" in d for d in result.dropped)
    assert error(true(base, tmp_path / "out"), true(base, source)) <= ROUNDING


def test_what_is_no_lora_is_split_off(tmp_path: Path) -> None:
    config = LoraConfig(**LORA, modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [4, 1]})
    base, source = _adapter(tmp_path, "a", config)
    result = adapterpack.convert(source, tmp_path / "out", engine="sglang", extra="split")
    assert any("extra/" in d for d in result.dropped)
    assert result.bytes_out == oracle.adapter_bytes(tmp_path / "out")
    assert oracle.peft_load(base, tmp_path / "out")[1].clean
    aside = load_file(tmp_path / "out" / "extra" / "model.safetensors")
    said = json.loads((tmp_path / "out" / "extra" / "extra.json").read_text())["tensors"]
    state = oracle.load_base(base).state_dict()
    for name, entry in said.items():
        rows = slice(None) if entry["rows"] is None else entry["rows"]
        state[entry["target"]][rows] = aside[name]
    model = oracle.load_base(base)
    model.load_state_dict(state)
    both = oracle.peft_merge(model, tmp_path / "out")
    whole = oracle.peft_merge(base, source)
    assert all(torch.equal(both[n], t) for n, t in whole.items())


REFUSED: Mapping[str, tuple[dict[str, Any], dict[str, str]]] = {
    # config, engine to the rule that refuses
    "dora": ({"use_dora": True}, dict.fromkeys(SERVED, "dora") | {"peft==0.4": "lost-field"}),
    "lora-bias": ({"lora_bias": True}, dict.fromkeys(SERVED, "lora-bias") | {"peft==0.10": "lost-field"}),
    "saved": ({"modules_to_save": ["lm_head"]}, dict.fromkeys(SERVED, "modules-to-save")),
    "tokens": (
        {"trainable_token_indices": [3]},
        dict.fromkeys(SERVED, "token-rows") | {"peft==0.13.2": "lost-field"},
    ),
    "bias": ({"bias": "all"}, dict.fromkeys(SERVED, "bias")),
    "some-layers": ({"layers_to_transform": [1]}, {"tgi": "some-layers", "lorax": "some-layers"}),
    "half-attention": ({"target_modules": ["q_proj", "k_proj"]}, {"sglang": "attention"}),
    "embedding": ({"target_modules": ["embed_tokens"]}, {"tgi": "embedding", "lorax": "embedding"}),
    "parameters": (
        {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["gate_proj.weight"]},
        {"vllm": "target-parameters", "llamacpp": "target-parameters", "peft==0.10": "lost-field"},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_and_found(tmp_path: Path, name: str) -> None:
    fields, by = REFUSED[name]
    base, source = _adapter(tmp_path, "a", LoraConfig(**{**LORA, **fields}), bias=True)
    for engine, code in by.items():
        health = adapterpack.check(source, engine=engine, base=base)
        finding = next(f for f in health.findings if f.code == code)
        assert not health.healthy and finding.fix and finding.key and engine in finding.message
        with pytest.raises(Unsupported) as e:
            adapterpack.convert(source, tmp_path / "out", engine=engine, base=base)
        assert e.value.hint
        assert not (tmp_path / "out").exists()


def test_gpt2_is_refused_for_llamacpp_and_tied_heads_too(tmp_path: Path, workshop: Any) -> None:
    adapter, base = workshop.pair("conv1d")
    with pytest.raises(Unsupported, match="transposes"):
        adapterpack.convert(adapter, tmp_path / "out", engine="llamacpp", base=base)
    config = LoraConfig(**{**LORA, "target_modules": ["q_proj", "lm_head"]})
    base, source = _adapter(tmp_path, "tied", config, tie=True)
    assert "tied-head" in {f.code for f in adapterpack.check(source, engine="llamacpp", base=base).findings}


def test_variants_that_change_the_base_are_findings_for_engines(tmp_path: Path) -> None:
    base, source = _adapter(tmp_path, "a", LoraConfig(**LORA))
    path = source / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    health = adapterpack.check(source, engine="vllm", base=base)
    assert [f.code for f in health.findings if not f.warning] == ["not-plain-lora"]


def test_keys_with_the_adapter_s_name_and_stale_files_are_mended(tmp_path: Path, files: Any) -> None:
    _, source = _adapter(tmp_path, "a", LoraConfig(**LORA))
    tensors = files.tensors(source)
    named = {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}
    edited = files.edited(source, tmp_path / "named", named | dict.fromkeys(tensors))
    (edited / "added_tokens.json").write_text('{"<x>": 5}')
    (edited / "README.md").write_text("# card\n")
    assert "named-keys" in {f.code for f in adapterpack.check(edited, engine="vllm").findings}
    result = adapterpack.convert(edited, tmp_path / "out", engine="sglang")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == tensors.keys()
    assert any("added_tokens.json" in d for d in result.dropped)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }


def test_vllm_keeps_a_classifier(tmp_path: Path, files: Any) -> None:
    """The one kind of module that it serves whole; two of them it does not."""
    _, source = _adapter(tmp_path, "a", LoraConfig(**LORA))
    head = {"base_model.model.score.weight": torch.ones(3, 64), "base_model.model.score.bias": torch.ones(3)}
    one = files.edited(
        source, tmp_path / "one", head, {"modules_to_save": ["score"], "base_model_name_or_path": None}
    )
    assert adapterpack.check(one, engine="vllm").healthy
    result = adapterpack.convert(one, tmp_path / "out", engine="vllm", extra="split")
    assert not result.dropped
    assert files.config(tmp_path / "out")["modules_to_save"] == ["score"]
    assert torch.equal(files.tensors(tmp_path / "out")["base_model.model.score.weight"], torch.ones(3, 64))
    with pytest.raises(Unsupported, match="score"):
        adapterpack.convert(one, tmp_path / "no", engine="llamacpp")
    both = head | {"base_model.model.classifier.weight": torch.ones(3, 64)}
    two = files.edited(
        source, tmp_path / "two", both, {"modules_to_save": ["score", "classifier"], "base_model_name_or_path": None}
    )
    assert "modules-to-save" in {f.code for f in adapterpack.check(two, engine="vllm").findings}


# -- old versions of PEFT ----------------------------------------------------------------------------------


def test_the_fields_are_those_of_the_installed_peft() -> None:
    import dataclasses

    for f in dataclasses.fields(LoraConfig):
        if f.name != "runtime_config":  # never saved
            assert peft_versions.knows(None, f.name), f.name
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            assert peft_versions.minimal({f.name: default}).keys() <= {*peft_versions._ALWAYS}


@pytest.mark.parametrize("version", ["0.4", "0.6.2", "0.9", "0.13", "0.18", "0.20"])
def test_an_old_version_meets_no_field_that_it_does_not_know(place: Path, tmp_path: Path, version: str) -> None:
    known = peft_versions.parse(version)
    for name in ("alpha", "ranks-rslora", "vera"):
        adapterpack.convert(place / name, tmp_path / name, engine=f"peft=={version}", base=place / "base")
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert not peft_versions.unknown(config, known)
        assert None not in config.values() or config["task_type"] is None


@pytest.mark.parametrize(
    "name, hint", [("trt", "vllm"), ("peft==1", "0.10"), ("peft==0.3", "0.4"), ("peft==x", "0.10")]
)
def test_unknown_engines(place: Path, tmp_path: Path, name: str, hint: str) -> None:
    for call in (
        lambda: adapterpack.check(place / "plain", engine=name),
        lambda: adapterpack.convert(place / "plain", tmp_path / "o", engine=name),
    ):
        with pytest.raises(UsageError) as e:
            call()
        assert hint in str(e.value.hint)


def test_the_rank_limit_is_a_bucket(place: Path, tmp_path: Path) -> None:
    vllm = engines.ENGINES["vllm"]
    assert [vllm.limit(r) for r in (1, 2, 8, 9, 64, 65, 257, 321, 512)] == [1, 8, 8, 16, 64, 128, 320, 512, 512]
    result = adapterpack.convert(place / "ranks", tmp_path / "o o", engine="vllm")
    assert "--max-lora-rank 8" in str(result.serve) and f"'{tmp_path}/o o'" in str(result.serve)
    base, big = _adapter(tmp_path, "big", LoraConfig(r=513, target_modules=["q_proj", "v_proj"]))
    assert "rank-too-large" in {f.code for f in adapterpack.check(big, engine="vllm", base=base).findings}


def test_every_rule_has_a_source_and_every_engine_a_version() -> None:
    for engine in [*engines.ENGINES.values(), engines.named("peft==0.10")]:
        assert engine.version and engine.proof.startswith(("run", "read"))
        codes = [r.code for r in engine.rules]
        assert len(set(codes)) == len(codes)
        assert all(r.source and r.effect in ("rejected", "misread", "ignored", "noted") for r in engine.rules)


def test_the_readme_has_every_engine() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    section = text[text.index("### For serving engines") :]
    for name in engines.ENGINES:
        assert f"`{name}`" in section


def test_the_command_line(place: Path, tmp_path: Path) -> None:
    def call(*words: str) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "adapterpack", *words, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout)

    code, said = call("check", str(place / "rslora"), "--for", "sglang")
    assert code == 3 and [f["code"] for f in said["findings"] if not f["warning"]] == ["scale"]
    assert "1.73" in said["findings"][0]["message"] or "0.577" in said["findings"][0]["message"]
    code, said = call("convert", str(place / "rslora"), str(tmp_path / "out"), "--for", "sglang")
    assert code == 0 and "--lora-paths out=" in said["serve"] and said["grade"] == "equivalent"
    assert call("check", str(tmp_path / "out"), "--for", "sglang")[0] == 0
    assert call("convert", str(place / "plain"), str(tmp_path / "x"), "--for", "vllm", "--to", "topk")[0] == 2
    assert call("convert", str(place / "plain"), str(tmp_path / "x"), "--dtype", "bf16", "--extra", "fold")[0] == 2
    code, _ = call("convert", str(place / "alpha-odd-bf16"), str(tmp_path / "x"), "--for", "vllm", "--dtype", "bf16")
    assert code == 4


SENSELESS: list[tuple[str, Any]] = [
    *(("r", v) for v in ("4", 0, None)),
    *(("lora_alpha", v) for v in ("x", None, [])),
    *(("target_modules", v) for v in (7, [3], None)),
    ("modules_to_save", [1]),
    ("base_model_name_or_path", 5),
    ("bias", {}),
    ("rank_pattern", 3),
]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp", "lorax", "peft==0.10"])
@pytest.mark.parametrize("field, value", SENSELESS)
def test_senseless_configs_give_our_own_errors(
    place: Path, tmp_path: Path, files: Any, field: str, value: Any, engine: str
) -> None:
    bad = files.edited(place / "plain", tmp_path / "bad", config={field: value})
    adapterpack.check(bad, engine=engine)
    try:
        adapterpack.convert(bad, tmp_path / "out", engine=engine)
    except adapterpack.AdapterpackError as e:
        assert e.message
