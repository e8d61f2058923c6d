"""Conversions between encodings, methods and dtypes: what they keep, what they say, what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cases
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import adapterpack
from adapterpack import methods
from adapterpack.containers import open_checkpoint
from adapterpack.errors import DestinationExists, LossRefused, Unsupported, UsageError, WrongBase
from adapterpack.methods import vblora
from adapterpack.methods._keys import render

ROOT = Path(__file__).parent.parent
FULL = [c for c in (*cases.VBLORA, *cases.WIDTHS) if c.name.startswith("full")]
TOPK = [c for c in (*cases.VBLORA, *cases.WIDTHS) if c.name.startswith("topk")]
PROJECTION = [c for c in cases.VERA if c.name.startswith("projection")]
SEED = [c for c in cases.VERA if c.name.startswith("seed")]


def vectors() -> Iterator[Path]:
    """Every vector under formats/ that is an adapter directory."""
    for config in sorted((ROOT / "formats").glob("*/vectors/**/adapter_config.json")):
        # What lies beside packs is of no method.
        if "apack" in config.parts:
            continue
        yield config.parent


def relative(merged, other, base, names) -> float:
    """The largest relative error of a change of W, dense, in float64."""
    worst = 0.0
    for name in names:
        w, x, y = (t[name].double() for t in (base, merged, other))
        if (x - w).norm():
            worst = max(worst, float((x - y).norm() / (x - w).norm()))
    return worst


def assert_loads_in_peft(workshop, base: Path, adapter: Path, original: Path | None = None) -> None:
    """Nothing missing and nothing unexpected beyond what the input itself had."""
    load = oracle.peft_load(base, adapter)[1]
    before = oracle.peft_load(base, original)[1] if original else oracle.LoadResult([], [], [])
    assert set(load.missing) <= set(before.missing)
    assert set(load.unexpected) <= set(before.unexpected)


def no_infinities(files, adapter: Path) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in files.tensors(adapter).values() if t.is_floating_point())


# -- parse and render --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", vectors(), ids=lambda p: "/".join(p.relative_to(ROOT / "formats").parts))
def test_render_of_parse_is_the_checkpoint_itself(path: Path) -> None:
    with open_checkpoint(path) as c:
        _, adapter = methods.parse(c)
        rendered = render(adapter)
        assert rendered.config == c.config
        assert list(rendered.config) == list(c.config)
        assert rendered.metadata == c.metadata
        assert rendered.tensors.keys() == c.tensors.keys()
        assert all(rendered.tensors[k] is c.tensors[k] for k in c.tensors)
        assert rendered.weights is c.weights
        assert set(rendered.files) == set(c.files)


@pytest.mark.parametrize("case", [*cases.LORA, *cases.VBLORA, *cases.VERA], ids=str)
def test_every_tensor_that_peft_writes_has_its_place(case, workshop) -> None:
    with open_checkpoint(workshop.adapter(case)) as c:
        _, adapter = methods.parse(c)
        assert not adapter.extra
        assert sorted(p.key for p in adapter.params()) == sorted(c.tensors)


@pytest.mark.parametrize("name", ["linear-llama", "full-k2", "topk-k2", "projection-mixed", "seed-mixed"])
def test_conversion_to_what_it_is_already_gives_the_very_files(name, workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair(name)
    with open_checkpoint(adapter) as c:
        encoding = methods.parse(c)[1].encoding
    result = adapterpack.convert(adapter, tmp_path / "c", to=encoding, warm_start=False)
    assert oracle.tree_hash(tmp_path / "c") == oracle.tree_hash(adapter)
    assert (result.grade, result.max_rel_error, result.bytes_out) == ("lossless", 0, oracle.adapter_bytes(adapter))
    assert result.notes


# -- VB-LoRA: full logits to top-k -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, dtype", [(c, d) for c in FULL for d in ("f32", "bf16") if d == "f32" or c not in cases.WIDTHS], ids=str
)
def test_full_logits_to_topk(case, dtype, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case, dtype), workshop.base_of(case)
    before = oracle.tree_hash(adapter)
    result = adapterpack.convert(adapter, tmp_path / "k", to="topk")
    assert oracle.tree_hash(adapter) == before
    assert (result.grade, result.encoding, result.method) == ("equivalent", "topk", "vblora")
    assert any("logits" in d and "training" in d for d in result.dropped)
    assert result.max_rel_error <= 2e-6
    assert_loads_in_peft(workshop, base, tmp_path / "k", adapter)
    full, topk = workshop.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "k")
    plain = files.tensors(base)
    assert not any(torch.isnan(t).any() for t in topk.values())
    assert relative(full, topk, plain, plain) <= 2e-6
    config = files.config(adapter)
    assert files.config(tmp_path / "k") == config | {"save_only_topk_weights": True}
    h, k = config["num_vectors"], config["topk"]
    for key, t in files.tensors(tmp_path / "k").items():
        if key.endswith("_topk_indices"):
            assert t.dtype == (torch.uint8 if h < 256 else torch.int16 if h < 32768 else torch.int32)
            assert t.shape[-1] == k
        elif key.endswith("_topk_weights"):
            assert (t.dtype, t.shape[-1]) == (torch.float32, k - 1)
            assert not (1 - t.sum(-1) < 0).any()
        elif "vblora" in key:
            assert key == "base_model.vblora_vector_bank"
    assert no_infinities(files, tmp_path / "k")


@pytest.mark.parametrize("case", [c for c in FULL if "vectors" not in c.name], ids=str)
def test_indices_are_those_that_peft_itself_would_save(case, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    adapterpack.convert(adapter, tmp_path / "ours", to="topk")
    model, _ = oracle.peft_load(base, adapter)
    model.peft_config["default"].save_only_topk_weights = True
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = files.tensors(tmp_path / "ours"), files.tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert (ours[key].dtype, ours[key].shape) == (theirs[key].dtype, theirs[key].shape)
        if key.endswith("_topk_indices"):
            assert torch.equal(ours[key], theirs[key])
        else:
            assert torch.allclose(ours[key], theirs[key], atol=3e-7)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("case", cases.NARROW_VBLORA, ids=str)
def test_16_bit_logits_with_ties_to_topk(case, dtype, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case, dtype), workshop.base_of(case)
    adapterpack.convert(adapter, tmp_path / "k", to="topk")
    full, topk = oracle.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "k")
    plain = files.tensors(base)
    assert relative(full, topk, plain, plain) <= 2e-6
    weights = [t for k, t in files.tensors(tmp_path / "k").items() if k.endswith("_topk_weights")]
    assert {t.dtype for t in weights} == {torch.float32}


@pytest.mark.parametrize("k", [2, 3, 4, 6])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 20.0, 400.0])
def test_peaked_logits_never_load_as_nan(k, spread, workshop, files, tmp_path: Path) -> None:
    """Many sub-vectors at every spread: PEFT's own saver writes some whose last weight is negative."""
    adapter, base = workshop.pair("full-k2")
    g = torch.Generator().manual_seed(k)
    logits = {
        key: torch.rand(t.shape, generator=g) * spread for key, t in files.tensors(adapter).items() if "logits" in key
    }
    peaked = files.edited(adapter, tmp_path / "full", logits, {"topk": k})
    adapterpack.convert(peaked, tmp_path / "k", to="topk")
    full, topk = oracle.peft_merge(base, peaked), oracle.peft_merge(base, tmp_path / "k")
    plain = files.tensors(base)
    assert all(bool(torch.isfinite(t).all()) for t in topk.values())
    assert relative(full, topk, plain, plain) <= 2e-6


