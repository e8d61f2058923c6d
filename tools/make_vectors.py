"""Write the test vectors under formats/{peft,lora,vblora,vera}/vectors/.

usage: python tools/make_vectors.py        rewrites every case (each case directory is removed first)
       python tools/make_vectors.py NAME   only the cases whose "format/case" contains NAME

Each case is a small adapter written by PEFT's own `save_pretrained` (only its README.md is removed), with
  expect.json         producer, method, encoding, base, number of tensors, and one entry in `changes` per base tensor
                      that the adapter changes
  expect.safetensors  what each change must come to, in float64

How the numbers are made: by the formulas of formats/<method>/SPEC.md in float64 numpy, from the stored values alone,
in code that shares nothing with PEFT or adapterpack. Before a case is written to its place, the same adapter is
loaded by PEFT from disk, merged by `merge_and_unload`, and every tensor of the merged model is compared: the changed
ones with base + change, all others bit for bit with the base.

`kind` of a change, and what expect.safetensors holds under the base tensor's name:
  add             dW in the stored orientation, before any rounding to the base's dtype
  value           the whole new value
  rows            the new rows, in the order of `indices`
  base-dependent  W' - W; W itself is there too, as "base:<name>" in its stored dtype

`bound` is the largest admissible relative Frobenius error against that tensor for float32 arithmetic. dW is in
float64 and not a digest, because float32 matrix products differ in their last bits between CPU classes.

The run is deterministic (fixed seeds; PYTHONHASHSEED=0, since PEFT saves `target_modules` as an unordered set).
The drawn values depend on torch's normal generator, whose last bits differ between CPU classes: rewriting on another
machine may change bytes, not meaning.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and os.environ.get("PYTHONHASHSEED") != "0":
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import oracle  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, PeftModel, VBLoRAConfig, VeraConfig  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)
PFX = "base_model.model."
SEED = 1234
BOUND = 2e-6

MINI: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,
    },
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16},
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "max_position_embeddings": 16,
        "word_embed_proj_dim": 8,
    },
    "resnet": {"embedding_size": 4, "hidden_sizes": [12], "depths": [1]},
    "whisper": {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 32, "num_mel_bins": 6},
    "gpt_oss": {
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "num_local_experts": 3,
        "layer_types": ["full_attention"],
    },
    "llama4": {
        "hidden_size": 16,
        "intermediate_size": 12,
        "intermediate_size_mlp": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "num_local_experts": 3,
        "layer_types": ["full_attention"],
    },
    "bert": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "max_position_embeddings": 16,
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Case:
    format: str
    name: str
    config: Callable[[], Any]
    says: str
    kind: str = "llama"
    dtype: str = "float32"
    bias: bool = False
    autocast: bool = True
    scale: float = 0.05
    over: dict[str, Any] = field(default_factory=dict)
    post: Callable[[PeftModel], None] | None = None
    edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None  # derived cases: keys renamed
    unexpected: list[str] = field(default_factory=list)
    adapter_name: str = "default"

    @property
    def where(self) -> Path:
        return ROOT / "formats" / self.format / "vectors" / self.name


# ---------------------------------------------------------------- the formulas, in float64


def f64(t: torch.Tensor) -> np.ndarray:
    return t.double().numpy()


def first_match(patterns: dict[str, Any], module: str, default: Any) -> Any:
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def vera_projection(key: int, r: int, max_in: int, max_out: int, fused: bool) -> tuple[np.ndarray, np.ndarray]:
    bits = np.random.RandomState(key & 0xFFFFFFFF)._bit_generator

    def draw(shape: tuple[int, int]) -> np.ndarray:
        b = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        lo, hi = np.float32(-b), np.float32(b)
        span = np.float32(hi - lo)
        u = (bits.random_raw(shape[0] * shape[1]) & np.uint64(0xFFFFFF)).astype(np.float64) * 2.0**-24
        y = (u * np.float64(span) + np.float64(lo)).astype(np.float32) if fused else u.astype(np.float32) * span + lo
        return y.reshape(shape)

    a = draw((r, max_in))
    return a, draw((max_out, r))


def sha256(t: torch.Tensor) -> str:
    return hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def expected(
    t: dict[str, torch.Tensor],
    c: dict[str, Any],
    base: dict[str, torch.Tensor],
    conv1d: set[str],
    crossed: set[str],
    case: Case,
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray], dict[str, Any]]:
    """(changes by base tensor, arrays by name, facts for expect.json) of one adapter: tensors `t`, config `c`."""
    changes: dict[str, dict[str, Any]] = {}
    arrays: dict[str, np.ndarray] = {}
    facts: dict[str, Any] = {}
    t = dict(t)

    def put(name: str, kind: str, array: np.ndarray, **more: Any) -> None:
        assert name in base and name not in changes, name
        changes[name] = {"name": name, "kind": kind, "shape": list(base[name].shape), "bound": BOUND, **more}
        arrays[name] = np.ascontiguousarray(array)

    def stored(module: str, delta: np.ndarray) -> np.ndarray:
        return delta.T if module in conv1d else delta

    def replace(key: str, value: torch.Tensor) -> None:
        name = key.removeprefix(PFX).replace(".base_layer.", ".")
        put(name, "value", f64(value))

    method = c["peft_type"]
    saved = {k: t.pop(k) for k in list(t) if k.endswith("base_layer.weight")}
    if method == "LORA":
        facts["encoding"] = "lora"
        for name, level in wrapped(base, c["target_parameters"] or []):
            a, b = f64(t.pop(f"{level}.lora_A.weight")), f64(t.pop(f"{level}.lora_B.weight"))
            experts = base[name].shape[0] if base[name].ndim == 3 else 1
            r = a.shape[0] // experts
            alpha = first_match(c["alpha_pattern"], name, c["lora_alpha"])
            s = alpha / math.sqrt(r) if c["use_rslora"] else alpha / r
            a, b = a.reshape(experts, r, -1), b.reshape(-1, r, experts)
            delta = np.stack([s * (b[:, :, e] @ a[e]) for e in range(experts)])
            delta = delta.transpose(0, 2, 1) if name in crossed and experts > 1 else delta
            put(name, "add", delta.reshape(base[name].shape))
        for key in sorted(k for k in t if k.endswith((".lora_A.weight", ".lora_embedding_A"))):
            embedding = key.endswith("lora_embedding_A")
            p = key.removesuffix(".lora_embedding_A" if embedding else ".lora_A.weight")
            module = p.removeprefix(PFX)
            a = f64(t.pop(key))
            b = f64(t.pop(f"{p}.lora_embedding_B" if embedding else f"{p}.lora_B.weight"))
            r = a.shape[0]
            alpha = first_match(c["alpha_pattern"], module, c["lora_alpha"])
            s = alpha / math.sqrt(r) if c["use_rslora"] else alpha / r
            name = module + ".weight"
            convolution = a.ndim > 2
            delta = stored(module, s * (b.reshape(len(b), r) @ a.reshape(r, -1)))
            if embedding:
                delta = delta.T
            delta = delta.reshape(base[name].shape)
            if f"{p}.lora_magnitude_vector" in t:
                m, w = f64(t.pop(f"{p}.lora_magnitude_vector")), f64(base[name])
                v = w + delta
                per_column = embedding or module in conv1d  # the output dimension is the last one as stored
                inputs = tuple(range(1, v.ndim)) if convolution else 0 if per_column else 1
                norm = np.sqrt((v * v).sum(axis=inputs, keepdims=True))
                scale = m.reshape(-1, *(1 for _ in v.shape[1:])) / norm if convolution else None
                if scale is None:
                    scale = m[None, :] / norm if per_column else m[:, None] / norm
                put(name, "base-dependent", scale * v - w)
                arrays["base:" + name] = base[name]
            elif f"{p}.base_layer.weight" in saved:
                put(name, "value", f64(saved.pop(f"{p}.base_layer.weight")) + delta, saved_base=True)
            else:
                put(name, "add", delta)
            if f"{p}.lora_B.bias" in t:
                put(module + ".bias", "add", s * f64(t.pop(f"{p}.lora_B.bias")))
    elif method == "VBLORA":
        topk = c["save_only_topk_weights"]
        facts["encoding"] = "topk" if topk else "full-logits"
        bank = t.pop("base_model.vblora_vector_bank")
        bank64 = f64(bank)
        facts["num_vectors"], facts["vector_length"], facts["topk"] = (*bank.shape, c["topk"])

        def rows(key: str) -> np.ndarray:
            if topk:
                index = t.pop(key + "_topk_indices")
                facts["index_dtype"] = str(index.dtype).removeprefix("torch.")
                i, w = index.numpy().astype(np.int64), f64(t.pop(key + "_topk_weights"))
                w = np.concatenate([w, np.maximum(1.0 - w.sum(-1, keepdims=True), 0.0)], -1)
            else:
                x = f64(t.pop(key))
                i = np.argsort(-x, axis=-1, kind="stable")[..., : c["topk"]]
                v = np.take_along_axis(x, i, -1)
                w = np.exp(v - v[..., :1])
                w /= w.sum(-1, keepdims=True)
            return (w[..., None] * bank64[i]).sum(-2)

        tail = ".vblora_logits_A" + ("_topk_indices" if topk else "")
        for p in sorted(k.removesuffix(tail) for k in t if k.endswith(tail)):
            module = p.removeprefix(PFX)
            a, b = rows(p + ".vblora_logits_A"), rows(p + ".vblora_logits_B")
            delta = b.transpose(0, 2, 1).reshape(-1, b.shape[1]) @ a.reshape(a.shape[0], -1)
            put(module + ".weight", "add", stored(module, delta))
    else:
        facts["encoding"] = "projection" if c["save_projection"] else "seed"
        mods = sorted(k.removesuffix(".vera_lambda_b").removeprefix(PFX) for k in t if k.endswith(".vera_lambda_b"))
        logical = {m: base[m + ".weight"].shape[:: -1 if m in conv1d else 1] for m in mods}
        max_out, max_in = (max(s[i] for s in logical.values()) for i in (0, 1))
        rounded = DTYPES[case.dtype]
        probe = torch.empty(4096).uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(0)).numpy()
        u = (np.random.RandomState(0)._bit_generator.random_raw(4096) & np.uint64(0xFFFFFF)).astype(
            np.float64
        ) * 2.0**-24
        lo = np.float32(-0.3)
        fused = bool(((u * np.float64(np.float32(-lo - lo)) + np.float64(lo)).astype(np.float32) == probe).all())
        pa, pb = vera_projection(c["projection_prng_key"], c["r"], max_in, max_out, fused)
        ta = torch.from_numpy(pa).to(rounded)
        tb = torch.from_numpy(pb).to(rounded)
        if case.autocast:
            ta, tb = ta.float(), tb.float()
        if c["save_projection"]:
            same = torch.equal(ta, t["base_model.vera_A"]) and torch.equal(tb, t["base_model.vera_B"])
            assert same and ta.dtype == t["base_model.vera_A"].dtype, (
                "the recipe does not give back PEFT's projections"
            )
            del t["base_model.vera_A"], t["base_model.vera_B"]
        facts["regenerate"] = {
            "prng_key": c["projection_prng_key"],
            "r": c["r"],
            "max_in": max_in,
            "max_out": max_out,
            "arithmetic": "fused" if fused else "two-roundings",
            "rounded_through": case.dtype,
            "dtype": str(ta.dtype).removeprefix("torch."),
            "sha256": {"base_model.vera_A": sha256(ta), "base_model.vera_B": sha256(tb)},
        }
        for m in mods:
            lb, ld = f64(t.pop(f"{PFX}{m}.vera_lambda_b")), f64(t.pop(f"{PFX}{m}.vera_lambda_d"))
            out, inn = logical[m]
            put(m + ".weight", "add", stored(m, (lb[:, None] * f64(tb)[:out]) @ (ld[:, None] * f64(ta)[:, :inn])))

    for key in sorted(k for k in t if k.endswith(".token_adapter.trainable_tokens_delta")):
        module = key.removesuffix(".token_adapter.trainable_tokens_delta").removeprefix(PFX)
        put(module + ".weight", "rows", f64(t.pop(key)), indices=list(c["trainable_token_indices"]))
    for key in sorted(saved):
        replace(key, saved[key])
    for key in sorted(set(t) - set(case.unexpected)):
        replace(key, t.pop(key))
    return changes, arrays, facts


def wrapped(base: dict[str, torch.Tensor], targets: list[str]) -> list[tuple[str, str]]:
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


# ---------------------------------------------------------------- one case


def canonical(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo the two other spellings of keys, which derived cases use."""
    out = {}
    for k, v in t.items():
        k = k.replace("base_model.model.base_model.", "base_model.")
        out[re.sub(r"\.default(?=\.|$|_topk)", "", k)] = v
    return out


