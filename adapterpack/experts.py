"""Experts of a mixture lie fused in one tensor, or apart, one matrix for each: who is who, from the names on disk.

In the modules of transformers 5 `mlp.experts.gate_up_proj` is one parameter (experts, 2f, d): for each expert the
rows of the gate, then those of `up`. Its files keep them apart (`mlp.experts.0.gate_proj.weight`, Mixtral's
`block_sparse_moe.experts.0.w1.weight`), as the modules of transformers 4 did (`conversion_mapping.py`). An adapter
may be for either, and so may a base.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from adapterpack.errors import WrongBase
from adapterpack.tensor import Tensor

PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
    "up_proj": (("up_proj",),),
}
"""Fused parameter to the layers of one expert whose rows it holds, top to bottom, in each family's words."""

ORDER = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "gate_proj",
    "up_proj",
    "down_proj",
    "down_proj_bias",
    "w1",
    "v1",
    "w2",
)
"""The order in which the modules of transformers define these parameters."""

_APART = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)\.weight")
_RENAMED = {
    "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
    "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
    "mlp.experts.fc1.weight": "mlp.experts.gate_up_proj",
    "mlp.experts.fc2.weight": "mlp.experts.down_proj",
}
"""Fused tensors that lie under another name than their parameter (GraniteMoE, Aria)."""
_NESTING = {"model", "language_model", "text_model"}
_ROUTERS = (".mlp.gate.weight", ".block_sparse_moe.gate.weight")


@dataclass(frozen=True)
class Piece:
    """A tensor on disk that holds a part of a fused parameter.

    Attributes:
        name: On disk.
        expert: Whose it is.
        rows: Which rows of that expert's matrix (out, in).
    """

    name: str
    expert: int
    rows: slice


@dataclass(frozen=True)
class Apart:
    """A fused parameter whose experts lie apart.

    Attributes:
        shape: (experts, out, in), as the module has it.
    """

    shape: tuple[int, int, int]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Inside:
    """Where one layer of one expert lies in a fused parameter.

    Attributes:
        target: The fused parameter, `...mlp.experts.gate_up_proj`.
        expert: Which one.
        part: Which part of its rows: 0 for the gate, 1 for `up`.
    """

    target: str
    expert: int
    part: int


class Experts:
    """The experts of a base.

    Args:
        tensors: Name on disk to tensor.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def renamed(self, target: str) -> str | None:
        """Name on disk of a fused parameter, or of a router's weight, that lies under another one."""
        container, _, leaf = target.rpartition(".")
        if container.endswith("experts"):
            return self._fused.get(_tail(container), {}).get(leaf)
        return self._routers.get(_tail(target)) if target.endswith(_ROUTERS) else None

    @cached_property
    def _routers(self) -> dict[str, str | None]:
        """Spelled as in the modules of transformers 5 to name; of two alike neither."""
        found: dict[str, str | None] = {}
        for name in self._tensors:
            if name.endswith(_ROUTERS):
                found[_tail(name)] = None if _tail(name) in found else name
        return found

    def apart(self, target: str) -> Apart | None:
        """How a fused parameter lies apart; None if there is nothing like it.

        Raises:
            WrongBase: experts are missing, or are not of one shape; or they could be those of several modules.
        """
        container, _, parameter = target.rpartition(".")
        if parameter not in PARTS or not container.endswith("experts"):
            return None
        found = self._container(container)
        if found is None:
            return None
        layers = self._apart[found]
        for family in PARTS[parameter]:
            if all(layer in layers for layer in family):
                return self._gather(found, family)
        return None

    def inside(self, target: str) -> Inside | None:
        """Where the weight of one expert's layer lies, if experts are fused in this base."""
        match = _APART.fullmatch(target)
        if match is None:
            return None
        container, expert, layer = match.groups()
        fused = self._fused.get(_tail(container), {})
        for parameter, families in PARTS.items():
            for family in families:
                if layer in family and parameter in fused:
                    return Inside(f"{container}.{parameter}", int(expert), family.index(layer))
        return None

    @cached_property
    def _apart(self) -> dict[str, dict[str, dict[int, str]]]:
        """Container (`model.layers.0.mlp.experts`) to layer to expert to name."""
        found: defaultdict[str, defaultdict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
        for name in self._tensors:
            if match := _APART.fullmatch(name):
                container, expert, layer = match.groups()
                found[container][layer][int(expert)] = name
        return {container: dict(layers) for container, layers in found.items()}

    @cached_property
    def _fused(self) -> dict[str, dict[str, str]]:
        """Tail of a container to parameter to name. Where two models have one tail, neither is there."""
        found: defaultdict[str, dict[str, str]] = defaultdict(dict)
        doubles = set()
        for name, tensor in self._tensors.items():
            spelled = name
            for old, new in _RENAMED.items():
                if name.endswith(f".{old}"):
                    spelled = name.removesuffix(old) + new
            container, _, parameter = spelled.rpartition(".")
            if container.endswith("experts") and len(tensor.shape) == 3:
                tail = _tail(container)
                if parameter in found[tail]:
                    doubles.add(tail)
                found[tail][parameter] = name
        return {tail: names for tail, names in found.items() if tail not in doubles}

    def _container(self, wanted: str) -> str | None:
        alike = [c for c in self._apart if _tail(c) == _tail(wanted)]
        if len(alike) > 1:
            alike = [c for c in alike if _spelled(c) == _spelled(wanted)] or alike
        if len(alike) > 1:
            raise WrongBase(f"the experts of {wanted} could be {' or '.join(sorted(alike))} of the base")
        return alike[0] if alike else None

    def _gather(self, container: str, family: tuple[str, ...]) -> Apart:
        layers = [self._apart[container][layer] for layer in family]
        experts = range(len(layers[0]))
        shapes = {self._tensors[name].shape for layer in layers for name in layer.values()}
        if any(layer.keys() != set(experts) for layer in layers) or len(shapes) != 1:
            raise WrongBase(f"the experts of {container} are not all there, or not of one shape")
        (shape,) = shapes
        if len(shape) != 2:
            raise WrongBase(f"the experts of {container} are no matrices: {shape}")
        height, width = shape
        pieces = tuple(
            Piece(layer[expert], expert, slice(n * height, (n + 1) * height))
            for expert in experts
            for n, layer in enumerate(layers)
        )
        return Apart((len(experts), height * len(layers), width), pieces)


def _spelled(container: str) -> str:
    """Mixtral's module is `mlp`; on disk, and in transformers 4, it is `block_sparse_moe`."""
    return container.replace("block_sparse_moe", "mlp")


def _tail(container: str) -> str:
    """From the list of layers on; and what stands before it, unless that is nothing but the nesting of a language
    model, which may differ between base and adapter."""
    parts = _spelled(container).split(".")
    digit = next((i for i, part in enumerate(parts) if part.isdecimal()), 1)
    at = max(digit - 1, 0)
    return ".".join(parts[at:] if set(parts[:at]) <= _NESTING else parts)


def parts_of(parameter: str) -> int:
    """How many layers of an expert a fused parameter holds."""
    return len(PARTS[parameter][0])
