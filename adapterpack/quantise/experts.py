"""LoRA on bare parameters (`target_parameters`) in few bits: one expert after the other, none of lower rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, LowRank, Progress, Shapes
from adapterpack.codecs.lines import Quantised, classes
from adapterpack.methods._parameters import Level, levels
from adapterpack.quantise.lora import codes_of, stored_now
from adapterpack.tensor import F32, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Backend


def tensors(
    a: Adapter, xp: Backend, shapes: Shapes | None, max_error: float, progress: Progress | None
) -> dict[tuple[str, str], Tensor]:
    """(module, name) to a new tensor, of every wrapped parameter that gets smaller.

    PEFT knows one rank for all experts: lines that get no bits stay, as zeros.

    Raises:
        WrongBase, InvalidFile: see `methods.lora.changes`.
    """
    if not a.parameters:
        return {}
    made: dict[tuple[str, str], Tensor] = {}
    places = {id(a.modules[name]): name for name in a.parameters}
    found = list(levels(a, shapes))
    for n, level in enumerate(found):
        if progress:
            progress("quantise", n, len(found))
        new = _quantised(level, xp, shapes, max_error)
        if new is not None:
            made |= {(places[id(level.params)], name): tensor for name, tensor in new.items()}
    return made


def _quantised(level: Level, xp: Backend, shapes: Shapes | None, max_error: float) -> dict[str, Tensor] | None:
    """New A and B of a stack; None where its codes would be too large, or take more room."""
    import numpy as np

    shape = None if shapes is None else shapes.shape(level.target)
    stack = level.stack(None if shape is None else shape[0] if len(shape) == 3 else 1)
    codes_a = np.zeros((stack.experts, stack.rank, stack.into), np.int32)
    codes_b = np.zeros((stack.rank, stack.experts, stack.out), np.int32)
    steps_a = np.zeros((stack.experts, stack.rank), np.int64)
    steps_b = np.zeros((stack.rank, stack.experts), np.int64)
    for e in range(stack.experts):
        codes = codes_of(xp, LowRank(*stack.expert(xp, e), 1.0), f"{level.target} of expert {e}", max_error)
        if codes is None:
            return None
        codes = codes.padded(stack.rank)
        codes_a[e], codes_b[:, e] = codes.a, codes.b
        steps_b[:, e], steps_a[e] = codes.steps
    sources = (
        Quantised(codes_a.reshape(-1, stack.into), tuple(steps_a.reshape(-1).tolist())),
        Quantised(codes_b.reshape(-1, stack.out), tuple(steps_b.reshape(-1).tolist()), axis=1),
    )
    if classes(sources).nbytes + sum(len(s.steps) for s in sources) >= stored_now(stack.a) + stored_now(stack.b):
        return None
    return {
        "lora_A": Tensor(F32, stack.a.shape, sources[0]),
        "lora_B": Tensor(F32, stack.b.shape, sources[1]),
    }
