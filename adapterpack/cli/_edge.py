"""Where exceptions end: one line on stderr, a hint if there is one, and the exit code."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from adapterpack.errors import AdapterpackError, UsageError, WriteFailed

INTERRUPTED, TERMINATED = 130, 143


class _Terminated(BaseException):
    """SIGTERM, raised so that temporary files are removed on the way out."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def run(cli: click.Group) -> NoReturn:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _terminate)
    as_json = "--json" in sys.argv[1:]
    try:
        # click returns what `ctx.exit` was given: 3 from verify and check.
        code = cli.main(standalone_mode=False) or 0
        sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt) as e:
        code = _fail(as_json, "interrupted", "interrupted; nothing was changed", _note(e), INTERRUPTED)
    except _Terminated as e:
        code = _fail(as_json, "terminated", "terminated; nothing was changed", _note(e), TERMINATED)
    except click.ClickException as e:
        message, hint = e.format_message(), None
        if isinstance(e, click.UsageError) and e.ctx is not None:
            hint = f"{e.ctx.command_path} --help"
        code = _fail(as_json, UsageError.code, message, hint, e.exit_code)
    except (BrokenPipeError, SystemExit):
        # `adapterpack inspect ... | head`: the reader has seen enough. (click itself exits on a closed pipe.)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except AdapterpackError as e:
        _debug()
        code = _fail(as_json, e.code, e.message, e.hint, e.exit_code)
    except OSError as e:
        _debug()
        where = f"{e.filename}: " if e.filename else ""
        code = _fail(as_json, WriteFailed.code, f"{where}{e.strerror or e}", None, 1)
    except MemoryError:
        _debug()
        code = _fail(as_json, "memory", "not enough memory", "one tensor must fit in memory several times", 1)
    except Exception as e:
        _debug()
        message = f"unexpected {type(e).__name__}: {e}".splitlines()[0]
        code = _fail(as_json, "bug", message, "please report this; ADAPTERPACK_DEBUG=1 shows where", 1)
    # Whatever is left goes with the process: to look for garbage in it would take longer than many a verb does.
    gc.freeze()
    sys.exit(code)


def _note(e: BaseException) -> str | None:
    """What was said of an interruption on its way here; click turns a KeyboardInterrupt into its own exception."""
    notes = [note for x in (e, e.__cause__, e.__context__) for note in getattr(x, "__notes__", ())]
    return notes[0] if notes else None


def _debug() -> None:
    if os.environ.get("ADAPTERPACK_DEBUG") == "1":
        raise


def _fail(as_json: bool, code: str, message: str, hint: str | None, exit_code: int) -> int:
    # Late: what succeeds does not need it.
    from adapterpack.hub import client

    # Errors of others end here, too: whatever they quote, no token of the Hub is among it.
    message = client.scrub(" ".join(message.split()))
    if as_json:
        error: dict[str, Any] = {"code": code, "message": message, "hint": hint}
        click.echo(json.dumps({"schema": "adapterpack.error/1", "error": error}, ensure_ascii=False))
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    return exit_code
