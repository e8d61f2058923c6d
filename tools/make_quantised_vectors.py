"""Write formats/quantised/vectors/ and formats/quantised/invalid/.

usage: python tools/make_quantised_vectors.py        rewrites every case (each case directory is removed first)

It needs more than the project does: run it in an environment of its own, with torch, transformers, accelerate,
bitsandbytes, compressed-tensors, nvidia-modelopt and safetensors. Nothing of adapterpack is imported.

A vector is a small checkpoint (config.json, model.safetensors) with
  expected.safetensors  what the reference implementation dequantises it to, under the unquantised names, in the
                        dtype of the unquantised model
  exact.safetensors     the same in f32, where the reference has an f32 path
  expect.json           which implementation and version gave it, the scheme's name, and what is dropped

An invalid case is such a checkpoint, broken, with
  expect.json           the error, a part of its message, and whether `find` or `read` raises it
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

ROOT = Path(__file__).resolve().parent.parent / "formats" / "quantised"
TRANSFORMERS = f"transformers {version('transformers')}"
BNB = f"bitsandbytes {version('bitsandbytes')}"
COMPRESSED = f"compressed-tensors {version('compressed-tensors')}"
MODELOPT = f"nvidia-modelopt {version('nvidia-modelopt')}"
F8, F32, BF16, F16, U8 = torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.float16, torch.uint8
Tensors = dict[str, torch.Tensor]


class Case:
    """A checkpoint under construction: stored tensors, and what the reference makes of them."""

    def __init__(self, name: str, scheme: str, reference: str, config: dict[str, Any], dtype: torch.dtype = BF16):
        self.name, self.scheme, self.reference, self.dtype = name, scheme, reference, dtype
        self.config = {"model_type": "llama", "torch_dtype": str(dtype).removeprefix("torch."), **config}
        self.stored: Tensors = {"model.norm.weight": torch.ones(8, dtype=dtype)}
        self.expected: Tensors = {}
        self.exact: Tensors = {}
        self.dropped: list[str] = []

    def add(
        self, stored: Tensors, name: str, give: Callable[[torch.dtype], torch.Tensor], exact: bool = True
    ) -> None:
        self.stored |= stored
        self.expected[name] = give(self.dtype).to(self.dtype).contiguous()
        if exact:
            self.exact[name] = give(F32).contiguous()

    def drop(self, stored: Tensors) -> None:
        self.stored |= stored
        self.dropped += stored

    def write(self) -> None:
        folder = ROOT / "vectors" / self.name
        folder.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in self.stored.items()}, folder / "model.safetensors")
        save_file(self.expected, folder / "expected.safetensors")
        if self.exact:
            save_file(self.exact, folder / "exact.safetensors")
        write_json(folder / "config.json", self.config)
        expect = {"scheme": self.scheme, "reference": self.reference, "dropped": sorted(self.dropped)}
        write_json(folder / "expect.json", {**expect, "torch": version("torch")})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def codes(*shape: int, seed: int = 0, skip_nan: bool = True) -> torch.Tensor:
    """Random FP8 bytes: every code but NaN."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, shape, generator=g, dtype=torch.int32)
    if skip_nan:
        raw[(raw & 127) == 127] = 126
    return raw.to(U8).view(F8)


def positive(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2e-3 + 1e-5


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}


def transformers_fp8(q: torch.Tensor, s: torch.Tensor) -> Callable[[torch.dtype], torch.Tensor]:
    op = Fp8Dequantize(None)
    return lambda dtype: op._dequantize_one(q, s, output_dtype=dtype)


