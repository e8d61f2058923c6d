"""formats/lora: LoRA, with rsLoRA, DoRA and bare parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel

from vectors.common import GPT2_TM, PFX, Case, Context, Tensors, f64, first_match
from vectors.hostile import Cases, Files, Q, directory, ramp

FORMAT = "lora"
PEFT_TYPES = ("LORA",)


def lora(**kw: Any) -> Callable[[], Any]:
    return lambda: LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"], **kw})


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "lora"
    for name, level in wrapped(base, config["target_parameters"] or []):
        a, b = f64(tensors.pop(f"{level}.lora_A.weight")), f64(tensors.pop(f"{level}.lora_B.weight"))
        experts = base[name].shape[0] if base[name].ndim == 3 else 1
        r = a.shape[0] // experts
        alpha = first_match(config["alpha_pattern"], name, config["lora_alpha"])
        s = alpha / math.sqrt(r) if config["use_rslora"] else alpha / r
        a, b = a.reshape(experts, r, -1), b.reshape(-1, r, experts)
        delta = np.stack([s * (b[:, :, e] @ a[e]) for e in range(experts)])
        delta = delta.transpose(0, 2, 1) if name in ctx.crossed and experts > 1 else delta
        ctx.add(name, delta.reshape(base[name].shape))
    for inner in sorted(k for k in tensors if k.endswith(".base_layer.out_proj.lora_A.weight")):
        attention(tensors, config, inner.removesuffix(".base_layer.out_proj.lora_A.weight"), ctx)
    for key in sorted(k for k in tensors if k.endswith((".lora_A.weight", ".lora_embedding_A"))):
        embedding = key.endswith("lora_embedding_A")
        p = key.removesuffix(".lora_embedding_A" if embedding else ".lora_A.weight")
        module = p.removeprefix(PFX)
        a = f64(tensors.pop(key))
        b = f64(tensors.pop(f"{p}.lora_embedding_B" if embedding else f"{p}.lora_B.weight"))
        r = a.shape[0]
        alpha = first_match(config["alpha_pattern"], module, config["lora_alpha"])
        s = alpha / math.sqrt(r) if config["use_rslora"] else alpha / r
        name = module + ".weight"
        convolution = a.ndim > 2
        delta = ctx.stored(module, s * (b.reshape(len(b), r) @ a.reshape(r, -1)))
        if embedding:
            delta = delta.T
        delta = delta.reshape(base[name].shape)
        if f"{p}.lora_magnitude_vector" in tensors:
            m, w = f64(tensors.pop(f"{p}.lora_magnitude_vector")), f64(base[name])
            v = w + delta
            per_column = embedding or module in ctx.conv1d  # the output dimension is the last one as stored
            inputs = tuple(range(1, v.ndim)) if convolution else 0 if per_column else 1
            norm = np.sqrt((v * v).sum(axis=inputs, keepdims=True))
            scale = m.reshape(-1, *(1 for _ in v.shape[1:])) / norm if convolution else None
            if scale is None:
                scale = m[None, :] / norm if per_column else m[:, None] / norm
            ctx.base_dependent(name, scale * v - w)
        elif f"{p}.base_layer.weight" in tensors:
            ctx.value(name, f64(tensors.pop(f"{p}.base_layer.weight")) + delta, saved_base=True)
        else:
            ctx.add(name, delta)
        if f"{p}.lora_B.bias" in tensors:
            ctx.add(module + ".bias", s * f64(tensors.pop(f"{p}.lora_B.bias")))


def attention(tensors: Tensors, config: dict[str, Any], p: str, ctx: Context) -> None:
    """torch's multi-head attention: a parameter, and a linear layer to which PEFT adds its change twice."""
    module = p.removeprefix(PFX)
    for place, name, times in ((p, "in_proj_weight", 1), (f"{p}.base_layer.out_proj", "out_proj.weight", 2)):
        a, b = f64(tensors.pop(f"{place}.lora_A.weight")), f64(tensors.pop(f"{place}.lora_B.weight"))
        alpha = first_match(config["alpha_pattern"], module, config["lora_alpha"])
        s = alpha / math.sqrt(len(a)) if config["use_rslora"] else alpha / len(a)
        ctx.add(f"{module}.{name}", times * s * (b @ a))


