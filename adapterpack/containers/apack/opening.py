"""From a path to a pack that can be read: its parents and its base found and proven, and as a `Checkpoint`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from adapterpack import limits
from adapterpack.checkpoint import Checkpoint
from adapterpack.containers import peft
from adapterpack.containers.apack import layout
from adapterpack.containers.apack.manifest import Parent, Tensors, Text
from adapterpack.containers.apack.reader import Pack
from adapterpack.errors import InvalidFile, MissingReference, PickleRefused, Unsupported
from adapterpack.io import json as strict_json
from adapterpack.io import safetensors
from adapterpack.io.files import OpenFile
from adapterpack.tensor import Tensor

Where = Path | Callable[[], Path] | None
"""A directory, or what finds it once it is needed: it may have to be fetched, and many packs need none."""


class OpenAdapter(Protocol):
    """How the parent is opened, whatever container it lies in."""

    def __call__(self, path: Path, *, parent: Path | None, base: Where, depth: int) -> Checkpoint: ...


def open_pack(
    place: Path | OpenFile, stack: ExitStack, *, parent: Path | None, base: Where, depth: int, opener: OpenAdapter
) -> Pack:
    """Open a pack, and what it refers to when that is first needed.

    Args:
        place: The file.
        stack: Keeps what is opened.
        parent: Where the parent is; None: beside the pack, under its recorded name. A directory that is no adapter
            is searched for that name.
        base: The base model's directory, or what finds it; None: as recorded, if that is a directory.
        depth: How many packs led here.
        opener: Opens the parent.

    Raises:
        InvalidFile: damaged, or the chain of parents is too long.
        Unsupported: of another version.
    """
    path = place.path if isinstance(place, OpenFile) else place
    if depth > limits.PARENTS:
        raise InvalidFile(f"{path}: more than {limits.PARENTS} packs lead here, each the parent of another")
    file = place if isinstance(place, OpenFile) else OpenFile(place)
    stack.callback(file.close)
    pack: Pack

    def from_parent(name: str) -> Tensor:
        found = parents()
        if name not in found:
            raise InvalidFile(f"{path}: its parent has no tensor {name!r:.100}")
        return found[name]

    def from_base(name: str) -> Tensor:
        found = bases()
        if name not in found:
            raise MissingReference(f"{path}: its base has no tensor {name!r:.100}", hint=_base_hint(pack))
        return found[name]

    parents = _once(lambda: _open_parent(pack, path, stack, parent, base, depth, opener))
    bases = _once(lambda: _open_base(pack, path, stack, base))
    pack = Pack(file, parent=from_parent, base=from_base)
    return pack


def _once(make: Callable[[], Mapping[str, Tensor]]) -> Callable[[], Mapping[str, Tensor]]:
    made: list[Mapping[str, Tensor]] = []
    lock = threading.Lock()

    def get() -> Mapping[str, Tensor]:
        # Threads that decode frames ask all at once, and opening a parent hashes it.
        with lock:
            if not made:
                made.append(make())
            return made[0]

    return get


def _open_parent(
    pack: Pack, path: Path, stack: ExitStack, given: Path | None, base: Where, depth: int, opener: OpenAdapter
) -> Mapping[str, Tensor]:
    wanted = pack.manifest.parent
    if wanted is None:
        raise InvalidFile(f"{path} takes tensors from a parent that it does not name")
    for place in _places(path, wanted, given):
        if not place.is_file() and not (place / peft.CONFIG).is_file():
            continue
        opened = opener(place, parent=given, base=base, depth=depth + 1)
        stack.callback(opened.close)
        if opened.digest() == wanted.sha256:
            return opened.tensors
    raise MissingReference(
        f"{path} is stored as the difference to its parent {wanted.name!r}, which is not "
        + (f"{given}" if given else "beside it")
        + f" (tensor file with SHA-256 {wanted.sha256[:16]}...)",
        hint=f"put {wanted.name} beside the pack; `unpack --parent` takes it from elsewhere",
    )


def _places(path: Path, wanted: Parent, given: Path | None) -> Iterator[Path]:
    if given is not None:
        # One option serves a whole chain: the parent itself, or a directory where the parents lie.
        yield given
        yield given / wanted.name
    yield path.parent / wanted.name


def _open_base(pack: Pack, path: Path, stack: ExitStack, given: Where) -> Mapping[str, Tensor]:
    recorded = Path(pack.manifest.base) if pack.manifest.base else None
    known = recorded if recorded is not None and recorded.is_dir() else None
    place = given() if callable(given) else given or known
    if place is None:
        raise MissingReference(f"{path} takes tensors from its base model, which is not here", hint=_base_hint(pack))
    return base_tensors(place, stack)


def _base_hint(pack: Pack) -> str:
    return f"name its directory with --base: {pack.manifest.base}"


def base_tensors(directory: Path, stack: ExitStack) -> dict[str, Tensor]:
    """Every tensor of a model directory, under its name on disk.

    Raises:
        InvalidFile: no safetensors file in it, or a malformed one.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        file = OpenFile(path)
        stack.callback(file.close)
        found.update(safetensors.read(file).tensors)
    if not found:
        raise InvalidFile(f"{directory} has no safetensors file", hint="name the base model's directory")
    return found


