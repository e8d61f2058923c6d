"""What an adapter has that an engine may reject, ignore or misread: one small predicate for each thing.

A predicate yields (key, what is wrong) pairs; which engine minds what stands in `engines.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adapterpack import architectures, peft_versions
from adapterpack.adapter import Adapter, Replaced
from adapterpack.base import Base
from adapterpack.errors import InvalidFile
from adapterpack.methods._keys import positive
from adapterpack.methods._lora_modules import Module, Scaling, modules


@dataclass(frozen=True)
class Facts:
    """An adapter as rules see it.

    Attributes:
        adapter: Of any method.
        base: Its base, if it is at hand.
        own: Its LoRA modules; empty for another method.
        scales: The factor of each.
    """

    adapter: Adapter
    base: Base | None
    own: tuple[Module, ...]
    scales: Mapping[str, float]

    @classmethod
    def of(cls, a: Adapter, base: Base | None = None) -> Facts:
        """Look at an adapter. Raises InvalidFile for half pairs and senseless alphas."""
        own = tuple(modules(a)) if a.method == "lora" else ()
        scaling = Scaling(a.config) if own else None
        return cls(a, base, own, {m.name: scaling(m.known_as, m.rank) for m in own} if scaling else {})

    @property
    def config(self) -> Mapping[str, Any]:
        return self.adapter.config

    def on(self, switch: str) -> bool:
        return bool(self.config.get(switch))

    @property
    def rank(self) -> int:
        return max((m.rank for m in self.own), default=0)

    def replaced(self, kind: str) -> list[str]:
        """Base tensors with new values, of one kind."""
        return [
            t
            for t, entries in self.adapter.replaced.items()
            if any(kind_of(t, e, self.config) == kind for e in entries)
        ]


def kind_of(target: str, entry: Replaced, config: Mapping[str, Any]) -> str:
    """What a replaced tensor is: `tokens` (rows), `embeddings` (under LoRA, saved with it), `bias` or `module`."""
    if entry.rows is not None:
        return "tokens"
    if ".base_layer.weight" in entry.param.key:
        return "embeddings"
    saved = config.get("modules_to_save")
    whole = isinstance(saved, list) and any(f".{name}." in f".{target}" for name in saved)
    return "bias" if target.endswith(".bias") and not whole else "module"


Found = Iterable[tuple[str, str]]
"""(key, what is wrong)."""


def not_lora(f: Facts) -> Found:
    """Another method."""
    if f.adapter.method != "lora":
        # Variants of LoRA say LORA too.
        said = f.config.get("peft_type")
        yield "peft_type", f"it is {f.adapter.method if said == 'LORA' else said}; the engine reads plain LORA alone"


def dora(f: Facts) -> Found:
    """Magnitudes."""
    if f.on("use_dora") or any(m.magnitude for m in f.own):
        yield "use_dora", "it is DoRA: without its magnitudes it is another change"


def lora_bias(f: Facts) -> Found:
    """Biases of B."""
    if f.on("lora_bias") or any("lora_bias" in m.params for m in f.own):
        yield "lora_bias", "B has biases of its own"


def lacks(names: tuple[str, ...], f: Facts) -> Found:
    """Fields that the engine cannot do without."""
    for name in names:
        if f.config.get(name) is None and f.adapter.method == "lora":
            yield name, f"adapter_config.json does not say {name}"


def bias(f: Facts) -> Found:
    """Biases with new values."""
    if f.config.get("bias", "none") != "none" or f.replaced("bias"):
        yield "bias", f"bias={f.config.get('bias')!r}: {len(f.replaced('bias'))} biases have new values"


def tokens(f: Facts) -> Found:
    """Rows with new values."""
    targets = f.replaced("tokens")
    if targets:
        yield targets[0], f"{', '.join(targets)}: rows have new values"


def saved_embeddings(f: Facts) -> Found:
    """Embeddings saved whole under LoRA, but for copies of the base's own."""
    there = f.base is not None and bool(f.base.tensors)
    for target in f.replaced("embeddings"):
        if not (there and f.base is not None and is_copy(f.adapter, target, f.base)):
            yield target, "saved whole, under LoRA: it is not loaded, and if training changed it, that is lost"


