"""`combine`: the exact weighted sum, and PEFT's own `add_weighted_adapter`, number by number."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict
from test_convert import assert_loads_in_peft
from test_convolutions import ALL
from test_resize import adapters as random_adapters
from test_resize import write
from transformers.pytorch_utils import Conv1D

import adapterpack
from adapterpack.errors import InvalidFile, LossRefused, Unsupported, UsageError, WrongBase
from adapterpack.methods import _model_order

KINDS = {
    "llama": ("llama", {"target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"]}),
    "opt": ("opt", {"target_modules": ["q_proj", "k_proj", "v_proj", "fc1", "project_in", "project_out"]}),
    "bert": ("bert", {"target_modules": ["query", "key", "intermediate.dense", "output.dense", "pooler.dense"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc", "attn.c_proj"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "rslora": ("llama", {"target_modules": ["q_proj", "k_proj"], "use_rslora": True}),
    "alphas": ("llama", {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"k_proj": 3}}),
    "gaussian": ("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "gaussian"}),
    "resnet": ("resnet", {"target_modules": ALL}),
}
OVER = {"resnet": {"hidden_sizes": [32, 64]}}


def made(workshop, root: Path, name: str, n: int, **fields: Any) -> tuple[Path, Path]:
    """The n-th adapter of a kind, and its base."""
    kind, own = KINDS[name]
    base = workshop.base(kind, **OVER.get(kind, {}))
    path = root / f"{name}-{n}-{zlib.crc32(repr(fields).encode())}"
    if not path.exists():
        config = cases.lora(**{**own, **fields})()
        oracle.make_adapter(path, config, scale=0.3, base=oracle.load_base(base), seed=20 + n)
    return path, base


@pytest.fixture
def two(workshop, tmp_path: Path):
    def make(name: str, first: dict[str, Any] | None = None, second: dict[str, Any] | None = None):
        one, base = made(workshop, tmp_path / "made", name, 1, **(first or {}))
        other, _ = made(workshop, tmp_path / "made", name, 2, **(second or {}))
        return [one, other], base

    return make


@oracle._quiet
def by_peft(base: Path, sources: Sequence[Path], weights: Sequence[float], seed: int = 0, **how: Any):
    """(tensors of PEFT's own combination under the keys of its file, the live model with that adapter alone)."""
    model = PeftModel.from_pretrained(oracle.load_base(base), str(sources[0]), adapter_name="a0")
    for n, source in enumerate(sources[1:], 1):
        model.load_adapter(str(source), adapter_name=f"a{n}")
    torch.manual_seed(seed)
    model.add_weighted_adapter([f"a{n}" for n in range(len(sources))], list(weights), "sum", **how)
    model.set_adapter("sum")
    return get_peft_model_state_dict(model, adapter_name="sum"), model


def deltas(base: Path, source: Path, files) -> dict[str, torch.Tensor]:
    """The dense change of every matrix, f64, by PEFT's merge."""
    plain, merged = files.tensors(base), oracle.peft_merge(base, source)
    return {k: merged[k].double() - plain[k].double() for k in plain if plain[k].is_floating_point()}


def assert_is_the_sum(base: Path, result: Path, sources, weights, files, bound: float = 1e-5) -> None:
    ours = deltas(base, result, files)
    each = [deltas(base, s, files) for s in sources]
    for name, d in ours.items():
        sizes = sum(abs(w) * float(e[name].norm()) for w, e in zip(weights, each, strict=True))
        wanted = sum(w * e[name] for w, e in zip(weights, each, strict=True))
        assert float((d - wanted).norm()) <= bound * sizes + 1e-6, name


# -- PEFT's types ----------------------------------------------------------------------------------------

BY_FACTOR = [
    ("linear", {}),
    ("ties", {"density": 0.4}),
    ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
    ("dare_linear", {"density": 0.5}),
    ("dare_ties", {"density": 0.7}),
    ("dare_ties", {"density": 0.7, "majority_sign_method": "frequency"}),
    ("magnitude_prune", {"density": 0.3}),
    ("magnitude_prune", {"density": 1.0}),
    ("cat", {}),
]
DENSE = [
    ("svd", {}),
    ("svd", {"svd_rank": 7}),
    ("ties_svd", {"density": 0.4}),
    ("dare_linear_svd", {"density": 0.5}),
    ("dare_ties_svd", {"density": 0.7, "svd_rank": 3}),
    ("magnitude_prune_svd", {"density": 0.3, "svd_rank": 5}),
]


def ours_for(how: dict[str, Any]) -> dict[str, Any]:
    names = {"svd_rank": "rank", "majority_sign_method": "majority_sign", "density": "density"}
    return {names[k]: v for k, v in how.items()}


@pytest.mark.parametrize(("kind", "how"), BY_FACTOR, ids=str)
@pytest.mark.parametrize(
    ("name", "weights"), [*((n, (0.7, -0.4)) for n in KINDS if n != "gaussian"), ("llama", (1.0, 1.0))], ids=str
)
def test_factors_are_those_of_peft_bit_for_bit(name, kind, how, weights, two, files, tmp_path: Path) -> None:
    sources, base = two(name)
    before = [oracle.tree_hash(s) for s in sources]
    seed = {"seed": 5} if kind.startswith("dare") else {}
    result = adapterpack.combine(sources, tmp_path / "c", weights=weights, type=kind, **ours_for(how), **seed)
    assert [oracle.tree_hash(s) for s in sources] == before
    theirs, _ = by_peft(base, sources, weights, combination_type=kind, **seed, **how)
    ours = files.tensors(tmp_path / "c")
    factors = {k for k in theirs if "lora_" in k}
    assert factors == {k for k in ours if "lora_" in k}
    assert all(files.same(ours[k], theirs[k]) for k in factors)
    assert_loads_in_peft(None, base, tmp_path / "c")
    assert result.grade == ("equivalent" if kind == "cat" else "approximate")
    assert not any("not known" in note for note in result.notes)


def test_dare_under_gaussian_initialisation_and_another_seed(two, files, tmp_path: Path) -> None:
    sources, base = two("gaussian")
    for seed in (0, 9):
        adapterpack.combine(sources, tmp_path / str(seed), type="dare_linear", density=0.5, seed=seed)
        theirs, _ = by_peft(base, sources, (1, 1), seed, combination_type="dare_linear", density=0.5)
        ours = files.tensors(tmp_path / str(seed))
        assert all(files.same(ours[k], theirs[k]) for k in theirs)
    assert oracle.tree_hash(tmp_path / "0") != oracle.tree_hash(tmp_path / "9")


def test_the_caller_s_random_numbers_are_left_alone(two, tmp_path: Path) -> None:
    sources, _ = two("llama")
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    adapterpack.combine(sources, tmp_path / "c", type="dare_ties", density=0.5)
    assert torch.equal(torch.rand(4), wanted)


@pytest.mark.parametrize(("kind", "how"), DENSE, ids=str)
@pytest.mark.parametrize("name", [n for n in KINDS if n != "gaussian"])
def test_changes_are_those_of_peft_s_svd(name, kind, how, two, files, tmp_path: Path) -> None:
    sources, base = two(name)
    weights = (0.7, -0.4)
    seed = {"seed": 5} if kind.startswith("dare") else {}
    adapterpack.combine(sources, tmp_path / "c", weights=weights, type=kind, **ours_for(how), **seed)
    theirs, model = by_peft(base, sources, weights, combination_type=kind, **seed, **how)
    ours = files.tensors(tmp_path / "c")
    assert {k: ours[k].shape for k in ours if "lora_" in k} == {k: theirs[k].shape for k in theirs if "lora_" in k}
    for key in [k for k in theirs if "lora_A" in k or "embedding_A" in k]:
        b = key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        x, y = (t[b].flatten(1).double() @ t[key].flatten(1).double() for t in (ours, theirs))
        assert float((x - y).norm() / y.norm()) <= 5e-6
    assert_loads_in_peft(None, base, tmp_path / "c")
    if name == "rslora":
        # PEFT's own scale of the result is the root of its rank, by mistake.
        return
    merged = oracle.peft_merge(base, tmp_path / "c")
    expected = model.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[k], expected[k], atol=1e-5) for k in merged if merged[k].is_floating_point())


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_different_ranks_as_peft_has_them(kind, two, files, tmp_path: Path) -> None:
    sources, base = two("llama", {"r": 2, "rank_pattern": {"k_proj": 5}}, {"r": 3})
    how = {"density": 0.5} if kind == "ties_svd" else {}
    adapterpack.combine(sources, tmp_path / "c", weights=(2, 0.5), type=kind, **how)
    theirs, _ = by_peft(base, sources, (2, 0.5), combination_type=kind, **how)
    ours = files.tensors(tmp_path / "c")
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}
    if kind == "cat":
        # PEFT pads with zeros of either sign.
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert files.config(tmp_path / "c")["r"] == (8 if kind == "cat" else 5)


