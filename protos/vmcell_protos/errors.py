"""Whose fault it was: the three error classes that may cross a package border, and their codes.

Every error says what was tried, with which value, and what to do about it, in one sentence.
`GuestError`: the guest broke a rule; the device or the VM stops, the host does not.
`CallerError`: the request was wrong; maps to a ttrpc status or an HTTP status.
`HostError`: the machine did not do what was asked (a system call failed, a file is missing).
Anything else that escapes is a bug of ours and ends the process with a reason.

Codes are those of google.rpc.Code, which ttrpc and Connect share; the HTTP statuses are the
ones the Connect protocol fixes for unary errors.
"""

from __future__ import annotations


class CodeRow:
    """One line of the table: the google.rpc.Code number and the HTTP status of a code name."""

    __slots__ = ("http", "ttrpc")

    def __init__(self, ttrpc: int, http: int) -> None:
        self.ttrpc = ttrpc
        self.http = http


CODES: dict[str, CodeRow] = {
    "canceled": CodeRow(1, 499),
    "unknown": CodeRow(2, 500),
    "invalid_argument": CodeRow(3, 400),
    "deadline_exceeded": CodeRow(4, 504),
    "not_found": CodeRow(5, 404),
    "already_exists": CodeRow(6, 409),
    "permission_denied": CodeRow(7, 403),
    "resource_exhausted": CodeRow(8, 429),
    "failed_precondition": CodeRow(9, 400),
    "aborted": CodeRow(10, 409),
    "out_of_range": CodeRow(11, 400),
    "unimplemented": CodeRow(12, 501),
    "internal": CodeRow(13, 500),
    "unavailable": CodeRow(14, 503),
    "data_loss": CodeRow(15, 500),
    "unauthenticated": CodeRow(16, 401),
}

CODE_NAMES: dict[int, str] = {row.ttrpc: name for name, row in CODES.items()}


class VmcellError(Exception):
    """Base of the three; `code` is a key of CODES, `str(error)` is the sentence for the user."""

    default_code = "unknown"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        if self.code not in CODES:
            raise ValueError(f"unknown error code {self.code!r}")


class GuestError(VmcellError):
    """The guest broke a rule of its hardware or of the agent protocol."""

    default_code = "aborted"


class CallerError(VmcellError):
    """The request cannot be served as asked; the caller can change it."""

    default_code = "invalid_argument"


class HostError(VmcellError):
    """The host could not do it: a system call failed or something it needs is missing."""

    default_code = "unavailable"
