"""Quantised bases: every vector bit for bit, every range equal to the slice, every broken part refused by name."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapterpack import quantised
from adapterpack.errors import AdapterpackError, InvalidFile, Unsupported
from adapterpack.io import safetensors
from adapterpack.io.files import OpenFile
from adapterpack.quantised import Scheme
from adapterpack.tensor import BF16, DTYPES, F16, F32, Memory, Tensor, from_numpy

FORMAT = Path(__file__).parent.parent / "formats" / "quantised"
VECTORS = sorted((FORMAT / "vectors").iterdir())
INVALID = sorted((FORMAT / "invalid").iterdir())
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def _name(path: Path) -> str:
    return path.name


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


@contextmanager
def _opened(directory: Path) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    with ExitStack() as stack:
        tensors: dict[str, Tensor] = {}
        for file in sorted(directory.glob("model*.safetensors")):
            tensors |= safetensors.read(stack.enter_context(OpenFile(file))).tensors
        yield _json(directory / "config.json"), tensors


def _find(config: dict[str, Any], tensors: dict[str, Tensor]) -> Scheme:
    scheme = quantised.find(config, tensors)
    assert scheme is not None
    return scheme


def _same(tensor: Tensor, expected: torch.Tensor) -> None:
    """The same bits; NaN equals NaN, for its payload is nobody's promise."""
    assert tensor.shape == tuple(expected.shape)
    assert str(expected.dtype).removeprefix("torch.") == (tensor.dtype.numpy or "")
    data = tensor.bytes()
    if data != bits(expected):
        ours = tensor.numpy().astype(np.float32)
        theirs = expected.to(torch.float32).numpy()
        assert np.array_equal(np.isnan(ours), np.isnan(theirs))
        assert ours[~np.isnan(ours)].tobytes() == theirs[~np.isnan(theirs)].tobytes()


# ---------------------------------------------------------------- vectors


@pytest.mark.parametrize("case", VECTORS, ids=_name)
def test_a_vector_dequantises_to_what_its_reference_gives(case: Path) -> None:
    expect, expected = _json(case / "expect.json"), load_file(case / "expected.safetensors")
    with _opened(case) as (config, tensors):
        scheme = _find(config, tensors)
        assert scheme.name == expect["scheme"]
        assert sorted(scheme.dropped) == expect["dropped"]
        assert scheme.consumed.keys() == expected.keys()
        for name, value in expected.items():
            _same(scheme.tensor(name), value)
        exact = case / "exact.safetensors"
        for name, value in (load_file(exact) if exact.exists() else {}).items():
            _same(scheme.tensor(name, F32), value)


@pytest.mark.parametrize("case", VECTORS, ids=_name)
def test_every_stored_tensor_is_used_dropped_or_kept(case: Path) -> None:
    with _opened(case) as (config, tensors):
        scheme = _find(config, tensors)
        stored = [n for names in scheme.consumed.values() for n in names] + list(scheme.dropped)
        assert len(stored) == len(set(stored)) and set(stored) <= tensors.keys()
        plain = scheme.plain(tensors)
        kept = tensors.keys() - set(stored)
        assert plain.keys() == kept | scheme.consumed.keys()
        assert all(plain[name] is tensors[name] for name in kept)
        assert all(plain[name].dtype == scheme.dtype for name in scheme.consumed)
        # What comes out is not quantised any more.
        after = scheme.plain_config(config)
        assert "quantization_config" not in json.dumps(after)
        assert quantised.find(after, plain) is None


@pytest.mark.parametrize("case", VECTORS, ids=_name)
def test_other_dtypes_are_the_f32_values_rounded_once(case: Path) -> None:
    with _opened(case) as (config, tensors):
        scheme = _find(config, tensors)
        for name in scheme.consumed:
            exact = torch.from_numpy(scheme.tensor(name, F32).numpy().copy())
            for dtype, other in ((BF16, torch.bfloat16), (F16, torch.float16)):
                _same(scheme.tensor(name, dtype), exact.to(other))


