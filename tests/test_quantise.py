"""Approximate adapters: never above the error, in as few bits as promised, and read by stock PEFT."""

from __future__ import annotations

import itertools
import math
from contextlib import ExitStack
from pathlib import Path

import cases
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_convert import assert_loads_in_peft, relative
from test_convolutions import CONVOLUTIONS
from test_experts import PARAMETERS

import adapterpack
from adapterpack import containers, methods, quantise
from adapterpack.adapter import Grade, Outcome, Request
from adapterpack.backend import TorchBackend
from adapterpack.base import Base
from adapterpack.codecs import lines
from adapterpack.codecs.lines import Quantised
from adapterpack.errors import InvalidFile
from adapterpack.methods._keys import render
from adapterpack.quantise import waterfilling

ROOT = Path(__file__).parent.parent
ERRORS = (6e-3, 2.4e-2, 9.6e-2)


def quantised(source: Path, error: float, where: Path | None = None, base: Path | None = None) -> Outcome:
    """What `quantise` makes of an adapter, written as a directory where one is named."""
    with ExitStack() as stack:
        method, adapter = methods.parse(stack.enter_context(containers.open_checkpoint(source)))
        model = None if base is None else stack.enter_context(Base(base))
        if model is not None:
            model.bind(adapter.targets())
        outcome = quantise.quantised(method, adapter, Request(TorchBackend("cpu"), model), model, error)
        if where is not None:
            containers.write_checkpoint(render(outcome.adapter), where, overwrite=False, sources=())
    return outcome


def sources(outcome: Outcome) -> list[Quantised]:
    return [p.tensor.source for p in outcome.adapter.params() if isinstance(p.tensor.source, Quantised)]


# -- lines -------------------------------------------------------------------------------------------------


@given(st.integers(0, lines.MOST_LOW_BITS), st.data())
def test_a_line_comes_back_from_its_parts(n: int, data: st.DataObject) -> None:
    most = (1 << (n + 7)) - 1
    codes = np.array(data.draw(st.lists(st.integers(-most, most), max_size=40)), np.int32)
    high, low = lines.split(codes, n)
    assert (len(high), len(low)) == (codes.size, -(-codes.size * n // 8))
    back = lines.join(high, low, n)
    assert back.dtype == np.int32 and back.tolist() == codes.tolist()


def test_parts_that_are_no_line_are_refused() -> None:
    with pytest.raises(InvalidFile, match="do not fit"):
        lines.split(np.array([128], np.int32), 0)
    for high, low, n in ((b"\0\0", b"", 3), (b"\0\0", b"\0\0", 3), (b"\0\0", b"\x40", 3), (b"", b"", 14)):
        with pytest.raises(InvalidFile):
            lines.join(high, low, n)
    with pytest.raises(InvalidFile, match="step"):
        lines.step_value(512)
    codes = np.zeros((2, 3), np.int32)
    for bad in ((codes, (0,)), (codes.astype(np.int64), (0, 0)), (codes + lines.LARGEST + 1, (0, 0))):
        with pytest.raises(InvalidFile):
            Quantised(*bad)


@given(st.sampled_from(lines.STEPS), st.floats(0.94, 1.06))
def test_steps_are_eight_to_an_octave(j: int, factor: float) -> None:
    step = lines.step_value(j)
    assert step == (8 + j % 8) * 2.0 ** (j // 8 - 3) and np.float32(step) == step
    assert lines.step_values([j]).tolist() == [step]
    assert lines.nearest_steps([step]).tolist() == [j]
    nearest = lines.step_value(int(lines.nearest_steps([step * factor])[0]))
    around = [lines.step_value(i) for i in range(j - 2, j + 3) if i in lines.STEPS]
    assert abs(nearest - step * factor) == min(abs(s - step * factor) for s in around)


@given(st.data())
def test_any_range_reads_as_the_whole_does(data: st.DataObject) -> None:
    count, length = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    g = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = g.integers(-lines.LARGEST, lines.LARGEST, (count, length), np.int32, endpoint=True)
    steps = tuple(data.draw(st.lists(st.sampled_from(lines.STEPS), min_size=count, max_size=count)))
    axis = data.draw(st.integers(0, 1))
    source = Quantised(codes, steps, axis)
    exact = codes.astype(np.float64) * lines.step_values(steps)[:, None]
    exact = exact if axis == 0 else exact.T
    assert source.values().dtype == np.float32 and (source.values() == exact).all()
    whole = exact.astype("<f4").tobytes()
    assert source.nbytes == len(whole)
    start, stop = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole) + 9))
    assert source.read(start, stop) == whole[start:stop]


