"""What an adapter is, from its headers and config alone: no tensor is read, and torch is not imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adapterpack import containers, hub, methods
from adapterpack.adapter import Adapter, Method
from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.tensor import Tensor

_TRAINING_STATE = ("optimizer.", "scheduler.", "rng_state", "scaler.", "trainer_state.json", "training_args.bin")


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        method: `lora`, `vblora`, `vera`, or whatever the config says in lower case.
        encoding: Which equivalent set of parameters is stored; None for methods that are not read.
        base_model: As the config names it.
        modules: How many modules are adapted.
        tensors: How many tensors the file holds.
        bytes: Sum of all files.
        resumable: Can training go on from these parameters? (Optimizer state is another matter.)
        ranks: Rank to number of modules.
        dtypes: dtype to number of tensors.
        parts: Part (`lora_A`, `vector bank`, `modules_to_save` ...) to bytes.
        training_state: Files of the trainer that lie beside it.
        savings: What could go, and how.
        unsupported: Why it cannot be converted or merged; None if it can.
        notes: What is odd.
    """

    method: str
    encoding: str | None
    base_model: str | None
    modules: int
    tensors: int
    bytes: int
    resumable: bool
    ranks: dict[int, int]
    dtypes: dict[str, int]
    parts: dict[str, int]
    training_state: tuple[str, ...]
    savings: tuple[str, ...]
    unsupported: str | None
    notes: tuple[str, ...]


def inspect(
    source: str | Path,
    *,
    base: str | Path | None = None,
    subfolder: str | None = None,
    allow_pickle: bool = False,
) -> Inspection:
    """Look at an adapter.

    Args:
        base: Say whether this base has the adapter's modules, from its headers or config.json.

    Raises:
        InvalidFile: it cannot be read at all.
    """
    with containers.open_checkpoint(source, subfolder=subfolder, allow_pickle=allow_pickle) as c:
        try:
            method, adapter = methods.parse(c)
        except Unsupported as e:
            return _opaque(c, e.message)
        notes = [] if base is None else [_against(adapter, hub.resolve_base(str(base)))]
        return _known(c, method, adapter, notes)


def _against(a: Adapter, path: Path) -> str:
    """One line on whether a base has what the adapter changes."""
    with Base(path, weights=False) as model:
        wanted = a.targets()
        missing = model.bind(wanted)
    if missing:
        return f"the base lacks {len(missing)} of {len(wanted)} tensors that it changes: {', '.join(missing[:5])}"
    return f"the base has all {len(wanted)} tensors that it changes"


def _training_state(c: Checkpoint) -> tuple[str, ...]:
    return tuple(n for n in (*c.left, *c.files) if n.startswith(_TRAINING_STATE))


def _base_model(c: Checkpoint) -> str | None:
    name = c.config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _sizes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for part, tensor in tensors:
        sizes[part] += tensor.nbytes
    return dict(sizes.most_common())


def _dtypes(c: Checkpoint) -> dict[str, int]:
    return dict(Counter(t.dtype.name for t in c.tensors.values()).most_common())


def _opaque(c: Checkpoint, reason: str) -> Inspection:
    return Inspection(
        method=c.peft_type.lower(),
        encoding=None,
        base_model=_base_model(c),
        modules=0,
        tensors=len(c.tensors),
        bytes=c.bytes,
        resumable=True,
        ranks={},
        dtypes=_dtypes(c),
        parts=_sizes(("tensors", t) for t in c.tensors.values()),
        training_state=_training_state(c),
        savings=(),
        unsupported=reason,
        notes=(),
    )


def _known(c: Checkpoint, method: Method, a: Adapter, notes: list[str]) -> Inspection:
    try:
        ranks = dict(sorted(Counter(method.ranks(a).values()).items()))
    except InvalidFile as e:
        ranks = {}
        notes.append(e.message)
    if a.extra:
        notes.append(f"{len(a.extra)} tensors are unknown: kept, never applied: {', '.join(sorted(a.extra)[:5])}")
    return Inspection(
        method=a.method,
        encoding=a.encoding,
        base_model=_base_model(c),
        modules=len(a.modules),
        tensors=len(c.tensors),
        bytes=c.bytes,
        resumable=a.encoding != "topk",
        ranks=ranks,
        dtypes=_dtypes(c),
        parts=_sizes(_parts(a)),
        training_state=_training_state(c),
        savings=tuple(_savings(c, a)),
        unsupported=None,
        notes=tuple(notes),
    )


def _parts(a: Adapter) -> Iterable[tuple[str, Tensor]]:
    for params in a.modules.values():
        yield from ((name, p.tensor) for name, p in params.items())
    yield from ((name, p.tensor) for name, p in a.shared.items())
    for entries in a.replaced.values():
        for r in entries:
            what = "token rows" if r.rows is not None else "saved embeddings"
            if r.rows is None and ".base_layer." not in r.param.key:
                what = "modules_to_save"
            yield ("biases" if r.param.key.endswith(".bias") else what), r.param.tensor
    yield from (("unknown", t) for t in a.extra.values())


def _savings(c: Checkpoint, a: Adapter) -> Iterable[str]:
    sizes = _sizes(_parts(a))
    if a.encoding == "full-logits":
        k = c.config.get("topk", 2)
        yield f"logits beyond the {k} largest of each sub-vector: adapterpack compress"
    if a.encoding == "projection":
        n = sizes.get("vera_A", 0) + sizes.get("vera_B", 0)
        yield f"{n:,} bytes of projections, if their seed gives them back: adapterpack convert --to seed"
    if "saved embeddings" in sizes:
        n = sizes["saved embeddings"]
        yield f"{n:,} bytes of saved embeddings, if they equal the base's: adapterpack compress --base BASE"
    if _training_state(c):
        yield "training state: it is left behind by convert and compress"
