"""PiSSA, OLoRA and their like as plain LoRA: exact with their start, proven without it, or refused."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file
from test_cli import run

import adapterpack
from adapterpack.errors import InvalidFile, LossRefused, Unsupported, UsageError, WrongBase


@dataclass(frozen=True)
class Trained:
    """An adapter before and after training, the base, PEFT's own conversion and the trained model."""

    base: Path
    start: Path
    end: Path
    peft: Path | None
    model: dict[str, torch.Tensor]


_MADE: dict[str, Trained] = {}
CASES = {
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "pissa-niter": ("llama", {"init_lora_weights": "pissa_niter_4"}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "pissa-conv1d": ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_proj"]}),
    "pissa-rslora": ("llama", {"init_lora_weights": "pissa", "use_rslora": True}),
    "olora-patterns": (
        "llama",
        {"init_lora_weights": "olora", "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    ),
    "pissa-rslora-patterns": (
        "llama",
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"up_proj": 3},
        },
    ),
    "pissa-head": ("llama", {"init_lora_weights": "pissa", "modules_to_save": ["lm_head"]}),
    "pissa-bias": ("opt", {"init_lora_weights": "pissa", "bias": "all", "target_modules": ["q_proj", "fc1"]}),
}
CASES |= {
    name: (kind, {"init_lora_weights": init, **({"target_modules": ["c_attn", "c_proj"]} if kind == "gpt2" else {})})
    for name, kind, init in (
        ("corda", "llama", "corda"),
        ("lora-ga", "llama", "lora_ga"),
        ("lora-ga-conv1d", "gpt2", "lora_ga"),
    )
}
# PEFT refuses rslora with patterns, and its file lacks modules_to_save and biases.
OURS_ALONE = {"pissa-rslora-patterns", "pissa-head", "pissa-bias"}


def prepared(model, config: LoraConfig):
    """What CorDA and LoRA-GA want to see of data first."""
    if config.init_lora_weights not in ("corda", "lora_ga"):
        return model
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig

    # PEFT's corda.py takes `dataclass` from attrs, which PEFT does not require.
    sys.modules.setdefault("attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))  # type: ignore[arg-type]
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    tokens = torch.arange(60)[None]
    if config.init_lora_weights == "corda":
        config.corda_config = CordaConfig(corda_method="ipm")
        preprocess_corda(model, config, run_model=lambda: model(tokens))
    elif config.init_lora_weights == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(model, config, lambda: model(tokens, labels=tokens).loss.backward())
    return model


def made(name: str, workshop, scale: float = 0.1) -> Trained:
    if name in _MADE:
        return _MADE[name]
    kind, fields = CASES[name]
    base, root = workshop.base(kind), workshop.root / "initial" / name
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "up_proj"], **fields})
    model = oracle.make_adapter(root / "start", config, base=prepared(oracle.load_base(base), config), scale=0.0)
    oracle.perturb(model, scale)
    model.save_pretrained(root / "end")
    peft = None
    if name not in OURS_ALONE:
        # PEFT wants a start that does not say what it is.
        peft, plain = root / "peft", root / "plain"
        plain.mkdir()
        for f in (root / "start").iterdir():
            (plain / f.name).write_bytes(f.read_bytes())
        said = json.loads((plain / "adapter_config.json").read_text()) | {"init_lora_weights": True}
        (plain / "adapter_config.json").write_text(json.dumps(said))
        model.save_pretrained(peft, path_initial_model_for_weight_conversion=str(plain))
    merged = {k: v.clone() for k, v in model.merge_and_unload().state_dict().items()}
    _MADE[name] = Trained(base, root / "start", root / "end", peft, merged)
    return _MADE[name]


def worst(found, wanted, before) -> float:
    """The largest relative error of a tensor's change."""
    errors = []
    for k, w in wanted.items():
        change = float((w.double() - before[k].double()).norm())
        lost = float((found[k].double() - w.double()).norm())
        errors.append(lost / change if change else lost)
    return max(errors)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("name", CASES)
