"""Keys that PEFT would not find: prefixes lost or doubled, wrappers and adapter names left in, modules renamed.

PEFT loads by exact names and without strictness (`peft/utils/save_and_load.py`, `set_peft_model_state_dict`): what it
does not find is a warning at most, and the model computes as its base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from adapterpack import names
from adapterpack.adapter import Adapter, Finding
from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.methods._keys import PREFIX, KeyTable

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
"""What torch.compile, FSDP, activation checkpointing and DeepSpeed nest modules in while they train."""
_LEADING = {"module"}
"""What DistributedDataParallel puts before everything."""
_PEFT_RENAMES = "language_model.model."
"""Old names that PEFT 0.21.2 finds on transformers 5, and no others: tried with LLaVA, Qwen2-VL and their kin."""
_SHOWN = 3
MENDED = "adapterpack check SRC --fix DST writes it right"
_RENAME = "adapterpack check SRC --base BASE --fix DST renames them; merge does so by itself"


@dataclass(frozen=True)
class Respelling:
    """Keys under the names that PEFT looks for.

    Attributes:
        code: Of the fault, `missing-prefix`.
        keys: Key of the file to key that PEFT finds; only those that differ.
        reason: What is wrong with them.
        clear: Is there one way only, so that it can be mended?
    """

    code: str
    keys: Mapping[str, str]
    reason: str
    clear: bool


def respellings(keys: KeyTable, c: Checkpoint) -> list[Respelling]:
    """What is wrong with the keys of a method that we know, fault by fault, in the order in which to mend it."""
    found = (
        _respelled("wrapper-in-key", keys, c, _unwrapped, "name a wrapper of the training: PEFT finds none of them"),
        _respelled("doubled-prefix", keys, c, _single, f"begin with {PREFIX!r} twice: PEFT finds none of them"),
        _respelled("missing-prefix", keys, c, _prefixed, f"lack the prefix {PREFIX!r}: PEFT finds none of them"),
        _named(keys, c),
    )
    return [r for r in found if r is not None]


def key_findings(keys: KeyTable, c: Checkpoint) -> Iterator[Finding]:
    """One finding for each way in which keys are wrong."""
    for r in respellings(keys, c):
        shown = "; ".join(f"{old} -> {new}" for old, new in list(r.keys.items())[:_SHOWN])
        more = f" and {len(r.keys) - _SHOWN:,} more" if len(r.keys) > _SHOWN else ""
        fix = MENDED if r.clear else "rename them: two keys would become one"
        yield Finding(
            r.code, next(iter(r.keys)), f"{len(r.keys):,} of {len(c.tensors):,} keys {r.reason}: {shown}{more}", fix
        )
    for key, other in twins(keys, c).items():
        same = c.tensors[key].shape == c.tensors[other].shape and c.tensors[key].dtype == c.tensors[other].dtype
        alike = same and c.at_hand and c.tensors[key].equals(c.tensors[other])
        yield Finding(
            "duplicate-key",
            key,
            f"it and {other} are one parameter, {'with the same' if alike else 'not known to have the same'} values",
            MENDED if alike else "remove the one that is wrong",
        )


def twins(keys: KeyTable, c: Checkpoint) -> dict[str, str]:
    """Keys that kept the name `default`, to those of the same parameter without it."""
    found = {}
    for key in c.tensors:
        if _owned(keys, key) and ".default" in key:
            plain = key.replace(".default_topk_", "_topk_").replace(".default.", ".").removesuffix(".default")
            if plain != key and plain in c.tensors:
                found[key] = plain
    return found


def _owned(keys: KeyTable, key: str) -> bool:
    return any(part.startswith(keys.marker) for part in key.split("."))


def _at(keys: KeyTable, parts: list[str]) -> int:
    """Where the method's own part of a key begins."""
    return next(i for i, part in enumerate(parts) if part.startswith(keys.marker))


def _respelled(
    code: str, keys: KeyTable, c: Checkpoint, change: Callable[[str, bool], str], reason: str
) -> Respelling | None:
    """A change of prefixes: what the method's own keys need, all keys get."""
    shared = {key for key in c.tensors if _owned(keys, key) and _is_shared(keys, key)}
    wrong = [k for k in c.tensors if _owned(keys, k) and change(k, k in shared) != k]
    if not wrong:
        return None
    moved = {k: new for k in c.tensors if (new := change(k, k in shared)) != k}
    return Respelling(code, moved, reason, _apart(c, moved))


def _apart(c: Checkpoint, moved: Mapping[str, str]) -> bool:
    """Are all keys still different ones?"""
    return len({moved.get(k, k) for k in c.tensors}) == len(c.tensors)


def _is_shared(keys: KeyTable, key: str) -> bool:
    """Is it a parameter of all modules, `base_model.vera_A`, however it begins?"""
    parts = key.split(".")
    own = [part for part in parts[_at(keys, parts) :] if part != "default"]
    return keys.spells_shared("base_model." + ".".join(own), ".".join(own))


