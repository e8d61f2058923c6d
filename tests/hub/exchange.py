"""One HTTP exchange, for both hosts: how requests are read, recorded, spoiled by faults and answered."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Request:
    """What one request was. `hub.requests` holds them in the order of their arrival."""

    host: str
    """`hub`, or `storage` (LFS objects and the Xet CAS)."""
    method: str
    target: str
    """The path with its query, as it was sent."""
    headers: dict[str, str]
    """Names in lower case."""
    size: int = 0
    """Bytes of the body."""
    status: int | None = None
    """The answer; None: none was given."""
    sent: int = 0
    """Bytes of the answer's body that went out."""
    body: bytes = field(default=b"", repr=False)
    """The first 64 KiB of the body."""

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {k: v[-1] for k, v in parse_qs(urlsplit(self.target).query, keep_blank_values=True).items()}

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    @property
    def bearer(self) -> str | None:
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" and token.strip() else None

    def __str__(self) -> str:
        return f"{self.host} {self.method} {self.target} -> {self.status}"


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that ends the work at once: the handlers raise it, the exchange sends it."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        extra = {"X-Error-Message": message.replace("\n", " ")} | ({"X-Error-Code": code} if code else {})
        self.reply = as_json({"error": message}, status, extra | dict(headers or {}))


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    body = json.dumps(value).encode()
    return Reply(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


def ranged(request: Request, size: int, read: Callable[[int, int], bytes], headers: Mapping[str, str]) -> Reply:
    """The whole of a file, or the one range that was asked for (`read(start, stop)` gives bytes)."""
    common = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    if request.range is None:
        return Reply(200, _bounded(read, 0, size), common)
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.range.strip())
    if found is None or not any(found.groups()):
        # Several ranges, or nonsense: a server may ignore the header.
        return Reply(200, _bounded(read, 0, size), common)
    first, last = found.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= size or stop <= start:
        raise Refusal(416, "Requested range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return Reply(206, _bounded(read, start, stop), {**common, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def _bounded(read: Callable[[int, int], bytes], start: int, stop: int) -> bytes:
    """A large file may be a hole in the disk: nobody should ask for all of it."""
    if stop - start > 1 << 30:
        raise ValueError(f"{stop - start} bytes at once: no test means to do that")
    return read(start, stop)


@dataclass
class Fault:
    """What happens to the next `times` requests (None: to all) that match. Made by the methods of `Faults`."""

    on: str = ""
    method: str | None = None
    host: str | None = None
    times: int | None = 1
    after: int = 0
    """Matching requests that are let through first."""
    delay: float = 0.0
    reply: Reply | None = None
    hang_up: bool = False
    lose: bool = False
    cut: int | None = None
    cut_upload: int | None = None
    corrupt: int | None = None
    hits: int = 0
    seen: int = 0

    @property
    def of_body(self) -> bool:
        return self.cut is not None or self.corrupt is not None

    def matches(self, request: Request) -> bool:
        return (
            (self.method is None or self.method == request.method)
            and (self.host is None or self.host == request.host)
            and re.search(self.on, request.target) is not None
        )


_NONE = Fault()


class Faults:
    """Faults to come. `on` is a regular expression that is searched for in the request's path and query.

    All methods take `on`, `method`, `host`, `times` (None: for ever) and `after` (requests let through first), and
    return the `Fault`, whose `hits` counts the requests that it met. Of several that match, the first is applied.

    Where a file's bytes come from: `/api/resolve-cache/…/NAME` for what is in git itself, `/objects/…&filename=NAME`
    for LFS through plain HTTP, `/xorbs/` for Xet. Uploads go to `/upload/` (LFS), `/v1/xorbs/`, `/v1/shards` (Xet).
    """

    def __init__(self) -> None:
        self._all: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._all.append(fault)
        return fault

    def status(self, code: int, on: str = "", headers: Mapping[str, str] | None = None, **match: Any) -> Fault:
        """Answered with this status; the work is not done."""
        reply = as_json({"error": f"injected {code}"}, code, headers)
        return self.add(Fault(on=on, reply=reply, **match))

    def rate_limit(self, retry_after: int = 1, on: str = "", **match: Any) -> Fault:
        """429 with `Retry-After` in seconds."""
        return self.status(429, on, {"Retry-After": str(retry_after)}, **match)

    def delay(self, seconds: float, on: str = "", **match: Any) -> Fault:
        """Done and answered, but late."""
        return self.add(Fault(on=on, delay=seconds, **match))

    def hang_up(self, on: str = "", **match: Any) -> Fault:
        """The connection is closed without an answer; the work is not done."""
        return self.add(Fault(on=on, hang_up=True, **match))

    def lose_response(self, on: str = "", **match: Any) -> Fault:
        """The work is done (a commit is made), then the connection is closed without an answer."""
        return self.add(Fault(on=on, lose=True, **match))

    def drop(self, sent: int, on: str = "", **match: Any) -> Fault:
        """A download (a GET that is answered with a body) is cut off after so many bytes."""
        return self.add(Fault(on=on, cut=sent, **{"method": "GET", **match}))

    def drop_upload(self, received: int, on: str = "", **match: Any) -> Fault:
        """The connection is closed after so many bytes of the request's body were read; the work is not done."""
        return self.add(Fault(on=on, cut_upload=received, **match))

    def corrupt(self, on: str = "", at: int = 0, **match: Any) -> Fault:
        """In a download (a GET that is answered with a body) the byte `at` is another one; the size stays."""
        return self.add(Fault(on=on, corrupt=at, **{"method": "GET", **match}))

    def clear(self) -> None:
        with self._lock:
            self._all.clear()

    def spare(self, fault: Fault) -> None:
        """Takes a hit back."""
        with self._lock:
            fault.hits -= 1

    def take(self, request: Request) -> Fault | None:
        """The fault for this request, counted."""
        with self._lock:
            matching = [fault for fault in self._all if fault.matches(request)]
            for fault in matching:
                fault.seen += 1
            for fault in matching:
                if fault.seen > fault.after and (fault.times is None or fault.hits < fault.times):
                    fault.hits += 1
                    return fault
        return None


class Exchange(BaseHTTPRequestHandler):
    """Reads, records, answers. Subclasses are made by `serve` with their host's name and function."""

    protocol_version = "HTTP/1.1"
    # Headers and body leave in one packet where they fit: Nagle would add 40 ms to each answer.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: Host

    def handle_one(self) -> None:
        request = Request(self.server.name, self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        self.server.record(request)
        fault = self.server.faults.take(request) or _NONE
        body = self._body(fault.cut_upload)
        if body is None or fault.hang_up:
            return self._hang_up()
        request.size, request.body = len(body), body[: 1 << 16]
        if fault.delay:
            time.sleep(fault.delay)
        try:
            reply = fault.reply or self.server.answer(request, body)
        except Refusal as refusal:
            reply = refusal.reply
        except Exception as error:
            self.server.errors.append(error)
            reply = as_json({"error": repr(error)}, 500)
        if fault.lose:
            return self._hang_up()
        if fault.of_body and reply.status not in (200, 206):
            # A redirect on the way to the file: the fault is meant for the file.
            self.server.faults.spare(fault)
            fault = _NONE
        return self._send(request, reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one

    def _send(self, request: Request, reply: Reply, fault: Fault) -> None:
        body = reply.body
        if fault.corrupt is not None and body:
            at = fault.corrupt % len(body)
            body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
        request.status = reply.status
        with suppress(ConnectionError):
            self.send_response(reply.status)
            for name, value in ({"Content-Length": str(len(body))} | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                sent = body if fault.cut is None else body[: fault.cut]
                # Before they are written: the client may have them all, and a test look, before we go on.
                request.sent = len(sent)
                self.wfile.write(sent)
            self.wfile.flush()
            if fault.cut is not None and fault.cut < len(body):
                self._hang_up()

    def _body(self, limit: int | None) -> bytes | None:
        """The request's body; None if the connection is to be closed after `limit` bytes of it."""
        parts: list[bytes] = []
        total = 0
        for part in self._parts():
            parts.append(part)
            total += len(part)
            if limit is not None and total >= limit:
                return None
        return b"".join(parts)

    def _parts(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (part := self.rfile.read(min(left, 1 << 16))):
            left -= len(part)
            yield part

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Quiet: `hub.requests` is the log."""

    def version_string(self) -> str:
        return "loopback-hub"


class Host(ThreadingHTTPServer):
    """One listening address: `answer` gets each request and its body."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        name: str,
        answer: Callable[[Request, bytes], Reply],
        record: Callable[[Request], None],
        faults: Faults,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.name, self.answer, self.record, self.faults = name, answer, record, faults
        self.errors: list[Exception] = []
        self._open: set[socket.socket] = set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        # A short poll: `shutdown` waits for one, and there is a Hub per test.
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No more answers, on connections that are kept alive either."""
        self.shutdown()
        self.server_close()
        self._thread.join()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_: Any) -> None:
        """A client that went away, in the middle of a line or of a body, is no news."""
