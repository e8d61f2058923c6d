"""FourierFT (Gao et al. 2024): a few coefficients of the Fourier transform of the delta weight.

    delta W = scaling * Re(ifft2(S)),  S[p // in, p % in] = spectrum,  p = randperm(out * in)[:n]

The places come from `random_loc_seed`, anew for each module. There is no low-rank form.
Reference: peft/tuners/fourierft/layer.py (`update_layer`, `get_delta_weight`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Edge, Finding, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import DenseChange, Maths
from adapterpack.methods._keys import KeyTable, flag
from adapterpack.methods._scattered import drawn_places, frequencies, matrix_shape, number, scattered, values
from adapterpack.methods._seeded import whole_seed
from adapterpack.methods._without import no_ranks, no_recipes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "FOURIERFT"
keep_dtype: frozenset[str] = frozenset()
ranks = no_ranks
recipes = no_recipes
keys = KeyTable("fourierft_", {"spectrum": "fourierft_spectrum"})
edges: Mapping[str, tuple[Edge, ...]] = {"fourierft": ()}


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "fourierft", "fourierft")


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    scaling, seed = number(a.config, "scaling", 150.0), whole_seed(a.config, "random_loc_seed", 777)
    for module, params in a.modules.items():
        shape = matrix_shape(a, module, request, values(module, params, "spectrum").shape[0])
        yield DenseChange(
            module=module,
            params=params,
            shape=shape,
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            delta=partial(_delta, shape, scaling, seed),
        )


def _delta(shape: Shape, scaling: float, seed: int, m: Maths) -> Array:
    spectrum = m["spectrum"]
    dense = scattered(m, shape, drawn_places(m, shape, len(spectrum), seed), spectrum)
    return m.torch.fft.ifft2(dense).real * scaling


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from frequencies(a, 1000)
