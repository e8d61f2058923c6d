"""formats/peft: the directory, whatever method it holds."""

from __future__ import annotations

import io
import re
import zipfile

import numpy as np
import torch

from vectors.common import PFX, Case, Tensors
from vectors.hostile import CONFIG, PICKLE, WEIGHTS, Cases, Q, V, directory, ramp, tensors, text
from vectors.lora import LORA, lora, lora_adapter, lora_arrays
from vectors.vblora import VB, vb, vb_arrays
from vectors.vera import vera

FORMAT = "peft"


def dotted(t: Tensors) -> Tensors:
    """The adapter's name left in the keys: `.default.` before the last segment, or at the end."""
    out = {}
    for k, v in t.items():
        k = k.removesuffix(".weight") + ".default.weight" if re.search(r"\.lora_[AB]\.weight$", k) else k + ".default"
        out[k] = v
    return out


def respell(t: Tensors) -> Tensors:
    """Shared tensors under their other spelling."""
    shared = ("base_model.vera_A", "base_model.vera_B", "base_model.vblora_vector_bank")
    return {(PFX + k if k in shared else k): v for k, v in t.items()}


def strangers(t: Tensors) -> Tensors:
    more = {
        PFX + "model.layers.0.self_attn.q_proj.lora_C.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "optimizer.step": torch.tensor(7, dtype=torch.int64),
    }
    return {**t, **more}


CASES = [
    Case("plain", lora(target_modules=["q_proj"]), "a LoRA directory as save_pretrained writes it"),
    Case(
        "subfolder",
        lora(target_modules=["q_proj"]),
        "an adapter that is not called default lies in a subfolder",
        adapter_name="user-7",
    ),
    Case(
        "default-in-keys",
        lora(target_modules=["q_proj"]),
        "keys that still hold .default. load too",
        edit=dotted,
    ),
    Case(
        "default-in-keys-vblora",
        vb(target_modules=["q_proj"]),
        "keys that still end in .default, also the shared one, load too",
        scale=0.5,
        edit=dotted,
    ),
    Case(
        "shared-spelling-vera",
        vera(target_modules=["q_proj"]),
        "base_model.model.base_model.vera_A is the other spelling of base_model.vera_A",
        edit=respell,
    ),
    Case(
        "shared-spelling-vblora",
        vb(target_modules=["q_proj"]),
        "base_model.model.base_model.vblora_vector_bank is the other spelling of the bank",
        scale=0.5,
        edit=respell,
    ),
    Case(
        "unknown-keys",
        lora(target_modules=["q_proj"]),
        "keys that PEFT does not know: it drops them silently",
        edit=strangers,
        unexpected=sorted(set(strangers({}))),
    ),
    Case(
        "target-regex",
        lora(target_modules=r".*layers\.1\..*(q|k)_proj"),
        "target_modules as a regular expression",
        over={"num_hidden_layers": 2},
    ),
    Case(
        "all-linear",
        lora(target_modules="all-linear", exclude_modules=["down_proj"]),
        "all-linear is saved as a list of full paths",
    ),
    Case("task-type", lora(target_modules=["q_proj"], task_type="CAUSAL_LM"), "a task type changes no key"),
]


# ---------------------------------------------------------------- hostile directories


