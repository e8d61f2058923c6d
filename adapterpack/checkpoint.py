"""`Checkpoint`: the files of an adapter directory, its parsed config, and its tensors under their own keys."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from adapterpack.tensor import Source, Tensor, digest

if TYPE_CHECKING:
    from adapterpack.containers.apack.reader import Pack


@dataclass(frozen=True)
class Checkpoint:
    """One adapter as it lies on disk, unread but for headers and config.

    It owns one descriptor per file: use it as a context manager. What a method makes of it is an
    `Adapter`; a checkpoint of an unknown method can still be inspected, checked and copied.

    Attributes:
        name: What to call it in messages: a path.
        config: adapter_config.json, keys in file order.
        tensors: Key to tensor, keys as the file spells them.
        metadata: `__metadata__` of the tensor file.
        config_bytes: adapter_config.json byte for byte; None once the config was changed.
        weights: The tensor file byte for byte; None once a tensor was changed.
        files: Small files that are carried along: card, tokenizer, texts.
        weights_sha256: Of the tensor file, where it is known without reading it.
        state: What only a lossless pack carries: pickles, optimizer state, other weights, files in folders.
        left: Names of what conversions do not carry: all of `state`, folders, and what is no regular file.
        lost: Names of what lies in folders and not even packs carry: other adapters, links to folders, empty ones.
        bytes: Sum of all files of the directory, folders not counted.
        pack: The pack that it lies in; None: a directory.
        foreign: Where other code than PEFT wrote it, to be converted: what of its files is no part of the adapter.
        at_hand: Are the values here? Else it lies on the Hub, and the first value that is read fetches all of them.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config_bytes: bytes | None = None
    weights: Source | None = None
    files: Mapping[str, Source] = field(default_factory=dict)
    weights_sha256: str | None = None
    state: Mapping[str, Source] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    bytes: int = 0
    pack: Pack | None = field(default=None, repr=False)
    foreign: str | None = None
    at_hand: bool = True
    on_close: tuple[Callable[[], None], ...] = field(default=(), repr=False)
    still_same: Callable[[], None] = field(default=lambda: None, repr=False)

    def digest(self) -> str:
        """SHA-256 of the tensor file; of names, types and bytes of the tensors where there is no such file."""
        if self.weights_sha256 is not None:
            return self.weights_sha256
        if self.weights is not None:
            return digest(self.weights)
        h = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            h.update(f"{name} {tensor.dtype} {tensor.shape} {tensor.digest()}\n".encode())
        return h.hexdigest()

    @property
    def peft_type(self) -> str:
        return str(self.config["peft_type"])

    def prove(self) -> None:
        """Read all of a pack and compare it with its digests; a directory has none. Raises InvalidFile."""
        if self.pack is not None:
            self.pack.prove()

    def close(self) -> None:
        for close in self.on_close:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.close()