def fp8_cases() -> list[Case]:
    found = []
    for label, scale_dtype, dtype in (("", F32, BF16), ("-bf16-scale", BF16, BF16), ("-f16", F32, F16)):
        c = Case(f"fp8-block{label}", "block FP8", TRANSFORMERS + " Fp8Dequantize", {}, dtype)
        c.config["quantization_config"] = {**FP8, "weight_block_size": [4, 8], "modules_to_not_convert": ["lm_head"]}
        q, s = codes(8, 24), positive(2, 3).to(scale_dtype)
        name = "model.layers.0.mlp.up_proj.weight"
        c.add({name: q, f"{name}_scale_inv": s}, name, transformers_fp8(q, s))
        c.stored["lm_head.weight"] = torch.ones(8, 8, dtype=dtype)
        found.append(c)
    c = Case("fp8-block-ragged", "block FP8", TRANSFORMERS + " _dequantize_fp8_weight in f32, rounded", {})
    c.config["quantization_config"] = {**FP8, "weight_block_size": [4, 8]}
    q, s = codes(10, 21, seed=2), positive(3, 3)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    c.add({name: q, f"{name}_scale_inv": s}, name, lambda dtype: _dequantize_fp8_weight(q, s, [4, 8], F32).to(dtype))
    found.append(c)
    c = Case("fp8-block-undeclared", "block FP8", TRANSFORMERS + " _dequantize_fp8_weight in f32, rounded", {})
    q2, s2 = codes(130, 8, seed=3), positive(2, 1)
    name2 = "model.layers.0.mlp.up_proj.weight"
    stored = {name2: q2, f"{name2}_scale_inv": s2}
    c.add(stored, name2, lambda dtype: _dequantize_fp8_weight(q2, s2, [128, 128], F32).to(dtype))
    found.append(c)
    c = Case("fp8-experts", "block FP8", TRANSFORMERS + " Fp8Dequantize", {})
    c.config["quantization_config"] = {**FP8, "weight_block_size": [4, 8], "activation_scheme": "static"}
    q3, s3 = codes(3, 8, 16, seed=4), positive(3, 2, 2)
    name3 = "model.layers.0.mlp.experts.gate_up_proj"
    c.add({name3: q3, f"{name3}_scale_inv": s3}, name3, transformers_fp8(q3, s3))
    c.drop({f"{name3}_activation_scale": torch.ones(3)})
    found.append(c)
    c = Case("fp8-ue8m0", "block FP8", TRANSFORMERS + " Fp8Dequantize", {})
    c.config["quantization_config"] = {**FP8, "weight_block_size": [4, 8], "scale_fmt": "ue8m0"}
    q4 = codes(4, 16, seed=5)
    s4 = torch.tensor([[110, 121]], dtype=U8).view(torch.float8_e8m0fnu)
    c.add({name2: q4, f"{name2}_scale_inv": s4}, name2, transformers_fp8(q4, s4))
    found.append(c)
    c = Case("mxfp8", "block FP8", TRANSFORMERS + " Fp8Dequantize", {})
    c.config["quantization_config"] = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    q5, s5 = codes(3, 64, seed=6), torch.tensor([[120, 127], [0, 130], [5, 119]], dtype=U8)
    c.add({name2: q5, f"{name2}_scale_inv": s5}, name2, transformers_fp8(q5, s5))
    found.append(c)
    c = Case("fp8-per-tensor", "per-tensor FP8", TRANSFORMERS + " Fp8Dequantize", {})
    c.config["quantization_config"] = {**FP8, "weight_block_size": None, "activation_scheme": "static"}
    q6, s6 = codes(6, 10, seed=7), torch.tensor(0.0123, dtype=BF16)
    c.add({name2: q6, f"{name2}_scale_inv": s6}, name2, transformers_fp8(q6, s6.reshape(1, 1)))
    c.drop({name2.replace("weight", "activation_scale"): torch.tensor(0.5, dtype=BF16)})
    found.append(c)
    c = Case("fp8-nan-code", "per-tensor FP8", TRANSFORMERS + " Fp8Dequantize", {})
    c.config["quantization_config"] = {**FP8, "weight_block_size": None}
    q7, s7 = torch.arange(256, dtype=torch.int32).to(U8).view(F8).reshape(16, 16), torch.tensor([1e30])
    c.add({name2: q7, f"{name2}_scale_inv": s7}, name2, transformers_fp8(q7, s7.reshape(1, 1)))
    found.append(c)
    return found


