"""formats/vblora: VB-LoRA, full logits and top-k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import PeftModel, VBLoRAConfig

from vectors.common import GPT2_TM, PFX, Case, Context, Tensors, f64
from vectors.hostile import Cases, Files, Q, V, directory, ramp

FORMAT = "vblora"
PEFT_TYPES = ("VBLORA",)


def vb(**kw: Any) -> Callable[[], Any]:
    return lambda: VBLoRAConfig(
        **{
            "r": 2,
            "num_vectors": 24,
            "vector_length": 4,
            "topk": 2,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            **kw,
        }
    )


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    topk = config["save_only_topk_weights"]
    ctx.facts["encoding"] = "topk" if topk else "full-logits"
    bank = tensors.pop("base_model.vblora_vector_bank")
    bank64 = f64(bank)
    ctx.facts["num_vectors"], ctx.facts["vector_length"], ctx.facts["topk"] = (*bank.shape, config["topk"])

    def rows(key: str) -> np.ndarray:
        if topk:
            index = tensors.pop(key + "_topk_indices")
            ctx.facts["index_dtype"] = str(index.dtype).removeprefix("torch.")
            i, w = index.numpy().astype(np.int64), f64(tensors.pop(key + "_topk_weights"))
            w = np.concatenate([w, np.maximum(1.0 - w.sum(-1, keepdims=True), 0.0)], -1)
        else:
            x = f64(tensors.pop(key))
            i = np.argsort(-x, axis=-1, kind="stable")[..., : config["topk"]]
            v = np.take_along_axis(x, i, -1)
            w = np.exp(v - v[..., :1])
            w /= w.sum(-1, keepdims=True)
        return (w[..., None] * bank64[i]).sum(-2)

    tail = ".vblora_logits_A" + ("_topk_indices" if topk else "")
    for p in sorted(k.removesuffix(tail) for k in tensors if k.endswith(tail)):
        module = p.removeprefix(PFX)
        a, b = rows(p + ".vblora_logits_A"), rows(p + ".vblora_logits_B")
        delta = b.transpose(0, 2, 1).reshape(-1, b.shape[1]) @ a.reshape(a.shape[0], -1)
        ctx.add(module + ".weight", ctx.stored(module, delta))


def sharpen(model: PeftModel) -> None:
    """Logits so peaked that in some slices the first k-1 weights sum to more than 1 in float32.

    Each slice is scaled on its own, by the first factor that does it (else by 40: the last weight is then about 0).
    """
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "vblora_logits" in n:
                for x in p.reshape(-1, p.shape[-1]):
                    for factor in torch.arange(10, 40, 0.125):
                        w = torch.softmax((x * factor).topk(3).values, -1)[:-1]
                        if 1 - w.sum() < 0:
                            break
                    else:
                        factor = torch.tensor(40.0)
                    x.mul_(factor)


def untie(model: PeftModel) -> None:
    """Distinct logits, exact in bfloat16: which of several equal logits topk keeps is not defined."""
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "vblora_logits" in n:
                p.copy_(p.argsort(dim=-1, stable=True).argsort(dim=-1) * 0.125 - 1.5)


CASES = [
    *[
        Case(
            f"{'topk' if only else 'full'}-k{k}",
            vb(topk=k, save_only_topk_weights=only),
            f"topk {k}, {'top-k only' if only else 'full logits'}"
            + (": the weights' last dimension is 0" if only and k == 1 else ""),
            scale=0.5,
        )
        for k in (1, 2, 3, 4)
        for only in (False, True)
    ],
    Case(
        "full-peaked-k3",
        vb(topk=3),
        "peaked logits, topk 3: written as top-k the last weight may come out negative",
        scale=0.5,
        post=sharpen,
    ),
    *[
        Case(
            f"index-{n}",
            vb(
                num_vectors=n,
                vector_length=4 if n < 1000 else 2,
                target_modules=["v_proj"],
                save_only_topk_weights=True,
            ),
            f"{n} vectors: indices are {d}",
            scale=0.5,
        )
        for n, d in ((255, "uint8"), (256, "int16"), (300, "int16"), (32767, "int16"), (32768, "int32"))
    ],
    Case("full-256", vb(num_vectors=256, target_modules=["v_proj"]), "256 vectors, full logits", scale=0.5),
    Case("full-gpt2", vb(target_modules=GPT2_TM), "Conv1D, full logits", kind="gpt2", scale=0.5),
    Case(
        "topk-gpt2",
        vb(target_modules=GPT2_TM, save_only_topk_weights=True),
        "Conv1D, top-k",
        kind="gpt2",
        scale=0.5,
    ),
    Case(
        "full-bias-only",
        vb(target_modules=["q_proj", "fc1"], bias="vblora_only"),
        "biases of adapted layers",
        kind="opt",
        scale=0.5,
    ),
    Case(
        "topk-bias-all",
        vb(target_modules=["query"], bias="all", save_only_topk_weights=True),
        "all biases, top-k",
        kind="bert",
        scale=0.5,
    ),
    Case(
        "topk-modules-to-save",
        vb(modules_to_save=["lm_head"], save_only_topk_weights=True),
        "modules_to_save beside top-k",
        scale=0.5,
    ),
    Case(
        "full-bf16-base",
        vb(),
        "a bfloat16 base: the adapter's values are float32",
        dtype="bfloat16",
        scale=0.5,
    ),
    Case(
        "topk-bf16-base",
        vb(save_only_topk_weights=True),
        "a bfloat16 base, top-k",
        dtype="bfloat16",
        scale=0.5,
    ),
    Case(
        "full-bf16-file",
        vb(),
        "autocast_adapter_dtype=False: the file is bfloat16",
        dtype="bfloat16",
        autocast=False,
        scale=0.5,
        post=untie,
    ),
]


# ---------------------------------------------------------------- hostile adapters

VB = {
    "peft_type": "VBLORA",
    "r": 2,
    "num_vectors": 6,
    "vector_length": 4,
    "topk": 2,
    "save_only_topk_weights": False,
    "target_modules": ["q_proj"],
}
BANK = "base_model.vblora_vector_bank"


def vb_arrays() -> dict[str, np.ndarray]:
    """Full logits: A is (r, in / length, vectors), B (out / length, r, vectors)."""
    return {
        BANK: ramp(6, 4),
        f"{PFX}{Q}.vblora_logits_A": ramp(2, 2, 6),
        f"{PFX}{Q}.vblora_logits_B": ramp(2, 2, 6),
    }


def topk_arrays(k: int = 2) -> dict[str, np.ndarray]:
    indices = np.tile(np.arange(k, dtype=np.uint8), (2, 2, 1))
    weights = np.full((2, 2, k - 1), 0.75 / max(k - 1, 1), dtype=np.float32)
    arrays = {BANK: ramp(6, 4)}
    for side in "AB":
        arrays[f"{PFX}{Q}.vblora_logits_{side}_topk_indices"] = indices.copy()
        arrays[f"{PFX}{Q}.vblora_logits_{side}_topk_weights"] = weights.copy()
    return arrays


def invalid(cases: Cases) -> None:
    to_lora = {"to": "lora"}
    only_topk = {**VB, "save_only_topk_weights": True}
    logits_a, logits_b = (f"{PFX}{Q}.vblora_logits_{side}" for side in "AB")

    def full(more: dict[str, Any] | None = None, **arrays: Any) -> Files:
        return directory({**VB, **(more or {})}, vb_arrays() | arrays)

    def topk(more: dict[str, Any] | None = None, arrays: dict[str, np.ndarray] | None = None, k: int = 2) -> Files:
        return directory({**only_topk, "topk": k, **(more or {})}, topk_arrays(k) | (arrays or {}))

    # The bank.
    for case, arrays, config in (("full", vb_arrays(), VB), ("topk", topk_arrays(), only_topk)):
        files = directory(config, {key: array for key, array in arrays.items() if key != BANK})
        cases.both(f"no-bank-{case}", files, "missing-bank", "has no vblora_vector_bank", **to_lora)
    cases.both("bank-flat", full(**{BANK: ramp(24)}), "malformed", "is no vector bank", **to_lora)
    cases.both("bank-integers", full(**{BANK: np.ones((6, 4), "int64")}), "malformed", "is no vector bank", **to_lora)
    cases.add("bank-not-as-config", full({"num_vectors": 256}), "check", finding="bank-mismatch")
    cases.add("vectors-not-as-config", full({"vector_length": 8}), "check", finding="bank-mismatch")

    # k and the flag.
    cases.both("k-over-vectors", full({"topk": 7}), "malformed", "the bank has 6 vectors", **to_lora)
    cases.both("k-zero", full({"topk": 0}), "malformed", "topk in adapter_config.json is 0", **to_lora)
    cases.both("k-not-as-tensors", topk({"topk": 3}), "half-pair", "not (.., .., 3)", **to_lora)
    cases.add("flag-says-topk", full({"save_only_topk_weights": True}), "check", finding="wrong-topk-flag")
    cases.add("flag-says-full", topk({"save_only_topk_weights": False}), "check", finding="wrong-topk-flag")

    # Logits.
    cases.both("logits-too-wide", full(**{logits_a: ramp(2, 2, 7)}), "half-pair", "not (.., .., 6)", **to_lora)
    cases.both("logits-flat", full(**{logits_a: ramp(2, 12)}), "half-pair", "has shape (2, 12)", **to_lora)
    cases.both("ranks-differ", full(**{logits_a: ramp(3, 2, 6)}), "half-pair", "rank 3 in A, 2 in B", **to_lora)
    cases.add("rank-not-as-config", full({"r": 4}), "check", finding="rank-mismatch")
    lacking = directory(VB, {key: array for key, array in vb_arrays().items() if key != logits_b})
    cases.both("no-logits-b", lacking, "half-pair", "lacks logits_B", **to_lora)
    nan = vb_arrays()[logits_a].copy()
    nan[0, 0, 0] = np.nan
    cases.both("logit-nan", full(**{logits_a: nan}), "nan", "a logit is NaN or infinite", to="topk")

    # Top-k tensors.
    indices, weights = f"{logits_a}_topk_indices", f"{logits_a}_topk_weights"
    outside = topk_arrays()[indices].copy()
    outside[1, 1, 1] = 6
    cases.both(
        "index-outside-bank", topk(arrays={indices: outside}), "index-outside-bank", "outside the bank", **to_lora
    )
    negative = outside.astype(np.int16)
    negative[1, 1, 1] = -1
    cases.both(
        "index-negative", topk(arrays={indices: negative}), "index-outside-bank", "outside the bank", **to_lora
    )
    double = np.zeros((2, 2, 2), np.uint8)
    cases.both(
        "index-twice", topk(arrays={indices: double}), "duplicate-index", "one vector of the bank twice", **to_lora
    )
    floats = topk_arrays()[indices].astype(np.float32)
    cases.both("index-float", topk(arrays={indices: floats}), "half-pair", "indices F32", **to_lora)
    short = topk_arrays()[weights][:1]
    cases.both("weights-too-few", topk(arrays={weights: short}), "half-pair", "weights (1, 2, 1)", **to_lora)
    narrow = topk_arrays()[weights].astype(np.float16)
    cases.add("weights-16-bit", topk(arrays={weights: narrow}), "check", finding="narrow-topk-weights")
    over = np.full((2, 2, 2), 0.5, np.float32)
    over[0, 0] = np.nextafter(np.float32(0.5), np.float32(1))
    cases.add("last-weight-negative", topk(arrays={weights: over}, k=3), "check", finding="negative-topk-weight")
    lacking = directory(only_topk, {key: array for key, array in topk_arrays().items() if key != weights})
    cases.both("no-weights-a", lacking, "half-pair", "lacks weights_A", **to_lora)
    mixed = directory(VB, vb_arrays() | {key.replace(Q, V): array for key, array in topk_arrays().items()})
    cases.add("mixed", mixed, "convert", error="unsupported", message="side by side", **to_lora)
    cases.add(
        "topk-to-full", topk(), "convert", error="loss-refused", message="the others are gone", to="full-logits"
    )
