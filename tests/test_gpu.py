"""What needs a CUDA device. Skipped without one: nothing is claimed for it then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adapterpack

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
