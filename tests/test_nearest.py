"""`convert --to lora` where there is no exact one: the nearest, at a rank, an energy or an error that was named."""

from __future__ import annotations

from pathlib import Path

import cases
import oracle
import pytest
import torch
from peft import LoHaConfig

import adapterpack
from adapterpack.errors import LossRefused, Unsupported, UsageError, WrongBase

LOHA = cases.Case("nearest-loha", lambda: LoHaConfig(r=3, alpha=7, target_modules=["q_proj", "k_proj", "up_proj"]))


def _merged(files, adapter: Path, base: Path, out: Path) -> dict[str, torch.Tensor]:
    adapterpack.merge(adapter, base, out)
    return files.tensors(out)


def _errors(a, b, base) -> dict[str, float]:
    """Relative Frobenius error of what was done to each tensor that changed."""
    found = {}
    for name, w in base.items():
        change = a[name].double() - w.double()
        if bool(change.any()):
            found[name] = float((a[name].double() - b[name].double()).norm() / change.norm())
    return found


@pytest.mark.parametrize("name", ["dora-linear", "dora-conv1d", "dora-embedding"])
@pytest.mark.parametrize("allowed", [0.3, 0.02, 1e-5])
def test_the_error_is_kept_and_peft_computes_the_same(name, allowed, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    made = adapterpack.convert(adapter, tmp_path / "lora", to="lora", base=base, max_error=allowed)
    assert made.max_rel_error <= allowed
    assert made.grade == ("equivalent" if made.max_rel_error <= 5e-6 else "approximate")
    originals = files.tensors(base)
    truth = _merged(files, adapter, base, tmp_path / "truth")
    by_peft = oracle.peft_merge(base, tmp_path / "lora")
    assert by_peft.load.clean
    errors = _errors(truth, {n: by_peft[n] for n in truth}, originals)
    reported = {m.name: m.rel_error for m in made.factored}
    assert {n.removesuffix(".weight") for n in errors} == reported.keys()
    for tensor, error in errors.items():
        said = reported[tensor.removesuffix(".weight")]
        assert said is not None
        # Both merges round to float32; the change is of the size of the weights.
        assert abs(error - said) < 1e-6, tensor
        assert error < allowed + 1e-6
    assert len({m.rel_error for m in made.factored}) > 1
    if allowed == 0.02:
        # The least rank: one less would lose more than was allowed.
        worst = max(made.factored, key=lambda m: m.rank)
        cut = adapterpack.convert(adapter, tmp_path / "less", to="lora", base=base, rank=worst.rank - 1)
        assert next(m.rel_error for m in cut.factored if m.name == worst.name) > 0.98 * allowed


def test_energy_and_rank_allow_what_they_lose(workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair("dora-linear")
    by_energy = adapterpack.convert(adapter, tmp_path / "e", to="lora", base=base, energy=0.9)
    assert all(0 < m.rel_error <= (1 - 0.9) ** 0.5 for m in by_energy.factored)
    by_rank = adapterpack.convert(adapter, tmp_path / "r", to="lora", base=base, rank=2)
    assert {m.rank for m in by_rank.factored} == {2}
    assert by_rank.grade == "approximate"
    with pytest.raises(LossRefused, match="would move by"):
        adapterpack.convert(adapter, tmp_path / "n", to="lora", base=base, rank=2, max_error=1e-3)
    assert not (tmp_path / "n").exists()


def test_without_a_word_nothing_is_lost(workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair("dora-linear")
    with pytest.raises(LossRefused, match="no exact low-rank form") as e:
        adapterpack.convert(adapter, tmp_path / "n", to="lora", base=base)
    assert e.value.exit_code == 4
    assert "--max-error" in str(e.value.hint)
    with pytest.raises(WrongBase, match="depends on the base's weights"):
        adapterpack.convert(adapter, tmp_path / "n", to="lora", max_error=0.1)


def test_exact_factors_are_cut_without_a_base(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(LOHA), workshop.base_of(LOHA)
    exact = adapterpack.convert(adapter, tmp_path / "exact", to="lora")
    assert exact.grade == "equivalent" and not exact.factored
    made = adapterpack.convert(adapter, tmp_path / "cut", to="lora", rank=4)
    assert {m.rank for m in made.factored} == {4}
    truth = _merged(files, adapter, base, tmp_path / "truth")
    errors = _errors(truth, _merged(files, tmp_path / "cut", base, tmp_path / "m"), files.tensors(base))
    for m in made.factored:
        assert errors[f"{m.name}.weight"] == pytest.approx(m.rel_error, rel=1e-4)
        # Eckart and Young: what is left out are the last singular values.
        delta = truth[f"{m.name}.weight"].double() - files.tensors(base)[f"{m.name}.weight"].double()
        values = torch.linalg.svdvals(delta)
        assert m.rel_error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-4)


def test_biases_that_a_method_changes_get_their_new_values(workshop, files, tmp_path: Path) -> None:
    case = cases.BY_NAME["bias-lora-only"]
    adapter, base = workshop.pair(case.name)
    made = adapterpack.convert(adapter, tmp_path / "cut", to="lora", rank=1)
    assert made.grade == "approximate"
    merged = oracle.peft_merge(base, tmp_path / "cut")
    assert merged.load.clean
    wanted = workshop.peft_merge(base, adapter)
    biases = [n for n in files.tensors(base) if n.endswith("bias")]
    assert all(files.same(merged[n], wanted[n]) for n in biases)


@pytest.mark.parametrize(
    ("wish", "error"),
    [
        ({"rank": 4, "energy": 0.5}, UsageError),
        ({"rank": 0}, UsageError),
        ({"rank": 10**9}, UsageError),
        ({"energy": 0.0}, UsageError),
        ({"energy": 1.5}, UsageError),
    ],
)
def test_wishes_that_make_no_sense(wish, error, workshop, tmp_path: Path) -> None:
    with pytest.raises(error):
        adapterpack.convert(workshop.adapter(LOHA), tmp_path / "n", to="lora", **wish)


def test_rank_goes_with_lora_only(workshop, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="go with --to lora"):
        adapterpack.convert(workshop.adapter(LOHA), tmp_path / "n", dtype="bfloat16", rank=4)


def test_a_bare_parameter_is_refused(workshop, tmp_path: Path) -> None:
    config = cases.lora(target_modules=[], target_parameters=["experts.down_proj"])
    case = cases.Case("nearest-experts", config, "mixtral")
    with pytest.raises(Unsupported, match="bare parameter"):
        adapterpack.convert(workshop.adapter(case), tmp_path / "n", to="lora", base=workshop.base_of(case), rank=1)
