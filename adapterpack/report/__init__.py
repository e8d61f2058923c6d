"""Reports: what a job found as one HTML file that can be looked at anywhere, offline.

`html` escapes, `page` is the shell, `grid`, `plots` and `palette` draw; a job has a file of its own, `verified` for
`verify`, that says what its page holds.
"""

from __future__ import annotations

import os
from pathlib import Path

from adapterpack.io import atomic
from adapterpack.report import verified
from adapterpack.verify import Verification


def render(verification: Verification, *, when: str | None = None) -> str:
    """The page of a comparison.

    Args:
        verification: With `spectra`, if their plots are wanted: `verify(..., singular_values=True)`.
        when: A date to be told; without it the same facts give the same page.
    """
    return verified.page(verification, when=when)


def refuse(path: str | Path, *, overwrite: bool = False, protected: tuple[Path, ...] = ()) -> None:
    """Raise what `write` would raise of this destination, before there is anything to write."""
    destination = Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 - symlinks are refused, not followed
    atomic.check_destination(destination, overwrite=overwrite, protected=protected, file=True)


def write(
    verification: Verification,
    path: str | Path,
    *,
    overwrite: bool = False,
    protected: tuple[Path, ...] = (),
    when: str | None = None,
) -> Path:
    """Write the page of a comparison, whole or not at all.

    Args:
        verification: See `render`.
        path: The file, `report.html`.
        overwrite: Replace a file that is there.
        protected: Inputs, in which the file may not lie.
        when: See `render`.

    Raises:
        DestinationExists: it is there and `overwrite` is false.
        UsageError: it lies in an input.
        WriteFailed: the system refuses.
    """
    target = Path(path).expanduser()
    with atomic.staged_file(target, overwrite=overwrite, protected=protected) as stage:
        atomic.write(stage, render(verification, when=when).encode())
    return target
