"""formats/trainable_tokens: rows of embeddings."""

from __future__ import annotations

from typing import Any

from peft import TrainableTokensConfig

from vectors.common import PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, directory, ramp

FORMAT = "trainable_tokens"
PEFT_TYPES = ("TRAINABLE_TOKENS",)
KEY = f"{PFX}model.embed_tokens.trainable_tokens_delta"


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "trainable_tokens"
    tail = ".trainable_tokens_delta"
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        ctx.rows(f"{module}.weight", f64(tensors.pop(key)), config["token_indices"])


def tokens(*indices: int, target: list[str] | None = None) -> Any:
    return lambda: TrainableTokensConfig(token_indices=list(indices), target_modules=target)


CASES = [
    Case("llama", tokens(7, 1, 30), "rows out of order", scale=0.3),
    Case("both", tokens(0, 31, target=["embed_tokens", "lm_head"]), "input and output embeddings", scale=0.3),
    Case("f16-base", tokens(3, target=["wte"]), "a float16 base", kind="gpt2", dtype="float16", scale=0.3),
]


def invalid(cases: Cases) -> None:
    def with_indices(indices: Any) -> dict[str, bytes]:
        return directory({"peft_type": "TRAINABLE_TOKENS", "token_indices": indices}, {KEY: ramp(2, 8)})

    says = "token_indices"
    cases.both("no-indices", with_indices(None), "token-rows", says, dtype="bf16")
    cases.both("three-indices", with_indices([1, 2, 3]), "token-rows", "3 token indices", dtype="bf16")
    cases.both("negative", with_indices([1, -2]), "token-rows", says, dtype="bf16")
    cases.both("twice", with_indices([1, 1]), "token-rows", says, dtype="bf16")
    cases.both("fraction", with_indices([1, 2.0]), "token-rows", says, dtype="bf16")