def test_one_adapter_is_linear_as_in_peft(two, files, tmp_path: Path) -> None:
    sources, base = two("llama")
    result = adapterpack.combine(sources[:1], tmp_path / "c", weights=[-0.3], type="svd", rank=2)
    theirs, _ = by_peft(base, sources[:1], [-0.3], combination_type="svd", svd_rank=2)
    assert result.type == "linear" and any("single" in note for note in result.notes)
    assert all(files.same(files.tensors(tmp_path / "c")[k], theirs[k]) for k in theirs)


def test_linear_takes_equal_ranks(two, tmp_path: Path) -> None:
    sources, _ = two("llama", {"r": 2}, {"r": 3})
    with pytest.raises(Unsupported, match="equal ranks"):
        adapterpack.combine(sources, tmp_path / "c", type="ties", density=0.5)
    mixed, _ = two("rslora", {"rank_pattern": {"k_proj": 2}}, {"rank_pattern": {"q_proj": 2}})
    with pytest.raises(Unsupported, match="equal ranks"):
        adapterpack.combine(mixed, tmp_path / "c", type="linear")


@pytest.mark.parametrize("kind", [*oracle.KINDS, "mixtral", "qwen3_moe"])
def test_the_order_of_modules_is_that_of_the_model(kind) -> None:
    try:
        model = oracle.tiny_model(kind)
    except ValueError:
        pytest.skip("no such tiny model")
    layers = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    names = [
        n for n, m in model.named_modules() if isinstance(m, layers) and "expert" not in n and "gate" not in n[-5:]
    ]
    ordered, known = _model_order.in_order(sorted(names))
    assert ordered == names
    assert known