def test_with_its_start_it_is_plain_lora_of_the_pristine_base(name, workshop, files, tmp_path: Path) -> None:
    t = made(name, workshop)
    before = oracle.tree_hash(t.start), oracle.tree_hash(t.end)
    result = adapterpack.convert(t.end, tmp_path / "a", to="lora", init=t.start)
    assert (oracle.tree_hash(t.start), oracle.tree_hash(t.end)) == before
    assert (result.method, result.grade, result.max_rel_error) == ("lora", "equivalent", 0)
    merged = oracle.peft_merge(t.base, tmp_path / "a")
    assert merged.load.clean, (merged.load.missing, merged.load.unexpected)
    pristine = oracle.load_base(t.base).state_dict()
    assert worst(merged, t.model, pristine) < 2e-6
    adapterpack.merge(tmp_path / "a", t.base, tmp_path / "m", verify="full")
    assert worst(oracle.load_base(tmp_path / "m").state_dict(), t.model, pristine) < 2e-6
    if t.peft is not None:
        # The very tensors of PEFT's own conversion, and the same scales.
        ours, theirs = files.tensors(tmp_path / "a"), files.tensors(t.peft)
        assert ours.keys() == theirs.keys() and all(files.same(ours[k], theirs[k]) for k in ours)
        assert adapterpack.verify(t.peft, tmp_path / "a").max_rel_error < 1e-15
        assert files.config(tmp_path / "a")["init_lora_weights"] is True
        if "rslora" not in name:
            a, b = files.config(tmp_path / "a"), files.config(t.peft)
            assert all(a[k] == b[k] for k in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"))


@pytest.mark.parametrize("name", ["pissa", "olora", "pissa-conv1d"])
def test_the_base_proves_a_start(name, workshop, tmp_path: Path) -> None:
    t = made(name, workshop)
    adapterpack.convert(t.end, tmp_path / "a", to="lora", init=t.start, base=t.base)
    other = oracle.load_base(t.base)
    oracle.perturb(other, 0.01)
    oracle.save_base(other, tmp_path / "other")
    with pytest.raises(WrongBase, match="does not give the start"):
        adapterpack.convert(t.end, tmp_path / "b", to="lora", init=t.start, base=tmp_path / "other")


@pytest.mark.parametrize("name", ["pissa", "olora", "pissa-conv1d", "pissa-rslora", "olora-patterns", "pissa-head"])
def test_a_start_that_is_a_function_of_the_base_is_made_again(name, workshop, tmp_path: Path) -> None:
    t = made(name, workshop)
    result = adapterpack.convert(t.end, tmp_path / "a", to="lora", base=t.base, max_error=1e-3)
    assert 0 < result.max_rel_error < 1e-4
    assert any("made again" in n for n in result.notes)
    merged = oracle.peft_merge(t.base, tmp_path / "a")
    assert merged.load.clean
    # What PEFT makes of the adapter when it loads it into the pristine base, and what was trained.
    pristine = oracle.load_base(t.base).state_dict()
    assert worst(merged, oracle.peft_merge(t.base, t.end), pristine) < 2e-6
    assert worst(merged, t.model, pristine) < max(2e-6, 2 * result.max_rel_error)


def short(t: Trained, files, where: Path) -> Path:
    """An adapter that training has hardly moved: what f32 leaves open of its start is much of its change."""
    start, end = files.tensors(t.start), files.tensors(t.end)
    return files.edited(t.end, where, {k: start[k] + (end[k] - start[k]) * 1e-3 for k in end})


def test_a_start_that_is_uncertain_beside_a_small_change_is_refused(workshop, files, tmp_path: Path) -> None:
    t = made("pissa", workshop)
    hardly = short(t, files, tmp_path / "h")
    with pytest.raises(LossRefused, match="the change of W would move"):
        adapterpack.convert(hardly, tmp_path / "a", to="lora", base=t.base)
    assert not (tmp_path / "a").exists()
    result = adapterpack.convert(hardly, tmp_path / "a", to="lora", base=t.base, max_error=0.1)
    assert result.grade == "approximate" and result.max_rel_error > 5e-6
    # With the start it is exact, however small.
    result = adapterpack.convert(hardly, tmp_path / "b", to="lora", init=t.start)
    assert (result.grade, result.max_rel_error) == ("equivalent", 0)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_weights_that_leave_a_choice_prove_no_start(name, workshop, tmp_path: Path) -> None:
    """Equal singular values, dependent columns: every SVD and QR is right, and no two need agree."""
    t = made(name, workshop)
    model = oracle.load_base(t.base)
    with torch.no_grad():
        w = model.model.layers[0].self_attn.q_proj.weight
        w.copy_(torch.eye(64) if name == "pissa" else torch.ones(64, 64))
    oracle.save_base(model, tmp_path / "b")
    with pytest.raises(Unsupported, match="more than one"):
        adapterpack.convert(t.end, tmp_path / "a", to="lora", base=tmp_path / "b", max_error=1.0)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_without_start_and_base_it_is_refused_and_says_what_it_takes(name, workshop, tmp_path: Path) -> None:
    t = made(name, workshop)
    with pytest.raises(Unsupported) as e:
        adapterpack.convert(t.end, tmp_path / "a", to="lora")
    assert "--base" in str(e.value.hint) and "--init" in str(e.value.hint)
    with pytest.raises(Unsupported) as e:
        adapterpack.merge(t.end, t.base, tmp_path / "m")
    assert "convert SRC DST --to lora --init" in str(e.value.hint)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["pissa_niter_16", "corda", "lora_ga"])