def checkpoint(pack: Pack, stack: ExitStack, *, opaque: bool) -> Checkpoint:
    """A pack as the checkpoint that it restores; nothing is decoded yet.

    Args:
        pack: Opened.
        stack: Closed with the checkpoint.
        opaque: Is it enough to have the files? Else tensors must be there.

    Raises:
        InvalidFile: its config makes no sense.
        PickleRefused: its weights are a pickle.
    """
    m = pack.manifest
    config_file = next((f for f in m.files if f.path == peft.CONFIG and isinstance(f.content, Text)), None)
    if config_file is None or not isinstance(config_file.content, Text):
        raise InvalidFile(f"{pack.name} is no pack of an adapter: it has no {peft.CONFIG}")
    config_bytes = config_file.content.text.encode()
    config = strict_json.parse(config_bytes, f"{peft.CONFIG} in {pack.name}")
    if not isinstance(config.get("peft_type"), str):
        raise InvalidFile(f"{peft.CONFIG} in {pack.name} does not say its peft_type")
    weights = m.weights()
    if weights is None and not opaque:
        raise PickleRefused(
            f"{pack.name} holds no safetensors file: its weights are a pickle, or another adapter's form",
            hint="unpack it; what it holds comes back byte for byte",
        )
    files = {path: source for path, source in pack.files.items() if path != peft.CONFIG}
    own = None if weights is None else m.files[weights]
    if own is not None:
        del files[own.path]
    carried = {path: source for path, source in files.items() if peft.is_carried(path, source.nbytes)}
    return Checkpoint(
        name=pack.name,
        config=config,
        tensors=pack.tensors,
        metadata={} if weights is None else _metadata(pack, weights),
        config_bytes=config_bytes,
        weights=None if own is None else pack.files[own.path],
        weights_sha256=None if own is None else own.sha256,
        files=carried,
        state={path: source for path, source in files.items() if path not in carried},
        left=tuple(path for path in files if path not in carried),
        bytes=sum(file.size for file in m.files),
        on_close=(stack.close,),
        still_same=pack.file.check_unchanged,
    )


def _metadata(pack: Pack, weights: int) -> dict[str, str]:
    content = pack.manifest.files[weights].content
    assert isinstance(content, Tensors)
    if content.header is None:
        return dict(content.metadata or ())
    source = pack.header(weights)
    header = source.read(0, source.nbytes)
    # Who reads the file must find the tensors that whoever reads the pack finds.
    if not layout.header_lists(header, pack.manifest.tensors, f"{pack.name}: the stored header"):
        raise InvalidFile(f"{pack.name}: the header of its tensor file is not that of its tensors")
    try:
        found = json.loads(header[8:]).get(safetensors.METADATA, {})
        return {str(k): str(v) for k, v in found.items()}
    except (ValueError, AttributeError, RecursionError) as e:
        raise Unsupported(f"{pack.name}: the header of its tensor file cannot be read: {e}") from e