def compressed_cases() -> list[Case]:
    found = []
    shapes = {"tensor": (1,), "channel": (10, 1), "block": (3, 2)}
    kinds = {"tensor": "per-tensor FP8", "channel": "per-channel FP8", "block": "block FP8"}
    for strategy, shape in shapes.items():
        for scale_dtype in (F32, BF16):
            weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
            if strategy == "block":
                weights["block_structure"] = [4, 8]
            label = "-bf16-scale" if scale_dtype == BF16 else ""
            c = Case(f"compressed-{strategy}{label}", kinds[strategy], COMPRESSED + " decompress", {})
            c.config["quantization_config"] = {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
                "kv_cache_scheme": None,
                "ignore": ["lm_head"],
            }
            q, s = codes(10, 16, seed=8), positive(*shape).to(scale_dtype)
            scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
            compressor = BaseCompressor.get_value_from_registry("float-quantized")
            name = "model.layers.0.self_attn.q_proj.weight"

            def give(dtype: torch.dtype, q=q, s=s, scheme=scheme, compressor=compressor) -> torch.Tensor:
                # In the scale's dtype, as it does; for the f32 values the scale is given in f32.
                scale = s.to(F32) if dtype == F32 else s
                return compressor.decompress({"weight": q, "weight_scale": scale}, scheme)["weight"]

            c.add({name: q, f"{name}_scale": s}, name, give)
            if strategy == "tensor":
                c.drop({name.replace("weight", "input_scale"): torch.tensor([0.1], dtype=scale_dtype)})
                c.drop({"model.layers.0.self_attn.k_scale": torch.tensor([0.1], dtype=scale_dtype)})
            found.append(c)
    c = Case("modelopt", "per-tensor FP8", MODELOPT + " FP8QTensor.dequantize in f32, rounded", {})
    c.config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    name = "model.layers.0.self_attn.q_proj.weight"
    w = torch.randn(6, 12, generator=torch.Generator().manual_seed(9))
    tensor, scale = FP8QTensor.quantize(w)
    stored = {name: tensor._quantized_data, f"{name}_scale": scale.reshape(())}
    c.add(stored, name, lambda dtype: tensor.dequantize(F32, scale=scale).to(dtype))
    c.drop({name.replace("weight", "input_scale"): torch.tensor(0.1)})
    found.append(c)
    return found


