"""Tiny models of several parts, whose names on disk are not their modules'. Nothing here knows adapterpack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle  # sets offline mode before transformers comes
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = _SIZES | {"num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64}
_IMAGE = {"image_size": 16, "patch_size": 8}
_SIGLIP = {"model_type": "siglip_vision_model", **_SIZES, **_IMAGE}
_CLIP = {"model_type": "clip_vision_model", **_SIZES, **_IMAGE}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
_QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 8}


def _text(model_type: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TEXT, **more}


def _config(kind: str) -> Any:
    if kind == "llava":
        return tf.LlavaConfig(vision_config=_CLIP, text_config=_text("llama"), image_token_index=90)
    if kind == "llava-tied":
        return tf.LlavaConfig(
            vision_config=_CLIP, text_config=_text("llama"), image_token_index=90, tie_word_embeddings=True
        )
    if kind == "paligemma":
        text = _text("gemma", head_dim=8)
        return tf.PaliGemmaConfig(vision_config=_SIGLIP, text_config=text, image_token_index=90, projection_dim=32)
    if kind == "gemma3":
        text = _text("gemma3_text", head_dim=8)
        return tf.Gemma3Config(vision_config=_SIGLIP, text_config=text, image_token_index=90, mm_tokens_per_image=4)
    if kind == "mistral3":
        vision = {"model_type": "pixtral", **_SIZES, **_IMAGE, "head_dim": 8}
        return tf.Mistral3Config(vision_config=vision, text_config=_text("mistral"), image_token_index=90)
    if kind == "internvl":
        vision = {**_SIZES, "image_size": [16, 16], "patch_size": [8, 8]}
        return tf.InternVLConfig(vision_config=vision, text_config=_text("qwen2"), image_token_id=90)
    if kind == "aya":
        return tf.AyaVisionConfig(vision_config=_SIGLIP, text_config=_text("cohere2"), image_token_index=90)
    if kind == "qwen2-vl":
        vision = _QWEN | {"embed_dim": 32, "mlp_ratio": 2}
        return tf.Qwen2VLConfig(text_config=TEXT | {"rope_scaling": _ROPE}, vision_config=vision)
    if kind == "qwen2.5-vl":
        vision = _QWEN | {"out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]}
        return tf.Qwen2_5_VLConfig(text_config=TEXT | {"rope_scaling": _ROPE}, vision_config=vision)
    if kind == "qwen2-audio":
        audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
        audio |= {"model_type": "qwen2_audio_encoder", "num_mel_bins": 8, "max_source_positions": 16}
        return tf.Qwen2AudioConfig(audio_config=audio, text_config=_text("qwen2"), audio_token_index=90)
    if kind == "clip-vision":
        return tf.CLIPVisionConfig(**_SIZES, **_IMAGE)
    if kind == "vit":
        return tf.ViTConfig(**_SIZES, **_IMAGE)
    if kind == "dinov2":
        return tf.Dinov2Config(**_SIZES, **_IMAGE, mlp_ratio=2)
    if kind == "swin":
        return tf.SwinConfig(
            image_size=16, patch_size=4, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=2
        )
    raise ValueError(kind)


_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava-tied": "LlavaForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "aya": "AyaVisionForConditionalGeneration",
    "qwen2-vl": "Qwen2VLForConditionalGeneration",
    "qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2-audio": "Qwen2AudioForConditionalGeneration",
    "clip-vision": "CLIPVisionModel",
    "vit": "ViTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "swin": "SwinForImageClassification",
}
VISION = ("clip-vision", "vit", "dinov2", "swin")
KINDS = tuple(k for k in _CLASSES if k not in VISION)


def model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of random values, no two tensors alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = getattr(tf, _CLASSES[kind])(_config(kind))
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, p in made.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.05)
    return made.to(dtype).eval()


def disk_names(made: Any, directory: Path) -> dict[str, str]:
    """Module names of a model, as its state dict has them, to the names under which it was saved. By values."""
    saved = {_key(t): name for name, t in load_file(directory / "model.safetensors").items()}
    assert len(saved) == len(load_file(directory / "model.safetensors")), "two tensors are alike"
    return {name: saved[_key(t)] for name, t in made.state_dict().items() if _key(t) in saved}


def _key(t: torch.Tensor) -> tuple[Any, ...]:
    return (tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())


def renamed(source: Path, destination: Path, names: dict[str, str]) -> Path:
    """A copy of a model directory with other names in its file."""
    destination.mkdir()
    tensors = load_file(source / "model.safetensors")
    save_file({names.get(n, n): t for n, t in tensors.items()}, destination / "model.safetensors", {"format": "pt"})
    (destination / "config.json").write_bytes((source / "config.json").read_bytes())
    return destination


def loads_whole(directory: Path) -> Any:
    """The model, if transformers finds every weight in it and nothing else."""
    config = tf.AutoConfig.from_pretrained(directory)
    cls = getattr(tf, config.architectures[0])
    made, info = cls.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return made


__all__ = ["KINDS", "TEXT", "VISION", "disk_names", "loads_whole", "model", "oracle", "renamed"]