def invalid(cases: Cases) -> None:
    weights = tensors(lora_arrays())

    def config(case: str, raw: bytes, message: str) -> None:
        cases.add(case, {CONFIG: raw, WEIGHTS: weights}, "inspect", error="invalid", message=message)

    config("config-duplicate-key", b'{"peft_type": "LORA", "r": 2, "r": 4}', "'r' stands twice")
    config("config-nan", b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is not JSON")
    config("config-infinity", b'{"peft_type": "LORA", "lora_alpha": Infinity}', "Infinity is not JSON")
    config("config-1e999", b'{"peft_type": "LORA", "lora_alpha": 1e999}', "too large a number")
    config("config-nested-33", b'{"peft_type":"LORA","x":' + b"[" * 32 + b"]" * 32 + b"}", "nested deeper")
    config("config-nested-10000", b'{"x":' + b"[" * 10_000 + b"]" * 10_000 + b"}", CONFIG)
    config("config-lone-surrogate", rb'{"peft_type": "LORA", "x": "\udc00"}', "surrogates")
    config("config-not-utf8", b'{"peft_type": "LORA", "x": "\xe9"}', "utf-8")
    config("config-utf16", '{"peft_type": "LORA"}'.encode("utf-16"), "utf-8")
    config("config-array", b"[]", "object is wanted")
    config("config-null", b"null", "object is wanted")
    config("config-empty", b"", CONFIG)
    config("config-truncated", text(LORA)[:-5], CONFIG)
    config("peft-type-missing", b'{"r": 2}', "does not say its peft_type")
    config("peft-type-number", b'{"peft_type": 1}', "does not say its peft_type")

    cases.add("no-config", {WEIGHTS: weights}, "inspect", error="invalid", message=f"has no {CONFIG}")
    cases.add("no-weights", {CONFIG: text(LORA)}, "inspect", error="invalid", message=f"has no {WEIGHTS}")
    cases.add("no-tensors", directory(LORA, {}), "check", finding="empty")
    cases.add("weights-cut", {CONFIG: text(LORA), WEIGHTS: weights[:-1]}, "inspect", error="invalid", message="bytes")

    # Pickles. The payload touches a file in the working directory: it must never appear.
    legacy = b"cos\nsystem\n(S'touch adapterpack-was-here'\ntR."
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        for name, data in (
            ("archive/data.pkl", legacy),
            ("archive/version", b"3\n"),
            ("archive/byteorder", b"little"),
        ):
            z.writestr(zipfile.ZipInfo(name), data)
    for case, pickle in (("pickle", legacy), ("pickle-zip", archive.getvalue())):
        files = {CONFIG: text(LORA), PICKLE: pickle}
        cases.add(f"{case}-only", files, "inspect", error="pickle-refused", message="can run code")
        cases.add(f"{case}-convert", files, "convert", error="pickle-refused", message="can run code", dtype="bf16")
        cases.add(f"{case}-allowed", files, "inspect", error="invalid", message="not a state dict", allow_pickle=True)
        disguised = {CONFIG: text(LORA), WEIGHTS: pickle}
        cases.add(f"{case}-disguised", disguised, "inspect", error="invalid", message="not a valid safetensors")

    # Keys.
    a_key, b_key = lora_arrays()
    twice = {**lora_arrays(), a_key.replace("lora_A", "lora_A.default"): ramp(2, 8)}
    one_parameter = "one and the same parameter"
    cases.add("parameter-twice", lora_adapter(arrays=twice), "inspect", error="invalid", message=one_parameter)
    bank = {**vb_arrays(), f"{PFX}base_model.vblora_vector_bank": ramp(6, 4)}
    cases.add("shared-twice", directory(VB, bank), "inspect", error="invalid", message=one_parameter)
    bank = {**vb_arrays(), "base_model.vblora_vector_bank.default": ramp(6, 4)}
    cases.add("shared-twice-default", directory(VB, bank), "inspect", error="invalid", message=one_parameter)
    bare = {key.removeprefix(PFX): array for key, array in lora_arrays().items()}
    cases.add(
        "no-prefix",
        lora_adapter(arrays=bare),
        "convert",
        error="unsupported",
        message="no lora parameters",
        dtype="bf16",
    )
    stranger = {**lora_arrays(), "optimizer.step": ramp(1)}
    cases.add("unknown-key", lora_adapter(arrays=stranger), "check", finding="unknown-key")
    broken = {a_key: ramp(2, 8) * np.float32("nan"), b_key: ramp(8, 2)}
    cases.add("nan", lora_adapter(arrays=broken), "check", finding="nan")
    broken = {a_key: ramp(2, 8), b_key: ramp(8, 2) * np.float32("inf")}
    cases.add("infinite", lora_adapter(arrays=broken), "check", finding="infinite")
    cases.add(
        "unknown-method",
        directory({"peft_type": "NO_SUCH_METHOD"}, lora_arrays()),
        "convert",
        error="unsupported",
        message="is NO_SUCH_METHOD",
        dtype="bf16",
    )
    cases.add(
        "flag-string",
        lora_adapter({"fan_in_fan_out": "false"}),
        "convert",
        error="invalid",
        message="fan_in_fan_out in adapter_config.json is 'false'",
        dtype="bf16",
    )

    # Token rows.
    key = f"{PFX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = {**lora_arrays(), key: ramp(2, 8)}
    for case, indices, message in (
        ("tokens-missing", None, "does not say which rows"),
        ("tokens-too-many", [1, 2, 3], "for 3 token indices"),
        ("tokens-twice", [4, 4], "names a row twice"),
        ("tokens-negative", [-1, 2], "does not say which rows"),
        ("tokens-boolean", [True, False], "does not say which rows"),
        ("tokens-elsewhere", {"lm_head": [1, 2]}, "does not say which rows"),
    ):
        files = lora_adapter({"trainable_token_indices": indices}, rows)
        cases.add(case, files, "inspect", error="invalid", message=message)

    # Folders.
    two = {f"{name}/{file}": data for name in ("one", "two") for file, data in lora_adapter().items()}
    cases.add("two-adapters", two, "inspect", error="usage", message="holds 2 adapters")
    cases.add("subfolder-missing", two, "inspect", error="usage", message="no subfolder three", subfolder="three")
    cases.add("subfolder-outside", two, "inspect", error="usage", message="leads out of", subfolder="../../invalid")

    # Bases.
    base = {
        "base/config.json": text({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
        "base/model.safetensors": tensors({f"{Q}.weight": ramp(8, 8)}),
    }
    elsewhere = lora_adapter(arrays=lora_arrays(V)) | base
    cases.add("not-in-base", elsewhere, "check", finding="not-in-base", base="base")
    lacks = {"error": "wrong-base", "message": f"lacks 1 tensors that the adapter changes: {V}.weight"}
    cases.add("not-in-base-merge", elsewhere, "merge", **lacks, base="base")
    other = lora_adapter() | base | {"base/model.safetensors": tensors({f"{Q}.weight": ramp(8, 12)})}
    cases.add("shape-not-in-base", other, "check", finding="shape-not-in-base", base="base")
    cases.add("shape-not-in-base-merge", other, "merge", error="wrong-base", message="has shape (8, 12)", base="base")
    unused = lora_adapter(arrays=stranger) | base
    cases.add(
        "unused-merge", unused, "merge", error="loss-refused", message="would go unused: optimizer.step", base="base"
    )
    zero = lora_adapter(arrays={a_key: ramp(2, 8), b_key: np.zeros((8, 2), np.float32)}) | base
    cases.add("zero-merge", zero, "merge", error="nothing-changed", message="would change nothing", base="base")
