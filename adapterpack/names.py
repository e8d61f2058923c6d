"""Which tensor on disk an adapter means where both use other names: found from the names alone, or refused.

transformers 5 names modules otherwise than the files that it reads and writes (`conversion_mapping.py`):
`model.language_model.layers.0` lies as `language_model.model.layers.0` (LLaVA and its kin) or as
`model.layers.0` (Qwen2-VL). transformers 4 used the names on disk, a text model has no nesting, and a body that was
saved alone lacks the first component. Here nobody asks for the model type. A name is a STEM, and a TAIL that begins
with the list of layers, `layers.0.self_attn.q_proj.weight`. Tails are the same on both sides; all targets of one stem
move to one stem on disk, or none does.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from adapterpack.errors import WrongBase

_WRAPPERS = {"model", "language_model", "text_model", "llm", "thinker", "timm_model", "base_model", "_orig_mod"}
"""What conversion_mapping.py nests bodies in (and PEFT and torch.compile do): they never say which tower it is."""
_TOWERS = {
    **dict.fromkeys(("visual", "vision_tower", "vision_model"), "vision"),
    **dict.fromkeys(("audio_tower", "audio_model"), "audio"),
}
_ROLE = re.compile(r"vision|visual|image|video|audio|speech|encoder|decoder|talker|mtp")
"""What does say so. A name that has such a word never becomes one that has it not, nor another one."""
_SPELLINGS = {
    ".LayerNorm.gamma": ".LayerNorm.weight",
    ".LayerNorm.beta": ".LayerNorm.bias",
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}
"""Old endings and new ones: the `legacy` rules of conversion_mapping.py."""


def _attention(before: str) -> tuple[tuple[str, str], ...]:
    named = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
    pairs = ((f".attention.{new}.", f".attention.{before}.{old}.") for new, old in named)
    return (*pairs, (".attention.o_proj.", ".attention.output.dense."))


_MLP = ((".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."))
_TABLE = (
    ".attention.relative_position_bias.relative_position_bias_table",
    ".attention.self.relative_position_bias_table",
)
_FAMILIES = (
    ((".layers.", ".encoder.layer."), *_attention("attention"), *_MLP),
    _attention("attention"),
    (*_attention("self"), *_MLP, _TABLE),
)
"""Inner names of vision models in transformers 5 and on disk: `ViTModel`, `Dinov2Model`, `swin` there."""

_FAMILY_OF = dict(zip(("vit", "dinov2", "swin"), _FAMILIES, strict=True))


def in_memory(names: Collection[str], model_type: str) -> Callable[[str], str]:
    """How transformers 5 calls a tensor in memory that lies under one of these names: the way back from `Disk.find`.

    Known are the nesting of LLaVA and Qwen2-VL and their kin, and the inner names of ViT, DINOv2 and Swin; all else
    keeps its name.
    """
    rules: tuple[tuple[str, str], ...] = ()
    if any(n.startswith("language_model.model.") for n in names):
        rules = (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."))
        rules += (
            ("vision_tower.vision_model.", "model.vision_tower."),
            ("model.", "model."),
            ("lm_head.", "lm_head."),
        )
        rules += (("", "model."),)
    elif any(n.startswith("visual.") for n in names) and any(n.startswith("model.layers.") for n in names):
        rules = (("visual.", "model.visual."), ("model.", "model.language_model."))
    words = tuple((old, new) for new, old in _FAMILY_OF.get(model_type, ()))

    def name(on_disk: str) -> str:
        for old, new in rules:
            if on_disk.startswith(old):
                on_disk = new + on_disk.removeprefix(old)
                break
        return _replaced(_spelled(on_disk), words)

    return name


@dataclass(frozen=True)
class Rule:
    """A prefix of the adapter's names and what stands for it on disk.

    Attributes:
        old, new: Both with their last dot; `new` may be empty.
        tensors: How many targets it moves.
    """

    old: str
    new: str
    tensors: int

    def __str__(self) -> str:
        return f"{self.old}* -> {self.new}* ({self.tensors} tensors)"


@dataclass(frozen=True)
class Names:
    """The adapter's names on disk.

    Attributes:
        disk: The base's names.
        rules: The prefixes that differ; the longest that fits counts, and stands first.
        respelled: How many targets end otherwise on disk (`LayerNorm.gamma`).
        found: Target to its name on disk, None where there is none.
        modules: The modules of the targets that are there.
        words: Inner names and those on disk, replaced before anything else.
    """

    disk: Disk
    rules: tuple[Rule, ...] = ()
    respelled: int = 0
    found: Mapping[str, str | None] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    words: tuple[tuple[str, str], ...] = ()

    def on_disk(self, name: str) -> str | None:
        """The name on disk of what the adapter calls `name`; None if it is not there."""
        said = _replaced(name, self.words)
        return self.found[said] if said in self.found else self.disk.real(self.moved(name))

    def moved(self, name: str) -> str:
        """The name on disk that a tensor has by the rules, be it there or not (experts may lie apart)."""
        name = _replaced(name, self.words)
        if not self.rules:
            return name
        module, _, leaf = _spelled(name).rpartition(".")
        if module in self.modules:
            return f"{self.modules[module]}.{leaf}"
        for rule in self.rules:
            if name.startswith(rule.old):
                return rule.new + name.removeprefix(rule.old)
        return name

    def refuse_doubles(self, targets: Iterable[str]) -> None:
        """Two targets of one adapter are two tensors.

        Raises:
            WrongBase: they are one.
        """
        seen: dict[str, str] = {}
        for target in targets:
            name = self.on_disk(target)
            other = seen.setdefault(name, target) if name is not None else target
            if other != target:
                raise WrongBase(f"{other} and {target} of the adapter would both be {name} of the base")

    @property
    def notes(self) -> list[str]:
        """One line for each rule."""
        words = (f"{a.strip('.')} -> {b.strip('.')}" for a, b in self.words if any(b in f".{n}" for n in self.found))
        notes = [f"names on disk: {rule}" for rule in (*self.rules, *words)]
        if self.respelled:
            notes.append(
                f"names on disk: {self.respelled} tensors end otherwise, as LayerNorm.gamma and LayerNorm.weight"
            )
        return notes


class Disk:
    """The names of a base.

    Args:
        names: As they stand in the headers.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    def real(self, name: str) -> str | None:
        """The name itself, or the one that it has under another spelling; None if neither is there."""
        return name if name in self._names else self._spellings.get(_spelled(name))

    @cached_property
    def _spellings(self) -> dict[str, str]:
        """Each name as it is spelled today to the name itself; what would make two tensors one is left alone."""
        spellings = {name: name for name in self._names}
        for name in self._names:
            spellings.setdefault(_spelled(name), name)
        return spellings

    @cached_property
    def _stems(self) -> dict[str, set[str]]:
        """Tail to the stems that stand before it."""
        stems: defaultdict[str, set[str]] = defaultdict(set)
        for name in self._spellings:
            stem, tail = _split(name)
            stems[tail].add(stem)
            stems[_without_expert(tail)].add(stem)
        return dict(stems)

    @cached_property
    def _towers(self) -> set[str]:
        """Every stem that stands before layers."""
        return {stem for tail, stems in self._stems.items() if _layers_at(tail.split(".")) == 0 for stem in stems}

    def find(self, targets: Iterable[str]) -> Names:
        """Find how the adapter's names become names on disk.

        Raises:
            WrongBase: two ways explain the names, and nothing decides between them.
        """
        wanted = list(dict.fromkeys(targets))
        if all(t in self._names for t in wanted):
            return Names(self)
        plain = self._find(wanted)
        missing = [t for t in wanted if plain.found[t] is None]
        if not missing:
            return plain
        ways: dict[tuple[str | None, ...], Names] = {}
        for words in (w for family in _FAMILIES for w in (family, tuple((b, a) for a, b in family))):
            other = replace(self._find([_replaced(t, words) for t in wanted]), words=words)
            if all(_explains(other, plain, t) for t in wanted):
                ways.setdefault(tuple(other.on_disk(t) for t in wanted), other)
        most = max((len(w) - w.count(None) for w in ways), default=0)
        best = [w for w in ways if len(w) - w.count(None) == most > len(wanted) - len(missing)]
        if len(best) > 1:
            target, a, b = next(x for x in zip(wanted, *best[:2], strict=True) if x[1] != x[2])
            raise WrongBase(f"{target} could be several tensors of the base: {a} or {b}")
        return ways[best[0]] if best else plain

    def _find(self, wanted: Sequence[str]) -> Names:
        groups: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for target in wanted:
            stem, tail = _split(_spelled(target))
            # Without a stem nothing says that `layers` and `lm_head` belong together.
            groups[stem, "" if stem else tail.partition(".")[0]].append(tail)
        chosen: dict[tuple[str, str], str] = {}
        guesses: defaultdict[str, dict[tuple[str, str], str]] = defaultdict(dict)
        known: dict[str, str] = {}
        # The largest first: it is the surest, and what it tells may decide for the small ones.
        for key, tails in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0])):
            stem = key[0]
            new, guessed = self._choose(stem, tails, known)
            if new is None:
                continue
            chosen[key] = new
            if new != stem:
                old, to = _reduced(stem, new)
                known.setdefault(old, to)
                if guessed:
                    guesses[old][key] = to
        for same_old in guesses.values():
            if len(set(same_old.values())) > 1:
                # One prefix cannot become two others.
                chosen = {k: v for k, v in chosen.items() if k not in same_old}
        return _names(self, wanted, chosen)

    def _choose(self, stem: str, tails: Sequence[str], known: Mapping[str, str]) -> tuple[str | None, bool]:
        """The stem on disk, None if there is none; and is it a guess, with no rule of transformers behind it?"""
        votes = self._votes(tails)
        score = Counter(s for stems in votes for s in stems)
        full = [s for s, n in score.items() if n == len(votes)]
        if stem in full or (not full and stem in score):
            return stem, False
        if (moved := _move(stem, known)) in full:
            return moved, False
        # Where none has all of them some are missing in any case; the best tells which.
        best = sorted(full or (s for s, n in score.items() if n == max(score.values())))
        ways, guessed = [s for s in best if _core(s) == _core(stem)], False
        # Where the tower is, nothing else is it, however well its names would do.
        if not any(_core(s) == _core(stem) for s in score):
            ways = [s for s in best if _related(stem, s) or self._is_all(stem, s, set(score))]
            guessed = True
        if full and len(ways) > 1:
            names = " or ".join(_join(s, tails[0]) for s in ways)
            raise WrongBase(
                f"{_join(stem, tails[0])} could be several tensors of the base: {names}",
                hint="is it a model of several parts? merge into the part that the adapter was trained on",
            )
        return (ways[0], guessed) if len(ways) == 1 else (None, False)

    def _votes(self, tails: Sequence[str]) -> list[set[str]]:
        """For each tail the stems that it has on disk. Experts may be fused or apart there: then they do not vote."""
        votes = []
        for tail in tails:
            cut = _without_expert(tail)
            stems = self._stems.get(cut, set())
            if stems or cut == tail:
                votes.append(stems)
        return votes

    def _is_all(self, stem: str, other: str, found: set[str]) -> bool:
        """Is the base one tower alone, and the adapter names its parts without saying so?

        transformers 5 does that to CLIP's and SigLIP's: `encoder.layers` lies as `vision_model.encoder.layers`.
        """
        alone = found == {other} and all(_roles(other) <= _roles(t) for t in self._towers)
        return alone and bool(_core(stem)) and other.endswith(f".{stem}")


