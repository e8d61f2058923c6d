"""Adapters that the tests ask PEFT for: one entry for each thing that a format can do, on tiny models.

The shapes of the models are unequal (k_proj is narrower than q_proj, fc1 wider, project_in narrower), so a
mistaken orientation or slice cannot pass by accident; where a square weight is the trap, the case says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, VBLoRAConfig, VeraConfig

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One adapter: what PEFT is asked for.

    Attributes:
        name: Of the test.
        config: Makes the PEFT config (PEFT changes the object that it is given).
        kind: Of the tiny model.
        scale: Standard deviation of what is added to every trainable parameter.
        autocast: False keeps the adapter in the dtype of the base, in the file too.
        post: Runs after the parameters were moved, before they are saved.
        over: Fields of the model's config.
    """

    name: str
    config: Callable[[], PeftConfig]
    kind: str = "llama"
    scale: float = 0.3
    tie: bool = False
    bias: bool = False
    autocast: bool = True
    post: Callable[[PeftModel], None] | None = None
    over: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def _lora(**fields: Any) -> Callable[[], PeftConfig]:
    return lambda: LoraConfig(**{"r": 4, "lora_alpha": 6, **fields})


lora = _lora


def _move_base_layers(model: PeftModel) -> None:
    """Saved embeddings that are not the base's any more, as after training with resized embeddings."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("base_layer.weight"):
                p.add_((torch.randn(p.shape, generator=g) * 0.1).to(p.dtype))


_QKU = ["q_proj", "k_proj", "up_proj"]
LORA = (
    Case("linear-llama", _lora(target_modules=[*_QKU, "down_proj"])),
    Case("linear-opt", _lora(target_modules=["q_proj", "fc1", "fc2", "project_in", "project_out"]), "opt"),
    Case("linear-bert", _lora(target_modules=["query", "intermediate.dense", "pooler.dense"]), "bert"),
    Case("conv1d", _lora(target_modules=["c_attn", "c_fc", "attn.c_proj"]), "gpt2"),
    # lm_head is square here, and one fan_in_fan_out stands in the file for all three layers: it lies for some.
    Case(
        "conv1d-and-square-linear",
        _lora(target_modules=["c_attn", "c_proj", "lm_head"]),
        "gpt2",
        over={"vocab_size": 64},
    ),
    Case("conv1d-and-linear", _lora(target_modules=["c_attn", "c_proj", "lm_head"]), "gpt2"),
    Case("embedding-llama", _lora(target_modules=["q_proj", "embed_tokens"])),
    Case("embedding-gpt2", _lora(target_modules=["wte", "c_attn"]), "gpt2"),
    Case("embedding-opt", _lora(target_modules=["embed_tokens", "embed_positions"]), "opt"),
    Case("embedding-bert", _lora(target_modules=["word_embeddings", "query"]), "bert"),
    # As many entries as dimensions: only its kind tells how it lies.
    Case("embedding-square", _lora(target_modules=["embed_tokens"]), over={"vocab_size": 64}),
    Case("lora-bias", _lora(lora_bias=True, target_modules=_QKU), bias=True),
    Case("lora-bias-conv1d", _lora(lora_bias=True, target_modules=["c_attn", "c_proj"]), "gpt2"),
    Case("rslora", _lora(use_rslora=True, target_modules=_QKU)),
    Case("fractional-alpha", _lora(lora_alpha=2.7, r=3, target_modules=_QKU)),
    Case(
        "patterns-that-overlap",
        _lora(
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "k_proj": 3},
            alpha_pattern={"q_proj": 50, "self_attn.q_proj": 3, r"^model\.layers\.0\..*up_proj": 1},
            target_modules=_QKU,
        ),
    ),
    Case(
        "patterns-rslora",
        _lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 16}, target_modules=_QKU),
    ),
    Case("bias-all-opt", _lora(bias="all", target_modules=["q_proj", "fc1"]), "opt"),
    Case("bias-all-bert", _lora(bias="all", target_modules=["query"]), "bert"),
    Case("bias-lora-only", _lora(bias="lora_only", target_modules=["q_proj", "fc1"]), "opt"),
    Case("bias-lora-only-conv1d", _lora(bias="lora_only", target_modules=["c_attn"]), "gpt2"),
    Case("bias-all-and-lora-bias", _lora(bias="all", lora_bias=True, target_modules=["q_proj", "fc1"]), "opt"),
    Case("modules-to-save", _lora(target_modules=["query"], modules_to_save=["pooler"]), "bert"),
    Case("modules-to-save-head", _lora(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    Case("modules-to-save-suffix", _lora(target_modules=["q_proj"], modules_to_save=["norm"])),
    Case("token-rows-list", _lora(target_modules=["q_proj"], trainable_token_indices=[7, 1, 90])),
    Case(
        "token-rows-dict",
        _lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [0, 95], "lm_head": [3]}),
    ),
    Case("saved-embeddings", _lora(target_modules=["q_proj", "lm_head"])),
    Case(
        "saved-embeddings-changed",
        _lora(target_modules=["q_proj", "lm_head", "embed_tokens"]),
        post=_move_base_layers,
    ),
    Case("dora-linear", _lora(use_dora=True, target_modules=[*_QKU, "down_proj"])),
    Case("dora-conv1d", _lora(use_dora=True, target_modules=["c_attn", "c_proj"]), "gpt2"),
    Case("dora-embedding", _lora(use_dora=True, target_modules=["embed_tokens", "q_proj"])),
    Case("dora-bert", _lora(use_dora=True, target_modules=["key", "output.dense"]), "bert"),
    Case(
        "dora-rslora-patterns",
        _lora(
            use_dora=True,
            use_rslora=True,
            rank_pattern={"k_proj": 3},
            alpha_pattern={"q_proj": 2},
            target_modules=_QKU,
        ),
    ),
    Case("dora-bias-all", _lora(use_dora=True, bias="all", target_modules=["q_proj", "fc2"]), "opt"),
    Case("init-gaussian", _lora(init_lora_weights="gaussian", target_modules=_QKU)),
    Case("init-orthogonal", _lora(init_lora_weights="orthogonal", target_modules=_QKU)),
)
NARROW_LORA = (
    Case("narrow-linear", _lora(target_modules=_QKU), autocast=False),
    Case("narrow-conv1d", _lora(target_modules=["c_attn", "c_proj"]), "gpt2", autocast=False),
    Case("narrow-embedding", _lora(target_modules=["embed_tokens", "q_proj"]), autocast=False),
    Case("narrow-dora", _lora(use_dora=True, target_modules=_QKU), autocast=False),
    Case("narrow-bias", _lora(lora_bias=True, bias="all", target_modules=_QKU), bias=True, autocast=False),
)
"""Written in the dtype of the base, 16 bits."""


def _vb(k: int, topk_only: bool = False, vectors: int = 60, **fields: Any) -> Callable[[], PeftConfig]:
    return lambda: VBLoRAConfig(
        **{
            "r": 4,
            "num_vectors": vectors,
            "vector_length": 16,
            "topk": k,
            "save_only_topk_weights": topk_only,
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            **fields,
        }
    )


def peak(model: PeftModel) -> None:
    """Logits that lie far apart: softmax weights near 1 and near 0, as after long training."""
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "vblora_logits" in name:
                p.copy_((torch.rand(p.shape, generator=g) * 400).to(p.dtype))


VBLORA = (
    *(Case(f"full-k{k}", _vb(k), scale=1.0) for k in (1, 2, 3, 4)),
    *(Case(f"topk-k{k}", _vb(k, True), scale=1.0) for k in (1, 2, 3, 4)),
    *(
        Case(f"{'topk' if t else 'full'}-conv1d", _vb(3, t, target_modules=["c_attn", "c_proj"]), "gpt2", scale=1.0)
        for t in (False, True)
    ),
    Case("full-opt", _vb(2, target_modules=["q_proj", "fc1", "project_in"], r=3), "opt", scale=1.0),
    Case("topk-bert", _vb(2, True, target_modules=["query", "intermediate.dense"]), "bert", scale=1.0),
    Case("full-bias-all", _vb(2, bias="all", target_modules=["q_proj", "fc1"]), "opt", scale=0.5),
    Case("topk-bias-all", _vb(2, True, bias="all", target_modules=["q_proj", "fc1"]), "opt", scale=0.5),
    Case("full-bias-only", _vb(2, bias="vblora_only", target_modules=["query"]), "bert", scale=0.5),
    Case("topk-bias-only-conv1d", _vb(2, True, bias="vblora_only", target_modules=["c_attn"]), "gpt2", scale=0.5),
    Case("full-modules-to-save", _vb(2, modules_to_save=["lm_head"]), scale=0.5),
    Case("full-k-is-all", _vb(6, vectors=6), scale=1.0),
    Case("full-peaked", _vb(3), post=peak),
)
_ONE = {"r": 2, "target_modules": r".*layers\.0\.self_attn\.k_proj"}
WIDTHS = tuple(
    Case(f"{'topk' if t else 'full'}-{n}-vectors", _vb(2, t, vectors=n, **_ONE), scale=1.0)
    for n in (255, 256, 300, 32767, 32768)
    for t in (False, True)
)


def coarsen(model: PeftModel) -> None:
    """Logits on a coarse grid: equal ones are everywhere, at the boundary of topk too."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "vblora_logits" in name:
                p.copy_(torch.round(p.float() * 4) / 4)


