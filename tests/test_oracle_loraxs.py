"""LoRA-XS against its own definition: PEFT has no such method, and misreads its files."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import cases
import oracle
import pytest
import sklearn
import torch
from bitexact import codes
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from sklearn.decomposition import TruncatedSVD

import adapterpack
from adapterpack.errors import InvalidFile, LossRefused, Unsupported, WrongBase
from adapterpack.recipes import from_metadata

_TARGETS = ["q_proj", "k_proj", "down_proj"]
_SPELLINGS = ("_lora_latent_mapping.weight", ".default_lora_latent_mapping.weight")


def _train(base: Path, directory: Path, spelling: str, **fields: object) -> dict[str, torch.Tensor]:
    """What the authors' code leaves: PEFT's LoRA with A and B from the SVD of the base and a module between them.

    Returns:
        The model's weights as the trained model computes with them, f32.
    """
    model = get_peft_model(
        oracle.load_base(base), LoraConfig(**{"r": 6, "lora_alpha": 9, "target_modules": _TARGETS, **fields})
    )
    g = torch.Generator().manual_seed(3)
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            w = layer.base_layer.weight.detach().float()
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
            rank = layer.r["default"]
            layer.lora_A["default"].weight.data = (s[:rank, None] * vh[:rank]).contiguous()
            layer.lora_B["default"].weight.data = u[:, :rank].contiguous()
            layer.default_lora_latent_mapping = torch.nn.Linear(rank, rank, bias=False)
            r = layer.default_lora_latent_mapping.weight
            r.data = torch.randn(r.shape, generator=g) * 0.3
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weights[f"{name.removeprefix('base_model.model.')}.weight"] = (
                w + (b @ r @ a).detach() * layer.scaling["default"]
            )
    # PEFT's own naming gives the newer spelling.
    state = {k: v.clone() for k, v in oracle.get_peft_model_state_dict(model).items()}
    assert sum(k.endswith(_SPELLINGS[1]) for k in state) == len(weights) == 6
    directory.mkdir()
    named = {k.replace(_SPELLINGS[1], spelling): v for k, v in state.items()}
    save_file(named, directory / "adapter_model.safetensors", {"format": "pt"})
    model.peft_config["default"].save_pretrained(directory)
    return weights


@pytest.fixture(params=_SPELLINGS, ids=["older", "newer"])
def trained(request, workshop, tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    base = workshop.base("llama")
    return tmp_path / "xs", base, _train(base, tmp_path / "xs", request.param)


def test_the_merge_is_the_definition_bit_for_bit(trained, files, tmp_path: Path) -> None:
    adapter, base, weights = trained
    result = adapterpack.merge(adapter, base, tmp_path / "m", verify="full")
    merged, original = files.tensors(tmp_path / "m"), files.tensors(base)
    assert result.tensors_changed == len(weights)
    assert all(files.same(merged[k], weights.get(k, original[k])) for k in original)
    assert adapterpack.verify(adapter, tmp_path / "m", base=base).equal


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_into_16_bits_it_is_rounded_once(dtype, workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama", dtype)
    weights = _train(base, tmp_path / "xs", _SPELLINGS[1])
    adapterpack.merge(tmp_path / "xs", base, tmp_path / "m", verify="full")
    merged = files.tensors(tmp_path / "m")
    assert all(files.same(merged[k], w.to(cases.DTYPES[dtype])) for k, w in weights.items())


def test_patterns_and_rslora(workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama")
    patterns = {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"down_proj": 30}, "use_rslora": True}
    weights = _train(base, tmp_path / "xs", _SPELLINGS[0], **patterns)
    assert adapterpack.inspect(tmp_path / "xs").ranks == {3: 2, 6: 4}
    adapterpack.merge(tmp_path / "xs", base, tmp_path / "m")
    assert all(files.same(files.tensors(tmp_path / "m")[k], w) for k, w in weights.items())


def test_as_plain_lora_peft_merges_it_to_the_same_bits(trained, files, tmp_path: Path) -> None:
    adapter, base, weights = trained
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora")
    assert (str(made.grade), made.max_rel_error) == ("equivalent", 0)
    merged = oracle.peft_merge(base, tmp_path / "lora")
    assert merged.load.clean
    assert all(files.same(merged[k], w) for k, w in weights.items())
    assert adapterpack.check(tmp_path / "lora", base=base).healthy
    assert adapterpack.inspect(tmp_path / "lora").method == "lora"


def test_peft_misreads_it_and_check_says_so(trained, files) -> None:
    adapter, base, weights = trained
    loaded = oracle.peft_merge(base, adapter)
    assert len(loaded.load.unexpected) == len(weights), "PEFT drops what was trained"
    original = files.tensors(base)
    for name, right in weights.items():
        wrong = torch.linalg.norm(loaded[name] - right) / torch.linalg.norm(right - original[name])
        assert wrong > 0.5
    health = adapterpack.check(adapter, base=base)
    assert not health.healthy
    assert codes(health) == {"misread-by-peft"}
    assert "--to lora" in str(health.findings[0].fix)


def test_the_file_comes_back_and_is_seen(trained, tmp_path: Path) -> None:
    adapter, _, _ = trained
    seen = adapterpack.inspect(adapter)
    assert (seen.method, seen.encoding, seen.ranks) == ("loraxs", "loraxs", {6: 6})
    adapterpack.compress(adapter, tmp_path / "a.apack")
    adapterpack.unpack(tmp_path / "a.apack", tmp_path / "back")
    assert oracle.tree_hash(tmp_path / "back") == oracle.tree_hash(adapter)
    adapterpack.convert(adapter, tmp_path / "half", dtype="bf16", max_error=0.05)
    assert adapterpack.inspect(tmp_path / "half").dtypes == {"BF16": 18}


def test_a_moved_latent_is_found(trained, files, tmp_path: Path) -> None:
    adapter, base, _ = trained
    key = next(k for k in files.tensors(adapter) if "latent" in k)
    moved = files.tensors(adapter)[key].clone()
    moved[1, 2] += 0.5
    odd = files.edited(adapter, tmp_path / "odd", {key: moved})
    assert not adapterpack.verify(adapter, odd).equal
    adapterpack.merge(adapter, base, tmp_path / "m")
    assert not adapterpack.verify(odd, tmp_path / "m", base=base).equal


FAULTS = {
    "no latent": (None, InvalidFile, "lacks latent"),
    "not square": (torch.zeros(6, 5), InvalidFile, "R"),
    "another rank": (torch.zeros(5, 5), InvalidFile, "R"),
    "three dimensions": (torch.zeros(6, 6, 1), InvalidFile, "R"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_latents_that_do_not_fit_are_refused(what, workshop, files, tmp_path: Path) -> None:
    value, error, message = FAULTS[what]
    base = workshop.base("llama")
    _train(base, tmp_path / "xs", _SPELLINGS[1])
    key = next(k for k in files.tensors(tmp_path / "xs") if "latent" in k)
    odd = files.edited(tmp_path / "xs", tmp_path / "odd", {key: value})
    with pytest.raises(error, match=message):
        adapterpack.merge(odd, base, tmp_path / "m")
    assert "half-pair" in codes(adapterpack.check(odd))


def test_one_latent_under_two_names_and_dora_are_refused(workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama")
    _train(base, tmp_path / "xs", _SPELLINGS[1])
    key = next(k for k in files.tensors(tmp_path / "xs") if "latent" in k)
    twice = {key.replace(_SPELLINGS[1], _SPELLINGS[0]): torch.zeros(6, 6)}
    with pytest.raises(InvalidFile, match="two names"):
        adapterpack.merge(files.edited(tmp_path / "xs", tmp_path / "odd", twice), base, tmp_path / "m")
    dora = files.edited(tmp_path / "xs", tmp_path / "dora", config={"use_dora": True})
    with pytest.raises(Unsupported):
        adapterpack.merge(dora, base, tmp_path / "m")
    assert json.loads((dora / "adapter_config.json").read_text())["peft_type"] == "LORA"


# -- A and B left to the base --------------------------------------------------------------------------------


def _reference(w: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) as the authors' code computes them (utils/svd_utils.py, initialization_utils.py)."""
    svd = TruncatedSVD(n_components=rank, n_iter=10, random_state=42)
    inputs = w.T.cpu().detach().numpy()
    svd.fit(inputs)
    a, b = svd.transform(inputs), svd.components_
    return torch.tensor(a, dtype=w.dtype).T, torch.tensor(b, dtype=w.dtype).T


