"""Measured honesty: every planted fault is found, and no clean pair is called different.

Faults are planted in merged models and in adapters, over all methods that there are and the dtypes of bases; clean
pairs are merges by us, by PEFT with and without `safe_merge`, and by plain torch, converted encodings, and packs.
Methods come from the table of `adapterpack.methods`: a new one joins by itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cases
import oracle
import pytest
import torch
from peft import LoraConfig, PeftConfig, VBLoRAConfig, VeraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

import adapterpack
from adapterpack.errors import AdapterpackError, Unsupported
from adapterpack.methods import METHODS

Tensors = dict[str, torch.Tensor]
DTYPES = tuple(cases.DTYPES)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
LAYER = "model.layers.{}.self_attn.{}_proj.weight"
Q0, K0, Q1, V0 = LAYER.format(0, "q"), LAYER.format(0, "k"), LAYER.format(1, "q"), LAYER.format(0, "v")
R, ALPHA = 4, 10
SCALE = ALPHA / R


def _lora(**more: Any) -> Callable[[], PeftConfig]:
    return lambda: LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": TARGETS, **more})


MAKERS: dict[str, Callable[[], PeftConfig]] = {
    "LORA": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    "VERA": lambda: VeraConfig(r=8, target_modules=TARGETS),
    "VBLORA": lambda: VBLoRAConfig(r=4, num_vectors=60, vector_length=16, topk=2, target_modules=TARGETS),
}
"""The configs whose faults are planted one by one."""
FIELDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 16},
    "ROAD": {"group_size": 16},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 17]},
    "SHIRA": {"r": 4},
    "WAVEFT": {"n_frequency": 200},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
}
"""What other methods need beside, or in place of, `target_modules`; of the rest PEFT's defaults serve."""
BASES: dict[str, dict[str, Any]] = {"BEFT": {"bias": True}}
"""What the base must have."""
MAIN = ("LORA", "dora", "VERA", "VBLORA")


def config_of(name: str) -> PeftConfig:
    """The config of a method: its own maker, or PEFT's defaults on the linear layers."""
    if name in MAKERS:
        return MAKERS[name]()
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(name)
    if kind is None:
        pytest.skip(f"PEFT {oracle.VERSIONS['peft']} knows no {name}")
    return kind(**{"target_modules": TARGETS, **FIELDS.get(name, {})})


@dataclass
class Case:
    """An adapter, its base, and our merge of both.

    Attributes:
        root: Its own directory.
        name: Of the method.
        dtype: Of the base.
    """

    root: Path
    name: str
    dtype: str
    base: Path
    adapter: Path

    @cached_property
    def merged(self) -> Path:
        adapterpack.merge(self.adapter, self.base, self.root / "merged", verify="off")
        return self.root / "merged"

    @cached_property
    def w(self) -> Tensors:
        return load_file(self.base / "model.safetensors")

    @cached_property
    def m(self) -> Tensors:
        return load_file(self.merged / "model.safetensors")

    @cached_property
    def a(self) -> Tensors:
        return load_file(self.adapter / "adapter_model.safetensors")

    @property
    def changed(self) -> list[str]:
        return [k for k in self.w if not torch.equal(self.w[k], self.m[k])]

    def factors(self, weight: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, A) of a plain LoRA, f64."""
        key = f"base_model.model.{weight.removesuffix('.weight')}.lora_"
        return self.a[f"{key}B.weight"].double(), self.a[f"{key}A.weight"].double()

    def scaled(self, weight: str, factor: float) -> torch.Tensor:
        """W with so many times its change."""
        w = self.w[weight].double()
        return self.add(weight, (self.m[weight].double() - w) * factor)

    def add(self, weight: str, delta: torch.Tensor) -> torch.Tensor:
        return (self.w[weight].double() + delta).to(self.w[weight].dtype)

    def model(self, where: Path, tensors: Tensors) -> Path:
        """A model directory with these tensors and this base's config."""
        where.mkdir()
        shutil.copy(self.base / "config.json", where)
        contiguous = {k: v.contiguous() for k, v in tensors.items()}
        save_file(contiguous, where / "model.safetensors", metadata={"format": "pt"})
        return where

    def verify(self, other: Path, adapter: Path | None = None) -> adapterpack.Verification:
        return adapterpack.verify(adapter or self.adapter, other, base=self.base, device="cpu")


