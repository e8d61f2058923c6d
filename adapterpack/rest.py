"""What a fine-tune changed besides matrices of linear layers, kept whole in an adapter.

Biases of adapted layers go into `bias: lora_only`, all else into `modules_to_save`, module by module: PEFT wants
every tensor of such a module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from adapterpack.base import Base, Memory
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.pairing import Pair, Role
from adapterpack.tensor import Tensor, chunks, numpy_dtype


@dataclass(frozen=True)
class Kept:
    """Tensors that an adapter holds whole.

    Attributes:
        modules: Paths for `modules_to_save`.
        biases: Are biases of adapted layers among them?
        tensors: Key without PEFT's prefix to the tuned model's values.
    """

    modules: tuple[str, ...] = ()
    biases: bool = False
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def check_finite(self) -> None:
        """Raise InvalidFile if one of them has NaN or infinities."""
        import numpy as np

        for name, t in self.tensors.items():
            if t.dtype.kind == "float":
                own = numpy_dtype(t.dtype)
                for chunk in chunks(t.source):
                    if not np.isfinite(np.frombuffer(chunk, own).astype(np.float32)).all():
                        raise InvalidFile(f"{name} has NaN or infinite values in the tuned model")


def keep(pairs: Sequence[Pair], targets: Sequence[Pair], left: Sequence[Pair], tuned: Base) -> Kept:
    """How the changed tensors in `left` are kept.

    Raises:
        Unsupported: PEFT cannot keep one of them whole.
    """
    adapted = {p.module for p in targets}
    modules: set[str] = set()
    biases = False
    for p in left:
        if p.role is Role.EXPERT:
            raise Unsupported(
                f"{p.name} belongs to an expert: modules_to_save cannot keep it", hint="--rest drop leaves such out"
            )
        if p.module in adapted and p.name.endswith(".bias"):
            biases = True
        elif not p.module:
            raise Unsupported(f"{p.name} belongs to no module: PEFT cannot keep it", hint="--rest drop leaves it out")
        else:
            modules.add(p.module)
    tensors = {p.name: p.tuned for p in pairs}
    if any(p.role is Role.EMBEDDING and p.tuned.source is _embedding(tuned) for p in left) and tuned.tied:
        # A head that is tied is not on disk, and PEFT keeps each side for itself.
        head = next((p.name for p in pairs if p.role is Role.HEAD), Memory(tuned)(tuned.head))
        tensors.setdefault(head, tuned.tensors[str(tuned.embedding)])
        modules.add(head.rpartition(".")[0])
    # What lies in a module that is kept is kept with it: PEFT cannot wrap both.
    modules = {m for m in modules if not any(path in modules for path in _above(m))}
    # PEFT's test has no dot boundary: whatever ends like one is kept too.
    paths = {path for name in tensors for path in _above(name)}
    endings = tuple(modules)
    whole = {path for path in paths if path.endswith(endings)}
    both = next(((w, t) for t in sorted(adapted) for w in (*_above(t), t) if w in whole), None)
    if both is not None:
        own, inside = both
        raise Unsupported(
            f"a tensor of {own} itself changed, and {inside} in it becomes LoRA: PEFT cannot keep both",
            hint="--rest drop leaves such tensors out",
        )
    nested = next((w for w in sorted(whole) if any(path in whole for path in _above(w))), None)
    if nested is not None:
        raise Unsupported(f"PEFT cannot keep {nested} and a module that it lies in", hint="--rest drop")
    found = {n: t for n, t in tensors.items() if not whole.isdisjoint(_above(n))}
    if biases:
        found |= {f"{m}.base_layer.bias": t for m in sorted(adapted) if (t := tensors.get(f"{m}.bias")) is not None}
    return Kept(tuple(sorted(modules)), biases, found)


def _embedding(tuned: Base) -> object:
    return None if tuned.embedding is None else tuned.tensors[tuned.embedding].source


def _above(name: str) -> Iterator[str]:
    """The paths of all modules that a tensor lies in."""
    parts = name.split(".")
    yield from (".".join(parts[:n]) for n in range(1, len(parts)))
