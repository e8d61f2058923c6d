"""The Hub's own host: the endpoints that huggingface_hub's client calls, and the account."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from hub import card
from hub.access import Call, User, parsed
from hub.exchange import Refusal, Reply, Request, as_json
from hub.reading import Reading
from hub.writing import Writing


class Api(Reading, Writing):
    """Answers requests."""

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
