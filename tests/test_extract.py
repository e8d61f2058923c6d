"""A full fine-tune as LoRA: what comes back, what is kept, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import cases
import oracle
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_cli import run

import adapterpack
from adapterpack import svd
from adapterpack.backend import TorchBackend
from adapterpack.errors import (
    DestinationExists,
    InvalidFile,
    LossRefused,
    NothingChanged,
    Unsupported,
    UsageError,
    WrongBase,
)
from adapterpack.pairing import Pair, Role

XP = TorchBackend("cpu")


def tuned_by(workshop, name: str, where: Path) -> tuple[Path, Path]:
    """(base, tuned): a fine-tune whose change is that of a LoRA adapter, merged by PEFT."""
    adapter, base = workshop.pair(name)
    oracle.save_base(oracle.peft_merge(base, adapter).model, where)
    return base, where


def tuned_all(base: Path, where: Path, only: tuple[str, ...] = ("",), scale: float = 0.02) -> Path:
    """Every parameter whose name has one of these parts moves at random."""
    model = oracle.load_base(base)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(o in name for o in only):
                p.add_((torch.randn(p.shape, generator=g) * scale).to(p.dtype))
    oracle.save_base(model, where)
    return where


def edited(model: Path, where: Path, **edits) -> Path:
    """A copy of a model directory with other tensors; None removes one. `__` stands for a dot."""
    where.mkdir()
    for f in model.iterdir():
        if f.suffix != ".safetensors":
            (where / f.name).write_bytes(f.read_bytes())
    tensors = load_file(model / "model.safetensors") | {k.replace("__", "."): v for k, v in edits.items()}
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, where / "model.safetensors")
    return where


def off(x: torch.Tensor, y: torch.Tensor, base: torch.Tensor) -> float:
    change = float((y.double() - base.double()).norm())
    lost = float((x.double() - y.double()).norm())
    return lost / change if change else lost


def assert_gives(workshop, files, base: Path, tuned: Path, adapter: Path, error: float) -> None:
    """PEFT loads it without a word, and its merge and ours give the tuned model within the error."""
    merged = oracle.peft_merge(base, adapter)
    assert merged.load.clean, (merged.load.missing, merged.load.unexpected)
    wanted, before = oracle.load_base(tuned).state_dict(), oracle.load_base(base).state_dict()
    assert max(off(merged[k], wanted[k], before[k]) for k in wanted) <= error
    adapterpack.merge(adapter, base, adapter.parent / "merged", verify="full")
    ours = oracle.load_base(adapter.parent / "merged").state_dict()
    assert max(off(ours[k], wanted[k], before[k]) for k in wanted) <= error


LOW_RANK = ["linear-llama", "linear-opt", "linear-bert", "conv1d", "rslora"]


@pytest.mark.parametrize("name", LOW_RANK)
def test_a_merged_lora_comes_back_at_its_rank(name, workshop, files, tmp_path: Path) -> None:
    base, tuned = tuned_by(workshop, name, tmp_path / "t")
    before = oracle.tree_hash(base), oracle.tree_hash(tuned)
    result = adapterpack.extract(base, tuned, tmp_path / "a", rank=4)
    assert (oracle.tree_hash(base), oracle.tree_hash(tuned)) == before
    adapter, _ = workshop.pair(name)
    with adapterpack.containers.open_checkpoint(adapter) as c:
        modules = set(adapterpack.methods.parse(c)[1].modules)
    assert {m.name for m in result.modules} == modules
    assert {m.rank for m in result.modules} == {4}
    assert result.max_rel_error == result.modules[0].rel_error < 1e-6
    assert result.kept == result.dropped == ()
    assert result.bytes_out == oracle.adapter_bytes(tmp_path / "a")
    assert_gives(workshop, files, base, tuned, tmp_path / "a", 2e-6)


@pytest.mark.parametrize(
    "kind, how",
    [
        ("llama", {}),
        ("llama", {"tie": True}),
        ("opt", {}),
        ("bert", {}),
        ("gpt2", {}),
        ("gpt2", {"tie": True}),
        ("llama", {"bias": True}),
    ],
)
def test_a_whole_fine_tune_with_the_rest_kept(kind, how, workshop, files, tmp_path: Path) -> None:
    base = workshop.base(kind, **how)
    tuned = tuned_all(base, tmp_path / "t")
    with pytest.raises(LossRefused) as e:
        adapterpack.extract(base, tuned, tmp_path / "a", rank=4)
    assert "--rest keep" in str(e.value.hint)
    assert not (tmp_path / "a").exists()
    result = adapterpack.extract(base, tuned, tmp_path / "a", rank=64, rest="keep")
    assert result.kept
    assert_gives(workshop, files, base, tuned, tmp_path / "a", 2e-6)


# -- errors, ranks and energies ----------------------------------------------------------------------------


def dense(files, base: Path, tuned: Path, module: str) -> torch.Tensor:
    return files.tensors(tuned)[f"{module}.weight"].double() - files.tensors(base)[f"{module}.weight"].double()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [1, 5, 1000])
def test_the_error_is_the_optimum_and_the_one_that_is_said(kind, rank, workshop, files, tmp_path: Path) -> None:
    base = workshop.base(kind)
    tuned = tuned_all(base, tmp_path / "t", ("self_attn", "mlp", "attn.c_"))
    result = adapterpack.extract(base, tuned, tmp_path / "a", rank=rank, rest="drop")
    written = files.tensors(tmp_path / "a")
    assert [m.rel_error for m in result.modules] == sorted((m.rel_error for m in result.modules), reverse=True)
    for m in result.modules:
        d = dense(files, base, tuned, m.name)
        d = d.T if kind == "gpt2" else d
        a, b = (written[f"base_model.model.{m.name}.lora_{x}.weight"] for x in "AB")
        assert a.shape == (m.rank, d.shape[1]) and b.shape == (d.shape[0], m.rank)
        assert m.rank == min(rank, *d.shape)
        said = float((d - b.double() @ a.double()).norm() / d.norm())
        assert m.rel_error == pytest.approx(said, rel=1e-6)
        s = torch.linalg.svdvals(d)
        best = float((s[m.rank :] ** 2).sum().sqrt() / s.norm())
        assert best - 1e-9 <= said <= best + 2e-7


@pytest.mark.parametrize("energy", [0.1, 0.9, 0.999, 1.0])
def test_energy_takes_the_least_rank_of_each_module(energy, workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama")
    tuned = tuned_all(base, tmp_path / "t", ("self_attn", "mlp"))
    result = adapterpack.extract(base, tuned, tmp_path / "a", energy=energy)
    for m in result.modules:
        s2 = torch.linalg.svdvals(dense(files, base, tuned, m.name)) ** 2
        kept = s2.cumsum(0) / s2.sum()
        assert kept[m.rank - 1] >= energy - 1e-12
        assert m.rank == 1 or kept[m.rank - 2] < energy
        assert m.rel_error <= (1 - energy) ** 0.5 + 1e-6
    # Ranks differ, so patterns tell them, and PEFT reads them as they are meant.
    config = files.config(tmp_path / "a")
    assert config["lora_alpha"] == config["r"] == max(m.rank for m in result.modules)
    assert config["rank_pattern"] == config["alpha_pattern"]
    merged, wanted = oracle.peft_merge(base, tmp_path / "a"), files.tensors(tuned)
    assert merged.load.clean
    for m in result.modules:
        key = f"{m.name}.weight"
        found = off(merged[key], wanted[key], files.tensors(base)[key])
        assert found == pytest.approx(m.rel_error, rel=1e-3, abs=1e-5)


def test_max_rank_ends_an_energy_and_says_so(workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    tuned = tuned_all(base, tmp_path / "t", ("self_attn", "mlp"))
    result = adapterpack.extract(base, tuned, tmp_path / "a", energy=0.99, max_rank=7)
    assert {m.rank for m in result.modules} == {7}
    assert any("14 modules end at rank 7" in n for n in result.notes)


@pytest.mark.parametrize("dtype, bound", [("bfloat16", 8e-3), ("float16", 1e-3)])
def test_the_factors_dtype_is_part_of_the_error(dtype, bound, workshop, files, tmp_path: Path) -> None:
    base, tuned = tuned_by(workshop, "linear-llama", tmp_path / "t")
    result = adapterpack.extract(base, tuned, tmp_path / "a", rank=4, dtype=dtype)
    assert 1e-5 < result.max_rel_error < bound
    assert {str(t.dtype) for t in files.tensors(tmp_path / "a").values()} == {f"torch.{dtype}"}


def test_two_runs_give_the_same_bytes(workshop, tmp_path: Path) -> None:
    base, tuned = tuned_by(workshop, "conv1d", tmp_path / "t")
    for name in ("a", "b"):
        adapterpack.extract(base, tuned, tmp_path / name, energy=0.5)
    assert oracle.tree_hash(tmp_path / "a") == oracle.tree_hash(tmp_path / "b")


# -- the sketch --------------------------------------------------------------------------------------------


def spectrum(out: int, into: int, s: torch.Tensor, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(out, len(s), generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(into, len(s), generator=g, dtype=torch.float64)).Q
    return (u * s) @ v.T


SPECTRA = {
    "a low rank": torch.tensor([3.0, 2, 1, 1, 0.5]),
    "steep": 0.9 ** torch.arange(600, dtype=torch.float64),
    "flat": torch.linspace(1, 0.5, 600, dtype=torch.float64),
    "a tail": torch.cat([torch.full((20,), 4.0), torch.full((580,), 0.05)]).double(),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [5, 40])
def test_a_sketch_is_as_good_as_the_svd(name, rank) -> None:
    s = SPECTRA[name].double()
    d = spectrum(600, 700, s)
    b, a = svd.at_rank(XP, d.float(), rank)
    assert b.shape == (600, rank) and a.shape == (rank, 700)
    best = float((s[rank:] ** 2).sum().sqrt() / s.norm())
    error = float((d - b.double() @ a.double()).norm() / s.norm())
    assert error <= best * 1.005 + 1e-6
    again = svd.at_rank(XP, d.float(), rank)
    assert torch.equal(b, again[0]) and torch.equal(a, again[1])


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_a_sketch_grows_until_it_holds_the_energy(name, energy) -> None:
    s = SPECTRA[name].double()
    d = spectrum(600, 700, s)
    b, a = svd.at_energy(XP, d.float(), energy)
    kept = (s**2).cumsum(0) / (s**2).sum()
    least = int((kept >= energy * (1 - 1e-6)).nonzero()[0]) + 1
    assert least <= b.shape[1] <= least + 1 + least // 20
    assert float((d - b.double() @ a.double()).norm() / s.norm()) <= (1 - energy) ** 0.5 + 1e-5
    assert svd.at_energy(XP, d.float(), energy, 3)[0].shape[1] == min(3, least)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 9), st.booleans())
def test_law_no_rank_does_better(out, into, rank, seed, flip) -> None:
    d = torch.randn(out, into, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    d = d.T if flip else d
    rank = min(rank, *d.shape)
    b, a = svd.at_rank(XP, d, rank)
    s = torch.linalg.svdvals(d)
    assert float((d - b @ a).norm()) == pytest.approx(float(s[rank:].norm()), abs=1e-9)


# -- what belongs to no linear layer -----------------------------------------------------------------------


def test_what_did_not_change_is_left_out(workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama")
    tuned = tuned_all(base, tmp_path / "t", ("layers.1.mlp.up_proj",))
    result = adapterpack.extract(base, tuned, tmp_path / "a", rank=2)
    assert [m.name for m in result.modules] == ["model.layers.1.mlp.up_proj"]
    assert result.unchanged == 13
    assert files.config(tmp_path / "a")["target_modules"] == ["model.layers.1.mlp.up_proj"]


def test_a_dropped_rest_is_named(workshop, files, tmp_path: Path) -> None:
    base = workshop.base("opt")
    tuned = tuned_all(base, tmp_path / "t", ("q_proj", "layer_norm"))
    result = adapterpack.extract(base, tuned, tmp_path / "a", rank=64, rest="drop")
    assert any(n.endswith("q_proj.bias") for n in result.dropped)
    assert any(n.endswith("layer_norm.weight") for n in result.dropped)
    merged, before = oracle.peft_merge(base, tmp_path / "a"), files.tensors(base)
    assert all(torch.equal(merged[n], before[n]) for n in result.dropped)


def test_embeddings_and_the_head_become_lora_on_request(workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama")
    tuned = tuned_all(base, tmp_path / "t", ("q_proj", "embed_tokens", "lm_head"))
    result = adapterpack.extract(base, tuned, tmp_path / "a", rank=64, embeddings=True)
    assert {"model.embed_tokens", "lm_head"} <= {m.name for m in result.modules}
    merged, wanted = oracle.peft_merge(base, tmp_path / "a"), files.tensors(tuned)
    assert not merged.load.unexpected
    assert max(off(merged[k], wanted[k], t) for k, t in files.tensors(base).items()) < 2e-6


def test_tied_embeddings_are_never_made_lora_of(workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama", tie=True)
    tuned = tuned_all(base, tmp_path / "t", ("q_proj", "embed_tokens"))
    with pytest.raises(LossRefused):
        adapterpack.extract(base, tuned, tmp_path / "a", rank=2, embeddings=True)
    result = adapterpack.extract(base, tuned, tmp_path / "a", rank=64, embeddings=True, rest="keep")
    assert any("tied" in n for n in result.notes)
    assert files.config(tmp_path / "a")["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    assert_gives(workshop, files, base, tuned, tmp_path / "a", 2e-6)


@pytest.mark.parametrize("kind", ["resnet", "whisper", "convnext", "videomae"])
def test_convolutions_and_their_norms_are_kept_whole(kind, workshop, files, tmp_path: Path) -> None:
    base = workshop.base(kind)
    tuned = tuned_all(base, tmp_path / "t")
    if kind == "resnet":
        # Nothing but convolutions and norms.
        with pytest.raises(Unsupported, match="no matrix of a linear layer"):
            adapterpack.extract(base, tuned, tmp_path / "a", rank=4, rest="keep")
        return
    try:
        adapterpack.extract(base, tuned, tmp_path / "a", rank=64, rest="keep")
    except Unsupported as e:
        # Bare parameters of modules whose layers are adapted.
        assert "itself changed" in e.message
        return
    assert_gives(workshop, files, base, tuned, tmp_path / "a", 5e-6)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_experts_are_never_taken_for_layers(kind, workshop, tmp_path: Path) -> None:
    base = workshop.base(kind)
    tuned = tuned_all(base, tmp_path / "t")
    with pytest.raises(LossRefused, match="experts"):
        adapterpack.extract(base, tuned, tmp_path / "a", rank=4)
    with pytest.raises(Unsupported, match="expert"):
        adapterpack.extract(base, tuned, tmp_path / "a", rank=4, rest="keep")
    result = adapterpack.extract(base, tuned, tmp_path / "a", rank=4, rest="drop")
    assert not any("experts" in m.name or m.name.endswith("mlp.gate") for m in result.modules)
    assert oracle.peft_load(base, tmp_path / "a")[1].clean


def test_a_path_that_ends_like_a_target_is_excluded_by_name(tmp_path: Path) -> None:
    """PEFT takes every module for a target whose path ends like one."""
    g = torch.Generator().manual_seed(1)
    names = ("layer.0.p", "decoder.layer.0.p", "decoder.layer.0.q", "layer.0.q")
    base = {f"{n}.weight": torch.randn(6, 5, generator=g) for n in names}
    tuned = dict(base)
    # p of one, q of both, with other ranks: nothing of one may match the other.
    tuned["layer.0.p.weight"] = base["layer.0.p.weight"] + torch.randn(6, 5, generator=g)
    tuned["layer.0.q.weight"] = base["layer.0.q.weight"] + torch.ones(6, 5)
    tuned["decoder.layer.0.q.weight"] = base["decoder.layer.0.q.weight"] + torch.randn(6, 5, generator=g)
    for where, tensors in (("b", base), ("t", tuned)):
        (tmp_path / where).mkdir()
        save_file(tensors, tmp_path / where / "model.safetensors", metadata={"format": "pt"})
    result = adapterpack.extract(tmp_path / "b", tmp_path / "t", tmp_path / "a", energy=1 - 1e-9)
    assert {m.name: m.rank for m in result.modules} == {"layer.0.p": 5, "layer.0.q": 1, "decoder.layer.0.q": 5}

    def layer() -> torch.nn.ModuleDict:
        pair = torch.nn.ModuleDict({n: torch.nn.Linear(5, 6, bias=False) for n in "pq"})
        return torch.nn.ModuleDict({"layer": torch.nn.ModuleList([pair])})

    model = layer()
    model["decoder"] = layer()
    model.load_state_dict(base)
    merged = PeftModel.from_pretrained(model, tmp_path / "a").merge_and_unload().state_dict()
    assert max(float((merged[k] - tuned[k]).abs().max()) for k in tuned) < 1e-5
    assert torch.equal(merged["decoder.layer.0.p.weight"], base["decoder.layer.0.p.weight"])


@given(st.data())
def test_law_a_pair_differs_iff_a_value_does(data) -> None:
    names = [torch.float32, torch.bfloat16, torch.float16]
    x, y = (
        torch.tensor(data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.5]), min_size=3, max_size=3))).to(
            data.draw(st.sampled_from(names))
        )
        for _ in "xy"
    )
    pair = Pair("m.weight", Role.OTHER, False, XP.tensor(x), XP.tensor(y))
    assert pair.differs() == bool((x.double() != y.double()).any())


# -- names, dtypes and quantised bases ---------------------------------------------------------------------


def test_a_base_that_holds_the_body_alone_and_a_mask(workshop, files, tmp_path: Path) -> None:
    """The Hub's GPT-2: no `transformer.` in its names, and buffers that nobody saves any more."""
    base, tuned = tuned_by(workshop, "conv1d", tmp_path / "t")
    old = tmp_path / "b"
    old.mkdir()
    (old / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = {k.removeprefix("transformer."): v for k, v in files.tensors(base).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    result = adapterpack.extract(old, tuned, tmp_path / "a", rank=4)
    assert all(m.name.startswith("transformer.h.") for m in result.modules)
    assert oracle.peft_load(base, tmp_path / "a")[1].clean
    # Both so: the class still says what PEFT will call them.
    new = tmp_path / "n"
    new.mkdir()
    (new / "config.json").write_bytes((base / "config.json").read_bytes())
    bare = {k.removeprefix("transformer."): v for k, v in files.tensors(tuned).items()}
    save_file(bare, new / "model.safetensors", metadata={"format": "pt"})
    adapterpack.extract(old, new, tmp_path / "c", rank=4)
    assert oracle.tree_hash(tmp_path / "a") == oracle.tree_hash(tmp_path / "c")


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_sixteen_bits_and_shards(dtype, workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama", dtype, "40KB")
    tuned = tuned_all(base, tmp_path / "t", ("self_attn", "mlp"))
    adapterpack.extract(base, tuned, tmp_path / "a", rank=64)
    merged, wanted = oracle.peft_merge(base, tmp_path / "a"), files.tensors(tuned)
    assert merged.load.clean
    # One rounding of a value that is all but the tuned one.
    wrong = sum(int((merged[k] != wanted[k]).sum()) for k in wanted)
    assert wrong <= sum(t.numel() for t in wanted.values()) * 1e-3


def test_a_base_of_another_dtype_says_so(workshop, tmp_path: Path) -> None:
    base = workshop.base("llama", "bf16")
    model = oracle.load_base(base, torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1)
    oracle.save_base(model, tmp_path / "t")
    result = adapterpack.extract(base, tmp_path / "t", tmp_path / "a", rank=1)
    assert [m.name for m in result.modules] == ["model.layers.0.self_attn.q_proj"]
    assert any("BF16" in n and "F32" in n for n in result.notes)


@pytest.mark.parametrize("kind", [*zoo.KINDS, *zoo.VISION])
def test_models_whose_names_on_disk_are_not_their_modules(kind, tmp_path: Path) -> None:
    made = zoo.model(kind)
    made.save_pretrained(tmp_path / "b")
    inside = set(made.state_dict())
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in made.named_parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.01)
    made.save_pretrained(tmp_path / "t")
    result = adapterpack.extract(tmp_path / "b", tmp_path / "t", tmp_path / "a", rank=256, rest="drop")
    assert {f"{m.name}.weight" for m in result.modules} <= inside
    assert kind == "clip-vision" or any("in memory" in n for n in result.notes)
    assert oracle.peft_load(zoo.model(kind), tmp_path / "a")[1].clean
    adapterpack.merge(tmp_path / "a", tmp_path / "b", tmp_path / "m", verify="full")
    disk = zoo.disk_names(zoo.model(kind), tmp_path / "b")
    base, tuned, merged = (load_file(tmp_path / x / "model.safetensors") for x in "btm")
    for m in result.modules:
        name = disk[f"{m.name}.weight"]
        assert off(merged[name], tuned[name], base[name]) < 2e-6


@pytest.mark.parametrize("kind", ["clip-vision", "vit", "dinov2", "swin", "qwen2-vl", "mistral3", "llava-tied"])
def test_the_rest_of_such_models_is_kept_too(kind, tmp_path: Path) -> None:
    """Bare parameters, convolutions and tables of modules; embeddings that lie in a module which is kept."""
    made = zoo.model(kind)
    made.save_pretrained(tmp_path / "b")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in made.named_parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.01)
    made.save_pretrained(tmp_path / "t")
    adapterpack.extract(tmp_path / "b", tmp_path / "t", tmp_path / "a", rank=256, rest="keep")
    merged, wanted = oracle.peft_merge(zoo.model(kind), tmp_path / "a"), made.state_dict()
    assert merged.load.clean, (merged.load.missing, merged.load.unexpected)
    assert max(float((merged[k] - wanted[k]).abs().max()) for k in wanted) < 1e-6
    adapterpack.merge(tmp_path / "a", tmp_path / "b", tmp_path / "m", verify="full")
    ours, tuned = (load_file(tmp_path / x / "model.safetensors") for x in "mt")
    assert ours.keys() == tuned.keys()
    assert max(float((ours[k] - tuned[k]).abs().max()) for k in tuned) < 1e-6


@pytest.mark.parametrize("kind", ["paligemma", "internvl", "convnext"])
def test_a_bare_parameter_beside_layers_cannot_be_kept(kind, workshop, tmp_path: Path) -> None:
    made = zoo.model(kind) if kind in zoo.KINDS else oracle.tiny_model(kind)
    made.save_pretrained(tmp_path / "b")
    with torch.no_grad():
        for _, p in made.named_parameters():
            p.add_(0.01)
    made.save_pretrained(tmp_path / "t")
    with pytest.raises(Unsupported, match="cannot keep both") as e:
        adapterpack.extract(tmp_path / "b", tmp_path / "t", tmp_path / "a", rank=4, rest="keep")
    assert "--rest drop" in str(e.value.hint)


def test_a_quantised_base_and_what_it_stands_for(files, tmp_path: Path) -> None:
    """An FP8 base: the change is from its exact values, and merging gives the tuned model."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    oracle.save_base(oracle.tiny_model("llama", torch.bfloat16, **sizes), tmp_path / "o")
    stored = load_file(tmp_path / "o" / "model.safetensors")
    for name in [n for n in stored if n.endswith("_proj.weight")]:
        rows, columns = (-(-n // 128) for n in stored[name].shape)
        stored[f"{name}_scale_inv"] = torch.full((rows, columns), 2.0**-6)
        stored[name] = (stored[name].float() * 64).to(torch.float8_e4m3fn)
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    save_file(stored, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    tuned = tuned_all(tmp_path / "o", tmp_path / "t", ("_proj",))
    result = adapterpack.extract(tmp_path / "b", tuned, tmp_path / "a", rank=256)
    assert any("FP8" in n or "fp8" in n for n in result.notes)
    adapterpack.merge(tmp_path / "a", tmp_path / "b", tmp_path / "m", verify="full")
    merged, wanted = files.tensors(tmp_path / "m"), files.tensors(tuned)
    wrong = sum(int((merged[k] != wanted[k]).sum()) for k in wanted)
    assert wrong <= sum(x.numel() for x in wanted.values()) * 1e-3


# -- what is refused ---------------------------------------------------------------------------------------


HOSTILE = {
    "another shape": ({"model__layers__0__mlp__up_proj__weight": torch.zeros(4, 64)}, WrongBase, "up_proj"),
    "tokens added": ({"model__embed_tokens__weight": torch.zeros(100, 64)}, WrongBase, "embed_tokens"),
    "a tensor more": ({"score__weight": torch.zeros(2, 64)}, WrongBase, "the base lacks score.weight"),
    "a tensor less": ({"model__norm__weight": None}, WrongBase, "the tuned model lacks model.norm.weight"),
    "NaN": ({"model__layers__1__mlp__up_proj__weight": torch.full((128, 64), float("nan"))}, InvalidFile, "tuned"),
    "infinity": ({"model__layers__1__mlp__up_proj__weight": torch.full((128, 64), float("inf"))}, InvalidFile, "NaN"),
    "NaN that is kept": ({"model__norm__weight": torch.full((64,), float("nan"))}, InvalidFile, "model.norm"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_models_that_cannot_be_compared(name, workshop, tmp_path: Path) -> None:
    edits, error, text = HOSTILE[name]
    base, tuned = tuned_by(workshop, "linear-llama", tmp_path / "t")
    odd = edited(tuned, tmp_path / "o", **edits)
    with pytest.raises(error, match=text):
        adapterpack.extract(base, odd, tmp_path / "a", rank=4, rest="keep")
    assert not (tmp_path / "a").exists()


def test_factors_that_leave_the_range_of_the_dtype(workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    huge = torch.zeros(128, 64)
    huge[0, 0] = 1e30
    odd = edited(base, tmp_path / "o", model__layers__1__mlp__up_proj__weight=huge)
    with pytest.raises(InvalidFile, match="F16"):
        adapterpack.extract(base, odd, tmp_path / "a", rank=1, dtype="float16")


def test_the_same_model_twice(workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    with pytest.raises(NothingChanged):
        adapterpack.extract(base, base, tmp_path / "a", rank=4)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"rank": 4, "energy": 0.5},
        {"rank": 0},
        {"energy": 0.0},
        {"energy": 1.5},
        {"energy": float("nan")},
        {"rank": 4, "max_rank": 2},
        {"rank": 4, "rest": "perhaps"},
        {"rank": 4, "dtype": "int8"},
    ],
)
def test_calls_that_make_no_sense(how, workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    with pytest.raises(UsageError):
        adapterpack.extract(base, base, tmp_path / "a", **how)


# -- the command line --------------------------------------------------------------------------------------


def test_the_command_line(workshop, files, tmp_path: Path) -> None:
    base, tuned = tuned_by(workshop, "linear-llama", tmp_path / "t")
    args = ["extract", "--base", base, "--tuned", tuned, "--output", tmp_path / "a"]
    done = run(*args, "--rank", "4", "--dry-run", "--json")
    assert done.code == 0 and not (tmp_path / "a").exists()
    planned = done.json
    assert planned["schema"] == "adapterpack.extract/1"
    assert planned["max_rel_error"] is None and planned["modules"][0]["rel_error"] is None
    done = run(*args, "--rank", "4", "--json")
    assert done.code == 0, done.err
    assert set(done.json) == {
        "schema",
        "output",
        "modules",
        "max_rel_error",
        "unchanged",
        "kept",
        "dropped",
        "bytes_out",
        "notes",
    }
    assert done.json["bytes_out"] == planned["bytes_out"] == oracle.adapter_bytes(tmp_path / "a")
    assert len(done.json["modules"]) == len(planned["modules"]) == 8
    assert run(*args, "--rank", "4").code == 1
    done = run(*args, "--energy", "0.5", "--overwrite", "-q")
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "a"))
    done = run(*args, "--energy", "0.5", "--overwrite", "--dry-run")
    assert done.code == 0 and "known once the ranks are" in done.out
    assert run(*args).code == 2
    norm = edited(tuned, tmp_path / "o", model__norm__weight=torch.full((64,), 3.0))
    args[4] = norm
    done = run(*args, "--rank", "4", "--overwrite", "--json")
    assert done.code == 4 and json.loads(done.out)["error"]["code"] == "loss-refused"
    done = run(*args, "--rank", "4", "--overwrite", "--rest", "keep")
    assert done.code == 0 and "kept whole" in done.out and "model.norm.weight" in done.out


def test_an_output_that_would_harm_an_input(workshop, tmp_path: Path) -> None:
    base, tuned = tuned_by(workshop, "linear-llama", tmp_path / "t")
    with pytest.raises((UsageError, DestinationExists)):
        adapterpack.extract(base, tuned, tuned, rank=4, overwrite=True)
    assert cases.BY_NAME["linear-llama"] and (tuned / "model.safetensors").exists()
