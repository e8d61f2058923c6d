"""How PEFT spells the keys of an adapter file, once for all methods.

Checkpoint keys are model keys minus the adapter's name (`peft/utils/save_and_load.py`,
`_remove_adapter_name_from_key`); files that kept `.default` load in PEFT too, so both are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from adapterpack import limits
from adapterpack.adapter import Adapter, Param, Replaced
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.tensor import Tensor

PREFIX = "base_model.model."
TOKENS = "token_adapter.trainable_tokens_delta"


def _spellings(suffix: str) -> Iterator[str]:
    """`lora_A.weight` also stands as `lora_A.default.weight`, `x_topk_indices` as `x.default_topk_indices`."""
    yield suffix
    head, dot, tail = suffix.partition(".")
    yield f"{head}.default{dot}{tail}"
    stem, topk, what = suffix.partition("_topk_")
    if topk:
        yield f"{stem}.default{topk}{what}"


class KeyTable:
    """Key endings of one method.

    Args:
        marker: How every parameter name of the method begins, `lora_`.
        params: Name to key ending, for parameters of one module: `{"lora_A": "lora_A.weight"}`. A segment `*`
            in both stands for any one segment, `{"A.*": "adamss_A.*"}`: a list or a dictionary of parameters.
        shared: Names of parameters that all modules share; their keys are `base_model.<name>`. A last segment
            `*` stands for any one segment.
    """

    def __init__(self, marker: str, params: Mapping[str, str], shared: tuple[str, ...] = ()) -> None:
        self.marker = marker
        self.params = dict(params)
        self._endings = {s: name for name, ending in params.items() for s in _spellings(ending)}
        self._longest = max((s.count(".") + 1 for s in self._endings), default=0)
        self._shared = {
            f"{prefix}{spelling}": name
            for name in shared
            for spelling in _spellings(name)
            for prefix in ("base_model.", f"{PREFIX}base_model.")
        }

    def key(self, module: str, name: str) -> str:
        """The key that PEFT writes for a parameter of a module."""
        ending = self.params.get(name)
        if ending is None:
            stem, _, last = name.rpartition(".")
            ending = self.params[f"{stem}.*"].replace("*", last)
        return f"{PREFIX}{module}.{ending}"

    def spells_shared(self, key: str, name: str) -> bool:
        """Is `key` a spelling of this shared parameter?"""
        return self._shared_name(key) == name

    def _shared_name(self, key: str) -> str | None:
        name = self._shared.get(key)
        if name is None and (found := self._shared.get(f"{key.rpartition('.')[0]}.*")) is not None:
            name = found.replace("*", key.rpartition(".")[2])
        return name

    def parse(
        self, c: Checkpoint, method: str, encoding: str, *, nested: bool = False, alone: bool = False
    ) -> Adapter:
        """Sort all tensors of a checkpoint by their keys.

        Args:
            nested: Does the method know what modules mean that wrap wrapped ones?
            alone: May shared parameters stand without any of a module?

        Raises:
            InvalidFile: two keys stand for one parameter.
            Unsupported: no tensor of the method is there.
        """
        modules: dict[str, dict[str, Param]] = {}
        shared: dict[str, Param] = {}
        replaced: dict[str, list[Replaced]] = {}
        extra: dict[str, Tensor] = {}
        for key, tensor in c.tensors.items():
            param = Param(key, tensor)
            if (common := self._shared_name(key)) is not None:
                _put(shared, common, param)
            elif (split := self.split(key)) is not None:
                module, name = split
                _put(modules.setdefault(module, {}), name, param)
            elif (target := self._replaces(key, c.config)) is not None:
                rows = _token_rows(key, tensor, c.config)
                replaced.setdefault(target, []).append(Replaced(param, rows))
            else:
                extra[key] = tensor
        if not modules and not (alone and shared):
            hint = None
            if any(self.marker in key for key in c.tensors):
                hint = f"its keys lack the prefix {PREFIX!r}: PEFT would not load them either"
            raise Unsupported(f"{c.name} holds no {method} parameters", hint=hint)
        wrapped = next((m for m in modules if "base_layer" in m.split(".")), None)
        if wrapped is not None and not nested:
            raise Unsupported(f"{wrapped} wraps a wrapped module: not read yet", hint="merge it with PEFT")
        return Adapter(
            method=method,
            encoding=encoding,
            config=c.config,
            modules=modules,
            shared=shared,
            # A whole tensor first, then its rows.
            replaced={t: tuple(sorted(e, key=lambda r: r.rows is not None)) for t, e in replaced.items()},
            extra=extra,
            source=c,
            metadata=c.metadata,
        )

    def split(self, key: str) -> tuple[str, str] | None:
        """The module and the name of the parameter that a key stands for; None: no module's."""
        if not key.startswith(PREFIX):
            return None
        parts = key.removeprefix(PREFIX).split(".")
        for n in range(1, min(self._longest, len(parts) - 1) + 1):
            own = parts[-n:]
            name = self._endings.get(".".join(own))
            if name is None:
                # Each segment in turn may be the one that a `*` stands for.
                ways = ((".".join([*own[:i], "*", *own[i + 1 :]]), own[i]) for i in range(n))
                found = next(((self._endings[way], part) for way, part in ways if way in self._endings), None)
                name = None if found is None else found[0].replace("*", found[1])
            if name is not None:
                return ".".join(parts[:-n]), name
        return None

    def _replaces(self, key: str, config: Mapping[str, Any]) -> str | None:
        """The base tensor that a key without any marker of the method replaces; None if it is unknown."""
        if not key.startswith(PREFIX):
            return None
        name = key.removeprefix(PREFIX)
        for spelling in _spellings(TOKENS.split(".")[1]):
            if name.endswith(f".token_adapter.{spelling}"):
                return name.removesuffix(f".token_adapter.{spelling}") + ".weight"
        parts = name.split(".")
        if any(part.startswith(self.marker) for part in parts):
            return None
        if parts[-1] in ("weight", "bias"):
            return ".".join(part for part in parts if part != "base_layer")
        saved = config.get("modules_to_save")
        if isinstance(saved, list):
            # PEFT's test has no dot boundary: "norm" means input_layernorm too.
            paths = [".".join(parts[:n]) for n in range(1, len(parts))]
            if any(path.endswith(str(s)) for path in paths for s in saved):
                return name
        return None


