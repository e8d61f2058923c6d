"""Faults planted in adapters that PEFT wrote: what each is, which code finds it, whether it can be mended.

Rows are those of users' complaints (D1 scales, D4 whole weights, D6 prefixes, D17 empty and cut files, D18 versions
of the config) and the ten traps of the formats (T1 to T10).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import torch
from peft import (
    FourierFTConfig,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterpack

TARGETS = ["q_proj", "down_proj"]
PREFIX = "base_model.model."
VB = {"r": 2, "num_vectors": 20, "vector_length": 16, "target_modules": TARGETS}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=2, target_modules=TARGETS),
    "ranks": lambda: LoraConfig(
        r=2, target_modules=TARGETS, rank_pattern={"down_proj": 3}, alpha_pattern={"q_proj": 5}
    ),
    "rslora": lambda: LoraConfig(r=4, use_rslora=True, target_modules=TARGETS),
    "dora": lambda: LoraConfig(r=2, use_dora=True, target_modules=TARGETS),
    "biased": lambda: LoraConfig(r=2, lora_bias=True, target_modules=TARGETS),
    "saved": lambda: LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], modules_to_save=["norm"]),
    "pissa": lambda: LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    "loha": lambda: LoHaConfig(r=2, target_modules=TARGETS),
    "vblora": lambda: VBLoRAConfig(**VB),
    "topk": lambda: VBLoRAConfig(save_only_topk_weights=True, topk=3, **VB),
    "vera": lambda: VeraConfig(r=4, target_modules=TARGETS),
    "vera16": lambda: VeraConfig(r=4, target_modules=TARGETS),
    "seed": lambda: VeraConfig(r=4, save_projection=False, target_modules=TARGETS),
    "randlora": lambda: RandLoraConfig(r=4, target_modules=TARGETS),
    "fourier": lambda: FourierFTConfig(n_frequency=20, target_modules=TARGETS),
}


@dataclass
class Draft:
    """An adapter in the hand, to be spoilt."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    metadata: dict[str, str]

    @classmethod
    def read(cls, place: Path) -> Draft:
        file = place / "adapter_model.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = dict(opened.metadata() or {})
        return cls(load_file(file), json.loads((place / "adapter_config.json").read_text()), metadata)

    def write(self, place: Path) -> Path:
        place.mkdir(parents=True)
        tensors = {k: t.contiguous().clone() for k, t in self.tensors.items()}
        save_file(tensors, place / "adapter_model.safetensors", metadata=self.metadata or None)
        (place / "adapter_config.json").write_text(json.dumps(self.config))
        return place

    def first(self, ending: str) -> str:
        return next(k for k in sorted(self.tensors) if k.endswith(ending))


