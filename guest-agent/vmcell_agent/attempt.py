"""Turns OSError into the sentence a user can act on."""

from __future__ import annotations

from vmcell_protos.errors import HostError


class attempt:  # lower case, because it reads as a verb: `with attempt("mount /proc"):`
    """An OSError inside becomes HostError "<what>: <reason>"; other exceptions pass."""

    __slots__ = ("_code", "_what")

    def __init__(self, what: str, *, code: str = "internal") -> None:
        self._what = what
        self._code = code

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise HostError(f"{self._what}: {error.strerror or error}", code=self._code) from error