def mxfp4_cases() -> list[Case]:
    found = []
    for dtype in (BF16, F16):
        label = "" if dtype == BF16 else "-f16"
        c = Case(f"mxfp4{label}", "MXFP4", TRANSFORMERS + " convert_moe_packed_tensors", {}, dtype)
        c.config |= {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
        for seed, (proj, shape) in enumerate((("gate_up_proj", (2, 6, 2)), ("down_proj", (2, 5, 1)))):
            g = torch.Generator().manual_seed(seed)
            blocks = torch.randint(0, 256, (*shape, 16), generator=g, dtype=torch.int32).to(U8)
            # 0 and 250 reach into the subnormal and the huge; 2^-127 * 0.5 is below what F16 holds.
            scales = torch.randint(115, 130, shape, generator=g, dtype=torch.int32).to(U8)
            scales[0, 0, 0], scales[-1, -1, -1] = 0, 250
            name = f"model.layers.0.mlp.experts.{proj}"
            stored = {f"{name}_blocks": blocks, f"{name}_scales": scales}
            c.add(stored, name, lambda d, b=blocks, s=scales: convert_moe_packed_tensors(b, s, dtype=d))
            c.stored[f"{name}_bias"] = torch.zeros(*shape[:2], dtype=dtype)
        found.append(c)
    return found


def bnb_cases() -> list[Case]:
    found = []
    name = "model.layers.0.self_attn.q_proj.weight"
    table = [  # label, type, dtype, shape, blocksize, nested, storage
        ("nf4", "nf4", BF16, (8, 64), 64, False, U8),
        ("nf4-f16", "nf4", F16, (8, 64), 64, False, U8),
        ("nf4-double", "nf4", BF16, (36, 64), 32, True, U8),
        ("nf4-ragged", "nf4", BF16, (5, 77), 64, False, U8),
        ("nf4-short-rows", "nf4", BF16, (12, 24), 128, True, U8),
        ("nf4-bf16-storage", "nf4", BF16, (8, 64), 64, False, BF16),
        ("fp4", "fp4", BF16, (8, 64), 64, False, U8),
        ("fp4-double", "fp4", BF16, (16, 64), 128, True, U8),
    ]
    for seed, (label, kind, dtype, shape, blocksize, nested, storage) in enumerate(table):
        c = Case(f"bnb-{label}", f"bitsandbytes {kind.upper()}", BNB + " dequantize_4bit", {}, dtype)
        c.config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested,
        }
        w = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)
        w[0, :4] = 0
        q, state = bnb.quantize_4bit(
            w, blocksize=blocksize, quant_type=kind, compress_statistics=nested, quant_storage=storage
        )
        if label == "nf4-double":
            # Blocks of 64 instead of 256, so that a small weight has two of them.
            absmax = bnb.dequantize_blockwise(state.absmax, state.state2)
            state.absmax, state.state2 = bnb.quantize_blockwise(absmax, blocksize=64)
        stored = {name: q} | {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
        if shape[1] % blocksize:
            # The AVX-512 kernel takes blocks row by row where rows are no whole blocks, against what quantize_4bit
            # and CUDA do: the generic implementation is asked there.
            c.reference = BNB + " backends.default dequantize_4bit"

        def give(d: torch.dtype, q=q, state=state, shape=shape, blocksize=blocksize) -> torch.Tensor:
            if shape[1] % blocksize == 0:
                state.dtype = d
                return bnb.dequantize_4bit(q, state)
            absmax = state.absmax
            if state.nested:
                absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
            flat = q.view(U8).reshape(-1)
            return _dequantize_4bit_compute(flat, absmax, state.code, blocksize, shape, d)

        c.add(stored, name, give, exact=not nested)
        found.append(c)
    for dtype in (BF16, F16):
        label = "" if dtype == BF16 else "-f16"
        c = Case(f"bnb-int8{label}", "bitsandbytes int8", BNB + " int8_vectorwise_dequant", {}, dtype)
        c.config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        w = torch.randn(6, 40, generator=torch.Generator().manual_seed(20)).to(F16)
        w[2] = 0
        q8, scb, _ = bnb.int8_vectorwise_quant(w)
        q8[2] = 0  # 0 / 0 gave whatever the CPU makes of NaN
        stem = name.removesuffix(".weight")
        c.drop({f"{stem}.weight_format": torch.tensor(0, dtype=U8)})
        c.add({name: q8, f"{stem}.SCB": scb}, name, lambda d, q=q8, s=scb: bnb.int8_vectorwise_dequant(q, s))
        found.append(c)
    return found


# -- invalid cases ---------------------------------------------------------------------------------------

Edit = Callable[[Tensors, dict[str, Any]], None]
UP, Q = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
X = "model.layers.0.mlp.experts.gate_up_proj"


def put(name: str, tensor: torch.Tensor | None) -> Edit:
    def edit(tensors: Tensors, _: dict[str, Any]) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return edit


def say(**fields: Any) -> Edit:
    return lambda _, config: config["quantization_config"].update(fields)


def says_nothing(_: Tensors, config: dict[str, Any]) -> None:
    del config["quantization_config"]


def state(**fields: Any) -> Edit:
    """Other fields in the quant_state; None removes one."""
    name = f"{Q}.quant_state.bitsandbytes__nf4"

    def edit(tensors: Tensors, _: dict[str, Any]) -> None:
        new = json.loads(bytes(tensors[name].tolist())) | fields
        text = json.dumps({k: v for k, v in new.items() if v is not None})
        tensors[name] = torch.tensor(list(text.encode()), dtype=U8)

    return edit


def blob(text: bytes) -> Edit:
    return put(f"{Q}.quant_state.bitsandbytes__nf4", torch.tensor(list(text), dtype=U8))


def bits(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F32)


# name, the vector that is broken, how, error, message, when
INVALID: list[tuple[str, str, Edit, str, str, str]] = [
    ("no-scale", "fp8-block", put(f"{UP}_scale_inv", None), "invalid", UP, "find"),
    ("two-scales", "fp8-block", put(f"{UP}_scale", positive(2, 3)), "invalid", "has 2 scales", "find"),
    ("scale-of-nothing", "fp8-block", put("a.weight_scale_inv", positive(1, 1)), "invalid", "no FP8 tensor", "find"),
    ("scale-shape", "fp8-block", put(f"{UP}_scale_inv", positive(3, 2)), "invalid", "does not fit", "find"),
    ("scale-transposed", "compressed-channel", put(f"{Q}_scale", positive(1, 10)), "invalid", "does not fit", "find"),
    ("scale-flat", "compressed-channel", put(f"{Q}_scale", positive(10)), "invalid", "does not fit", "find"),
    (
        "scale-dtype",
        "fp8-block",
        put(f"{UP}_scale_inv", torch.ones(2, 3, dtype=torch.int32)),
        "invalid",
        "I32",
        "find",
    ),
    ("scale-nan", "fp8-block", put(f"{UP}_scale_inv", positive(2, 3) * torch.nan), "invalid", "scale_inv", "read"),
    ("scale-infinite", "fp8-block", put(f"{UP}_scale_inv", positive(2, 3) / 0), "invalid", "scale_inv", "read"),
    ("scale-negative", "fp8-block", put(f"{UP}_scale_inv", -positive(2, 3)), "invalid", "scale_inv", "read"),
    ("block-zero", "fp8-block", say(weight_block_size=[0, 8]), "invalid", "weight_block_size", "find"),
    ("block-text", "fp8-block", say(weight_block_size="128"), "invalid", "weight_block_size", "find"),
    ("block-three", "fp8-block", say(weight_block_size=[4, 8, 2]), "invalid", "weight_block_size", "find"),
    ("block-true", "fp8-block", say(weight_block_size=[True, 8]), "invalid", "weight_block_size", "find"),
    ("block-huge", "fp8-block", say(weight_block_size=[4, 10**30]), "invalid", "weight_block_size", "find"),
    ("fp8-vector", "fp8-block", put(UP, codes(192)), "invalid", "(out, in)", "find"),
    ("fp8-e5m2", "fp8-block", put(UP, torch.ones(8, 24).to(torch.float8_e5m2)), "unsupported", "F8_E5M2", "find"),
    ("fp8-fp4-experts", "fp8-block", say(expert_dtype="fp4"), "unsupported", "FP4", "find"),
    ("method-missing", "fp8-block", say(quant_method=None), "invalid", "quant_method", "find"),
    ("method-unknown", "fp8-block", say(quant_method="rot13"), "unsupported", "rot13", "find"),
    ("undeclared-scalar", "fp8-per-tensor", says_nothing, "unsupported", "looks quantised", "find"),
    ("undeclared-nf4", "bnb-nf4", says_nothing, "unsupported", "looks quantised", "find"),
    ("undeclared-mxfp4", "mxfp4", says_nothing, "unsupported", "looks quantised", "find"),
    ("undeclared-qweight", "mxfp4", put("a.qweight", torch.ones(2, 2)), "unsupported", "a.qweight", "find"),
    ("nothing-quantised", "fp8-block", put(UP, torch.ones(8, 24)), "invalid", "no FP8 tensor", "find"),
    (
        "zero-point",
        "compressed-channel",
        put(f"{Q}_zero_point", torch.zeros(10, 1)),
        "unsupported",
        "zero_point",
        "find",
    ),
    (
        "pre-quant-scale",
        "modelopt",
        put("a.pre_quant_scale", torch.ones(12)),
        "unsupported",
        "pre_quant_scale",
        "find",
    ),
    ("modelopt-nvfp4", "modelopt", say(quant_algo="NVFP4"), "unsupported", "NVFP4", "find"),
    ("compressed-pack", "compressed-channel", say(format="pack-quantized"), "unsupported", "pack-quantized", "find"),
    ("compressed-groups", "compressed-channel", say(config_groups=[]), "invalid", "config_groups", "find"),
    (
        "compressed-sparse",
        "compressed-channel",
        say(sparsity_config={"format": "sparse-24"}),
        "unsupported",
        "sparsity",
        "find",
    ),
    ("mxfp4-no-scales", "mxfp4", put(f"{X}_scales", None), "invalid", f"{X}_scales", "find"),
    ("mxfp4-no-blocks", "mxfp4", put(f"{X}_blocks", None), "invalid", f"{X}_blocks", "find"),
    ("mxfp4-twice", "mxfp4", put(X, torch.ones(2, 64, 6)), "invalid", "there twice", "find"),
    (
        "mxfp4-scales-shape",
        "mxfp4",
        put(f"{X}_scales", torch.ones(2, 2, 6, dtype=U8)),
        "invalid",
        "(2, 6, 2)",
        "find",
    ),
    ("mxfp4-bytes", "mxfp4", put(f"{X}_blocks", torch.ones(2, 6, 2, 15, dtype=U8)), "invalid", "_blocks", "find"),
    ("mxfp4-nan", "mxfp4", put(f"{X}_scales", torch.full((2, 6, 2), 255, dtype=U8)), "invalid", "_scales", "read"),
    ("nf4-no-state", "bnb-nf4", put(f"{Q}.quant_state.bitsandbytes__nf4", None), "invalid", "quant_state", "find"),
    ("nf4-no-absmax", "bnb-nf4", put(f"{Q}.absmax", None), "invalid", "absmax is missing", "find"),
    ("nf4-no-map", "bnb-nf4", put(f"{Q}.quant_map", None), "invalid", "quant_map is missing", "find"),
    ("nf4-other-map", "bnb-nf4", put(f"{Q}.quant_map", torch.arange(16) / 16), "invalid", "table of nf4", "find"),
    ("nf4-no-weight", "bnb-nf4", put(Q, None), "invalid", Q, "find"),
    ("nf4-short-weight", "bnb-nf4", put(Q, torch.ones(255, 1, dtype=U8)), "invalid", "255", "find"),
    ("nf4-short-absmax", "bnb-nf4", put(f"{Q}.absmax", bits(1, 2, 3)), "invalid", "absmax", "find"),
    ("nf4-absmax-dtype", "bnb-nf4", put(f"{Q}.absmax", torch.ones(8, dtype=U8)), "invalid", "absmax", "find"),
    ("nf4-absmax-nan", "bnb-nf4", put(f"{Q}.absmax", torch.ones(8) * torch.nan), "invalid", "absmax", "read"),
    ("nf4-absmax-negative", "bnb-nf4", put(f"{Q}.absmax", -torch.ones(8)), "invalid", "absmax", "read"),
    ("nf4-blocksize-0", "bnb-nf4", state(blocksize=0), "invalid", "blocksize", "find"),
    ("nf4-blocksize-63", "bnb-nf4", state(blocksize=63), "invalid", "blocksize", "find"),
    ("nf4-blocksize-true", "bnb-nf4", state(blocksize=True), "invalid", "blocksize", "find"),
    ("nf4-blocksize-text", "bnb-nf4", state(blocksize="64"), "invalid", "blocksize", "find"),
    ("nf4-blocksize-list", "bnb-nf4", state(blocksize=[64]), "invalid", "blocksize", "find"),
    ("nf4-dtype", "bnb-nf4", state(dtype="int8"), "invalid", "dtype", "find"),
    ("nf4-dtype-list", "bnb-nf4", state(dtype=["bfloat16"]), "invalid", "dtype", "find"),
    ("nf4-type", "bnb-nf4", state(quant_type="fp4"), "invalid", "quant_type", "find"),
    ("nf4-shape-text", "bnb-nf4", state(shape="8x64"), "invalid", "shape", "find"),
    ("nf4-shape-negative", "bnb-nf4", state(shape=[-8, -64]), "invalid", "shape", "find"),
    ("nf4-shape-other", "bnb-nf4", state(shape=[8, 65]), "invalid", "(8, 65)", "find"),
    ("nf4-shape-huge", "bnb-nf4", state(shape=[2**31] * 8), "invalid", "take", "find"),
    ("nf4-shape-deep", "bnb-nf4", state(shape=[2] * 9), "invalid", "shape", "find"),
    ("nf4-shape-float", "bnb-nf4", state(shape=[8.0, 64]), "invalid", "shape", "find"),
    ("nf4-extra-field", "bnb-nf4", state(__class__="os.system"), "invalid", "fields", "find"),
    ("nf4-missing-field", "bnb-nf4", state(shape=None), "invalid", "fields", "find"),
    ("nf4-half-nested", "bnb-nf4", state(nested_offset=0.1), "invalid", "fields", "find"),
    ("nf4-blob-huge", "bnb-nf4", blob(b'{"a": "' + b"x" * 5_000 + b'"}'), "invalid", "5,009", "find"),
    ("nf4-blob-deep", "bnb-nf4", blob(b'{"a":' * 100 + b"1" + b"}" * 100), "invalid", "deeper", "find"),
    ("nf4-blob-twice", "bnb-nf4", blob(b'{"shape": [1], "shape": [2]}'), "invalid", "twice", "find"),
    ("nf4-blob-nan", "bnb-nf4", blob(b'{"shape": NaN}'), "invalid", "NaN", "find"),
    ("nf4-blob-no-json", "bnb-nf4", blob(b"\xff\xfe"), "invalid", "quant_state", "find"),
    ("nf4-blob-dtype", "bnb-nf4", put(f"{Q}.quant_state.bitsandbytes__nf4", bits(1, 2)), "invalid", "F32", "find"),
    (
        "nf4-state-unknown",
        "bnb-nf4",
        put(f"{Q}.quant_state.bitsandbytes__nf5", bits(1)),
        "unsupported",
        "nf5",
        "find",
    ),
    (
        "nested-map-nan",
        "bnb-nf4-double",
        put(f"{Q}.nested_quant_map", bits(*[float("nan")] * 256)),
        "invalid",
        "NaN",
        "find",
    ),
    (
        "nested-map-short",
        "bnb-nf4-double",
        put(f"{Q}.nested_quant_map", bits(1, 2)),
        "invalid",
        "nested_quant_map",
        "find",
    ),
    ("nested-absmax-missing", "bnb-nf4-double", put(f"{Q}.nested_absmax", None), "invalid", "nested_absmax", "find"),
    ("nested-absmax-short", "bnb-nf4-double", put(f"{Q}.nested_absmax", bits(1)), "invalid", "nested_absmax", "find"),
    (
        "nested-absmax-nan",
        "bnb-nf4-double",
        put(f"{Q}.nested_absmax", bits(float("nan"), 1)),
        "invalid",
        "nested_absmax",
        "read",
    ),
    ("nested-offset-huge", "bnb-nf4-double", state(nested_offset=1e300), "invalid", "nested_offset", "find"),
    ("nested-offset-text", "bnb-nf4-double", state(nested_offset="0"), "invalid", "nested_offset", "find"),
    ("nested-blocksize", "bnb-nf4-double", state(nested_blocksize=1), "invalid", "nested_blocksize", "find"),
    ("nested-dtype", "bnb-nf4-double", state(nested_dtype="float64"), "invalid", "dtype", "find"),
    ("int8-scb-shape", "bnb-int8", put(Q.replace("weight", "SCB"), bits(1, 2)), "invalid", "SCB", "find"),
    (
        "int8-scb-nan",
        "bnb-int8",
        put(Q.replace("weight", "SCB"), bits(*[float("nan")] * 6)),
        "invalid",
        "SCB",
        "read",
    ),
    ("int8-no-scb", "bnb-int8", put(Q.replace("weight", "SCB"), None), "invalid", "no tensor is", "find"),
    ("int8-no-weight", "bnb-int8", put(Q, None), "invalid", "SCB", "find"),
    ("int8-uint8", "bnb-int8", put(Q, torch.ones(6, 40, dtype=U8)), "invalid", "I8", "find"),
    (
        "int8-tiles",
        "bnb-int8",
        put(Q.replace("weight", "weight_format"), torch.tensor(2, dtype=U8)),
        "unsupported",
        "row order",
        "find",
    ),
    *(
        (f"method-{m}", "fp8-block", say(quant_method=m), "unsupported", m, "find")
        for m in ("gptq", "awq", "hqq", "eetq", "aqlm", "torchao", "quanto", "fbgemm_fp8", "auto-round", "nvfp4")
    ),
]


def main() -> None:
    cases = [*fp8_cases(), *compressed_cases(), *mxfp4_cases(), *bnb_cases()]
    for kind in ("vectors", "invalid"):
        shutil.rmtree(ROOT / kind, ignore_errors=True)
    for case in cases:
        case.write()
        print("vectors/" + case.name)
    for name, source, edit, error, message, when in INVALID:
        tensors = load_file(ROOT / "vectors" / source / "model.safetensors")
        config = json.loads((ROOT / "vectors" / source / "config.json").read_text())
        edit(tensors, config)
        folder = ROOT / "invalid" / name
        folder.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
        write_json(folder / "config.json", config)
        expect = {"files": ["config.json", "model.safetensors"], "error": error, "message": message, "when": when}
        write_json(folder / "expect.json", expect)
    size = sum(p.stat().st_size for p in ROOT.rglob("*") if p.is_file())
    print(f"{len(cases)} vectors, {len(INVALID)} invalid cases, {size:,} bytes")


if __name__ == "__main__":
    main()
