"""Tiny models, one for each kind of layer that PEFT's own tests adapt; module names and shapes are theirs.

No test here runs a model forward, so there is none: a model is its layers by name. Every value is drawn anew from a
seeded generator, biases and norms too, so that a forgotten one shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D


class Layers(nn.Module):
    """A model of a few named layers."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class BareLinear(nn.Module):
    """A linear layer that is no nn.Linear: parameters only, the weight as (in, out)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))


_LAYERS: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "MLP": lambda: {"lin0": nn.Linear(10, 20), "lin1": nn.Linear(20, 2)},
    "MLP2": lambda: {"lin0": nn.Linear(10, 32), "lin1": nn.Linear(32, 2)},
    "MLP_LayerNorm": lambda: {
        "layernorm0": nn.LayerNorm(10),
        "lin0": nn.Linear(10, 20),
        "layernorm1": nn.LayerNorm(20),
        "lin1": nn.Linear(20, 2),
    },
    # transformers' Conv1D, a linear layer that is stored as (in, out): here (5, 1).
    "EmbConv1D": lambda: {"emb": nn.Embedding(100, 5), "conv1d": Conv1D(1, 5), "lin0": nn.Linear(10, 2)},
    "Conv1d": lambda: {"conv1d": nn.Conv1d(1, 1, 2), "lin0": nn.Linear(9, 2)},
    "Conv1dBigger": lambda: {"conv1d": nn.Conv1d(64, 16, 2), "lin0": nn.Linear(144, 2)},
    "Conv1dGroups": lambda: {"conv1d": nn.Conv1d(8, 8, 3, groups=2), "lin0": nn.Linear(64, 2)},
    "Conv2d": lambda: {"conv2d": nn.Conv2d(5, 10, 3), "lin0": nn.Linear(10, 2)},
    "Conv2d1x1": lambda: {"conv2d": nn.Conv2d(1, 10, 1), "lin0": nn.Linear(90, 2)},
    "Conv2d2": lambda: {"lin0": nn.Linear(10, 40), "conv2d": nn.Conv2d(8, 32, 3), "lin1": nn.Linear(32, 2)},
    "Conv2dGroups": lambda: {
        "lin0": nn.Linear(90, 288),
        "conv2d": nn.Conv2d(16, 16, 3, groups=8),
        "lin1": nn.Linear(16, 2),
    },
    "Conv2dGroups2": lambda: {"conv2d": nn.Conv2d(16, 32, 3, padding=1, groups=2), "lin0": nn.Linear(12800, 2)},
    "Conv3d": lambda: {"conv3d": nn.Conv3d(5, 10, 3), "lin0": nn.Linear(10, 2)},
    "MHA": lambda: {"mha": nn.MultiheadAttention(10, 2), "lin0": nn.Linear(10, 2)},
    "MlpUsingParameters": lambda: {"lin0": BareLinear(10, 20), "lin1": BareLinear(20, 2)},
}
KINDS = tuple(_LAYERS)


def tiny(kind: str, seed: int = 1234) -> Layers:
    """A tiny model in eval mode, f32, the same values for the same seed: N(0, 0.2), around 1 for weights of norms."""
    with torch.random.fork_rng(devices=[]):
        model = Layers(**_LAYERS[kind]())
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(torch.randn(p.shape, generator=g) * 0.2 + around)
    return model.eval()


def save_base(model: nn.Module, directory: Path) -> Path:
    """Write a model directory: the weights, and a config.json that names a class nobody else knows."""
    directory.mkdir(parents=True)
    save_file(dict(model.state_dict()), directory / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": [type(model).__name__], "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
