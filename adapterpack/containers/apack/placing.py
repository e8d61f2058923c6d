"""Where each tensor of an adapter goes: what need not be stored, and which tensors are coded together."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from adapterpack import limits, methods
from adapterpack.adapter import Adapter
from adapterpack.checkpoint import Checkpoint
from adapterpack.codecs import lines
from adapterpack.containers.apack.facts import References
from adapterpack.containers.apack.manifest import (
    Class,
    Drawn,
    Entry,
    File,
    FromBase,
    FromParent,
    InStream,
    Lines,
    Place,
    Same,
    Tensors,
    Text,
)
from adapterpack.containers.peft import CONFIG, WEIGHTS
from adapterpack.errors import AdapterpackError
from adapterpack.io import json as strict_json
from adapterpack.io import safetensors
from adapterpack.recipes import Recipe
from adapterpack.tensor import F32, Joined, Memory, Source, Tensor, chunks

_WORTH_A_REFERENCE = 256
"""Smaller tensors cost less than saying where they are."""
_WORTH_A_STREAM = 1024
_RECIPES = 1000
"""Most recipes of one pack."""
_ENDS = {"weight", "bias", "default"}


@dataclass
class StreamPlan:
    """Bytes that will be coded together.

    Attributes:
        kind: `float`, `int`, or `bytes` for all that has no words.
        width: Bytes of a word.
        narrow: Are they 4-byte floats whose lower halves are zero?
        noise: Are they known to be incompressible?
        run: So many words one behind the other have few values; 0: they have not.
        parts: What they are, one behind the other.
        before: The parent's bytes of the same parts; None: it has not all of them.
    """

    kind: str
    width: int = 1
    narrow: bool = False
    noise: bool = False
    run: int = 0
    parts: list[Source] = field(default_factory=list)
    before: list[Source] | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass
class Placing:
    """The plan of a pack: everything of the manifest but digests and frames.

    Attributes:
        files: With empty digests; `sources` has what they consist of.
        sources: The bytes of each file.
        uses_base, uses_parent: Was any of it needed?
    """

    files: list[File] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    tensors: list[Entry] = field(default_factory=list)
    streams: list[StreamPlan] = field(default_factory=list)
    recipes: list[Recipe] = field(default_factory=list)
    classes: list[Class] = field(default_factory=list)
    uses_base: bool = False
    uses_parent: bool = False


def place(c: Checkpoint, files: Mapping[str, Source], references: References) -> Placing:
    """Plan a pack.

    Args:
        c: The adapter; of its files only config and tensors are looked at.
        files: All others to carry, by path.
        references: What lies elsewhere.
    """
    plan = Placing()
    config = c.config_bytes if c.config_bytes is not None else strict_json.dump(dict(c.config))
    _add(plan, CONFIG, Memory(config), Text(config.decode()))
    if c.tensors or c.weights is not None:
        _add_tensors(plan, c, references)
    text: int | None = None
    for path, source in sorted(files.items()):
        if source.nbytes > limits.CHUNK_BYTES:
            _add(plan, path, source, InStream(_stream(plan, StreamPlan("bytes"), source)))
            continue
        # Small files lie together: what they share is stored once.
        text = _stream(plan, StreamPlan("bytes"), source) if text is None else _more(plan, text, source)
        _add(plan, path, source, InStream(text))
    return plan


def _add(plan: Placing, path: str, source: Source, content: Text | InStream | Tensors) -> None:
    plan.files.append(File(path, source.nbytes, "", content))
    plan.sources.append(source)


def _stream(plan: Placing, stream: StreamPlan, *parts: Source) -> int:
    stream.parts.extend(parts)
    plan.streams.append(stream)
    return len(plan.streams) - 1


def _more(plan: Placing, stream: int, source: Source) -> int:
    plan.streams[stream].parts.append(source)
    return stream


def _add_tensors(plan: Placing, c: Checkpoint, references: References) -> None:
    if c.weights is not None:
        # In the order of the header, which tells how the data lies too.
        tensors, content = dict(c.tensors), Tensors(len(c.tensors), *_header(plan, c))
        source: Source = c.weights
    else:
        tensors = {name: c.tensors[name] for name in safetensors.order(c.tensors)}
        metadata = dict(sorted({"format": "pt", **c.metadata}.items()))
        content = Tensors(len(tensors), tuple(metadata.items()))
        header = safetensors.header_text(tensors.items(), metadata)
        source = Joined([Memory(header), *(t.source for t in tensors.values())])
    _add(plan, WEIGHTS, source, content)
    drawn = dict(_recomputed(plan, c))
    quantised = [t.source for t in tensors.values() if isinstance(t.source, lines.Quantised)]
    classes = iter(_classes(plan, quantised))
    seen: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    groups: dict[tuple[object, ...], int] = {}
    for name, tensor in tensors.items():
        # What is drawn is looked up too, so that others like it find it.
        same = None if name in drawn else _elsewhere(name, tensor, references)
        where = same or _seen(plan, tensor, tensors, seen)
        where = drawn.get(name, where)
        if isinstance(tensor.source, lines.Quantised):
            own = Lines(tensor.source.axis, tensor.source.steps, next(classes))
            where = own if where is None else where
        if where is None:
            where = InStream(_grouped(plan, groups, name, tensor, references))
        plan.uses_base |= isinstance(where, FromBase)
        plan.uses_parent |= isinstance(where, FromParent)
        plan.tensors.append(Entry(name, tensor.dtype, tensor.shape, where))
    _fill_classes(plan, tensors)


def _header(plan: Placing, c: Checkpoint) -> tuple[tuple[tuple[str, str], ...] | None, tuple[int, int] | None]:
    """Metadata if canonical writing gives the header back, else the header itself."""
    assert c.weights is not None
    length = c.weights.nbytes - sum(t.nbytes for t in c.tensors.values())
    header = c.weights.read(0, length)
    # Read again: the order of the names matters, and whether there are any.
    metadata = json.loads(header[8:]).get(safetensors.METADATA)
    if safetensors.header_text(c.tensors.items(), metadata) == header:
        return None if metadata is None else tuple(metadata.items()), None
    return None, (_stream(plan, StreamPlan("bytes"), Memory(header)), length)


def _candidates(c: Checkpoint) -> Iterator[tuple[Recipe, Adapter]]:
    """How its tensors may have been drawn. One that is not read, or makes no sense, is stored like any other."""
    try:
        method, adapter = methods.parse(c)
        for recipe in method.recipes(adapter):
            yield recipe, adapter
    except AdapterpackError:
        return


def _recomputed(plan: Placing, c: Checkpoint) -> Iterator[tuple[str, Place]]:
    """Tensors that a recipe gives back bit for bit: proven here, and again when they are drawn."""
    placed: set[str] = set()
    for recipe, adapter in _candidates(c):
        # What another build of torch may draw otherwise is no way to keep anything.
        if recipe.takes_torch or recipe.cost > limits.RECIPE_ELEMENTS or len(plan.recipes) == _RECIPES:
            continue
        spelled = {name: adapter.shared[name].key if name in adapter.shared else name for name in recipe.shapes}
        found = {name: c.tensors[key] for name, key in spelled.items() if key in c.tensors}
        size = sum(tensor.nbytes for tensor in found.values())
        if len(found) < len(spelled) or size < _WORTH_A_REFERENCE or not placed.isdisjoint(spelled.values()):
            continue
        drawn = recipe.draw()
        if all(drawn[name].equals(tensor) for name, tensor in found.items()):
            plan.recipes.append(recipe.proven(drawn))
            placed.update(spelled.values())
            yield from ((key, Drawn(len(plan.recipes) - 1, name)) for name, key in spelled.items())


def _elsewhere(name: str, tensor: Tensor, references: References) -> Place | None:
    before = references.parent_tensors.get(name)
    if tensor.nbytes >= _WORTH_A_REFERENCE and before is not None and before.equals(tensor):
        return FromParent()
    if tensor.nbytes >= 4 * _WORTH_A_REFERENCE:
        for other, candidate in references.base_tensors.items():
            if candidate.dtype == tensor.dtype and candidate.shape == tensor.shape and candidate.equals(tensor):
                return FromBase(other, tensor.digest())
    return None


def _seen(
    plan: Placing, tensor: Tensor, tensors: Mapping[str, Tensor], seen: dict[tuple[int, bytes], list[int]]
) -> Place | None:
    """An earlier tensor with the same bytes. Its ends are compared first, so that nothing is read twice in vain."""
    if tensor.nbytes < _WORTH_A_REFERENCE:
        return None
    end = tensor.source.read(tensor.nbytes - 32, tensor.nbytes)
    key = (tensor.nbytes, tensor.source.read(0, 32) + end)
    for n in seen[key]:
        if all(
            a == b for a, b in zip(chunks(tensors[plan.tensors[n].name].source), chunks(tensor.source), strict=True)
        ):
            return Same(n)
    seen[key].append(len(plan.tensors))
    return None


def role(name: str) -> str:
    """What a tensor is within its module: the last part of its name that tells."""
    parts = [part for part in name.split(".") if part not in _ENDS and not part.isdigit()]
    return parts[-1] if parts else name


def _grouped(
    plan: Placing, groups: dict[tuple[object, ...], int], name: str, tensor: Tensor, references: References
) -> int:
    """The stream of tensors like this one: dtype, role, width, values, and whether the parent has it."""
    before = references.parent_tensors.get(name)
    if before is not None and (before.dtype != tensor.dtype or before.shape != tensor.shape):
        before = None
    # A stream of its own costs more than a tiny tensor gains by it.
    tiny = tensor.nbytes < _WORTH_A_STREAM
    narrow = not tiny and tensor.dtype == F32 and _is_narrow(tensor.source)
    width = 0 if tiny else max(tensor.shape, default=1)
    on_edge = not tiny and tensor.shape[0] == width
    run, bits = (0, 0) if tiny else _run(tensor)
    key = (tensor.dtype.name, role(name), width, on_edge, narrow, run, bits, before is None)
    if key not in groups:
        groups[key] = _stream(plan, replace(_like(tensor, narrow), run=run))
    stream = plan.streams[groups[key]]
    stream.parts.append(tensor.source)
    if before is not None:
        stream.before = [*(stream.before or []), before.source]
    return groups[key]


def _like(tensor: Tensor, narrow: bool) -> StreamPlan:
    bits, kind = tensor.dtype.bits, tensor.dtype.kind
    if bits < 8 or (bits == 8 and kind == "float"):
        return StreamPlan("bytes")
    if kind == "complex":
        # Two floats, one behind the other.
        return StreamPlan("float", bits // 16)
    return StreamPlan("float" if kind == "float" else "int", bits // 8, narrow)


def _is_narrow(source: Source) -> bool:
    """Are the lower halves of all 4-byte words zero? Most tensors say no with their first bytes."""
    import numpy as np

    def zero(data: bytes) -> bool:
        return not np.frombuffer(data, "<u2")[::2].any()

    return zero(source.read(0, min(source.nbytes, 4096))) and all(map(zero, chunks(source)))


def _run(tensor: Tensor) -> tuple[int, int]:
    """So many words one behind the other have few values, and the bits that these take; 0, 0: they have not."""
    from adapterpack.codecs import palette

    if tensor.dtype.name not in ("F32", "F16", "BF16") or len(tensor.shape) < 2:
        return 0, 0
    return palette.shared(tensor.source, tensor.dtype.bits // 8, tensor.shape)


def _classes(plan: Placing, quantised: list[lines.Quantised]) -> tuple[tuple[int, ...], ...]:
    """The class of each line, and streams for each class."""
    if not quantised:
        return ()
    found = lines.classes(quantised)
    for low in found.low_bits:
        high_stream = _stream(plan, StreamPlan("bytes"))
        plan.classes.append(Class(low, high_stream, _stream(plan, StreamPlan("bytes", noise=True))))
    return found.of_lines


def _fill_classes(plan: Placing, tensors: Mapping[str, Tensor]) -> None:
    for entry in plan.tensors:
        source = tensors[entry.name].source
        if isinstance(entry.place, Lines) and isinstance(source, lines.Quantised):
            for codes, number in zip(source.codes, entry.place.classes, strict=True):
                klass = plan.classes[number]
                high, low = lines.split(codes, klass.low)
                plan.streams[klass.high_stream].parts.append(Memory(high))
                plan.streams[klass.low_stream].parts.append(Memory(low))
