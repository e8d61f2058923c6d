"""Methods that take the base's weights: what they refuse and find, and what can be proved of them."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import cases
import oracle
import pytest
import torch
from peft import AdamssConfig, DeftConfig, FrodConfig, GloraConfig, OSFConfig, PeanutConfig, PsoftConfig

import adapterpack
from adapterpack import containers, methods
from adapterpack.adapter import Block, Kind, Request
from adapterpack.backend import TorchBackend
from adapterpack.base import Base
from adapterpack.errors import InvalidFile, Unsupported, WrongBase

_QU = ["q_proj", "up_proj"]
_OPT = ["q_proj", "fc1"]
CASES = (
    cases.Case("adamss", lambda: AdamssConfig(r=8, num_subspaces=3, subspace_rank=2, target_modules=_OPT), "opt"),
    cases.Case("deft", lambda: DeftConfig(r=4, target_modules=_QU, decomposition_method="qr")),
    cases.Case("frod", lambda: FrodConfig(target_modules=_QU, progressbar=False)),
    cases.Case("frod-seed", lambda: FrodConfig(target_modules=_QU, progressbar=False, save_projection=False)),
    cases.Case("glora", lambda: GloraConfig(r=4, target_modules=_OPT), "opt"),
    cases.Case("osf", lambda: OSFConfig(effective_rank=50, target_modules=_QU)),
    cases.Case("peanut", lambda: PeanutConfig(r=4, depth=1, target_modules=_QU)),
    cases.Case("psoft", lambda: PsoftConfig(r=4, psoft_alpha=4, target_modules=_QU)),
)
BY_NAME = {c.name: c for c in CASES}


@pytest.fixture
def made(workshop):
    """(adapter, base) of a case, f32."""
    return lambda name: (workshop.adapter(BY_NAME[name]), workshop.base_of(BY_NAME[name]))


def _parameter(adapter: Path, files) -> str:
    """A key whose values take part."""
    return max(k for k, t in files.tensors(adapter).items() if t.is_floating_point() and "frod_V" not in k)


# -- verify ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_NAME)
def test_verify_finds_a_parameter_that_moved(name, made, files, tmp_path: Path) -> None:
    adapter, base = made(name)
    assert adapterpack.verify(adapter, adapter, base=base).equal
    assert adapterpack.verify(adapter, adapter).equal
    key = _parameter(adapter, files)
    moved = files.tensors(adapter)[key].clone()
    moved.view(-1)[0] += 0.05
    other = files.edited(adapter, tmp_path / "other", {key: moved})
    for known in ({"base": base}, {}):
        found = adapterpack.verify(adapter, other, **known)
        assert not found.equal
        assert found.max_rel_error > 1e-5


@pytest.mark.parametrize("name", BY_NAME)
def test_verify_holds_a_merged_model_to_the_adapter(name, made, files, tmp_path: Path) -> None:
    adapter, base = made(name)
    adapterpack.merge(adapter, base, tmp_path / "merged")
    assert adapterpack.verify(adapter, tmp_path / "merged", base=base).equal
    key = _parameter(adapter, files)
    other = files.edited(adapter, tmp_path / "other", {key: files.tensors(adapter)[key] * 1.01})
    found = adapterpack.verify(other, tmp_path / "merged", base=base)
    assert {f.code for f in found.findings} == {"wrong-merge"}


@pytest.mark.parametrize("name", ["frod-seed", "psoft", "osf", "adamss"])
def test_what_is_found_in_the_base_does_not_depend_on_the_threads(name, tmp_path: Path) -> None:
    """It takes matrices of some size for a library to share them among threads."""
    over = {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 1, "num_attention_heads": 8}
    case = dataclasses.replace(BY_NAME[name], name=f"{name}-large", kind="llama", over={**over, "vocab_size": 8})
    where, on = tmp_path / "adapter", tmp_path / "base"
    config = case.config()
    config.target_modules = {"k_proj", "up_proj"}
    oracle.make_adapter(where, config, base_dir=on, scale=0.1, **case.over)
    seen = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            with Base(on) as base, containers.open_checkpoint(where) as c:
                method, adapter = methods.parse(c)
                xp = TorchBackend("cpu")
                change = next(iter(method.changes(adapter, Request(xp, base))))
                w = xp.native(base.tensor(change.target))
                block = Block(Kind.LINEAR, slice(0, len(w)), True, base.tensor(change.target).dtype)
                loaded = change.load(xp)
                seen.append((loaded.apply(w, block), loaded.exact(w.double(), block)))
        finally:
            torch.set_num_threads(1)
    change = seen[0][1] - w.double()
    for one, two in zip(*seen, strict=True):
        assert float((one - two).double().norm()) < 1e-6 * float(change.norm())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("psoft", {"psoft_alpha": 8}),
        ("psoft", {"ab_svd_init": "pissa_init"}),
        ("deft", {"alpha": 3}),
        ("peanut", {"act_fn": "gelu"}),
        ("peanut", {"scaling": 2.0}),
        ("adamss", {"random_seed": 5}),
        ("frod-seed", {"projection_prng_key": 5}),
    ],
)
def test_without_a_base_the_config_counts_too(name, config, made, files, tmp_path: Path) -> None:
    adapter, _ = made(name)
    other = files.edited(adapter, tmp_path / "other", config=config)
    assert not adapterpack.verify(adapter, other).equal


# -- conversion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["psoft", "deft", "osf"])
def test_the_lora_nearest_to_a_change_of_low_rank_is_that_change(name, made, tmp_path: Path) -> None:
    adapter, base = made(name)
    result = adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base, max_error=5e-6)
    assert result.max_rel_error < 5e-6
    assert adapterpack.verify(adapter, tmp_path / "lora", base=base).equal


@pytest.mark.parametrize("name", BY_NAME)
def test_a_cast_is_measured(name, made, tmp_path: Path) -> None:
    adapter, base = made(name)
    result = adapterpack.convert(adapter, tmp_path / "bf16", dtype="bf16", base=base, max_error=0.5)
    assert 1e-5 < result.max_rel_error < 0.5


# -- bases that are not the one ------------------------------------------------------------------------------


def _other_base(workshop, case: cases.Case, **over) -> Path:
    return workshop.base(case.kind, "f32", **{"tie": case.tie, "bias": case.bias, **over})


def test_clusters_of_another_base_are_refused(workshop, made, tmp_path: Path) -> None:
    adapter, _ = made("adamss")
    with pytest.raises(WrongBase, match="fall into clusters"):
        adapterpack.merge(adapter, _other_base(workshop, BY_NAME["adamss"], seed=99), tmp_path / "merged")


def test_a_projection_of_another_space_is_refused(made, files, tmp_path: Path) -> None:
    adapter, base = made("adamss")
    key = min(k for k in files.tensors(adapter) if k.endswith("newB"))
    other = files.edited(adapter, tmp_path / "other", {key: files.tensors(adapter)[key].flip(1)})
    with pytest.raises(WrongBase, match="singular vectors"):
        adapterpack.merge(other, base, tmp_path / "merged")


def test_adamss_says_which_extra_it_takes(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, base = made("adamss")
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(Unsupported, match="scikit-learn") as caught:
        adapterpack.merge(adapter, base, tmp_path / "merged")
    assert caught.value.hint == "pip install 'adapterpack[methods]'"


@pytest.mark.parametrize("name", ["adamss", "glora"])
def test_a_bias_that_the_base_lacks_is_refused(name, made, workshop, files, tmp_path: Path) -> None:
    adapter, base = made(name)
    bare = tmp_path / "base"
    bare.mkdir()
    kept = {k: t for k, t in files.tensors(base).items() if not k.endswith("0.fc1.bias")}
    _save(kept, bare, base)
    with pytest.raises(WrongBase, match="bias"):
        adapterpack.merge(adapter, bare, tmp_path / "merged")


def _save(tensors: dict[str, torch.Tensor], directory: Path, source: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: t.contiguous() for k, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())


@pytest.mark.parametrize(
    ("cls", "fields"),
    [(PsoftConfig, {"r": 4, "psoft_alpha": 4}), (OSFConfig, {}), (PeanutConfig, {"r": 4}), (GloraConfig, {"r": 4})],
)
def test_conv1d_is_refused_where_peft_has_none(cls, fields, workshop, tmp_path: Path) -> None:
    """An adapter of Linear layers, under the names and shapes of GPT-2's Conv1D."""
    base = workshop.base("gpt2")
    case = cases.Case(f"{cls.__name__}-linear", lambda: cls(**fields, target_modules=["q_proj"]))
    adapter = workshop.adapter(case)
    renamed = tmp_path / "renamed"
    _renamed(adapter, renamed, {"model.layers": "transformer.h", "self_attn.q_proj": "attn.c_proj"})
    with pytest.raises(WrongBase, match="Conv1D"):
        adapterpack.merge(renamed, base, tmp_path / "merged")


