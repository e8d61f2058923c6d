"""One vector: a tiny model, an adapter that PEFT saves, the float64 numbers, and PEFT's merge to hold them against.

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
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import custom_models
import numpy as np
import oracle
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import vectors
from vectors.hostile import PFX

torch.set_num_threads(1)
Tensors = dict[str, torch.Tensor]
SEED = 1234
BOUND = 2e-6
"""Of float32 arithmetic: of a change against float64, and of PEFT's merge against ours."""
HALF = 2.0**-7
"""The same of a merge into a base of 16 bits."""

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
"""Fields that make the models of tests/oracle.py smaller still: their vectors are kept in the repository."""
GPT2_TM = ["c_attn", "c_proj"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Case:
    """One vector, formats/<id>/vectors/<name>.

    Attributes:
        config: Makes the PEFT config (PEFT changes the object that it is given).
        says: What is special about it, in a few words.
        kind: Of the tiny model.
        dtype: Of the base.
        bias: Do the model's linear layers have biases (where its config leaves the choice)?
        autocast: False keeps the adapter in the dtype of the base, in the file too.
        scale: Standard deviation of what is added to every trainable parameter before it is saved.
        over: Fields of the model's config.
        hook: Runs before the parameters are moved; `post` after, before they are saved.
        edit: What is done to the saved tensors: other spellings of their keys.
        edit_config: What is done to the saved adapter_config.json. PEFT must load the result.
        unexpected: Keys that PEFT drops.
        adapter_name: One other than default lies in a subfolder.
        bound: Largest relative error of a change in float32 arithmetic, where the formula amplifies roundings.
        merge_bound: How far PEFT's own merge may lie from ours, where it is less exact than `bound` or, in 16 bits,
            than 2^-7; None: those.
        peft_merges: False: PEFT cannot merge it, or reads it as something else, and the formula stands alone.
        peft_type: A former name of the method, to be written in place of the one that PEFT knows, once PEFT was
            compared.
        rename: What the former name called the parameters: endings of keys, now and then.
    """

    name: str
    config: Callable[[], Any]
    says: str
    kind: str = "llama"
    dtype: str = "float32"
    bias: bool = False
    autocast: bool = True
    scale: float = 0.05
    over: dict[str, Any] = field(default_factory=dict)
    hook: Callable[[PeftModel], None] | None = None
    post: Callable[[PeftModel], None] | None = None
    edit: Callable[[Tensors], Tensors] | None = None
    edit_config: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    unexpected: list[str] = field(default_factory=list)
    adapter_name: str = "default"
    bound: float = BOUND
    merge_bound: float | None = None
    peft_merges: bool = True
    peft_type: str | None = None
    rename: tuple[str, str] | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        """All fields of the model's config that are not its kind's own."""
        return {**MINI.get(self.kind, custom_models.sizes(self.kind)), **self.over}

    def base(self) -> torch.nn.Module:
        """The base model, alive."""
        made: torch.nn.Module = oracle.tiny_model(
            self.kind, DTYPES[self.dtype], bias=self.bias, seed=SEED, **self.sizes
        )
        return made


class Context:
    """What a formula may ask, and where it puts its results.

    Attributes:
        case: The case.
        base: The base model's state dict, in its dtype.
        modules: The base model's modules by name.
        conv1d: Names of those that are Conv1D: their weights lie as (in, out).
        crossed: Parameters of experts that lie as (experts, in, out) and say so.
        facts: Entries for expect.json; `encoding` must be one.
        changes: Base tensor to what expect.json says of its change.
        arrays: What expect.safetensors will hold.
    """

    def __init__(self, case: Case, model: torch.nn.Module) -> None:
        self.case = case
        self.base: Tensors = {k: v.clone() for k, v in model.state_dict().items()}
        self.modules = dict(model.named_modules())
        self.conv1d = {n for n, m in self.modules.items() if type(m).__name__ == "Conv1D"}
        transposed = [(n, m) for n, m in self.modules.items() if getattr(m, "is_transposed", False)]
        self.crossed = {f"{n}.{p}" for n, m in transposed for p, _ in m.named_parameters(recurse=False)}
        self.facts: dict[str, Any] = {}
        self.changes: dict[str, dict[str, Any]] = {}
        self.arrays: dict[str, np.ndarray | torch.Tensor] = {}

    def logical(self, module: str) -> tuple[int, ...]:
        """Shape of a module's weight as (out, in), or (out, in, kernel...)."""
        shape = tuple(self.base[f"{module}.weight"].shape)
        return shape[::-1] if module in self.conv1d else shape

    def stored(self, module: str, delta: np.ndarray) -> np.ndarray:
        """An (out, in) matrix as the module's weight lies."""
        return delta.T if module in self.conv1d else delta

    def add(self, name: str, delta: np.ndarray, *, bound: float | None = None) -> None:
        """W' = W + delta; delta in the shape of W, and not dependent on it."""
        self._put(name, "add", delta, bound)

    def value(self, name: str, new: np.ndarray, *, bound: float | None = None, **more: Any) -> None:
        """W' = new."""
        self._put(name, "value", new, bound, **more)

    def rows(self, name: str, new: np.ndarray, indices: Sequence[int], *, bound: float | None = None) -> None:
        """W'[indices] = new."""
        self._put(name, "rows", new, bound, indices=list(indices))

    def base_dependent(self, name: str, delta: np.ndarray, *, bound: float | None = None) -> None:
        """W' = W + delta, where delta = W' - W depends on W: that is recorded too."""
        self._put(name, "base-dependent", delta, bound)
        self.keep(name)

    def keep(self, name: str) -> None:
        """Record a base tensor that the formula reads, as "base:<name>"."""
        self.arrays["base:" + name] = self.base[name]

    def _put(self, name: str, kind: str, array: np.ndarray, bound: float | None, **more: Any) -> None:
        assert name in self.base and name not in self.changes, name
        shape = tuple(self.base[name].shape)
        assert array.dtype == np.float64, f"{name}: {array.dtype}"
        assert array.shape == (shape if kind != "rows" else (len(more["indices"]), *shape[1:])), (name, array.shape)
        bound = self.case.bound if bound is None else bound
        self.changes[name] = {"name": name, "kind": kind, "shape": list(shape), "bound": bound, **more}
        self.arrays[name] = np.ascontiguousarray(array)


# ---------------------------------------------------------------- for formulas


def f64(t: torch.Tensor) -> np.ndarray:
    array: np.ndarray = t.double().numpy()
    return array


def first_match(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says of a module: the first key in the file's order."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def sha256(t: torch.Tensor) -> str:
    return hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def mersenne(seed: int) -> Any:
    """The MT19937 of torch's CPU generator; `random_raw(n)` gives its next n 32-bit words."""
    return np.random.RandomState(seed & 0xFFFFFFFF)._bit_generator


def uniform(bits: Any, shape: tuple[int, ...], bound: float, fused: bool = True) -> np.ndarray:
    """torch's `uniform_(-bound, bound)` in float32; `fused`: with a fused multiply-add, as on AVX2."""
    low, high = np.float32(-bound), np.float32(bound)
    span = np.float32(high - low)
    u = (bits.random_raw(int(np.prod(shape))) & np.uint64(0xFFFFFF)).astype(np.float64) * 2.0**-24
    if fused:
        return (u * np.float64(span) + np.float64(low)).astype(np.float32).reshape(shape)
    y: np.ndarray = u.astype(np.float32) * span + low
    return y.reshape(shape)


def fuses() -> bool:
    """Does torch fuse multiply and add in `uniform_` on this machine?"""
    probe = torch.empty(4096).uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(0)).numpy()
    return bool((uniform(mersenne(0), (4096,), 0.3) == probe).all())


# ---------------------------------------------------------------- one case


def canonical(t: Tensors) -> Tensors:
    """Undo the two other spellings of keys, which derived cases use."""
    out = {}
    for k, v in t.items():
        k = k.replace("base_model.model.base_model.", "base_model.")
        out[re.sub(r"\.default(?=\.|$|_topk)", "", k)] = v
    return out


def formula(case: Case, peft_type: str) -> Callable[[Tensors, dict[str, Any], Tensors, Context], None]:
    """That of the module which the case is from; of variants, which share a `peft_type`, each has its own."""
    own = [m for m in vectors.modules() if any(c is case for c in getattr(m, "CASES", ())) and hasattr(m, "expected")]
    (found,) = own or [m for m in vectors.modules() if peft_type in getattr(m, "PEFT_TYPES", ())]
    function: Callable[[Tensors, dict[str, Any], Tensors, Context], None] = found.expected
    return function


def answer(ctx: Context, tensors: Tensors, config: dict[str, Any]) -> None:
    """Fill `ctx`: the method's own changes, then the new values that any method's file may hold."""
    t = dict(tensors)
    formula(ctx.case, config["peft_type"])(t, config, ctx.base, ctx)
    assert "encoding" in ctx.facts
    tail = ".token_adapter.trainable_tokens_delta"
    for key in sorted(k for k in t if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        ctx.rows(f"{module}.weight", f64(t.pop(key)), config["trainable_token_indices"])
    for key in sorted(set(t) - set(ctx.case.unexpected)):
        ctx.value(key.removeprefix(PFX).replace(".base_layer.", "."), f64(t.pop(key)))


def compare(ctx: Context, adapter: Path) -> None:
    """Hold the results against PEFT's merge of the same files.

    Raises:
        AssertionError: they differ, or PEFT does not load the adapter as the case says.
    """
    case = ctx.case
    merged = oracle.peft_merge(case.base(), adapter, autocast=case.autocast)
    assert not merged.load.missing and merged.load.unexpected == sorted(case.unexpected), merged.load
    full = case.dtype == "float32"
    bound = case.merge_bound or (case.bound if full else HALF)
    for name, w in ctx.base.items():
        got = merged[name]
        if name not in ctx.changes:
            assert torch.equal(got, w), f"{name} changed"
            continue
        kind, x = ctx.changes[name]["kind"], torch.from_numpy(ctx.arrays[name])
        want = w.double()
        if kind in ("add", "base-dependent"):
            want = want + x
        elif kind == "value":
            want = x
        else:
            want[ctx.changes[name]["indices"]] = x
        assert not torch.equal(want, w.double()) or "value" in kind, f"{name} does not change"
        reference = x if kind == "add" and full else want
        err = float((got.double() - want).norm()) / max(float(reference.norm()), 1e-30)
        assert err <= bound, f"{case.name} {name}: PEFT differs by {err:.3g}"


def save(case: Case, top: Path) -> tuple[Path, list[str]]:
    """Let PEFT write the adapter to `top`; returns where its files lie, and what was edited afterwards."""
    model = oracle.make_adapter(
        top,
        case.config(),
        scale=case.scale,
        autocast=case.autocast,
        hook=case.hook,
        post=case.post,
        base=case.base(),
        adapter_name=case.adapter_name,
    )
    del model
    d = top if case.adapter_name == "default" else top / case.adapter_name
    for readme in top.rglob("README.md"):
        readme.unlink()
    edited = []
    if case.edit is not None:
        edited.append("the keys")
        save_file(
            case.edit(load_file(d / "adapter_model.safetensors")),
            d / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
    if case.edit_config is not None:
        edited.append("the config")
        rewrite(d / "adapter_config.json", case.edit_config)
    return d, edited


def rewrite(config: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Edit an adapter_config.json; written as PEFT does."""
    config.write_text(json.dumps(edit(json.loads(config.read_text())), indent=2, sort_keys=True))


def make(case: Case, where: Path) -> int:
    """Write one case to `where`; returns the size of its files."""
    base = case.base()
    with tempfile.TemporaryDirectory() as tmp:
        top = Path(tmp) / "case"
        d, edited = save(case, top)
        t = load_file(d / "adapter_model.safetensors")
        c = json.loads((d / "adapter_config.json").read_text())
        ctx = Context(case, base)
        answer(ctx, canonical(t), c)
        if case.peft_merges:
            compare(ctx, d)
        expect = {
            "producer": {**oracle.VERSIONS, "python": platform.python_version()},
            "says": case.says,
            "method": c["peft_type"],
            **ctx.facts,
            "base": {
                "kind": case.kind,
                "class": type(base).__name__,
                "dtype": case.dtype,
                "seed": SEED,
                "bias": case.bias,
                "tie": False,
                "config": case.sizes,
                "conv1d": sorted(m for m in ctx.conv1d if m + ".weight" in ctx.changes),
                "shapes": {n: ch["shape"] for n, ch in sorted(ctx.changes.items())},
            },
            "autocast_adapter_dtype": case.autocast,
            "tensors": len(t),
            "dtypes": sorted({str(v.dtype).removeprefix("torch.") for v in t.values()}),
            "unexpected": sorted(case.unexpected),
            "computed": "formula, float64, from the stored values"
            + ("; checked against PEFT merge_and_unload" if case.peft_merges else ""),
            "changes": [ctx.changes[n] for n in sorted(ctx.changes)],
        }
        if case.peft_type is not None:
            edited.append("the peft_type")
            expect["method"] = case.peft_type
            rewrite(d / "adapter_config.json", lambda config: {**config, "peft_type": case.peft_type})
        if case.rename is not None:
            now, then = case.rename
            file = d / "adapter_model.safetensors"
            save_file({k.replace(now, then): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
            edited.append("the keys")
        if case.adapter_name != "default":
            expect["subfolder"] = case.adapter_name
        if edited:
            expect["producer"]["then"] = f"tools/make_vectors.py edited {' and '.join(edited)}"
        (top / "expect.json").write_text(json.dumps(expect, indent=1, sort_keys=True) + "\n")
        save_file(
            {
                k: v.contiguous() if isinstance(v, torch.Tensor) else torch.from_numpy(v)
                for k, v in ctx.arrays.items()
            },
            top / "expect.safetensors",
        )
        if where.exists():
            shutil.rmtree(where)
        where.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(top, where)
        for f in where.rglob("*"):
            f.chmod(0o755 if f.is_dir() else 0o644)
    return sum(f.stat().st_size for f in where.rglob("*") if f.is_file())


def main(wanted: str = "") -> None:
    """Write the vectors whose "<id>/<case>" contains `wanted`; without it all, and the old ones are removed."""
    cases = [(m.FORMAT, case) for m in vectors.modules() for case in getattr(m, "CASES", ())]
    names = [(fmt, case.name) for fmt, case in cases]
    assert len(set(names)) == len(names), sorted({n for n in names if names.count(n) > 1})
    if not wanted:
        for fmt in {fmt for fmt, _ in cases}:
            shutil.rmtree(vectors.FORMATS / fmt / "vectors", ignore_errors=True)
    total = 0
    for fmt, case in cases:
        if wanted in f"{fmt}/{case.name}":
            size = make(case, vectors.FORMATS / fmt / "vectors" / case.name)
            total += size
            print(f"{fmt}/{case.name}: {size} bytes")
    print(f"{total} bytes in all")
