"""Quantised base models, read as the 16-bit models that they stand for: lazily, by ranges, rounded once.

`find` recognises the scheme from config.json and the tensors' headers, and refuses what it would get wrong.
`formats/quantised/SPEC.md` says what each scheme stores and which reference each value is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterpack import architectures
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.quantised import bitsandbytes, fp8, mxfp4
from adapterpack.quantised._values import Dequantised, Packed, Parts
from adapterpack.tensor import BF16, F16, F32, DType, Tensor

if TYPE_CHECKING:
    from adapterpack.tensor import Array

_ENTRIES = ("quantization_config", "compression_config")
_ELSEWHERE = "merge into the original 16-bit model, then quantise the result"
_DTYPES = {"bfloat16": BF16, "float16": F16, "float32": F32}
_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor], Mapping[str, Any]], Parts]] = {
    "fp8": fp8.read_fp8,
    "mxfp8": fp8.read_fp8,
    "compressed-tensors": fp8.read_compressed,
    "modelopt": fp8.read_modelopt,
    "mxfp4": mxfp4.read,
    "bitsandbytes": bitsandbytes.read,
}
_TELLING = (
    *(".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_zero_point", ".weight_global_scale"),
    *(".weight_scale_2", ".pre_quant_scale", ".absmax", ".quant_map", ".SCB", ".W_q", ".codebooks", ".weight._data"),
)
"""Name endings that only quantised checkpoints have."""


@dataclass(frozen=True, eq=False)
class Scheme:
    """How a base is quantised, and what it stands for.

    Attributes:
        name: `block FP8`, `MXFP4`, `bitsandbytes NF4`; several are joined by ` and `.
        dtype: Of the unquantised model: what config.json says, else what the weights were, else BF16.
        consumed: Name of an unquantised tensor to the names of the stored ones that it is made of.
        dropped: Stored tensors that only serve the quantised form: scales of activations, layout marks.
    """

    name: str
    dtype: DType
    consumed: Mapping[str, tuple[str, ...]] = field(repr=False)
    dropped: tuple[str, ...] = field(repr=False)
    _packed: Mapping[str, Packed] = field(repr=False)

    def tensor(self, name: str, dtype: DType | None = None) -> Tensor:
        """An unquantised tensor, decoded as it is read.

        Args:
            name: One of `consumed`.
            dtype: F32, BF16 or F16; `self.dtype` if it is None. In F32 the values are the scheme's own
                arithmetic; other dtypes are those values rounded once, to nearest even.

        Raises:
            InvalidFile: on reading: a scale is infinite, NaN, or negative.
        """
        dtype = dtype or self.dtype
        if dtype not in (F32, BF16, F16):
            raise Unsupported(f"{name} cannot be dequantised to {dtype}")
        packed = self._packed[name]
        return Tensor(dtype, packed.shape, Dequantised(packed, dtype))

    def plain(self, tensors: Mapping[str, Tensor], dtype: DType | None = None) -> dict[str, Tensor]:
        """All tensors of the unquantised model: dequantised ones, and the others as they are stored.

        Args:
            tensors: Those that the scheme was found in, or a part of them; each keeps its place.
        """
        home = {stored[0]: name for name, stored in self.consumed.items()}
        hidden = {n for stored in self.consumed.values() for n in stored}.union(self.dropped)
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name in home:
                found[home[name]] = self.tensor(home[name], dtype)
            elif name not in hidden:
                found[name] = tensor
        return found

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json without its quantisation, at any depth, and with a dtype that is true."""
        plain = _without_entry(config)
        if _said(config) is None:
            key = "dtype" if "dtype" in plain else "torch_dtype"
            plain[key] = next(said for said, dtype in _DTYPES.items() if dtype == self.dtype)
        return plain

    def need_encoder(self, name: str) -> None:
        """Raise Unsupported if a tensor cannot be quantised again."""
        packed = self._packed[name]
        if not isinstance(packed, fp8.Blocks):
            raise Unsupported(f"{name} cannot be written as {packed.kind} again", hint="write the result in 16 bits")

    def requantise(self, name: str, values: Array) -> dict[str, Array]:
        """New stored tensors for new values of one tensor, FP8 alone.

        Args:
            name: One of `consumed`.
            values: f32, in the tensor's shape.

        Returns:
            Stored name to array, in the dtypes and shapes of the base. Blocks that did not change keep
            their bytes; see `fp8.Blocks.requantise`.

        Raises:
            Unsupported: the scheme is not FP8, or a new value is not finite.
        """
        self.need_encoder(name)
        packed = self._packed[name]
        assert isinstance(packed, fp8.Blocks)
        if values.shape != packed.shape or values.dtype.name != "float32":
            raise ValueError(f"{values.dtype} {values.shape}; float32 {packed.shape} is wanted")
        return packed.requantise(values)