NARROW_VBLORA = tuple(
    Case(f"narrow-full-k{k}", _vb(k, vectors=300), scale=0.5, autocast=False, post=coarsen) for k in (1, 2, 4)
)


def _vera(save: bool = True, **fields: Any) -> Callable[[], PeftConfig]:
    return lambda: VeraConfig(
        **{
            "r": 8,
            "save_projection": save,
            "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"],
            **fields,
        }
    )


VERA = tuple(
    case
    for save in (True, False)
    for word in ("projection" if save else "seed",)
    for case in (
        Case(f"{word}-mixed", _vera(save)),
        Case(f"{word}-key", _vera(save, projection_prng_key=2**32 + 77)),
        Case(f"{word}-conv1d", _vera(save, target_modules=["c_attn", "c_proj"]), "gpt2"),
        Case(f"{word}-opt", _vera(save, target_modules=["q_proj", "fc1", "fc2", "project_in"], r=6), "opt"),
        Case(f"{word}-bert", _vera(save, target_modules=["query", "intermediate.dense"]), "bert"),
        Case(f"{word}-bias-all", _vera(save, bias="all", target_modules=["q_proj", "fc1"]), "opt"),
        Case(f"{word}-bias-only", _vera(save, bias="vera_only", target_modules=["c_attn"]), "gpt2"),
        Case(f"{word}-modules-to-save", _vera(save, modules_to_save=["lm_head"])),
    )
)
NARROW_VERA = (
    Case("narrow-projection", _vera(), autocast=False),
    Case("narrow-projection-conv1d", _vera(target_modules=["c_attn", "c_proj"]), "gpt2", autocast=False),
)

BY_NAME = {c.name: c for c in (*LORA, *NARROW_LORA, *VBLORA, *WIDTHS, *NARROW_VBLORA, *VERA, *NARROW_VERA)}