def _put(params: dict[str, Param], name: str, param: Param) -> None:
    if name in params:
        raise InvalidFile(f"{params[name].key} and {param.key} are one and the same parameter")
    params[name] = param


def _token_rows(key: str, tensor: Tensor, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    if ".token_adapter." not in key:
        return None
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        module = key.removeprefix(PREFIX).partition(".token_adapter.")[0]
        found = [rows for name, rows in indices.items() if module == name or module.endswith(f".{name}")]
        indices = found[0] if len(found) == 1 else None
    return token_rows(key, tensor, indices, "trainable_token_indices")


def token_rows(key: str, tensor: Tensor, indices: Any, field: str) -> tuple[int, ...]:
    """The rows of an embedding that a tensor (n, dim) has new values for, from a config field.

    Raises:
        InvalidFile: it is no list of n different whole numbers.
    """
    if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
        raise InvalidFile(f"{field} does not say which rows {key} replaces")
    if len(tensor.shape) != 2 or len(indices) != tensor.shape[0]:
        raise InvalidFile(f"{key} has shape {tensor.shape} for {len(indices)} token indices")
    if len(set(indices)) != len(indices):
        raise InvalidFile(f"{field} names a row twice")
    return tuple(indices)


def render(a: Adapter) -> Checkpoint:
    """The adapter as a checkpoint again: `render(parse(c))` has the tensors, config and metadata of c."""
    same = not a.changed
    return Checkpoint(
        name=a.source.name,
        config=a.config,
        tensors=a.tensors(),
        metadata=a.metadata,
        config_bytes=a.source.config_bytes if a.config == a.source.config else None,
        weights=a.source.weights if same else None,
        files=a.source.files,
        left=a.source.left,
        bytes=a.source.bytes,
        on_close=a.source.on_close,
        still_same=a.source.still_same,
    )


def positive(config: Mapping[str, Any], field: str, default: int, most: int = limits.LORA_RANK) -> int:
    """A whole number > 0 from the config.

    Raises:
        InvalidFile: it is something else, or absurdly large.
    """
    value = config.get(field, default)
    if type(value) is not int or not 0 < value <= most:
        raise InvalidFile(f"{field} in adapter_config.json is {value!r:.60}; a whole number is wanted")
    return value


def finite(config: Mapping[str, Any], field: str, default: float) -> float:
    """A finite number from the config; null means the default.

    Raises:
        InvalidFile: it is something else, or absurdly large.
    """
    value = config.get(field)
    if value is None:
        return default
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise InvalidFile(f"{field} in adapter_config.json is {value!r:.60}; a finite number is wanted")
    return float(value)


def flag(config: Mapping[str, Any], field: str, default: bool = False) -> bool:
    """A truth value from the config; null means the default.

    Raises:
        InvalidFile: it is neither true nor false.
    """
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidFile(f"{field} in adapter_config.json is {value!r:.60}; true or false is wanted")
    return value


def require(module: str, params: Mapping[str, Param], names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """The named parameters of a module.

    Raises:
        InvalidFile: one is missing: half a pair.
    """
    missing = [n for n in names if n not in params]
    if missing:
        raise InvalidFile(f"{module} lacks {', '.join(missing)}", hint="the adapter was saved incompletely")
    return tuple(params[n].tensor for n in names)


def floats(module: str, params: Mapping[str, Param], names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """The same of parameters that are no indices or signs.

    Raises:
        InvalidFile: one is missing, or holds whole numbers.
    """
    found = require(module, params, names)
    for name, tensor in zip(names, found, strict=True):
        if tensor.dtype.kind != "float":
            raise InvalidFile(f"{params[name].key} is {tensor.dtype}: a parameter that is trained is a float")
    return found
