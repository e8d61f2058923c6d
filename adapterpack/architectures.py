"""What a base's config.json alone says: shapes of its linear layers, where Conv1D stands, what is tied.

Enough to slice VeRA's projections without a byte of weights. Where safetensors headers are at hand they
are asked first; an architecture that is not listed here needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adapterpack.errors import WrongBase
from adapterpack.tensor import Shape

Config = Mapping[str, Any]
_Sizes = Mapping[str, Shape]

CONV1D_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Model types whose attention and MLP layers are transformers' Conv1D, stored (in, out)."""
CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}

EMBEDDING_NAMES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
HEAD_NAMES = ("lm_head", "embed_out", "output")


EXPERTS_TRANSPOSED = {"gpt_oss", "openai_privacy_filter", "aria", "aria_text"}
"""Model types whose experts lie as (experts, in, out) and say so (`is_transposed`): PEFT asks for that alone."""


def is_conv1d(config: Config, module: str) -> bool | None:
    """Do the module's weights lie as (in, out)? None if no config says what model it is."""
    if "model_type" not in config:
        return None
    if module.rpartition(".")[2] == "experts":
        return str(config.get("model_type")) in EXPERTS_TRANSPOSED
    return str(config.get("model_type")) in CONV1D_TYPES and module.rpartition(".")[2] in CONV1D_NAMES


_BODIES = {
    **dict.fromkeys(("gpt2", "openai-gpt", "gptj", "gpt_neo", "gpt_bigcode", "falcon", "bloom"), "transformer"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), "roberta"),
    **{name: name for name in ("bert", "electra", "distilbert", "gpt_neox")},
    **dict.fromkeys(
        ("opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "phi", "phi3"),
        "model",
    ),
}
"""What models with a head call the body below it: `base_model_prefix` in transformers."""


def body(config: Config) -> str | None:
    """The name that the body has in the model's class; None if it has no head, or is not known."""
    said = config.get("architectures")
    name = str(said[0]) if isinstance(said, list) and said else ""
    return _BODIES.get(str(config.get("model_type"))) if "For" in name or "LMHead" in name else None


def text_config(config: Config) -> Config:
    """The language model's part of a config that has parts."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def _llama(c: Config) -> _Sizes:
    hidden, heads, inter = c["hidden_size"], c["num_attention_heads"], c["intermediate_size"]
    head = c.get("head_dim") or hidden // heads
    kv = (c.get("num_key_value_heads") or heads) * head
    return {
        "q_proj": (heads * head, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, heads * head),
        "gate_proj": (inter, hidden),
        "up_proj": (inter, hidden),
        "down_proj": (hidden, inter),
        "lm_head": (c["vocab_size"], hidden),
    }


def _gpt2(c: Config) -> _Sizes:
    hidden = c["n_embd"]
    inter = c.get("n_inner") or 4 * hidden
    # As stored: (in, out).
    return {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, inter),
        "mlp.c_proj": (inter, hidden),
        "lm_head": (c["vocab_size"], hidden),
    }


def _opt(c: Config) -> _Sizes:
    hidden, inter = c["hidden_size"], c["ffn_dim"]
    embed = c.get("word_embed_proj_dim") or hidden
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (hidden, hidden))
    return square | {
        "fc1": (inter, hidden),
        "fc2": (hidden, inter),
        "project_in": (hidden, embed),
        "project_out": (embed, hidden),
        "lm_head": (c["vocab_size"], embed),
    }


def _bert(c: Config) -> _Sizes:
    hidden, inter = c["hidden_size"], c["intermediate_size"]
    square = dict.fromkeys(("query", "key", "value", "attention.output.dense", "pooler.dense"), (hidden, hidden))
    return square | {"intermediate.dense": (inter, hidden), "output.dense": (hidden, inter)}


_FAMILIES: dict[str, Callable[[Config], _Sizes]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"), _llama),
    "gpt2": _gpt2,
    "opt": _opt,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _bert),
}


def linear_shape(config: Config, module: str) -> Shape:
    """Shape of a linear layer's weight as stored, from config.json alone.

    Raises:
        WrongBase: the architecture or the module is not known.
    """
    part = text_config(config)
    model_type = part.get("model_type")
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise WrongBase(
            f"the shapes of a {model_type!r:.60} model are not known from its config.json",
            hint="--base with its safetensors files; only their headers are read",
        )
    try:
        sizes = family(part)
    except (KeyError, TypeError, ZeroDivisionError) as e:
        raise WrongBase(f"config.json of the base does not say {e}") from e
    # The longest name wins: attention.output.dense before output.dense.
    for name in sorted(sizes, key=len, reverse=True):
        if module == name or module.endswith(f".{name}"):
            shape = sizes[name]
            if not all(type(n) is int and n > 0 for n in shape):
                raise WrongBase(f"config.json of the base gives {module} the shape {shape}")
            return shape
    raise WrongBase(f"the base, a {model_type} model, has no linear layer {module}")
