"""A template's start command, and the command that says when it is ready.

Without a ready command a template is ready as soon as its start command runs: E2B waits 20 seconds
then, but a snapshot pays for them once, and here each create would. Whoever needs a wait says so by
a ready command, `sleep 20` included.
"""

from __future__ import annotations

import threading
import time

from vmcell_api.node.guest_process import Command, CommandRefused, GuestProcesses
from vmcell_protos.errors import HostError, VmcellError

READY_PAUSE_S = 0.5


def start(guest: GuestProcesses, command: Command, *, deadline: float) -> None:
    """Starts the command and leaves it running; raises HostError when it cannot be started."""
    try:
        guest.start(command, deadline=deadline)
    except VmcellError as error:
        raise HostError(
            f"the start command {_short(command)} could not be started: {error}", code="internal"
        ) from error


def wait_ready(
    guest: GuestProcesses,
    command: Command,
    *,
    deadline: float,
    failed: threading.Event | None = None,
) -> None:
    """Asks until the ready command ends with 0; raises HostError at the deadline.

    `failed` is set by whoever knows that it will never be.
    """
    pause = failed or threading.Event()
    words, status = bytearray(), 0
    while True:
        words.clear()
        try:
            status = guest.run(
                command, deadline=deadline, on_output=lambda _, data: words.extend(data[:2000])
            )
        except CommandRefused as error:
            raise HostError(
                f"the ready command {_short(command)} could not be started: {error}",
                code="internal",
            ) from error
        except HostError as error:
            if error.code != "deadline_exceeded":
                raise
            status = -1
        if status == 0:
            return
        if time.monotonic() + READY_PAUSE_S > deadline:
            tail = bytes(words[-500:]).decode("utf-8", "replace").strip()
            ending = "it did not end" if status < 0 else f"its last exit status was {status}"
            raise HostError(
                f"the ready command {_short(command)} did not succeed in time; {ending}"
                + (f": {tail}" if tail else ""),
                code="internal",
            )
        if pause.wait(READY_PAUSE_S):
            raise HostError("the start command ended before the template was ready")


def _short(command: Command) -> str:
    return repr(command.text[:120])
