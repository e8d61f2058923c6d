"""Tiny models that are no transformers ones: any torch layers under any names, as PEFT's users have them.

A model is the list of its layers, [name, class, arguments of the class], so that JSON can hold it; dots in a name
make modules in modules. Their order decides which weights are drawn first. None has a config.json, a class that
transformers knows, or a `forward`: adapters are saved and merged, never run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Layers = list[list[Any]]
CLASSES: dict[str, type[nn.Module]] = {
    c.__name__: c
    for c in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.Embedding,
        nn.LayerNorm,
        nn.MultiheadAttention,
        Conv1D,
    )
}
"""What a layer may be: `Conv1D(nf, nx)` is GPT-2's, stored (in, out); the others are torch's."""


def _linear(into: int, out: int, **more: Any) -> list[Any]:
    return ["Linear", {"in_features": into, "out_features": out, **more}]


def _convolution(dim: int, into: int, out: int, kernel: int, **more: Any) -> list[Any]:
    return [f"Conv{dim}d", {"in_channels": into, "out_channels": out, "kernel_size": kernel, **more}]


KINDS: dict[str, Layers] = {
    # Wide, narrow, square; with and without a bias.
    "custom-mlp": [
        ["lin0", *_linear(10, 20)],
        ["lin1", *_linear(20, 20)],
        ["norm", "LayerNorm", {"normalized_shape": 20}],
        ["head", *_linear(20, 6, bias=False)],
    ],
    "custom-conv1d": [["conv0", *_convolution(1, 4, 8, 3)], ["conv1", *_convolution(1, 8, 6, 1)]],
    "custom-conv2d": [
        ["conv0", *_convolution(2, 4, 8, 3)],
        ["conv1", *_convolution(2, 8, 6, 1, bias=False)],
        ["grouped", *_convolution(2, 6, 12, 3, groups=3)],
        ["lin0", *_linear(12, 10)],
    ],
    "custom-conv3d": [["conv0", *_convolution(3, 3, 6, 2)], ["lin0", *_linear(6, 10)]],
    "custom-embedding": [
        ["emb", "Embedding", {"num_embeddings": 24, "embedding_dim": 6}],
        ["conv1d", "Conv1D", {"nf": 10, "nx": 6}],
        ["blocks.0.lin", *_linear(10, 8)],
    ],
}
"""Ready ones, of unequal shapes, so that a mistaken orientation cannot pass by accident."""


class CustomModel(nn.Module):
    """The layers of a list.

    Attributes:
        layers: The list.
    """

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        for name, kind, arguments in layers:
            if kind not in CLASSES:
                raise ValueError(f"layer {name} is {kind!r}, not one of {', '.join(CLASSES)}")
            *parents, last = name.split(".")
            place: nn.Module = self
            for part in parents:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place._modules[part]  # type: ignore[assignment]
            place.add_module(last, CLASSES[kind](**arguments))


def is_custom(kind: str) -> bool:
    """Is it "custom", whose layers the caller says, or one of `KINDS`?"""
    return kind == "custom" or kind in KINDS


def sizes(kind: str) -> dict[str, Any]:
    """Fields that make `tiny_model("custom", ...)` the model of that kind; none if the kind is not custom."""
    return {"layers": KINDS[kind]} if kind in KINDS else {}


def build(kind: str, layers: Layers | None = None) -> CustomModel:
    """A model with torch's own initial values.

    Args:
        layers: In place of the kind's own.
    """
    found = KINDS.get(kind) if layers is None else layers
    if not found:
        raise ValueError(f"{kind} says no layers of its own: give layers=[[name, class, arguments], ...]")
    with torch.random.fork_rng(devices=[]):
        return CustomModel(found)