def test_a_start_that_nobody_can_make_again(kind, workshop, files, tmp_path: Path) -> None:
    t = made("pissa", workshop)
    odd = files.edited(t.end, tmp_path / "o", config={"init_lora_weights": kind})
    for how in ({}, {"base": t.base}):
        with pytest.raises(Unsupported) as e:
            adapterpack.convert(odd, tmp_path / "a", to="lora", **how)
        assert "--init" in str(e.value.hint)
    # With its start it does not matter how that was made.
    adapterpack.convert(odd, tmp_path / "a", to="lora", init=t.start)
    assert adapterpack.verify(t.peft, tmp_path / "a").max_rel_error < 1e-15


def test_loftq_has_no_plain_form(workshop, files, tmp_path: Path) -> None:
    t = made("pissa", workshop)
    odd = files.edited(t.end, tmp_path / "o", config={"init_lora_weights": "loftq"})
    for how in ({}, {"base": t.base}, {"init": t.start}):
        with pytest.raises(Unsupported, match="quantised"):
            adapterpack.convert(odd, tmp_path / "a", to="lora", **how)


# -- hostile starts ----------------------------------------------------------------------------------------


def test_the_trained_adapter_is_no_start(workshop, tmp_path: Path) -> None:
    for name in ("pissa", "pissa-niter", "olora"):
        t = made(name, workshop)
        with pytest.raises(InvalidFile, match="not orthogonal"):
            adapterpack.convert(t.end, tmp_path / "a", to="lora", init=t.end)


def test_starts_of_other_adapters(workshop, files, tmp_path: Path) -> None:
    t = made("pissa", workshop)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    fewer = files.edited(t.start, tmp_path / "f", {key.format(x): None for x in "AB"})
    scaled = files.edited(t.start, tmp_path / "s", config={"lora_alpha": 7})
    a, b = (files.tensors(t.start)[key.format(x)] for x in "AB")
    lower = files.edited(t.start, tmp_path / "l", {key.format("A"): a[:2], key.format("B"): b[:, :2]})
    nan = files.edited(t.start, tmp_path / "n", {key.format("A"): a * float("nan")})
    for start, text in ((fewer, "only one of them"), (scaled, "scale"), (lower, "rank"), (nan, "orthogonal")):
        with pytest.raises(InvalidFile, match=text):
            adapterpack.convert(t.end, tmp_path / "a", to="lora", init=start)
    assert not (tmp_path / "a").exists()


def test_calls_that_make_no_sense(workshop, files, tmp_path: Path) -> None:
    t = made("pissa", workshop)
    plain, _ = workshop.pair("linear-llama")
    vera, _ = workshop.pair("projection-mixed")
    for source in (plain, vera):
        with pytest.raises(UsageError, match="leaves the base alone"):
            adapterpack.convert(source, tmp_path / "a", to="lora", init=t.start)
    with pytest.raises(UsageError, match="--to lora"):
        adapterpack.convert(t.end, tmp_path / "a", dtype="bfloat16", init=t.start)
    with pytest.raises(UsageError):
        adapterpack.convert(t.end, t.start, to="lora", init=t.start, overwrite=True)
    dora = files.edited(t.end, tmp_path / "d", config={"use_dora": True})
    with pytest.raises(Unsupported, match="DoRA"):
        adapterpack.convert(dora, tmp_path / "a", to="lora", init=t.start)