def normal_lines(seed: int, count: int, length: int, spread: float) -> Quantised:
    g = np.random.default_rng(seed)
    deviations = 2.0 ** g.uniform(-1, spread, (count, 1))
    return Quantised(np.rint(g.standard_normal((count, length)) * deviations).astype(np.int32), (0,) * count)


def test_classes_hold_every_line_and_their_estimate_is_right() -> None:
    tensors = [normal_lines(n, 16, 300 * (n + 1), n * 2 + 1) for n in range(5)]
    found = lines.classes(tensors)
    assert [len(own) for own in found.of_lines] == [16] * 5
    assert lines.classes(tensors) == found
    assert abs(lines.classes(tensors[::-1]).nbytes - found.nbytes) <= 1
    parts = lines.streams(tensors, found)
    assert sum(len(high) for high, _ in parts) == sum(t.codes.size for t in tensors)
    stored = lines.stored_size(tensors)
    assert abs(stored - found.nbytes) < 0.03 * stored + 100
    at = [0] * len(parts)
    for tensor, own in zip(tensors, found.of_lines, strict=True):
        for line, c in zip(tensor.codes, own, strict=True):
            high = parts[c][0][at[c] : at[c] + line.size]
            low = lines.split(line, found.low_bits[c])[1]
            assert lines.join(high, low, found.low_bits[c]).tolist() == line.tolist()
            at[c] += line.size


def test_few_values_get_few_tables_and_many_get_more() -> None:
    few, many = (lines.classes([normal_lines(1, 8, n, 6)]).low_bits for n in (40, 60000))
    assert len(few) < 4 < len(many)
    assert lines.classes([]).nbytes == 0
    zeros = Quantised(np.zeros((3, 5000), np.int32), (0,) * 3)
    assert lines.classes([zeros]).nbytes < 40
    assert lines.classes([Quantised(np.zeros((2, 0), np.int32), (0, 0))]).of_lines == ((0, 0),)


# -- water-filling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS)
def test_the_expected_error_is_used_up_and_weak_directions_are_cut(error: float) -> None:
    values = 0.85 ** np.arange(64)
    found = waterfilling.steps_for(waterfilling.Lines((values, values), (500, 300)), error**2 * (values**2).sum())
    assert 0.95 * error <= math.sqrt(found.error / (values**2).sum()) <= error
    assert found.kept.tolist() == list(range(len(found.kept)))
    assert len(found.kept) < 64 and (error < 0.09 or len(found.kept) < 32)
    # The same price for all: what is n times as large gets a step that is n times as small.
    steps = lines.step_values(found.codes[0]) * np.sqrt(values[found.kept])
    assert (steps[:8].max() / steps[:8].min()) < 1.15


def test_a_step_of_many_lines_can_lie_between_two() -> None:
    search = waterfilling.Search(1.0)
    for _ in range(12):
        # An error that jumps from 0.9 to 1.2 of the bound.
        search.tell(0.9 if search.knob < 0.8 else 1.2)
        assert 0.4 < search.knob < 1.0
    assert abs(search.knob - 0.8) < 0.01


# -- adapters of every kind --------------------------------------------------------------------------------

PLAIN = [c.name for c in (*cases.LORA, *cases.VBLORA, *cases.VERA) if "dora" not in c.name]
DORA = [c.name for c in cases.LORA if "dora" in c.name]
KERNELS = ("convolution-2d-rslora", "convolution-1d-bias", "convolution-1d-dora")


