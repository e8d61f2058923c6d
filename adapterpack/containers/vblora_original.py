"""Checkpoints of VB-LoRA's own code for NLU: a whole model whose layers hold `logits_A` and `logits_B`.

    config.json                             topk, num_vectors, vector_length, rank, vb_module, and the model's own
    model.safetensors or pytorch_model.bin  M.logits_A (in / b, r, n), M.logits_B (out / b, r, n); M.vector_bank
                                            (n, b) under each layer, one and the same; all weights of the model

    delta W = B @ A:  PEFT's logits_A is this one with its first two dimensions swapped, its logits_B the same

What was trained besides is what lies outside the body, the classifier. Reference: NLU/vblora/vblora.py and
examples/text-classification/run_glue.py of github.com/leo-yangli/VB-LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterpack import limits
from adapterpack.checkpoint import Checkpoint
from adapterpack.containers import peft
from adapterpack.errors import InvalidFile, PickleRefused
from adapterpack.io import json as strict_json
from adapterpack.io import safetensors
from adapterpack.io.files import Folder
from adapterpack.methods import vblora
from adapterpack.methods._keys import PREFIX, positive
from adapterpack.tensor import Tensor

_CONFIG, _WEIGHTS, _PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"
_FIELDS = ("topk", "num_vectors", "vector_length")
_A, _B, _BANK = "logits_A", "logits_B", "vector_bank"


def is_one(path: Path) -> bool:
    """Is this directory such a checkpoint, by its config?"""
    folder = Folder(path)
    if not path.is_dir() or folder.has(peft.CONFIG) or not folder.has(_CONFIG):
        return False
    try:
        config = _config(folder)
    except InvalidFile:
        return False
    return all(field in config for field in _FIELDS)


def _config(folder: Folder) -> dict[str, Any]:
    return strict_json.parse(folder.read_small(_CONFIG, limits.CONFIG_BYTES), str(folder.path / _CONFIG))


@dataclass(frozen=True)
class _Swapped:
    """The bytes of a tensor with its first two dimensions swapped, read when they are wanted."""

    tensor: Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @cached_property
    def _bytes(self) -> bytes:
        return bytes(self.tensor.numpy().swapaxes(0, 1).tobytes())

    def read(self, start: int, stop: int) -> bytes:
        return self._bytes[start:stop]


def open_original(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """The adapter in such a checkpoint, as PEFT would have it: to be converted.

    Raises:
        InvalidFile: it is malformed, or its banks are not one and the same.
        PickleRefused: the weights are a pickle, and that was not allowed.
    """
    folder = Folder(path)
    config = _config(folder)
    found, closes, unchanged = _weights(folder, allow_pickle)
    try:
        tensors, bank = _adapter(path, found)
    except BaseException:
        for close in closes:
            close()
        raise
    modules = sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors if "vblora_logits" in key})
    body = {module.partition(".")[0] for module in modules}
    head = {key: t for key, t in found.items() if key.partition(".")[0] not in body and not key.endswith(_BANK)}
    left = found.keys() - head.keys() - {key for key in found if _own(key)}
    ranks = {t.shape[0] for key, t in tensors.items() if key.endswith(_A)}
    if len(ranks) != 1:
        raise InvalidFile(f"{path}: its layers have {len(ranks)} ranks; VB-LoRA has one")
    size = sum(found[key].nbytes for key in left)
    return Checkpoint(
        name=str(path),
        config={
            "peft_type": vblora.peft_type,
            "base_model_name_or_path": config.get("_name_or_path"),
            "task_type": "SEQ_CLS" if "classifier" in {key.partition(".")[0] for key in head} else None,
            "r": ranks.pop(),
            "topk": positive(config, "topk", 2),
            "num_vectors": bank.shape[0],
            "vector_length": bank.shape[1],
            "target_modules": modules,
            "modules_to_save": sorted({key.partition(".")[0] for key in head}) or None,
            "fan_in_fan_out": False,
            "bias": "none",
            "save_only_topk_weights": False,
            "inference_mode": True,
        },
        tensors={**tensors, **{f"{PREFIX}{key}": t for key, t in head.items()}},
        left=tuple(name for name in folder.names() if name not in (_CONFIG, _WEIGHTS, _PICKLE)),
        bytes=sum((path / name).stat().st_size for name in folder.names() if (path / name).is_file()),
        foreign=f"{len(left)} tensors of the model itself, {size:,} bytes: they were not trained, its base has them",
        on_close=closes,
        still_same=unchanged,
    )


def _weights(folder: Folder, allow_pickle: bool) -> tuple[Mapping[str, Tensor], tuple[Any, ...], Any]:
    """All tensors by name, what closes them, and what proves that nobody wrote to them."""
    if folder.has(_WEIGHTS):
        file = folder.open(_WEIGHTS)
        try:
            return safetensors.read(file).tensors, (file.close,), file.check_unchanged
        except BaseException:
            file.close()
            raise
    path = folder.path / _PICKLE
    if not folder.has(_PICKLE):
        raise InvalidFile(f"{folder.path} has no {_WEIGHTS} and no {_PICKLE}")
    if not allow_pickle:
        raise PickleRefused(
            f"{path} is a pickle, which can run code when it is loaded",
            hint="read the tensors alone with --allow-pickle",
        )
    # Late: what starts processes takes long to load, and few need it.
    from adapterpack.containers import pickled

    return pickled.read(path), (), lambda: None


def _own(key: str) -> bool:
    return key.rpartition(".")[2] in (_A, _B, _BANK)


def _adapter(path: Path, found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """VB-LoRA's tensors under PEFT's keys, and the bank."""
    banks = [t for key, t in found.items() if key.rpartition(".")[2] == _BANK]
    logits = {key: t for key, t in found.items() if _own(key) and not key.endswith(_BANK)}
    if not banks or not logits:
        raise InvalidFile(f"{path} has no {_A} or no {_BANK}: its config speaks of VB-LoRA, its weights do not")
    bank = banks[0]
    if len(bank.shape) != 2 or not all(bank.equals(other) for other in banks[1:]):
        raise InvalidFile(f"{path}: its layers have other vector banks, and VB-LoRA has one")
    made = {f"base_model.{vblora.BANK}": bank}
    for key, tensor in logits.items():
        module, _, name = key.rpartition(".")
        if len(tensor.shape) != 3 or tensor.shape[2] != bank.shape[0]:
            raise InvalidFile(f"{key} has shape {tensor.shape}, not (.., .., {bank.shape[0]})")
        if name == _A:
            first, second, last = tensor.shape
            tensor = Tensor(tensor.dtype, (second, first, last), _Swapped(tensor))
        made[vblora.keys.key(module, name)] = tensor
    return made, bank