def _renamed(source: Path, destination: Path, names: dict[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    destination.mkdir()
    tensors = load_file(source / "adapter_model.safetensors")
    for old, new in names.items():
        tensors = {k.replace(old, new): t for k, t in tensors.items()}
    save_file(tensors, destination / "adapter_model.safetensors", {"format": "pt"})
    (destination / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())


def test_psoft_wants_a_part_that_the_base_has(made, files, tmp_path: Path) -> None:
    adapter, base = made("psoft")
    r = 100
    tensors = {k: torch.zeros(r * (r - 1) // 2 if k.endswith("weight") else r) for k in files.tensors(adapter)}
    wide = files.edited(adapter, tmp_path / "wide", tensors, {"r": r})
    with pytest.raises(WrongBase, match="no part of rank 100"):
        adapterpack.merge(wide, base, tmp_path / "merged")


# -- several adapters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glora", "adamss", "frod-seed", "frod", "psoft", "osf"])
def test_what_is_made_of_weights_does_not_come_second(name, made, workshop, tmp_path: Path) -> None:
    adapter, base = made(name)
    kind = BY_NAME[name].kind
    first = cases.Case(f"first-{kind}", cases.lora(target_modules=["fc1", "q_proj"]), kind)
    with pytest.raises(Unsupported, match="which an earlier adapter changes"):
        adapterpack.merge([workshop.adapter(first), adapter], base, tmp_path / "both")
    adapterpack.merge([adapter, workshop.adapter(first)], base, tmp_path / "merged", verify="full")


@pytest.mark.parametrize("name", ["deft", "peanut"])
def test_what_scales_weights_takes_those_that_the_first_one_left(name, made, workshop, files, tmp_path: Path) -> None:
    adapter, base = made(name)
    first = workshop.adapter(cases.Case("first-llama", cases.lora(target_modules=["fc1", "q_proj"])))
    adapterpack.merge([first, adapter], base, tmp_path / "both", verify="full")
    adapterpack.merge(first, base, tmp_path / "one")
    adapterpack.merge(adapter, tmp_path / "one", tmp_path / "two")
    both, two = files.tensors(tmp_path / "both"), files.tensors(tmp_path / "two")
    assert all(files.same(t, two[k]) for k, t in both.items())


# -- what is malformed -----------------------------------------------------------------------------------------

_MALFORMED = [
    ("psoft", {"ab_svd_init": "other"}, "ab_svd_init"),
    ("psoft", {"psoft_svd": "random"}, "psoft_svd"),
    ("psoft", {"psoft_alpha": 0}, "psoft_alpha"),
    ("psoft", {"psoft_mag_a": False}, "would ignore it"),
    ("psoft", {"r": 5}, "rank 5"),
    ("psoft", {"use_cayley_neumann": True, "num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms"),
    ("psoft", {"use_cayley_neumann": True, "cayley_neumann_eps": 1.5}, "cayley_neumann_eps"),
    ("psoft", {"psoft_svd": "lowrank", "random_seed": 1 << 70}, "random_seed"),
    ("psoft", {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 10**9}, "psoft_svd_lowrank_niter"),
    ("deft", {"decomposition_method": "svd"}, "decomposition_method"),
    ("deft", {"para": True}, "would ignore it"),
    ("deft", {"alpha": "7"}, "alpha"),
    ("glora", {"config_A_B": "vector"}, "says that A is 'vector'"),
    ("glora", {"config_C": "matrix"}, "PEFT knows"),
    ("peanut", {"depth": 0}, "would ignore it"),
    ("peanut", {"depth": 2}, "lacks encoders.1"),
    ("peanut", {"depth": 10**9}, "depth"),
    ("peanut", {"scaling": None}, "scaling"),
    ("frod-seed", {"sparse_rate": 2}, "sparse_rate"),
    ("frod-seed", {"projection_prng_key": "0"}, "projection_prng_key"),
]


@pytest.mark.parametrize(("name", "config", "message"), _MALFORMED)
def test_malformed_configs_are_refused_and_found(name, config, message, made, files, tmp_path: Path) -> None:
    adapter, base = made(name)
    bad = files.edited(adapter, tmp_path / "bad", config=config)
    with pytest.raises(InvalidFile, match=re.escape(message)):
        adapterpack.merge(bad, base, tmp_path / "merged")
    health = adapterpack.check(bad, base=base)
    assert not health.healthy
    assert any(message in f.message for f in health.findings), health.findings


@pytest.mark.parametrize(
    ("name", "config", "code"),
    [
        ("deft", {"r": 7}, "rank-mismatch"),
        ("glora", {"r": 7}, "rank-mismatch"),
        ("peanut", {"r": 7}, "rank-mismatch"),
        ("osf", {"effective_rank": 0.5}, "rank-mismatch"),
        ("osf", {"rank_pattern": {"q_proj": 9}}, "rank-mismatch"),
        ("adamss", {"num_subspaces": 4}, "config-mismatch"),
        ("frod", {"save_projection": False}, "wrong-projection-flag"),
        ("frod-seed", {"save_projection": True}, "wrong-projection-flag"),
    ],
)
def test_what_peft_would_misread_is_found(name, config, code, made, files, tmp_path: Path) -> None:
    adapter, _ = made(name)
    assert adapterpack.check(adapter).healthy
    bad = files.edited(adapter, tmp_path / "bad", config=config)
    assert code in {f.code for f in adapterpack.check(bad).findings}


@pytest.mark.parametrize(
    ("name", "ending", "shape"),
    [
        ("psoft", "vector_a", (5,)),
        ("psoft", "psoft_R.weight", (4, 4)),
        ("deft", "deft_R", (5, 64)),
        ("deft", "deft_P", (64,)),
        ("osf", "S_low", (3,)),
        ("osf", "V_low", (14, 64, 1)),
        ("peanut", "peanut_B.weight", (4, 64)),
        ("peanut", "decoders.0.weight", (4, 5)),
        ("glora", "glora_A.Xu", (5, 64)),
        ("glora", "glora_D.X", (64,)),
        ("adamss", "adamss_A.0", (2, 9)),
        ("adamss", "adamss_newB", (8,)),
        ("frod", "lambda_s_values", (41, 1)),
        ("frod", "frod_V.self_attn_q_proj", (64, 63)),
        ("frod", "frod_s_indices.self_attn_q_proj", (3, 40)),
    ],
)
def test_shapes_that_do_not_fit_are_refused_and_found(name, ending, shape, made, files, tmp_path: Path) -> None:
    adapter, base = made(name)
    key = next(k for k in files.tensors(adapter) if k.endswith(ending))
    bad = files.edited(adapter, tmp_path / "bad", {key: torch.zeros(shape)})
    with pytest.raises(InvalidFile):
        adapterpack.merge(bad, base, tmp_path / "merged")
    assert not adapterpack.check(bad).healthy
    gone = files.edited(adapter, tmp_path / "gone", {key: None})
    with pytest.raises((InvalidFile, WrongBase)):
        adapterpack.merge(gone, base, tmp_path / "merged")
    assert not adapterpack.check(gone).healthy


@pytest.mark.parametrize("name", BY_NAME)
def test_whole_numbers_are_no_parameters(name, made, files, tmp_path: Path) -> None:
    adapter, base = made(name)
    for n, (key, tensor) in enumerate(files.tensors(adapter).items()):
        if tensor.is_floating_point() and ("layers.0" in key or "frod_V" in key):
            bad = files.edited(adapter, tmp_path / str(n), {key: torch.ones(tensor.shape, dtype=torch.int64)})
            with pytest.raises(InvalidFile, match="is I64"):
                adapterpack.merge(bad, base, tmp_path / "merged")
            assert not adapterpack.check(bad).healthy


def test_frod_takes_its_directions_from_the_stored_basis(made, files, tmp_path: Path) -> None:
    """The same adapter with other signs of V: another library's. PEFT would take the U of its own V."""
    adapter, base = made("frod")
    tensors = files.tensors(adapter)
    turned: dict[str, torch.Tensor] = {}
    for key in (k for k in tensors if "frod_V." in k):
        kind = key.rpartition(".")[2]
        signs = torch.tensor([-1.0 if n % 3 == 0 else 1.0 for n in range(tensors[key].shape[1])])
        turned[key] = tensors[key] * signs
        rows, columns = tensors[f"base_model.frod_s_indices.{kind}"]
        for own in (k for k in tensors if k.endswith("values") and kind.partition("_")[2] in k.replace(".", "_")):
            turned[own] = tensors[own] * signs[rows] * signs[columns]
    assert sum("values" in k for k in turned) == 4
    other = files.edited(adapter, tmp_path / "other", turned)
    assert adapterpack.verify(adapter, other, base=base).max_rel_error < 5e-6


def test_places_outside_of_s_are_refused(made, files, tmp_path: Path) -> None:
    adapter, base = made("frod")
    key = next(k for k in files.tensors(adapter) if "s_indices" in k)
    for at, value in ((0, -1), (1, 64)):
        places = files.tensors(adapter)[key].clone()
        places[at, 0] = value
        bad = files.edited(adapter, tmp_path / f"bad{at}", {key: places})
        with pytest.raises(InvalidFile, match="do not lie in a matrix"):
            adapterpack.merge(bad, base, tmp_path / "merged")


def test_peanut_with_an_activation_of_its_own_parameters_is_refused(made, files, tmp_path: Path) -> None:
    adapter, base = made("peanut")
    bad = files.edited(adapter, tmp_path / "bad", config={"act_fn": "xielu"})
    with pytest.raises(Unsupported, match="'xielu'"):
        adapterpack.merge(bad, base, tmp_path / "merged")


def test_frod_of_an_unknown_order_is_refused_only_where_it_matters(files, workshop, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(BY_NAME["frod-seed"]), workshop.base_of(BY_NAME["frod-seed"])
    odd = tmp_path / "odd"
    # Two modules of one kind and no number: which weight comes first in the stack nobody knows.
    sides = {f"layers.{n}.self_attn": f"{side}.self_attn" for n, side in enumerate(("left", "right"))}
    _renamed(adapter, odd, sides)
    renamed_base = tmp_path / "base"
    renamed_base.mkdir()
    tensors = files.tensors(base)
    for old, new in sides.items():
        tensors = {k.replace(old, new): t for k, t in tensors.items()}
    _save(tensors, renamed_base, base)
    with pytest.raises(Unsupported, match="order of its layers"):
        adapterpack.merge(odd, renamed_base, tmp_path / "merged")


def test_inspect_tells_rank_and_method(made) -> None:
    ranks = {name: adapterpack.inspect(made(name)[0]) for name in BY_NAME}
    assert {n: (i.method, set(i.ranks)) for n, i in ranks.items()} == {
        "adamss": ("adamss", {8}),
        "deft": ("deft", {4}),
        "frod": ("frod", set()),
        "frod-seed": ("frod", set()),
        "glora": ("glora", {4}),
        "osf": ("osf", {14}),
        "peanut": ("peanut", {4}),
        "psoft": ("psoft", {4}),
    }
    assert (ranks["frod"].encoding, ranks["frod-seed"].encoding) == ("basis", "seed")
    assert not any(i.savings for i in ranks.values())
    assert json.loads((made("frod-seed")[0] / "adapter_config.json").read_text())["save_projection"] is False


def test_signs_that_svds_choose_are_peft_s_and_hold_in_f64() -> None:
    """The f64 run turns its vectors as the f32 run does, whatever its own SVD chose."""
    from adapterpack.methods._of_base import lowrank_svd, signs

    g = torch.Generator().manual_seed(3)
    w = torch.randn(40, 30, generator=g)
    for matrix in (w, w.T):
        u, s, vh = lowrank_svd(torch, matrix, 6, 10, 5)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            theirs = torch.svd_lowrank(matrix, q=6, niter=10)
        assert torch.equal(u, theirs[0]) and torch.equal(vh, theirs[2].T)
        u64, s64, vh64 = lowrank_svd(torch, matrix.double(), 6, 10, 5)
        assert float((s64 - s).abs().max()) < 1e-4
        turn = signs(u64, -u)
        assert float((u64 * turn + u).abs().max()) < 1e-3
        assert float((vh64 * turn[:, None] + vh).abs().max()) < 1e-3
