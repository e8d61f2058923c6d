"""The Hub's own host: who may do what, and the endpoints that huggingface_hub's client calls."""

from __future__ import annotations

import base64
import fnmatch
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from hub import card, commits
from hub.exchange import Refusal, Reply, Request, as_json, ranged
from hub.state import Commit, Entry, Pull, Repo, Store, checked_path, pointer
from hub.storage import Storage

STRANGER = "stranger"
"""The one namespace that is not the user's own: its private repositories are hidden, nothing can be written to it."""


@dataclass(frozen=True)
class User:
    name: str
    role: str

    def owns(self, repo_id: str) -> bool:
        return (repo_id.split("/")[0] == STRANGER) == (self.name == STRANGER)


@dataclass
class Call:
    """One request, with what its path named."""

    request: Request
    body: bytes
    user: User | None
    repo: Repo
    rest: list[str]

    @property
    def json(self) -> dict[str, Any]:
        return parsed(self.body)

    @property
    def create_pr(self) -> bool:
        return self.request.query.get("create_pr") in ("1", "true")


def parsed(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError as error:
        raise Refusal(400, f"The body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refusal(400, "The body is not a JSON object")
    return value


class Api:
    """Answers requests. The settings are attributes: a test may change them at any time."""

    def __init__(self, store: Store, storage: Storage) -> None:
        self.store, self.storage = store, storage
        self.url = ""
        self.users: dict[str, User] = {}
        self.xet = True
        self.page_size = 1000
        self.multipart_threshold = 16 << 20
        self.part_size = 8 << 20
        self.unknown: list[Request] = []
        self.moved: dict[str, str] = {}
        """New names of repositories that were renamed, by their old ones."""

    # Who asks, for what.

    def answer(self, request: Request, body: bytes) -> Reply:
        with self.store.lock:
            user = self._user(request)
            parts = [unquote(part) for part in request.path.strip("/").split("/")]
            top = {
                ("GET", "api/whoami-v2"): self._whoami,
                ("POST", "api/repos/create"): self._create,
                ("DELETE", "api/repos/delete"): self._delete,
                ("POST", "api/validate-yaml"): self._validate_yaml,
            }.get((request.method, "/".join(parts)))
            if top is not None:
                return top(user, parsed(body) if body else {})
            if parts[:2] == ["api", "complete_multipart"] and len(parts) == 4:
                return self._complete(request, parts[2], int(parts[3]), parsed(body))
            return self._of_repo(request, body, user, parts)

    def _of_repo(self, request: Request, body: bytes, user: User | None, parts: list[str]) -> Reply:
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            owner, name, kind, rest = parts[2], parts[3], parts[4] if len(parts) > 4 else "info", parts[5:]
        elif len(parts) >= 3 and parts[1].endswith(".git"):
            owner, name, kind, rest = parts[0], parts[1].removesuffix(".git"), "/".join(parts[2:]), []
        elif len(parts) >= 5 and parts[2] == "resolve":
            owner, name, kind, rest = parts[0], parts[1], "resolve", parts[3:]
        elif parts[:3] == ["api", "resolve-cache", "models"] and len(parts) >= 7:
            owner, name, kind, rest = parts[3], parts[4], "resolve-cache", parts[5:]
        else:
            self.unknown.append(request)
            raise Refusal(404, f"The loopback Hub does not know {request.path}")
        if moved := self.moved.get(f"{owner}/{name}"):
            raise Refusal(307, "Moved", headers={"Location": request.target.replace(f"{owner}/{name}", moved, 1)})
        method = "GET" if request.method == "HEAD" else request.method
        handler = self._routes().get((method, kind))
        if handler is None:
            self.unknown.append(request)
            raise Refusal(404, f"The loopback Hub does not know {method} {kind}")
        return handler(Call(request, body, user, self._visible(f"{owner}/{name}", user), rest))

    def _routes(self) -> dict[tuple[str, str], Callable[[Call], Reply]]:
        return {
            ("GET", "info"): self._info,
            ("GET", "revision"): self._info,
            ("GET", "tree"): self._tree,
            ("POST", "paths-info"): self._paths_info,
            ("GET", "refs"): self._refs,
            ("GET", "commits"): self._commits,
            ("GET", "auth-check"): self._auth_check,
            ("POST", "preupload"): self._preupload,
            ("POST", "commit"): self._commit,
            ("POST", "branch"): self._branch,
            ("DELETE", "branch"): self._branch,
            ("POST", "tag"): self._tag,
            ("DELETE", "tag"): self._tag,
            ("PUT", "settings"): self._settings,
            ("GET", "discussions"): self._discussion,
            ("POST", "discussions"): self._discuss,
            ("GET", "xet-read-token"): self._xet_token,
            ("GET", "xet-write-token"): self._xet_token,
            ("POST", "info/lfs/objects/batch"): self._batch,
            ("POST", "info/lfs/verify"): self._verify,
            ("GET", "resolve"): self._resolve,
            ("GET", "resolve-cache"): self._resolve,
        }

    def _user(self, request: Request) -> User | None:
        if "authorization" not in request.headers:
            return None
        user = self.users.get(request.bearer or "")
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _visible(self, repo_id: str, user: User | None) -> Repo:
        """The repository. Who may not know that it exists gets the same answer as when it does not."""
        repo = self.store.repos.get(repo_id)
        if repo is None or (repo.private and not (user and user.owns(repo_id))):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writer(self, call: Call) -> User:
        if call.user is None:
            raise Refusal(401, "Invalid username or password.")
        self._may_write(call.user, call.repo.id)
        return call.user

    def _may_write(self, user: User, repo_id: str) -> None:
        if not user.owns(repo_id):
            raise Refusal(403, f"You don't have the rights to write under the namespace {repo_id.split('/')[0]!r}")
        if user.role != "write":
            raise Refusal(403, "Forbidden: your token must have the role write")

    def _open(self, call: Call) -> None:
        """Files of a gated repository are for those who were let in: here, its owner."""
        if call.repo.gated and not (call.user and call.user.owns(call.repo.id)):
            raise Refusal(403 if call.user else 401, f"Access to model {call.repo.id} is restricted.", "GatedRepo")

    # The account and its repositories.

    def _whoami(self, user: User | None, _: dict[str, Any]) -> Reply:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
        return as_json({"type": "user", "name": user.name, "fullname": user.name, "orgs": [], "auth": token})

    def _repo_id(self, user: User | None, body: dict[str, Any]) -> tuple[User, str]:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if body.get("type", "model") != "model":
            raise Refusal(400, "The loopback Hub has models only")
        repo_id = f"{body.get('organization') or user.name}/{body.get('name')}"
        self._may_write(user, repo_id)
        return user, repo_id

    def _create(self, user: User | None, body: dict[str, Any]) -> Reply:
        user, repo_id = self._repo_id(user, body)
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.store.repos:
            # The client takes the address out of the refusal, when it may exist.
            return as_json({"error": "You already created this model repo", **answer}, 409)
        private = body.get("visibility") == "private" or body.get("private") is True
        self.store.create(repo_id, private, False, user.name)
        return as_json(answer)

    def _delete(self, user: User | None, body: dict[str, Any]) -> Reply:
        user, repo_id = self._repo_id(user, body)
        self._visible(repo_id, user)
        del self.store.repos[repo_id]
        return as_json({})

    def _settings(self, call: Call) -> Reply:
        self._writer(call)
        if "visibility" in call.json or "private" in call.json:
            call.repo.private = call.json.get("visibility") == "private" or call.json.get("private") is True
        if "gated" in call.json:
            call.repo.gated = bool(call.json["gated"])
        return as_json({"private": call.repo.private, "gated": call.repo.gated})

    def _auth_check(self, call: Call) -> Reply:
        if call.rest == ["write"]:
            self._writer(call)
        self._open(call)
        return as_json({})

    def _validate_yaml(self, _: User | None, body: dict[str, Any]) -> Reply:
        errors, warnings = card.validate(str(body.get("content", "")))
        told = {"errors": [{"message": x} for x in errors], "warnings": [{"message": x} for x in warnings]}
        return as_json(told, 400 if errors else 200)

    # What is there.

    def _head(self, call: Call) -> Commit:
        return call.repo.head(call.rest[0] if call.rest else "main")

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


def _linked(entry: Entry) -> dict[str, str]:
    return {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.etag}"'}


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
