"""What an adapter is, from its headers and config; of values a few are looked at, and torch is not imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from adapterpack import containers, methods, parts, sources
from adapterpack.adapter import Adapter, Method
from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.containers import apack
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.io.files import Folder
from adapterpack.tensor import Tensor

_GLANCE = 1024
"""Bytes that are looked at, at three places of a tensor, to see how many of its values are zero."""
_SPARSE = 0.5
_TRAINING_STATE = ("optimizer.", "scheduler.", "rng_state", "scaler.", "trainer_state.json", "training_args.bin")


@dataclass(frozen=True)
class PackFacts:
    """What a pack says of itself.

    Attributes:
        bytes: Of the pack.
        grade: What was lost when it was made.
        max_error, error: What was allowed then and what was measured; None where nothing was lost.
        source_bytes: Of all files that it was made from.
        files: Paths of the files that it restores.
        not_stored: What it takes from elsewhere, to number of tensors: recipe, base, parent, equal.
        parents: Names of the packs and directories that it needs, the nearest first; less than `depth` where one of
            them is not beside the pack.
        depth: How many parents there are.
        base: The base model that it takes tensors from.
        producer: What wrote it.
        dropped: What of the source is not in it.
    """

    bytes: int
    grade: str
    max_error: str | None
    error: str | None
    source_bytes: int
    files: tuple[str, ...]
    not_stored: dict[str, int]
    parents: tuple[str, ...]
    depth: int
    base: str | None
    producer: str
    dropped: tuple[str, ...]


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
        density: Which part of the values of its low-rank factors is not zero, about, from a look at a few of each;
            factors of zeros alone, which are untrained, do not count. None: not looked at, for it is no directory.
        unsupported: Why it cannot be converted or merged; None if it can.
        notes: What is odd.
        pack: Of a pack, what it is; None for directories.
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
    pack: PackFacts | None = None
    density: float | None = None


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
    with _open(source, subfolder, allow_pickle) as c:
        pack = _pack_facts(c)
        try:
            if c.pack is not None and not c.tensors:
                raise Unsupported("it holds no safetensors file: its weights are bytes here")
            method, adapter = methods.parse(c)
        except Unsupported as e:
            return replace(_opaque(c, e.message), pack=pack)
        notes = [] if c.at_hand else [f"headers alone were read, of {c.name}"]
        notes += [] if base is None else [_against(adapter, sources.base_headers(base))]
        return replace(_known(c, method, adapter, notes), pack=pack)


def _pack_facts(c: Checkpoint) -> PackFacts | None:
    if c.pack is None:
        return None
    m = c.pack.manifest
    places = Counter(apack.place_name(t.place) for t in m.tensors)
    return PackFacts(
        bytes=c.pack.file.size,
        grade=m.grade,
        max_error=m.max_error,
        error=m.error,
        source_bytes=m.source_bytes,
        files=tuple(file.path for file in m.files),
        not_stored={name: n for name, n in places.items() if name is not None},
        parents=tuple(apack.parents(c.pack)),
        depth=0 if m.parent is None else m.parent.depth,
        base=m.base,
        producer=m.producer,
        dropped=m.dropped,
    )


def _open(source: str | Path, subfolder: str | None, allow_pickle: bool) -> Checkpoint:
    remote = sources.headers(source, subfolder, opaque=True)
    if remote is not None:
        return remote
    # A pack's manifest tells what it holds, whatever that is.
    opaque = apack.is_pack(Path(source).expanduser())
    return containers.open_checkpoint(
        source, subfolder=subfolder, allow_pickle=allow_pickle, opaque=opaque, foreign=True
    )


def _against(a: Adapter, place: Path | Folder) -> str:
    """One line on whether a base has what the adapter changes."""
    with Base(place, weights=False) as model:
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
        parts=parts.sizes(("tensors", t) for t in c.tensors.values()),
        training_state=_training_state(c),
        savings=(),
        unsupported=reason,
        notes=(),
    )


def _known(c: Checkpoint, method: Method, a: Adapter, notes: list[str]) -> Inspection:
    try:
        ranks = dict(sorted(Counter(method.ranks(a).values()).items()))
    except (InvalidFile, Unsupported) as e:
        ranks = {}
        notes.append(e.message)
    density = _density(a) if c.at_hand and c.pack is None else None
    if density is not None and density < _SPARSE:
        notes.append(
            f"sparse: about {density:.2g} of the values of its factors are not zero; a pack stores the others' places"
            " alone (adapterpack compress SRC DST.apack)"
        )
    if c.foreign is not None:
        notes.append(f"other code than PEFT wrote it: convert it first; it holds {c.foreign}")
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
        parts=parts.sizes(parts.of(a)),
        training_state=_training_state(c),
        savings=tuple(_savings(c, a)),
        unsupported=None,
        notes=tuple(notes),
        density=density,
    )


def _density(a: Adapter) -> float | None:
    seen = others = 0
    for params in a.modules.values():
        for name, param in params.items():
            if name.startswith(("lora_A", "lora_B", "lora_embedding")):
                zero, values = _zeros(param.tensor)
                if zero != values:
                    seen, others = seen + values, others + values - zero
    return others / seen if seen else None


def _zeros(tensor: Tensor) -> tuple[int, int]:
    """How many of the first, middle and last values are zero, of either sign, and of how many."""
    bits = tensor.dtype.bits
    if bits not in (16, 32) or tensor.dtype.kind != "float":
        return 0, 0
    size = tensor.nbytes
    starts = [0] if size <= 3 * _GLANCE else [0, (size - _GLANCE) // 8 * 4, size - _GLANCE]
    data = b"".join(tensor.source.read(s, size if len(starts) == 1 else s + _GLANCE) for s in starts)
    values = memoryview(data).cast("H" if bits == 16 else "I")
    magnitude = (1 << (bits - 1)) - 1
    return sum(not value & magnitude for value in values), len(values)


def _savings(c: Checkpoint, a: Adapter) -> Iterable[str]:
    sizes = parts.sizes(parts.of(a))
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
