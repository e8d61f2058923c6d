"""Low-rank pairs in batches: figures against dense f64 arithmetic, whatever the shapes, scales and cancellations."""

from __future__ import annotations

import math

import pytest
import torch

from adapterpack import accuracy, tiles
from adapterpack.accuracy import Sums
from adapterpack.adapter import LowRank
from adapterpack.backend import NumpyBackend, TorchBackend
from adapterpack.tensor import BF16, F16, F32

XP = TorchBackend("cpu")


def _factors(out: int, into: int, rank: int, seed: int, scale: float = 1.0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, rank, generator=g), torch.randn(rank, into, generator=g), scale)


def _dense(f: LowRank) -> torch.Tensor:
    return f.b.double() @ f.a.double() * f.scale


def _compare(pairs: list[tuple[LowRank, LowRank]], largest: bool = True) -> list[Sums]:
    lot, found = tiles.Lot(XP, largest), []
    for x, y in pairs:
        found.append(Sums())
        lot.add(found[-1], x, y)
    lot.finish()
    return found


SHAPES = [(40, 30, 3, 3), (30, 40, 2, 5), (5, 700, 8, 8), (700, 5, 8, 1), (900, 1100, 16, 16), (1, 1, 1, 1)]


@pytest.mark.parametrize("near", [None, 1e-3, 1e-7])
def test_figures_are_those_of_dense_arithmetic(near) -> None:
    pairs = []
    for n, (out, into, rank_x, rank_y) in enumerate(SHAPES * 3):
        x = _factors(out, into, rank_x, n, 0.37)
        y = _factors(out, into, rank_y, 100 + n, -1.9)
        if near is not None:
            y = LowRank(x.b * (1 + near * torch.randn(x.b.shape)), x.a, x.scale)
        pairs.append((x, y))
    for (x, y), sums in zip(pairs, _compare(pairs), strict=True):
        dense_x, dense_y = _dense(x), _dense(y)
        d = dense_x - dense_y
        # f64 itself leaves this much of the terms that cancel.
        left = 1e-13 * float(dense_x.norm())
        error = sums.error("w", tuple(d.shape))
        assert error.difference == pytest.approx(float(d.norm()), rel=1e-9, abs=left)
        assert (error.norm, error.norm_b) == pytest.approx((float(dense_x.norm()), float(dense_y.norm())), rel=1e-12)
        assert error.max_abs_error == pytest.approx(float(d.abs().max()), rel=1e-9, abs=left)
        assert error.cosine == pytest.approx(
            float((dense_x * dense_y).sum() / dense_x.norm() / dense_y.norm()), abs=1e-12
        )


def _hard(kind: str) -> tuple[LowRank, LowRank]:
    """Large enough to be searched, and made to mislead the search."""
    x, y = _factors(800, 700, 6, 1), _factors(800, 700, 4, 2)
    g = torch.Generator().manual_seed(3)
    if kind == "rows of all sizes":
        x = LowRank(
            x.b * torch.exp(3 * torch.randn(800, 1, generator=g)),
            x.a * torch.exp(torch.randn(1, 700, generator=g)),
            1.0,
        )
    if kind == "all equal":
        x, y = (LowRank(torch.ones(800, 1), torch.full((1, 700), v), 1.0) for v in (3.0, 2.0))
    if kind == "one spike":
        x.b[123, 0], x.a[0, 456] = 400.0, 400.0
    if kind == "the spike cancels":
        x.b[123, 0] = 1e5
        y = LowRank(x.b.clone(), x.a.clone(), 1.0)
        y.b[7, 2] += 1e-4
    if kind == "tiny":
        x, y = LowRank(x.b * 1e-30, x.a * 1e-8, 1.0), LowRank(y.b * 1e-30, y.a * 1e-8, 1.0)
    if kind == "huge":
        x, y = LowRank(x.b * 1e30, x.a * 1e8, 1e9), LowRank(y.b * 1e30, y.a, 1.0)
    if kind == "the same A":
        y = LowRank(x.b * 1.001, x.a, x.scale)
    if kind == "one is zero":
        y = LowRank(y.b * 0, y.a, 1.0)
    return x, y


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "rows of all sizes",
        "all equal",
        "one spike",
        "the spike cancels",
        "tiny",
        "huge",
        "the same A",
        "one is zero",
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_largest_error_is_found_exactly(kind, turned, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "_TILE", 1 << 14)
    x, y = _hard(kind)
    if turned:
        x, y = (LowRank(f.a.T.contiguous(), f.b.T.contiguous(), f.scale) for f in (x, y))
    assert math.prod((800, 700)) > tiles._SMALL
    (sums,) = _compare([(x, y)])
    d = _dense(x) - _dense(y)
    assert sums.max_abs == pytest.approx(float(d.abs().max()), rel=1e-9)
    assert math.sqrt(sums.difference2) == pytest.approx(float(d.norm()), rel=1e-9)


