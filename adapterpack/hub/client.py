"""The client library, and what its errors mean. Everything that talks to the Hub passes here."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar
from urllib.parse import urlsplit

from adapterpack.errors import AdapterpackError, HubError, UsageError
from adapterpack.version import __version__

T = TypeVar("T")

_TOKEN: ContextVar[str | None] = ContextVar("token", default=None)
_BARS: ContextVar[bool] = ContextVar("bars", default=False)
_REPORT: ContextVar[Callable[[str, int, int], None] | None] = ContextVar("report", default=None)
_NETWORK = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
"""Packages whose exceptions mean that nobody answered."""
_TRIES = 5
FIRST_WAIT, _LONGEST_WAIT = 1.0, 8.0
_PATIENCE = 300.0
"""Longest time (s) that a server may ask us to wait; beyond it the user is told."""
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


@contextlib.contextmanager
def credentials(token: str | None) -> Iterator[None]:
    """Use a token for all that is read or written inside; None: HF_TOKEN, else the login.

    Raises:
        UsageError: it cannot be a token.
    """
    if token is not None and (not token.strip() or not token.strip().isascii() or len(token.split()) != 1):
        # What was given is not said: it may be a token, and something else.
        raise UsageError("--token: that is no token", hint="HF_TOKEN in the environment is safer than an option")
    before = _TOKEN.set(_TOKEN.get() if token is None else token.strip())
    try:
        yield
    finally:
        _TOKEN.reset(before)


def token() -> str | None:
    """The token in use; None: there is none."""
    own = _TOKEN.get()
    if own is not None:
        return own
    from huggingface_hub import get_token

    found = get_token()
    return None if found is None else str(found)


def scrub(text: str) -> str:
    """The text without the token in use, and without anything that looks like one."""
    tokens = [_TOKEN.get(), os.environ.get("HF_TOKEN")]
    if "huggingface_hub" in sys.modules:
        # Else nobody has spoken to the Hub, and the library takes long to load.
        with contextlib.suppress(Exception):
            tokens.append(token())
    for own in tokens:
        if own and own.strip():
            text = text.replace(own.strip(), "<TOKEN>")
    return _SECRET.sub("<TOKEN>", text)


def endpoint() -> str:
    """Where the Hub is.

    Raises:
        UsageError: it would be spoken to without encryption, and is not this machine.
    """
    from huggingface_hub import constants

    url = str(constants.ENDPOINT).rstrip("/")
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
        raise UsageError(
            f"HF_ENDPOINT is {parts.scheme}://{parts.hostname or ''}: a token would go there in the clear",
            hint="use https://; plain http:// is for this machine only",
        )
    return url


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def api() -> Any:
    """The library's `HfApi`, with our name and the token in use."""
    from huggingface_hub import HfApi

    # `False`: send none. `None` would mean: look for one.
    return HfApi(endpoint=endpoint(), token=token() or False, library_name="adapterpack", library_version=__version__)


def offline() -> bool:
    """Has the user forbidden all requests (HF_HUB_OFFLINE)?"""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Let the client draw its progress bars of an upload on stderr; a library is silent unless it is told."""
    before = _BARS.set(shown)
    try:
        yield
    finally:
        _BARS.reset(before)


@contextlib.contextmanager
def reporting(report: Callable[[str, int, int], None] | None) -> Iterator[None]:
    """Report the bytes of downloads inside: what, done, total."""
    before = _REPORT.set(report)
    try:
        yield
    finally:
        _REPORT.reset(before)


class Meter:
    """The bytes of several downloads, reported as one."""

    def __init__(self, total: int) -> None:
        self._report, self._total, self._done = _REPORT.get(), total, 0

    def add(self, count: float | None) -> None:
        # More than all of it come where a file is fetched again.
        self._done = min(self._done + int(count or 0), self._total)
        if self._report is not None:
            self._report("download", self._done, self._total)

    def bar(self) -> type:
        """A class of progress bars for the client, that draw nothing and count here."""
        from tqdm import tqdm

        meter = self

        class Bar(tqdm):  # type: ignore[misc]
            """Silent."""

            def __init__(self, *arguments: Any, **settings: Any) -> None:
                super().__init__(*arguments, **{**settings, "disable": True})

            def update(self, n: float | None = 1) -> None:
                self.n += n or 0
                meter.add(n)

            def update_transfer(self, n: float) -> None:
                """Bytes on the wire, which may be fewer: not shown."""

            def __getattr__(self, name: str) -> Any:
                # What else some version of the client wants to show.
                if name.startswith("_"):
                    raise AttributeError(name)
                return lambda *_, **__: None

        return Bar


class _Muted:
    """While anybody talks to the Hub: no warnings of the client, for our errors say more; bars if they are wanted.

    These are settings of the whole process: several threads share them, and the last one puts them back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._level, self._hidden = threading.Lock(), 0, 0, False

    def __enter__(self) -> None:
        from huggingface_hub import utils

        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            self._level = utils.logging.get_verbosity()
            utils.logging.set_verbosity_error()
            self._hidden = not _BARS.get() and not utils.are_progress_bars_disabled()
            if self._hidden:
                utils.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        from huggingface_hub import utils

        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            utils.logging.set_verbosity(self._level)
            if self._hidden:
                utils.enable_progress_bars()


muted = _Muted()