def find(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scheme | None:
    """How a base is quantised.

    Args:
        config: config.json.
        tensors: All tensors of the checkpoint, by stored name. Only headers and a few small tensors are read.

    Returns:
        None for a base that is not quantised, and for one of which only config.json is at hand.

    Raises:
        Unsupported: quantised in a way that cannot be undone here, or that nothing declares.
        InvalidFile: parts are missing or do not fit each other.
    """
    if not tensors:
        return None
    entry = _entry(config)
    if entry is not None:
        method = _method(entry)
        reader = _READERS.get(method)
        if reader is None:
            raise Unsupported(f"a base quantised by {method:.60} cannot be dequantised here", hint=_ELSEWHERE)
        parts = reader(entry, tensors, config)
        if not parts.packed:
            raise InvalidFile(
                f"config.json says that the base is quantised ({method}), but no tensor is",
                hint="are its weights plain? then remove quantization_config from config.json",
            )
    elif fp8.unambiguous(tensors):
        parts = fp8.collect(tensors, fp8.DEFAULT_BLOCK)
    else:
        parts = Parts({})
    consumed = {name: p.stored for name, p in parts.packed.items()}
    _refuse_leftovers(tensors, {n for stored in consumed.values() for n in stored}.union(parts.dropped), entry)
    if not parts.packed:
        return None
    name = " and ".join(sorted({p.kind for p in parts.packed.values()}))
    return Scheme(name, _said(config) or parts.dtype or BF16, consumed, parts.dropped, parts.packed)


def _refuse_leftovers(tensors: Mapping[str, Tensor], used: set[str], entry: Mapping[str, Any] | None) -> None:
    """Refuse tensors that look quantised and that nothing accounts for."""
    for name, tensor in tensors.items():
        narrow = tensor.dtype.kind == "float" and tensor.dtype.bits <= 8
        coded = tensor.dtype.kind == "int" and (
            name.endswith(".weight") or (name.endswith("_blocks") and tensor.dtype.bits == 8)
        )
        if name not in used and (narrow or coded or name.endswith(_TELLING)):
            said = (
                "config.json does not say how" if entry is None else f"its {_method(entry)} does not account for it"
            )
            raise Unsupported(f"{name} ({tensor.dtype}) looks quantised, and {said}", hint=_ELSEWHERE)


def _entries(config: Mapping[str, Any]) -> Iterator[Any]:
    for key, value in config.items():
        if key in _ENTRIES:
            if value is not None and value != {}:
                yield value
        elif isinstance(value, dict):
            yield from _entries(value)


def _entry(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json, or the part of it that is the language model's, says of the quantisation."""
    found = list(_entries(config))
    if not found:
        return None
    if any(other != found[0] for other in found[1:]):
        raise Unsupported("config.json has several quantization_configs that differ", hint=_ELSEWHERE)
    if not isinstance(found[0], dict):
        raise InvalidFile("quantization_config of config.json is no object")
    return found[0]


def _method(entry: Mapping[str, Any]) -> str:
    # transformers asks these two first: old bitsandbytes configs have no quant_method.
    if entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return "bitsandbytes"
    method = entry.get("quant_method")
    if not isinstance(method, str):
        raise InvalidFile(f"quantization_config of config.json has the quant_method {method!r:.60}")
    return method


def _without_entry(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_entry(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _ENTRIES
    }


def _said(config: Mapping[str, Any]) -> DType | None:
    """The dtype that config.json gives its weights, if it is one that weights can be written in."""
    for part in (config, architectures.text_config(config)):
        for key in ("dtype", "torch_dtype"):
            said = _DTYPES.get(str(part.get(key)).removeprefix("torch."))
            if said is not None:
                return said
    return None
