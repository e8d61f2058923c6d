"""The Hugging Face Hub: the only part that imports huggingface_hub, and late.

`references` tells a repository from a path, `client` asks and says what errors mean, `snapshot` is a repository at
one commit and its files in the cache, `remote` reads headers where they lie, `upload` makes one commit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterpack.hub.client import credentials, reporting, scrub, token
from adapterpack.hub.references import Reference, find, is_repo, parse
from adapterpack.hub.remote import RemoteFolder
from adapterpack.hub.snapshot import Digests, Entry, Snapshot, look_up

__all__ = [
    "Digests",
    "Entry",
    "Reference",
    "RemoteFolder",
    "Snapshot",
    "cached_model",
    "credentials",
    "find",
    "implied_base",
    "is_repo",
    "look_up",
    "parse",
    "reporting",
    "scrub",
    "token",
]


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


def cached_model(name: str, revision: str | None = None) -> Path | None:
    """The snapshot directory of a model in the local cache; None if it is not there."""
    if not is_repo(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None
