"""RoAd (Liao and Monz 2024): pairs of outputs are rotated and scaled.

    y_i' = first_i * y_i - second_i * y_j,  y_j' = first_j * y_j + second_j * y_i,   of the rows of W and of the bias
    first = alpha * cos(theta), second = alpha * sin(theta)

i and j = i + group / 2 lie in one group. `road_1` has one theta and alpha for both of a pair, `road_2` one for each
output, `road_4` one for each output and each of first and second.
Reference: peft/tuners/road/layer.py (`_prepare_cols`, `_get_delta_weight`, `merge`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Edge, Finding, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported, WrongBase
from adapterpack.methods._changes import replacements, weight_shape
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, floats, positive
from adapterpack.methods._without import no_ranks, no_recipes

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "ROAD"
keep_dtype: frozenset[str] = frozenset()
ranks = no_ranks
recipes = no_recipes
keys = KeyTable("road_", {"theta": "road_theta", "alpha": "road_alpha"})
edges: Mapping[str, tuple[Edge, ...]] = {"road": ()}
_HALVES = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Variant to its parameters for each two outputs."""
_MOST_GROUP = 1 << 20


@dataclass(frozen=True)
class _Layout:
    variant: str
    group: int


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "road", "road")


def _layout(config: Mapping[str, Any]) -> _Layout:
    variant = config.get("variant", "road_1")
    if not isinstance(variant, str) or variant not in _HALVES:
        raise Unsupported(f"variant in adapter_config.json is {variant!r:.60}; known are {', '.join(_HALVES)}")
    group = positive(config, "group_size", 64, _MOST_GROUP)
    if group % 2:
        raise InvalidFile(f"group_size in adapter_config.json is {group}; an even number is wanted")
    return _Layout(variant, group)


def _outputs(module: str, params: Mapping[str, Param], layout: _Layout) -> int:
    theta, alpha = (t.shape for t in floats(module, params, ("theta", "alpha")))
    if len(theta) != 1 or theta != alpha or not theta[0]:
        raise InvalidFile(f"{module}: road_theta {theta} and road_alpha {alpha} are not vectors of one length")
    out, rest = divmod(2 * theta[0], _HALVES[layout.variant])
    if rest or out % layout.group:
        raise InvalidFile(
            f"{module}: {theta[0]} angles of {layout.variant} do not make groups of {layout.group} outputs",
            hint="PEFT refuses to load it: correct variant and group_size in adapter_config.json",
        )
    return out


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    layout = _layout(a.config)
    rotated = partial(_rotated, layout)
    for module, params in a.modules.items():
        out = _outputs(module, params, layout)
        shape = weight_shape(a, module, request.shapes, out=out, conv1d=False)
        if len(shape) != 2:
            raise WrongBase(f"{module}.weight has shape {shape}: RoAd is for linear layers")
        yield TransformChange(module=module, params=params, shape=shape, transform=rotated)
        if request.shapes is not None and request.shapes.has(f"{module}.bias"):
            yield TransformChange(module=module, part="bias", params=params, shape=(out,), transform=rotated)


def _rotated(layout: _Layout, m: Maths, w: Array) -> Array:
    first, second = _columns(m, layout)
    half = layout.group // 2
    if m.exact:
        halves = w.reshape(-1, 2, half, *w.shape[1:])
        turned = m.torch.stack((-halves[:, 1], halves[:, 0]), dim=1).reshape(w.shape)
        column = (-1, *(1 for _ in w.shape[1:]))
        return w * first.reshape(column) + turned * second.reshape(column)
    # PEFT's way: a dense matrix, rounded to the dtype of the base, multiplied in that dtype.
    rows = m.torch.arange(first.shape[0], device=first.device)
    upper = rows % layout.group < half
    matrix = m.torch.diag(first)
    matrix[rows, m.torch.where(upper, rows + half, rows - half)] = m.torch.where(upper, -second, second)
    return m.lift(m.torch.matmul(m.rounded(matrix), m.rounded(w)))


def _columns(m: Maths, layout: _Layout) -> tuple[Array, Array]:
    """What each output keeps of itself and what it gets of its partner, (out,) each."""
    theta, alpha = m["theta"], m["alpha"]
    if layout.variant == "road_4":
        theta, alpha = (v.reshape(-1, 2, layout.group) for v in (theta, alpha))
        cos, sin = theta[:, 0, :].cos().flatten(), theta[:, 1, :].sin().flatten()
        return alpha[:, 0, :].flatten() * cos, alpha[:, 1, :].flatten() * sin
    if layout.variant == "road_1":
        theta, alpha = (
            v.reshape(-1, layout.group // 2).repeat_interleave(2, dim=0).flatten() for v in (theta, alpha)
        )
    return alpha * theta.cos(), alpha * theta.sin()


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    try:
        layout = _layout(a.config)
    except Unsupported as e:
        yield Finding("unknown-variant", "variant", e.message, "PEFT refuses to load it")
        return
    for module, params in a.modules.items():
        try:
            _outputs(module, params, layout)
        except InvalidFile as e:
            yield Finding("half-pair", module, e.message, e.hint)
