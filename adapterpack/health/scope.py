"""Which modules are adapted, by the config, by the tensors and by the base, and how strongly.

PEFT adapts what the config names and then looks for tensors of those modules (`tuners_utils.py`,
`check_target_module_exists`): tensors of others are dropped without a word, and modules without tensors keep what
they were initialised with.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from adapterpack.adapter import Adapter, Finding, Method
from adapterpack.base import Base
from adapterpack.errors import AdapterpackError
from adapterpack.health import fields
from adapterpack.health.configs import ALPHA
from adapterpack.health.naming import MENDED
from adapterpack.io.patterns import Pattern
from adapterpack.methods._lora_modules import Scaling, attention_of, pattern_field

_SHOWN = 5
_ALL_LINEAR = "all-linear"
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""PEFT's way to find the number of a module's layer."""


class Targets:
    """The modules that a config names, as PEFT reads it.

    Raises:
        InvalidFile: a pattern is none.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self._targets = self._rule("target_modules")
        self._excluded = self._rule("exclude_modules")
        saved = config.get("modules_to_save")
        self._saved = [str(s) for s in saved] if isinstance(saved, list) else []

    def _rule(self, field: str) -> Pattern | tuple[str, ...] | None:
        said = self.config.get(field)
        if isinstance(said, str):
            return Pattern(said, template=r"(?:{})\Z", where=field)
        return tuple(str(t) for t in said) if isinstance(said, list) else None

    @property
    def known(self) -> bool:
        """Does the config say which modules?"""
        said = self.config.get("target_modules")
        return self._targets is not None and not (isinstance(said, str) and said.lower() == _ALL_LINEAR)

    def take(self, module: str) -> bool:
        """Would PEFT adapt this module of the base?"""
        if _fits(self._excluded, module) or any(f".{s}." in f".{module}." for s in self._saved):
            return False
        if not _fits(self._targets, module):
            return False
        layers = self.config.get("layers_to_transform")
        listed = isinstance(self._targets, tuple) and module not in self._targets
        return not listed or layers in (None, []) or self._layer(module) in _listed(layers)

    def _layer(self, module: str) -> int | None:
        said = self.config.get("layers_pattern")
        names = [said] if isinstance(said, str) and said else said if isinstance(said, list) else []
        patterns = [re.compile(rf"(?:^|.*?\.){re.escape(str(n))}\.(\d+)\.") for n in names] or [_LAYER]
        found = next((m for p in patterns if (m := p.match(module))), None)
        return None if found is None else int(found[1])


def _fits(rule: Pattern | tuple[str, ...] | None, module: str) -> bool:
    if isinstance(rule, Pattern):
        return rule.matches(module)
    return rule is not None and any(f".{module}".endswith(f".{t}") for t in rule)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def untargeted(a: Adapter) -> list[str]:
    """Modules with tensors that PEFT would not adapt, and so drop."""
    targets = Targets(a.config)
    if not targets.known:
        return []
    # An attention's output projection is adapted with the attention.
    return [m for m in a.modules if m not in a.parameters and not targets.take(attention_of(a, m) or m)]


def scope_findings(a: Adapter, model: Base | None) -> Iterator[Finding]:
    """Modules that the config leaves out, modules that have no tensors, layers that are missing."""
    targets = Targets(a.config)
    wants = "target_modules" in (fields.known(a.source.peft_type) or {})
    if wants and a.config.get("target_modules") is None and any(m not in a.parameters for m in a.modules):
        yield Finding(
            "no-targets",
            "target_modules",
            "the config does not say which modules are adapted: PEFT takes its own list for the architecture, and"
            " drops the tensors of all others silently",
            MENDED,
        )
    left = untargeted(a)
    if left:
        yield Finding(
            "not-targeted",
            left[0],
            f"{len(left)} modules have tensors, and the config leaves them out: PEFT drops them silently:"
            f" {_some(left)}",
            MENDED,
        )
    yield from _saved_modules(a, model)
    if targets.known and model is not None and model.tensors:
        yield from _without_tensors(a, targets, model)
    elif not a.config.get("layers_to_transform"):
        yield from _gaps(a)


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    return ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "")


def _saved_modules(a: Adapter, model: Base | None) -> Iterator[Finding]:
    said = a.config.get("modules_to_save")
    wanted = [str(s) for s in said] if isinstance(said, list) else []
    own = [f".{k}" for k in a.source.tensors]
    there = [s for s in wanted if any(f".{s}." in k or f"{s}." in k for k in own)]
    # For a task PEFT adds the names that a head may have: one of them is enough, unless the base has the others.
    lacking = [] if there else wanted
    if model is not None and model.tensors:
        lacking = [s for s in wanted if s not in there and any(f".{s}." in f".{t}" for t in model.tensors)]
    if lacking:
        yield Finding(
            "missing-saved-modules",
            lacking[0],
            f"modules_to_save names {_some(lacking)}, and the file has no tensors of it: PEFT fails with a KeyError",
            "save the adapter again, or take them out of modules_to_save, if they were not trained",
        )


def _without_tensors(a: Adapter, targets: Targets, model: Base) -> Iterator[Finding]:
    """Modules of the base that the config names, in the tower that is adapted, and that have no tensors."""
    bound = {m: model.on_disk(f"{m}.weight") for m in a.modules}
    moved = {(_stem(m), _stem(d.removesuffix(".weight"))) for m, d in bound.items() if d is not None}
    on_disk = {d for d in bound.values() if d is not None}
    lacking = []
    for name, tensor in model.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or name in on_disk or len(tensor.shape) < 2:
            continue
        for ours, theirs in moved:
            if _stem(module) == theirs and module.startswith(theirs) and theirs:
                alive = ours + module.removeprefix(theirs)
                if alive not in a.modules and targets.take(alive):
                    lacking.append(alive)
    if lacking:
        yield _lacking(list(dict.fromkeys(lacking)), "the config names them and the base has them")


def _lacking(modules: list[str], why: str) -> Finding:
    return Finding(
        "missing-modules",
        modules[0],
        f"{len(modules)} modules have no tensors, though {why}: {_some(modules)}; PEFT warns and leaves them as they"
        " are initialised",
        "was the file cut, or saved from one part of a model that was spread over devices?",
        warning=True,
    )


def _stem(module: str) -> str:
    """What stands before the number of the layer, `model.layers`."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return "" if at is None else ".".join(parts[:at])


