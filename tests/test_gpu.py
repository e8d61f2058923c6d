"""What needs a CUDA device. Skipped without one: nothing is claimed for it then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adapterpack
from adapterpack import regeneration, tiles
from adapterpack.accuracy import Sums
from adapterpack.adapter import LowRank
from adapterpack.backend import TorchBackend
from adapterpack.recipes import from_metadata

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("rounding", ["peft", "once"])
@pytest.mark.parametrize(
    "name", ["linear-llama", "conv1d", "dora-linear", "embedding-llama", "full-k2", "projection-mixed"]
)
def test_a_merge_on_the_gpu_is_within_rounding_of_the_exact_one(name, rounding, workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name, "bf16")
    result = adapterpack.merge(adapter, base, tmp_path / "m", device="cuda", rounding=rounding, verify="full")
    assert result.arithmetic.startswith("torch cuda")
    assert adapterpack.verify(adapter, tmp_path / "m", base=base).equal


def test_verify_on_the_gpu_agrees_with_the_cpu(workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama", "bf16")
    adapterpack.merge(adapter, base, tmp_path / "m")
    on_gpu, on_cpu = (adapterpack.verify(adapter, tmp_path / "m", base=base, device=d) for d in ("cuda", "cpu"))
    assert on_gpu.equal and on_cpu.equal
    assert on_gpu.max_rel_error == pytest.approx(on_cpu.max_rel_error, rel=1e-6)


AGREE = 1e-11
"""Figures of pairs of adapters on a GPU and on a CPU: relative to the norm of the change. Both compute them in f64,
with other orders of sums; the largest error is the f64 value of an element that both find."""


@pytest.mark.parametrize("near", [None, 1e-3, 1e-6])
def test_figures_of_pairs_agree_with_the_cpu(near) -> None:
    g = torch.Generator().manual_seed(1)

    def factors(out: int, into: int) -> LowRank:
        return LowRank(torch.randn(out, 16, generator=g), torch.randn(16, into, generator=g), 0.5)

    shapes = [(96, 64)] * 20 + [(700, 900), (900, 700)] * 3 + [(4096, 1024)]
    pairs = []
    for out, into in shapes:
        x, y = factors(out, into), factors(out, into)
        moved = LowRank(x.b * (1 + (near or 0) * torch.randn(x.b.shape, generator=g)), x.a, 0.5)
        pairs.append((x, y if near is None else moved))
    found = {}
    for device in ("cpu", "cuda"):
        xp = TorchBackend(device)
        lot, sums = tiles.Lot(xp), [Sums() for _ in pairs]
        for own, pair in zip(sums, pairs, strict=True):
            lot.add(own, *(LowRank(f.b.to(xp.device), f.a.to(xp.device), f.scale) for f in pair))
        lot.finish()
        found[device] = [s.error("w", shape) for s, shape in zip(sums, shapes, strict=True)]
    for cpu, cuda in zip(found["cpu"], found["cuda"], strict=True):
        left = AGREE * cpu.norm
        assert cuda.norm == pytest.approx(cpu.norm, rel=AGREE)
        assert cuda.difference == pytest.approx(cpu.difference, abs=left)
        assert cuda.max_abs_error == pytest.approx(cpu.max_abs_error, abs=left)
        assert cuda.cosine == pytest.approx(cpu.cosine, abs=AGREE)


@pytest.mark.parametrize("name", ["linear-llama", "dora-linear", "full-k2", "projection-mixed"])
def test_adapters_are_compared_on_the_gpu_as_on_the_cpu(name, workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name, "bf16")
    key = next(k for k, t in files.tensors(adapter).items() if t.dtype == torch.float32)
    other = files.edited(adapter, tmp_path / "b", {key: files.tensors(adapter)[key] * 1.001})
    cpu, cuda = (adapterpack.verify(adapter, other, base=base, device=d) for d in ("cpu", "cuda"))
    assert not cpu.equal and not cuda.equal
    assert cuda.max_rel_error == pytest.approx(cpu.max_rel_error, rel=1e-6)
    assert cuda.pooled.max_abs_error == pytest.approx(cpu.pooled.max_abs_error, rel=1e-5)


def test_seeded_tensors_drawn_on_the_gpu_are_those_of_the_cpu(workshop, files, tmp_path: Path) -> None:
    adapter, base = workshop.pair("projection-mixed", "bf16")
    adapterpack.convert(adapter, tmp_path / "seed", to="seed")
    result = adapterpack.verify(tmp_path / "seed", adapter, base=base, device="cuda")
    drawn = {(r.by, r.agrees) for r in result.regenerated if r.by.startswith("torch cuda")}
    assert {agrees for _, agrees in drawn} == {True}
    recipe = from_metadata(files.metadata(tmp_path / "seed"))
    on_gpu = regeneration.on_device(TorchBackend("cuda"), recipe)
    assert {n: t.digest() for n, t in on_gpu.items()} == {n: t.digest() for n, t in recipe.draw().items()}
