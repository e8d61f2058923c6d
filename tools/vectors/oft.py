"""formats/oft: OFT."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from peft import OFTConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Q, directory, ramp
from vectors.orthogonal import cayley, diagonal, series, skew

FORMAT = "oft"
PEFT_TYPES = ("OFT",)


def rotation(packed: np.ndarray, config: dict[str, Any], inputs: int) -> np.ndarray:
    """R, (in, in), from the triangles (blocks, b (b - 1) / 2)."""
    blocks = [skew(row) for row in packed]
    if config["coft"]:
        most = config["eps"] / math.sqrt(len(blocks))
        blocks = [q * min(1.0, most / max(np.linalg.norm(q), 1e-300)) for q in blocks]
    if config["use_cayley_neumann"]:
        turned = [series(q, config["num_cayley_neumann_terms"]) for q in blocks]
    else:
        turned = [cayley(q) for q in blocks]
    if config["block_share"]:
        turned = turned * (inputs // len(turned[0]))
    return diagonal(turned)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "oft"
    for tail in (".oft_R.weight", ".oft_embedding_R.weight"):
        for key in sorted(k for k in tensors if k.endswith(tail)):
            module = key.removesuffix(tail).removeprefix(PFX)
            w = f64(base[f"{module}.weight"])
            flat = w.reshape(len(w), -1)
            r = rotation(f64(tensors.pop(key)), config, flat.shape[1])
            if "embedding" in tail:
                for name in ("base_layer.weight",):
                    saved = tensors.pop(f"{PFX}{module}.{name}", None)
                    assert saved is None or np.array_equal(f64(saved), w)
            new = flat @ (r if "embedding" in tail else r.T)
            ctx.base_dependent(f"{module}.weight", (new - flat).reshape(w.shape))


def oft(**kw: Any) -> Any:
    return lambda: OFTConfig(**{"oft_block_size": 4, "target_modules": ["q_proj", "down_proj"], **kw})


_BOUND = 5e-6
CASES = [
    Case("series", oft(), "the default: five terms of the series", scale=0.2, bound=_BOUND),
    Case("cayley", oft(use_cayley_neumann=False), "the exact transform", scale=0.3, bound=_BOUND),
    Case(
        "share-coft",
        oft(block_share=True, coft=True, eps=0.4, num_cayley_neumann_terms=3),
        "one rotation for all blocks, its norm bounded; three terms",
        scale=0.3,
        bound=_BOUND,
    ),
    Case(
        "embedding",
        oft(target_modules=["model.embed_tokens"], oft_block_size=0, r=2),
        "rows of an embedding; a number of blocks",
        scale=0.2,
        bound=_BOUND,
    ),
    Case(
        "conv2d",
        oft(target_modules=["conv"], oft_block_size=6),
        "inputs of a convolution with their kernel",
        kind="custom",
        over={"layers": [["conv", "Conv2d", {"in_channels": 3, "out_channels": 5, "kernel_size": 2}]]},
        scale=0.2,
        bound=_BOUND,
    ),
]


def invalid(cases: Cases) -> None:
    config = {
        "peft_type": "OFT",
        "target_modules": ["q_proj"],
        "oft_block_size": 4,
        "r": 0,
        "use_cayley_neumann": True,
        "peft_version": "0.21.2",
    }
    key = f"{PFX}{Q}.oft_R.weight"

    def with_triangles(shape: tuple[int, ...], **fields: Any) -> dict[str, bytes]:
        return directory({**config, **fields}, {key: ramp(*shape)})

    cases.add("no-triangle", with_triangles((2, 7)), "check", finding="other-shape")
    cases.add("other-size", with_triangles((4, 1)), "check", finding="block-size")
    shared = with_triangles((2, 6), block_share=True)
    cases.add("share-of-two", shared, "convert", error="invalid", message="block_share", dtype="bf16")
    endless = with_triangles((2, 6), num_cayley_neumann_terms=10**12)
    cases.add("endless-series", endless, "convert", error="invalid", message="num_cayley_neumann", dtype="bf16")
    old = with_triangles((2, 6), peft_version="0.17.1")
    cases.add("older-series", old, "convert", error="unsupported", message="counts its last term twice", dtype="bf16")
    fields = {k: v for k, v in config.items() if k != "oft_block_size"}
    whole = directory({**fields, "r": 2}, {f"{PFX}{Q}.oft_r": ramp(2, 4, 4)})
    cases.add("older-parameters", whole, "convert", error="unsupported", message="before 0.16", dtype="bf16")
