"""POST …/commit: newline-separated JSON becomes a commit, or a refusal that leaves all as it was."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from hub import card
from hub.exchange import Refusal
from hub.state import Commit, Entry, Pull, Repo, Store, checked_path, no_clashes


def _lines(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """The header, and (key, value) of each line behind it."""
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        operations = [(line["key"], line["value"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(400, f"The commit is not newline-separated JSON: {error!r}") from error
    if not operations or operations[0][0] != "header" or not operations[0][1].get("summary", "").strip():
        raise Refusal(400, "The first line must be a header with a summary")
    return operations[0][1], operations[1:]


def _regular(store: Store, value: dict[str, Any]) -> Entry:
    try:
        data = base64.b64decode(value["content"], validate=True)
    except (binascii.Error, KeyError) as error:
        raise Refusal(400, "A file's content is not base64") from error
    if len(data) > store.lfs_threshold:
        raise Refusal(400, f"{value['path']} is too large for a regular file: it must go through LFS or Xet")
    return store.entry(data, False)


def _large(store: Store, value: dict[str, Any]) -> Entry:
    oid, size = value.get("oid"), value.get("size")
    if value.get("algo") != "sha256" or not isinstance(oid, str):
        raise Refusal(400, "An lfsFile needs algo sha256 and an oid")
    # A copy within the Hub names no size.
    if not store.blobs.has(oid) or (size is not None and store.blobs.size(oid) != size):
        raise Refusal(400, f"{value.get('path')}: no such LFS object was uploaded: {oid}, {size} bytes")
    return store.lfs_entry(oid, store.blobs.size(oid))


def _changed(store: Store, tree: dict[str, Entry], operations: list[tuple[str, dict[str, Any]]]) -> None:
    """Applies the operations to `tree`."""
    written: set[str] = set()
    for key, value in operations:
        path = checked_path(value.get("path", "").rstrip("/") if key == "deletedFolder" else value.get("path"))
        if key in ("file", "lfsFile"):
            if path in written:
                raise Refusal(400, f"{path} is written twice")
            written.add(path)
            tree[path] = _regular(store, value) if key == "file" else _large(store, value)
        elif key == "deletedFile":
            if tree.pop(path, None) is None:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif key == "deletedFolder":
            gone = [name for name in tree if name.startswith(path + "/")]
            if not gone:
                raise Refusal(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del tree[name]
        else:
            raise Refusal(400, f"Unknown operation: {key}")


def make(
    store: Store, repo: Repo, revision: str, body: bytes, author: str, create_pr: bool
) -> tuple[Commit, Pull | None]:
    header, operations = _lines(body)
    head = repo.head(revision)
    stated = header.get("parentCommit")
    if stated is not None and stated not in repo.commits:
        raise Refusal(400, f"Invalid parentCommit: {stated}")
    if stated is not None and stated != head.oid:
        if not create_pr:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        head = repo.commits[stated]
    tree = dict(head.tree)
    _changed(store, tree, operations)
    no_clashes(tree)
    readme = tree.get("README.md")
    if readme is not None and readme != head.tree.get("README.md"):
        errors, _ = card.validate(store.blobs.read(readme.sha256).decode("utf-8", "replace"))
        if errors:
            raise Refusal(400, "Invalid metadata in README.md: " + "; ".join(errors))
    description = header.get("description") or ""
    pull = store.open_pull(repo, header["summary"], description, head, author) if create_pr else None
    target = pull.ref if pull else revision
    commit = store.commit(repo, head, tree, header["summary"], author, description)
    repo.move(target, commit.oid)
    return commit, pull
