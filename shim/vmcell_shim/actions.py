"""One action of the binary and what comes of it; who prints the answer decides how it ends.

The direct path prints it and leaves the server to a child; the zygote's child hands it to the
binary that asked, and becomes the server itself. Only what the action needs is imported.
"""

from __future__ import annotations

import os

from vmcell_protos.errors import CallerError, VmcellError
from vmcell_shim.args import check_identity, parse_args

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_shim.args import Invocation


class Outcome:
    """What to print, the exit status, and the server to become behind the answer, if there is one
    to become."""

    __slots__ = ("errors", "output", "serve", "status")

    def __init__(
        self,
        status: int,
        output: bytes = b"",
        errors: bytes = b"",
        serve: Callable[[], None] | None = None,
    ) -> None:
        self.status = status
        self.output = output
        self.errors = errors
        self.serve = serve


def perform(argv: list[str], stdin: bytes) -> Outcome:
    """Runs the action of `argv` (with the program's name) in the current directory."""
    try:
        return _act(parse_args(argv[1:]), argv[0], stdin)
    except VmcellError as error:
        return Outcome(1, errors=f"{error}\n".encode(errors="replace"))


def _act(invocation: Invocation, program: str, stdin: bytes) -> Outcome:
    if invocation.version or invocation.info:
        from vmcell_shim.info import runtime_info, version_text

        return Outcome(0, version_text(program) if invocation.version else runtime_info())
    check_identity(invocation)
    if invocation.action == "start":
        return _start(invocation, stdin)
    if invocation.action == "delete":
        from vmcell_shim.delete import delete

        return Outcome(0, delete(invocation.bundle or os.getcwd()))
    raise CallerError("no action is given; containerd runs this binary with start or delete")


def _start(invocation: Invocation, stdin: bytes) -> Outcome:
    from vmcell_shim.start import become_server, start

    bundle = os.getcwd()
    started = start(invocation, stdin)
    if started.listener is None:
        return Outcome(0, started.answer)
    return Outcome(0, started.answer, serve=lambda: become_server(started, invocation, bundle))