def _names(disk: Disk, wanted: Sequence[str], chosen: Mapping[tuple[str, str], str]) -> Names:
    found: dict[str, str | None] = {}
    modules: dict[str, str] = {}
    moved: Counter[tuple[str, str]] = Counter()
    respelled = 0
    for target in wanted:
        stem, tail = _split(_spelled(target))
        new = chosen.get((stem, "" if stem else tail.partition(".")[0]))
        name = found[target] = None if new is None else disk.real(_join(new, tail))
        if new is not None and new != stem:
            old, to = _reduced(stem, new)
            # A rule without a prefix would move all names: it takes the next component with it.
            shared = "" if old else _join(stem, tail).partition(".")[0] + "."
            moved[old + shared, to + shared] += 1
        if new is not None and name is not None:
            modules[_join(stem, tail).rpartition(".")[0]] = _join(new, tail).rpartition(".")[0]
            respelled += (_spelled(name) == name) != (_spelled(target) == target)
    rules = (Rule(old, new, n) for (old, new), n in sorted(moved.items(), key=lambda m: (-len(m[0][0]), m[0])))
    return Names(disk, tuple(rules), respelled, found, modules)


def _explains(other: Names, plain: Names, target: str) -> bool:
    """Are its words right for a target: is it there, or the same without them?"""
    found = other.on_disk(target)
    return found == plain.on_disk(target) if _replaced(target, other.words) == target else found is not None