def ask(what: str, call: Callable[[], T], *, where: str = "", writing: bool = False) -> T:
    """Call something that may be called again, and again if the Hub is busy or failing.

    Args:
        what: The reference that it is about, for messages.
        where: What else would have been tried: said if there is no such repository.
        writing: Does it change the repository?

    Raises:
        HubError: as `translate` says.
    """
    wait = FIRST_WAIT
    for attempt in range(1, _TRIES + 1):
        try:
            with muted:
                return call()
        except Exception as e:
            if isinstance(e, AdapterpackError):
                raise
            asked = pause(e)
            if asked is None or attempt == _TRIES:
                raise translate(e, what, where=where, writing=writing) from e
            time.sleep(max(asked, wait))
            wait = min(2 * wait, _LONGEST_WAIT)
    raise AssertionError("unreachable")


def status(e: BaseException) -> int | None:
    """The HTTP status that an error is about."""
    response = getattr(e, "response", None)
    found = getattr(response, "status_code", None)
    return found if isinstance(found, int) else None


def pause(e: BaseException) -> float | None:
    """How long to wait before a call that failed so is tried again; None: it would fail again, or it is too long."""
    answered = _answered(e)
    code = status(answered)
    wished = _wished(getattr(answered, "response", None)) if code in (429, 503) else 0.0
    again = is_network(e) if code is None else code >= 500 or code in (408, 429)
    return wished if again and wished <= _PATIENCE else None


def _answered(e: BaseException) -> BaseException:
    """The error with the Hub's answer in it, where others were made of it; else the first of all."""
    from huggingface_hub import errors

    while status(e) is None and e.__cause__ is not None and not isinstance(e, errors.OfflineModeIsEnabled):
        e = e.__cause__
    return e


def _wished(response: Any) -> float:
    """Seconds that the server wants us to wait, by `Retry-After` or the draft of `RateLimit`."""
    headers = getattr(response, "headers", {})
    after = str(headers.get("Retry-After", ""))
    if after.isdigit():
        return float(after)
    reset = re.search(r"\bt=(\d{1,6})", str(headers.get("ratelimit", "")))
    return float(reset[1]) if reset else 0.0


def is_network(e: BaseException) -> bool:
    """Did nobody answer, or not to the end?"""
    from huggingface_hub import errors

    seen: BaseException | None = e
    while seen is not None:
        if isinstance(seen, errors.OfflineModeIsEnabled) or status(seen) is not None:
            return False
        if isinstance(seen, ConnectionError | TimeoutError) or type(seen).__module__.partition(".")[0] in _NETWORK:
            return True
        seen = seen.__cause__
    return False


def translate(e: BaseException, what: str, *, where: str = "", writing: bool = False) -> AdapterpackError:
    """What an error of the client means, in one line, with what to do about it."""
    from huggingface_hub import errors

    lost, e = is_network(e), _answered(e)
    said = _by_kind(e, errors, what, where) or _by_status(e, what, writing)
    if said is None and lost:
        said = (
            f"cannot reach the Hub for {what}: {_first_line(e)}",
            "look at the network; HF_HUB_OFFLINE=1 uses the cache",
        )
    if said is None and isinstance(e, ValueError):
        # The client itself refuses, after it asked the Hub about the card, in several lines.
        said = f"{what}: {' '.join(str(e).split())[:300]}", None
    if said is None:
        said = f"{what}: {_first_line(e)}", None
    message, hint = said
    return HubError(scrub(message), hint=hint)


def _by_kind(e: BaseException, errors: Any, what: str, where: str) -> tuple[str, str | None] | None:
    if isinstance(e, errors.OfflineModeIsEnabled):
        return f"{where}{what} is not in the local Hub cache, and HF_HUB_OFFLINE is set", "fetch it while online"
    if isinstance(e, errors.GatedRepoError):
        return (
            f"{what} is gated: its owners decide who may read it",
            f"ask on its page, {endpoint()}/{_repo(what)}, then use a token of that account",
        )
    if isinstance(e, errors.RevisionNotFoundError):
        return f"{_repo(what)} has no such branch, tag or commit: {what}", "its page lists them"
    if isinstance(e, errors.RepositoryNotFoundError) and status(e) != 403:
        known = "with this token" if token() else "without a token: `hf auth login`, HF_TOKEN or --token"
        return f"{where}no such repository on the Hub, or none that may be seen: {what}", f"it was looked for {known}"
    if isinstance(e, errors.EntryNotFoundError) and status(e) is not None:
        return f"the Hub has no such file: {what}", None
    return None


def _by_status(e: BaseException, what: str, writing: bool) -> tuple[str, str | None] | None:
    code = status(e)
    if code == 401:
        return f"the Hub does not accept the token for {what}", "`hf auth login`, or a fresh one in HF_TOKEN"
    if code == 403:
        verb = "write to" if writing else "read"
        return (
            f"this token may not {verb} {what}",
            "it needs that permission, and you need to be a member of the owner",
        )
    if code == 412:
        return f"{what} was changed by somebody else meanwhile; nothing was pushed", "run it again: it looks anew"
    if code == 429:
        wait = _wished(getattr(e, "response", None))
        return (
            f"the Hub's rate limit is reached ({what})",
            f"try again in {wait:.0f} s" if wait else "try again later",
        )
    if code is not None and code >= 500:
        return f"the Hub fails ({code}) for {what}", "try again later; https://status.huggingface.co"
    if code is not None:
        said = getattr(e, "server_message", None) or _first_line(e)
        return f"the Hub refuses ({code}) {what}: {' '.join(str(said).split())[:300]}", None
    return None


def _repo(what: str) -> str:
    return "/".join(what.partition("@")[0].split("/")[:2])


def _first_line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return (lines[0] if lines else type(e).__name__)[:300]
