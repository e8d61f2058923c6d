"""One error tree; the command line maps it to exit codes at its edge, once.

AdapterpackError              exit 1   cannot be done
├── UsageError                exit 2   the call itself is wrong
├── InvalidFile               exit 1   malformed, truncated or hostile input
│   └── ChangedWhileReading   exit 1   somebody else writes the file that we read
├── Unsupported               exit 1   well-formed, but nothing that this version can treat right
│   ├── NoMergedWeight        exit 1   no single weight does what it does, or PEFT has none
│   └── PickleRefused         exit 1   code may hide in it
├── MissingReference          exit 1   a pack's parent or base is not at hand
├── DestinationExists         exit 1   DST is there and --overwrite was not given
├── WrongBase                 exit 1   the base lacks modules, or has other shapes
├── NothingChanged            exit 1   a merge that would write the base again
├── WriteFailed               exit 1   no space, no permission, ...
├── HubError                  exit 1   the Hub does not answer, refuses, or has no such thing
├── Unhealthy                 exit 1   an adapter with faults that nobody should be sent
└── LossRefused               exit 4   more would be lost than was allowed
"""

from __future__ import annotations


class AdapterpackError(Exception):
    """Something cannot be done.

    Args:
        message: What is wrong and where, in one line.
        hint: What the user can do about it, in one line.
    """

    code = "failed"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(AdapterpackError):
    code = "usage"
    exit_code = 2


class InvalidFile(AdapterpackError):
    code = "invalid"


class ChangedWhileReading(InvalidFile):
    code = "changed-while-reading"


class Unsupported(AdapterpackError):
    code = "unsupported"


class NoMergedWeight(Unsupported):
    code = "no-merged-weight"


class PickleRefused(Unsupported):
    code = "pickle-refused"


class MissingReference(AdapterpackError):
    code = "missing-reference"


class DestinationExists(AdapterpackError):
    code = "exists"


class WrongBase(AdapterpackError):
    code = "wrong-base"


class NothingChanged(AdapterpackError):
    code = "nothing-changed"


class WriteFailed(AdapterpackError):
    code = "write-failed"


class HubError(AdapterpackError):
    code = "hub"


class Unhealthy(AdapterpackError):
    code = "unhealthy"


class LossRefused(AdapterpackError):
    code = "loss-refused"
    exit_code = 4
