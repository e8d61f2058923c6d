"""How many threads are worth having."""

from __future__ import annotations

import os


def usable() -> int:
    """Processors that this process may use; no more than keep a disk busy, for each worker takes memory."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(found, 4)
