"""check --fix: PEFT loads the copy and computes what it should; what cannot be mended is left and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import planted
import pytest
import torch
import zoo
from click.testing import CliRunner
from peft import LoraConfig, VBLoRAConfig
from planted import FAULTS, PREFIX, VB, Draft

import adapterpack
from adapterpack.cli import cli
from adapterpack.errors import DestinationExists, LossRefused, UsageError
from adapterpack.health import mending

MENDED = [name for name, f in FAULTS.items() if f.mended]
LEFT = [name for name, f in FAULTS.items() if not f.mended and not f.warning]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.make(tmp_path_factory.mktemp("fix"))


def _merged(base: Path, adapter: Path) -> dict[str, torch.Tensor] | None:
    """What PEFT makes of it; None: it fails."""
    try:
        return dict(oracle.peft_merge(base, adapter))
    except Exception:
        return None


def _equal(x: dict[str, torch.Tensor] | None, y: dict[str, torch.Tensor] | None) -> bool:
    return x is not None and y is not None and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("name", MENDED)
def test_what_can_be_mended_computes_what_it_should_in_peft(place: Path, tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    base = planted.base_of(place, fault.source)
    faulty = planted.plant(place, fault, tmp_path / "faulty")
    sound = place / fault.source
    if fault.reference is not None:
        draft = Draft.read(sound)
        fault.reference(draft)
        sound = draft.write(tmp_path / "sound")
    before, trained = _merged(base, faulty), _merged(base, sound)
    assert trained is not None
    said = "fails" if before is None else "same" if _equal(before, trained) else "other"
    assert said == fault.before
    bytes_of_source = oracle.tree_hash(faulty)
    result = adapterpack.fix(faulty, tmp_path / "fixed", base=base if fault.base else None)
    assert oracle.tree_hash(faulty) == bytes_of_source
    assert fault.code in {f.code for f in result.fixed}
    assert fault.code not in {f.code for f in result.findings}
    assert result.healthy
    assert result.max_rel_error in (0.0, None)
    assert _equal(_merged(base, tmp_path / "fixed"), trained if fault.mended == "trained" else before)
    assert oracle.peft_load(oracle.load_base(base), tmp_path / "fixed")[1].clean


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_mended_is_left_and_said(place: Path, tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    if fault.code == "negative-topk-weight":
        pytest.skip("mended; see the test of its own")
    faulty = planted.plant(place, fault, tmp_path / "faulty")
    against = planted.base_of(place, fault.source) if fault.base else None
    result = adapterpack.fix(faulty, tmp_path / "fixed", base=against)
    assert not result.healthy
    assert fault.code in {f.code for f in result.findings}
    assert fault.code not in {f.code for f in result.fixed}
    # No tensor was touched.
    old, new = Draft.read(faulty), Draft.read(tmp_path / "fixed")
    assert old.tensors.keys() == new.tensors.keys()
    assert all(torch.equal(old.tensors[k].nan_to_num(7), new.tensors[k].nan_to_num(7)) for k in old.tensors)


def test_a_healthy_adapter_is_copied(place: Path, tmp_path: Path) -> None:
    result = adapterpack.fix(place / "lora", tmp_path / "copy")
    assert result.healthy and not result.fixed
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "copy" / file).read_bytes() == (place / "lora" / file).read_bytes()


def test_weights_that_load_as_nan_load_as_what_they_were_meant_for(tmp_path: Path) -> None:
    def peak(model: torch.nn.Module) -> None:
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "logits" in name:
                    p.copy_(torch.rand(p.shape, generator=g) * 300)

    how = {**VB, "r": 4, "num_vectors": 60, "topk": 4}
    base = oracle.save_base(oracle.tiny_model("llama"), tmp_path / "base")
    for save in (False, True):
        config = VBLoRAConfig(**how, save_only_topk_weights=save)
        oracle.make_adapter(tmp_path / str(save), config, post=peak, base_dir=base)
    assert any(bool(t.isnan().any()) for t in oracle.peft_merge(base, tmp_path / "True").values())
    result = adapterpack.fix(tmp_path / "True", tmp_path / "fixed")
    assert result.healthy and [f.code for f in result.fixed] == ["negative-topk-weight"]
    fixed, full = (oracle.peft_merge(base, tmp_path / n) for n in ("fixed", "False"))
    original = oracle.tiny_model("llama").state_dict()
    for key, t in fixed.items():
        assert bool(t.isfinite().all())
        moved = (full[key] - original[key]).norm()
        assert (t - full[key]).norm() <= 1e-5 * moved


def test_recorded_projections_come_back(place: Path, tmp_path: Path) -> None:
    """A seed whose digest was recorded, and a config that wants projections: PEFT refuses to load it."""
    adapterpack.convert(place / "vera", tmp_path / "seed", to="seed")
    config = json.loads((tmp_path / "seed" / "adapter_config.json").read_text())
    (tmp_path / "seed" / "adapter_config.json").write_text(json.dumps({**config, "save_projection": True}))
    assert _merged(place / "base", tmp_path / "seed") is None
    result = adapterpack.fix(tmp_path / "seed", tmp_path / "fixed")
    assert result.healthy and [f.code for f in result.fixed] == ["wrong-projection-flag"]
    assert _equal(_merged(place / "base", tmp_path / "fixed"), _merged(place / "base", place / "vera"))


def test_several_faults_at_once(place: Path, tmp_path: Path) -> None:
    """Behind a prefix nothing else can be seen."""
    d = Draft.read(place / "ranks")
    d.tensors = {f"module.{k.removeprefix(PREFIX)}".replace(".weight", ".x.weight"): t for k, t in d.tensors.items()}
    d.tensors = {k.replace("module.", "module.base_model.model.base_model.model."): t for k, t in d.tensors.items()}
    d.config |= {"r": 7, "rank_pattern": None, "target_modules": ["k_proj"], "lora_dropout": None}
    d.metadata = {}
    faulty = d.write(tmp_path / "a")
    assert len(planted.codes(faulty, warnings=True)) > 3
    result = adapterpack.fix(faulty, tmp_path / "fixed")
    assert result.healthy, result.findings
    base = place / "base"
    assert _equal(_merged(base, tmp_path / "fixed"), _merged(base, place / "ranks"))
    assert adapterpack.verify(place / "ranks", tmp_path / "fixed").max_rel_error == 0


@pytest.mark.parametrize("old", ["model", "language_model.model"])
@pytest.mark.parametrize("kind", ["gemma3", "qwen2-vl", "llava"])
def test_an_adapter_of_the_text_model_finds_its_place_in_the_nested_one(kind: str, old: str, tmp_path: Path) -> None:
    """Trained on the text part alone, or before its modules moved: PEFT drops every tensor and says nothing of it."""
    made = zoo.model(kind)
    base = oracle.save_base(made, tmp_path / "base")
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")
    oracle.make_adapter(tmp_path / "a", config, base=oracle.load_base(base), scale=0.5)
    trained = _merged(base, tmp_path / "a")
    assert trained is not None
    d = Draft.read(tmp_path / "a")
    d.tensors = {k.replace("model.language_model.", f"{old}."): t for k, t in d.tensors.items()}
    d.config["target_modules"] = ["q_proj"]
    d.write(tmp_path / "moved")
    own = Draft.read(tmp_path / "a").tensors.keys()
    lost = own & set(oracle.peft_load(oracle.load_base(base), tmp_path / "moved")[1].missing)
    health = adapterpack.check(tmp_path / "moved", base=base)
    on_disk = {"qwen2-vl": "model", "gemma3": "language_model.model", "llava": "language_model.model"}[kind] == old
    [finding] = [f for f in health.findings if f.code == ("old-names" if on_disk else "renamed-modules")]
    assert f"{old}.* -> model.language_model.*" in finding.message
    assert finding.warning == (not lost) and lost in (set(), own)
    result = adapterpack.fix(tmp_path / "moved", tmp_path / "fixed", base=base)
    assert result.healthy, result.findings
    assert Draft.read(tmp_path / "fixed").tensors.keys() == Draft.read(tmp_path / "a").tensors.keys()
    assert oracle.peft_load(oracle.load_base(base), tmp_path / "fixed")[1].clean
    assert _equal(_merged(base, tmp_path / "fixed"), trained)


def test_pickles_become_safetensors(place: Path, tmp_path: Path) -> None:
    directory = Draft.read(place / "lora").write(tmp_path / "a")
    tensors = Draft.read(directory).tensors
    torch.save(tensors, directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()
    (directory / "training_args.bin").write_bytes(b"x")
    result = adapterpack.fix(directory, tmp_path / "fixed", allow_pickle=True)
    assert [f.code for f in result.fixed] == ["pickle"]
    assert "file training_args.bin" in result.dropped
    new = Draft.read(tmp_path / "fixed")
    assert new.metadata["format"] == "pt" and all(torch.equal(new.tensors[k], t) for k, t in tensors.items())
    assert {f.code for f in result.findings}.isdisjoint({"pickle", "pickles-beside", "no-format"})


def test_the_name_of_the_base_is_written_if_it_is_one_of_the_hub(place: Path, tmp_path: Path, loopback: Any) -> None:
    files = {f.name: f.read_bytes() for f in (place / "base").iterdir()}
    loopback.create("org/llama", files)
    result = adapterpack.fix(place / "lora", tmp_path / "fixed", base="org/llama")
    assert [f.code for f in result.fixed] == ["base-reference"]
    assert Draft.read(tmp_path / "fixed").config["base_model_name_or_path"] == "org/llama"
    # A local base is no better than the one that is there.
    assert not adapterpack.fix(place / "lora", tmp_path / "other", base=place / "base").fixed


def test_a_repair_that_moves_the_change_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof is not of the menders' making: it measures what they did."""
    faulty = planted.plant(place, FAULTS["rank"], tmp_path / "faulty")

    def wrong(p: mending.Patient, finding: Any) -> mending.Mended:
        made = mending._ranks(p, finding)
        assert made is not None
        return mending._edited(made[0], {"lora_alpha": 9}), made[1]

    monkeypatch.setattr(mending, "MENDERS", {**mending.MENDERS, "rank-mismatch": wrong})
    with pytest.raises(LossRefused, match="move the change of W"):
        adapterpack.fix(faulty, tmp_path / "fixed")
    assert not (tmp_path / "fixed").exists()