def make(case: Case) -> int:
    over = {**MINI[case.kind], **case.over}
    dtype = DTYPES[case.dtype]

    def base_model() -> Any:
        return oracle.tiny_model(case.kind, dtype, bias=case.bias, seed=SEED, **over)

    base = base_model()
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    conv1d = {n for n, m in base.named_modules() if type(m).__name__ == "Conv1D"}
    transposed = [(n, m) for n, m in base.named_modules() if getattr(m, "is_transposed", False)]
    crossed = {f"{n}.{p}" for n, m in transposed for p, _ in m.named_parameters(recurse=False)}
    with tempfile.TemporaryDirectory() as tmp:
        top = Path(tmp) / "case"
        model = oracle.make_adapter(
            top,
            case.config(),
            case.kind,
            dtype,
            bias=case.bias,
            scale=case.scale,
            autocast=case.autocast,
            post=case.post,
            base=base_model(),
            adapter_name=case.adapter_name,
        )
        del model
        d = top if case.adapter_name == "default" else top / case.adapter_name
        for readme in top.rglob("README.md"):
            readme.unlink()
        t = load_file(d / "adapter_model.safetensors")
        if case.edit is not None:
            t = case.edit(t)
            save_file(t, d / "adapter_model.safetensors", metadata={"format": "pt"})
        c = json.loads((d / "adapter_config.json").read_text())
        changes, arrays, facts = expected(canonical(t), c, weights, conv1d, crossed, case)

        merged = oracle.peft_merge(base_model(), d, autocast=case.autocast)
        assert not merged.load.missing and merged.load.unexpected == sorted(case.unexpected), merged.load
        for name, w in weights.items():
            got = merged[name]
            if name not in changes:
                assert torch.equal(got, w), f"{name} changed"
                continue
            kind, x = changes[name]["kind"], torch.from_numpy(arrays[name])
            want = w.double()
            if kind in ("add", "base-dependent"):
                want = want + x
            elif kind == "value":
                want = x
            else:
                want[changes[name]["indices"]] = x
            assert not torch.equal(want, w.double()) or "value" in kind, f"{name} does not change"
            eps = 2e-6 if dtype == torch.float32 else 2.0**-7
            err = (got.double() - want).norm() / max(
                float((want if kind != "add" or eps > 1e-5 else x).norm()), 1e-30
            )
            assert err <= eps, f"{case.format}/{case.name} {name}: PEFT differs by {err:.3g}"

        expect = {
            "producer": {**oracle.VERSIONS, "python": platform.python_version()},
            "says": case.says,
            "method": c["peft_type"],
            **facts,
            "base": {
                "kind": case.kind,
                "class": type(base).__name__,
                "dtype": case.dtype,
                "seed": SEED,
                "bias": case.bias,
                "tie": False,
                "config": over,
                "conv1d": sorted(m for m in conv1d if m + ".weight" in changes),
                "shapes": {n: ch["shape"] for n, ch in sorted(changes.items())},
            },
            "autocast_adapter_dtype": case.autocast,
            "tensors": len(t),
            "dtypes": sorted({str(v.dtype).removeprefix("torch.") for v in t.values()}),
            "unexpected": sorted(case.unexpected),
            "computed": "formula, float64, from the stored values; checked against PEFT merge_and_unload",
            "changes": [changes[n] for n in sorted(changes)],
        }
        if case.adapter_name != "default":
            expect["subfolder"] = case.adapter_name
        if case.edit is not None:
            expect["producer"]["then"] = "tools/make_vectors.py edited the keys"
        (top / "expect.json").write_text(json.dumps(expect, indent=1, sort_keys=True) + "\n")
        save_file(
            {k: v.contiguous() if isinstance(v, torch.Tensor) else torch.from_numpy(v) for k, v in arrays.items()},
            top / "expect.safetensors",
        )
        if case.where.exists():
            shutil.rmtree(case.where)
        case.where.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(top, case.where)
        for f in case.where.rglob("*"):
            f.chmod(0o755 if f.is_dir() else 0o644)
    return sum(f.stat().st_size for f in case.where.rglob("*") if f.is_file())