def test_rows_that_cannot_hold_the_largest_error_are_not_computed(monkeypatch) -> None:
    monkeypatch.setattr(tiles, "_TILE", 1 << 14)
    done = []
    monkeypatch.setattr(torch.Tensor, "abs_", lambda t, real=torch.Tensor.abs_: done.append(t.numel()) or real(t))
    x, y = _hard("one spike")
    _compare([(x, y)])
    assert 0 < sum(done) < 800 * 700 / 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_and_spoils_no_other_of_its_batch(bad) -> None:
    x, y = _factors(40, 30, 3, 1), _factors(40, 30, 3, 2)
    broken = LowRank(x.b.clone(), x.a, 1.0)
    broken.b[3, 1] = bad
    big = LowRank(torch.full((700, 4), bad), torch.ones(4, 800), 1.0)
    found = _compare([(x, y), (broken, y), (x, y), (big, _factors(700, 800, 4, 5))])
    assert found[0] == found[2] and math.isfinite(found[0].max_abs)
    assert math.isnan(found[1].rel_error) and math.isnan(found[3].max_abs)


def test_without_the_largest_error_nothing_is_searched() -> None:
    (sums,) = _compare([(_factors(700, 800, 4, 1), _factors(700, 800, 4, 2))], largest=False)
    assert math.isnan(sums.max_abs) and sums.rel_error > 0


def test_factors_are_not_kept_beyond_the_room_that_there_is(monkeypatch) -> None:
    monkeypatch.setattr(tiles, "_HOST", 1 << 20)
    lot = tiles.Lot(XP)
    most = 0
    for n in range(40):
        lot.add(Sums(), _factors(60 + n, 50, 8, n), _factors(60 + n, 50, 8, 90 + n))
        most = max(most, lot._bytes)
    assert most <= 1 << 20
    lot.finish()
    assert lot._bytes == 0 and not lot._waiting


@pytest.mark.parametrize("dtype, kind", [(F32, torch.float32), (BF16, torch.bfloat16), (F16, torch.float16)], ids=str)
@pytest.mark.parametrize("xp", [XP, NumpyBackend()], ids=lambda b: b.name)
def test_the_unit_in_the_last_place_is_the_gap_to_the_next_number(dtype, kind, xp) -> None:
    g = torch.Generator().manual_seed(1)
    values = (torch.randn(500, generator=g) * torch.exp(4 * torch.randn(500, generator=g))).to(kind).abs()
    values = torch.cat([values[values < 3e4], torch.tensor([1.0, 2.0, 0.0, 6e-8, 65504.0 / 2, 1.9375]).to(kind)])
    gaps = torch.nextafter(values, torch.tensor(float("inf"), dtype=kind)).double() - values.double()
    array = values.double() if xp.name != "numpy" else values.double().numpy()
    found = accuracy.ulp(xp, array, dtype)
    assert torch.equal(torch.as_tensor(found), gaps)


def test_tf32_is_off_while_f32_products_are_relied_on() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with XP.full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_device_without_f64_has_its_proofs_on_the_cpu(monkeypatch) -> None:
    """Apple's: torch raises TypeError for f64 there."""
    xp = TorchBackend("cpu")
    real = torch.zeros

    def zeros(*args, dtype=None, **kwargs):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return real(*args, dtype=dtype, **kwargs)

    assert xp.for_proofs() is xp
    monkeypatch.setattr(torch, "zeros", zeros)
    proofs = xp.for_proofs()
    assert proofs is not xp and proofs.name == "torch cpu"
