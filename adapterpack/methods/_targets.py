"""Which modules of a model a config names, where the file does not say: PEFT's own test of names.

Reference: peft/tuners/tuners_utils.py, `check_target_module_exists`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapterpack import limits
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.io.patterns import Budget, Pattern


def targeted(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Those of the modules that the config targets, in their order.

    Raises:
        Unsupported: it leaves that to the architecture, or to PEFT's `all-linear`.
        InvalidFile: its fields make no sense.
    """
    said = config.get("target_modules")
    if not said or said == "all-linear":
        raise Unsupported(
            f"target_modules is {said!r}: which modules were adapted only PEFT's tables say",
            hint="load the adapter with PEFT and save it again: it writes their names",
        )
    left_out = _matcher(config.get("exclude_modules"), "exclude_modules")
    saved = _patterns(config.get("modules_to_save"), "modules_to_save", r"(?:^|.*\.){}(?:\Z|\..*)")
    target = _matcher(said, "target_modules")
    in_layers = _layers(config)
    named = set(said) if isinstance(said, list) else set()

    def is_meant(name: str) -> bool:
        if left_out(name) or any(p.matches(name) for p in saved) or not target(name):
            return False
        # Layers bind only suffixes.
        return isinstance(said, str) or name in named or in_layers(name)

    return [name for name in modules if is_meant(name)]


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value) or len(value) > limits.TENSORS:
        raise InvalidFile(f"{where} in adapter_config.json is {value!r:.60}; a list of names is wanted")
    return list(value)


def _matcher(value: Any, where: str) -> Callable[[str], bool]:
    """A pattern that must fit the whole name, or a list of names and of what they may end with."""
    if not value:
        return lambda name: False
    if isinstance(value, str):
        return Pattern(value, template=r"(?:{})\Z", where=where).matches
    names = set(_texts(value, where))

    def ends(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[n:]) in names for n in range(len(parts)))

    return ends


def _patterns(value: Any, where: str, template: str) -> list[Pattern]:
    budget, texts = Budget(), _texts(value or [], where)
    if len(texts) > limits.PATTERNS:
        raise InvalidFile(f"{where}: more than {limits.PATTERNS:,} patterns")
    return [Pattern(text, template=template, where=where, budget=budget) for text in texts]


def _layers(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Is a module in one of the layers of `layers_to_transform`? The first number in its name is its layer."""
    said = config.get("layers_to_transform")
    if said is None or said == []:
        return lambda name: True
    wanted = said if isinstance(said, list) else [said]
    if not all(type(n) is int for n in wanted):
        raise InvalidFile(f"layers_to_transform in adapter_config.json is {said!r:.60}; whole numbers are wanted")
    lists = config.get("layers_pattern") or []
    lists = [lists] if isinstance(lists, str) else lists
    patterns = _patterns(lists, "layers_pattern", r"(?:^|.*\.){}\Z")

    def inside(name: str) -> bool:
        parts = name.split(".")
        for n in range(1, len(parts) - 1):
            before = ".".join(parts[:n])
            if parts[n].isdecimal() and (any(p.matches(before) for p in patterns) if patterns else n > 1):
                return int(parts[n]) in wanted
        return False

    return inside
