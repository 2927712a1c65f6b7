"""The shim binary's main: one action, one answer on stdout, one sentence on stderr when it fails.

Only what every action needs is imported here; the server's modules come in its own process.
"""

from __future__ import annotations

import os

from vmcell_protos.errors import VmcellError
from vmcell_shim.args import check_identity, parse_args

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.args import Invocation


def main(argv: list[str]) -> int:
    """Runs `argv` (with the program's name); returns the exit status."""
    try:
        invocation = parse_args(argv[1:])
        answer = _act(invocation, argv[0])
    except VmcellError as error:
        os.write(2, f"{error}\n".encode())
        return 1
    if answer:
        os.write(1, answer)
    return 0


def _act(invocation: Invocation, program: str) -> bytes:
    if invocation.version or invocation.info:
        from vmcell_shim.info import runtime_info, version_text

        return version_text(program) if invocation.version else runtime_info()
    check_identity(invocation)
    if invocation.action == "start":
        from vmcell_shim.start import start

        return start(invocation)
    if invocation.action == "delete":
        from vmcell_shim.delete import delete

        return delete(invocation.bundle or os.getcwd())
    from vmcell_protos.errors import CallerError

    raise CallerError("no action is given; containerd runs this binary with start or delete")
