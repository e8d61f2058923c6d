"""WaveFT (Bilican et al. 2025): a few wavelet coefficients of the delta weight.

    delta W = scaling * crop(idwt2(S)),  S[p // in + r0, p % in + c0] = spectrum,  p = randperm(out * in)[:n]

S is padded by what the filters take and has even sides; its quarters are the four bands of one level. Without
`use_idwt` S itself is the delta weight. There is no low-rank form.
Reference: peft/tuners/waveft/layer.py (`get_delta_weight`) and waverec2d.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Edge, Finding, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import Unsupported
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import DenseChange, Maths
from adapterpack.methods._keys import KeyTable, flag
from adapterpack.methods._scattered import drawn_places, frequencies, matrix_shape, number, scattered, values
from adapterpack.methods._seeded import whole_seed
from adapterpack.methods._wavelets import LOWPASS
from adapterpack.methods._without import no_ranks, no_recipes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "WAVEFT"
keep_dtype: frozenset[str] = frozenset()
ranks = no_ranks
recipes = no_recipes
keys = KeyTable("waveft_", {"spectrum": "waveft_spectrum"})
edges: Mapping[str, tuple[Edge, ...]] = {"waveft": ()}


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "waveft", "waveft")


def _filter(a: Adapter) -> tuple[float, ...] | None:
    """The lowpass filter; None where the coefficients are the delta weight.

    Raises:
        Unsupported: PEFT has no such filter, or cannot use the one that it has.
    """
    if not flag(a.config, "use_idwt", True):
        return None
    family = a.config.get("wavelet_family", "db1")
    found = LOWPASS.get(family) if isinstance(family, str) else None
    if found is None:
        raise Unsupported(
            f"wavelet_family is {family!r:.40}: PEFT cannot reconstruct with it either",
            hint=f"it can with {', '.join(LOWPASS)}",
        )
    return found


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    scaling, seed = number(a.config, "scaling", 25.0), whole_seed(a.config, "random_loc_seed", 777)
    lowpass = _filter(a)
    for module, params in a.modules.items():
        shape = matrix_shape(a, module, request, values(module, params, "spectrum").shape[0])
        yield DenseChange(
            module=module,
            params=params,
            shape=shape,
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            delta=partial(_delta, shape, scaling, seed, lowpass),
        )


def _delta(shape: Shape, scaling: float, seed: int, lowpass: tuple[float, ...] | None, m: Maths) -> Array:
    spectrum = m["spectrum"]
    places = drawn_places(m, shape, len(spectrum), seed)
    if lowpass is None:
        return scattered(m, shape, places, spectrum) * scaling
    # Room for what the filters take at the borders, and an even number of rows and columns.
    wide = tuple(n + len(lowpass) - 2 + (n + len(lowpass)) % 2 for n in shape)
    top, left = ((w - n) // 2 for w, n in zip(wide, shape, strict=True))
    dense = scattered(m, wide, (places // shape[1] + top) * wide[1] + places % shape[1] + left, spectrum)
    made = _reconstructed(dense, m.lift(m.torch.tensor(lowpass, dtype=m.torch.float32)), m) * scaling
    first, start = ((w - n) // 2 for w, n in zip(made.shape, shape, strict=True))
    return made[first : first + shape[0], start : start + shape[1]]


def _reconstructed(dense: Array, low: Array, m: Maths) -> Array:
    """One level of the inverse transform, its bands the quarters of a matrix."""
    low = low.to(m.xp.device)
    # The highpass filter of an orthogonal pair: reversed, every second sign turned.
    high = low.flip(0) * m.torch.tensor([1, -1], device=low.device).repeat(len(low) // 2)
    pairs = ((low, low), (high, low), (low, high), (high, high))
    filters = m.torch.stack([rows[:, None] * columns[None, :] for rows, columns in pairs])[:, None]
    rows, columns = dense.shape[0] // 2, dense.shape[1] // 2
    bands = dense.reshape(2, rows, 2, columns).permute(0, 2, 1, 3).reshape(1, 4, rows, columns)
    made = m.torch.nn.functional.conv_transpose2d(bands, filters, stride=2)[0, 0]
    edge = len(low) - 2
    return made[edge : made.shape[0] - edge, edge : made.shape[1] - edge]


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from frequencies(a, 2592)
    try:
        _filter(a)
    except Unsupported as e:
        yield Finding("unknown-wavelet", "wavelet_family", e.message, e.hint)