def is_copy(a: Adapter, target: str, base: Base) -> bool:
    """Are the new values of a tensor those that the base has already?"""
    entries = a.replaced[target]
    if len(entries) != 1 or entries[0].rows is not None or base.on_disk(target) is None:
        return False
    return base.tensor(target).equals(entries[0].param.tensor)


def saved_modules(serves: frozenset[str], f: Facts) -> Found:
    """Modules that are saved whole, but for one of those that the engine serves."""
    names = _saved_names(f)
    other = sorted(names - serves) or (sorted(names) if len(names) > 1 else [])
    if other:
        yield "modules_to_save", f"{', '.join(other)}: replaced as a whole"


def saved_norms(norms: bool, f: Facts) -> Found:
    """Norms that are saved whole; or, with `norms` false, what else is."""
    found = sorted(n for n in _saved_names(f) if ("norm" in n) == norms)
    if found:
        yield "modules_to_save", f"{', '.join(found)}: replaced as a whole"


def _saved_names(f: Facts) -> set[str]:
    saved = f.config.get("modules_to_save")
    names = {str(s) for s in saved} if isinstance(saved, list) else set()
    return names | {t.split(".")[-2] for t in f.replaced("module")}


def misread(reads: Callable[[Facts, Module], float], f: Facts) -> Found:
    """Modules whose scale the engine computes otherwise."""
    wrong = [m for m in f.own if not math.isclose(reads(f, m), f.scales[m.name], rel_tol=1e-6)]
    if wrong:
        m = wrong[0]
        yield (
            m.name,
            (
                f"{len(wrong)} of {len(f.own)} modules get another scale: {m.name} would be applied"
                f" {reads(f, m) / f.scales[m.name]:.3g} times as strong as it was trained"
            ),
        )


def alpha_over_r(f: Facts, m: Module) -> float:
    """One factor for all modules, rsLoRA unknown."""
    return _alpha(f) / positive(f.config, "r", 8)


def alpha_over_own_rank(f: Facts, m: Module) -> float:
    """By the rank of each tensor, patterns and rsLoRA unknown."""
    return _alpha(f) / m.rank


def global_with_rslora(f: Facts, m: Module) -> float:
    """One factor for all modules, by r of the config."""
    r = positive(f.config, "r", 8)
    return _alpha(f) / (math.sqrt(r) if f.on("use_rslora") else r)


def _alpha(f: Facts) -> float:
    alpha = f.config.get("lora_alpha", 8)
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise InvalidFile(f"lora_alpha in adapter_config.json is {alpha!r:.60}; a finite number is wanted")
    return float(alpha)


def mixed_ranks(f: Facts) -> Found:
    """Modules whose rank is not `r`."""
    other = [m for m in f.own if m.rank != f.config.get("r", 8)]
    if other:
        yield other[0].name, f"{len(other)} modules have other ranks than r={f.config.get('r', 8)}"


def patterns(f: Facts) -> Found:
    """Ranks and alphas by pattern."""
    for name in ("rank_pattern", "alpha_pattern"):
        if f.config.get(name):
            yield name, "read by this version; older ones read r, lora_alpha and use_rslora alone"


def conv(f: Facts) -> Found:
    """Convolutions."""
    found = [m.name for m in f.own if m.convolution]
    if found:
        yield found[0], f"{len(found)} convolutions are adapted"


def embedding(f: Facts) -> Found:
    """Embeddings under LoRA."""
    for m in f.own:
        if m.embedding:
            yield m.name, "it is an embedding with lora_embedding_A and B"


def parameters(f: Facts) -> Found:
    """LoRA on bare parameters."""
    if f.adapter.parameters or f.on("target_parameters"):
        yield "target_parameters", "bare parameters (experts) are adapted: their layout differs between versions"


def unknown(f: Facts) -> Found:
    """Tensors that no rule knows."""
    for key in f.adapter.extra:
        yield key, "it is no LoRA weight"


def named_keys(f: Facts) -> Found:
    """Keys that PEFT did not write so."""
    for p in f.adapter.params():
        if ".default" in p.key:
            yield p.key, "the key still holds the adapter's name"
            return


def max_rank(most: int, f: Facts) -> Found:
    """A rank beyond all that can be served."""
    if f.rank > most:
        yield "r", f"rank {f.rank} is above {most}, the largest that --max-lora-rank takes"