@pytest.fixture(scope="session")
def case(workshop, tmp_path_factory) -> Callable[[str, str], Case]:
    """Makes each once. Methods whose adapters this version does not read or merge are skipped, by their own word."""
    made: dict[tuple[str, str], Case] = {}

    def make(name: str, dtype: str) -> Case:
        if (name, dtype) not in made:
            root = tmp_path_factory.mktemp(f"{name}-{dtype}")
            base = workshop.base("llama", dtype, **BASES.get(name, {}))
            oracle.make_adapter(
                root / "adapter", config_of(name), base_dir=base, dtype=cases.DTYPES[dtype], scale=0.1
            )
            made[name, dtype] = Case(root, name, dtype, base, root / "adapter")
        found = made[name, dtype]
        try:
            assert found.merged
        except Unsupported as e:
            pytest.skip(e.message)
        return found

    return make


# -- faults of merged models -------------------------------------------------------------------------------

Fault = Callable[[Case, Tensors], None]
"""Changes a copy of the merged tensors in place."""


def _each(factor: float) -> Fault:
    def plant(c: Case, m: Tensors) -> None:
        m.update({k: c.scaled(k, factor) for k in c.changed})

    return plant


def _one(change: Callable[[Case, Tensors], torch.Tensor], name: str = Q0) -> Fault:
    def plant(c: Case, m: Tensors) -> None:
        m[name] = change(c, m)

    return plant


def _edit(name: str, change: Callable[[torch.Tensor, torch.Tensor], None]) -> Fault:
    """Of one tensor, given with the base's."""

    def plant(c: Case, m: Tensors) -> None:
        change(m[name], c.w[name])

    return plant


def _next(flat: torch.Tensor, n: int, times: int) -> None:
    for _ in range(times):
        flat[n] = torch.nextafter(flat[n], torch.tensor(9.0, dtype=flat.dtype))


def _some_units(m: torch.Tensor, w: torch.Tensor) -> None:
    """Of the largest weight: f32's own sums move it by some units, the 16 bits of the others do not."""
    flat = m.view(-1)
    _next(flat, int(flat.abs().argmax()), 60 if m.dtype == torch.float32 else 3)


def _one_of_the_base(m: torch.Tensor, w: torch.Tensor) -> None:
    """The one that had moved most."""
    n = int((m.double() - w.double()).abs().argmax())
    m.view(-1)[n] = w.view(-1)[n]


def _line_of_the_base(m: torch.Tensor, w: torch.Tensor) -> None:
    n = int((m.double() - w.double()).norm(dim=1).argmax())
    m[n] = w[n]


def _other_base(how: float) -> Fault:
    """Everything moved: merged into another base."""

    def plant(c: Case, m: Tensors) -> None:
        g = torch.Generator().manual_seed(8)
        for k, v in m.items():
            m[k] = (v.double() + torch.randn(v.shape, generator=g, dtype=torch.float64) * how).to(v.dtype)

    return plant


def _layer_left(c: Case, m: Tensors) -> None:
    m.update({k: c.w[k].clone() for k in c.changed if "layers.1." in k})


def _swap(x: str, y: str) -> Fault:
    def plant(c: Case, m: Tensors) -> None:
        m[x], m[y] = m[y].clone(), m[x].clone()

    return plant


def _swap_changes(c: Case, m: Tensors) -> None:
    """q of layer 0 with the change of layer 1's, and the other way round."""
    m[Q0], m[Q1] = (c.add(k, c.m[o].double() - c.w[o].double()) for k, o in ((Q0, Q1), (Q1, Q0)))


def _truncated(c: Case, m: Tensors) -> torch.Tensor:
    """bf16 by cutting bits off, which is biased towards zero; f32 and f16 lose as many bits as that would."""
    bits = {torch.float32: (torch.int32, ~0xFF), torch.bfloat16: (torch.int16, ~1), torch.float16: (torch.int16, ~3)}
    kind, mask = bits[m[Q0].dtype]
    return (m[Q0].view(kind) & mask).view(m[Q0].dtype)


def _noise(c: Case, m: Tensors) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    noise = torch.randn(m[Q0].shape, generator=g, dtype=torch.float64)
    return (m[Q0].double() + noise * 0.02 * m[Q0].double().std()).to(m[Q0].dtype)