def _authors(
    base: Path,
    directory: Path,
    spelling: str = _SPELLINGS[1],
    through: torch.dtype = torch.float32,
    stored: torch.dtype = torch.float32,
    turn: bool = False,
    **fields: object,
) -> Path:
    """A LoRA-XS of that base with A and B of the authors' SVD, as older scikit-learn turns them if asked."""
    _train(base, directory, spelling, **fields)
    tensors = load_file(directory / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    for key in [k for k in tensors if k.endswith("lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = _reference(weights[f"{module}.weight"].to(through), tensors[key].shape[0])
        if turn:
            # scikit-learn below 1.5: by the largest entry on the side of W^T's rows, which A holds.
            signs = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
            a, b = a * signs, b * signs.T
        tensors[key] = a.to(stored).contiguous()
        tensors[key.replace("lora_A", "lora_B")] = b.to(stored).contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(params=_SPELLINGS, ids=["older", "newer"])
def whole(request, workshop, tmp_path: Path) -> tuple[Path, Path]:
    base = workshop.base("llama")
    patterns = {"rank_pattern": {"k_proj": 3}}
    return _authors(base, tmp_path / "whole", request.param, **patterns), base


def _record(directory: Path, files) -> dict[str, Any]:
    return json.loads(files.metadata(directory)["adapterpack"])["recipe"]


def _rewritten(adapter: Path, to: Path, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    to.mkdir()
    (to / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    text = json.dumps({"version": 1, "recipe": record})
    save_file(tensors, to / "adapter_model.safetensors", {"format": "pt", "adapterpack": text})
    return to


def test_the_base_gives_a_and_b_back_bit_for_bit(whole, files, tmp_path: Path) -> None:
    adapter, base = whole
    made = adapterpack.convert(adapter, tmp_path / "lean", to="seed", base=base)
    assert (made.grade, made.max_rel_error, made.encoding) == ("lossless", 0, "seed")
    assert any("stock PEFT cannot read it" in note for note in made.notes)
    lean, tensors = files.tensors(tmp_path / "lean"), files.tensors(adapter)
    assert lean.keys() == {k for k in tensors if "latent" in k}
    record = _record(tmp_path / "lean", files)
    assert record["name"] == "truncated-svd"
    assert record["libraries"]["scikit-learn"] == sklearn.__version__
    factors = {k: t for k, t in tensors.items() if k not in lean}
    assert record["sha256"] == {k: hashlib.sha256(t.numpy().tobytes()).hexdigest() for k, t in factors.items()}
    assert adapterpack.inspect(tmp_path / "lean").ranks == {3: 2, 6: 4}

    adapterpack.convert(tmp_path / "lean", tmp_path / "back", to="loraxs", base=base)
    back = files.tensors(tmp_path / "back")
    assert back.keys() == tensors.keys()
    assert all(files.same(back[k], t) for k, t in tensors.items())
    assert "adapterpack" not in files.metadata(tmp_path / "back")


def test_without_a_and_b_it_merges_verifies_and_converts_the_same(whole, files, tmp_path: Path) -> None:
    adapter, base = whole
    lean = tmp_path / "lean"
    adapterpack.convert(adapter, lean, to="seed", base=base)
    for source, name in ((adapter, "of-whole"), (lean, "of-lean")):
        adapterpack.merge(source, base, tmp_path / name, verify="full")
        adapterpack.convert(source, tmp_path / f"lora-{name}", to="lora", base=base)
    for name in ("", "lora-"):
        ours, theirs = (files.tensors(tmp_path / f"{name}of-{kind}") for kind in ("lean", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(files.same(ours[k], theirs[k]) for k in theirs)
    assert adapterpack.verify(adapter, lean, base=base).equal
    assert adapterpack.verify(lean, tmp_path / "of-whole", base=base).equal
    with pytest.raises(WrongBase, match="base"):
        adapterpack.verify(adapter, lean)
    moved = files.tensors(lean)
    moved[min(moved)] = moved[min(moved)] + 0.25
    odd = _rewritten(lean, tmp_path / "odd", _record(lean, files), moved)
    assert not adapterpack.verify(adapter, odd, base=base).equal


def test_peft_does_nothing_with_it_and_check_says_so(whole, files, tmp_path: Path) -> None:
    adapter, base = whole
    adapterpack.convert(adapter, tmp_path / "lean", to="seed", base=base)
    loaded, original = oracle.peft_merge(base, tmp_path / "lean"), files.tensors(base)
    assert all(files.same(loaded[k], original[k]) for k in original)
    health = adapterpack.check(tmp_path / "lean", base=base)
    assert codes(health) == {"misread-by-peft"}
    assert "changes nothing" in health.findings[0].message
    assert "--base" in str(health.findings[0].fix)


@pytest.mark.parametrize(
    ("base_dtype", "how"),
    [
        ("f32", {"turn": True}),
        ("f32", {"stored": torch.bfloat16}),
        ("bf16", {}),
        ("f16", {"through": torch.float16, "stored": torch.float16}),
        ("bf16", {"through": torch.float16}),
    ],
    ids=["signs of older scikit-learn", "stored in bf16", "loaded in f32", "f16", "loaded in f16"],
)
def test_other_ways_in_which_they_were_made(base_dtype, how, workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama", base_dtype)
    adapter = _authors(base, tmp_path / "whole", **how)
    assert adapterpack.convert(adapter, tmp_path / "lean", to="seed", base=base).grade == "lossless"
    adapterpack.convert(tmp_path / "lean", tmp_path / "back", to="loraxs", base=base)
    back = files.tensors(tmp_path / "back")
    assert all(files.same(back[k], t) for k, t in files.tensors(adapter).items())
    record = _record(tmp_path / "lean", files)
    assert record["signs"] == ("inputs" if how.get("turn") else "outputs")


def test_others_are_kept_or_measured(workshop, files, tmp_path: Path) -> None:
    """An exact SVD gives others in the last digits, and here and there another sign."""
    base = workshop.base("llama")
    adapter = _authors(base, tmp_path / "whole")
    near = {k: t * (1 + 2e-6) if "lora_A" in k else t for k, t in files.tensors(adapter).items()}
    save_file(near, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(LossRefused, match="bit for bit") as caught:
        adapterpack.convert(adapter, tmp_path / "lean", to="seed", base=base)
    assert "--max-error" in str(caught.value.hint)
    made = adapterpack.convert(adapter, tmp_path / "lean", to="seed", base=base, max_error=1e-5)
    assert made.grade == "approximate"
    assert 1.5e-6 < made.max_rel_error < 2.5e-6
    found = adapterpack.verify(adapter, tmp_path / "lean", base=base, max_error=1e-5)
    assert found.max_rel_error == pytest.approx(made.max_rel_error, rel=1e-3)
    far = {k: -t if "lora_A" in k else t for k, t in near.items()}
    save_file(far, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(LossRefused, match="would move"):
        adapterpack.convert(adapter, tmp_path / "far", to="seed", base=base, max_error=0.1)


def test_a_digest_that_does_not_agree_is_an_error(whole, files, workshop, tmp_path: Path) -> None:
    adapter, base = whole
    lean = tmp_path / "lean"
    adapterpack.convert(adapter, lean, to="seed", base=base)
    record, tensors = _record(lean, files), files.tensors(lean)
    for n, key in enumerate(record["sha256"]):
        digests = {**record["sha256"], key: "0" * 64}
        odd = _rewritten(lean, tmp_path / f"odd{n}", {**record, "sha256": digests}, tensors)
        with pytest.raises(InvalidFile, match="another SVD"):
            adapterpack.convert(odd, tmp_path / "x", to="loraxs", base=base)
    with pytest.raises(InvalidFile, match="another SVD") as caught:
        adapterpack.merge(odd, base, tmp_path / "m")
    assert f"scikit-learn {sklearn.__version__}" in str(caught.value.hint)
    assert not (tmp_path / "m").exists()
    with pytest.raises(InvalidFile, match="the base is another"):
        adapterpack.merge(lean, workshop.base("llama", seed=99), tmp_path / "m")
    with pytest.raises(WrongBase):
        adapterpack.merge(lean, workshop.base("llama", hidden_size=32), tmp_path / "m")
    config = json.loads((lean / "adapter_config.json").read_text())
    (lean / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(WrongBase, match="base") as without:
        adapterpack.convert(lean, tmp_path / "x", to="loraxs")
    assert without.value.hint == "--base BASE"


CHANGES = {
    "seed": (43, "is not a recipe"),
    "iterations": (9, "is not a recipe"),
    "signs": ("inputs", "another SVD"),
    "threads": (0, "is not a recipe"),
    "through": ("F16", "another SVD"),
    "stored": ("BF16", "another SVD"),
    "generator": ("scipy", "unknown recipe"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_recipe_is_an_error(field, workshop, files, tmp_path: Path) -> None:
    base = workshop.base("llama")
    adapterpack.convert(_authors(base, tmp_path / "whole"), tmp_path / "lean", to="seed", base=base)
    value, message = CHANGES[field]
    record = {**_record(tmp_path / "lean", files), field: value}
    odd = _rewritten(tmp_path / "lean", tmp_path / "odd", record, files.tensors(tmp_path / "lean"))
    with pytest.raises((InvalidFile, Unsupported), match=message):
        adapterpack.convert(odd, tmp_path / "x", to="loraxs", base=base)


def test_it_says_which_extra_it_takes(whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, base = whole
    adapterpack.convert(adapter, tmp_path / "lean", to="seed", base=base)
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    for source, to in ((adapter, "seed"), (tmp_path / "lean", "loraxs")):
        with pytest.raises(Unsupported, match="scikit-learn") as caught:
            adapterpack.convert(source, tmp_path / "x", to=to, base=base)
        assert caught.value.hint == "pip install 'adapterpack[methods]'"
    assert adapterpack.inspect(tmp_path / "lean").encoding == "seed"
    adapterpack.merge(adapter, base, tmp_path / "m")


def test_the_recipe_survives_its_json_and_no_pack_takes_it(whole, files, tmp_path: Path) -> None:
    adapter, base = whole
    adapterpack.convert(adapter, tmp_path / "lean", to="seed", base=base)
    text = files.metadata(tmp_path / "lean")["adapterpack"]
    recipe = from_metadata({"adapterpack": text})
    assert recipe is not None
    assert recipe.to_metadata() == text
    with pytest.raises(Unsupported, match="base's weights"):
        recipe.draw(torch)
    adapterpack.compress(tmp_path / "lean", tmp_path / "a.apack")
    adapterpack.merge(tmp_path / "a.apack", base, tmp_path / "m")
    adapterpack.unpack(tmp_path / "a.apack", tmp_path / "back")
    assert oracle.tree_hash(tmp_path / "back") == oracle.tree_hash(tmp_path / "lean")
    assert adapterpack.verify(adapter, tmp_path / "m", base=base).equal
