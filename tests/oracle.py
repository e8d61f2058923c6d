"""What the tests need from PEFT and transformers, the oracle. Nothing here knows adapterpack.

Models are tiny and random, but their biases and norms are not trivial, so that a forgotten bias shows.
Nothing is downloaded: offline mode is set before the libraries are imported.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import custom_models
import peft
import torch
import transformers
from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("peft").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module=r"peft\b")

KINDS = ("llama", "gpt2", "opt", "bert")
VOCAB = 96


def _quiet(f: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return f(*args, **kwargs)

    return call


# ---------------------------------------------------------------------------- models


def tiny_config(kind: str, tie: bool = False, bias: bool = False, **over: Any) -> Any:
    """The transformers config of a tiny model; `over` replaces fields (num_hidden_layers=1, ...)."""
    if kind == "llama":
        return LlamaConfig(
            **{
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": VOCAB,
                "max_position_embeddings": 64,
                "tie_word_embeddings": tie,
                "attention_bias": bias,
                "mlp_bias": bias,
                **over,
            }
        )
    if kind == "gpt2":
        return GPT2Config(
            **{
                "n_embd": 64,
                "n_layer": 2,
                "n_head": 4,
                "vocab_size": VOCAB,
                "n_positions": 64,
                "tie_word_embeddings": tie,
                "bos_token_id": 0,
                "eos_token_id": 0,
                **over,
            }
        )
    if kind == "opt":
        return OPTConfig(
            **{
                "hidden_size": 64,
                "ffn_dim": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "vocab_size": VOCAB,
                "max_position_embeddings": 64,
                "word_embed_proj_dim": 32,
                "do_layer_norm_before": False,
                "tie_word_embeddings": tie,
                **over,
            }
        )
    if kind == "bert":
        return BertConfig(
            **{
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "vocab_size": VOCAB,
                "max_position_embeddings": 64,
                **over,
            }
        )
    if kind in _OTHERS:
        family, fields = _OTHERS[kind]
        made = getattr(transformers, f"{family[0]}Config")(**{**fields, **over})
        if tie:
            made.tie_word_embeddings = True
        return made
    raise ValueError(f"no tiny model {kind!r}; one of {(*KINDS, *_OTHERS)}")


_MIXTURE = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
_OTHERS: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    # Convolutions of two, one and three dimensions.
    "resnet": (
        ("ResNet", "ResNetModel"),
        {"embedding_size": 8, "hidden_sizes": [12, 20], "depths": [1, 1], "layer_type": "bottleneck"},
    ),
    "whisper": (
        ("Whisper", "WhisperModel"),
        {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "vocab_size": 40,
            "num_mel_bins": 10,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
        },
    ),
    "videomae": (
        ("VideoMAE", "VideoMAEModel"),
        {
            "image_size": 16,
            "patch_size": 4,
            "num_frames": 4,
            "tubelet_size": 2,
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "qkv_bias": False,
        },
    ),
    "convnext": (
        ("ConvNext", "ConvNextModel"),
        {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]},
    ),
    # Its head has torch's own multi-head attention.
    "siglip": (
        ("SiglipVision", "SiglipVisionModel"),
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        },
    ),
    # Mixtures of experts: apart on disk with two families of names, fused, fused with inputs first, declared or not.
    "mixtral": (("Mixtral", "MixtralForCausalLM"), {**_MIXTURE, "num_local_experts": 4}),
    "qwen2_moe": (
        ("Qwen2Moe", "Qwen2MoeForCausalLM"),
        {
            **_MIXTURE,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
        },
    ),
    "qwen3_moe": (
        ("Qwen3Moe", "Qwen3MoeForCausalLM"),
        {
            **_MIXTURE,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "head_dim": 8,
        },
    ),
    "gpt_oss": (
        ("GptOss", "GptOssForCausalLM"),
        {**_MIXTURE, "num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    ),
    "llama4": (
        ("Llama4Text", "Llama4ForCausalLM"),
        {
            **_MIXTURE,
            "intermediate_size_mlp": 40,
            "num_local_experts": 4,
            "head_dim": 8,
            "num_experts_per_tok": 1,
            "moe_layers": [0],
            "layer_types": ["full_attention"] * 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "granitemoe": (("GraniteMoe", "GraniteMoeForCausalLM"), {**_MIXTURE, "num_local_experts": 4}),
}
"""Family and class in transformers, and the fields of a tiny one."""


_CLASSES: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "gpt2": GPT2LMHeadModel,
    "opt": OPTForCausalLM,
    "bert": BertModel,
}


def _class(kind: str) -> type[PreTrainedModel]:
    found: type[PreTrainedModel] = _CLASSES[kind] if kind in _CLASSES else getattr(transformers, _OTHERS[kind][0][1])
    return found


@_quiet
def tiny_model(
    kind: str,
    dtype: torch.dtype = torch.float32,
    tie: bool = False,
    bias: bool = False,
    seed: int = 1234,
    **over: Any,
) -> Any:
    """A tiny random model in eval mode. Same arguments, same weights, whatever ran before.

    A `PreTrainedModel`, or for the kinds of custom_models.py a bare `nn.Module`, whose only field is `layers`.

    Every value is drawn in float32 from a generator of its own and then cast, by module order, so the
    weights do not depend on the initialisers of a transformers version: matrices N(0, 0.05), vectors
    (biases, norms) are moved by N(0, 0.05) from their 0 or 1.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if custom_models.is_custom(kind):
            if tie or bias:
                raise ValueError(f"{kind}: say in the layers which have biases; none are tied")
            model = custom_models.build(kind, **over)
        else:
            model = _class(kind)(tiny_config(kind, tie, bias, **over))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():  # tied tensors appear once
            noise = torch.randn(p.shape, generator=g) * 0.05
            if p.dim() > 1:
                p.copy_(noise)
            else:
                p.copy_(noise + (0.0 if name.endswith("bias") else 1.0))
    return model.to(dtype).eval()


