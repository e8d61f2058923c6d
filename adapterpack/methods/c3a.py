"""C3A (Chen et al. 2024): W's change cut into b by b blocks, each a circulant matrix of a kernel of b values.

    delta W = blocks / in,   element [p, q] of block m, n: kernel[m, n, (q - p) mod b],   kernel (out / b, in / b, b)

PEFT computes it by Fourier transforms in f32 and rounds to the base's dtype before and after the division.
Reference: peft/tuners/c3a/layer.py (`get_delta_weight`) and utils.py (`get_circulant_fast`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from adapterpack import limits
from adapterpack.adapter import Adapter, Change, Edge, Finding, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.io.patterns import Budget, Pattern
from adapterpack.methods import _findings
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import DenseChange, Maths
from adapterpack.methods._keys import KeyTable, positive, require
from adapterpack.methods._without import no_ranks, no_recipes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "C3A"
keep_dtype: frozenset[str] = frozenset()
ranks = no_ranks
recipes = no_recipes
keys = KeyTable("c3a_", {"kernel": "c3a_kernel"})


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "c3a", "c3a")


def _kernel(a: Adapter, module: str) -> Shape:
    shape = require(module, a.modules[module], ("kernel",))[0].shape
    if len(shape) != 3 or not all(shape):
        raise InvalidFile(f"{module}: kernel {shape} is not (out / b, in / b, b)")
    if (shape[1] * shape[2]) ** 2 > limits.CHANGE_ELEMENTS:
        # The transforms are of a unit matrix of that width.
        raise InvalidFile(
            f"{module}: kernel {shape} stands for {shape[1] * shape[2]:,} inputs: no weight is that wide"
        )
    return shape


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    for module, params in a.modules.items():
        rows, columns, b = _kernel(a, module)
        yield DenseChange(module=module, params=params, shape=(rows * b, columns * b), delta=_delta)


def _delta(m: Maths) -> Array:
    kernel, fft = m["kernel"], m.torch.fft
    _, n, b = kernel.shape
    unit = m.torch.eye(n * b, dtype=kernel.dtype, device=kernel.device).reshape(n * b, n, b)
    spectrum = m.torch.einsum("...nb,mnb->...mb", fft.ifft(unit), fft.fft(kernel))
    delta = fft.fft(spectrum).real.flatten(1).T
    # Divided in the base's dtype.
    return m.lift(m.rounded(delta) / (n * b))


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from _findings.broken(a, lambda module: _kernel(a, module))
    common, field = positive(a.config, "block_size", 256), "block_size_pattern"
    values = a.config.get(field) or {}
    if not isinstance(values, dict):
        raise InvalidFile(f"{field} in adapter_config.json is not an object")
    budget = Budget()
    patterns = [Pattern(key, template=r".*\.{}$", where=field, budget=budget) for key in values]
    for module, found in _findings.sound(a, lambda module: _kernel(a, module)[2]).items():
        # The first one counts; a whole path as a key is no pattern but counts too.
        hit = next((p.text for p in patterns if p.matches(module)), module)
        said = values.get(hit, common)
        if said != found:
            message = f"the config says block_size {said!r:.20}, the kernel has {found}: PEFT refuses to load it"
            yield Finding("rank-mismatch", module, message, f'put "{module}": {found} into {field}')


edges: Mapping[str, tuple[Edge, ...]] = {"c3a": ()}