# ---------------------------------------------------------------- the cases


def lora(**kw: Any) -> Callable[[], Any]:
    return lambda: LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"], **kw})


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


def vera(**kw: Any) -> Callable[[], Any]:
    return lambda: VeraConfig(
        **{"r": 3, "projection_prng_key": 11, "target_modules": ["q_proj", "v_proj", "down_proj"], **kw}
    )


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


def move_saved_embedding(model: PeftModel) -> None:
    with torch.no_grad():
        layer = model.get_input_embeddings()
        layer.base_layer.weight[1:4] += 0.5


def dotted(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's name left in the keys: `.default.` before the last segment, or at the end."""
    out = {}
    for k, v in t.items():
        k = k.removesuffix(".weight") + ".default.weight" if re.search(r"\.lora_[AB]\.weight$", k) else k + ".default"
        out[k] = v
    return out


def respell(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Shared tensors under their other spelling."""
    shared = ("base_model.vera_A", "base_model.vera_B", "base_model.vblora_vector_bank")
    return {(PFX + k if k in shared else k): v for k, v in t.items()}


def strangers(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    more = {
        PFX + "model.layers.0.self_attn.q_proj.lora_C.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "optimizer.step": torch.tensor(7, dtype=torch.int64),
    }
    return {**t, **more}


GPT2_TM = ["c_attn", "c_proj"]
CASES = [
    # the directory
    Case("peft", "plain", lora(target_modules=["q_proj"]), "a LoRA directory as save_pretrained writes it"),
    Case(
        "peft",
        "subfolder",
        lora(target_modules=["q_proj"]),
        "an adapter that is not called default lies in a subfolder",
        adapter_name="user-7",
    ),
    Case(
        "peft",
        "default-in-keys",
        lora(target_modules=["q_proj"]),
        "keys that still hold .default. load too",
        edit=dotted,
    ),
    Case(
        "peft",
        "default-in-keys-vblora",
        vb(target_modules=["q_proj"]),
        "keys that still end in .default, also the shared one, load too",
        scale=0.5,
        edit=dotted,
    ),
    Case(
        "peft",
        "shared-spelling-vera",
        vera(target_modules=["q_proj"]),
        "base_model.model.base_model.vera_A is the other spelling of base_model.vera_A",
        edit=respell,
    ),
    Case(
        "peft",
        "shared-spelling-vblora",
        vb(target_modules=["q_proj"]),
        "base_model.model.base_model.vblora_vector_bank is the other spelling of the bank",
        scale=0.5,
        edit=respell,
    ),
    Case(
        "peft",
        "unknown-keys",
        lora(target_modules=["q_proj"]),
        "keys that PEFT does not know: it drops them silently",
        edit=strangers,
        unexpected=sorted(set(strangers({}))),
    ),
    Case(
        "peft",
        "target-regex",
        lora(target_modules=r".*layers\.1\..*(q|k)_proj"),
        "target_modules as a regular expression",
        over={"num_hidden_layers": 2},
    ),
    Case(
        "peft",
        "all-linear",
        lora(target_modules="all-linear", exclude_modules=["down_proj"]),
        "all-linear is saved as a list of full paths",
    ),
    Case("peft", "task-type", lora(target_modules=["q_proj"], task_type="CAUSAL_LM"), "a task type changes no key"),
    # LoRA
    Case("lora", "linear-llama", lora(), "Linear layers of unequal shapes", over={"num_hidden_layers": 2}),
    Case(
        "lora",
        "linear-opt",
        lora(target_modules=["q_proj", "fc1", "project_in", "project_out"]),
        "Linear layers of OPT",
        kind="opt",
    ),
    Case(
        "lora",
        "linear-bert",
        lora(target_modules=["query", "dense"]),
        "Linear layers of BERT; a name that matches at three places",
        kind="bert",
    ),
    Case(
        "lora",
        "conv1d-gpt2",
        lora(target_modules=GPT2_TM),
        "Conv1D is stored (in, out): the change is transposed; square and not",
        kind="gpt2",
    ),
    Case(
        "lora",
        "conv1d-and-linear-gpt2",
        lora(target_modules=["c_attn", "c_proj", "lm_head"]),
        "Conv1D and Linear in one adapter: fan_in_fan_out is saved false, though two of the three are transposed",
        kind="gpt2",
    ),
    Case(
        "lora",
        "embedding-gpt2",
        lora(target_modules=["wte", "wpe", "c_attn"]),
        "Embedding layers; wte is not saved with its base",
        kind="gpt2",
    ),
    Case(
        "lora",
        "saved-embeddings",
        lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
        "embed_tokens and lm_head targeted: PEFT saves their base weights too",
    ),
    Case(
        "lora",
        "saved-embeddings-changed",
        lora(target_modules=["embed_tokens", "q_proj"]),
        "saved base weights that differ from the base: they replace it before the change is added",
        post=move_saved_embedding,
    ),
    Case(
        "lora",
        "lora-bias",
        lora(lora_bias=True, target_modules=["q_proj", "fc2"]),
        "lora_B has a bias, added to the base bias",
        kind="opt",
    ),
    Case(
        "lora",
        "lora-bias-gpt2",
        lora(lora_bias=True, target_modules=["c_attn"]),
        "lora_B has a bias on Conv1D",
        kind="gpt2",
    ),
    Case("lora", "rslora", lora(use_rslora=True, r=3), "scale alpha / sqrt(r)"),
    Case(
        "lora",
        "patterns",
        lora(
            rank_pattern={"layers.0.self_attn.q_proj": 3, "q_proj": 4},
            alpha_pattern={"self_attn.q_proj": 3, "q_proj": 50, r"layers\.1\..*down_proj": 7},
        ),
        "overlapping patterns: the first match in the file's order wins, and the file's keys are sorted",
        over={"num_hidden_layers": 2},
    ),
    Case(
        "lora",
        "patterns-rslora",
        lora(use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"^model.layers.0.self_attn.v_proj": 9}),
        "patterns with rsLoRA; a key that starts with ^",
    ),
    Case(
        "lora",
        "bias-all",
        lora(bias="all", target_modules=["q_proj", "fc1"]),
        "every bias of the model is saved and replaced",
        kind="opt",
    ),
    Case(
        "lora",
        "bias-lora-only",
        lora(bias="lora_only", target_modules=["query", "dense"]),
        "the biases of adapted layers",
        kind="bert",
    ),
    Case(
        "lora",
        "bias-lora-only-gpt2",
        lora(bias="lora_only", target_modules=["c_attn"]),
        "the bias of an adapted Conv1D",
        kind="gpt2",
    ),
    Case(
        "lora",
        "modules-to-save",
        lora(modules_to_save=["lm_head", "norm"]),
        "whole modules; 'norm' also matches input_layernorm, for the test has no dot boundary",
    ),
    Case(
        "lora",
        "token-indices",
        lora(trainable_token_indices=[5, 2, 31]),
        "new rows of the embedding, absolute, in list order",
    ),
    Case(
        "lora",
        "convolution-2d",
        lora(target_modules=["convolution"], alpha_pattern={"embedder.convolution": 3}),
        "Conv2d with kernels 7x7, 3x3 and 1x1",
        kind="resnet",
    ),
    Case(
        "lora",
        "convolution-1d-bias",
        lora(target_modules=["conv1", "conv2"], lora_bias=True, use_rslora=True),
        "Conv1d, with a bias of its own",
        kind="whisper",
    ),
    Case(
        "lora",
        "dora-convolution-2d",
        lora(target_modules=["convolution"], use_dora=True),
        "DoRA on Conv2d: the norm over all inputs and the kernel",
        kind="resnet",
    ),
    Case(
        "lora",
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
        "lora",
        "parameters-straight",
        lora(target_modules=[], target_parameters=["gate_up_proj", "down_proj", "router.weight"]),
        "target_parameters on experts that PEFT takes for (experts, out, in), and on a matrix",
        kind="llama4",
        dtype="bfloat16",
    ),
    Case("lora", "dora-linear", lora(use_dora=True), "DoRA on Linear: row norms"),
    Case(
        "lora",
        "dora-gpt2",
        lora(use_dora=True, target_modules=GPT2_TM),
        "DoRA on Conv1D: norms over dim 0",
        kind="gpt2",
    ),
    Case(
        "lora",
        "dora-embedding",
        lora(use_dora=True, target_modules=["wte"]),
        "DoRA on Embedding: norms over dim 0",
        kind="gpt2",
    ),
    Case(
        "lora",
        "dora-rslora-patterns",
        lora(use_dora=True, use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 2}),
        "DoRA with rsLoRA and patterns",
    ),
    Case("lora", "bf16-base", lora(), "a bfloat16 base: the adapter's values are float32", dtype="bfloat16"),
    Case(
        "lora",
        "bf16-base-embedding",
        lora(target_modules=["wte", "c_attn"]),
        "a bfloat16 base with Embedding and Conv1D",
        kind="gpt2",
        dtype="bfloat16",
    ),
    Case(
        "lora",
        "bf16-file",
        lora(),
        "autocast_adapter_dtype=False: the file is bfloat16",
        dtype="bfloat16",
        autocast=False,
    ),
    Case("lora", "f16-base", lora(modules_to_save=["lm_head"]), "a float16 base; modules_to_save", dtype="float16"),
    # VB-LoRA
    *[
        Case(
            "vblora",
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
        "vblora",
        "full-peaked-k3",
        vb(topk=3),
        "peaked logits, topk 3: written as top-k the last weight may come out negative",
        scale=0.5,
        post=sharpen,
    ),
    *[
        Case(
            "vblora",
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
    Case("vblora", "full-256", vb(num_vectors=256, target_modules=["v_proj"]), "256 vectors, full logits", scale=0.5),
    Case("vblora", "full-gpt2", vb(target_modules=GPT2_TM), "Conv1D, full logits", kind="gpt2", scale=0.5),
    Case(
        "vblora",
        "topk-gpt2",
        vb(target_modules=GPT2_TM, save_only_topk_weights=True),
        "Conv1D, top-k",
        kind="gpt2",
        scale=0.5,
    ),
    Case(
        "vblora",
        "full-bias-only",
        vb(target_modules=["q_proj", "fc1"], bias="vblora_only"),
        "biases of adapted layers",
        kind="opt",
        scale=0.5,
    ),
    Case(
        "vblora",
        "topk-bias-all",
        vb(target_modules=["query"], bias="all", save_only_topk_weights=True),
        "all biases, top-k",
        kind="bert",
        scale=0.5,
    ),
    Case(
        "vblora",
        "topk-modules-to-save",
        vb(modules_to_save=["lm_head"], save_only_topk_weights=True),
        "modules_to_save beside top-k",
        scale=0.5,
    ),
    Case(
        "vblora",
        "full-bf16-base",
        vb(),
        "a bfloat16 base: the adapter's values are float32",
        dtype="bfloat16",
        scale=0.5,
    ),
    Case(
        "vblora",
        "topk-bf16-base",
        vb(save_only_topk_weights=True),
        "a bfloat16 base, top-k",
        dtype="bfloat16",
        scale=0.5,
    ),
    Case(
        "vblora",
        "full-bf16-file",
        vb(),
        "autocast_adapter_dtype=False: the file is bfloat16",
        dtype="bfloat16",
        autocast=False,
        scale=0.5,
        post=untie,
    ),
    # VeRA
    *[
        Case(
            "vera",
            f"{form}-{tag}",
            vera(save_projection=form == "projection", **kw),
            f"{says}; {form}",
            scale=0.3,
            **more,
        )
        for form in ("projection", "seed")
        for tag, says, kw, more in (
            ("mixed-shapes", "layers of unequal shapes: slices of the shared projections", {}, {}),
            (
                "opt",
                "OPT, four shapes",
                {"target_modules": ["q_proj", "fc1", "fc2", "project_in", "project_out"]},
                {"kind": "opt"},
            ),
            ("gpt2", "Conv1D", {"target_modules": GPT2_TM, "projection_prng_key": 2**32 + 5}, {"kind": "gpt2"}),
            ("bias-all", "every bias", {"target_modules": ["query", "dense"], "bias": "all"}, {"kind": "bert"}),
            (
                "bf16-base",
                "a bfloat16 base: projections are rounded to bfloat16, then float32 again",
                {},
                {"dtype": "bfloat16"},
            ),
        )
    ],
    Case(
        "vera",
        "projection-bias-only",
        vera(target_modules=["fc1"], bias="vera_only"),
        "biases of adapted layers",
        kind="opt",
        scale=0.3,
    ),
    Case("vera", "projection-modules-to-save", vera(modules_to_save=["lm_head"]), "modules_to_save", scale=0.3),
    Case(
        "vera",
        "projection-f16-base",
        vera(),
        "a float16 base: projections rounded to float16",
        dtype="float16",
        scale=0.3,
    ),
    Case(
        "vera",
        "projection-bf16-file",
        vera(),
        "autocast_adapter_dtype=False: the file is bfloat16",
        dtype="bfloat16",
        autocast=False,
        scale=0.3,
    ),
    Case(
        "vera",
        "projection-key-0",
        vera(projection_prng_key=0, r=8, target_modules=["q_proj"]),
        "the default key",
        scale=0.3,
    ),
]


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    total = 0
    names = [(c.format, c.name) for c in CASES]
    assert len(set(names)) == len(names)
    if not wanted:
        for fmt in {c.format for c in CASES}:
            shutil.rmtree(ROOT / "formats" / fmt / "vectors", ignore_errors=True)
    for case in CASES:
        if wanted in f"{case.format}/{case.name}":
            size = make(case)
            total += size
            print(f"{case.format}/{case.name}: {size} bytes")
    print(f"{total} bytes in all")


if __name__ == "__main__":
    main()
