"""The storage host: LFS objects through signed addresses, and the Xet CAS. It must never see a token of the Hub."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from typing import Any
from urllib.parse import quote

from hub import xet
from hub.exchange import Refusal, Reply, Request, as_json, ranged
from hub.state import Blobs


class Storage:
    def __init__(self, blobs: Blobs) -> None:
        self.blobs = blobs
        self.url = ""
        self._key = secrets.token_bytes(16)
        self._parts: dict[tuple[str, int], bytes] = {}
        self.xorbs: dict[str, xet.Xorb] = {}
        self.files: dict[str, xet.File] = {}
        """By their Xet hash."""
        self.holes: set[str] = set()
        """Objects that are too large to be cut into chunks: they are there through plain HTTP alone."""
        self.xet_hashes: dict[str, str] = {}
        """By SHA-256."""

    # Addresses, for the Hub to hand out.

    def signed(self, path: str, name: str = "") -> str:
        """An address that works without a token; `name` is for the reader of logs, and for faults to match."""
        return f"{self.url}{path}?signature={self._signature(path)}" + (f"&filename={quote(name)}" if name else "")

    def _signature(self, path: str) -> str:
        return hmac.new(self._key, path.encode(), "sha256").hexdigest()[:32]

    def cas_token(self, scope: str) -> str:
        return f"xet-{scope}-{self._signature(scope)}"

    def xet_hash(self, sha256: str) -> str | None:
        """The Xet hash of any object: on the Hub, all of them can be had through Xet.

        What came in another way is cut into plain chunks under made-up hashes. The client takes them: it checks
        neither the hashes of what it downloads nor the bytes.
        """
        if sha256 not in self.xet_hashes and sha256 not in self.holes:
            xorb = xet.Xorb.of(self.blobs.read(sha256))
            name = hashlib.sha256(b"xorb" + sha256.encode()).hexdigest()
            term = xet.Term(name, self.blobs.size(sha256), 0, len(xorb.offsets) - 1)
            file = xet.File(hashlib.sha256(b"file" + sha256.encode()).hexdigest(), (term,), sha256)
            self.xorbs[name], self.files[file.hash], self.xet_hashes[sha256] = xorb, file, file.hash
        return self.xet_hashes.get(sha256)

    def complete(self, oid: str, size: int, parts: list[dict[str, Any]]) -> None:
        """Joins the parts of a multipart upload, whose etags the client gives back."""
        numbers = sorted(number for name, number in self._parts if name == oid)
        data = [self._parts[oid, number] for number in numbers]
        told = [(part.get("partNumber"), part.get("etag")) for part in parts]
        if told != [(n, _part_etag(d)) for n, d in zip(numbers, data, strict=True)] or numbers != [
            *range(1, len(numbers) + 1)
        ]:
            raise Refusal(400, "The parts are not those that were uploaded")
        self._keep(oid, b"".join(data), size)
        for number in numbers:
            del self._parts[oid, number]

    def _keep(self, oid: str, data: bytes, size: int | None) -> None:
        if hashlib.sha256(data).hexdigest() != oid or (size is not None and len(data) != size):
            raise Refusal(400, f"The object's bytes are not those of {oid}")
        self.blobs.put(data)

    # Requests.

    def answer(self, request: Request, body: bytes) -> Reply:
        if request.path.startswith(("/v1/", "/v2/", "/reconstructions/")):
            return self._cas(request, body)
        if request.path.startswith("/xorbs/"):
            return self._xorb(request)
        if not hmac.compare_digest(request.query.get("signature", ""), self._signature(request.path)):
            raise Refusal(403, "AccessDenied")
        verb, oid, *rest = request.path.strip("/").split("/")
        if verb == "objects" and request.method in ("GET", "HEAD"):
            return self._get(request, oid)
        if verb == "upload" and request.method == "PUT":
            return self._put(oid, rest, body)
        raise Refusal(405, "MethodNotAllowed")

    def _get(self, request: Request, oid: str) -> Reply:
        if not self.blobs.has(oid):
            raise Refusal(404, "NoSuchKey")
        headers = {"ETag": f'"{oid}"', "Content-Disposition": f'attachment; filename="{oid}";'}
        return ranged(request, self.blobs.size(oid), lambda a, b: self.blobs.read(oid, a, b), headers)

    def _put(self, oid: str, rest: list[str], body: bytes) -> Reply:
        if rest:
            self._parts[oid, int(rest[0])] = body
            return Reply(200, b"", {"ETag": _part_etag(body)})
        self._keep(oid, body, None)
        return Reply(200, b"", {"ETag": f'"{oid}"'})

    def _cas(self, request: Request, body: bytes) -> Reply:
        write = request.method == "POST" and "telemetry" not in request.path
        allowed = [self.cas_token("write")] + ([] if write else [self.cas_token("read")])
        if request.bearer not in allowed:
            raise Refusal(401, "Unauthorized")
        if found := re.fullmatch(r"/v1/xorbs/default/([0-9a-f]{64})", request.path):
            return self._put_xorb(found[1], body)
        if request.path == "/v1/shards" and write:
            return self._put_shard(body)
        # Clients of 2025 ask without a version.
        if found := re.fullmatch(r"(?:/(v[12]))?/reconstructions/([0-9a-f]{64})", request.path):
            return self._reconstruct(request, found[2], found[1] == "v2")
        # Global dedup, grants, the newer form of shards, telemetry: the client goes on without them.
        raise Refusal(404, "Not Found")

    def _put_xorb(self, name: str, body: bytes) -> Reply:
        try:
            xorb = xet.Xorb.parse(body)
        except xet.Malformed as error:
            raise Refusal(400, str(error)) from error
        new = name not in self.xorbs
        self.xorbs.setdefault(name, xorb)
        return as_json({"was_inserted": new})

    def _put_shard(self, body: bytes) -> Reply:
        try:
            for file in xet.shard_files(body):
                data = self._assembled(file)
                if file.sha256 is not None and hashlib.sha256(data).hexdigest() != file.sha256:
                    raise xet.Malformed("a file's chunks do not give its SHA-256")
                self.files[file.hash] = file
                self.xet_hashes[self.blobs.put(data)] = file.hash
        except (xet.Malformed, IndexError) as error:
            raise Refusal(400, f"Bad shard: {error}") from error
        return as_json({"result": 1})

    def _assembled(self, file: xet.File) -> bytes:
        parts = []
        for term in file.terms:
            if term.xorb not in self.xorbs:
                raise xet.Malformed(f"no such xorb: {term.xorb}")
            parts.append(self.xorbs[term.xorb].decoded(term.start, term.stop))
            if len(parts[-1]) != term.size:
                raise xet.Malformed("a term's length is not that of its chunks")
        return b"".join(parts)

    def _reconstruct(self, request: Request, name: str, v2: bool) -> Reply:
        if name not in self.files:
            raise Refusal(404, "Not Found")
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range or "")
        span = (int(found[1]), int(found[2])) if found else None
        answer = xet.reconstruction(self.files[name], self.xorbs, self.url, span, v2)
        if answer is None:
            raise Refusal(416, "Range Not Satisfiable")
        return Reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _xorb(self, request: Request) -> Reply:
        name = request.path.rsplit("/", 1)[-1]
        if name not in self.xorbs:
            raise Refusal(404, "NoSuchKey")
        data = self.xorbs[name].data
        return ranged(request, len(data), lambda a, b: data[a:b], {})


def _part_etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