@st.composite
def softmax_rows(draw: st.DrawFn) -> np.ndarray:
    k = draw(st.integers(1, 9))
    logits = draw(
        st.lists(st.lists(st.floats(-120, 120), min_size=k, max_size=k).map(sorted), min_size=1, max_size=20)
    )
    x = np.array(logits, dtype=np.float64).reshape(len(logits), k)[:, ::-1]
    w = np.exp(x - x[:, :1])
    return w / w.sum(-1, keepdims=True)


@given(softmax_rows(), st.randoms(use_true_random=False))
def test_the_recovered_weight_is_never_negative_in_any_order_of_summation(rows: np.ndarray, random) -> None:
    weights = vblora.safe_weights(rows)
    assert weights.dtype == np.float32
    assert (weights >= 0).all()
    terms = weights.shape[1]
    for _ in range(6):
        order = random.sample(range(terms), terms)
        total = np.zeros(len(weights), np.float32)
        for j in order:
            total = total + weights[:, j]
        assert total.dtype == np.float32
        assert (np.float32(1) - total >= 0).all()
    # Pairwise, as vectorised sums go, and torch's own.
    halves = weights[:, : terms // 2].sum(-1, dtype=np.float32) + weights[:, terms // 2 :].sum(-1, dtype=np.float32)
    assert (np.float32(1) - halves >= 0).all()
    assert (1 - torch.from_numpy(weights).sum(-1) >= 0).all()
    # And nothing moved by more than a few roundings.
    assert np.abs(weights - rows[:, :-1]).max(initial=0) <= (terms + 2) * 2.0**-24


def test_logits_that_are_not_finite_are_refused(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("full-k2")
    key = next(k for k in files.tensors(adapter) if "logits" in k)
    logits = files.tensors(adapter)[key].clone()
    logits[0, 0, 0] = float("-inf")
    broken = files.edited(adapter, tmp_path / "a", {key: logits})
    with pytest.raises(adapterpack.AdapterpackError, match="infinite"):
        adapterpack.convert(broken, tmp_path / "k", to="topk")
    assert not (tmp_path / "k").exists()


# -- VB-LoRA: top-k to full logits -------------------------------------------------------------------------


@pytest.mark.parametrize("case", TOPK, ids=str)
def test_topk_to_full_logits_is_refused_without_warm_start(case, workshop, tmp_path: Path) -> None:
    with pytest.raises(LossRefused, match="gone") as e:
        adapterpack.convert(workshop.adapter(case), tmp_path / "f", to="full-logits")
    assert e.value.exit_code == 4
    assert "--warm-start" in e.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("case", TOPK, ids=str)
def test_warm_start_computes_the_same_bits(case, dtype, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case, dtype)
    result = adapterpack.convert(adapter, tmp_path / "f", to="full-logits", warm_start=True)
    assert (result.grade, result.encoding) == ("equivalent", "full-logits")
    assert any("not a resume" in note for note in result.notes)
    assert_loads_in_peft(workshop, base, tmp_path / "f", adapter)
    topk, full = workshop.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "f")
    assert all(files.same(full[k], topk[k]) for k in topk)
    assert no_infinities(files, tmp_path / "f")
    config = files.config(adapter)
    assert files.config(tmp_path / "f") == config | {"save_only_topk_weights": False}


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_kept_weight_of_zero_gets_minus_200_and_the_rest_lies_one_below(k, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("full-k2")
    g = torch.Generator().manual_seed(5)
    peaks = {
        key: torch.rand(t.shape, generator=g) * 3000 for key, t in files.tensors(adapter).items() if "logits" in key
    }
    full = files.edited(adapter, tmp_path / "full", peaks, {"topk": k})
    adapterpack.convert(full, tmp_path / "k", to="topk")
    adapterpack.convert(tmp_path / "k", tmp_path / "warm", to="full-logits", warm_start=True)
    old, new = files.tensors(tmp_path / "k"), files.tensors(tmp_path / "warm")
    zeros = 0
    for key in [k for k in new if "logits" in k]:
        indices = old[f"{key}_topk_indices"].long()
        weights = old[f"{key}_topk_weights"]
        weights = torch.cat([weights, (1 - weights.sum(-1, keepdim=True)).clamp_min(0)], -1)
        kept = new[key].gather(-1, indices)
        zeros += int((weights == 0).sum())
        assert (kept[weights == 0] == -200).all()
        assert torch.equal(kept[weights > 0], torch.log(weights[weights > 0]))
        assert (kept.softmax(-1)[weights == 0] == 0).all()
        others = new[key].scatter(-1, indices, float("nan"))
        floor = (kept.amin(-1, keepdim=True) - 1).expand_as(others)
        assert torch.equal(others[~others.isnan()], floor[~others.isnan()])
    assert zeros, "no weight of zero: the case proves nothing"
    a, b = oracle.peft_merge(base, tmp_path / "k"), oracle.peft_merge(base, tmp_path / "warm")
    assert all(files.same(a[name], b[name]) for name in a)
    assert no_infinities(files, tmp_path / "warm")


def test_a_warm_start_can_be_trained_and_a_topk_file_cannot(workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair("topk-k2")
    adapterpack.convert(adapter, tmp_path / "warm", to="full-logits", warm_start=True)
    ids = torch.tensor([[1, 2, 3]])
    frozen, _ = oracle.peft_load(base, adapter, trainable=True)
    with pytest.raises(RuntimeError):
        frozen.train()(ids)
    model, _ = oracle.peft_load(base, tmp_path / "warm", trainable=True)
    loss = model.train()(ids).logits.square().sum()
    loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "vblora" in n]
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    assert any(bool(g.any()) for g in gradients)


def test_warm_start_goes_with_full_logits_only(workshop, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        adapterpack.convert(workshop.pair("full-k2")[0], tmp_path / "x", to="topk", warm_start=True)


# -- VeRA: projections and seed ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", PROJECTION, ids=str)
def test_projections_to_seed_and_back_is_bit_exact(case, dtype, workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(case, dtype)
    result = adapterpack.convert(adapter, tmp_path / "seed", to="seed")
    assert (result.grade, result.encoding, result.max_rel_error) == ("lossless", "seed", 0)
    through = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[dtype]
    assert any(through in note and "AVX2" in note for note in result.notes)
    seeded = files.tensors(tmp_path / "seed")
    assert not any("vera_A" in k or "vera_B" in k for k in seeded)
    assert files.config(tmp_path / "seed") == files.config(adapter) | {"save_projection": False}
    recipe = json.loads(files.metadata(tmp_path / "seed")["adapterpack"])["recipe"]
    assert (recipe["generator"], recipe["arithmetic"]) == ("mt19937", "fused")
    assert recipe["through"] == {"f32": "F32", "bf16": "BF16", "f16": "F16"}[dtype]
    assert [d["name"] for d in recipe["draws"]] == ["vera_A", "vera_B"]
    assert sorted(recipe["sha256"]) == ["vera_A", "vera_B"]
    assert files.metadata(tmp_path / "seed")["format"] == "pt"
    back = adapterpack.convert(tmp_path / "seed", tmp_path / "back", to="projection")
    assert back.grade == "lossless"
    old, new = files.tensors(adapter), files.tensors(tmp_path / "back")
    assert old.keys() == new.keys()
    assert all(files.same(old[k], new[k]) for k in old)
    assert files.config(tmp_path / "back") == files.config(adapter)
    assert files.metadata(tmp_path / "back") == files.metadata(adapter)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", ["projection-mixed", "projection-conv1d", "projection-opt"])
def test_stock_peft_redraws_the_same_on_the_named_base_dtype(name, dtype, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name, dtype)
    adapterpack.convert(adapter, tmp_path / "seed", to="seed")
    assert_loads_in_peft(workshop, base, tmp_path / "seed", adapter)
    a, b = workshop.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "seed")
    assert all(files.same(a[k], b[k]) for k in a)


@pytest.mark.parametrize("case", cases.NARROW_VERA, ids=str)
def test_16_bit_projections_to_seed_and_back(case, workshop, files, tmp_path: Path) -> None:
    adapter = workshop.adapter(case, "bf16")
    adapterpack.convert(adapter, tmp_path / "seed", to="seed")
    adapterpack.convert(tmp_path / "seed", tmp_path / "back", to="projection")
    old, new = files.tensors(adapter), files.tensors(tmp_path / "back")
    assert all(files.same(old[k], new[k]) for k in old)


def altered(files, adapter: Path, where: Path, by: float) -> Path:
    a = files.tensors(adapter)["base_model.vera_A"].clone()
    a[3, 3] += by
    return files.edited(adapter, where, {"base_model.vera_A": a})


def test_projections_that_no_recipe_gives_are_refused(workshop, files, tmp_path: Path) -> None:
    odd = altered(files, workshop.pair("projection-mixed")[0], tmp_path / "a", 1e-6)
    with pytest.raises(LossRefused, match="bit for bit") as e:
        adapterpack.convert(odd, tmp_path / "seed", to="seed")
    assert e.value.exit_code == 4
    assert "--max-error" in e.value.hint
    assert not (tmp_path / "seed").exists()


def test_another_key_in_the_config_is_refused(workshop, files, tmp_path: Path) -> None:
    """PEFT says nothing here: the file's tensors win while the flag is true."""
    adapter, _ = workshop.pair("projection-mixed")
    odd = files.edited(adapter, tmp_path / "a", config={"projection_prng_key": 5})
    with pytest.raises(LossRefused):
        adapterpack.convert(odd, tmp_path / "seed", to="seed")
    with pytest.raises(LossRefused):
        adapterpack.convert(odd, tmp_path / "seed", to="seed", max_error=0.5)


def test_near_projections_go_within_the_error_and_say_how_far(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("projection-mixed")
    odd = altered(files, adapter, tmp_path / "a", 1e-2)
    with pytest.raises(LossRefused, match="would move"):
        adapterpack.convert(odd, tmp_path / "seed", to="seed", max_error=1e-7, base=base)
    result = adapterpack.convert(odd, tmp_path / "seed", to="seed", max_error=1e-1, base=base)
    assert result.grade == "approximate"
    assert 1e-7 < result.max_rel_error < 1e-1
    plain = files.tensors(base)
    merged = workshop.peft_merge(base, odd), oracle.peft_merge(base, tmp_path / "seed")
    measured = relative(*merged, plain, plain)
    assert measured == pytest.approx(result.max_rel_error, rel=1e-2)
    adapterpack.convert(tmp_path / "seed", tmp_path / "back", to="projection")
    assert files.same(
        files.tensors(tmp_path / "back")["base_model.vera_A"], files.tensors(adapter)["base_model.vera_A"]
    )


TWO_ROUNDINGS = """
import sys
sys.path.insert(0, sys.argv[1])
import oracle, torch
from peft import VeraConfig
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
torch.set_num_threads(1)
config = VeraConfig(r=8, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"])
oracle.make_adapter(sys.argv[3], config, base=oracle.load_base(sys.argv[2]), scale=0.3)
"""


@pytest.fixture(scope="module")
def drawn_without_fma(workshop, tmp_path_factory) -> Path:
    """A VeRA adapter that PEFT wrote in torch's code path without fused multiply-add."""
    where = tmp_path_factory.mktemp("default-path") / "a"
    subprocess.run(
        [sys.executable, "-c", TWO_ROUNDINGS, str(Path(__file__).parent), str(workshop.base("llama")), str(where)],
        check=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
    )
    return where


def test_projections_of_two_roundings_are_recognised(drawn_without_fma, workshop, files, tmp_path: Path) -> None:
    fused, _ = workshop.pair("projection-mixed")
    key = "base_model.vera_A"
    assert not torch.equal(files.tensors(drawn_without_fma)[key], files.tensors(fused)[key])
    result = adapterpack.convert(drawn_without_fma, tmp_path / "seed", to="seed")
    assert result.grade == "lossless"
    assert any("without fused" in note for note in result.notes)
    assert json.loads(files.metadata(tmp_path / "seed")["adapterpack"])["recipe"]["arithmetic"] == "two-roundings"
    adapterpack.convert(tmp_path / "seed", tmp_path / "back", to="projection")
    old, new = files.tensors(drawn_without_fma), files.tensors(tmp_path / "back")
    assert all(files.same(old[k], new[k]) for k in old)


@pytest.mark.parametrize("name", ["seed-mixed", "seed-conv1d", "seed-opt", "seed-bert"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("what", ["headers", "config.json"])
def test_seed_to_projections_from_the_shapes_of_the_base(name, dtype, what, workshop, files, tmp_path: Path) -> None:
    """What PEFT's twin with stored projections has, bit for bit; no weights are read."""
    adapter, base = workshop.pair(name, dtype)
    twin, _ = workshop.pair(name.replace("seed", "projection"), dtype)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base / "config.json", bare)
    if what == "headers":
        weights = base / "model.safetensors"
        header = files.header(weights)
        # The right header over the right length, and not one weight.
        (bare / "model.safetensors").write_bytes(header)
        os.truncate(bare / "model.safetensors", weights.stat().st_size)
    result = adapterpack.convert(adapter, tmp_path / "p", to="projection", base=bare)
    assert any("unverified" in note for note in result.notes)
    ours, theirs = files.tensors(tmp_path / "p"), files.tensors(twin)
    assert all(files.same(ours[k], theirs[k]) for k in ("base_model.vera_A", "base_model.vera_B"))
    assert files.config(tmp_path / "p")["save_projection"] is True
    assert_loads_in_peft(workshop, base, tmp_path / "p", adapter)
    a, b = workshop.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "p")
    assert all(files.same(a[k], b[k]) for k in a)


def test_base_dtype_is_asked_for_where_the_base_does_not_tell(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("seed-mixed", "bf16")
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((base / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    (bare / "config.json").write_text(json.dumps(config))
    with pytest.raises(WrongBase, match="dtype") as e:
        adapterpack.convert(adapter, tmp_path / "p", to="projection", base=bare)
    assert "--base-dtype" in e.value.hint
    for said, trained in (("bfloat16", "bf16"), ("float32", "f32")):
        adapterpack.convert(adapter, tmp_path / said, to="projection", base=bare, base_dtype=said)
        twin, _ = workshop.pair("projection-mixed", trained)
        key = "base_model.vera_A"
        assert files.same(files.tensors(tmp_path / said)[key], files.tensors(twin)[key])


def test_base_dtype_outranks_the_base(workshop, files, tmp_path: Path) -> None:
    """Trained on bf16, now only the f32 base is at hand."""
    adapter, _ = workshop.pair("seed-mixed", "bf16")
    base = workshop.base_of(cases.BY_NAME["seed-mixed"], "f32")
    adapterpack.convert(adapter, tmp_path / "p", to="projection", base=base, base_dtype="bfloat16")
    twin, _ = workshop.pair("projection-mixed", "bf16")
    key = "base_model.vera_B"
    assert files.same(files.tensors(tmp_path / "p")[key], files.tensors(twin)[key])


def test_seed_without_any_base_is_refused_and_never_guessed(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("seed-mixed")
    alone = files.edited(adapter, tmp_path / "a", config={"base_model_name_or_path": None})
    for to in ("projection", "lora"):
        with pytest.raises(WrongBase, match="shapes") as e:
            adapterpack.convert(alone, tmp_path / "p", to=to)
        assert "--base" in e.value.hint
    assert not (tmp_path / "p").exists()


def test_a_recorded_recipe_that_was_tampered_with_is_found(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("projection-mixed")
    adapterpack.convert(adapter, tmp_path / "seed", to="seed")
    metadata = files.metadata(tmp_path / "seed")
    record = json.loads(metadata["adapterpack"])
    record["recipe"]["seed"] += 1
    metadata["adapterpack"] = json.dumps(record)
    save_file(files.tensors(tmp_path / "seed"), tmp_path / "seed" / "adapter_model.safetensors", metadata=metadata)
    with pytest.raises(adapterpack.AdapterpackError, match="another vera_A"):
        adapterpack.convert(tmp_path / "seed", tmp_path / "p", to="projection")


# -- to plain LoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", cases.VERA, ids=str)
def test_vera_to_lora_merges_to_the_same_bits(case, dtype, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case, dtype), workshop.base_of(case, dtype)
    result = adapterpack.convert(adapter, tmp_path / "l", to="lora", base=base)
    assert (result.method, result.grade, result.max_rel_error) == ("lora", "equivalent", 0)
    _assert_plain_lora(workshop, files, tmp_path / "l", adapter, base)
    a, b = workshop.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "l")
    assert all(files.same(a[k], b[k]) for k in a)


@pytest.mark.parametrize("case", [*cases.VBLORA, *cases.WIDTHS], ids=str)
def test_vblora_to_lora_needs_no_base_and_is_the_same_change(case, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    alone = files.edited(adapter, tmp_path / "a", config={"base_model_name_or_path": None})
    result = adapterpack.convert(alone, tmp_path / "l", to="lora")
    assert (result.method, result.grade) == ("lora", "equivalent")
    assert result.max_rel_error <= 1e-6
    _assert_plain_lora(workshop, files, tmp_path / "l", adapter, base)
    plain = files.tensors(base)
    a, b = workshop.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "l")
    assert relative(a, b, plain, plain) <= 1e-6


def _assert_plain_lora(workshop, files, lora: Path, adapter: Path, base: Path) -> None:
    config = files.config(lora)
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == config["r"] == files.config(adapter)["r"]
    own = [k for k in files.tensors(lora) if "vera" in k or "vblora" in k]
    assert not own
    assert_loads_in_peft(workshop, base, lora, adapter)
    health = adapterpack.check(lora, base=base)
    assert health.healthy and {f.code for f in health.findings} <= {"base-reference", "full-weights"}, health.findings


def test_vera_to_lora_from_config_json_alone(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("projection-opt")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base / "config.json", bare)
    adapterpack.convert(adapter, tmp_path / "l", to="lora", base=bare)
    a, b = workshop.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "l")
    assert all(files.same(a[k], b[k]) for k in a)


def test_vera_to_lora_uses_the_local_base_that_the_adapter_names_and_says_so(workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair("projection-mixed")
    result = adapterpack.convert(adapter, tmp_path / "l", to="lora")
    assert any(str(base) in note for note in result.notes)


def test_vera_to_lora_without_shapes_is_refused_with_the_hint(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("projection-mixed")
    alone = files.edited(adapter, tmp_path / "a", config={"base_model_name_or_path": None})
    with pytest.raises(WrongBase, match="shapes") as e:
        adapterpack.convert(alone, tmp_path / "l", to="lora")
    assert "--base" in e.value.hint
    assert not (tmp_path / "l").exists()


def test_vera_to_lora_with_another_base_is_refused(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("projection-mixed")
    with pytest.raises(WrongBase, match="lacks"):
        adapterpack.convert(adapter, tmp_path / "l", to="lora", base=workshop.base("gpt2"))


@pytest.mark.parametrize("name", ["full-k2", "projection-mixed"])
def test_the_card_says_the_new_method_and_nothing_else_of_it_changes(name, workshop, files, tmp_path: Path) -> None:
    adapter = shutil.copytree(workshop.pair(name)[0], tmp_path / "a")
    method = files.config(adapter)["peft_type"].lower()
    card = (
        f"---\nlibrary_name: peft\ntags:\n- {method}\n- mine\n---\n\n# Mine\n\nTrained with {method}.\n- {method}\n"
    )
    (adapter / "README.md").write_text(card)
    adapterpack.convert(adapter, tmp_path / "l", to="lora")
    assert (tmp_path / "l" / "README.md").read_text() == card.replace(f"- {method}\n", "- lora\n", 1)


# -- dtype -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["bfloat16", "float16", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["linear-llama", "dora-linear", "full-k2", "topk-k3", "projection-mixed"])
def test_a_cast_that_changes_values_is_refused_without_max_error(name, to, workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair(name)
    with pytest.raises(LossRefused, match="would move") as e:
        adapterpack.convert(adapter, tmp_path / "c", dtype=to)
    assert "--max-error" in e.value.hint
    assert list(tmp_path.iterdir()) == []
    assert adapterpack.convert(adapter, tmp_path / "c", dtype=to, max_error=0.5).grade == "approximate"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["linear-llama", "conv1d", "embedding-llama", "patterns-rslora", "full-k2", "topk-k3", "projection-mixed"]
)
def test_a_cast_within_max_error_is_measured_right(name, dtype, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    # Rounded logits choose other vectors, so full logits move far: that too is measured, not guessed.
    result = adapterpack.convert(adapter, tmp_path / "c", dtype=dtype, max_error=0.5, base=base)
    assert_loads_in_peft(workshop, base, tmp_path / "c", adapter)
    plain = files.tensors(base)
    merged = workshop.peft_merge(base, adapter), oracle.peft_merge(base, tmp_path / "c")
    assert relative(*merged, plain, plain) == pytest.approx(result.max_rel_error, rel=0.02)
    with pytest.raises(LossRefused):
        adapterpack.convert(adapter, tmp_path / "d", dtype=dtype, max_error=result.max_rel_error * 0.99, base=base)


def test_a_cast_that_changes_no_value_is_equivalent(workshop, files, tmp_path: Path) -> None:
    narrow = workshop.adapter(cases.BY_NAME["narrow-linear"], "bf16")
    up = adapterpack.convert(narrow, tmp_path / "up", dtype="float32")
    assert (up.grade, up.max_rel_error) == ("equivalent", 0)
    down = adapterpack.convert(tmp_path / "up", tmp_path / "down", dtype="bfloat16")
    assert (down.grade, down.max_rel_error) == ("equivalent", 0)
    old, new = files.tensors(narrow), files.tensors(tmp_path / "down")
    assert all(files.same(old[k], new[k]) for k in old)
    same = adapterpack.convert(narrow, tmp_path / "same", dtype="bfloat16")
    assert same.grade == "lossless"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_topk_weights_are_never_cast(dtype, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("topk-k3")
    result = adapterpack.convert(adapter, tmp_path / "c", dtype=dtype, max_error=0.05)
    for key, t in files.tensors(tmp_path / "c").items():
        wanted = torch.float32 if key.endswith("_topk_weights") else getattr(torch, dtype)
        assert t.dtype == wanted or key.endswith("_topk_indices")
    assert any("F32" in note for note in result.notes)
    assert_loads_in_peft(workshop, base, tmp_path / "c", adapter)
    full = adapterpack.convert(workshop.pair("full-k3")[0], tmp_path / "f", to="topk", dtype=dtype, max_error=0.05)
    assert full.grade == "approximate"
    kinds = {k.rpartition("_")[2]: t.dtype for k, t in files.tensors(tmp_path / "f").items() if "topk" in k}
    assert kinds["weights"] == torch.float32


def test_float16_that_overflows_is_refused_whatever_the_bound(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    large = files.edited(adapter, tmp_path / "a", {key: files.tensors(adapter)[key] * 1e6})
    with pytest.raises(LossRefused):
        adapterpack.convert(large, tmp_path / "c", dtype="float16", max_error=1e9)


@pytest.mark.parametrize(
    "name", ["saved-embeddings-changed", "modules-to-save-head", "bias-all-opt", "token-rows-list"]
)
def test_a_cast_leaves_replaced_tensors_alone(name, workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair(name)
    adapterpack.convert(adapter, tmp_path / "c", dtype="bfloat16", max_error=0.05)
    old, new = files.tensors(adapter), files.tensors(tmp_path / "c")
    replaced = [k for k in old if "lora_" not in k]
    assert replaced
    assert all(files.same(old[k], new[k]) for k in replaced)


@pytest.mark.parametrize("dtype", ["int8", "float8", ""])
def test_unknown_dtypes_are_wrong_usage(dtype, workshop, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        adapterpack.convert(workshop.pair("linear-llama")[0], tmp_path / "c", dtype=dtype)


# -- in general --------------------------------------------------------------------------------------------

CONVERSIONS = {
    "full-k3 topk": ("full-k3", {"to": "topk"}),
    "full-k2 lora": ("full-k2", {"to": "lora"}),
    "topk-k3 full": ("topk-k3", {"to": "full-logits", "warm_start": True}),
    "projection seed": ("projection-mixed", {"to": "seed"}),
    "projection lora": ("projection-mixed", {"to": "lora"}),
    "seed projection": ("seed-mixed", {"to": "projection"}),
    "lora bf16": ("linear-llama", {"dtype": "bfloat16", "max_error": 0.1}),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_are_deterministic_and_leave_their_input_alone(name, workshop, tmp_path: Path) -> None:
    source, how = CONVERSIONS[name]
    adapter, base = workshop.pair(source)
    before = oracle.tree_hash(adapter), oracle.tree_hash(base)
    results = [adapterpack.convert(adapter, tmp_path / x, base=base, **how) for x in ("one", "two")]
    assert oracle.tree_hash(tmp_path / "one") == oracle.tree_hash(tmp_path / "two")
    assert before == (oracle.tree_hash(adapter), oracle.tree_hash(base))
    assert results[0].bytes_in == oracle.adapter_bytes(adapter)
    assert results[0].bytes_out == oracle.adapter_bytes(tmp_path / "one")


@pytest.mark.parametrize("name", CONVERSIONS)
def test_dry_run_tells_the_same_and_writes_nothing(name, workshop, tmp_path: Path) -> None:
    source, how = CONVERSIONS[name]
    adapter, base = workshop.pair(source)
    dry = adapterpack.convert(adapter, tmp_path / "c", base=base, dry_run=True, **how)
    assert list(tmp_path.iterdir()) == []
    assert dry == adapterpack.convert(adapter, tmp_path / "c", base=base, **how)


def test_verify_agrees_with_every_conversion(workshop, tmp_path: Path) -> None:
    for n, (source, how) in enumerate(CONVERSIONS.values()):
        adapter, base = workshop.pair(source)
        adapterpack.convert(adapter, tmp_path / str(n), base=base, **how)
        result = adapterpack.verify(adapter, tmp_path / str(n), base=base, max_error=how.get("max_error", 2e-6))
        assert result.equal, (source, how, result.findings, result.max_rel_error)


def test_an_existing_destination_is_refused_and_overwrite_replaces_it(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("full-k2")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "old").write_text("old")
    with pytest.raises(DestinationExists):
        adapterpack.convert(adapter, tmp_path / "c", to="topk")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["old"]
    adapterpack.convert(adapter, tmp_path / "c", to="topk", overwrite=True)
    assert not (tmp_path / "c" / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("target", [".", "..", "inner/.."])
def test_overwrite_never_replaces_the_source(target, workshop, tmp_path: Path) -> None:
    adapter = shutil.copytree(workshop.pair("full-k2")[0], tmp_path / "x" / "a")
    (adapter / "inner").mkdir()
    before = oracle.tree_hash(tmp_path)
    with pytest.raises(adapterpack.AdapterpackError):
        adapterpack.convert(adapter, adapter / target, to="topk", overwrite=True)
    assert before == oracle.tree_hash(tmp_path)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.gguf", "x.npz"])
def test_a_file_name_is_no_destination_yet(name, workshop, tmp_path: Path) -> None:
    with pytest.raises(adapterpack.AdapterpackError):
        adapterpack.convert(workshop.pair("full-k2")[0], tmp_path / name, to="topk")
    assert list(tmp_path.iterdir()) == []


def test_conversions_that_do_not_exist_are_refused_with_those_that_do(workshop, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="cannot become 'seed'") as e:
        adapterpack.convert(workshop.pair("full-k2")[0], tmp_path / "c", to="seed")
    assert "topk" in e.value.hint
    with pytest.raises(UsageError):
        adapterpack.convert(workshop.pair("full-k2")[0], tmp_path / "c")


@pytest.mark.parametrize("case", [c for c in vectors() if c.parent.parent.name == "peft"], ids=lambda p: p.name)
def test_odd_keys_survive_conversions(case: Path, files, tmp_path: Path) -> None:
    """`.default.` in keys, the second spelling of shared keys, unknown keys: kept where they stay parameters."""
    expect = json.loads((case.parent if case.name == "user-7" else case).joinpath("expect.json").read_text())
    shapes = expect["base"]
    bare = oracle.save_base(oracle.tiny_model(shapes["kind"], **shapes["config"]), tmp_path / "base")
    known = {"LORA": "lora", "VBLORA": "topk", "VERA": "seed"}[files.config(case)["peft_type"]]
    result = adapterpack.convert(case, tmp_path / "c", to=known, base=bare)
    old, new = files.tensors(case), files.tensors(tmp_path / "c")
    if known == "lora":
        assert old.keys() == new.keys()
    assert adapterpack.verify(case, tmp_path / "c", base=bare).equal
    assert result.max_rel_error <= 2e-6
    cast = adapterpack.convert(case, tmp_path / "bf16", dtype="bfloat16", max_error=0.1)
    assert files.tensors(tmp_path / "bf16").keys() == old.keys()
    assert cast.grade == "approximate"
    before, after = oracle.peft_load(bare, case)[1], oracle.peft_load(bare, tmp_path / "bf16")[1]
    assert (before.missing, before.unexpected) == (after.missing, after.unexpected)


@pytest.mark.parametrize("name", ["full-k2", "projection-mixed"])
def test_unknown_keys_are_kept_through_every_conversion(name, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    odd = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    strange = files.edited(adapter, tmp_path / "a", {"someone.elses": odd})
    for to in {"full-k2": ("topk", "lora"), "projection-mixed": ("seed", "lora")}[name]:
        adapterpack.convert(strange, tmp_path / to, to=to, base=base)
        assert files.same(files.tensors(tmp_path / to)["someone.elses"], odd)
        load = oracle.peft_load(base, tmp_path / to)[1]
        assert (load.missing, load.unexpected) == ([], ["someone.elses"])


def test_texts_are_carried_and_state_and_pickles_are_named_as_left(workshop, tmp_path: Path) -> None:
    adapter = shutil.copytree(workshop.pair("full-k2")[0], tmp_path / "a")
    carried = {"tokenizer.json": b"{}", "merges.txt": b"a b\n", "LICENSE": b"mine"}
    left = {"optimizer.pt": b"x", "training_args.bin": b"x", "rng_state.pth": b"x", "model.safetensors": b"x"}
    for name, data in (carried | left).items():
        (adapter / name).write_bytes(data)
    (adapter / "checkpoint-10").mkdir()
    result = adapterpack.convert(adapter, tmp_path / "c", to="topk")
    for name, data in carried.items():
        assert (tmp_path / "c" / name).read_bytes() == data
    for name in left:
        assert not (tmp_path / "c" / name).exists()
        assert any(name in d for d in result.dropped)
    assert any("checkpoint-10" in d for d in result.dropped)