_LAYERS = "custom_layers"
"""Where the weights of a custom model say its layers, for `load_base`: there is no config.json to name a class."""


@_quiet
def save_base(model: Any, path: str | os.PathLike[str], max_shard_size: str | int | None = None) -> Path:
    """Write a base model directory (safetensors; several shards and an index if `max_shard_size` says so).

    Of a custom model that is model.safetensors alone.
    """
    if isinstance(model, custom_models.CustomModel):
        if max_shard_size is not None:
            raise ValueError("custom models are written as one file")
        Path(path).mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", _LAYERS: json.dumps(model.layers)}
        save_file(model.state_dict(), Path(path) / "model.safetensors", metadata=metadata)
        return Path(path)
    kw = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(os.fspath(path), **kw)
    return Path(path)


@_quiet
def load_base(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Any:
    """Load a base directory with the class that its config names; dtype None keeps the stored one.

    Without config.json it is a custom model.
    """
    if not (Path(path) / "config.json").exists():
        file = Path(path) / "model.safetensors"
        with safe_open(file, "pt") as opened:
            layers = json.loads(opened.metadata()[_LAYERS])
        weights = load_file(file)
        model = custom_models.CustomModel(layers).to(dtype or next(iter(weights.values())).dtype)
        model.load_state_dict(weights)
        return model.eval()
    config = transformers.AutoConfig.from_pretrained(os.fspath(path))
    cls = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
    return cls.from_pretrained(os.fspath(path), dtype="auto" if dtype is None else dtype).eval()


# ---------------------------------------------------------------------------- adapters


def perturb(model: torch.nn.Module, scale: float = 0.05, seed: int = 7) -> None:
    """Add N(0, scale) to every trainable parameter, deterministically (in the order of named_parameters)."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.requires_grad:
                p.add_((torch.randn(p.shape, generator=g) * scale).to(p.dtype))


@_quiet
def make_adapter(
    path: str | os.PathLike[str],
    config: PeftConfig,
    kind: str = "llama",
    dtype: torch.dtype = torch.float32,
    tie: bool = False,
    bias: bool = False,
    scale: float = 0.05,
    autocast: bool = True,
    hook: Callable[[PeftModel], None] | None = None,
    post: Callable[[PeftModel], None] | None = None,
    base_dir: str | os.PathLike[str] | None = None,
    seed: int = 7,
    base: torch.nn.Module | None = None,
    adapter_name: str = "default",
    **over: Any,
) -> PeftModel:
    """Build a tiny model, adapt it as `config` says, move every trainable parameter, save the adapter to `path`.

    `hook` runs before the parameters are moved, `post` after (before saving). With `base_dir` the base is read from
    there (and written there first if it is not there yet), so that base_model_name_or_path names it; `base` is a live
    model to adapt in place. An `adapter_name` other than default makes PEFT save to the subfolder of that name.
    The initial adapter values are drawn from a seeded stream: same arguments, same file.
    """
    if base is not None:
        pass
    elif base_dir is not None:
        if not any(Path(base_dir).glob("*.safetensors")):
            save_base(tiny_model(kind, dtype, tie, bias, **over), base_dir)
        base = load_base(base_dir, dtype)
    else:
        base = tiny_model(kind, dtype, tie, bias, **over)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, config, adapter_name=adapter_name, autocast_adapter_dtype=autocast)
    if hook is not None:
        hook(model)
    perturb(model, scale, seed)
    if post is not None:
        post(model)
    model.eval()
    model.save_pretrained(os.fspath(path))
    return model


@dataclass(frozen=True)
class LoadResult:
    """What loading did, in full.

    missing: checkpoint keys that this PEFT would have saved for this config and that the file did not set. PEFT's own
        result hides those without the tuner's prefix in their name: biases, saved embeddings, token rows; and
        `from_pretrained` never warns of an absent vector bank.
    unexpected: keys of the file that PEFT dropped (this is PEFT's own list; from_pretrained shows it to nobody).
    peft_missing: `missing_keys` just as `PeftModel.load_adapter` returns them (model keys; they hold one alias of
        VB-LoRA's bank per layer, always).
    warnings: the texts of the warnings given while loading.
    """

    missing: list[str]
    unexpected: list[str]
    peft_missing: list[str]
    warnings: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.missing and not self.unexpected


def _texts(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "is_gradient_checkpointing" not in str(w.message)]


@contextmanager
def _watch(model: PeftModel, seen: list[Any]) -> Iterator[None]:
    """Catch the raw result of load_state_dict before load_adapter filters its list in place."""
    original = model.load_state_dict

    def wrapped(state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(state_dict, *args, **kwargs)
        seen.append((list(result.missing_keys), list(result.unexpected_keys)))
        return result

    model.load_state_dict = wrapped  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.load_state_dict


def peft_load(
    base: str | os.PathLike[str] | torch.nn.Module,
    adapter_dir: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    autocast: bool = True,
    trainable: bool = False,
) -> tuple[PeftModel, LoadResult]:
    """Load an adapter as PeftModel.from_pretrained does, but keep the load result that it throws away.

    A live base model is adapted in place. Whatever PEFT raises comes through (KeyError for an absent
    modules_to_save tensor, RuntimeError for a shape).
    """
    model = load_base(base, dtype) if isinstance(base, (str, os.PathLike)) else base
    where = os.fspath(adapter_dir)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = PeftConfig.from_pretrained(where)
        config.inference_mode = not trainable
        cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        pm = cls(model, config, "default", autocast_adapter_dtype=autocast)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            would_save = set(get_peft_model_state_dict(pm, adapter_name="default"))
        raw: list[Any] = []
        with _watch(pm, raw):
            result = pm.load_adapter(
                where, "default", is_trainable=trainable, torch_device="cpu", autocast_adapter_dtype=autocast
            )
    (raw_missing, raw_unexpected) = raw[-1]
    assert raw_unexpected == list(result.unexpected_keys)
    strip = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]._remove_adapter_name_from_key
    missing = []
    for key in raw_missing:
        short = strip(key, "default")
        if short in would_save or f"{short}_topk_indices" in would_save:
            missing.append(short)
    return pm, LoadResult(
        sorted(missing),
        sorted(result.unexpected_keys),
        list(result.missing_keys),
        _texts(caught),
    )


class Merged(dict[str, torch.Tensor]):
    """The merged model's state dict (clones, tied names included), with what else a test asks for."""

    tie_word_embeddings: bool
    tied: bool  # do input and output embeddings still share storage in PEFT's merged model?
    config: Any
    load: LoadResult
    model: Any


def peft_merge(
    base: str | os.PathLike[str] | torch.nn.Module,
    adapter_dir: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    autocast: bool = True,
    safe_merge: bool = False,
) -> Merged:
    """PEFT's merge_and_unload of that adapter on that base, as a state dict of clones."""
    model, load = peft_load(base, adapter_dir, dtype, autocast)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = model.merge_and_unload(safe_merge=safe_merge)
    load.warnings.extend(_texts(caught))
    out = Merged({k: v.detach().clone() for k, v in merged.state_dict().items()})
    out.config = getattr(merged, "config", None)
    out.tie_word_embeddings = bool(getattr(out.config, "tie_word_embeddings", False))
    head = merged.get_output_embeddings() if hasattr(merged, "get_output_embeddings") else None
    out.tied = head is not None and head.weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()
    out.load, out.model = load, merged
    return out


# ---------------------------------------------------------------------------- files


def adapter_bytes(path: str | os.PathLike[str]) -> int:
    """Sum of the sizes of all files under a directory."""
    return sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file())


def tree_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 over the relative names and bytes of all files under a directory (or of one file)."""
    root = Path(path)
    h = hashlib.sha256()
    for p in [root] if root.is_file() else sorted(root.rglob("*")):
        if p.is_file():
            name = p.relative_to(root).as_posix().encode()
            data = p.read_bytes()
            h.update(len(name).to_bytes(8, "little") + name + len(data).to_bytes(8, "little") + data)
    return h.hexdigest()


VERSIONS = {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