def test_a_quantised_or_other_base_makes_no_start(workshop, tmp_path: Path) -> None:
    t = made("pissa", workshop)
    other = workshop.base("llama", hidden_size=32)
    with pytest.raises(WrongBase):
        adapterpack.convert(t.end, tmp_path / "a", to="lora", base=other, max_error=1)


def test_embeddings_beside_it_start_at_zero(workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama")
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "embed_tokens"])
    model = oracle.make_adapter(tmp_path / "start", config, base=oracle.load_base(base), scale=0.0)
    oracle.perturb(model, 0.1)
    model.save_pretrained(tmp_path / "end")
    wanted = {k: v.clone() for k, v in model.merge_and_unload().state_dict().items()}
    adapterpack.convert(tmp_path / "end", tmp_path / "a", to="lora", init=tmp_path / "start")
    merged = oracle.peft_merge(base, tmp_path / "a")
    assert merged.load.clean
    assert worst(merged, wanted, oracle.load_base(base).state_dict()) < 2e-6


# -- dtypes, laws, the command line ------------------------------------------------------------------------


def test_a_cast_on_the_way_is_measured(workshop, files, tmp_path: Path) -> None:
    t = made("pissa", workshop)
    with pytest.raises(LossRefused):
        adapterpack.convert(t.end, tmp_path / "a", to="lora", init=t.start, dtype="bfloat16")
    result = adapterpack.convert(t.end, tmp_path / "a", to="lora", init=t.start, dtype="bfloat16", max_error=0.1)
    assert result.grade == "approximate" and 1e-4 < result.max_rel_error < 0.1
    assert {t.dtype for t in files.tensors(tmp_path / "a").values()} == {torch.bfloat16}


@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["pissa_niter_2", "corda", "lora_ga"]),
    st.integers(0, 99),
)
def test_law_the_change_is_the_difference(out, into, rank, rslora, kind, seed) -> None:
    import tempfile

    g = torch.Generator().manual_seed(seed)
    key = "base_model.model.layers.0.p.lora_{}.weight"
    # Orthogonal factors, which pass for a start of any kind.
    start = {key.format("A"): torch.eye(rank, into), key.format("B"): torch.eye(out, rank)}
    end = {k: torch.randn(v.shape, generator=g) for k, v in start.items()}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "use_rslora": rslora, "init_lora_weights": kind}
    with tempfile.TemporaryDirectory() as root:
        for name, tensors in (("s", start), ("e", end)):
            (Path(root) / name).mkdir()
            save_file(tensors, Path(root) / name / "adapter_model.safetensors")
            (Path(root) / name / "adapter_config.json").write_text(json.dumps(config))
        adapterpack.convert(Path(root) / "e", Path(root) / "a", to="lora", init=Path(root) / "s")
        with adapterpack.containers.open_checkpoint(Path(root) / "a") as c:
            assert c.config["r"] == 2 * rank
            s = c.config["lora_alpha"] / (2 * rank)
            a, b = (torch.from_numpy(c.tensors[key.format(x)].numpy().copy()) for x in "AB")
    scale = 3 / (math.sqrt(rank) if rslora else rank)
    delta = scale * (end[key.format("B")].double() @ end[key.format("A")].double())
    delta -= scale * (start[key.format("B")].double() @ start[key.format("A")].double())
    assert torch.allclose(s * (b.double() @ a.double()), delta, rtol=1e-12, atol=1e-12)


def test_the_command_line(workshop, files, tmp_path: Path) -> None:
    t = made("pissa", workshop)
    done = run("convert", t.end, tmp_path / "a", "--to", "lora", "--init", t.start, "--json")
    assert done.code == 0, done.err
    assert done.json["grade"] == "equivalent" and done.json["max_rel_error"] == 0
    done = run("convert", t.end, tmp_path / "b", "--to", "lora")
    assert done.code == 1 and "--init" in done.err
    done = run("convert", short(t, files, tmp_path / "h"), tmp_path / "b", "--to", "lora", "--base", t.base)
    assert done.code == 4 and "--max-error" in done.err
    assert run("convert", t.end, tmp_path / "b", "--init", t.start, "--dtype", "bfloat16").code == 2
    assert run("convert", t.end, tmp_path / "b", "--to", "lora", "--init", tmp_path / "none").code == 1