@pytest.mark.parametrize(("name", "error"), [*zip([*PLAIN, *DORA], itertools.cycle([0.15, 4e-3]))])
def test_the_error_is_never_exceeded_and_peft_reads_the_result(name, error, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    outcome = quantised(adapter, error, tmp_path / "q", base)
    assert outcome.grade is Grade.APPROXIMATE and outcome.adapter.changed and outcome.dropped
    assert quantise.is_quantised(outcome.adapter)
    seen = adapterpack.verify(adapter, tmp_path / "q", base=base, max_error=error)
    assert seen.equal and 0.5 * error < seen.max_rel_error <= error
    assert_loads_in_peft(workshop, base, tmp_path / "q", adapter)
    plain, before = files.tensors(base), workshop.peft_merge(base, adapter)
    after = oracle.peft_merge(base, tmp_path / "q")
    # A merge has the rounding of float32 on top, and a few modules whose change is small beside their weights.
    assert relative(before, after, plain, set(plain) & set(before)) <= error + 1e-3
    kept = [key for key in files.tensors(adapter) if "modules_to_save" in key or "trainable" in key]
    assert all(files.same(files.tensors(adapter)[k], files.tensors(tmp_path / "q")[k]) for k in kept)


@pytest.mark.parametrize("name", [c.name for c in (*cases.NARROW_LORA, *cases.NARROW_VBLORA, *cases.NARROW_VERA)])
def test_16_bit_adapters_too(name, workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name, "bf16")
    quantised(adapter, 0.03, tmp_path / "q", base)
    seen = adapterpack.verify(adapter, tmp_path / "q", base=base, max_error=0.03)
    assert seen.equal and seen.max_rel_error > 0.01
    # Eleven bits are what they have: an error that takes more is no gain.
    if "lora" not in name and "dora" not in name and "full" not in name:
        assert quantised(adapter, 2e-5, base=base).grade is Grade.LOSSLESS


def test_a_pack_gives_every_kind_of_line_back(workshop, tmp_path: Path) -> None:
    """Kernels, bare parameters, vectors, weights of k > 2; tensors that are equal are stored once."""
    some = [c for c in (*CONVOLUTIONS, *PARAMETERS) if c.name in (*KERNELS, "experts-mixtral")]
    some += [cases.BY_NAME[n] for n in ("linear-llama", "lora-bias", "full-k4", "projection-mixed", "dora-linear")]
    for case in some:
        adapter, base = workshop.adapter(case), workshop.base_of(case)
        packed = tmp_path / f"{case.name}.apack"
        with containers.open_checkpoint(adapter) as c, Base(base) as model:
            method, a = methods.parse(c)
            model.bind(a.targets())
            outcome = quantise.quantised(method, a, Request(TorchBackend("cpu"), model), model, 0.05)
            containers.write_checkpoint(render(outcome.adapter), packed, overwrite=False, sources=())
        with containers.open_checkpoint(packed) as back:
            wanted = outcome.adapter.tensors()
            assert back.tensors.keys() == wanted.keys()
            quantised_keys = [p.key for p in outcome.adapter.params() if isinstance(p.tensor.source, Quantised)]
            assert quantised_keys and all(back.tensors[k].equals(wanted[k]) for k in quantised_keys)
        assert adapterpack.verify(adapter, packed, base=base, max_error=0.05).equal


def test_a_pack_of_equal_lines(workshop, files, tmp_path: Path) -> None:
    """Modules whose change is nothing are alike, and lines of others come behind them."""
    wide = tmp_path / "wide"
    trained_like(wide, 8, [(900, 900)] * 4)
    zero = {k: torch.zeros_like(t) for k, t in files.tensors(wide).items() if ".1." in k or ".2." in k}
    edited = files.edited(wide, tmp_path / "zero", {k: t for k, t in zero.items() if "lora_B" in k})
    outcome = quantised(edited, 0.05, tmp_path / "q.apack")
    assert len(sources(outcome)) == 8
    assert adapterpack.verify(edited, tmp_path / "q.apack", max_error=0.05).equal


@pytest.mark.parametrize("name", DORA)
def test_without_a_base_each_parameter_of_dora_is_within_the_error(name, workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    quantised(adapter, 0.03, tmp_path / "q")
    assert adapterpack.verify(adapter, tmp_path / "q", max_error=0.03).equal
    assert_loads_in_peft(workshop, base, tmp_path / "q", adapter)


@pytest.mark.parametrize("case", [c for c in CONVOLUTIONS if c.name in KERNELS], ids=str)
def test_convolutions_with_their_kernels(case, workshop, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    quantised(adapter, 0.05, tmp_path / "q", base)
    assert adapterpack.verify(adapter, tmp_path / "q", base=base, max_error=0.05).max_rel_error > 0.02
    assert adapterpack.verify(adapter, tmp_path / "q", base=base, max_error=0.05).equal
    assert_loads_in_peft(workshop, base, tmp_path / "q", adapter)


def test_layers_of_single_experts_keep_their_rank(tmp_path: Path) -> None:
    """PEFT joins them where the base has them fused, and that takes one rank."""
    for module, ranks in (("experts.{}.w1", {16}), ("layers.{}.query", {10, 11, 12, 13})):
        where = tmp_path / module[:6]
        trained_like(where, 16, [(64, 64)] * 3, module=module)
        outcome = quantised(where, 0.25)
        assert {p["lora_A"].tensor.shape[0] for p in outcome.adapter.modules.values()} <= ranks


@pytest.mark.parametrize("case", PARAMETERS, ids=str)
def test_experts_and_bare_parameters_keep_their_rank(case, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.adapter(case), workshop.base_of(case)
    outcome = quantised(adapter, 0.1, tmp_path / "q", base)
    assert len(sources(outcome)) >= 2
    seen = adapterpack.verify(adapter, tmp_path / "q", base=base, max_error=0.1)
    assert seen.equal and seen.max_rel_error > 0.05
    old, new = files.tensors(adapter), files.tensors(tmp_path / "q")
    assert {k: t.shape for k, t in old.items()} == {k: t.shape for k, t in new.items()}


@pytest.mark.parametrize("name", ["lora", "vblora", "vera"])
@pytest.mark.parametrize("error", [1e-3, *ERRORS, 0.3])
def test_the_examples_shrink_within_the_error(name, error, tmp_path: Path) -> None:
    outcome = quantised(ROOT / "examples" / name, error, tmp_path / "q")
    seen = adapterpack.verify(ROOT / "examples" / name, tmp_path / "q", max_error=error)
    assert seen.equal and seen.max_rel_error > 0.9 * error
    found = sources(outcome)
    values = sum(s.codes.size for s in found)
    assert 8 * lines.stored_size(found) / values < 2 - math.log2(error)


def test_weights_of_vblora_never_sum_above_one(workshop, files, tmp_path: Path) -> None:
    for name in ("topk-k4", "full-k3", "full-peaked"):
        adapter, base = workshop.pair(name)
        quantised(adapter, 0.1, tmp_path / name, base)
        weights = [t for k, t in files.tensors(tmp_path / name).items() if "topk_weights" in k]
        assert weights and all(t.dtype == torch.float32 and t.sum(-1).max() <= 1 and t.min() >= 0 for t in weights)
        merged = oracle.peft_merge(base, tmp_path / name)
        assert all(bool(torch.isfinite(t).all()) for t in merged.values())


def test_where_nothing_is_allowed_or_gained_nothing_is_done(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    for error in (0.0, 1e-9):
        outcome = quantised(adapter, error)
        assert outcome.grade is Grade.LOSSLESS and not outcome.adapter.changed and not outcome.dropped


def test_the_result_is_the_same_every_time(workshop) -> None:
    adapter, _ = workshop.pair("linear-bert")
    first, second = (sources(quantised(adapter, 0.02)) for _ in range(2))
    assert [(s.steps, s.codes.tobytes()) for s in first] == [(s.steps, s.codes.tobytes()) for s in second]


def test_a_change_of_nothing_stays_nothing(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    key = next(k for k in files.tensors(adapter) if "lora_B" in k)
    zero = files.edited(adapter, tmp_path / "zero", {key: torch.zeros_like(files.tensors(adapter)[key])})
    quantised(zero, 0.05, tmp_path / "q")
    assert adapterpack.verify(zero, tmp_path / "q", max_error=0.05).equal
    assert not files.tensors(tmp_path / "q")[key].any()


@pytest.mark.parametrize(
    ("name", "part"), [("linear-llama", "lora_B"), ("topk-k2", "bank"), ("topk-k3", "_weights"), ("seed-mixed", "_b")]
)
def test_nan_is_refused(name, part, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    key, tensor = next((k, t) for k, t in files.tensors(adapter).items() if part in k)
    bad = files.edited(adapter, tmp_path / "bad", {key: torch.full_like(tensor, math.nan)})
    with pytest.raises(InvalidFile, match="NaN"):
        quantised(bad, 0.05, base=base)


def test_lower_ranks_are_stated_with_their_scales(workshop, files, tmp_path: Path) -> None:
    """Directions that get no bits go; rsLoRA and patterns come out as PEFT reads them."""
    adapter, base = workshop.pair("patterns-rslora")
    edits = {}
    g = torch.Generator().manual_seed(2)
    for key, t in files.tensors(adapter).items():
        if "lora_A" in key:
            edits[key] = torch.randn(t.shape, generator=g) * torch.tensor([[1.0], *[[1e-3]] * (len(t) - 1)])
    weak = files.edited(adapter, tmp_path / "weak", edits)
    quantised(weak, 0.05, tmp_path / "q")
    assert files.config(tmp_path / "q")["r"] == 1
    assert adapterpack.verify(weak, tmp_path / "q", max_error=0.05).equal
    merged, plain = workshop.peft_merge(base, weak), files.tensors(base)
    assert relative(merged, oracle.peft_merge(base, tmp_path / "q"), plain, set(plain) & set(merged)) <= 0.051


# -- how few bits ------------------------------------------------------------------------------------------


def trained_like(where: Path, rank: int, shapes: list[tuple[int, int]], module: str = "layers.{}.query") -> int:
    """LoRA whose singular values fall as those of trained r64 do: half the energy in 6, 0.26 of the norm past 32.

    Returns:
        The number of its values.
    """
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for n, (out, into) in enumerate(shapes):
        spectrum = torch.arange(1, rank + 1) ** -0.55 * torch.exp(-torch.arange(rank) / 60)
        # The factors as training leaves them, in no basis of their own.
        mix = torch.linalg.qr(torch.randn(rank, rank, generator=g)).Q
        b = (torch.randn(out, rank, generator=g) * spectrum) @ mix
        a = mix.T @ torch.randn(rank, into, generator=g)
        key = f"base_model.model.{module.format(n)}.lora_"
        tensors |= {f"{key}A.weight": a.contiguous() * 0.05, f"{key}B.weight": b.contiguous() * 0.01}
    where.mkdir()
    save_file(tensors, where / "adapter_model.safetensors", metadata={"format": "pt"})
    (where / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": 16, "target_modules": ["{module[-5:]}"]}}'
    )
    return sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize(
    ("error", "rank64", "rank8"), [(6e-3, 6.95, 8.0), (2.4e-2, 4.95, 6.0), (9.6e-2, 2.95, 4.0)], ids=str
)
def test_bits_per_value_are_what_is_promised(error, rank64, rank8, tmp_path: Path) -> None:
    """Every stream really coded. The least that was wanted: 8.3, 6.3 and 4.3 at rank 64."""
    for rank, bits in ((64, rank64), (8, rank8)):
        values = trained_like(tmp_path / f"{rank}", rank, [(384, 384)] * 8 + [(1536, 384), (384, 1536)] * 2)
        outcome = quantised(tmp_path / f"{rank}", error, tmp_path / f"q{rank}")
        assert adapterpack.verify(tmp_path / f"{rank}", tmp_path / f"q{rank}", max_error=error).equal
        assert 8 * lines.stored_size(sources(outcome)) / values <= bits


def test_the_7b_shape_of_vblora_takes_what_is_promised(tmp_path: Path) -> None:
    """39,040 sub-vectors of a bank of 2048 x 256, k = 2; with indices at 11 bits: 1.05 MB at 3e-4, 660 KB at 1e-2."""
    g = torch.Generator().manual_seed(0)
    bank = torch.rand(2048, 256, generator=g) * 0.04 - 0.02 + torch.randn(2048, 256, generator=g) * 0.002
    tensors = {"base_model.vblora_vector_bank": bank}
    # Wide modules with as many sub-vectors in all as the 224 of Llama 2 7B.
    for n in range(16):
        for side, shape in (("A", (4, 305)), ("B", (305, 4))):
            picked = torch.rand(*shape, 2048, generator=g).topk(2).indices
            gap = torch.randn(*shape, 1, generator=g).abs() * 0.15
            key = f"base_model.model.layers.{n}.down.vblora_logits_{side}_topk_"
            tensors |= {f"{key}indices": picked.to(torch.int16), f"{key}weights": gap.sigmoid()}
    (tmp_path / "vb").mkdir()
    save_file(tensors, tmp_path / "vb" / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "vb" / "adapter_config.json").write_text(
        '{"peft_type": "VBLORA", "r": 4, "num_vectors": 2048, "vector_length": 256, "topk": 2,'
        ' "save_only_topk_weights": true, "target_modules": ["down"]}'
    )
    indices = 16 * 2440 * 2 * 11 // 8
    for error, most in ((3e-4, 1_050_000), (1e-2, 660_000)):
        outcome = quantised(tmp_path / "vb", error)
        # The manifest and names of a pack take a few KB more.
        assert indices + lines.stored_size(sources(outcome)) + 15_000 < most