def test_an_unknown_order_is_said(two, files, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    pair = {f"odd.{m}": (torch.randn(2, 5, generator=g), torch.randn(6, 2, generator=g)) for m in ("zig", "zag")}
    one = write(tmp_path / "a", pair, 2)
    result = adapterpack.combine([one, one], tmp_path / "c", type="dare_linear", density=0.5)
    assert any("not known" in note for note in result.notes)


# -- the exact sum ---------------------------------------------------------------------------------------

PAIRS = {
    **{name: (name, {}, {}) for name in KINDS if name != "gaussian"},
    "ranks": ("llama", {"r": 2}, {"r": 7, "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"q_proj": 11}}),
    "rslora-and-plain": ("llama", {"use_rslora": True, "r": 5}, {"lora_alpha": 2.5}),
    "other-targets": ("llama", {"target_modules": ["q_proj"]}, {"target_modules": ["k_proj", "embed_tokens"]}),
    "other-layers": ("llama", {"layers_to_transform": [0]}, {"layers_to_transform": [1]}),
    "a-regular-expression": ("llama", {"target_modules": r".*\.0\.self_attn\.(q|v)_proj"}, {}),
    "conv1d-and-linear": ("gpt2", {"target_modules": ["lm_head"]}, {"target_modules": ["c_attn", "wte"]}),
    "saved-embeddings": ("llama", {"target_modules": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}),
}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.25, -1.5), (0.0, 0.3)], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_exact_sum_is_the_sum_of_the_changes(pair, weights, two, files, tmp_path: Path) -> None:
    name, first, second = PAIRS[pair]
    sources, base = two(name, first, second)
    result = adapterpack.combine(sources, tmp_path / "c", weights=weights)
    assert (result.type, result.grade) == ("exact", "equivalent")
    assert result.max_rel_error <= 1e-7
    assert result.bytes_in == sum(oracle.adapter_bytes(s) for s in sources)
    assert result.bytes_out == oracle.adapter_bytes(tmp_path / "c")
    load = oracle.peft_load(base, tmp_path / "c")[1]
    # PEFT would save base weights of embeddings too, which are the base's.
    assert load.unexpected == [] == [k for k in load.missing if not k.endswith("base_layer.weight")]
    assert_is_the_sum(base, tmp_path / "c", sources, weights, files)
    assert adapterpack.check(tmp_path / "c", base=base).healthy or 0 in weights


def test_lora_biases_are_summed_too(workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama", bias=True)
    sources = []
    for n, fields in enumerate(({"lora_alpha": 6}, {"r": 3, "use_rslora": True})):
        config = cases.lora(lora_bias=True, target_modules=["q_proj", "k_proj"], **fields)()
        oracle.make_adapter(tmp_path / str(n), config, scale=0.3, base=oracle.load_base(base), seed=n)
        sources.append(tmp_path / str(n))
    adapterpack.combine(sources, tmp_path / "c", weights=(0.5, -2))
    assert_loads_in_peft(workshop, base, tmp_path / "c")
    assert_is_the_sum(base, tmp_path / "c", sources, (0.5, -2), files)
    with pytest.raises(Unsupported, match="lora_bias"):
        adapterpack.combine(sources, tmp_path / "x", type="cat")


@pytest.mark.parametrize("rank", [1, 3, 6, 20])
def test_a_rank_cuts_the_exact_sum_at_the_least_error(rank, two, files, tmp_path: Path) -> None:
    sources, base = two("llama")
    result = adapterpack.combine(sources, tmp_path / "c", weights=(1, -0.5), rank=rank)
    assert_loads_in_peft(None, base, tmp_path / "c")
    one, other = (deltas(base, s, files) for s in sources)
    for m in result.modules:
        s = torch.linalg.svdvals(one[f"{m.name}.weight"] - 0.5 * other[f"{m.name}.weight"])
        assert m.rank == min(rank, 8)
        assert m.rel_error == pytest.approx(
            float(s[m.rank :].norm() / s.norm()) if rank < 8 else 0, rel=1e-4, abs=1e-6
        )
    assert result.grade == ("approximate" if rank < 8 else "equivalent")
    assert files.config(tmp_path / "c")["rank_pattern"] == {}


def test_a_difference_of_equals_is_nothing_and_no_bit_is_rounded(two, files, tmp_path: Path) -> None:
    sources, _ = two("llama", {"lora_alpha": 2.7, "r": 3}, {"lora_alpha": 2.7, "r": 3})
    result = adapterpack.combine([sources[0], sources[0]], tmp_path / "zero", weights=(0.3, -0.3))
    assert result.max_rel_error <= 1e-6
    result = adapterpack.combine(sources, tmp_path / "c", weights=(1, -1))
    assert result.max_rel_error < 1e-14
    ours, one, other = (files.tensors(p) for p in (tmp_path / "c", *sources))
    for k in ours:
        parts = (one[k], -other[k]) if "lora_B" in k else (one[k], other[k])
        assert torch.equal(ours[k], torch.cat(parts, dim=1 if "lora_B" in k else 0))


def test_16_bits_stay_where_nothing_is_lost(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("narrow-linear", "bf16")
    adapterpack.combine([adapter, adapter], tmp_path / "c", weights=(1, -0.5))
    assert {t.dtype for t in files.tensors(tmp_path / "c").values()} <= {torch.bfloat16, torch.float32}
    adapterpack.combine([adapter, adapter], tmp_path / "d", weights=(1, 1))
    assert {t.dtype for t in files.tensors(tmp_path / "d").values()} == {torch.bfloat16}


@settings(max_examples=40)
@given(
    one=random_adapters(),
    other=random_adapters(),
    weights=st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
)
def test_the_exact_sum_in_f64_is_the_law(one, other, weights, files, tmp_path_factory) -> None:
    tmp = tmp_path_factory.mktemp("law")
    shapes = {m: (b.shape[0], a.shape[1]) for m, (a, b) in one[0].items()}
    fits = {
        m: (a, b)
        for m, (a, b) in other[0].items()
        if shapes.get(m, (b.shape[0], a.shape[1])) == (b.shape[0], a.shape[1])
    }
    sources = [write(tmp / "a", *one)]
    weights = weights[:1]
    if fits:
        sources.append(write(tmp / "b", fits, other[1]))
        weights = (*weights, 0.7)
    try:
        result = adapterpack.combine(sources, tmp / "c", weights=weights)
    except LossRefused:
        return
    assert result.max_rel_error <= 5e-6
    t, config = files.tensors(tmp / "c"), files.config(tmp / "c")
    found = {m.name: m for m in result.modules}
    for m, entry in found.items():
        wanted, size = 0, 0.0
        for w, own in zip(weights, (one[0], fits), strict=False):
            if m in own:
                delta = 2 * w * (own[m][1].double() @ own[m][0].double())
                wanted, size = wanted + delta, size + float(delta.norm())
        key = f"base_model.model.{m}.lora_A.weight"
        alpha = config["alpha_pattern"].get("^" + m.replace(".", r"\."), config["lora_alpha"])
        ours = t[key.replace("lora_A", "lora_B")].double() @ t[key].double() * alpha / entry.rank
        assert float((ours - wanted).norm()) <= 3e-7 * size + 1e-30


# -- what is not low-rank --------------------------------------------------------------------------------


def test_modules_to_save_of_one_adapter_are_kept_at_weight_1(two, files, tmp_path: Path) -> None:
    sources, base = two(
        "bert", {"target_modules": ["query"], "modules_to_save": ["pooler"]}, {"target_modules": ["key"]}
    )
    adapterpack.combine(sources, tmp_path / "c", weights=(1, -0.5))
    assert_loads_in_peft(None, base, tmp_path / "c")
    assert_is_the_sum(base, tmp_path / "c", sources, (1, -0.5), files)
    assert files.config(tmp_path / "c")["modules_to_save"] == ["pooler"]
    with pytest.raises(Unsupported, match=r"weight is 0\.5"):
        adapterpack.combine(sources, tmp_path / "x", weights=(0.5, 1))
    adapterpack.combine([sources[0]] * 2, tmp_path / "same", weights=(0.5, 0.5))
    assert_is_the_sum(base, tmp_path / "same", sources[:1], (1,), files)


def test_what_differs_or_collides_is_refused(two, workshop, tmp_path: Path) -> None:
    saved, _ = two("bert", *[{"target_modules": ["query"], "modules_to_save": ["pooler"]}] * 2)
    with pytest.raises(Unsupported, match="different values"):
        adapterpack.combine(saved, tmp_path / "x", weights=(0.5, 0.5))
    crossed, _ = two(
        "bert", {"target_modules": ["key"], "modules_to_save": ["pooler"]}, {"target_modules": ["pooler.dense"]}
    )
    with pytest.raises(Unsupported, match="another adapts it"):
        adapterpack.combine(crossed, tmp_path / "x")
    biases, _ = two("opt", *[{"bias": "all", "target_modules": ["q_proj"]}] * 2)
    with pytest.raises(Unsupported, match="bias"):
        adapterpack.combine(biases, tmp_path / "x")
    only, _ = two("opt", {"bias": "lora_only", "target_modules": ["k_proj"]}, {"target_modules": ["fc1"]})
    with pytest.raises(Unsupported, match="lora_only"):
        adapterpack.combine(only, tmp_path / "x")
    rows = [{"target_modules": ["q_proj"], "trainable_token_indices": [n]} for n in (1, 2)]
    with pytest.raises(Unsupported, match="trainable_token_indices"):
        adapterpack.combine(two("llama", *rows)[0], tmp_path / "x")
    for name, word in (("full-k2", "convert"), ("seed-mixed", "convert"), ("dora-linear", "DoRA")):
        with pytest.raises(Unsupported) as e:
            adapterpack.combine([workshop.pair(name)[0]] * 2, tmp_path / "x")
        assert word in f"{e.value.message} {e.value.hint}"
    assert not (tmp_path / "x").exists()


def test_biases_and_token_rows_of_one_adapter_are_kept(two, files, tmp_path: Path) -> None:
    for n, (name, field, second) in enumerate(
        (
            ("opt", {"bias": "all", "target_modules": ["q_proj"]}, {"target_modules": ["fc1"]}),
            ("llama", {"trainable_token_indices": [3, 1], "target_modules": ["q_proj"]}, {}),
        )
    ):
        sources, base = two(name, field, second)
        adapterpack.combine(sources, tmp_path / str(n), weights=(1, 2))
        assert_loads_in_peft(None, base, tmp_path / str(n))
        assert_is_the_sum(base, tmp_path / str(n), sources, (1, 2), files)


@pytest.mark.parametrize("kind", ["exact", "linear", "svd"])
def test_nan_is_refused(kind, workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    key = next(k for k in files.tensors(adapter) if "lora_A" in k)
    broken = files.edited(adapter, tmp_path / "n", {key: files.tensors(adapter)[key] * float("nan")})
    with pytest.raises(InvalidFile, match="NaN"):
        adapterpack.combine([adapter, broken], tmp_path / "c", type=kind)
    assert not (tmp_path / "c").exists()


def test_adapters_of_other_bases(workshop, files, tmp_path: Path) -> None:
    one, _ = workshop.pair("linear-llama")
    wide = workshop.adapter(cases.Case("wide", cases.lora(target_modules=["q_proj"]), over={"hidden_size": 128}))
    with pytest.raises(WrongBase, match="shapes"):
        adapterpack.combine([one, wide], tmp_path / "x")
    other = files.edited(one, tmp_path / "o", config={"base_model_name_or_path": "somebody/else"})
    result = adapterpack.combine([one, other], tmp_path / "c")
    assert any("somebody/else" in note for note in result.notes)


# -- options and the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"weights": [1]},
        {"weights": [1, float("nan")]},
        {"type": "sum"},
        {"type": "ties"},
        {"type": "ties", "density": 0},
        {"type": "ties", "density": 1.5},
        {"density": 0.5},
        {"type": "linear", "rank": 2},
        {"type": "cat", "rank": 2},
        {"rank": 0},
        {"majority_sign": "total"},
        {"type": "ties", "density": 0.5, "majority_sign": "median"},
        {"seed": 1},
    ],
    ids=str,
)
def test_options_that_do_not_go_together(how, workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    with pytest.raises(UsageError):
        adapterpack.combine([adapter, adapter], tmp_path / "x", **how)
    with pytest.raises(UsageError):
        adapterpack.combine([], tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_deterministic_and_dry_run_the_same(two, tmp_path: Path) -> None:
    sources, _ = two("llama")
    how = {"type": "dare_ties_svd", "density": 0.5, "weights": (1, 0.5)}
    dry = adapterpack.combine(sources, tmp_path / "one", dry_run=True, **how)
    assert not (tmp_path / "one").exists()
    wet = adapterpack.combine(sources, tmp_path / "one", **how)
    adapterpack.combine(sources, tmp_path / "two", **how)
    assert dry == wet
    assert oracle.tree_hash(tmp_path / "one") == oracle.tree_hash(tmp_path / "two")
    with pytest.raises(adapterpack.AdapterpackError):
        adapterpack.combine(sources, sources[1], overwrite=True)


def run(*args: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "adapterpack", *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_command_line(two, tmp_path: Path) -> None:
    sources, _ = two("llama")
    out = tmp_path / "c"
    done = run("combine", *sources, "--output", out, "--weight", 1, "--weight", -0.5, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["schema"] == "adapterpack.combine/1"
    assert {"output", "bytes_in", "bytes_out", "grade", "dropped", "max_rel_error", "type"} <= set(record)
    assert {"name", "rank_before", "rank", "rel_error"} == set(record["modules"][0])
    again = run("combine", *sources, "--output", out)
    assert again.returncode == 1 and "error: " in again.stderr
    args = ["--type", "dare_ties", "--density", 0.5, "--majority-sign", "frequency", "--seed", 3, "--overwrite"]
    table = run("combine", *sources, "--output", out, *args, "--device", "cpu")
    assert table.returncode == 0 and "relative error" in table.stdout and "not the sum" in table.stderr
    quiet = run("combine", *sources, "--output", tmp_path / "q", "--rank", 2, "-q")
    assert (quiet.returncode, quiet.stdout) == (0, f"{tmp_path / 'q'}\n")
    for wrong in (["--type", "sum"], ["--density", 0.5], ["--weight", 1], ["--rank", 0], ["--type", "ties"]):
        assert run("combine", *sources, "--output", tmp_path / "x", *wrong).returncode == 2
    assert run("combine", "--output", tmp_path / "x").returncode == 2
    assert not (tmp_path / "x").exists()


def test_the_command_line_knows_every_type() -> None:
    from adapterpack.cli.combine_verb import _TYPES
    from adapterpack.methods._lora_combining import TYPES

    assert set(_TYPES) == set(TYPES)
