"""What the engines' own code says of adapters, and of what `convert --for` makes of them.

The slow tests (`make engines`) run it: vLLM's loader from the Python files of its wheel, and llama.cpp with its own
converter. They need, outside this repository (nothing is downloaded):

    ADAPTERPACK_VLLM           a folder with the .py files of a vllm wheel
    ADAPTERPACK_LLAMACPP       llama.cpp's converters, vendor/llama.cpp in the sdist of llama-cpp-python
    ADAPTERPACK_ENGINE_PYTHON  an interpreter with torch, transformers, what vLLM imports, xllamacpp and gguf

What they said is in `engines/answers.json`. The fast tests hold `check --for` to it, adapter by adapter; write it
again with ADAPTERPACK_FREEZE=1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import Files
from peft import LoraConfig, VBLoRAConfig, VeraConfig
from safetensors.torch import load_file

import adapterpack
import adapterpack.engines

HERE = Path(__file__).parent / "engines"
ANSWERS = HERE / "answers.json"
TOKENS = [1, 5, 9, 33, 70, 12]
SAME = 5e-6
"""Relative, of the change of a weight; absolute, of a log-probability."""

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ALL}


def _lora(**fields: Any) -> Callable[[], LoraConfig]:
    return lambda: LoraConfig(**{**LORA, **fields})


SOURCES: dict[str, Callable[[], Any]] = {
    "plain": _lora(),
    "rslora": _lora(use_rslora=True),
    "alpha": _lora(alpha_pattern={"k_proj": 9, "up_proj": 3}),
    "ranks": _lora(rank_pattern={"v_proj": 2, "o_proj": 7}),
    "ranks-rslora-alpha": _lora(use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"k_proj": 9}),
    "dora": _lora(use_dora=True),
    "lora-bias": _lora(lora_bias=True),
    "saved-head": _lora(modules_to_save=["lm_head"]),
    "saved-norm": _lora(modules_to_save=["norm"]),
    "token-rows": _lora(trainable_token_indices=[3, 17]),
    "embedding": _lora(target_modules=["q_proj", "v_proj", "embed_tokens"]),
    "embedding-moved": _lora(target_modules=["q_proj", "v_proj", "embed_tokens"]),
    "head": _lora(target_modules=["q_proj", "v_proj", "lm_head"]),
    "named-keys": _lora(),
    "vblora": lambda: VBLoRAConfig(r=2, num_vectors=20, vector_length=16, target_modules=ALL),
    "vera": lambda: VeraConfig(r=4, target_modules=ALL),
}
CONVERTED = [n for n in SOURCES if n not in ("dora", "lora-bias", "saved-norm")]
"""What becomes LoRA exactly, saved heads and moved embeddings by --extra fold."""


def make(root: Path, engine: str) -> list[str]:
    """The base, every source, and what convert makes of it for an engine: directories in `root`."""
    base = oracle.save_base(oracle.tiny_model("llama"), root / "base")

    def move(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("embed_tokens.base_layer.weight"):
                    p[[5, 70]] += 0.5

    for name, config in SOURCES.items():
        post = move if name == "embedding-moved" else None
        target = root / (name if name != "named-keys" else "unnamed")
        oracle.make_adapter(target, config(), scale=0.1, base_dir=base, post=post)
    tensors = Files.tensors(root / "unnamed")
    named: dict[str, torch.Tensor | None] = {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}
    Files.edited(root / "unnamed", root / "named-keys", named | dict.fromkeys(tensors))
    for name in CONVERTED:
        adapterpack.convert(root / name, root / f"{name}-converted", engine=engine, extra="fold", base=base)
    return [*SOURCES, *(f"{name}-converted" for name in CONVERTED)]


def _frozen() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(ANSWERS.read_text()) if ANSWERS.exists() else {}
    return loaded


@pytest.fixture(scope="module", params=["vllm", "llamacpp"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[str]]:
    root = tmp_path_factory.mktemp(request.param)
    return request.param, root, make(root, request.param)


def test_check_says_what_the_engine_said(made: tuple[str, Path, list[str]]) -> None:
    """Healthy for an engine: it was seen to load the adapter, and to compute what PEFT computes."""
    engine, root, names = made
    said = _frozen()[engine]
    assert said["adapters"].keys() == set(names)
    for name in names:
        answer = said["adapters"][name]
        health = adapterpack.check(root / name, engine=engine, base=root / "base")
        wrong = [f for f in health.findings if not f.warning]
        assert bool(wrong) == (not answer["agrees"]), (name, answer, wrong)
        if name.endswith("-converted"):
            assert answer["agrees"], (name, answer)
        rejected = [f for f in wrong if "rejected by" in f.message]
        assert not rejected or not answer["accepted"], (name, answer, rejected)


# -- running them ------------------------------------------------------------------------------------------


def _need(variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: see the head of {Path(__file__).name}")
    return value


def _python() -> str:
    return os.environ.get("ADAPTERPACK_ENGINE_PYTHON", sys.executable)


def _true(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    plain, merged = oracle.load_base(base).state_dict(), oracle.peft_merge(base, adapter)
    return {n: merged[n].double() - w.double() for n, w in plain.items() if not torch.equal(merged[n], w)}


def _ask_vllm(root: Path, names: list[str]) -> dict[str, Any]:
    place = _need("ADAPTERPACK_VLLM")
    command = [_python(), str(HERE / "vllm_reads.py"), str(root / "vllm.safetensors"), "128"]
    environment = {**os.environ, "PYTHONPATH": place, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *(str(root / n) for n in names)], capture_output=True, text=True, check=True, env=environment
    )
    said = json.loads(done.stdout.strip().splitlines()[-1])
    deltas = load_file(root / "vllm.safetensors")
    answers = {}
    for name in names:
        accepted, agrees = said[name].get("accepted", False), False
        if accepted:
            ours = {k.partition("/")[2]: d for k, d in deltas.items() if k.startswith(f"{name}/")}
            theirs = _true(root / "base", root / name)
            agrees = ours.keys() == theirs.keys() and all(
                float((ours[n] - d).norm() / d.norm()) <= SAME for n, d in theirs.items()
            )
        answers[name] = {"accepted": accepted, "agrees": agrees, **_error(said[name])}
    return answers


def _error(answer: Any) -> dict[str, str]:
    return {"error": answer["error"]} if isinstance(answer, dict) and "error" in answer else {}


def _ask_llamacpp(root: Path, names: list[str]) -> dict[str, Any]:
    place = _need("ADAPTERPACK_LLAMACPP")
    if _python() == sys.executable and importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not importable: set ADAPTERPACK_ENGINE_PYTHON")
    scratch = root / "gguf"
    scratch.mkdir(exist_ok=True)
    tokens = ",".join(map(str, TOKENS))
    command = [_python(), str(HERE / "llamacpp_reads.py"), place, str(root / "base"), str(scratch), tokens]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, *(str(root / n) for n in names)], capture_output=True, check=True, env=environment)
    said = json.loads((scratch / "said.json").read_text())
    base = torch.tensor(said["base"]).double()
    assert float((base - _logprobs(oracle.load_base(root / "base"))).abs().max()) <= SAME
    answers = {}
    for name in names:
        answer = said[name]
        accepted = isinstance(answer, list)
        result: dict[str, Any] = {"accepted": accepted, "agrees": False, **_error(answer)}
        if accepted:
            model = oracle.peft_load(root / "base", root / name)[0]
            off = float((torch.tensor(answer).double() - _logprobs(model)).abs().max())
            result |= {"agrees": off <= SAME, "off": float(f"{off:.1e}")}
        answers[name] = result
    return answers


def _logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([TOKENS])).logits[0, -1].double(), -1)


@pytest.mark.engines
def test_the_engine_itself_says_so(made: tuple[str, Path, list[str]]) -> None:
    engine, root, names = made
    answers = {"vllm": _ask_vllm, "llamacpp": _ask_llamacpp}[engine](root, names)
    if os.environ.get("ADAPTERPACK_FREEZE"):
        version = adapterpack.engines.ENGINES[engine].version
        frozen = _frozen() | {engine: {"version": version, "adapters": answers}}
        ANSWERS.write_text(json.dumps(frozen, indent=1, sort_keys=True) + "\n")
    frozen = _frozen()[engine]["adapters"]
    assert {n: (a["accepted"], a["agrees"]) for n, a in answers.items()} == {
        n: (a["accepted"], a["agrees"]) for n, a in frozen.items()
    }