ANY: dict[str, Fault] = {
    "one weight": _edit(Q0, lambda m, w: m[7, 11].add_(0.05)),
    "one weight, some units": _edit(Q0, _some_units),
    "one weight of the base": _edit(Q0, _one_of_the_base),
    "one row of the base": _edit(Q0, lambda m, w: _line_of_the_base(m, w)),
    "one column of the base": _edit(Q0, lambda m, w: _line_of_the_base(m.T, w.T)),
    "a row zeroed": _edit(Q0, lambda m, w: m[5].zero_()),
    "two rows exchanged": _edit(Q0, lambda m, w: m[:2].copy_(m[:2].flip(0))),
    "lower half of a matrix left": _edit(Q0, lambda m, w: m[32:].copy_(w[32:])),
    "one row of the embeddings": _edit("model.embed_tokens.weight", lambda m, w: m[17].mul_(1.01)),
    "the head trained on": _edit("lm_head.weight", lambda m, w: m.mul_(1.01)),
    "a norm": _edit("model.norm.weight", lambda m, w: m[3].add_(0.01)),
    "one module left": _one(lambda c, m: c.w[Q0].clone()),
    "one layer left": _layer_left,
    "nothing merged": lambda c, m: m.update({k: v.clone() for k, v in c.w.items()}),
    "merged twice": _each(2.0),
    "three times": _each(3.0),
    "subtracted": _each(-1.0),
    "half": _each(0.5),
    "a tenth less": _each(0.9),
    "five percent more": _each(1.05),
    "one module twice": _one(lambda c, m: c.scaled(Q0, 2.0)),
    "layers exchanged": _swap(Q0, Q1),
    "changes of layers exchanged": _swap_changes,
    "k and v exchanged": _swap(K0, V0),
    "the change transposed": _one(lambda c, m: c.add(Q0, (c.m[Q0].double() - c.w[Q0].double()).T)),
    "the weight transposed": _one(lambda c, m: m[Q0].T.contiguous()),
    "another base": _other_base(0.05),
    "a base that is a little different": _other_base(0.003),
    "bits cut off": _one(_truncated),
    "noise": _one(_noise),
    "NaN": _edit(Q0, lambda m, w: m[0, 0].fill_(float("nan"))),
    "infinity": _edit(Q0, lambda m, w: m[0, 0].fill_(float("inf"))),
    "a tensor lost": lambda c, m: m.__delitem__(K0),
    "a tensor too many": lambda c, m: m.update({"stale.weight": torch.ones(2, 2)}),
    "another dtype": _one(lambda c, m: m[Q0].to(torch.float64)),
    "another shape": _one(lambda c, m: m[Q0][:32].clone()),
}
"""For every method: 36."""
CODES: dict[str, str] = {
    "one weight, some units": "wrong-values",
    "one module left": "not-merged",
    "one layer left": "partial-merge",
    "nothing merged": "nothing-merged",
    "merged twice": "merged-twice",
    "subtracted": "wrong-sign",
    "half": "wrong-scale",
    "one module twice": "merged-twice",
    "changes of layers exchanged": "swapped-modules",
    "the change transposed": "transposed-merge",
    "another base": "wrong-base",
    "a base that is a little different": "wrong-base",
    "NaN": "nan",
    "a tensor lost": "missing-tensor",
    "a tensor too many": "unexpected-tensor",
    "another dtype": "other-tensor",
}
"""What a fault is called where it is planted in a plain LoRA."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAIN)
def test_every_fault_of_a_merged_model_is_found(name, dtype, case, tmp_path: Path) -> None:
    _plant_all(case(name, dtype), ANY, tmp_path)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in MAIN])
def test_every_fault_is_found_whatever_the_method(name, case, tmp_path: Path) -> None:
    c = case(name, "bf16")
    if not {Q0, Q1, K0, V0} <= set(c.changed):
        pytest.skip(f"{name} changes none of the weights that faults are planted in")
    _plant_all(c, ANY, tmp_path)


def _plant_all(c: Case, faults: dict[str, Fault], tmp_path: Path) -> None:
    missed, misnamed = [], []
    for n, (fault, plant) in enumerate(faults.items()):
        m = {k: v.clone() for k, v in c.m.items()}
        plant(c, m)
        result = c.verify(c.model(tmp_path / str(n), m))
        if result.equal:
            missed.append(fault)
        wanted = CODES.get(fault) if c.name == "LORA" else None
        if wanted is not None and wanted not in [f.code for f in result.findings]:
            misnamed.append((fault, [(f.code, f.message) for f in result.findings][:2]))
    assert not missed
    assert not misnamed


def _stale_shards(c: Case, where: Path) -> Iterator[tuple[str, Path]]:
    """Each shard of a merged model in turn is the base's."""
    for source in ("base", "merged"):
        oracle_model = oracle.load_base(c.base if source == "base" else c.merged)
        oracle.save_base(oracle_model, where / source, "60KB")
    index = json.loads((where / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in sorted({index[k] for k in c.changed}):
        stale = shutil.copytree(where / "merged", where / f"stale-{shard}")
        shutil.copy(where / "base" / shard, stale / shard)
        yield shard, stale


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stale_shard_is_found_and_named(dtype, case, tmp_path: Path) -> None:
    c = case("LORA", dtype)
    planted = list(_stale_shards(c, tmp_path))
    assert len(planted) > 2
    assert c.verify(tmp_path / "merged").equal
    for shard, stale in planted:
        assert ("stale-shard", shard) in [(f.code, f.key) for f in c.verify(stale).findings]


LORA: dict[str, tuple[Callable[[Case, str], torch.Tensor], str, str]] = {
    "alpha / r dropped": (lambda c, k: _product(c, k) / SCALE, "wrong-scale", "alpha/r was dropped"),
    "alpha not divided by r": (lambda c, k: _product(c, k) * R, "wrong-scale", "alpha was not divided by r"),
    "alpha taken for 1": (lambda c, k: _product(c, k) / ALPHA, "wrong-scale", "alpha was lost"),
    "alpha / r twice": (lambda c, k: _product(c, k) * SCALE, "wrong-scale", "alpha/r was applied twice"),
    "scaled as rsLoRA": (lambda c, k: _product(c, k) * R**0.5, "", "factor 2"),
    "the last direction lost": (lambda c, k: _product(c, k, rank=R - 1), "wrong-merge", ""),
    "half of the rank": (lambda c, k: _product(c, k, rank=R // 2), "wrong-merge", ""),
    "A of another layer": (lambda c, k: _product(c, k, a_of=_neighbour(k)), "wrong-merge", ""),
    "B of another layer": (lambda c, k: _product(c, k, b_of=_neighbour(k)), "wrong-merge", ""),
}
"""Of plain LoRA: what was added, the code of its finding, and words of it."""


def _neighbour(k: str) -> str:
    return k.replace("layers.0", "layers.9").replace("layers.1", "layers.0").replace("layers.9", "layers.1")


def _product(c: Case, k: str, rank: int = R, a_of: str = "", b_of: str = "") -> torch.Tensor:
    b, a = c.factors(b_of or k)[0], c.factors(a_of or k)[1]
    return b[:, :rank] @ a[:rank] * SCALE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", LORA)
def test_faults_of_scales_and_factors_are_found_and_named(fault, dtype, case, tmp_path: Path) -> None:
    c = case("LORA", dtype)
    added, code, words = LORA[fault]
    m = c.m | {k: c.add(k, added(c, k)) for k in c.changed}
    findings = c.verify(c.model(tmp_path / "m", m)).findings
    assert {f.key for f in findings} >= set(c.changed)
    assert all((code or f.code) == f.code and words in f.message for f in findings), findings[:2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rslora_ignored_and_dora_without_its_magnitude_are_named(dtype, case, tmp_path: Path) -> None:
    c = case("rslora", dtype)
    m = c.m | {k: c.add(k, c.factors(k)[0] @ c.factors(k)[1] * SCALE) for k in c.changed}
    findings = c.verify(c.model(tmp_path / "rslora", m)).findings
    assert len(findings) == len(c.changed) and all("use_rslora was ignored" in f.message for f in findings)
    c = case("dora", dtype)
    m = c.m | {k: c.add(k, c.factors(k)[0] @ c.factors(k)[1] * SCALE) for k in c.changed}
    findings = c.verify(c.model(tmp_path / "dora", m)).findings
    assert {f.code for f in findings} == {"magnitude-lost"} and len(findings) == len(c.changed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_left_is_found_with_its_rows(dtype, workshop, tmp_path: Path) -> None:
    base = workshop.base("mixtral", dtype)
    config = LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"], target_modules=[])
    oracle.make_adapter(tmp_path / "a", config, base_dir=base, dtype=cases.DTYPES[dtype], scale=0.3)
    adapterpack.merge(tmp_path / "a", base, tmp_path / "m")
    assert adapterpack.verify(tmp_path / "a", tmp_path / "m", base=base).equal
    m, w = (load_file(d / "model.safetensors") for d in (tmp_path / "m", base))
    left = next(k for k in w if ".experts." in k and not torch.equal(m[k], w[k]))
    stacked = w[left].dim() == 3
    planted = m[left].clone()
    planted[2 if stacked else slice(None)] = w[left][2 if stacked else slice(None)]
    save_file(m | {left: planted}, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    result = adapterpack.verify(tmp_path / "a", tmp_path / "m", base=base)
    assert [f.key for f in result.findings] == [left]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stale_bias_and_a_stale_head_are_found(dtype, workshop, tmp_path: Path) -> None:
    for name, ending in (("bias-all-opt", "fc2.bias"), ("modules-to-save-head", "lm_head.weight")):
        adapter, base = workshop.pair(name, dtype)
        adapterpack.merge(adapter, base, tmp_path / name)
        m, w = (load_file(d / "model.safetensors") for d in (tmp_path / name, base))
        stale = next(k for k in w if k.endswith(ending))
        save_file(m | {stale: w[stale]}, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        found = adapterpack.verify(adapter, tmp_path / name, base=base).findings
        assert [(f.code, f.key) for f in found] == [("not-merged", stale)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tied_head_that_drifted_is_called_by_its_name(dtype, workshop, tmp_path: Path) -> None:
    base = workshop.base("llama", dtype, tie=True)
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    oracle.make_adapter(tmp_path / "a", config, base=oracle.load_base(base), scale=0.2)
    merged = oracle.peft_merge(base, tmp_path / "a")
    oracle.save_base(merged.model, tmp_path / "m")
    found = adapterpack.verify(tmp_path / "a", tmp_path / "m", base=base).findings
    assert ("tied-head-drift", "lm_head.weight") in [(f.code, f.key) for f in found]


# -- faults of adapters ------------------------------------------------------------------------------------

Spoiled = tuple[Tensors, dict[str, Any]]
P = "base_model.model.model.layers.{}.self_attn.{}_proj."
QA, QB, KA, KB = (P.format(0, m) + f"lora_{x}.weight" for m in "qk" for x in "AB")


def _move(t: Tensors, key: str) -> Spoiled:
    moved = t[key].clone()
    moved.view(-1)[3] *= 1.001
    return {key: moved}, {}


def _exchanged(t: Tensors) -> Spoiled:
    other = {k: k.replace("layers.0", "layers.1") for k in (QA, QB)}
    return {o: t[k] for k, o in other.items()} | {k: t[o] for k, o in other.items()}, {}


def _cut(t: Tensors) -> Spoiled:
    return {QA: t[QA] * (torch.arange(R) < R - 1)[:, None]}, {}


def _without_magnitude(t: Tensors) -> Spoiled:
    return {k: None for k in t if "magnitude" in k}, {"use_dora": False}  # type: ignore[dict-item]


def _flip_index(t: Tensors) -> Spoiled:
    key = next(k for k in t if k.endswith("topk_indices"))
    moved = t[key].clone()
    moved.view(-1)[0] = (int(moved.view(-1)[0]) + 7) % 60
    return {key: moved}, {}


def _ending(t: Tensors, ending: str) -> str:
    return next(k for k in t if k.endswith(ending))


ADAPTERS: dict[str, tuple[str, Callable[[Tensors], Spoiled]]] = {
    "one weight of A": ("LORA", lambda t: _move(t, QA)),
    "one weight of B": ("LORA", lambda t: _move(t, QB)),
    "alpha": ("LORA", lambda t: ({}, {"lora_alpha": R})),
    "rsLoRA switched on": ("LORA", lambda t: ({}, {"use_rslora": True})),
    "rsLoRA switched off": ("rslora", lambda t: ({}, {"use_rslora": False})),
    "an alpha of its own": ("LORA", lambda t: ({}, {"alpha_pattern": {"k_proj": 3}})),
    "a module lost": ("LORA", lambda t: ({QA: None, QB: None}, {})),
    "A of q and k exchanged": ("LORA", lambda t: ({QA: t[KA], KA: t[QA]}, {})),
    "pairs of two layers exchanged": ("LORA", _exchanged),
    "a rank cut": ("LORA", _cut),
    "B negated": ("LORA", lambda t: ({QB: -t[QB]}, {})),
    "B zeroed": ("LORA", lambda t: ({QB: t[QB] * 0}, {})),
    "NaN": ("LORA", lambda t: ({QB: t[QB] * float("nan")}, {})),
    "half a pair": ("LORA", lambda t: ({QB: None}, {})),
    "fewer outputs": ("LORA", lambda t: ({QB: t[QB][:32].clone()}, {})),
    "DoRA's magnitude lost": ("dora", _without_magnitude),
    "DoRA's magnitude moved": ("dora", lambda t: _move(t, _ending(t, "q_proj.lora_magnitude_vector"))),
    "DoRA's scale": ("dora", lambda t: ({}, {"lora_alpha": R})),
    "VeRA's lambda_b": ("VERA", lambda t: _move(t, _ending(t, "q_proj.vera_lambda_b"))),
    "VeRA's lambda_d": ("VERA", lambda t: _move(t, _ending(t, "q_proj.vera_lambda_d"))),
    "VeRA's projection": ("VERA", lambda t: _move(t, "base_model.vera_A")),
    "VeRA's vectors exchanged": (
        "VERA",
        lambda t: (
            {P.format(n, "q") + "vera_lambda_d": t[P.format(1 - n, "q") + "vera_lambda_d"] for n in (0, 1)},
            {},
        ),
    ),
    "VB-LoRA's bank": ("VBLORA", lambda t: _move(t, "base_model.vblora_vector_bank")),
    "VB-LoRA's bank turned": ("VBLORA", lambda t: ({(k := "base_model.vblora_vector_bank"): t[k].flip(0)}, {})),
    "VB-LoRA's k": ("VBLORA", lambda t: ({}, {"topk": 3})),
    "VB-LoRA's bank lost": ("VBLORA", lambda t: ({"base_model.vblora_vector_bank": None}, {})),
}


@pytest.mark.parametrize("fault", ADAPTERS)
def test_every_fault_of_an_adapter_is_found(fault, case, files, tmp_path: Path) -> None:
    """By `verify` against the right one; what cannot be read at all is found by `check`."""
    name, spoil = ADAPTERS[fault]
    c = case(name, "f32")
    tensors, config = spoil(c.a)
    wrong = files.edited(c.adapter, tmp_path / "b", tensors, config)
    ways = (
        lambda: adapterpack.verify(c.adapter, wrong, device="cpu"),
        lambda: c.verify(wrong),
        lambda: c.verify(c.merged, wrong),
    )
    for way in ways:
        try:
            assert not way().equal
        except AdapterpackError:
            assert not adapterpack.check(wrong, base=c.base).healthy


def test_a_wrong_seed_is_found(case, files, tmp_path: Path) -> None:
    c = case("VERA", "f32")
    adapterpack.convert(c.adapter, tmp_path / "seed", to="seed")
    clean = c.verify(tmp_path / "seed")
    assert clean.equal
    assert {(r.by, r.against, r.agrees) for r in clean.regenerated if r.side == "B"} >= {
        ("numpy", "recorded digest", True),
        ("torch cpu", "recorded digest", True),
    }
    wrong = files.edited(tmp_path / "seed", tmp_path / "wrong", config={"projection_prng_key": 5})
    found = c.verify(wrong).findings
    assert [(f.code, f.key) for f in found] == [("wrong-seed", "projection_prng_key")]
    shutil.copytree(c.adapter, tmp_path / "unrecorded")
    kept = {k: v for k, v in c.a.items() if k not in ("base_model.vera_A", "base_model.vera_B")}
    save_file(kept, tmp_path / "unrecorded" / "adapter_model.safetensors", metadata={"format": "pt"})
    for key, equal in ((0, True), (5, False)):
        config = {"save_projection": False, "projection_prng_key": key}
        other = files.edited(tmp_path / "unrecorded", tmp_path / f"key-{key}", config=config)
        assert c.verify(other).equal is equal


# -- clean pairs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*MAIN, "rslora"])
def test_no_honest_merge_is_called_wrong(name, dtype, case, tmp_path: Path) -> None:
    """Five merges of each: 75 clean pairs."""
    _honest_merges(case(name, dtype), tmp_path)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in MAIN])
def test_no_honest_merge_of_any_method_is_called_wrong(name, case, tmp_path: Path) -> None:
    for dtype in DTYPES:
        (tmp_path / dtype).mkdir()
        _honest_merges(case(name, dtype), tmp_path / dtype)


def _honest_merges(c: Case, where: Path) -> None:
    assert c.verify(c.adapter).equal
    assert c.verify(c.merged).equal
    adapterpack.merge(c.adapter, c.base, where / "once", rounding="once")
    assert c.verify(where / "once").equal
    for safe in (False, True):
        merged = oracle.peft_merge(c.base, c.adapter, safe_merge=safe)
        oracle.save_base(merged.model, where / f"peft-{safe}")
        result = c.verify(where / f"peft-{safe}")
        assert result.equal, (c.name, c.dtype, safe, result.findings[:2])


@pytest.mark.parametrize("size", [1e-4, 3e-3, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch_merges_are_honest_and_their_arithmetic_is_told(dtype, size, workshop, tmp_path: Path) -> None:
    """In f64, rounded once; rounded twice; all of it in the dtype of the base. And no fault hides behind the last."""
    base = workshop.base("llama", dtype)
    oracle.make_adapter(tmp_path / "a", _lora()(), base_dir=base, dtype=cases.DTYPES[dtype], scale=size)
    c = Case(tmp_path, "LORA", dtype, base, tmp_path / "a")
    kind = cases.DTYPES[dtype]

    def low(k: str) -> torch.Tensor:
        b, a = (f.to(kind) for f in c.factors(k))
        return c.w[k] + (b @ a) * SCALE

    def twice(k: str) -> torch.Tensor:
        return c.w[k] + (_product(c, k).float()).to(kind)

    names = [k for k in c.w if k.removesuffix(".weight").rpartition(".")[2] in TARGETS]
    ways = {"f64": lambda k: c.add(k, _product(c, k)), "twice": twice, "low": low}
    for way, merge in ways.items():
        m = c.w | {k: merge(k) for k in names}
        result = c.verify(c.model(tmp_path / way, m))
        assert result.equal, (way, result.findings[:2])
        kinds = {e.arithmetic for e in result.modules}
        if way == "f64":
            assert kinds == {"once"}
        if way != "f64" and dtype != "f32" and size >= 0.1:
            assert kinds <= {"twice", "low-precision"} and kinds != {"once"}
        flat = m[Q0].view(-1)
        _next(flat, int(flat.abs().argmax()), 3000 if dtype == "f32" else 9)
        assert not c.verify(c.model(tmp_path / f"{way}-fault", m)).equal


@pytest.mark.parametrize("name", [*MAIN, "rslora", *(n for n in METHODS if n not in MAIN)])
def test_every_conversion_and_pack_is_the_same_change(name, case, tmp_path: Path) -> None:
    """To every encoding that needs no loss, and packed: compared with and without the base, both ways round."""
    c = case(name, "f32")
    source = adapterpack.methods.METHODS
    others = {"pack.apack": None}
    info = adapterpack.inspect(c.adapter)
    for edge in source[info.method.upper()].edges.get(info.encoding, ()):
        others[edge.to] = edge.to
    for where, to in others.items():
        try:
            if to is None:
                adapterpack.compress(c.adapter, tmp_path / where)
            else:
                adapterpack.convert(c.adapter, tmp_path / where, to=to, base=c.base)
        except AdapterpackError:
            continue
        for pair in ((c.adapter, tmp_path / where), (tmp_path / where, c.adapter)):
            result = c.verify(pair[1], pair[0])
            assert result.equal, (where, result.findings[:2])
        assert c.verify(c.merged, tmp_path / where).equal, where
    assert (tmp_path / "pack.apack").exists()
