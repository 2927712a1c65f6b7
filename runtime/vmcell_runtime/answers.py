"""What the shim asks of a running machine: one message, one deed, one answer.

What cannot be done is answered with its error and changes nothing. A message that does not fit the
machine it is sent to is a fault of the shim's code: ValueError, and the process ends.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from functools import partial

from vmcell_protos.errors import CallerError, VmcellError
from vmcell_runtime import control
from vmcell_runtime.machine import Machine
from vmcell_runtime.virtio.balloon import Balloon

Send = Callable[[control.Event], None]

_DESCRIPTORS: dict[type, int] = {
    control.ConnectVsock: 1,
    control.ListenVsock: 1,
    control.PlugPmem: 1,
    control.PlugBlk: 1,
    control.Save: 2,
}
MAX_DESCRIPTORS = max(_DESCRIPTORS.values())


def serve(machine: Machine, request: control.Request, fds: Sequence[int], send: Send) -> None:
    """Does what `request` asks; the answer goes to `send`, now or later on the loop's thread.

    Owns `fds` from the call on. Boot and Restore are no requests to a machine.
    """
    if isinstance(request, control.Boot | control.Restore) or len(fds) != _DESCRIPTORS.get(
        type(request), 0
    ):
        raise ValueError(f"the shim sent {request.kind} with {len(fds)} descriptors")
    if isinstance(request, control.ConnectVsock | control.ListenVsock):
        _join_vsock(machine, request, socket.socket(fileno=fds[0]), send)
        return
    try:
        _do(machine, request, fds, send)
    except VmcellError as error:
        send(control.answered(request.request_id, error))


def _join_vsock(
    machine: Machine,
    request: control.ConnectVsock | control.ListenVsock,
    sock: socket.socket,
    send: Send,
) -> None:
    if machine.vsock is None:
        raise ValueError(f"the shim sent {request.kind} to a machine without vsock")
    if isinstance(request, control.ListenVsock):
        machine.vsock.listen(request.port, sock)
        return

    def tell(error: VmcellError | None) -> None:
        send(control.answered(request.request_id, error))

    machine.vsock.connect(request.port, sock, tell)


def _do(machine: Machine, request: control.Plain, fds: Sequence[int], send: Send) -> None:
    done = partial(send, control.answered(request.request_id))
    match request:
        case control.PlugPmem(window=window):
            machine.hotplug.plug_pmem(window, fds[0])
        case control.PlugBlk(window=window, read_only=read_only):
            machine.hotplug.plug_blk(window, fds[0], read_only=read_only)
        case control.Unplug(window=window):
            machine.hotplug.unplug(window)
        case control.Pause():
            machine.pausing.pause(done)
            return
        case control.Resume():
            machine.shedding.goes_on()
            machine.pausing.resume(done)
            return
        case control.Save():
            send(_save(machine, request.request_id, *fds))
            return
        case control.SetBalloon(mib=mib):
            _balloon(machine).set_wanted(mib)
        case control.GetBalloon():
            send(_balloon_size(machine, request.request_id))
            return
    done()


def _save(machine: Machine, request_id: int, memory_fd: int, state_fd: int) -> control.Saved:
    try:
        memory_bytes = machine.saving.save(memory_fd, state_fd)
    finally:
        os.close(memory_fd)
        os.close(state_fd)
    return control.Saved(request_id=request_id, memory_bytes=memory_bytes)


def _balloon_size(machine: Machine, request_id: int) -> control.BalloonSize:
    balloon = _balloon(machine)
    return control.BalloonSize(
        request_id=request_id, wanted_mib=balloon.wanted_mib, actual_mib=balloon.actual_mib
    )


def _balloon(machine: Machine) -> Balloon:
    if machine.balloon is None:
        raise CallerError(
            "this machine has no balloon; start it with one", code="failed_precondition"
        )
    return machine.balloon
