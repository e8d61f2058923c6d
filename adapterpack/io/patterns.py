"""Regular expressions that come from files: bounded in length and in time.

`(a+)+$` over a long module name would run for years with the standard library's engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import regex

from adapterpack import limits
from adapterpack.errors import InvalidFile


class Pattern:
    """One regular expression from a file.

    Args:
        text: The expression, as the file has it.
        template: Put around it, `{}` for the text.
        where: Which field it comes from, for the error.

    Raises:
        InvalidFile: too long, or no regular expression.
    """

    def __init__(self, text: str, *, template: str = "{}", where: str) -> None:
        self.text = text
        self._where = where
        if len(text) > limits.PATTERN_CHARS:
            raise InvalidFile(
                f"{where}: a pattern of {len(text):,} characters; at most {limits.PATTERN_CHARS:,} are run"
            )
        try:
            self._compiled = regex.compile(template.replace("{}", text))
        except (regex.error, RecursionError, OverflowError) as e:
            raise InvalidFile(f"{where}: {text!r:.100} is no regular expression: {e}") from e

    def matches(self, name: str) -> bool:
        """Does it match from the start of `name`, as `re.match` does?

        Raises:
            InvalidFile: it runs longer than `limits.PATTERN_SECONDS`.
        """
        try:
            return self._compiled.match(name, timeout=limits.PATTERN_SECONDS) is not None
        except TimeoutError as e:
            raise InvalidFile(
                f"{self._where}: the pattern {self.text!r:.100} does not end on {name!r:.100}",
                hint="replace it by a plain module name",
            ) from e


def peft_patterns(keys: Iterable[str], where: str) -> Iterator[Pattern]:
    """Keys of `rank_pattern` or `alpha_pattern`, in file order, matched as PEFT's `get_pattern_key` does."""
    for n, key in enumerate(keys):
        if n >= limits.PATTERNS:
            raise InvalidFile(f"{where}: more than {limits.PATTERNS:,} patterns")
        yield Pattern(key, template=r"(.*\.)?({})$", where=where)