@pytest.mark.parametrize("case", VECTORS, ids=_name)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_range_of_bytes_is_the_slice_of_the_whole(case: Path, data: st.DataObject) -> None:
    with _opened(case) as (config, tensors):
        scheme = _find(config, tensors)
        for name in scheme.consumed:
            tensor = scheme.tensor(name, data.draw(st.sampled_from((F32, BF16))))
            whole = tensor.bytes()
            assert len(whole) == tensor.nbytes
            start = data.draw(st.integers(0, len(whole)))
            stop = data.draw(st.integers(start, len(whole) + 3))
            assert tensor.source.read(start, stop) == whole[start:stop]


@pytest.mark.parametrize("case", INVALID, ids=_name)
def test_a_broken_checkpoint_is_refused_by_name(case: Path) -> None:
    expect = _json(case / "expect.json")
    with _opened(case) as (config, tensors):
        if expect["when"] == "read":
            scheme = _find(config, tensors)
            with pytest.raises(AdapterpackError) as caught:
                for name in scheme.consumed:
                    scheme.tensor(name).bytes()
        else:
            with pytest.raises(AdapterpackError) as caught:
                quantised.find(config, tensors)
    assert caught.value.code == expect["error"], caught.value.message
    assert expect["message"] in caught.value.message
    assert len(caught.value.message) < 1000 and "\n" not in caught.value.message


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("case", ["fp8-block", "compressed-block", "modelopt", "mxfp4", "bnb-nf4-double", "bnb-int8"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_hostile_json_gives_one_of_our_errors_or_a_scheme(case: str, data: st.DataObject) -> None:
    with _opened(FORMAT / "vectors" / case) as (config, tensors):
        entry = config["quantization_config"]
        if data.draw(st.booleans()):
            entry = (
                config["quantization_config"]["config_groups"]["group_0"]["weights"]
                if "config_groups" in entry
                else entry
            )
        entry[data.draw(st.sampled_from([*entry, "weight_block_size", "format", "dtype"]))] = data.draw(_JSON)
        if data.draw(st.booleans()):
            config[data.draw(st.sampled_from(["dtype", "torch_dtype", "text_config", "model_type"]))] = data.draw(
                _JSON
            )
        for name, tensor in list(tensors.items()):
            if ".quant_state." in name:
                state = json.loads(tensor.bytes())
                state[data.draw(st.sampled_from(list(state)))] = data.draw(_JSON)
                blob = json.dumps(state).encode()
                tensors[name] = Tensor(tensor.dtype, (len(blob),), Memory(blob))
        try:
            scheme = quantised.find(config, tensors)
        except AdapterpackError as e:
            assert len(e.message) < 1000 and "\n" not in e.message
            return
        if scheme is not None:
            scheme.plain_config(config)
            for name in scheme.consumed:
                assert len(scheme.tensor(name).bytes()) == scheme.tensor(name).nbytes


def test_every_case_has_exactly_its_files() -> None:
    for case in VECTORS:
        names = {p.name for p in case.iterdir()} - {"exact.safetensors"}
        assert names == {"config.json", "model.safetensors", "expected.safetensors", "expect.json"}
    for case in INVALID:
        assert {p.name for p in case.iterdir()} == {*_json(case / "expect.json")["files"], "expect.json"}


# ---------------------------------------------------------------- what config.json says


def _fp8(shape: tuple[int, ...], block: tuple[int, int], seed: int = 0, dtype: Any = np.float32) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[(codes & 127) == 127] = 126
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    scale = (rng.random(grid) * 1e-2 + 1e-4).astype(dtype)
    return {"w.weight": from_numpy(codes.view(E4M3)), "w.weight_scale_inv": from_numpy(scale)}


def _config(block: Any, **fields: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}, **fields}


def test_a_plain_base_is_not_quantised() -> None:
    plain = {"w.weight": from_numpy(np.ones((2, 2), np.float32))}
    assert quantised.find({}, plain) is None
    assert quantised.find({"quantization_config": None}, plain) is None
    assert quantised.find({"quantization_config": {"quant_method": "gptq"}}, {}) is None


@pytest.mark.parametrize(
    ("config", "dtype", "after"),
    [
        ({"dtype": "float16"}, F16, {"dtype": "float16"}),
        ({"torch_dtype": "float32"}, F32, {"torch_dtype": "float32"}),
        ({"torch_dtype": "float8_e4m3fn"}, BF16, {"torch_dtype": "bfloat16"}),
        ({"dtype": None}, BF16, {"dtype": "bfloat16"}),
        ({}, BF16, {"torch_dtype": "bfloat16"}),
    ],
)
def test_the_dtype_is_that_of_config_json(config: dict[str, Any], dtype: Any, after: dict[str, Any]) -> None:
    tensors = _fp8((4, 8), (4, 8))
    scheme = _find(_config([4, 8], **config), tensors)
    assert scheme.dtype == dtype and scheme.tensor("w.weight").dtype == dtype
    assert scheme.plain_config(_config([4, 8], **config)) == after


def test_the_entry_may_stand_in_the_text_config() -> None:
    config = {"model_type": "x", "text_config": {**_config([4, 8]), "dtype": "float16", "a": 1}, "vision_config": {}}
    tensors = _fp8((4, 8), (4, 8))
    scheme = _find(config, tensors)
    assert scheme.dtype == F16
    plain = scheme.plain_config(config)
    assert plain == {"model_type": "x", "text_config": {"dtype": "float16", "a": 1}, "vision_config": {}}
    assert "quantization_config" in config["text_config"], "the argument was modified"
    with pytest.raises(Unsupported, match="differ"):
        quantised.find({**config, **_config([8, 8])}, tensors)
    assert quantised.find({**config, **_config([4, 8])}, tensors) is not None


def test_a_base_that_says_quantised_and_is_plain_is_refused() -> None:
    plain = {"w.weight": from_numpy(np.ones((2, 2), np.float32))}
    for entry in ({"quant_method": "fp8"}, {"load_in_4bit": True}, {"quant_method": "mxfp4"}):
        with pytest.raises(InvalidFile, match="no tensor is") as caught:
            quantised.find({"quantization_config": entry}, plain)
        assert caught.value.hint and "remove" in caught.value.hint


def test_what_cannot_be_dequantised_says_what_to_do() -> None:
    with pytest.raises(Unsupported) as caught:
        quantised.find({"quantization_config": {"quant_method": "gptq"}}, _fp8((4, 8), (4, 8)))
    assert caught.value.hint and "original" in caught.value.hint


def test_a_conv1d_of_bitsandbytes_is_refused_because_it_is_stored_transposed() -> None:
    name = "transformer.h.0.attn.c_attn"
    tensors = {
        f"{name}.weight": from_numpy(np.ones((6, 2), np.int8)),
        f"{name}.SCB": from_numpy(np.ones(6, np.float32)),
    }
    entry = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert quantised.find({"quantization_config": entry, "model_type": "llama"}, tensors) is not None
    with pytest.raises(Unsupported, match="transposed"):
        quantised.find({"quantization_config": entry, "model_type": "gpt2"}, tensors)


def test_f64_and_fp8_are_no_dtypes_to_dequantise_to() -> None:
    scheme = _find(_config([4, 8]), _fp8((4, 8), (4, 8)))
    for name in ("F64", "F8_E4M3", "I8"):
        with pytest.raises(Unsupported):
            scheme.tensor("w.weight", DTYPES[name])


# ---------------------------------------------------------------- transformers itself


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4"])
def test_transformers_loads_the_same_model(scheme: str, tmp_path: Path) -> None:
    """A whole directory, dequantised by `from_pretrained` and by us: the same names, shapes and bits.

    The unquantised names and shapes are those that transformers saves, not those that we think it does.
    """
    import transformers
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GptOssConfig, LlamaConfig, Mxfp4Config

    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "vocab_size": 32, "head_dim": 32}
    torch.manual_seed(0)
    if scheme == "fp8":
        config: Any = LlamaConfig(**small, tie_word_embeddings=False)
        entry: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
        entry["modules_to_not_convert"] = ["lm_head"]
        loading: Any = FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)
    else:
        config = GptOssConfig(**small, num_local_experts=3, num_experts_per_tok=1, layer_types=["full_attention"])
        entry, loading = {"quant_method": "mxfp4"}, Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    stored, rng = load_file(tmp_path / "plain" / "model.safetensors"), np.random.default_rng(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    for name in list(stored):
        if scheme == "fp8" and name.endswith("proj.weight"):
            codes = rng.integers(0, 126, shapes[name], dtype=np.uint8)
            grid = torch.tensor(
                rng.random((shapes[name][0] // 32, shapes[name][1] // 32)) * 1e-3, dtype=torch.float32
            )
            stored |= {name: torch.from_numpy(codes).view(torch.float8_e4m3fn), f"{name}_scale_inv": grid}
        elif scheme == "mxfp4" and name.endswith("_proj") and len(shapes[name]) == 3:
            experts, width, out = shapes[name]
            del stored[name]
            stored[f"{name}_blocks"] = torch.from_numpy(
                rng.integers(0, 256, (experts, out, width // 32, 16), dtype=np.uint8)
            )
            stored[f"{name}_scales"] = torch.from_numpy(
                rng.integers(115, 125, (experts, out, width // 32), dtype=np.uint8)
            )
    (tmp_path / "q").mkdir()
    save_file(stored, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "q" / "config.json").write_text(
        json.dumps({**_json(tmp_path / "plain" / "config.json"), "quantization_config": entry})
    )
    transformers.logging.set_verbosity_error()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", quantization_config=loading, dtype=torch.bfloat16)
    theirs = _parameters(loaded)
    with _opened(tmp_path / "q") as (json_config, tensors):
        found = _find(json_config, tensors)
        plain = found.plain(tensors)
        assert {n: t.shape for n, t in plain.items()} == shapes
        assert len(found.consumed) == (7 if scheme == "fp8" else 2)
        for name, tensor in plain.items():
            _same(tensor, theirs[name])


# ---------------------------------------------------------------- back to FP8


LAYOUTS = [
    ((10, 21), (4, 8), np.float32),
    ((3, 8, 16), (4, 8), np.float32),
    ((8, 16), (4, 8), ml_dtypes.bfloat16),
    ((8, 16), (4, 8), np.float16),
    ((6, 64), (1, 32), ml_dtypes.float8_e8m0fnu),
    ((6, 10), (1, 10), np.float32),
    ((6, 10), (6, 10), np.float32),
]


def _stored(new: dict[str, Any]) -> dict[str, Tensor]:
    return {name: from_numpy(array) for name, array in new.items()}


@pytest.mark.parametrize(("shape", "block", "dtype"), LAYOUTS, ids=str)
def test_requantising_what_was_read_changes_no_byte(shape: Any, block: Any, dtype: Any) -> None:
    tensors = _fp8(shape, block, dtype=np.float32 if dtype == ml_dtypes.float8_e8m0fnu else dtype)
    if dtype == ml_dtypes.float8_e8m0fnu:
        tensors["w.weight_scale_inv"] = from_numpy(
            tensors["w.weight_scale_inv"].numpy().astype(np.float32).astype(dtype)
        )
    scheme = _find(_config(list(block)), tensors)
    new = _stored(scheme.requantise("w.weight", scheme.tensor("w.weight", F32).numpy()))
    assert new.keys() == tensors.keys()
    assert all(new[name].equals(tensors[name]) for name in tensors)


@pytest.mark.parametrize(("shape", "block", "dtype"), LAYOUTS, ids=str)
def test_requantised_values_are_the_nearest_that_fp8_has(shape: Any, block: Any, dtype: Any) -> None:
    tensors = _fp8(shape, block)
    scale = tensors["w.weight_scale_inv"].numpy().astype(dtype)
    tensors["w.weight_scale_inv"] = from_numpy(scale)
    scheme, rng = _find(_config(list(block)), tensors), np.random.default_rng(1)
    values = rng.standard_normal(shape).astype(np.float32)
    values.reshape(-1)[:3] = 0
    new = _stored(scheme.requantise("w.weight", values))
    assert {n: (t.dtype, t.shape) for n, t in new.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
    again = _find(_config(list(block)), new)
    got = again.tensor("w.weight", F32).numpy()
    rows, columns = np.arange(shape[-2]) // block[0], np.arange(shape[-1]) // block[1]
    factor = new["w.weight_scale_inv"].numpy().astype(np.float32)[..., rows[:, None], columns[None, :]]
    # E4M3 has three bits after the point: half a step is 2^-4 of the value, or 2^-10 below the least normal one.
    bound = np.maximum(np.abs(values) * 2.0**-4, factor * 2.0**-10) * (1 + 1e-6)
    # A scale rounded down lets the largest value saturate, by no more than the scale's own rounding.
    bound += np.abs(values) * (2.0**-8 if dtype in (ml_dtypes.bfloat16, np.float16) else 1e-6)
    assert np.all(np.abs(got - values) <= bound)
    assert all(new[name].equals(t) for name, t in _stored(again.requantise("w.weight", got)).items())


def test_a_scale_is_amax_over_448_and_uses_the_whole_range() -> None:
    scheme = _find(_config([4, 8]), _fp8((8, 16), (4, 8)))
    values = np.random.default_rng(2).standard_normal((8, 16)).astype(np.float32)
    values[:4, :8] = 0
    new = scheme.requantise("w.weight", values)
    scale, codes = new["w.weight_scale_inv"], new["w.weight"].astype(np.float32)
    amax = np.abs(values.reshape(2, 4, 2, 8)).max(axis=(1, 3))
    assert scale[0, 0] == 1 and not codes[:4, :8].any()
    assert np.array_equal(scale.reshape(-1)[1:], (amax / np.float32(448)).reshape(-1)[1:])
    assert np.array_equal(np.abs(codes.reshape(2, 4, 2, 8)).max(axis=(1, 3)).reshape(-1)[1:], [448, 448, 448])


def test_only_the_blocks_that_changed_are_written_anew() -> None:
    tensors = _fp8((8, 16), (4, 8))
    scheme = _find(_config([4, 8]), tensors)
    values = scheme.tensor("w.weight", F32).numpy().copy()
    values[5, 12] *= 1.5
    new = _stored(scheme.requantise("w.weight", values))
    old, fresh = tensors["w.weight"].numpy().view(np.uint8), new["w.weight"].numpy().view(np.uint8)
    kept = np.ones((8, 16), bool)
    kept[4:, 8:] = False
    assert np.array_equal(old[kept], fresh[kept]) and not np.array_equal(old, fresh)
    same = tensors["w.weight_scale_inv"].numpy() == new["w.weight_scale_inv"].numpy()
    assert same.reshape(-1).tolist()[:3] == [True, True, True]


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-38, 1e-30])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e8m0fnu])
def test_tiny_and_huge_blocks_stay_finite(tiny: float, dtype: Any) -> None:
    tensors = _fp8((4, 16), (4, 8))
    tensors["w.weight_scale_inv"] = from_numpy(tensors["w.weight_scale_inv"].numpy().astype(dtype))
    scheme = _find(_config([4, 8]), tensors)
    values = np.full((4, 16), tiny, np.float32)
    values[:, 8:] = 3e38
    got = _find(_config([4, 8]), _stored(scheme.requantise("w.weight", values))).tensor("w.weight", F32).numpy()
    assert np.all(np.isfinite(got)) and np.all(np.abs(got[:, :8]) <= 2e-2)
    if dtype != np.float16:
        assert np.all(np.abs(got[:, 8:] / 3e38 - 1) <= 2.0**-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_not_written_as_fp8(bad: float) -> None:
    scheme = _find(_config([4, 8]), _fp8((4, 8), (4, 8)))
    values = np.zeros((4, 8), np.float32)
    values[1, 2] = bad
    with pytest.raises(Unsupported, match=r"w\.weight"):
        scheme.requantise("w.weight", values)


def test_only_fp8_is_written_back() -> None:
    for case in ("mxfp4", "bnb-nf4", "bnb-int8"):
        with _opened(FORMAT / "vectors" / case) as (config, tensors):
            scheme = _find(config, tensors)
            name = next(iter(scheme.consumed))
            with pytest.raises(Unsupported):
                scheme.requantise(name, scheme.tensor(name, F32).numpy())
    scheme = _find(_config([4, 8]), _fp8((4, 8), (4, 8)))
    for values in (np.zeros((8, 4), np.float32), np.zeros((4, 8), np.float64)):
        with pytest.raises(ValueError, match="float32"):
            scheme.requantise("w.weight", values)


# ---------------------------------------------------------------- memory and reading


class _Counted(Memory):
    """Bytes in memory that count how many of them are read."""

    read_bytes = 0

    def read(self, start: int, stop: int) -> bytes:
        type(self).read_bytes += stop - start
        return super().read(start, stop)


def _big(kind: str, experts: int = 4) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """About 8M values, zeros but for the scales."""
    u8, f32 = DTYPES["U8"], F32
    if kind == "fp8":
        scale = np.ones((16, 32), np.float32)
        weight = Tensor(DTYPES["F8_E4M3"], (2048, 4096), _Counted(bytes(2048 * 4096)))
        return _config([128, 128]), {"w.weight": weight, "w.weight_scale_inv": from_numpy(scale)}
    if kind == "mxfp4":
        shape = (experts, 1024, 64)
        tensors = {
            "w_blocks": Tensor(u8, (*shape, 16), _Counted(bytes(experts * 1024 * 64 * 16))),
            "w_scales": Tensor(u8, shape, Memory(b"\x7f" * (experts * 1024 * 64))),
        }
        return {"quantization_config": {"quant_method": "mxfp4"}}, tensors
    if kind == "int8":
        tensors = {
            "w.weight": Tensor(DTYPES["I8"], (2048, 4096), _Counted(bytes(2048 * 4096))),
            "w.SCB": Tensor(f32, (2048,), Memory(np.ones(2048, np.float32).tobytes())),
        }
        return {"quantization_config": {"load_in_8bit": True}}, tensors
    count, blocks = 2048 * 4096, 2048 * 64
    with _opened(FORMAT / "vectors" / "bnb-nf4") as (_, small):
        table = next(t.numpy() for n, t in small.items() if n.endswith("quant_map"))
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2048, 4096]}).encode()
    tensors = {
        "w.weight": Tensor(u8, (count // 2, 1), _Counted(bytes(count // 2))),
        "w.weight.absmax": Tensor(f32, (blocks,), Memory(np.ones(blocks, np.float32).tobytes())),
        "w.weight.quant_map": from_numpy(table),
        "w.weight.quant_state.bitsandbytes__nf4": Tensor(u8, (len(state),), Memory(state)),
    }
    return {"quantization_config": {"load_in_4bit": True}}, tensors


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "int8", "nf4"])
def test_a_few_rows_of_a_large_tensor_cost_a_few_rows(kind: str) -> None:
    config, tensors = _big(kind)
    scheme = _find(config, tensors)
    (name,) = scheme.consumed
    tensor = scheme.tensor(name)
    width = tensor.shape[-1] * 2
    tracemalloc.start()
    _Counted.read_bytes = 0
    data = tensor.source.read(100 * width, 116 * width)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) == 16 * width
    # MXFP4 is stored transposed: 16 rows are in every stored row of one expert, and of no other.
    assert _Counted.read_bytes <= (1024 * 64 * 16 if kind == "mxfp4" else 16 * width)
    assert peak < 4 << 20


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "int8", "nf4"])
def test_the_whole_tensor_costs_little_more_than_itself(kind: str) -> None:
    config, tensors = _big(kind)
    scheme = _find(config, tensors)
    (name,) = scheme.consumed
    tensor = scheme.tensor(name)
    tracemalloc.start()
    data = tensor.bytes()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) == 2 * 2048 * 4096
    # The result, its copy as bytes, and pieces of f32: a whole f32 copy would be 32 MiB more.
    assert peak < 2 * len(data) + (32 << 20)


def test_many_threads_read_the_same_values() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with _opened(FORMAT / "vectors" / "mxfp4") as (config, tensors):
        scheme = _find(config, tensors)
        (name, *_) = scheme.consumed
        tensor = scheme.tensor(name)
        whole = tensor.bytes()
        spans = [(a, a + 333) for a in range(0, len(whole), 111)]
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda span: tensor.source.read(*span), spans))
        assert parts == [whole[a:b] for a, b in spans]