def test_packs_are_read_and_written(place: Path, tmp_path: Path) -> None:
    faulty = planted.plant(place, FAULTS["rank"], tmp_path / "faulty")
    adapterpack.compress(faulty, tmp_path / "a.apack")
    assert not adapterpack.check(tmp_path / "a.apack").healthy
    result = adapterpack.fix(tmp_path / "a.apack", tmp_path / "fixed.apack")
    assert result.healthy and adapterpack.check(tmp_path / "fixed.apack").healthy
    adapterpack.unpack(tmp_path / "fixed.apack", tmp_path / "back")
    assert _equal(_merged(place / "base", tmp_path / "back"), _merged(place / "base", place / "lora"))


def test_destinations_are_guarded(place: Path, tmp_path: Path) -> None:
    faulty = planted.plant(place, FAULTS["rank"], tmp_path / "faulty")
    (tmp_path / "there").mkdir()
    with pytest.raises(DestinationExists):
        adapterpack.fix(faulty, tmp_path / "there")
    with pytest.raises(UsageError):
        adapterpack.fix(faulty, faulty, overwrite=True)
    assert adapterpack.fix(faulty, tmp_path / "there", overwrite=True).healthy


def _run(*args: Any) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in args])


def test_the_command_line(place: Path, tmp_path: Path) -> None:
    faulty = planted.plant(place, FAULTS["rank"], tmp_path / "faulty")
    seen = _run("check", faulty)
    assert seen.exit_code == 3 and "--fix DST tries to mend rank-mismatch" in seen.stdout
    done = _run("check", faulty, "--fix", tmp_path / "a")
    assert done.exit_code == 0 and "mended: rank-mismatch" in done.stdout and "the copy is healthy" in done.stdout
    quiet = _run("check", faulty, "--fix", tmp_path / "b", "-q")
    assert quiet.exit_code == 0 and quiet.stdout == f"{tmp_path / 'b'}\n"
    said = json.loads(_run("check", faulty, "--fix", tmp_path / "c", "--json").stdout)
    assert said["schema"] == "adapterpack.check/1" and said["healthy"] and said["output"] == str(tmp_path / "c")
    assert said["fixed"][0]["code"] == "rank-mismatch" and said["max_rel_error"] == 0
    hopeless = planted.plant(place, FAULTS["NaN"], tmp_path / "nan")
    left = _run("check", hopeless, "--fix", tmp_path / "d")
    assert left.exit_code == 3 and "fault: nan" in left.stdout and "nothing: the result is a copy" in left.stdout
    assert _run("check", faulty, "--overwrite").exit_code == 2
    many = planted.plant(place, FAULTS["untrained"], tmp_path / "zero")
    assert _run("check", many).stdout.count("fault: all-zero") == 4
