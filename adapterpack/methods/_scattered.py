"""Values at places of a weight that a seed chose: what FourierFT, WaveFT and SHiRA have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterpack import draws
from adapterpack.adapter import Adapter, Finding, Param, Request
from adapterpack.errors import InvalidFile, WrongBase
from adapterpack.methods._changes import logical_shape
from adapterpack.methods._keys import require
from adapterpack.tensor import Shape, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array
    from adapterpack.methods._formula import Maths


def values(module: str, params: Mapping[str, Param], name: str) -> Tensor:
    """The vector of a module. Raises InvalidFile: it is none, or empty."""
    (tensor,) = require(module, params, (name,))
    if len(tensor.shape) != 1 or not tensor.shape[0] or tensor.dtype.kind != "float":
        raise InvalidFile(f"{module}: {params[name].key} has shape {tensor.shape}; a vector of floats is wanted")
    return tensor


def matrix_shape(a: Adapter, module: str, request: Request, count: int) -> tuple[int, int]:
    """(out, in) of a linear layer that has at least that many places.

    Raises:
        WrongBase: there is no base to ask, or it has another layer there.
        InvalidFile: more values than places.
    """
    if request.shapes is None:
        raise WrongBase(
            f"{a.method} needs the shapes of the base's modules: its values lie at places of the whole weight",
            hint="--base BASE; its config.json and safetensors headers are enough, no weights are read",
        )
    shape = logical_shape(a, module, request.shapes)
    if len(shape) != 2:
        raise WrongBase(f"{module}.weight has shape {shape} in the base; a linear layer is wanted")
    if count > math.prod(shape):
        raise InvalidFile(f"{module} has {count:,} values for {math.prod(shape):,} places")
    return shape[0], shape[1]


def scattered(m: Maths, shape: Shape, places: Array, found: Array, nothing: float = 0.0) -> Array:
    """A matrix with these values at flat places, row by row, and `nothing` elsewhere."""
    dense = m.torch.full((math.prod(shape),), nothing, dtype=found.dtype, device=m.xp.device)
    dense[places] = found
    return dense.reshape(*shape)


def drawn_places(m: Maths, shape: Shape, count: int, seed: int) -> Array:
    """The flat places that PEFT draws for one module: its own generator each, so like shapes have like places."""
    return m.torch.from_numpy(draws.permutation(math.prod(shape), count, seed).copy()).to(m.xp.device)


def number(config: Mapping[str, Any], field: str, default: float) -> float:
    """A finite number of the config. Raises InvalidFile for anything else."""
    value = config.get(field, default)
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e9:
        raise InvalidFile(f"{field} in adapter_config.json is {value!r:.60}; a finite number is wanted")
    return float(value)


def frequencies(a: Adapter, default: int) -> Iterator[Finding]:
    """Modules that have no spectrum, or one of another length than the config says: PEFT would not load it.

    Where patterns or proportions decide, the length is the tensor's own.
    """
    said = a.config.get("n_frequency", default)
    decided = a.config.get("n_frequency_pattern") or a.config.get("proportional_parameters")
    for module, params in a.modules.items():
        try:
            count = values(module, params, "spectrum").shape[0]
        except InvalidFile as e:
            yield Finding("spectrum-shape", module, e.message, "train or save the adapter again")
            continue
        if count != said and not decided:
            what = f"the config says {said!r:.40} frequencies, the spectrum has {count}"
            yield Finding("frequency-mismatch", module, what, f"set n_frequency to {count}")
