"""A model of transformers made of tensors that we computed, and its answers to prompts. The library is met here only.

Nothing that comes with a model is executed. Its class is one of transformers' own, named by config.json, whose
`auto_map` is never looked at; its weights are read here, as safetensors, and handed over under their names on disk:
transformers' own rules for loading bring each to its parameter, renamed or fused as that version wants it
(`PreTrainedModel.from_pretrained(None, state_dict=...)`). The loader takes a value by `tensor[...]`, which is when
ours is computed: so memory holds one model, and what was never taken is known.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterpack import limits, plan
from adapterpack.adapter import Progress
from adapterpack.backend import Array, Backend, TorchBackend
from adapterpack.base import Base
from adapterpack.errors import AdapterpackError, InvalidFile, Unsupported, UsageError
from adapterpack.prompts import Prompt
from adapterpack.tensor import DType, Tensor

_SHOWN = 5
_BATCH = 8
"""Prompts of one batch."""
_BATCH_TOKENS = 4096
"""Tokens of one batch, padding and all, unless one prompt alone has more."""
_TOKENIZER_FILES = {"tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "spm.model"}
_DROPPED = ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation", "transformers_weights")
"""Fields of config.json that could name code or other weights, and the form of the weights, which are plain here."""


@dataclass(frozen=True)
class Kind:
    """What a model answers.

    Attributes:
        name: `causal-lm`, `masked-lm`, `token-classification`, `sequence-classification` or `encoder`.
        output: The field of transformers' output, `logits` or `last_hidden_state`.
        classes: Are they logits of which the largest is the answer?
        one: One row for a prompt, and not one for each of its tokens?
    """

    name: str
    output: str = "logits"
    classes: bool = True
    one: bool = False


_KINDS = {
    "ForCausalLM": Kind("causal-lm"),
    "LMHeadModel": Kind("causal-lm"),
    # Models of text and images, which take text alone; those with an encoder and a decoder are refused.
    "ForConditionalGeneration": Kind("causal-lm"),
    "ForMaskedLM": Kind("masked-lm"),
    "ForTokenClassification": Kind("token-classification"),
    "ForSequenceClassification": Kind("sequence-classification", one=True),
    "Model": Kind("encoder", "last_hidden_state", classes=False),
}


def transformers() -> Any:
    """The library.

    Raises:
        UsageError: it is not installed, or older than 5.
    """
    hint = "pip install 'adapterpack[transformers]'"
    try:
        import transformers as library
    except ImportError as e:
        raise UsageError(f"running prompts takes transformers, which cannot be imported: {e}", hint=hint) from e
    if int(library.__version__.split(".")[0]) < 5:
        raise UsageError(f"transformers {library.__version__} is too old to run prompts: 5.0 is needed", hint=hint)
    return library


@dataclass(frozen=True)
class Family:
    """The class of a model.

    Attributes:
        name: `LlamaForCausalLM`.
        kind: What it answers.
        config: As transformers has it.
    """

    name: str
    cls: Any
    config: Any
    kind: Kind

    @classmethod
    def of(cls, model: Base) -> Family:
        """The class that config.json names.

        Raises:
            Unsupported: it names none, none that transformers has, or one that answers no text.
        """
        library = transformers()
        said = model.config.get("architectures")
        name = str(said[0]) if isinstance(said, list) and said else ""
        if not name:
            raise Unsupported(
                f"config.json of {model.path} names no architecture", hint='"architectures": ["LlamaForCausalLM"]'
            )
        with _quiet(library):
            found: Any = getattr(library, name, None) if name.isidentifier() else None
        known = isinstance(found, type) and issubclass(found, library.PreTrainedModel)
        if not known or found.config_class is None:
            raise Unsupported(
                f"transformers {library.__version__} has no model {name!r:.100}, and code that comes with a model"
                " is not executed",
                hint="a newer transformers may have it",
            )
        kind = next((kind for end, kind in _KINDS.items() if name.endswith(end)), None)
        what = f"transformers {library.__version__} cannot read the config of {model.path}"
        with _explained(what), _quiet(library):
            config = found.config_class.from_dict(_plain(model.config))
        if kind is None or found.main_input_name != "input_ids" or getattr(config, "is_encoder_decoder", False):
            raise Unsupported(f"{name} does not answer prompts in a way that can be compared", hint=_CAN)
        return cls(name, found, config, kind)

    @property
    def vocabulary(self) -> int:
        return int(getattr(self.config.get_text_config(), "vocab_size", None) or 1 << 31)

    @property
    def longest(self) -> int:
        """The most tokens of a prompt."""
        said = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return min(limits.PROMPT_TOKENS, said) if isinstance(said, int) and said > 0 else limits.PROMPT_TOKENS

    @property
    def width(self) -> int:
        """Numbers in a row of its answer."""
        if self.kind.one or self.kind.name == "token-classification":
            return int(self.config.num_labels)
        return self.vocabulary if self.kind.classes else int(self.config.get_text_config().hidden_size)

    def pad(self, prompts: Sequence[Prompt]) -> int:
        """The id that fills up shorter prompts of a batch; where the config has none, one that no prompt has."""
        said = self.config.get_text_config().pad_token_id
        if isinstance(said, int) and said >= 0:
            return said
        used = {i for p in prompts for i in p.ids}
        return next((i for i in range(self.vocabulary) if i not in used), 0)


_CAN = "causal language models, sequence and token classification, masked language models and encoders of text can be"


def _plain(config: Any) -> Any:
    """A config without the fields in `_DROPPED`, at any depth; its depth is bounded by how it was read."""
    if isinstance(config, Mapping):
        return {k: _plain(v) for k, v in config.items() if k not in _DROPPED}
    return [_plain(v) for v in config] if isinstance(config, list) else config


def tokenizer(path: Path) -> Callable[[str], list[int]]:
    """What makes ids of a text, with the special tokens that the model was trained with.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    hint = 'prompts as token ids do without: a .jsonl file with {"input_ids": [...]} in each line'
    if not any((path / name).exists() for name in _TOKENIZER_FILES):
        raise UsageError(f"{path} has no tokenizer", hint=hint)
    library = transformers()
    with _quiet(library):
        try:
            made = library.AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as e:
            raise UsageError(f"transformers cannot read the tokenizer of {path}: {_line(e)}", hint=hint) from e
    return lambda text: [int(i) for i in made(text)["input_ids"]]