def _gaps(a: Adapter) -> Iterator[Finding]:
    """Layers between the first and the last that lack a module which the others have."""
    layers: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for module in a.modules:
        parts = module.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is not None:
            layers[".".join(parts[:at]), ".".join(parts[at + 1 :])].add(int(parts[at]))
    of_list: defaultdict[str, set[int]] = defaultdict(set)
    for (stem, _), found in layers.items():
        of_list[stem] |= found
    lacking = [
        f"{stem}.{n}.{leaf}"
        for (stem, leaf), found in layers.items()
        # Where a module is in most layers and the others have something else, it is a hole and not a choice.
        if len(found) > 2
        for n in sorted(set(range(min(found), max(found) + 1)) & of_list[stem] - found)
        if len(found) * 4 > 3 * (max(found) - min(found) + 1)
    ]
    missing = [
        f"{stem}.{n}"
        for stem, found in of_list.items()
        if len(found) > 2
        for n in range(min(found), max(found) + 1)
        if n not in found and len(found) * 4 > 3 * (max(found) - min(found) + 1)
    ]
    if lacking or missing:
        yield _lacking([*missing, *lacking], "the layers before and behind have them")


# -- scale --------------------------------------------------------------------------------------------------


def overlaps(method: Method, a: Adapter, field: str) -> dict[str, Any]:
    """Modules for which patterns of a field disagree, to what counts in PEFT: the first in the file's order."""
    if a.config.get(field) in (None, {}) or a.source.peft_type not in ALPHA or a.source.peft_type == "ADALORA":
        return {}
    patterns, values = pattern_field(a.config, field)
    found = {}
    for module in a.modules:
        hits = [p.text for p in patterns if p.matches(module)]
        if len({str(values[h]) for h in hits}) > 1:
            found[module] = values[hits[0]]
    return found


def scale_findings(method: Method, a: Adapter) -> Iterator[Finding]:
    """Patterns that overlap, and scales that readers of `alpha / r` alone get wrong."""
    if a.method != "lora":
        for field in ("alpha_pattern", "rank_pattern"):
            clash = overlaps(method, a, field)
            if clash:
                yield Finding(
                    "overlapping-patterns",
                    next(iter(clash)),
                    f"several of {field} match {len(clash)} modules; the first one in the file counts, which may not"
                    " be the one that counted in training, for PEFT writes them sorted",
                    MENDED,
                    warning=True,
                )
    name = ALPHA.get(a.source.peft_type)
    if name is None or a.source.peft_type == "ADALORA":
        return
    try:
        r, alpha, ranks = a.config.get("r", 8), a.config.get(name, 8), method.ranks(a)
        scaling = Scaling(a.config, name)
        plain = alpha / r
        factors = {m: scaling(m, rank) / plain for m, rank in ranks.items()}
    except (AdapterpackError, TypeError, ZeroDivisionError):
        # Said elsewhere: what is no number, and what is half a pair.
        return
    off = {m: f for m, f in factors.items() if abs(f - 1) > 1e-6}
    if off:
        worst = max(off, key=lambda m: max(abs(off[m]), 1 / abs(off[m])))
        by = "use_rslora" if a.config.get("use_rslora") else "alpha_pattern and rank_pattern"
        yield Finding(
            "scale-not-plain",
            worst,
            f"{len(off)} of {len(factors)} modules are scaled by {by}: what reads {name} / r alone makes the change"
            f" {1 / off[worst]:.4g} times as large",
            "adapterpack convert SRC DST --for ENGINE puts the scale into the factors, exactly",
            warning=True,
        )
