"""Base checkpoints: names, shapes and shards of a model directory, from headers; weights only on demand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from adapterpack import architectures, experts, limits, names, quantised
from adapterpack.errors import InvalidFile, Unsupported, WrongBase
from adapterpack.io import json as strict_json
from adapterpack.io import safetensors
from adapterpack.io.files import Folder, OpenFile
from adapterpack.io.paths import plain_name
from adapterpack.tensor import BF16, DTYPES, F16, F32, DType, Shape, Tensor

_SHOWN = 5
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODELOPT = "hf_quant_config.json"
"""Where ModelOpt says how it quantised, beside config.json or instead of it."""


class Base:
    """A model directory, opened. Use it as a context manager.

    Attributes:
        path: The directory, or what to call a repository of the Hub.
        config: config.json; empty if there is none.
        shards: Weight file name to its header.
        index: The shard index; None for a single file.
        stored: Name on disk to tensor, as it is stored.
        tensors: The same; of a quantised base the tensors of the 16-bit model that it stands for.
        scheme: How it is quantised; None if it is not.
    """

    def __init__(self, place: Path | Folder, *, weights: bool = True) -> None:
        """Open headers and config.

        Args:
            place: The directory.
            weights: Are weights needed? Else a config.json alone is enough.

        Raises:
            InvalidFile: malformed, a shard is missing, or names disagree.
            Unsupported: the weights are there in another form only.
        """
        self._folder = folder = place if isinstance(place, Folder) else Folder(place)
        self.path = folder.path
        if not folder.is_there():
            raise InvalidFile(f"{folder.path} is no model directory")
        self.config: Mapping[str, Any] = self._json(CONFIG) if folder.has(CONFIG) else {}
        self.index: Mapping[str, Any] | None = None
        self.shards: dict[str, safetensors.Header] = {}
        self.tensors: dict[str, Tensor] = {}
        self.stored: Mapping[str, Tensor] = self.tensors
        self.scheme: quantised.Scheme | None = None
        self._refusal: Unsupported | None = None
        self._files: list[OpenFile] = []
        self._disk = names.Disk(self.tensors)
        self._names = names.Names(self._disk)
        self._experts = experts.Experts(self.tensors)
        self._lie_apart = 0
        # What `modules` called by its name in memory, by that name.
        self._listed: dict[str, str] = {}
        try:
            shards = self._shard_names(weights)
            folder.expect(shards)
            for name in shards:
                self._open_shard(name)
            self._check_index()
            self._find_scheme()
        except BaseException:
            self.close()
            raise

    def _json(self, name: str, limit: int = limits.CONFIG_BYTES) -> dict[str, Any]:
        return strict_json.parse(self._folder.read_small(name, limit), str(self.path / name))

    def _shard_names(self, weights: bool) -> list[str]:
        index_path = self.path / INDEX
        if self._folder.has(INDEX):
            self.index = self._json(INDEX, limits.INDEX_BYTES)
            weight_map = self.index.get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InvalidFile(f"{index_path} has no weight_map")
            names = sorted({plain_name(name, str(index_path)) for name in weight_map.values()})
            if len(names) > limits.SHARDS:
                raise InvalidFile(f"{index_path} names {len(names):,} shards; at most {limits.SHARDS:,} are read")
            return names
        if self._folder.has(SINGLE):
            return [SINGLE]
        if not weights and self.config:
            return []
        others = [n for n in self._folder.names() if n.endswith((".bin", ".pt", ".pth", ".gguf", ".h5"))]
        if others:
            raise Unsupported(
                f"{self.path} has its weights as {others[0]} only",
                hint="load it with transformers and save it again as safetensors",
            )
        raise InvalidFile(f"{self.path} has no {SINGLE} and no {INDEX}: it is no base model")

    def _open_shard(self, name: str) -> None:
        if not self._folder.has(name):
            raise InvalidFile(f"{self.path / INDEX} names {name}, which is missing", hint="download the base again")
        file = self._folder.open(name)
        self._files.append(file)
        header = safetensors.read(file)
        for key, tensor in header.tensors.items():
            if key in self.tensors:
                raise InvalidFile(f"the tensor {key} stands in two shards of {self.path}")
            self.tensors[key] = tensor
        self.shards[name] = header

    def _check_index(self) -> None:
        if self.index is None:
            return
        for key, shard in self.index["weight_map"].items():
            if key not in self.shards[shard].tensors:
                raise InvalidFile(f"{INDEX} says that {key} is in {shard}, which does not hold it")
        unlisted = self.tensors.keys() - self.index["weight_map"].keys()
        if unlisted:
            raise InvalidFile(f"{INDEX} does not list {min(unlisted)}")

    def _find_scheme(self) -> None:
        config = self.config
        if "quantization_config" not in config and self._folder.has(MODELOPT):
            said = self._json(MODELOPT).get("quantization")
            if isinstance(said, dict):
                config = {**config, "quantization_config": {"quant_method": "modelopt", **said}}
        try:
            self.scheme = quantised.find(config, self.tensors)
        except Unsupported as e:
            # Its names and shapes may be all that is asked for.
            self._refusal = e
        if self.scheme is not None:
            self.stored = dict(self.tensors)
            self.tensors.clear()
            self.tensors.update(self.scheme.plain(self.stored))

    def need_weights(self) -> None:
        """Raise Unsupported if the values of its weights cannot be known: it is quantised in another way."""
        if self._refusal is not None:
            raise self._refusal

    def origin(self, name: str) -> Tensor:
        """The values that a tensor stands for, not rounded to the 16 bits that it has in `tensors`."""
        if self.scheme is not None and name in self.scheme.consumed:
            return self.scheme.tensor(name, F32)
        return self.tensors[name]

    def plain_shard(self, shard: str) -> dict[str, Tensor]:
        """The tensors of a weight file, in its order; of a quantised one those of the 16-bit model."""
        tensors = self.shards[shard].tensors
        return dict(tensors) if self.scheme is None else self.scheme.plain(tensors)

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Size and time of the last change (ns) of each weight file, as they were opened."""
        return {file.path.name: file.stamp for file in self._files}

    def check_unchanged(self) -> None:
        """Raise ChangedWhileReading if a shard was written to meanwhile."""
        for file in self._files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- names -------------------------------------------------------------------------------------------

    def bind(self, targets: Iterable[str]) -> list[str]:
        """Find how the adapter's names become names on disk.

        Returns:
            The targets that are not there under any name.

        Raises:
            WrongBase: two ways explain the names, and nothing decides between them.
        """
        if not self.tensors:
            return []
        wanted = list(targets)
        self._names = self._disk.find(wanted)
        self._lie_apart = sum(self.apart(t) is not None for t in wanted)
        return [t for t in wanted if not self.has(t)]

    def require(self, targets: Iterable[str], config: Mapping[str, Any]) -> None:
        """Bind the names of an adapter, all of which must be there.

        Args:
            config: The adapter's: it may say which base it is for.

        Raises:
            WrongBase: some are not, and they are named; or two of them would be one.
        """
        wanted = list(targets)
        missing = self.bind(wanted)
        if missing:
            shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
            raise WrongBase(
                f"the base {self.path} lacks {len(missing)} tensors that the adapter changes: {shown}",
                hint=f"the adapter says its base is {config.get('base_model_name_or_path')!r}",
            )
        self._names.refuse_doubles(wanted)

    def on_disk(self, target: str) -> str | None:
        """The name on disk of a tensor that the adapter calls `target`; None if it is not there."""
        named = self._names.on_disk(target) or self._experts.renamed(self._names.moved(target))
        return named or self._listed.get(target)

    def apart(self, target: str) -> experts.Apart | None:
        """How a parameter that is fused in the model lies apart on disk; None if it does not."""
        return None if self.on_disk(target) else self._experts.apart(self._names.moved(target))

    @property
    def name_notes(self) -> list[str]:
        """How the names on disk differ from the adapter's, one line for each rule."""
        notes = self._names.notes
        if self._lie_apart:
            notes = [*notes, f"{self._lie_apart} parameters of experts are fused in the model and lie apart on disk"]
        return notes

    # -- tied embeddings ---------------------------------------------------------------------------------

    @cached_property
    def embedding(self) -> str | None:
        """Name on disk of the language model's input embeddings, found by their usual names."""
        for name in architectures.EMBEDDING_NAMES:
            found = [t for t in self._weights_of(name) if len(self.tensors[t].shape) == 2]
            if len(found) > 1:
                # Those of other parts, and of layers that predict several tokens, have their copies.
                found = [t for t in found if not names.has_role(t) and not any(p.isdecimal() for p in t.split("."))]
            if len(found) == 1:
                return found[0]
        return None

    @cached_property
    def head(self) -> str:
        """Name that the output embeddings have, or would have, on disk."""
        # `language_model.model.embed_tokens` has its head beside `model`: language_model.lm_head.
        outer, body, _ = f".{self.embedding}".partition(".model.")
        own = f"{outer[1:]}." if body and outer else ""
        for name in architectures.HEAD_NAMES:
            found = [t for t in self._weights_of(name) if names.is_body(t.removesuffix(f"{name}.weight").rstrip("."))]
            if len(found) == 1 or f"{own}{name}.weight" in found:
                return found[0] if len(found) == 1 else f"{own}{name}.weight"
        return f"{own}{architectures.HEAD_NAMES[0]}.weight"

    def _weights_of(self, module: str) -> list[str]:
        """The names of all weights of modules of that name, wherever they stand."""
        end = f".{module}.weight"
        return [t for t in self.tensors if f".{t}".endswith(end)]

    @cached_property
    def tied(self) -> bool:
        """Are input and output embeddings one tensor? Two that differ are not, whatever the config says."""
        if self.embedding is None or not self.says_tied:
            return False
        return self.head not in self.tensors or self.tensors[self.head].equals(self.tensors[self.embedding])

    @property
    def says_tied(self) -> bool:
        """Does the config tie them, or leave it to a default that only the missing head tells?"""
        # transformers 5 asks the whole model's config, 4 the text model's; LLaVA and Qwen2-VL still ask both.
        whole = self.config.get("tie_word_embeddings")
        said = whole is True or architectures.text_config(self.config).get("tie_word_embeddings") is True
        if self.head in self.tensors:
            return said
        return self._has_head and (said or whole is not False)

    @property
    def _has_head(self) -> bool:
        said = self.config.get("architectures")
        named = [str(n) for n in said] if isinstance(said, list) else []
        return not named or any("LMHead" in n or "ForCausalLM" in n or "ForConditional" in n for n in named)

    def _tied_head(self, target: str) -> str | None:
        stem, _, module = target.removesuffix(".weight").rpartition(".")
        is_head = self.head.removesuffix(".weight").rpartition(".")[2] == module and names.is_body(stem)
        return target if is_head and target.endswith(".weight") and self.tied else None

    # -- what methods ask (adapter.Shapes) ---------------------------------------------------------------

    def has(self, tensor: str) -> bool:
        if not self.tensors:
            return True
        if self.on_disk(tensor) is not None or self._tied_head(tensor) is not None:
            return True
        return self.apart(tensor) is not None or self.inside(tensor) is not None

    def tensor(self, target: str) -> Tensor:
        """The base tensor that the adapter calls `target`; a tied head is the embedding.

        Raises:
            WrongBase: there is none.
        """
        name = self.on_disk(target)
        if name is None and self._tied_head(target):
            name = self.embedding
        if name is None:
            raise WrongBase(
                f"the base {self.path} has no tensor {target}", hint="is it another model, or a part of it?"
            )
        return self.tensors[name]

    def shape(self, tensor: str) -> Shape:
        if not self.tensors:
            return architectures.linear_shape(self.config, tensor.removesuffix(".weight"))
        apart = self.apart(tensor)
        return self.tensor(tensor).shape if apart is None else apart.shape

    def inside(self, tensor: str) -> experts.Inside | None:
        return None if not self.tensors or self.on_disk(tensor) else self._experts.inside(self._names.moved(tensor))

    def modules(self) -> list[str]:
        said = Memory(self)
        for name, tensor in self.tensors.items():
            if name.endswith(".weight") and len(tensor.shape) > 1:
                self._listed[said(name)] = name
        tied = [said(self.head)] if self.tied and self.head not in self.tensors else []
        return [name.removesuffix(".weight") for name in (*self._listed, *tied)]

    def conv1d(self, module: str) -> bool | None:
        return architectures.is_conv1d(self.config, module)

    @property
    def dtype(self) -> DType | None:
        """The dtype of most weights; from config.json where there are none."""
        floats = Counter(t.dtype for t in self.tensors.values() if t.dtype in (F32, BF16, F16))
        if floats:
            return floats.most_common(1)[0][0]
        said = self.config.get("dtype", self.config.get("torch_dtype"))
        return {"float32": F32, "bfloat16": BF16, "float16": F16, "float64": DTYPES["F64"]}.get(str(said))


class Memory:
    """How transformers calls in memory what a model directory calls so on disk.

    Old checkpoints hold the body alone though their class has a head: `h.0...` is `transformer.h.0...` then. Models
    of several parts, and some vision models, are named otherwise altogether.
    """

    def __init__(self, model: Base) -> None:
        self._prefix = ""
        body = architectures.body(model.config)
        if body and not any(t.startswith(f"{body}.") for t in model.tensors):
            self._prefix = f"{body}."
        self._head = model.head
        self._name = names.in_memory(model.tensors.keys(), str(model.config.get("model_type")))

    def __call__(self, name: str) -> str:
        return self._name(name if name == self._head else self._prefix + name)