class _Weight:
    """A tensor as transformers' loader asks for it: `weight[...]`."""

    def __init__(self, name: str, make: Callable[[], Array], taken: set[str]) -> None:
        self._name, self._make, self._taken = name, make, taken

    def __getitem__(self, index: Any) -> Array:
        self._taken.add(self._name)
        return self._make()[index]


@dataclass(frozen=True)
class Side:
    """One of the models that are compared, not made yet.

    Attributes:
        name: What to call it, `base + A`.
        model: Where its tensors lie.
        made: What is done to them; None: nothing.
        rounded: Are changed weights rounded to the dtype of the base, as in a merged model? Else they stay f32.
    """

    name: str
    model: Base
    made: plan.Plan | None = None
    rounded: bool = False
    taken: set[str] = field(default_factory=set)

    def weights(self, xp: Backend) -> dict[str, _Weight]:
        """All its tensors by their names on disk, computed when they are asked for."""

        def weight(name: str, source: str, steps: Sequence[plan.Step]) -> _Weight:
            tensor = self.model.tensors[source]
            if not steps:
                return _Weight(name, lambda: TorchBackend("cpu").native(tensor), self.taken)
            origin = self.model.origin(source)
            return _Weight(name, lambda: _changed(tensor, origin, steps, xp, self.rounded), self.taken)

        steps = {} if self.made is None else self.made.steps
        found = {name: weight(name, name, steps.get(name, ())) for name in self.model.tensors}
        if self.made is not None and self.made.head is not None:
            assert self.model.embedding is not None
            found[self.made.head.name] = weight(self.made.head.name, self.model.embedding, self.made.head.steps)
        return found

    def load(self, family: Family, xp: Backend, dtype: DType, prompts: Sequence[Prompt]) -> tuple[Any, list[str]]:
        """The model on the device, and what is to be known of it.

        Raises:
            Unsupported: transformers cannot make it, or has no place for a tensor that changes.
        """
        library, torch = transformers(), xp.torch
        with _explained(f"transformers {library.__version__} cannot read the config"), _quiet(library):
            config = type(family.config).from_dict(_plain(self.model.config))
        text = config.get_text_config()
        parted = self.made is not None and self.made.head is not None
        if parted:
            config.tie_word_embeddings = text.tie_word_embeddings = False
        if family.kind.one and text.pad_token_id is None:
            config.pad_token_id = text.pad_token_id = family.pad(prompts)
        attention = "sdpa" if getattr(family.cls, "_supports_sdpa", False) else "eager"
        what = f"transformers {library.__version__} cannot make {family.name} of {self.model.path}"
        with torch.random.fork_rng(devices=[]), _explained(what), _quiet(library):
            # What the file lacks is drawn: the same for both sides.
            torch.manual_seed(0)
            model, told = family.cls.from_pretrained(
                None,
                config=config,
                state_dict=self.weights(xp.for_proofs()),
                dtype=getattr(torch, _TORCH[dtype.name]),
                attn_implementation=attention,
                output_loading_info=True,
            )
        self._check(family, model, parted)
        notes = []
        missing = sorted(told["missing_keys"])
        if missing:
            notes.append(
                f"{len(missing)} parameters are not in {self.model.path} and were drawn, alike on every side: "
                + _some(missing)
            )
        return model.eval().requires_grad_(False).to(xp.device), notes

    def _check(self, family: Family, model: Any, parted: bool) -> None:
        lost = sorted((self.made.targets() if self.made is not None else set()) - self.taken)
        if lost:
            raise Unsupported(
                f"{family.name} has no place for {len(lost)} tensors that the adapter changes: {_some(lost)}",
                hint="is config.json that of the whole model?",
            )
        head = model.get_output_embeddings() if parted else None
        if head is not None and head.weight is model.get_input_embeddings().weight:
            raise Unsupported(f"{family.name} ties its embeddings whatever the config says; the adapter parts them")