def _replaced(name: str, words: Iterable[tuple[str, str]]) -> str:
    name = f".{name}"
    for old, new in words:
        name = name.replace(old, new, 1)
    return name[1:]


def _spelled(name: str) -> str:
    for old, new in _SPELLINGS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _layers_at(parts: Sequence[str]) -> int | None:
    """Where the first numbered list stands, `layers` of `layers.0`."""
    digit = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if digit is None else max(digit - 1, 0)


def _split(name: str) -> tuple[str, str]:
    """Stem and tail. Where nothing is numbered the tail is a module and its parameter, or a parameter alone."""
    parts = name.split(".")
    at = _layers_at(parts)
    if at is None:
        at = max(len(parts) - (2 if parts[-1] in ("weight", "bias") else 1), 0)
    return ".".join(parts[:at]), ".".join(parts[at:])


def _join(stem: str, tail: str) -> str:
    return f"{stem}.{tail}" if stem else tail


def _without_expert(tail: str) -> str:
    head, experts, _ = tail.partition(".experts.")
    return head + ".experts" if experts else tail


def _core(stem: str) -> tuple[str, ...]:
    """What is left of a stem without its nesting: two stems of one core are the same tower."""
    core: list[str] = []
    for part in stem.split(".") if stem else ():
        part = _TOWERS.get(part, part)
        # `vision_tower.vision_model` is one tower.
        if part not in _WRAPPERS and part not in core[-1:]:
            core.append(part)
    return tuple(core)


