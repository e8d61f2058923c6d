"""Every kind of recipe survives its JSON, is proven by digest and bounded; the independent decoder draws alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import apack_decoder
import numpy as np
import pytest
import test_oracle_randlora
import test_oracle_scattered
import test_oracle_unilora
import torch

import adapterpack
from adapterpack import limits
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.recipes import (
    METADATA_KEY,
    TERNARY,
    TWO_ROUNDINGS,
    UNIFORM,
    BalancedRecipe,
    BasesRecipe,
    Basis,
    Indices,
    Normal,
    NormalRecipe,
    Places,
    PlacesRecipe,
    Recipe,
    Uniform,
    UniformRecipe,
    from_metadata,
)
from adapterpack.tensor import BF16, F16, F32

_BASES = (Basis("a", (3, 1, 10), 0.25, 0.5703125), Basis("b", (14, 4, 3), 0.5, 0.28125))
_SHARES = tuple(replace(b, bound=1 / 6) for b in _BASES)
_INDICES = (Indices("x.A", "x.sA", (2, 9)), Indices("x.B", "x.sB", (7, 2)))
KINDS: dict[str, Recipe] = {
    "uniform": UniformRecipe(11, (Uniform("a", (6, 12), 0.3), Uniform("b", (9, 6), 1.7))),
    "bases": BasesRecipe(11, _BASES, UNIFORM, BF16),
    "bases-f16": BasesRecipe(2**40, _BASES, UNIFORM, F16, TWO_ROUNDINGS, BF16, F32),
    "bases-narrow": BasesRecipe(-1, _BASES, UNIFORM, F16, through=BF16, stored=BF16),
    "ternary": BasesRecipe(11, _SHARES, TERNARY, F32, through=F16),
    "places": PlacesRecipe(3, (Places("a", (12, 7), 38), Places("b", (5, 4), 20), Places("c", (5, 4), 19))),
    "balanced": BalancedRecipe(42, _INDICES, 5, BF16, F32),
    "balanced-long": BalancedRecipe(42, _INDICES, 11_000, F32, F16),
    "balanced-tail": BalancedRecipe(7, (Indices("i", "s", (3, 100)),), 10_001),
    "gaussian": NormalRecipe((Normal("a", (5, 2, 2), 42, 0.5), Normal("b", (5, 2, 2), 43, 0.5)), BF16, F32),
}


def _proven(name: str) -> Recipe:
    return KINDS[name].proven(KINDS[name].draw(torch))


@pytest.mark.parametrize("name", KINDS)
def test_it_survives_its_json(name: str) -> None:
    recipe = _proven(name)
    text = recipe.to_metadata()
    again = from_metadata({METADATA_KEY: text, "format": "pt"})
    assert again == recipe
    assert again.to_metadata() == text
    drawn, wanted = again.draw(torch), dict(KINDS[name].shapes)
    assert {n: (t.dtype, t.shape) for n, t in drawn.items()} == wanted
    assert list(drawn) == [n for n, _, _ in recipe.outputs]


@pytest.mark.parametrize("name", [n for n in KINDS if n != "gaussian"])
def test_the_independent_decoder_draws_the_same(name: str) -> None:
    recipe = _proven(name)
    theirs = apack_decoder.draws(json.loads(recipe.to_metadata()))
    ours = recipe.draw()
    assert theirs.keys() == ours.keys()
    for key, tensor in ours.items():
        assert theirs[key] == (tensor.dtype.name, list(tensor.shape), tensor.bytes())


def test_torch_draws_what_takes_torch() -> None:
    with pytest.raises(Unsupported, match="torch alone"):
        KINDS["gaussian"].draw()
    drawn = KINDS["gaussian"].draw(torch)
    theirs = torch.normal(0.0, 0.5, (5, 2, 2), generator=torch.Generator().manual_seed(43)).bfloat16().float()
    assert np.array_equal(drawn["b"].numpy(), theirs.numpy())


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for key, v in value.items() for leaf in [(*path, key), *_leaves(v, (*path, key))]]
    if isinstance(value, list):
        return [leaf for i, v in enumerate(value) for leaf in [(*path, i), *_leaves(v, (*path, i))]]
    return []


@pytest.mark.parametrize("name", [n for n in KINDS if n != "uniform"])
def test_a_tampered_one_is_an_error_or_has_other_names(name: str) -> None:
    """No field of it can be changed so that other values come out."""
    recipe = _proven(name)
    record, wanted = json.loads(recipe.to_metadata()), [t.digest() for t in recipe.draw(torch).values()]
    refused = 0
    for path in _leaves(record):
        for value in (None, -1, 0, 1, 10**30, True, "x", "0x1p-1", "nan", [], {}, ["x"], 1.5, 2**63):
            changed = json.loads(json.dumps(record))
            at = changed
            for step in path[:-1]:
                at = at[step]
            at[path[-1]] = value
            try:
                read = from_metadata({METADATA_KEY: json.dumps(changed)})
                assert read is not None
                drawn = read.draw(torch)
            except (InvalidFile, Unsupported):
                refused += 1
                continue
            assert [t.digest() for t in drawn.values()] == wanted, (path, value)
    assert refused > 100


@pytest.mark.parametrize(
    "recipe",
    [
        UniformRecipe(1, (Uniform("a", (1 << 15, 1 << 15), 1.0),)),
        BasesRecipe(1, (Basis("a", (1 << 15, 1 << 14, 1), 1.0, 1.0),), UNIFORM, BF16),
        PlacesRecipe(1, (Places("a", (1 << 15, 1 << 15), 1 << 25),)),
        # Few places of a weight so large that each of its elements takes a number.
        PlacesRecipe(1, (Places("a", (1 << 16, 1 << 16), 1),)),
        BalancedRecipe(1, _INDICES, limits.RECIPE_ELEMENTS),
        BalancedRecipe(1, (Indices("i", "s", (1 << 14, 1 << 14)),), 5),
        NormalRecipe((Normal("a", (1 << 15, 1 << 7, 1 << 7), 1, 1.0),)),
    ],
    ids=lambda r: r.name,
)
def test_what_would_draw_too_much_is_refused_before_it_draws(recipe: Recipe) -> None:
    with pytest.raises(Unsupported, match="would draw more than"):
        recipe.draw(torch)


_PACKED = (
    *(test_oracle_scattered.BY_NAME[name] for name in ("shira-llama", "shira-opt")),
    *(test_oracle_randlora.BY_NAME[f"randlora-projection-{name}"] for name in ("mixed", "very-sparse", "opt")),
    *(test_oracle_unilora.BY_NAME[f"unilora-projection-{name}"] for name in ("mixed", "long", "bert")),
)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("case", _PACKED, ids=str)
def test_the_independent_decoder_reads_their_packs(case: Any, dtype: str, workshop: Any, tmp_path: Path) -> None:
    adapter = workshop.adapter(case, dtype)
    adapterpack.compress(adapter, tmp_path / "a.apack")
    decoded = apack_decoder.decode((tmp_path / "a.apack").read_bytes(), {}, {})
    for path, data in decoded.items():
        assert (adapter / path).read_bytes() == data
    assert adapterpack.inspect(tmp_path / "a.apack").pack.not_stored["recipe"] > 0


def test_a_pack_has_no_draws_of_torch(workshop: Any) -> None:
    """A reader on another machine could not be sure to get them."""
    from packs import Maker

    recipe = _proven("gaussian")
    maker = Maker(recipes=[json.loads(recipe.to_metadata())])
    maker.config()
    with pytest.raises(apack_decoder.Refused):
        apack_decoder.draws(json.loads(recipe.to_metadata()))
    path = workshop.root / "gaussian.apack"
    path.write_bytes(maker.pack())
    with pytest.raises(InvalidFile, match="a recipe that is not written as it should be"):
        adapterpack.inspect(path)