Spoil = Callable[[Draft], object]


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        rows: What it is an instance of.
        source: The adapter that it is planted in.
        code: Of the finding.
        spoil: How it is planted.
        warning: Is the finding a warning only?
        base: Is it found only against the base?
        mended: What `check --fix` gives: `trained`, which PEFT merges as the adapter before the fault; `loaded`, as
            PEFT merges the faulty one; None: it stays.
        before: What PEFT does with the faulty one: `fails`, merges `other` weights, or the `same`; None: not asked.
        reference: For `trained`: what the adapter before the fault is made into first.
    """

    rows: str
    source: str
    code: str
    spoil: Spoil
    warning: bool = False
    base: bool = False
    mended: str | None = None
    before: str | None = None
    reference: Spoil | None = None


def _set(ending: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Spoil:
    """Change, or drop, the first tensor with that ending."""

    def spoil(d: Draft) -> None:
        key = d.first(ending)
        new = change(d.tensors[key].clone())
        if new is None:
            del d.tensors[key]
        else:
            d.tensors[key] = new

    return spoil


def _all(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    def spoil(d: Draft) -> None:
        d.tensors.update({k: change(t) for k, t in d.tensors.items() if k.endswith(ending)})

    return spoil


def _put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t.view(-1)[0] = value
        return t

    return change


def _keys(change: Callable[[str], str]) -> Spoil:
    def spoil(d: Draft) -> None:
        d.tensors = {change(k): t for k, t in d.tensors.items()}

    return spoil


def _config(**fields: Any) -> Spoil:
    return lambda d: d.config.update(fields)


def _without(*fields: str) -> Spoil:
    return lambda d: [d.config.pop(f) for f in fields]


def _both(*spoils: Spoil) -> Spoil:
    return lambda d: [s(d) for s in spoils]


def _drop(mark: str) -> Spoil:
    return lambda d: [d.tensors.pop(k) for k in list(d.tensors) if mark in k]


def as_it_is(d: Draft) -> None:
    """What PEFT writes has it already."""


def _no_tensors(d: Draft) -> None:
    d.tensors = {}


def _twin(d: Draft) -> None:
    key = d.first("lora_A.weight")
    d.tensors[key.replace(".weight", ".default.weight")] = d.tensors[key].clone()


def _unlike_twin(d: Draft) -> None:
    key = d.first("lora_A.weight")
    d.tensors[key.replace(".weight", ".default.weight")] = d.tensors[key] + 1


def _latent(d: Draft) -> None:
    key = d.first("lora_A.weight")
    d.tensors[key.replace("lora_A.weight", "default_lora_latent_mapping.weight")] = torch.ones(2, 2)


def _zero_size(d: Draft) -> None:
    d.tensors[d.first("lora_B.weight")] = torch.zeros(0)


def _half_precision_of_one(d: Draft) -> None:
    d.tensors[d.first("lora_A.weight")] = d.tensors[d.first("lora_A.weight")].bfloat16()


def _recorded_seed(d: Draft) -> None:
    d.config["save_projection"] = True


def _no_format(d: Draft) -> None:
    d.metadata = {}


def _alpha_in_metadata(d: Draft) -> None:
    d.metadata["lora_alpha"] = "16"


BF16 = torch.bfloat16
FAULTS: dict[str, Fault] = {
    # -- D1, T5: scales
    "patterns overlap": Fault(
        "D1 T5",
        "lora",
        "overlapping-patterns",
        _config(alpha_pattern={"self_attn.q_proj": 3, "q_proj": 50}),
        warning=True,
        mended="loaded",
        before="other",
    ),
    "patterns overlap, LoHa": Fault(
        "D1 T5",
        "loha",
        "overlapping-patterns",
        _config(alpha_pattern={"mlp.down_proj": 3, "down_proj": 50}),
        warning=True,
        mended="loaded",
        before="other",
    ),
    "rank patterns overlap": Fault(
        "D1 T5",
        "ranks",
        "rank-mismatch",
        _config(rank_pattern={"down_proj": 2, "mlp.down_proj": 3}),
        mended="trained",
        before="fails",
    ),
    "rsLoRA with patterns": Fault(
        "D1", "rslora", "scale-not-plain", _config(alpha_pattern={"q_proj": 2}), warning=True
    ),
    "rsLoRA": Fault("D1", "rslora", "scale-not-plain", as_it_is, warning=True),
    "alpha missing": Fault("D1", "lora", "alpha-missing", _without("lora_alpha"), mended="loaded", before="same"),
    "alpha null": Fault("D1", "lora", "alpha-missing", _config(lora_alpha=None), before="fails"),
    "alpha null, in the metadata": Fault(
        "D1",
        "lora",
        "alpha-missing",
        _both(_config(lora_alpha=None), _alpha_in_metadata),
        mended="trained",
        before="fails",
        reference=_config(lora_alpha=16),
    ),
    "alpha in the metadata only": Fault(
        "D1", "lora", "alpha-missing", _both(_without("lora_alpha"), _alpha_in_metadata)
    ),
    "alpha elsewhere": Fault("D1", "lora", "alpha-elsewhere", _alpha_in_metadata, warning=True),
    # -- D4, T10: whole weights
    "saved modules": Fault("D4 T10", "saved", "full-weights", as_it_is, warning=True),
    "saved embeddings are the base's": Fault("D4 T10", "saved", "droppable", as_it_is, warning=True, base=True),
    "norm means every norm": Fault("D4 T10", "saved", "undelimited-name", as_it_is, warning=True),
    "saved modules gone": Fault("D4", "saved", "missing-saved-modules", _drop("norm.weight"), before="fails"),
    # -- D6: names
    "no prefix": Fault(
        "D6", "lora", "missing-prefix", _keys(lambda k: k.removeprefix(PREFIX)), mended="trained", before="other"
    ),
    "no prefix, shared ones too": Fault(
        "D6",
        "vblora",
        "missing-prefix",
        _keys(lambda k: k.removeprefix(PREFIX).removeprefix("base_model.")),
        mended="trained",
        before="other",
    ),
    "prefix twice": Fault(
        "D6", "lora", "doubled-prefix", _keys(lambda k: PREFIX + k), mended="trained", before="other"
    ),
    "compiled": Fault(
        "D6",
        "lora",
        "wrapper-in-key",
        _keys(lambda k: k.replace(PREFIX, f"{PREFIX}_orig_mod.")),
        mended="trained",
        before="other",
    ),
    "in DistributedDataParallel": Fault(
        "D6", "lora", "wrapper-in-key", _keys(lambda k: f"module.{k}"), mended="trained", before="other"
    ),
    "a name of its own": Fault(
        "D6",
        "lora",
        "adapter-name-in-key",
        _keys(lambda k: k.replace(".weight", ".mine.weight")),
        mended="trained",
        before="other",
    ),
    "twice in the file": Fault("D6", "lora", "duplicate-key", _twin, mended="trained", before="same"),
    "twice, and not alike": Fault("D6", "lora", "duplicate-key", _unlike_twin),
    "body alone": Fault(
        "D6",
        "lora",
        "renamed-modules",
        _keys(lambda k: k.replace(f"{PREFIX}model.", PREFIX)),
        base=True,
        mended="trained",
        before="other",
    ),
    "body alone, with patterns": Fault(
        "D6",
        "ranks",
        "renamed-modules",
        _both(
            _keys(lambda k: k.replace(f"{PREFIX}model.", PREFIX)),
            _config(alpha_pattern={r"^layers\.\d+\.self_attn\.q_proj": 5}),
        ),
        base=True,
        mended="trained",
        before="other",
    ),
    "of another model": Fault(
        "D6", "lora", "not-in-base", _keys(lambda k: k.replace("down_proj", "down")), base=True
    ),
    "unknown key": Fault("D6", "lora", "unknown-key", lambda d: d.tensors.update(stranger=torch.ones(1))),
    # -- D17: empty, cut, untrained
    "no tensors": Fault("D17", "lora", "empty", _no_tensors),
    "no values": Fault("D17", "lora", "zero-size", _zero_size),
    "NaN": Fault("D17", "lora", "nan", _set("lora_A.weight", _put(float("nan")))),
    "infinite": Fault("D17", "vera", "infinite", _set("lambda_d", _put(float("inf")))),
    "untrained": Fault("D17", "lora", "untrained", _all("lora_B.weight", torch.zeros_like)),
    "untrained VeRA": Fault("D17", "vera", "untrained", _all("lambda_b", torch.zeros_like)),
    "untrained LoHa": Fault("D17", "loha", "untrained", _all("hada_w2_b", torch.zeros_like)),
    "untrained, not read": Fault("D17", "fourier", "untrained", _all("fourierft_spectrum", torch.zeros_like)),
    "one B zero": Fault("D17", "lora", "all-zero", _set("lora_B.weight", torch.zeros_like)),
    "one lambda_b zero": Fault("D17", "vera", "all-zero", _set("lambda_b", torch.zeros_like)),
    "half a pair": Fault("D17", "lora", "half-pair", _set("lora_B.weight", lambda t: None)),
    "half a pair, LoHa": Fault("D17", "loha", "half-pair", _set("hada_w1_a", lambda t: None)),
    "rank": Fault("D17", "lora", "rank-mismatch", _config(r=5), mended="trained", before="fails"),
    "ranks": Fault("D17", "ranks", "rank-mismatch", _config(rank_pattern={}), mended="trained", before="fails"),
    "VeRA's rank": Fault("D17", "vera", "rank-mismatch", _config(r=5), mended="trained", before="fails"),
    "VB-LoRA's rank": Fault("D17", "vblora", "rank-mismatch", _config(r=3), mended="trained", before="fails"),
    "a layer gone": Fault("D17", "lora", "missing-modules", _drop("layers.1."), warning=True, base=True),
    # -- D18: config
    "nulls": Fault(
        "D18",
        "lora",
        "null-field",
        _config(lora_dropout=None, bias=None, rank_pattern=None, alpha_pattern=None, r=None),
        mended="trained",
        before="fails",
    ),
    "nulls of VB-LoRA": Fault(
        "D18",
        "topk",
        "null-field",
        _config(num_vectors=None, vector_length=None, topk=None, vblora_dropout=None),
        mended="trained",
        before="fails",
    ),
    "null that decides": Fault("D18", "fourier", "null-field", _config(scaling=None)),
    "a field of tomorrow": Fault(
        "D18", "lora", "unknown-fields", _config(shiny=1, peft_version="0.99.0"), warning=True
    ),
    "of tomorrow": Fault("D18", "lora", "newer-peft", _config(peft_version="1.0.0"), warning=True),
    "a field of another tool": Fault("D18", "vera", "unknown-fields", _config(lora_alpha=3), warning=True),
    "no base": Fault("D18", "lora", "base-reference", _config(base_model_name_or_path=None), warning=True),
    "a path as base": Fault(
        "D18", "lora", "base-reference", _config(base_model_name_or_path="/home/me/llama"), warning=True
    ),
    "a path of Windows": Fault(
        "D18", "lora", "base-reference", _config(base_model_name_or_path="C:\\models\\llama"), warning=True
    ),
    "no targets": Fault("D18", "lora", "no-targets", _config(target_modules=None), mended="trained", before="other"),
    "not targeted": Fault(
        "D18", "lora", "not-targeted", _config(target_modules=["q_proj"]), mended="trained", before="other"
    ),
    "not matched": Fault(
        "D18", "lora", "not-targeted", _config(target_modules=r".*\.q_proj"), mended="trained", before="other"
    ),
    "excluded": Fault(
        "D18", "lora", "not-targeted", _config(exclude_modules=["down_proj"]), mended="trained", before="other"
    ),
    "other layers": Fault(
        "D18", "lora", "not-targeted", _config(layers_to_transform=[0]), mended="trained", before="other"
    ),
    "DoRA's flag off": Fault(
        "D18 T9", "dora", "wrong-flag", _config(use_dora=False), mended="trained", before="other"
    ),
    "DoRA without magnitudes": Fault("D18", "dora", "missing-magnitude", _drop("magnitude"), before="other"),
    "biases of B, flag off": Fault(
        "D18", "biased", "wrong-flag", _config(lora_bias=False), mended="trained", before="other"
    ),
    "biases of B gone": Fault(
        "D18", "lora", "wrong-flag", _config(lora_bias=True), warning=True, mended="trained", before="fails"
    ),
    "no format": Fault("D18", "lora", "no-format", _no_format, warning=True, mended="trained", before="same"),
    # -- the traps of the formats
    "T1: seed alone": Fault("T1", "seed", "unproven-seed", as_it_is, warning=True),
    "T1: projections ignored": Fault(
        "T1", "vera", "wrong-projection-flag", _config(save_projection=False), mended="trained", before="same"
    ),
    "T1: projections gone": Fault("T1", "vera", "wrong-projection-flag", _drop("base_model.vera_"), before="fails"),
    "T2: projections of a BF16 base": Fault("T2", "vera16", "rounded-projections", as_it_is, warning=True),
    "T3: negative last weight": Fault(
        "T3", "topk", "negative-topk-weight", _set("topk_weights", lambda t: t * 0 + 0.75)
    ),
    "T3: 16-bit weights": Fault(
        "T3",
        "topk",
        "narrow-topk-weights",
        _all("topk_weights", lambda t: t.to(BF16)),
        mended="trained",
        before="fails",
        reference=_all("topk_weights", lambda t: t.to(BF16).float()),
    ),
    "T4: flag says full": Fault(
        "T4", "topk", "wrong-topk-flag", _config(save_only_topk_weights=False), mended="trained", before="other"
    ),
    "T4: flag says topk": Fault(
        "T4", "vblora", "wrong-topk-flag", _config(save_only_topk_weights=True), mended="trained", before="same"
    ),
    "T4: index outside": Fault("T4", "topk", "index-outside-bank", _set("topk_indices", _put(20))),
    "T4: index twice": Fault("T4", "topk", "duplicate-index", _set("topk_indices", torch.zeros_like)),
    "T4: no bank": Fault("T4", "vblora", "missing-bank", _set("vector_bank", lambda t: None)),
    "T4: another bank": Fault(
        "T4", "vblora", "bank-mismatch", _config(num_vectors=21), mended="trained", before="fails"
    ),
    "T6: several dtypes": Fault("T6", "lora", "mixed-dtypes", _half_precision_of_one, warning=True),
    "T6: 16 bits in 32": Fault(
        "T6", "lora", "wide-dtype", _all("weight", lambda t: t.to(BF16).float()), warning=True
    ),
    "T8: one tensor many times": Fault("T8", "randlora", "duplicated-tensors", as_it_is, warning=True),
    "T9: places not in the file": Fault("T9", "fourier", "not-self-contained", as_it_is, warning=True),
    "T9: PiSSA": Fault("T9", "pissa", "changes-the-base", as_it_is, warning=True),
    "T9: LoRA-XS": Fault("T9", "lora", "misread-by-peft", _latent),
    "T9: a variant": Fault("T9", "lora", "not-read", _config(use_tomorrows_lora=True), warning=True),
}


def make(root: Path) -> Path:
    """The base and every adapter that faults are planted in."""
    oracle.save_base(oracle.tiny_model("llama"), root / "base")
    oracle.save_base(oracle.tiny_model("gpt2"), root / "other")
    for name, config in CONFIGS.items():
        dtype = BF16 if name == "vera16" else torch.float32
        if name == "vera16":
            oracle.make_adapter(root / name, config(), dtype=dtype, scale=0.5)
        else:
            biased = name == "biased"
            oracle.make_adapter(root / name, config(), scale=0.5, bias=biased, base_dir=base_of(root, name))
    return root


def base_of(root: Path, source: str) -> Path:
    """The base that an adapter was trained on; of those with biases in B one that has biases."""
    return root / ("biased-base" if source == "biased" else "base")


def plant(root: Path, fault: Fault, place: Path) -> Path:
    draft = Draft.read(root / fault.source)
    fault.spoil(draft)
    return draft.write(place)


def codes(place: Path, base: Path | None = None, *, warnings: bool = False) -> set[str]:
    """Of the faults; with warnings, too."""
    health = adapterpack.check(place, base=base)
    assert health.healthy == all(f.warning for f in health.findings)
    assert all(f.message and f.key for f in health.findings)
    return {f.code for f in health.findings if warnings or not f.warning}