_TORCH = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def _changed(tensor: Tensor, origin: Tensor, steps: Sequence[plan.Step], xp: Backend, rounded: bool) -> Array:
    """A tensor with its changes, computed in f64: rounded to f32, or to the dtype of the base."""
    loaded = plan.LoadedSteps.read(tensor, steps, xp, origin)
    compute = loaded.changed if rounded else loaded.values
    parts = [compute(loaded.base(b), b, once=True).cpu() for b in plan.blocks(tensor, steps, xp, once=True)]
    whole = parts[0] if len(parts) == 1 else xp.torch.cat(parts)
    return whole.reshape(tensor.shape)


def free(xp: Backend) -> None:
    """Give the memory of a model that nobody holds any more back."""
    gc.collect()
    if xp.device.type == "cuda":
        xp.torch.cuda.empty_cache()


def singly(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Each prompt by itself, in order."""
    return [[n] for n in range(len(prompts))]


def together(prompts: Sequence[Prompt]) -> list[list[int]]:
    """The prompts in another order, longest first, in batches; one that is left alone is there twice."""
    found: list[list[int]] = []
    for n in sorted(range(len(prompts)), key=lambda n: (-len(prompts[n].ids), -n)):
        fits = found and len(found[-1]) < _BATCH
        if fits and (len(found[-1]) + 1) * len(prompts[found[-1][0]].ids) <= _BATCH_TOKENS:
            found[-1].append(n)
        else:
            found.append([n])
    return [batch if len(batch) > 1 else batch * 2 for batch in found]


def answers(
    model: Any,
    family: Family,
    prompts: Sequence[Prompt],
    batches: Iterable[Sequence[int]],
    xp: Backend,
    tell: Callable[[int], None],
) -> Iterator[tuple[int, Array]]:
    """What the model says to each prompt, batch after batch: its number, and rows of numbers, on the device.

    Args:
        batches: Numbers of prompts; shorter ones are filled up on the right, and masked.
        tell: Told how many have been run.

    Raises:
        Unsupported: the model cannot be run on them.
    """
    torch, pad, done = xp.torch, family.pad(prompts), 0
    more = {"use_cache": False} if family.kind.name == "causal-lm" else {}
    for batch in batches:
        lengths = [len(prompts[n].ids) for n in batch]
        ids = torch.full((len(batch), max(lengths)), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, n in enumerate(batch):
            ids[row, : lengths[row]] = torch.tensor(prompts[n].ids)
            mask[row, : lengths[row]] = 1
        where = f"{family.name} cannot be run on the prompt in line {prompts[batch[0]].line}"
        with torch.inference_mode(), xp.full_precision(), _explained(where):
            said = model(input_ids=ids.to(xp.device), attention_mask=mask.to(xp.device), return_dict=True, **more)
            found = getattr(said, family.kind.output)
        done += len(set(batch))
        tell(done)
        for n, row in dict(zip(batch, range(len(batch)), strict=True)).items():
            yield n, found[row : row + 1] if family.kind.one else found[row, : lengths[row]]


def teller(progress: Progress | None, name: str, total: int) -> Callable[[int], None]:
    """Says how many prompts a model has been run on."""
    return lambda done: progress(f"run {name}", done, total) if progress else None


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """transformers' own talk and bars off, and as they were afterwards."""
    log = library.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """What others raise, whatever it is, as our own error."""
    try:
        yield
    except (AdapterpackError, MemoryError):
        raise
    except Exception as e:
        raise Unsupported(f"{what}: {_line(e)}") from e


def _line(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def check_size(family: Family, prompts: Sequence[Prompt]) -> None:
    """Raise InvalidFile if the answers to all prompts would be too large to keep."""
    rows = len(prompts) if family.kind.one else sum(len(p.ids) for p in prompts)
    if rows * family.width * 4 > limits.OUTPUT_BYTES:
        raise InvalidFile(
            f"{rows:,} positions of {family.width:,} numbers are {rows * family.width * 4 / 1e9:.1f} GB; at most"
            f" {limits.OUTPUT_BYTES / 1e9:.1f} GB are kept",
            hint="fewer or shorter prompts",
        )
