"""Adapters of single experts, as transformers 4 had them, for a base whose experts are fused in one tensor.

PEFT joins them when it loads them into a model of transformers 5, and so their change is rounded before it is added,
as that of any bare parameter. Reference: peft/utils/transformers_weight_conversion.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from adapterpack.adapter import Adapter, Shapes
from adapterpack.errors import Unsupported, WrongBase
from adapterpack.experts import parts_of
from adapterpack.methods._keys import flag
from adapterpack.methods._lora_modules import Module, Scaling, modules
from adapterpack.methods._parameters import ParameterChange
from adapterpack.methods._stacks import JoinedStack

Layers = dict[tuple[int, int], Module]
"""(expert, part) to its module."""


def find(a: Adapter, shapes: Shapes | None) -> dict[str, Layers]:
    """Fused parameter of the base to the modules that lie in it.

    Raises:
        WrongBase: the adapter lacks some of its experts or parts.
        Unsupported: the parameter is one of gpt-oss or its kin, which no adapter of single experts can be for.
    """
    found: defaultdict[str, Layers] = defaultdict(dict)
    if shapes is None:
        return {}
    for m in modules(a):
        inside = shapes.inside(f"{m.name}.weight")
        if inside is not None:
            found[inside.target][inside.expert, inside.part] = m
    for target, layers in found.items():
        parts = parts_of(target.rpartition(".")[2])
        wanted = {(e, p) for e in range(shapes.shape(target)[0]) for p in range(parts)}
        if shapes.conv1d(target.rpartition(".")[0]):
            raise Unsupported(f"the gates of {target} lie among its other rows: experts cannot be joined to that")
        if layers.keys() != wanted:
            missing = sorted(wanted - layers.keys())
            raise WrongBase(
                f"{target} is fused in the base, and the adapter lacks {len(missing)} of its {len(wanted)} parts:"
                " PEFT cannot join the rest either",
                hint="merge into a base whose experts lie apart, as transformers saves them",
            )
    return dict(found)


def changes(joined: Mapping[str, Layers], scaling: Scaling, config: Mapping[str, Any]) -> Iterator[ParameterChange]:
    """One change for each fused parameter.

    Raises:
        Unsupported: what PEFT cannot join either, or joins wrongly.
    """
    for target, layers in joined.items():
        own = [layers[key] for key in sorted(layers)]
        parts = parts_of(target.rpartition(".")[2])
        scales = {scaling(m.name, m.rank) for m in own}
        shapes = {m.shape for m in own}
        if len(scales) != 1 or len({m.rank for m in own}) != 1 or len(shapes) != 1 or own[0].convolution:
            raise Unsupported(f"the experts of {target} have other ranks, alphas or shapes: they cannot be joined")
        if flag(config, "use_dora") or any(m.params.keys() != {"lora_A", "lora_B"} for m in own):
            raise Unsupported(f"{target} is fused in the base: DoRA and biases of its experts cannot be joined")
        if flag(config, "use_rslora") and parts > 1:
            raise Unsupported(
                f"{target} is fused in the base, and with rsLoRA PEFT joins its experts at the wrong scale",
                hint="merge into a base whose experts lie apart, as transformers saves them",
            )
        grouped = [tuple(m.pair for m in own[n : n + parts]) for n in range(0, len(own), parts)]
        uses = frozenset(p.key for m in own for p in m.params.values())
        yield ParameterChange(target.rpartition(".")[0], target, JoinedStack(tuple(grouped)), scales.pop(), uses)
