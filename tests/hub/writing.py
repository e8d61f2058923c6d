"""What changes a repository: uploads, commits, branches, tags and pull requests."""

from __future__ import annotations

import base64
import fnmatch
import re
from collections.abc import Callable
from typing import Any

from hub import commits
from hub.access import Access, Call
from hub.exchange import Refusal, Reply, Request, as_json
from hub.state import Pull, checked_path


class Writing(Access):
    # Uploads.

    def _preupload(self, call: Call) -> Reply:
        self._writer(call)
        head, ignored, answers = self._head(call), _ignore(call.json.get("gitIgnore")), []
        for file in call.json.get("files", []):
            path, size, sample = checked_path(file.get("path")), file.get("size"), base64.b64decode(file["sample"])
            if not isinstance(size, int) or len(sample) != min(size, 512):
                raise Refusal(400, f"{path}: the sample is not the file's first 512 bytes")
            lfs = self.store.wants_lfs(call.repo, call.rest[0], path, size, sample)
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignored(path)}
            if path in head.tree:
                answer["oid"] = head.tree[path].etag
            answers.append(answer)
        return as_json({"files": answers, "commitOid": head.oid})

    def _batch(self, call: Call) -> Reply:
        self._writer(call)
        if call.json.get("operation") != "upload" or call.json.get("hash_algo", "sha256") != "sha256":
            raise Refusal(422, "Only uploads by sha256")
        objects = [self._upload_of(call, thing) for thing in call.json.get("objects", [])]
        multi = any("chunk_size" in o.get("actions", {}).get("upload", {}).get("header", {}) for o in objects)
        # Clients before 2.0 leave it to the Hub whether they upload through Xet.
        xet = self.xet and "xet" in call.json.get("transfers", [])
        answer = {"transfer": "xet" if xet else "multipart" if multi else "basic", "objects": objects}
        return as_json(answer, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def _upload_of(self, call: Call, thing: dict[str, Any]) -> dict[str, Any]:
        oid, size = thing.get("oid"), thing.get("size")
        if not isinstance(oid, str) or not re.fullmatch(r"[0-9a-f]{64}", oid) or not isinstance(size, int):
            raise Refusal(422, "An object needs an oid and a size")
        told = {"oid": oid, "size": size}
        if self.store.blobs.has(oid):
            return told
        verify = {"href": f"{self.url}/{call.repo.id}.git/info/lfs/verify"}
        if size < self.multipart_threshold or "multipart" not in call.json.get("transfers", []):
            upload: dict[str, Any] = {"href": self.storage.signed(f"/upload/{oid}")}
        else:
            count = -(-size // self.part_size)
            header = {f"{i:05}": self.storage.signed(f"/upload/{oid}/{i}") for i in range(1, count + 1)}
            path = f"/api/complete_multipart/{oid}/{size}"
            href = self.storage.signed(path).replace(self.storage.url, self.url)
            upload = {"href": href, "header": {"chunk_size": str(self.part_size), **header}}
        return {**told, "authenticated": True, "actions": {"upload": upload, "verify": verify}}

    def _complete(self, request: Request, oid: str, size: int, body: dict[str, Any]) -> Reply:
        if not self.storage.signed(request.path).endswith("=" + request.query.get("signature", "")):
            raise Refusal(403, "AccessDenied")
        if body.get("oid") != oid:
            raise Refusal(400, "The completion is for another object")
        self.storage.complete(oid, size, body.get("parts", []))
        return as_json({})

    def _verify(self, call: Call) -> Reply:
        self._writer(call)
        oid, size = str(call.json.get("oid")), call.json.get("size")
        if not self.store.blobs.has(oid) or self.store.blobs.size(oid) != size:
            raise Refusal(404, "The object was not uploaded")
        return as_json({})

    def _commit(self, call: Call) -> Reply:
        user = self._writer(call)
        commit, pull = commits.make(self.store, call.repo, call.rest[0], call.body, user.name, call.create_pr)
        answer: dict[str, Any] = {
            "success": True,
            "commitOid": commit.oid,
            "commitUrl": f"{self.url}/{call.repo.id}/commit/{commit.oid}",
            "hookOutput": "",
            "pullRequestUrl": f"{self.url}/{call.repo.id}/discussions/{pull.num}" if pull else None,
        }
        return as_json(answer)

    # Branches, tags, pull requests.

    def _branch(self, call: Call) -> Reply:
        self._writer(call)
        name, branches = call.rest[0], call.repo.branches
        if call.request.method == "DELETE":
            if name == "main":
                raise Refusal(403, "The default branch stays")
            call.repo.head(name)
            del branches[name]
        elif name in branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{name}")
        else:
            branches[name] = call.repo.head((call.json if call.body else {}).get("startingPoint") or "main").oid
        return as_json({})

    def _tag(self, call: Call) -> Reply:
        self._writer(call)
        if call.request.method == "DELETE":
            if call.repo.tags.pop(call.rest[0], None) is None:
                raise Refusal(404, f"No such tag: {call.rest[0]}", "RevisionNotFound")
        elif call.json.get("tag") in call.repo.tags:
            raise Refusal(409, "Tag already exists")
        else:
            call.repo.tags[call.json["tag"]] = call.repo.head(call.rest[0]).oid
        return as_json({})

    def _discuss(self, call: Call) -> Reply:
        """Opens a pull request; or merges, opens or closes one."""
        user = self._writer(call)
        if not call.rest:
            if not call.json.get("pullRequest") or not call.json.get("title"):
                raise Refusal(400, "The loopback Hub has pull requests only, and they have a title")
            text = str(call.json.get("description", ""))
            pull = self.store.open_pull(call.repo, call.json["title"], text, call.repo.head("main"), user.name)
            return as_json({"num": pull.num, "pullRequest": True, "url": f"{self.url}/{call.repo.id}"})
        pull = self._pull(call)
        if call.rest[1:] == ["merge"]:
            head, main = call.repo.head(pull.ref), call.repo.head("main")
            if main not in call.repo.history(pull.ref):
                raise Refusal(409, "The pull request has conflicts")
            title = f"{pull.title} (#{pull.num})"
            merged = self.store.commit(call.repo, main, head.tree, title, user.name)
            call.repo.branches["main"] = pull.merged = merged.oid
            pull.status = "merged"
        elif call.rest[1:] == ["status"] and call.json.get("status") in ("open", "closed"):
            pull.status = call.json["status"]
        else:
            raise Refusal(404, "Not Found")
        event = {"id": "0", "type": "status-change", "createdAt": pull.date, "data": {"status": pull.status}}
        return as_json({"newStatus": event | {"author": {"name": user.name}}})

    def _pull(self, call: Call) -> Pull:
        pull = call.repo.pulls.get(int(call.rest[0])) if call.rest[0].isdigit() else None
        if pull is None:
            raise Refusal(404, "No such discussion")
        return pull

    def _discussion(self, call: Call) -> Reply:
        pulls = [self._pull(call)] if call.rest else list(call.repo.pulls.values())
        told = [
            {
                "num": pull.num,
                "title": pull.title,
                "author": {"name": pull.author},
                "createdAt": pull.date,
                "status": pull.status,
                "repo": {"name": call.repo.id, "type": "model"},
                "isPullRequest": True,
                "changes": {"base": pull.base, "mergeCommitId": pull.merged},
                "filesWithConflicts": [],
                "events": [],
                "diff": "",
            }
            for pull in pulls
        ]
        return as_json(told[0] if call.rest else {"count": len(told), "start": 0, "discussions": told})


def _ignore(text: str | None) -> Callable[[str], bool]:
    """Which paths a .gitignore names: whole paths, names and folders, without its finer rules."""
    rules = [x.strip().strip("/") for x in (text or "").splitlines() if x.strip() and not x.startswith("#")]

    def ignored(path: str) -> bool:
        parts = path.split("/")
        return any(
            fnmatch.fnmatchcase(path, rule) or any(fnmatch.fnmatchcase(part, rule) for part in parts)
            for rule in rules
        )

    return ignored