def _unwrapped(key: str, shared: bool) -> str:
    parts = key.split(".")
    while parts[0] in _LEADING and parts[1:2] and parts[1] in {"base_model", *_LEADING, *_WRAPPERS}:
        parts = parts[1:]
    return ".".join(part for part in parts if part not in _WRAPPERS)


def _single(key: str, shared: bool) -> str:
    if shared:
        # PEFT takes `base_model.model.base_model.vera_A` too.
        return key
    rest = key
    while rest.startswith((PREFIX + "base_model.", "base_model.base_model.")):
        rest = rest.removeprefix(PREFIX if rest.startswith(PREFIX) else "base_model.")
    return rest


def _prefixed(key: str, shared: bool) -> str:
    if key.startswith("base_model."):
        return key
    return ("base_model." if shared else PREFIX) + key


def _named(keys: KeyTable, c: Checkpoint) -> Respelling | None:
    """Keys that kept the adapter's name, `lora_A.mine.weight`; PEFT drops `default` alone."""
    endings = dict.fromkeys(keys.params.values())
    moved: dict[str, str] = {}
    said: Counter[str] = Counter()
    for key in c.tensors:
        if not _owned(keys, key):
            continue
        parts = key.split(".")
        at = _at(keys, parts) + 1
        own = parts[at - 1 :]
        if len(own) < 2 or own[1] == "default" or _matches(own, endings):
            continue
        if _matches([own[0], *own[2:]], endings):
            moved[key] = ".".join([*parts[:at], *parts[at + 1 :]])
            said[own[1]] += 1
    if not moved:
        return None
    listed = ", ".join(sorted(said)[:_SHOWN])
    reason = f"kept the name of the adapter ({listed}): PEFT finds none of them"
    return Respelling("adapter-name-in-key", moved, reason, len(said) == 1 and _apart(c, moved))


def _matches(own: list[str], endings: Mapping[str, None]) -> bool:
    """Do these segments spell a parameter? `*` in an ending stands for any one segment."""
    if ".".join(own) in endings:
        return True
    patterns = (e.split(".") for e in endings if "*" in e)
    return any(
        len(p) == len(own) and all(want in ("*", have) for want, have in zip(p, own, strict=True)) for p in patterns
    )


# -- against the base ---------------------------------------------------------------------------------------


def renamed_modules(a: Adapter, model: Base) -> dict[str, str]:
    """Base tensors that the adapter names as no model of this base does, to the names that transformers 5 gives them.

    `model` must have been bound to the adapter's targets. Names on disk are those of transformers 4.
    """
    if not model.tensors:
        return {}
    in_memory = names.in_memory(set(model.tensors), str(model.config.get("model_type")))
    alive = {in_memory(name): name for name in model.tensors}
    moved = {}
    for target in a.targets():
        on_disk = None if target in alive or target in model.tensors else model.on_disk(target)
        # Experts are fused here and apart there, and endings are respelled: PEFT converts both.
        if on_disk is None or ".experts." in target or _stem(on_disk) == _stem(target):
            continue
        moved[target] = in_memory(on_disk)
    return moved


def old_names(a: Adapter, model: Base) -> dict[str, str]:
    """Base tensors that the adapter calls as they lie on disk, to the other names that transformers 5 gives them."""
    in_memory = names.in_memory(set(model.tensors), str(model.config.get("model_type")))
    alive = {in_memory(name) for name in model.tensors}
    own = (t for t in a.targets() if t in model.tensors and t not in alive and ".experts." not in t)
    return {t: in_memory(t) for t in own if _stem(in_memory(t)) != _stem(t)}


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def base_name_findings(a: Adapter, model: Base) -> Iterator[Finding]:
    """Modules that the adapter calls otherwise than the base's model does."""
    said = model.config.get("architectures")
    whole = any("ForCausalLM" in str(n) or "ForConditional" in str(n) for n in said or ())
    moved, old = renamed_modules(a, model), old_names(a, model)
    if moved:
        yield Finding(
            "renamed-modules",
            next(iter(moved)),
            f"{len(moved)} of {len(a.targets())} names match the base only after a renaming: {_rules(moved)};"
            " PEFT finds none of them",
            _RENAME,
            # A part of a model that was saved alone has other names again in memory.
            warning=not whole,
        )
    renamed = {t: n for t, n in old.items() if t.startswith(_PEFT_RENAMES)}
    lost = {t: n for t, n in old.items() if t not in renamed}
    for warning, some in ((False, lost), (True, renamed)):
        if some:
            yield Finding(
                "old-names",
                next(iter(some)),
                f"{len(some)} of {len(a.targets())} names are those of transformers 4: {_rules(some)} in transformers"
                f" 5, where PEFT {'renames them as it loads' if warning else 'finds none of them'}",
                _RENAME,
                warning=warning,
            )


def _rules(moved: Mapping[str, str]) -> str:
    found = Counter(_rule(old, new) for old, new in moved.items())
    return "; ".join(f"{old}* -> {new}* ({n} tensors)" for (old, new), n in found.most_common(_SHOWN))


def _rule(old: str, new: str) -> tuple[str, str]:
    """The prefixes in which two names differ."""
    a, b = old.split("."), new.split(".")
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return "".join(f"{p}." for p in a), "".join(f"{p}." for p in b)
