"""Packs of factors that have few values each: rounded to a grid, or trained on one."""

from __future__ import annotations

from pathlib import Path

import apack_decoder
import ml_dtypes
import numpy as np
import packs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adapterpack
from adapterpack.codecs import palette
from adapterpack.tensor import Memory


def round_trip(source: Path, where: Path) -> bytes:
    """The pack, which both readers take apart to what was there."""
    before = packs.tree(source)
    adapterpack.compress(source, where / "adapter.apack", jobs=1)
    adapterpack.unpack(where / "adapter.apack", where / "again", jobs=1)
    assert packs.tree(where / "again") == before
    pack = (where / "adapter.apack").read_bytes()
    assert apack_decoder.decode(pack) == before
    return pack


@settings(max_examples=300)
@given(
    st.sampled_from((2, 4)),
    st.integers(1, 3000),
    st.lists(st.integers(0, 2500), max_size=5),
    st.sampled_from((1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 3000)),
    st.integers(0, 2**32 - 1),
)
def test_any_palettes_give_every_word_back(width: int, run: int, lengths: list[int], most: int, seed: int) -> None:
    """Also with runs that were badly chosen, and words that are all different."""
    rng = np.random.default_rng(seed)
    parts = [rng.choice(rng.integers(0, 1 << 8 * width, most, np.uint64), length) for length in lengths]
    x = np.concatenate([np.array([0, 1, 1 << 8 * width - 1, (1 << 8 * width) - 1], np.uint64), *parts]).astype(
        f"<u{width}"
    )
    segments = palette.split(x, run)
    assert sum(s.size for s in segments) <= 2 * x.nbytes + 512
    assert np.array_equal(palette.join(segments, x.size, width), x)
    again = apack_decoder.undo_palette([s.tobytes() for s in segments], x.size, width)
    assert np.array_equal(again, x)


def on_steps(rng: np.random.Generator, shape: tuple[int, ...], bits: int, axis: int | None = None) -> np.ndarray:
    """Whole numbers of steps, one size of step for all or for each line."""
    scale = 0.02 * np.exp(rng.standard_normal((shape[0], 1) if axis else ()) / 2)
    x = (rng.standard_normal(shape) * scale).astype(np.float32)
    step = np.abs(x).max(axis=axis, keepdims=True) / np.float32(2 ** (bits - 1) - 1)
    return np.round(x / step) * step


def entropy(words: np.ndarray) -> float:
    """Bits of all words together, if the number of each is known."""
    _, counts = np.unique(words, return_counts=True)
    return float((counts * np.log2(words.size / counts)).sum())


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bits", [(2,), (4,), (8,), (2, 4, 8)])
def test_factors_of_few_values_take_their_entropy(bits: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    rng, layer = np.random.default_rng(8), packs.Q.replace("layers.0", "layers.{}")
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    tensors = {
        layer.format(n, side): on_steps(rng, shape, bits[n % len(bits)]).astype(kinds[dtype])
        for n in range(6)
        for side, shape in (("A", (16, 4096)), ("B", (4096, 16)))
    }
    least = sum(entropy(x.view(f"<u{x.dtype.itemsize}")) for x in tensors.values()) / 8
    pack = round_trip(packs.adapter(tmp_path / "grid", tensors), tmp_path)
    streams = apack_decoder.manifest_of(pack)[0]["streams"]
    assert [stream["steps"] for stream in streams] == [["palette"]] * 2 * len(bits)
    assert sum(sum(frame[2::2]) for stream in streams for frame in stream["frames"]) < 1.05 * least
    assert len(pack) < 1.05 * least + 3000


def test_rows_with_steps_of_their_own_have_palettes_of_their_own(tmp_path: Path) -> None:
    x = on_steps(np.random.default_rng(9), (32, 4096), 4, axis=1)
    least = sum(entropy(row.view(np.uint32)) for row in x) / 8
    pack = round_trip(packs.adapter(tmp_path / "rows", {packs.Q.format("A"): x}), tmp_path)
    assert len(pack) < 1.05 * least + 2000


def test_palettes_are_for_matrices_of_few_values_only() -> None:
    """What is merely sparse, equal, or short is no better for it, and others are recognised by their first words."""
    rng = np.random.default_rng(10)
    few = on_steps(rng, (16, 1024), 4)
    many, sparse = rng.standard_normal((2, 16, 1024)).astype(np.float32)
    sparse[rng.random(sparse.shape) < 0.99] = 0

    class Counted:
        nbytes, taken = many.nbytes, 0

        def read(self, start: int, stop: int) -> bytes:
            self.taken += stop - start
            return many.tobytes()[start:stop]

    def found(x: np.ndarray, shape: tuple[int, ...] | None = None) -> tuple[int, int]:
        return palette.shared(Memory(x.tobytes()), x.dtype.itemsize, shape or x.shape)

    assert found(few) == (few.size, 4)
    assert found(few, (4, 4, 1024)) == (few.size, 4)
    assert found(few.T.copy(), (1024, 16)) == (few.size, 4)
    assert found(on_steps(rng, (16, 1024), 8)) == (few.size, 8)
    assert found(on_steps(rng, (64, 1024), 4, axis=1)) == (1024, 4)
    last = few.copy()
    last[5, :400] = many[5, :400]
    for none in (many, sparse, np.zeros_like(few), np.sign(few) ** 2, last):
        assert found(none) == (0, 0)
    assert found(few, (1, few.size)) == found(few.astype(np.float64)) == (0, 0)
    counted = Counted()
    assert palette.shared(counted, 4, many.shape) == (0, 0)
    assert counted.taken == 2048