def wrapped(base: Tensors, targets: list[str]) -> list[tuple[str, str]]:
    """Parameters that `target_parameters` names, and where their keys begin: the first one defined is deepest."""
    modules: dict[str, list[str]] = {}
    for name in base:
        if any(name == x or name.endswith(f".{x}") for x in targets):
            modules.setdefault(name.rpartition(".")[0], []).append(name)
    return [
        (name, PFX + module + ".base_layer" * (len(own) - 1 - n))
        for module, own in modules.items()
        for n, name in enumerate(own)
    ]


def move_saved_embedding(model: PeftModel) -> None:
    with torch.no_grad():
        layer = model.get_input_embeddings()
        layer.base_layer.weight[1:4] += 0.5


CASES = [
    Case("linear-llama", lora(), "Linear layers of unequal shapes", over={"num_hidden_layers": 2}),
    Case(
        "linear-opt",
        lora(target_modules=["q_proj", "fc1", "project_in", "project_out"]),
        "Linear layers of OPT",
        kind="opt",
    ),
    Case(
        "linear-bert",
        lora(target_modules=["query", "dense"]),
        "Linear layers of BERT; a name that matches at three places",
        kind="bert",
    ),
    Case(
        "conv1d-gpt2",
        lora(target_modules=GPT2_TM),
        "Conv1D is stored (in, out): the change is transposed; square and not",
        kind="gpt2",
    ),
    Case(
        "conv1d-and-linear-gpt2",
        lora(target_modules=["c_attn", "c_proj", "lm_head"]),
        "Conv1D and Linear in one adapter: fan_in_fan_out is saved false, though two of the three are transposed",
        kind="gpt2",
    ),
    Case(
        "embedding-gpt2",
        lora(target_modules=["wte", "wpe", "c_attn"]),
        "Embedding layers; wte is not saved with its base",
        kind="gpt2",
    ),
    Case(
        "saved-embeddings",
        lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
        "embed_tokens and lm_head targeted: PEFT saves their base weights too",
    ),
    Case(
        "saved-embeddings-changed",
        lora(target_modules=["embed_tokens", "q_proj"]),
        "saved base weights that differ from the base: they replace it before the change is added",
        post=move_saved_embedding,
    ),
    Case(
        "lora-bias",
        lora(lora_bias=True, target_modules=["q_proj", "fc2"]),
        "lora_B has a bias, added to the base bias",
        kind="opt",
    ),
    Case(
        "lora-bias-gpt2",
        lora(lora_bias=True, target_modules=["c_attn"]),
        "lora_B has a bias on Conv1D",
        kind="gpt2",
    ),
    Case("rslora", lora(use_rslora=True, r=3), "scale alpha / sqrt(r)"),
    Case(
        "patterns",
        lora(
            rank_pattern={"layers.0.self_attn.q_proj": 3, "q_proj": 4},
            alpha_pattern={"self_attn.q_proj": 3, "q_proj": 50, r"layers\.1\..*down_proj": 7},
        ),
        "overlapping patterns: the first match in the file's order wins, and the file's keys are sorted",
        over={"num_hidden_layers": 2},
    ),
    Case(
        "patterns-rslora",
        lora(use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"^model.layers.0.self_attn.v_proj": 9}),
        "patterns with rsLoRA; a key that starts with ^",
    ),
    Case(
        "bias-all",
        lora(bias="all", target_modules=["q_proj", "fc1"]),
        "every bias of the model is saved and replaced",
        kind="opt",
    ),
    Case(
        "bias-lora-only",
        lora(bias="lora_only", target_modules=["query", "dense"]),
        "the biases of adapted layers",
        kind="bert",
    ),
    Case(
        "bias-lora-only-gpt2",
        lora(bias="lora_only", target_modules=["c_attn"]),
        "the bias of an adapted Conv1D",
        kind="gpt2",
    ),
    Case(
        "modules-to-save",
        lora(modules_to_save=["lm_head", "norm"]),
        "whole modules; 'norm' also matches input_layernorm, for the test has no dot boundary",
    ),
    Case(
        "token-indices",
        lora(trainable_token_indices=[5, 2, 31]),
        "new rows of the embedding, absolute, in list order",
    ),
    Case(
        "convolution-2d",
        lora(target_modules=["convolution"], alpha_pattern={"embedder.convolution": 3}),
        "Conv2d with kernels 7x7, 3x3 and 1x1",
        kind="resnet",
    ),
    Case(
        "convolution-1d-bias",
        lora(target_modules=["conv1", "conv2"], lora_bias=True, use_rslora=True),
        "Conv1d, with a bias of its own",
        kind="whisper",
    ),
    Case(
        "dora-convolution-2d",
        lora(target_modules=["convolution"], use_dora=True),
        "DoRA on Conv2d: the norm over all inputs and the kernel",
        kind="resnet",
    ),
    Case(
        "parameters-transposed",
        lora(
            target_modules=["q_proj"],
            target_parameters=["experts.down_proj", "experts.gate_up_proj"],
            rank_pattern={"gate_up_proj": 3},
        ),
        "target_parameters on experts that lie as (experts, in, out) and say so; two levels",
        kind="gpt_oss",
    ),
    Case(
        "parameters-straight",
        lora(target_modules=[], target_parameters=["gate_up_proj", "down_proj", "router.weight"]),
        "target_parameters on experts that PEFT takes for (experts, out, in), and on a matrix",
        kind="llama4",
        dtype="bfloat16",
    ),
    Case("dora-linear", lora(use_dora=True), "DoRA on Linear: row norms"),
    Case(
        "dora-gpt2",
        lora(use_dora=True, target_modules=GPT2_TM),
        "DoRA on Conv1D: norms over dim 0",
        kind="gpt2",
    ),
    Case(
        "dora-embedding",
        lora(use_dora=True, target_modules=["wte"]),
        "DoRA on Embedding: norms over dim 0",
        kind="gpt2",
    ),
    Case(
        "dora-rslora-patterns",
        lora(use_dora=True, use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 2}),
        "DoRA with rsLoRA and patterns",
    ),
    Case(
        "attention",
        lora(target_modules=["mha"], alpha_pattern={"mha": 3, "out_proj": 100}),
        "nn.MultiheadAttention: two levels, and the change of out_proj twice",
        kind="custom",
        over={"layers": [["mha", "MultiheadAttention", {"embed_dim": 8, "num_heads": 2}]]},
    ),
    Case("bf16-base", lora(), "a bfloat16 base: the adapter's values are float32", dtype="bfloat16"),
    Case(
        "bf16-base-embedding",
        lora(target_modules=["wte", "c_attn"]),
        "a bfloat16 base with Embedding and Conv1D",
        kind="gpt2",
        dtype="bfloat16",
    ),
    Case(
        "bf16-file",
        lora(),
        "autocast_adapter_dtype=False: the file is bfloat16",
        dtype="bfloat16",
        autocast=False,
    ),
    Case("f16-base", lora(modules_to_save=["lm_head"]), "a float16 base; modules_to_save", dtype="float16"),
]


