"""Names from files never lead outside the directory that they were found in."""

from __future__ import annotations

import unicodedata

from adapterpack.errors import InvalidFile

_RESERVED = {"CON", "PRN", "AUX", "NUL"} | {f"{n}{i}" for n in ("COM", "LPT") for i in range(1, 10)}


def plain_name(name: object, where: str) -> str:
    """A file name without any path in it, safe on every system.

    Raises:
        InvalidFile: empty, `.` or `..`, with a separator, drive, control character, wildcard, trailing
            dot or space, longer than 255 bytes, or reserved on some system.
    """
    reason = None
    if not isinstance(name, str) or not name:
        reason = "is not a file name"
    elif any(c in name for c in "/\\:") or name in (".", ".."):
        reason = "leads outside its directory"
    elif any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        reason = "has control characters"
    elif name[-1] in ". " or set(name) & set('<>"|?*') or name.split(".")[0].rstrip().upper() in _RESERVED:
        reason = "is not a file name on every system"
    elif len(name.encode()) > 255:
        reason = "is too long"
    if reason:
        raise InvalidFile(f"{where}: the name {name!r:.100} {reason}")
    assert isinstance(name, str)
    return name
