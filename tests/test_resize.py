"""`resize`: the best factors of a lower rank, whatever the goal, and read back right by stock PEFT."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_convert import assert_loads_in_peft, relative

import adapterpack
from adapterpack.errors import InvalidFile, Unsupported, UsageError
from adapterpack.methods import _lora_resizing

ADDITIVE = [
    "linear-llama",
    "conv1d",
    "conv1d-and-square-linear",
    "embedding-llama",
    "embedding-gpt2",
    "rslora",
    "patterns-that-overlap",
    "patterns-rslora",
    "lora-bias",
    "lora-bias-conv1d",
    "saved-embeddings",
    "modules-to-save-head",
    "token-rows-dict",
    "bias-all-opt",
    "bias-lora-only",
    "init-orthogonal",
]
GOALS = [{"rank": 3}, {"energy": 0.8}, {"max_error": 0.3}]
GOALS = [goal | {"one_level": level} for goal in GOALS for level in (False, True)]


def changes(base: Path, adapter: Path, files) -> dict[str, torch.Tensor]:
    """The dense change of every matrix, f64, by PEFT."""
    plain, merged = files.tensors(base), oracle.peft_merge(base, adapter)
    found = {name: merged[name].double() - plain[name].double() for name in plain if plain[name].dim() > 1}
    return {name: d.flatten(1) for name, d in found.items() if d.any()}


def kept(result: adapterpack.Resizing) -> dict[str, int]:
    return {m.name: m.rank for m in result.modules}


@pytest.mark.parametrize("goal", GOALS, ids=str)
@pytest.mark.parametrize("name", ADDITIVE)
def test_every_module_has_the_least_error_of_its_rank_and_peft_reads_it(
    goal, name, workshop, files, tmp_path: Path
) -> None:
    adapter, base = workshop.pair(name)
    before = oracle.tree_hash(adapter)
    result = adapterpack.resize(adapter, tmp_path / "r", **goal)
    assert oracle.tree_hash(adapter) == before
    assert result.bytes_out == oracle.adapter_bytes(tmp_path / "r")
    assert_loads_in_peft(workshop, base, tmp_path / "r", adapter)
    merged = oracle.peft_merge(base, tmp_path / "r")
    plain = files.tensors(base)
    dense = changes(base, adapter, files)
    replaced = {k for k in files.tensors(adapter) if "lora_" not in k}
    for m in result.modules:
        w = f"{m.name}.weight"
        if any(w in k for k in replaced) or w not in dense:
            continue
        d = dense[w]
        s = torch.linalg.svdvals(d)
        optimum = float(s[m.rank :].norm() / s.norm()) if m.rank < m.rank_before else 0.0
        ours = float((merged[w].double() - plain[w].double() - d).norm() / d.norm())
        assert ours == pytest.approx(optimum, rel=1e-4, abs=3e-6)
        assert m.rel_error == pytest.approx(optimum, rel=1e-4, abs=3e-6)
    assert result.max_rel_error == max(m.rel_error for m in result.modules)
    assert result.grade == ("lossless" if kept(result) == _before(result) else "approximate")
    if "max_error" in goal:
        assert (result.total_rel_error if goal["one_level"] else result.max_rel_error) <= 0.3
    old, new = files.tensors(adapter), files.tensors(tmp_path / "r")
    assert old.keys() == new.keys()
    assert all(
        files.same(old[k], new[k]) for k in old if "lora_A" not in k and "lora_B.w" not in k and "emb" not in k
    )
    assert adapterpack.check(tmp_path / "r", base=base).healthy
    verified = adapterpack.verify(adapter, tmp_path / "r", base=base, max_error=1)
    assert verified.max_rel_error == pytest.approx(result.max_rel_error, rel=1e-6)


def _before(result: adapterpack.Resizing) -> dict[str, int]:
    return {m.name: m.rank_before for m in result.modules}


def test_modules_whose_rank_stays_keep_their_bits(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("patterns-that-overlap")
    result = adapterpack.resize(adapter, tmp_path / "r", rank=3)
    same = [m.name for m in result.modules if m.rank == m.rank_before]
    assert same and len(same) < len(result.modules)
    old, new = files.tensors(adapter), files.tensors(tmp_path / "r")
    assert all(files.same(old[k], new[k]) for k in old if any(f".{m}." in k for m in same))
    assert all(m.rel_error == 0 for m in result.modules if m.name in same)


@pytest.mark.parametrize(
    "goal", [{"rank": 4}, {"rank": 9, "one_level": True}, {"max_bytes": 10**9}, {"max_error": 0}]
)
def test_where_nothing_is_cut_the_result_is_a_copy_and_says_so(goal, workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    result = adapterpack.resize(adapter, tmp_path / "r", **goal)
    assert oracle.tree_hash(tmp_path / "r") == oracle.tree_hash(adapter)
    assert (result.grade, result.max_rel_error, result.total_rel_error) == ("lossless", 0, 0)
    assert any("copy" in note for note in result.notes)


@pytest.mark.parametrize("goal", [{"energy": 1.0}, {"max_error": 1e-6}, {"rank": 2}], ids=str)
def test_a_rank_that_holds_nothing_goes_and_that_is_equivalent(goal, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    half = {k: t * (torch.arange(4) < 2)[:, None] for k, t in files.tensors(adapter).items() if "lora_A" in k}
    files.edited(adapter, tmp_path / "a", half)
    result = adapterpack.resize(tmp_path / "a", tmp_path / "r", **goal)
    if goal != {"energy": 1.0}:
        assert set(kept(result).values()) == {2}
    assert result.grade == "equivalent" and result.max_rel_error < 1e-6
    plain = files.tensors(base)
    a, b = oracle.peft_merge(base, tmp_path / "a"), oracle.peft_merge(base, tmp_path / "r")
    assert relative(a, b, plain, plain) <= 2e-6


def test_a_uniform_rank_needs_no_patterns(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("rslora")
    adapterpack.resize(adapter, tmp_path / "r", rank=2)
    config = files.config(tmp_path / "r")
    assert (config["r"], config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (2, False, {}, {})
    assert config["lora_alpha"] == pytest.approx(6 / math.sqrt(4) * 2)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_16_bit_factors_stay_so_and_the_errors_count_the_rounding(dtype, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("narrow-linear", dtype)
    result = adapterpack.resize(adapter, tmp_path / "r", rank=3)
    assert {t.dtype for t in files.tensors(tmp_path / "r").values()} == {cases.DTYPES[dtype]}
    assert any(dtype.upper() in note for note in result.notes)
    # A bound below the rounding is kept, if need be by leaving the module as it is, or in float32.
    for level in (False, True):
        tight = adapterpack.resize(adapter, tmp_path / str(level), max_error=1e-4, one_level=level)
        assert (tight.total_rel_error if level else tight.max_rel_error) <= 1e-4
    assert_loads_in_peft(workshop, base, tmp_path / "r", adapter)


def test_orthogonal_initialisation_is_not_repeated_at_an_odd_rank(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("init-orthogonal")
    adapterpack.resize(adapter, tmp_path / "r", rank=3)
    assert files.config(tmp_path / "r")["init_lora_weights"] is True
    assert_loads_in_peft(workshop, base, tmp_path / "r")


@pytest.mark.parametrize("level", [False, True])
def test_convolutions_are_flattened(level, workshop, files, tmp_path: Path) -> None:
    from test_convolutions import ALL

    case = cases.Case("resize-conv", cases.lora(r=6, target_modules=ALL), "resnet", over={"hidden_sizes": [32, 64]})
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    result = adapterpack.resize(adapter, tmp_path / "r", rank=2, one_level=level)
    assert_loads_in_peft(workshop, base, tmp_path / "r")
    dense, cut = changes(base, adapter, files), changes(base, tmp_path / "r", files)
    for m in result.modules:
        s = torch.linalg.svdvals(dense[f"{m.name}.weight"])
        lost = dense[f"{m.name}.weight"] - cut[f"{m.name}.weight"]
        assert float(lost.norm() / s.norm()) == pytest.approx(float(s[m.rank :].norm() / s.norm()), rel=1e-4)


@pytest.mark.parametrize("level", [False, True])
def test_max_bytes_is_kept_and_nearly_used_up(level, workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    full = oracle.adapter_bytes(adapter)
    errors = []
    for n, most in enumerate(range(full, 13_500, -2_000)):
        result = adapterpack.resize(adapter, tmp_path / str(n), max_bytes=most, one_level=level)
        assert result.bytes_out == oracle.adapter_bytes(tmp_path / str(n)) <= most
        errors.append(result.total_rel_error)
    assert errors == sorted(errors)
    assert errors[0] == 0 < errors[-1]
    with pytest.raises(Unsupported, match="too few"):
        adapterpack.resize(adapter, tmp_path / "x", max_bytes=1000)


def test_one_level_is_better_for_all_modules_together_than_one_ceiling(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    large = {k: t * 20 for k, t in files.tensors(adapter).items() if "layers.0" in k and "lora_B" in k}
    files.edited(adapter, tmp_path / "a", large)
    each = adapterpack.resize(tmp_path / "a", tmp_path / "each", rank=2)
    level = adapterpack.resize(tmp_path / "a", tmp_path / "level", rank=2, one_level=True)
    assert sum(kept(level).values()) <= sum(kept(each).values())
    assert level.total_rel_error < each.total_rel_error
    assert min(kept(level).values()) >= 1


# -- laws ------------------------------------------------------------------------------------------------


def write(directory: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], r: int) -> Path:
    directory.mkdir(parents=True)
    pairs = {
        f"base_model.model.{m}.lora_{n}.weight": t for m, ab in factors.items() for n, t in zip("AB", ab, strict=True)
    }
    save_file(pairs, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": sorted(factors)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@st.composite
def adapters(draw: st.DrawFn) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], int]:
    r = draw(st.integers(1, 6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    found = {}
    for n in range(draw(st.integers(1, 4))):
        out, into = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        size = 10.0 ** draw(st.integers(-3, 3))
        spread = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1e-4, 0.1, 1.0]), min_size=r, max_size=r)))
        found[f"m{n}.lin"] = (
            torch.randn(r, into, generator=g) * spread[:, None],
            torch.randn(out, r, generator=g) * size,
        )
    return found, r


def spectra(directory: Path, files) -> dict[str, torch.Tensor]:
    t, config = files.tensors(directory), files.config(directory)
    found = {}
    for key in t:
        if "lora_A" in key:
            d = t[key.replace("lora_A", "lora_B")].double() @ t[key].double()
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[name] = torch.linalg.svdvals(d * config["lora_alpha"] / config["r"])
    return found


@settings(max_examples=40)
@given(made=adapters(), energy=st.floats(0.01, 1), more=st.floats(0, 1), level=st.booleans())
def test_energy_is_kept_and_more_of_it_never_takes_less_rank(
    made, energy, more, level, files, tmp_path_factory
) -> None:
    tmp = tmp_path_factory.mktemp("law")
    source = write(tmp / "a", *made)
    values = spectra(source, files)
    less = adapterpack.resize(source, tmp / "less", energy=energy, one_level=level)
    most = adapterpack.resize(source, tmp / "most", energy=energy + (1 - energy) * more, one_level=level)
    assert all(x <= y for x, y in zip(kept(less).values(), kept(most).values(), strict=True))
    got = {m: float((v[: kept(less)[m]] ** 2).sum()) for m, v in values.items()}
    all_of = {m: float((v**2).sum()) for m, v in values.items()}
    if level:
        assert sum(got.values()) >= energy * sum(all_of.values()) * (1 - 1e-9)
    else:
        assert all(got[m] >= energy * all_of[m] * (1 - 1e-9) for m in values)
    for m in less.modules:
        v = values[m.name]
        tail = float(v[m.rank :].norm() / v.norm()) if v.any() and m.rank < m.rank_before else 0.0
        assert m.rel_error == pytest.approx(tail, rel=1e-5, abs=2e-7)


@settings(max_examples=40)
@given(made=adapters(), bound=st.floats(0, 0.9), level=st.booleans())
def test_max_error_is_kept(made, bound, level, tmp_path_factory) -> None:
    tmp = tmp_path_factory.mktemp("law")
    source = write(tmp / "a", *made)
    result = adapterpack.resize(source, tmp / "r", max_error=bound, one_level=level)
    assert (result.total_rel_error if level else result.max_rel_error) <= bound
    assert adapterpack.verify(source, tmp / "r", max_error=max(result.max_rel_error * (1 + 1e-9), 1e-7)).equal


@given(names=st.lists(st.text("ab.+(", min_size=1, max_size=5), min_size=2, max_size=6, unique=True))
def test_patterns_match_their_module_and_no_other(names) -> None:
    import re

    for pattern in map(_lora_resizing.exactly, names):
        assert sum(re.match(rf"(.*\.)?({pattern})$", name) is not None for name in names) == 1


# -- refusals and the command line -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, word",
    [("full-k2", "convert"), ("projection-mixed", "convert"), ("dora-linear", "DoRA")],
)
def test_what_is_no_plain_lora_is_refused_with_the_way_out(name, word, workshop, tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as e:
        adapterpack.resize(workshop.pair(name)[0], tmp_path / "r", rank=1)
    assert word in f"{e.value.message} {e.value.hint}"
    assert list(tmp_path.iterdir()) == []


def test_bare_parameters_and_nan_are_refused(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    files.edited(adapter, tmp_path / "p", config={"target_modules": [], "target_parameters": ["down_proj"]})
    with pytest.raises(Unsupported, match="parameters"):
        adapterpack.resize(tmp_path / "p", tmp_path / "r", rank=1)
    key = next(k for k in files.tensors(adapter) if "lora_A" in k)
    files.edited(adapter, tmp_path / "n", {key: files.tensors(adapter)[key] * math.nan})
    with pytest.raises(InvalidFile, match="NaN"):
        adapterpack.resize(tmp_path / "n", tmp_path / "r", rank=1)


@pytest.mark.parametrize(
    "goal",
    [
        {},
        {"rank": 1, "energy": 0.5},
        {"rank": 0},
        {"energy": 0},
        {"energy": 1.1},
        {"max_error": -1},
        {"max_bytes": 0},
    ],
    ids=str,
)
def test_one_goal_within_its_range(goal, workshop, tmp_path: Path) -> None:
    with pytest.raises((UsageError, Unsupported)):
        adapterpack.resize(workshop.pair("linear-llama")[0], tmp_path / "r", **goal)


def run(*args: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "adapterpack", *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_command_line(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    dry = run("resize", adapter, tmp_path / "r", "--rank", 2, "--dry-run", "--json")
    assert dry.returncode == 0 and list(tmp_path.iterdir()) == []
    wet = run("resize", adapter, tmp_path / "r", "--rank", 2, "--json")
    assert (wet.returncode, wet.stdout) == (0, dry.stdout)
    record = json.loads(wet.stdout)
    assert record["schema"] == "adapterpack.resize/1"
    assert {"output", "bytes_in", "bytes_out", "grade", "dropped", "max_rel_error", "total_rel_error"} <= set(record)
    assert {"name", "rank_before", "rank", "rel_error"} == set(record["modules"][0])
    again = run("resize", adapter, tmp_path / "r", "--rank", 2)
    assert again.returncode == 1 and "error: " in again.stderr
    table = run("resize", adapter, tmp_path / "r", "--energy", 0.9, "--global", "--overwrite", "--device", "cpu")
    assert table.returncode == 0 and "relative error" in table.stdout
    quiet = run("resize", adapter, tmp_path / "q", "--max-bytes", 20000, "-q")
    assert (quiet.returncode, quiet.stdout) == (0, f"{tmp_path / 'q'}\n")
    for wrong in ([], ["--rank", 2, "--energy", 0.5], ["--rank", 0], ["--max-error", "nan"], ["--energy", 2]):
        assert run("resize", adapter, tmp_path / "x", *wrong).returncode == 2
    assert run("resize", adapter, tmp_path / "x", "--max-bytes", 9).returncode == 1
    assert not (tmp_path / "x").exists()