def no_base(f: Facts) -> Found:
    """No word on the base."""
    if not f.config.get("base_model_name_or_path"):
        yield "base_model_name_or_path", "it names no base"


def targets_text(f: Facts) -> Found:
    """Targets as a pattern."""
    said = f.config.get("target_modules")
    if isinstance(said, str) and said not in ("all", "all-linear"):
        yield "target_modules", "it is a pattern; the engine takes a list of names"


def attention(f: Facts) -> Found:
    """SGLang stacks q, k and v: where one is adapted it reads those of q and v without asking."""
    leaves: dict[str, set[str]] = {}
    for m in f.own:
        parent, _, leaf = m.name.rpartition(".")
        if leaf in ("q_proj", "k_proj", "v_proj"):
            leaves.setdefault(parent, set()).add(leaf)
    for parent, found in leaves.items():
        if not {"q_proj", "v_proj"} <= found:
            yield (
                parent,
                f"only {', '.join(sorted(found))} of q_proj, k_proj and v_proj; q_proj and v_proj are both wanted",
            )
            return


def some_layers(f: Facts) -> Found:
    """TGI and LoRAX drop a layer type as a whole where one layer lacks it."""
    layers: dict[tuple[str, str], set[int]] = {}
    for m in f.own:
        found = re.fullmatch(r"(.*?\.)(\d+)(\..*)", m.name)
        if found:
            layers.setdefault((found[1], found[3]), set()).add(int(found[2]))
    said = architectures.text_config(f.base.config).get("num_hidden_layers") if f.base is not None else None
    most = said if type(said) is int else max((max(n) + 1 for n in layers.values()), default=0)
    for (stem, leaf), found_in in layers.items():
        if len(found_in) < most:
            yield f"{stem}*{leaf}", f"adapted in {len(found_in)} of {most} layers: all of them would be left out"


def other_names(known: frozenset[str], f: Facts) -> Found:
    """Layers that the engine does not look for."""
    found = [m.name for m in f.own if m.name.rpartition(".")[2] not in known]
    if found:
        yield found[0], f"{len(found)} modules are none of {', '.join(sorted(known))}"


def conv1d(f: Facts) -> Found:
    """Layers that lie as (in, out)."""
    names = [m.name for m in f.own if m.name.rpartition(".")[2] in architectures.CONV1D_NAMES]
    told = f.on("fan_in_fan_out") or (f.base is not None and any(f.base.conv1d(n) for n in names))
    if told:
        yield "fan_in_fan_out", "the converter transposes factors of Conv1D layers that PEFT keeps as (out, in)"


def tied_head(f: Facts) -> Found:
    """LoRA on a head that is the embedding."""
    heads = [m.name for m in f.own if m.name.rpartition(".")[2] == "lm_head"]
    if heads and f.base is not None and (f.base.tied or f.base.config.get("tie_word_embeddings") is True):
        yield heads[0], "the base ties its embeddings: there is no output.weight to adapt"


def added_tokens(f: Facts) -> Found:
    """A file that names tokens."""
    if "added_tokens.json" in f.adapter.source.files:
        yield "added_tokens.json", "its tokens count as added to the vocabulary if their ids are beyond the base's"


def unknown_fields(version: peft_versions.Version, f: Facts) -> Found:
    """Fields that a version of PEFT does not know."""
    names = peft_versions.unknown(f.config, version) if f.adapter.method == "lora" else []
    if names:
        shown = ", ".join(names)
        yield names[0], f"{len(names)} fields that its PEFT may not know, which is an error before 0.14: {shown}"


def lost_fields(version: peft_versions.Version, f: Facts) -> Found:
    """Fields that it does not know and that mean something."""
    for name in peft_versions.lost(f.config, version) if f.adapter.method == "lora" else ():
        yield name, f"known from PEFT {peft_versions.first_with(name)} on, and it changes what the tensors mean"


def any_pattern(f: Facts) -> Found:
    """Patterns, which old versions match otherwise."""
    for name in ("rank_pattern", "alpha_pattern"):
        if f.config.get(name):
            yield name, "one pattern stands for both rank and alpha there, and one that begins with ^ matches nothing"
