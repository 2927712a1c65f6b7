"""Signals to a process of a guest. SIGKILL of an init needs nobody's consent: a guest that does not
carry it out ends with its microVM, and whoever asked does not wait for that."""

from __future__ import annotations

import threading

from vmcell_protos.agent import SignalProcessRequest
from vmcell_protos.errors import CallerError, HostError
from vmcell_protos.wellknown import Empty
from vmcell_shim.client import ConnectionLost
from vmcell_shim.process import SIGKILL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.guest import Guest
    from vmcell_shim.journal import Journal
    from vmcell_shim.process import Process

ANSWER_S = 5.0
# After that SIGKILL is said to be on its way, answered or not.
_SIGKILL_ANSWER_S = 0.5


def send_signal(
    guest: Guest,
    process: Process,
    signal: int,
    *,
    everyone: bool,
    end_s: float,
    journal: Journal,
) -> None:
    """Delivers one signal. Raises VmcellError: not_found when the process has ended with its VM.

    `end_s` is how long an init may take to be gone once the guest has said that it was killed.
    """
    request = SignalProcessRequest(
        container_id=process.container_id, exec_id=process.exec_id, signal=signal, all=everyone
    )
    answered = threading.Event()
    final = signal == SIGKILL and not process.exec_id
    if final:
        # Whatever the guest answers: it may be one that does not want to be killed.
        arguments = (guest, process, answered, end_s, journal)
        threading.Thread(target=_enforce_kill, args=arguments, daemon=True).start()
    try:
        timeout_s = _SIGKILL_ANSWER_S if final else ANSWER_S
        guest.call("SignalProcess", request, Empty, timeout_s)
        answered.set()
    except ConnectionLost as error:
        raise CallerError(f"{process.name} has ended with its VM", code="not_found") from error
    except HostError as error:
        if not final or error.code != "deadline_exceeded":
            raise


def _enforce_kill(
    guest: Guest, process: Process, answered: threading.Event, end_s: float, journal: Journal
) -> None:
    if process.wait_ended(ANSWER_S) or (answered.is_set() and process.wait_ended(end_s)):
        return
    said = "outlives SIGKILL" if answered.is_set() else "is not killed by its guest"
    journal.error(f"{process.name} {said}; killing the microVM")
    guest.kill()