# ---------------------------------------------------------------- hostile adapters


def lora_arrays(module: str = Q, r: int = 2) -> dict[str, np.ndarray]:
    return {f"{PFX}{module}.lora_A.weight": ramp(r, 8), f"{PFX}{module}.lora_B.weight": ramp(8, r)}


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def lora_adapter(more: dict[str, Any] | None = None, arrays: dict[str, np.ndarray] | None = None) -> Files:
    return directory({**LORA, **(more or {})}, lora_arrays() if arrays is None else arrays)


BOMB = r"(.|\w)+(.|\w)+(.|\w)+(.|\w)+(.|\w)+(.|\w)+[A-Z]"
"""Alternatives that overlap, nested: no engine sees ahead that it fails."""


def invalid(cases: Cases) -> None:
    a_key, b_key = lora_arrays()
    bf16 = {"dtype": "bf16"}

    def refused(case: str, files: Files, message: str) -> None:
        cases.add(case, files, "convert", error="unsupported", message=message, **bf16)

    def unmerged(case: str, files: Files, message: str) -> None:
        cases.add(case, files, "convert", error="no-merged-weight", message=message, **bf16)

    def broken(case: str, files: Files, message: str) -> None:
        cases.add(case, files, "convert", error="invalid", message=message, **bf16)

    # Variants that are not plain LoRA, by their configs and by their tensors.
    for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "PiSSA"):
        refused(f"init-{init}", lora_adapter({"init_lora_weights": init}), "which changes the base weights")
    refused("init-unknown", lora_adapter({"init_lora_weights": "clover"}), "'clover' is unknown")
    switches: dict[str, tuple[Any, str]] = {
        "megatron_config": ({"tensor_model_parallel_size": 2}, "Megatron"),
    }
    for field, (value, message) in {
        "alora_invocation_tokens": ([1, 2], "aLoRA"),
        "arrow_config": ({"top_k": 3}, "Arrow"),
        "layer_replication": ([[0, 1], [0, 1]], "layer replication"),
    }.items():
        unmerged(field.replace("_", "-"), lora_adapter({field: value}), message)
    for field, (value, message) in switches.items():
        refused(field.replace("_", "-"), lora_adapter({field: value}), message)
    refused("unknown-switch", lora_adapter({"use_tomorrows_lora": True}), "use_tomorrows_lora is unknown")
    conv = {f"{PFX}conv.lora_A.weight": ramp(2, 4, 3, 3), f"{PFX}conv.lora_B.weight": ramp(4, 1, 1, 1)}
    unmerged("convolution-in-groups", lora_adapter({"target_modules": ["conv"]}, conv), "convolution with 2 groups")
    inner = {k.replace(Q, "mlp.experts.base_layer"): v for k, v in lora_arrays().items()}
    outer = {k.replace(Q, "mlp.experts"): v for k, v in lora_arrays().items()}
    bare = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    refused("wrapped-module", lora_adapter(arrays=inner), "wraps a wrapped module")
    refused(
        "wrapped-other-module", lora_adapter({"target_parameters": ["mlp.gate.weight"]}, inner), "does not name it"
    )
    refused("parameters-dora", lora_adapter({**bare, "use_dora": True}, {**inner, **outer}), "PEFT does not do that")
    broken("parameters-string", lora_adapter({"target_parameters": "mlp.experts.down_proj"}), "no list of names")
    uneven = {f"{PFX}mlp.experts.lora_A.weight": ramp(5, 8), f"{PFX}mlp.experts.lora_B.weight": ramp(8, 5)}
    one = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    cases.both("parameters-rank", lora_adapter(one, uneven), "half-pair", "is not of rank 2 for each expert", **bf16)
    for case, rank in (("zero", 0), ("string", "2"), ("huge", 10**9)):
        broken(
            f"parameters-rank-{case}",
            lora_adapter({**one, "rank_pattern": {"down_proj": rank}}, uneven),
            "rank_pattern gives",
        )
    twice = {**uneven, f"{PFX}mlp.experts.lora_B.bias": ramp(8)}
    refused("parameters-bias", lora_adapter({**one, "r": 5}, twice), "more than A and B")

    # Pairs and ranks.
    cases.both("no-b", lora_adapter(arrays={a_key: ramp(2, 8)}), "half-pair", "lacks lora_B", **bf16)
    cases.both("no-a", lora_adapter(arrays={b_key: ramp(8, 2)}), "half-pair", "lacks lora_A", **bf16)
    uneven = {a_key: ramp(2, 8), b_key: ramp(8, 3)}
    cases.both("ranks-differ", lora_adapter(arrays=uneven), "half-pair", "are not (r, in) and (out, r)", **bf16)
    nothing = {a_key: ramp(0, 8), b_key: ramp(8, 0)}
    cases.both("rank-zero", lora_adapter(arrays=nothing), "half-pair", "are not (r, in) and (out, r)", **bf16)
    flat = {a_key: ramp(16), b_key: ramp(16)}
    cases.both("vectors", lora_adapter(arrays=flat), "half-pair", "are not (r, in) and (out, r)", **bf16)
    cases.add("rank-not-as-config", lora_adapter({"r": 4}), "check", finding="rank-mismatch")
    cases.add("rank-not-as-pattern", lora_adapter({"rank_pattern": {"q_proj": 3}}), "check", finding="rank-mismatch")
    for case, r in (("r-zero", 0), ("r-huge", 10**9), ("r-string", "2"), ("r-boolean", True), ("r-float", 2.0)):
        cases.add(case, lora_adapter({"r": r}), "check", finding="malformed")
    cases.add(
        "b-all-zero",
        lora_adapter(arrays={a_key: ramp(2, 8), b_key: np.zeros((8, 2), "float32")}),
        "check",
        finding="all-zero",
    )
    embedding = {
        **lora_arrays(),
        f"{PFX}{Q}.lora_embedding_A": ramp(2, 8),
        f"{PFX}{Q}.lora_embedding_B": ramp(8, 2),
    }
    broken("embedding-and-linear", lora_adapter(arrays=embedding), "as an embedding and as a linear layer")

    # The scale.
    for case, alpha in (
        ("zero", 0),
        ("string", "16"),
        ("null", None),
        ("boolean", True),
        ("huge", 1e308),
        ("list", [16]),
    ):
        broken(f"alpha-{case}", lora_adapter({"lora_alpha": alpha}), f"lora_alpha of {Q} is")
    broken("alpha-pattern-string", lora_adapter({"alpha_pattern": {"q_proj": "8"}}), f"lora_alpha of {Q} is '8'")
    broken(
        "alpha-pattern-list",
        lora_adapter({"alpha_pattern": ["q_proj"]}),
        "alpha_pattern in adapter_config.json is not",
    )
    broken("rslora-string", lora_adapter({"use_rslora": "yes"}), "use_rslora in adapter_config.json is 'yes'")
    broken("pattern-bomb", lora_adapter({"alpha_pattern": {BOMB: 8}}), "does not end on")
    broken("pattern-too-long", lora_adapter({"alpha_pattern": {"a" * 2001: 8}}), "a pattern of 2,001 characters")
    broken("pattern-no-regex", lora_adapter({"alpha_pattern": {"(": 8}}), "is no regular expression")
    broken("pattern-recursion", lora_adapter({"alpha_pattern": {"(?P<x>(?&x)?a)": 8}}), "is no regular expression")
    broken("pattern-fuzzy", lora_adapter({"alpha_pattern": {"(?:v_proj){e<=9}": 8}}), "no module name needs")
    cases.add("rank-pattern-bomb", lora_adapter({"rank_pattern": {BOMB: 8}}), "check", finding="malformed")

    # Biases and magnitudes.
    bias = {**lora_arrays(), f"{PFX}{Q}.lora_B.bias": ramp(7)}
    broken("bias-too-short", lora_adapter({"lora_bias": True}, bias), "has shape (7,), not (8,)")
    magnitude = {**lora_arrays(), f"{PFX}{Q}.lora_magnitude_vector": ramp(8)}
    broken("dora-without-magnitude", lora_adapter({"use_dora": True}), "has no lora_magnitude_vector")
    broken("magnitude-without-dora", lora_adapter(arrays=magnitude), "use_dora is false")
    magnitude = {**lora_arrays(), f"{PFX}{Q}.lora_magnitude_vector": ramp(7)}
    broken("magnitude-too-short", lora_adapter({"use_dora": True}, magnitude), "has shape (7,), not (8,)")
