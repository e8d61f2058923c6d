"""adapterpack: convert, compress, verify and merge fine-tuned adapter checkpoints, with proof.

The verbs of the command line are functions here; each returns a frozen dataclass. Importing this costs
nothing: a verb is loaded when it is asked for, torch when maths begins.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from adapterpack.errors import AdapterpackError
from adapterpack.version import __version__

if TYPE_CHECKING:
    from adapterpack.check import Health, check
    from adapterpack.combine import Combination, combine
    from adapterpack.compress import compress
    from adapterpack.conversion import Conversion, FactoredModule
    from adapterpack.convert import convert
    from adapterpack.diff import Difference, diff
    from adapterpack.extract import Extraction, extract
    from adapterpack.fix import Repair, fix
    from adapterpack.inspect import Inspection, inspect
    from adapterpack.merge import Merge, merge
    from adapterpack.pull import Pull, pull
    from adapterpack.push import Push, push
    from adapterpack.resize import Resizing, resize
    from adapterpack.unpack import Unpacked, unpack
    from adapterpack.verify import Verification, verify

__all__ = [
    "AdapterpackError",
    "Combination",
    "Conversion",
    "Difference",
    "Extraction",
    "FactoredModule",
    "Health",
    "Inspection",
    "Merge",
    "Pull",
    "Push",
    "Repair",
    "Resizing",
    "Unpacked",
    "Verification",
    "__version__",
    "check",
    "combine",
    "compress",
    "convert",
    "diff",
    "extract",
    "fix",
    "inspect",
    "merge",
    "pull",
    "push",
    "resize",
    "unpack",
    "verify",
]

_HOMES = {
    "Combination": "combine",
    "Conversion": "conversion",
    "Difference": "diff",
    "Extraction": "extract",
    "FactoredModule": "conversion",
    "Health": "check",
    "Inspection": "inspect",
    "Merge": "merge",
    "Pull": "pull",
    "Push": "push",
    "Repair": "fix",
    "Resizing": "resize",
    "Unpacked": "unpack",
    "Verification": "verify",
}
_VERBS = {
    *("check", "combine", "compress", "convert", "diff", "extract", "fix", "inspect", "merge", "pull", "push"),
    *("resize", "unpack", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _VERBS and name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, name)}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """A verb and the module that it stands in have one name: here it is the verb, whichever was asked for first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _VERBS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
