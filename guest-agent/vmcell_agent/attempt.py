"""Turns OSError into the sentence a user can act on."""

from __future__ import annotations

from vmcell_protos.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class attempt:  # lower case, because it reads as a verb: `with attempt("mount /proc"):`
    """An OSError inside becomes HostError "<what>: <reason>"; other exceptions pass."""

    __slots__ = ("_code", "_what")

    def __init__(self, what: str, *, code: str = "internal") -> None:
        self._what = what
        self._code = code

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            raise HostError(f"{self._what}: {error.strerror or error}", code=self._code) from error
