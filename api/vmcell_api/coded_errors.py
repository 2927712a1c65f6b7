"""Errors that E2B has a word for: `error_code` in the body, and what clients do about them."""

from __future__ import annotations

from vmcell_protos.errors import CallerError, HostError, VmcellError


class CodedError(VmcellError):
    """`status`: the HTTP status, None for that of `code`; `retry`: asking again soon may help."""

    def __init__(
        self,
        message: str,
        *,
        error_code: str,
        code: str | None = None,
        status: int | None = None,
        retry: bool = False,
    ) -> None:
        super().__init__(message, code=code)
        self.error_code = error_code
        self.status = status
        self.retry = retry


class CodedCallerError(CodedError, CallerError):
    """The request cannot be served as asked."""


class CodedHostError(CodedError, HostError):
    """The host could not do it."""
