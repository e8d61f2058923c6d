"""Where a merged model comes from: a small file in it that says what was merged into what, and how.

`adapterpack_lineage.json` names each adapter and shard by digest, so that `verify` can find the base again
and tell a model that was changed since; the options, so that the merge can be done again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.io import json as strict_json
from adapterpack.io.safetensors import Header
from adapterpack.version import __version__

NAME = "adapterpack_lineage.json"
SCHEMA = "adapterpack.lineage/1"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """An adapter that was merged.

    Attributes:
        reference: As the user named it.
        sha256: Of its tensor file.
        config_sha256: Of its adapter_config.json.
        weight: The factor of its change.
    """

    reference: str
    sha256: str
    config_sha256: str
    weight: float

    @classmethod
    def of(cls, reference: str, checkpoint: Checkpoint, weight: float) -> Source:
        config = hashlib.sha256(checkpoint.config_bytes or b"").hexdigest()
        return cls(reference, checkpoint.digest(), config, weight)


@dataclass(frozen=True)
class Lineage:
    """What the file says.

    Attributes:
        base: The reference of the base, as the user named it.
        commit: Of its snapshot in the Hub's cache; None elsewhere.
        adapters: In the order in which they were merged.
        options: `rounding` and what else decides the bytes.
        shards: Name of each weight file to `size`, `header_sha256` and, where asked for, `sha256`.
        base_shards: The same of the base.
        version: Of adapterpack.
    """

    base: str
    commit: str | None
    adapters: tuple[Source, ...]
    options: Mapping[str, Any]
    shards: Mapping[str, Mapping[str, Any]]
    base_shards: Mapping[str, Mapping[str, Any]]
    version: str = __version__


def shard_facts(header: bytes, size: int) -> dict[str, Any]:
    """What tells a weight file from another without reading all of it."""
    return {"size": size, "header_sha256": hashlib.sha256(header).hexdigest()}


def of_headers(headers: Mapping[str, Header]) -> dict[str, dict[str, Any]]:
    """`shard_facts` of files whose headers were read."""
    return {
        name: shard_facts(h.raw, len(h.raw) + sum(t.nbytes for t in h.tensors.values()))
        for name, h in headers.items()
    }


def commit_of(path: Path) -> str | None:
    """The commit of a directory in the Hub's cache: its snapshots are named by it."""
    parts = path.absolute().parts
    if len(parts) > 1 and parts[-2] == "snapshots" and _COMMIT.fullmatch(parts[-1]):
        return parts[-1]
    return None


def render(lineage: Lineage, files: Mapping[str, Mapping[str, str]], before: Any) -> bytes:
    """The file's bytes.

    Args:
        files: Digests of all files read and written, where asked for: `read` and `written`, name to SHA-256.
        before: The lineage of the base itself, if it is a merged model too.
    """
    base = {"reference": lineage.base, "commit": lineage.commit, "shards": lineage.base_shards}
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "adapterpack": lineage.version,
        "base": base,
        "adapters": [vars(a) for a in lineage.adapters],
        "options": lineage.options,
        "shards": lineage.shards,
    }
    if before is not None:
        # A list and no nest: JSON may be only so deep, and models are merged again and again.
        record["history"] = [{k: v for k, v in before.items() if k != "history"}, *before.get("history", [])]
    return strict_json.dump(record | ({"files": files} if files else {}))


def raw(directory: Path) -> Any:
    """The file as parsed JSON; None if there is none."""
    path = directory / NAME
    return strict_json.read(path) if path.exists() else None


def read(directory: Path) -> Lineage | None:
    """The lineage of a model directory; None if it has none.

    Raises:
        InvalidFile: it is malformed, or of a version that is not known.
    """
    record = raw(directory)
    if record is None:
        return None
    if record.get("schema") != SCHEMA:
        raise InvalidFile(f"{directory / NAME} is no {SCHEMA}", hint="read it with the adapterpack that wrote it")
    try:
        base = record["base"]
        adapters = tuple(Source(**a) for a in record["adapters"])
        lineage = Lineage(
            base["reference"],
            base["commit"],
            adapters,
            dict(record["options"]),
            {name: dict(facts) for name, facts in record["shards"].items()},
            {name: dict(facts) for name, facts in base["shards"].items()},
            record["adapterpack"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise InvalidFile(f"{directory / NAME} is malformed: {e}") from e
    history = record.get("history", [])
    if not isinstance(lineage.base, str) or not all(_is_source(a) for a in adapters) or not isinstance(history, list):
        raise InvalidFile(f"{directory / NAME} is malformed")
    return lineage


def _is_source(a: Source) -> bool:
    texts = all(isinstance(t, str) for t in (a.reference, a.sha256, a.config_sha256))
    return texts and type(a.weight) in (int, float)


def differences(recorded: Mapping[str, Mapping[str, Any]], model: Base) -> list[str]:
    """Names of weight files of a model that are not what was recorded of them."""
    now = of_headers(model.shards)
    keys = ("size", "header_sha256")
    return [
        name
        for name in sorted({*now, *recorded})
        if {k: now.get(name, {}).get(k) for k in keys} != {k: recorded.get(name, {}).get(k) for k in keys}
    ]
