"""KaSA (Wang et al. 2024, arXiv 2412.06071): the least singular directions of the base give way to trained ones.

    W_t = the best approximation of W of rank min(out, in) - r;   W' = W_t + s * B diag(d) A

W_t is a function of W, whatever signs an SVD chooses. PEFT truncates the base as it loads the adapter, in the dtype
of the base. Reference: peft/tuners/lora/variants.py (`KasaLinearVariant`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Edge, Finding, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported, WrongBase
from adapterpack.methods import _lora_variants, lora
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, floats
from adapterpack.methods._lora_modules import Module, Scaling, modules
from adapterpack.methods._of_base import linear_shape
from adapterpack.methods._without import no_recipes

if TYPE_CHECKING:
    from adapterpack.backend import Array

name = "kasa"
peft_type = "LORA"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
_SWITCH, _DIAGONAL = "kasa_config", "lora_diag"
_FIELDS = {"beta", "gamma"}
"""Of its own config: both are for training."""
keys = KeyTable("lora_", {**_lora_variants.KEYS.params, _DIAGONAL: _DIAGONAL})


def claims(c: Checkpoint) -> bool:
    """Does the config turn it on, or do its tensors?"""
    return bool(c.config.get(_SWITCH)) or any(key.endswith(f".{_DIAGONAL}") for key in c.tensors)


def parse(c: Checkpoint) -> Adapter:
    a = _lora_variants.parse(c, name, keys, _SWITCH, _DIAGONAL)
    unknown = sorted(_lora_variants.sub_config(c.config, _SWITCH).keys() - _FIELDS)
    if unknown:
        raise Unsupported(f"{unknown[0]:.60} in {_SWITCH} is unknown", hint="merge it with PEFT")
    return a


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    scaling = Scaling(a.config)
    for m in modules(a):
        out, rank, into = _sizes(m)
        shape = linear_shape(a, m.name, request, out=out, into=into)
        if rank >= min(shape):
            raise WrongBase(f"{m.name}.weight has shape {shape}: nothing is left of it without {rank} directions")
        scale = scaling(m.known_as, rank)
        yield TransformChange(
            module=m.name,
            params={n: p for n, p in m.params.items() if n != "lora_bias"},
            shape=shape,
            transform=partial(_changed, scale),
            derive=_truncated,
            settings={"scale": scale},
        )
        yield from lora.biases(m, out, scale)


def _sizes(m: Module) -> tuple[int, int, int]:
    """out, r and in."""
    a, b, d = (t.shape for t in floats(m.name, m.params, ("lora_A", "lora_B", _DIAGONAL)))
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or d != (a[0],) or not a[0]:
        raise InvalidFile(f"{m.name}: A {a}, B {b} and lora_diag {d} are not (r, in), (out, r) and (r,)")
    return b[0], a[0], a[1]


def _truncated(m: Maths, w: Array, found: Mapping[str, Array] | None) -> Mapping[str, Array]:
    """W_t, rounded to the dtype of the base as PEFT stores it."""
    kept = min(w.shape) - m[_DIAGONAL].shape[0]
    u, s, vh = m.torch.linalg.svd(w, full_matrices=False)
    return {"kept": m.lift(m.rounded((u[:, :kept] * s[:kept]) @ vh[:kept]))}


def _changed(scale: float, m: Maths, w: Array) -> Array:
    delta = (m["lora_B"] * m[_DIAGONAL]) @ m["lora_A"] * scale
    return m["kept"] + m.lift(m.rounded(delta))


def ranks(a: Adapter) -> Mapping[str, int]:
    return {m.name: _sizes(m)[1] for m in modules(a)}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    yield from lora.pair_findings(a, lambda m: _sizes(m)[1])


edges: Mapping[str, tuple[Edge, ...]] = {name: ()}
