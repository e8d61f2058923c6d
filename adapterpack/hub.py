"""Hugging Face Hub references: the only module that imports huggingface_hub, and late.

Nothing is downloaded yet: a reference is looked up in the local cache.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterpack.errors import InvalidFile

_REPO = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def cached_model(reference: str, revision: str | None = None) -> Path | None:
    """The snapshot directory of `org/name` in the local cache; None if it is not there."""
    name, _, at = reference.removeprefix("hf://").partition("@")
    if not _REPO.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=at or revision)
    return Path(found).parent if isinstance(found, str) else None


def resolve_base(reference: str) -> Path:
    """A local directory, else a repository in the local cache.

    Raises:
        InvalidFile: neither.
    """
    path = Path(reference).expanduser()
    if path.exists():
        return path
    cached = cached_model(reference)
    if cached is not None:
        return cached
    hint = f"download it first: hf download {reference}" if _REPO.fullmatch(reference) else None
    raise InvalidFile(f"no such directory, and no such repository in the local Hub cache: {reference}", hint=hint)


def named_base(reference: str | Path | None) -> Path | None:
    """`resolve_base` of a base that was named; None: none was."""
    return None if reference is None else resolve_base(str(reference))


def implied_base(config: Mapping[str, Any]) -> Path | None:
    """The base that an adapter names, if it is a local directory or already in the cache. Nothing is downloaded."""
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        revision = config.get("revision")
        return cached_model(name, revision if isinstance(revision, str) else None)
    except (OSError, ValueError):
        return None
