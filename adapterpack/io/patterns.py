"""Regular expressions that come from files: bounded in length and in time.

`(a+)+$` over a long module name would run for years with the standard library's engine, which PEFT uses.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Iterator

from adapterpack import limits
from adapterpack.errors import InvalidFile

_OTHER_DIALECT = re.compile(r"\{(?!\d*,?\d*\})|\[:")
"""What both engines take but read differently: fuzzy matching, POSIX classes. No module name needs it."""


class Budget:
    """The time that all patterns of one field may take together."""

    def __init__(self, seconds: float = limits.PATTERNS_SECONDS) -> None:
        self.seconds = seconds


class Pattern:
    """One regular expression from a file.

    Args:
        text: The expression, as the file has it.
        template: Put around it, `{}` for the text.
        where: Which field it comes from, for the error.
        budget: Shared with the other patterns of that field.

    Raises:
        InvalidFile: too long, or no regular expression of Python's.
    """

    def __init__(self, text: str, *, template: str = "{}", where: str, budget: Budget | None = None) -> None:
        self.text = text
        self._where = where
        self._budget = budget or Budget()
        if len(text) > limits.PATTERN_CHARS:
            raise InvalidFile(
                f"{where}: a pattern of {len(text):,} characters; at most {limits.PATTERN_CHARS:,} are run"
            )
        # Late: most adapters have no patterns.
        import regex

        full = template.replace("{}", text)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Recursion and other extensions of the engine that runs it are errors in PEFT too.
                re.compile(full)
                self._compiled = regex.compile(full)
        except (re.error, regex.error, RecursionError, OverflowError) as e:
            raise InvalidFile(f"{where}: {text!r:.100} is no regular expression: {e}") from e
        if _OTHER_DIALECT.search(text):
            raise InvalidFile(f"{where}: {text!r:.100} has braces or brackets that no module name needs")

    def matches(self, name: str) -> bool:
        """Does it match from the start of `name`, as `re.match` does?

        Raises:
            InvalidFile: it runs longer than `limits.PATTERN_SECONDS`, or its field than its budget.
        """
        started = time.monotonic()
        try:
            if self._budget.seconds <= 0:
                raise TimeoutError
            return self._compiled.match(name, timeout=limits.PATTERN_SECONDS) is not None
        except (TimeoutError, MemoryError) as e:
            raise InvalidFile(
                f"{self._where}: the pattern {self.text!r:.100} does not end on {name!r:.100}",
                hint="replace it by a plain module name",
            ) from e
        finally:
            self._budget.seconds -= time.monotonic() - started


def peft_patterns(keys: Iterable[str], where: str) -> Iterator[Pattern]:
    """Keys of `rank_pattern` or `alpha_pattern`, in file order, matched as PEFT's `get_pattern_key` does."""
    budget = Budget()
    for n, key in enumerate(keys):
        if n >= limits.PATTERNS:
            raise InvalidFile(f"{where}: more than {limits.PATTERNS:,} patterns")
        yield Pattern(key, template=r"(.*\.)?({})$", where=where, budget=budget)
