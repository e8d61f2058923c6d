"""What the Hub tells of a repository, and its files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs, quote

from hub import card
from hub.access import Access, Call
from hub.exchange import Refusal, Reply, as_json, ranged
from hub.state import Entry, pointer


class Reading(Access):
    # What is there.

    def _info(self, call: Call) -> Reply:
        head = self._head(call)
        blobs = call.request.query.get("blobs") in ("true", "True", "1")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(head.tree)]
        for sibling in siblings if blobs else []:
            entry = head.tree[sibling["rfilename"]]
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.lfs:
                sibling["lfs"] = {
                    "sha256": entry.sha256,
                    "size": entry.size,
                    "pointerSize": len(pointer(entry.sha256, entry.size)),
                }
        readme = head.tree.get("README.md")
        text = self.store.blobs.read(readme.sha256).decode("utf-8", "replace") if readme else ""
        data = card.front_matter(text) if not card.validate(text)[0] else None
        data = data if isinstance(data, dict) else {}
        info = {
            "_id": call.repo.id,
            "id": call.repo.id,
            "modelId": call.repo.id,
            "author": call.repo.id.split("/")[0],
            "sha": head.oid,
            "lastModified": head.date,
            "createdAt": call.repo.created,
            "private": call.repo.private,
            "gated": "auto" if call.repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": data.get("tags") or [],
            "library_name": data.get("library_name"),
            "pipeline_tag": data.get("pipeline_tag"),
            "cardData": data or None,
            "siblings": siblings,
        }
        return as_json(info)

    def _described(self, path: str, entry: Entry, call: Call, expand: bool) -> dict[str, Any]:
        told: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
        if entry.lfs:
            told["lfs"] = {
                "oid": entry.sha256,
                "size": entry.size,
                "pointerSize": len(pointer(entry.sha256, entry.size)),
            }
            if xet_hash := self._xet_hash(entry):
                told["xetHash"] = xet_hash
        if expand:
            head = self._head(call)
            told["lastCommit"] = {"id": head.oid, "title": head.title, "date": head.date}
        return told

    def _listing(self, call: Call, tree: Iterable[tuple[str, Entry]], expand: bool) -> dict[str, dict[str, Any]]:
        """Files, and the folders that they are in, by path."""
        found: dict[str, dict[str, Any]] = {}
        for path, entry in sorted(tree):
            parts = path.split("/")
            for i in range(1, len(parts)):
                folder = "/".join(parts[:i])
                found.setdefault(folder, {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40})
            found[path] = self._described(path, entry, call, expand)
        return found

    def _tree(self, call: Call) -> Reply:
        head, query = self._head(call), call.request.query
        prefix = "/".join(call.rest[1:]).strip("/")
        under = prefix + "/" if prefix else ""
        inside = [(path, entry) for path, entry in head.tree.items() if path.startswith(under)]
        if prefix and not inside:
            raise Refusal(404, f"{prefix} does not exist on {call.rest[0]!r}", "EntryNotFound")
        recursive = query.get("recursive", "").lower() in ("true", "1")
        expand = query.get("expand", "").lower() in ("true", "1")
        listed = [
            told
            for path, told in self._listing(call, inside, expand).items()
            if path.startswith(under) and (recursive or "/" not in path[len(under) :])
        ]
        start, size = int(query.get("cursor") or 0), int(query.get("limit") or self.page_size)
        headers = {}
        if start + size < len(listed):
            rest = "&".join(f"{k}={quote(v)}" for k, v in query.items() if k != "cursor")
            link = f"{self.url}{call.request.path}?{rest}{'&' if rest else ''}cursor={start + size}"
            headers["Link"] = f'<{link}>; rel="next"'
        return as_json(listed[start : start + size], headers=headers)

    def _paths_info(self, call: Call) -> Reply:
        if call.request.headers.get("content-type", "").startswith("application/json"):
            asked, expand = call.json.get("paths", []), bool(call.json.get("expand"))
        else:
            form = parse_qs(call.body.decode())
            asked, expand = form.get("paths", []), form.get("expand", [""])[0].lower() == "true"
        found = self._listing(call, self._head(call).tree.items(), expand)
        return as_json([found[path.strip("/")] for path in asked if path.strip("/") in found])

    def _refs(self, call: Call) -> Reply:
        def listed(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": prefix + n, "targetCommit": oid} for n, oid in names.items()]

        told = {
            "branches": listed(call.repo.branches, "refs/heads/"),
            "tags": listed(call.repo.tags, "refs/tags/"),
            "converts": [],
            "pullRequests": listed(call.repo.pull_heads, ""),
        }
        return as_json(told)

    def _commits(self, call: Call) -> Reply:
        listed = [
            {
                "id": c.oid,
                "title": c.title,
                "message": c.description,
                "date": c.date,
                "authors": [{"user": c.author}],
            }
            for c in call.repo.history(call.rest[0])
        ]
        return as_json(listed)

    # Downloads.

    def _xet_hash(self, entry: Entry) -> str | None:
        return self.storage.xet_hash(entry.sha256) if self.xet and entry.lfs else None

    def _resolve(self, call: Call) -> Reply:
        self._open(call)
        head, path = call.repo.head(call.rest[0]), "/".join(call.rest[1:])
        headers = {"X-Repo-Commit": head.oid}
        entry = head.tree.get(path)
        if entry is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        if not entry.lfs:
            return self._regular(call, head.oid, path, entry)
        headers |= _linked(entry) | {"Location": self.storage.signed(f"/objects/{entry.sha256}", path)}
        if xet_hash := self._xet_hash(entry):
            headers["X-Xet-Hash"] = xet_hash
            token = f"{self.url}/api/models/{call.repo.id}/xet-read-token/{head.oid}"
            headers["Link"] = f'<{token}>; rel="xet-auth"'
        return Reply(302, b"Found. Redirecting to the storage.", headers)

    def _regular(self, call: Call, commit: str, path: str, entry: Entry) -> Reply:
        """A file in git itself: the Hub sends the client on to an address on its own host."""
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.oid}"'}
        if not call.request.path.startswith("/api/resolve-cache/"):
            location = f"/api/resolve-cache/models/{call.repo.id}/{commit}/{quote(path)}"
            return Reply(307, b"Temporary Redirect.", headers | _linked(entry) | {"Location": location})
        headers["Content-Disposition"] = f"inline; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1])};"
        blobs = self.store.blobs
        return ranged(call.request, entry.size, lambda a, b: blobs.read(entry.sha256, a, b), headers)

    def _xet_token(self, call: Call) -> Reply:
        if not self.xet:
            raise Refusal(404, "Not Found")
        scope = "write" if "/xet-write-token/" in call.request.path else "read"
        if scope == "write":
            self._writer(call)
        else:
            self._open(call)
        # Years away, so that the answer is the same in each run.
        token, expires = self.storage.cas_token(scope), 4102444800
        headers = {
            "X-Xet-Cas-Url": self.storage.url,
            "X-Xet-Access-Token": token,
            "X-Xet-Token-Expiration": str(expires),
        }
        return as_json({"casUrl": self.storage.url, "accessToken": token, "exp": expires}, headers=headers)


def _linked(entry: Entry) -> dict[str, str]:
    return {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.etag}"'}