def _roles(stem: str) -> set[str]:
    return set(_ROLE.findall(".".join(_core(stem))))


def _related(stem: str, other: str) -> bool:
    """May `stem` be `other` on disk, though no nesting of transformers says so?

    Only a first component may be gone, and nothing that says which tower it is.
    """
    if _roles(stem) != _roles(other):
        return False
    rest = iter(_core(other))
    return all(part in rest for part in _core(stem)) or other == stem.partition(".")[2]


def _reduced(old: str, new: str) -> tuple[str, str]:
    """Two stems as prefixes, without the components at the end that they share."""
    a, b = old.split(".") if old else [], new.split(".") if new else []
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return "".join(f"{p}." for p in a), "".join(f"{p}." for p in b)


def _move(stem: str, known: Mapping[str, str]) -> str | None:
    """The stem by the rules that others follow; the longest prefix counts."""
    name = f"{stem}." if stem else ""
    for old in sorted(known, key=len, reverse=True):
        if name.startswith(old):
            return (known[old] + name.removeprefix(old)).removesuffix(".")
    return None


def is_body(stem: str) -> bool:
    """Is a name's first part nothing but nesting, `language_model.model`, so that no tower is meant?"""
    return not _core(stem)


def has_role(stem: str) -> bool:
    """Does a name say which part of a model of several parts it is, `vision_tower`?"""
    return bool(_roles(stem))
