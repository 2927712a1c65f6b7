"""A child of the zygote: an invocation of the binary, a VMM process, or one that waits to be one.

It has to be what a program started in the ordinary way would be: own session, the caller's world
(vmcell_shim.caller), default signals, no descriptor but those that came with the request. It ends
by itself and never returns to the zygote's loop.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import threading
from typing import NamedTuple, NoReturn

from vmcell_protos.errors import VmcellError
from vmcell_protos.zygote import DONE, FORK_VMM, FORKED, REFUSED, TAKEN, Answer, encode_answer
from vmcell_runtime import vmm
from vmcell_runtime.frame import Frame
from vmcell_runtime.jail import EmptyRoot
from vmcell_runtime.size import Size
from vmcell_runtime.spare import make_ready
from vmcell_shim.actions import perform
from vmcell_shim.caller import Caller, World
from vmcell_shim.spares import READY, SPARE_NAME
from vmcell_shim.title import Title
from vmcell_shim.zygote_stub import CHILD_LIFE_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.zygote import Request

_EXIT_UNEXPECTED = 70  # EX_SOFTWARE
_SPARE_NICENESS = 19
_PID_BYTES = 4
_GO_ON = b"go"
_VMM_ENVIRONMENT = {b"LANG": b"C.UTF-8"}


class Heritage(NamedTuple):
    """What the zygote has found out once for all its children."""

    world: World
    title: Title
    empty_root: EmptyRoot | None


def be_child(
    heritage: Heritage, connection: socket.socket, request: Request, fds: list[int], caller: int
) -> NoReturn:
    """Does what `request` of the process `caller` asks, and ends. `fds` came along."""
    try:
        roots = heritage.empty_root if request.kind == FORK_VMM else None
        _shed(connection.fileno(), *fds, *(roots or ()))
        if request.kind == FORK_VMM:
            _be_vmm(heritage, connection, fds, caller, None)
        else:
            _run(heritage, connection, request, fds, caller)
    except BaseException:  # noqa: BLE001  the interpreter's own way out is the zygote's
        # The VMM has put a hook of its own there, which ends the process.
        sys.excepthook(*sys.exc_info())
        os._exit(_EXIT_UNEXPECTED)
    os._exit(0)


def be_spare(heritage: Heritage, control: socket.socket, size: Size) -> NoReturn:
    """Makes itself ready for a machine of `size`, says so on `control`, becomes the VMM of the one
    who is named there, and ends. It ends as well when the other end of `control` is closed."""
    try:
        _shed(control.fileno(), *(heritage.empty_root or ()))
        frame = _ready_frame(heritage, size)
        if frame is None or not _say_ready(control):
            os._exit(1)
        heritage.title.name(SPARE_NAME)
        datagram, fds, _, _ = socket.recv_fds(control, _PID_BYTES, 3, socket.MSG_CMSG_CLOEXEC)
        if datagram:
            connection = socket.socket(fileno=fds.pop(0))
            caller = int.from_bytes(datagram, "little")
            _be_vmm(heritage, connection, fds, caller, (control, frame))
    except BaseException:  # noqa: BLE001  as in be_child
        sys.excepthook(*sys.exc_info())
        os._exit(_EXIT_UNEXPECTED)
    os._exit(0)


def _ready_frame(heritage: Heritage, size: Size) -> Frame | None:
    try:
        # So that its pages are copied now: the caller's world will be much the same.
        heritage.world.take_over(Caller(os.getppid()))
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
        if heritage.world.may_raise_priority:
            os.setpriority(os.PRIO_PROCESS, 0, _SPARE_NICENESS)
        _replace_environment(_VMM_ENVIRONMENT)
        frame = make_ready(size)
        gc.collect()
        gc.freeze()
        os.setpriority(os.PRIO_PROCESS, 0, niceness)  # to be woken at once
    except (OSError, VmcellError) as error:
        say(f"cannot have a spare VMM of {size}: {error}")
        return None
    return frame


def _say_ready(control: socket.socket) -> bool:
    """False if the zygote does not want it any more."""
    try:
        control.send(READY)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def hand_over(
    control: socket.socket, connection: socket.socket, fds: list[int], caller: int
) -> bool:
    """In the zygote: a spare that waits at `control` serves the process `caller` at `connection`.
    It waits for `let_go_on` before it answers. All descriptors stay the zygote's. False if the
    spare is gone."""
    try:
        pid = caller.to_bytes(_PID_BYTES, "little")
        socket.send_fds(control, [pid], [connection.fileno(), *fds], socket.MSG_DONTWAIT)
    except OSError:
        return False
    return True


def let_go_on(control: socket.socket) -> bool:
    """In the zygote, after `hand_over`; False if the spare is gone, and has not answered."""
    try:
        control.send(_GO_ON, socket.MSG_DONTWAIT)
    except OSError:
        return False
    return True


def _shed(*kept: int) -> None:
    """Nothing of the zygote's: descriptors, session, signals."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    vmm.close_others(*kept)
    os.setsid()


def _run(
    heritage: Heritage, connection: socket.socket, request: Request, fds: list[int], caller: int
) -> None:
    # Nothing may come of it once the caller has given up and done it by itself.
    signal.setitimer(signal.ITIMER_REAL, CHILD_LIFE_S)
    _tell(connection, Answer(TAKEN), os.pidfd_open(os.getpid()))
    follows = _take_over(heritage.world, connection, caller)
    if follows is None:
        return
    argv = [os.fsdecode(word) for word in request.argv]
    _replace_environment(dict(pair.split(b"=", 1) for pair in request.environment))
    os.fchdir(fds[0])
    os.close(fds[0])
    heritage.title.set([sys.executable, "-ISB", *argv], follows.name)
    outcome = perform(argv, request.stdin)
    answer = Answer(
        DONE, number=outcome.status, output=outcome.output, errors=outcome.errors[:65536]
    )
    _tell(connection, answer)
    if outcome.serve is None:
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    connection.close()
    outcome.serve()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def _be_vmm(
    heritage: Heritage,
    connection: socket.socket,
    fds: list[int],
    caller: int,
    ready: tuple[socket.socket, Frame] | None,
) -> None:
    """`ready`: a spare's socket to the zygote, and what it has made ready."""
    if _take_over(heritage.world, connection, caller) is None:
        return
    frame = None
    if ready is not None:
        control, frame = ready
        if control.recv(len(_GO_ON)) != _GO_ON:
            return  # the zygote has refused, or is gone
        control.close()
    shim_end, log = fds
    pidfd = os.pidfd_open(os.getpid())
    _tell(connection, Answer(FORKED, number=os.getpid()), pidfd)
    if frame is None:
        vmm.prepare_process()
        _replace_environment(_VMM_ENVIRONMENT)
    heritage.title.set([sys.executable, "-ISB", "vmcell-vmm"], "vmcell-vmm")
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for fd in (null, log, pidfd):
        os.close(fd)
    connection.close()
    shim = socket.socket(fileno=shim_end)
    vmm.end_process_on_surprise(shim)
    vmm.serve(shim, frame, heritage.empty_root)


def _take_over(world: World, connection: socket.socket, pid: int) -> Caller | None:
    """The caller, when this child can stand in for a program it would start; else it is told."""
    caller = None
    try:
        caller = Caller(pid)
        reason = world.difference(caller)
        if not reason:
            world.take_over(caller)
    except OSError as error:
        reason = f"world: {error}"
    if reason:
        text = f"the zygote's child cannot have the {reason} of its caller, process {pid}"
        say(text)
        _tell(connection, Answer(REFUSED, errors=text.encode(errors="replace")))
        return None
    # One who has hung up does it by itself.
    return None if has_hung_up(connection) else caller


def has_hung_up(connection: socket.socket) -> bool:
    """Whether the other end is closed, so that nobody waits for an answer."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


def _replace_environment(variables: dict[bytes, bytes]) -> None:
    os.environb.clear()
    os.environb.update(variables)


def _tell(connection: socket.socket, answer: Answer, *fds: int) -> None:
    try:
        socket.send_fds(connection, [encode_answer(answer)], fds, socket.MSG_DONTWAIT)
    except (BrokenPipeError, ConnectionResetError):
        # Gone; a server that was to be is found by its socket, anything else is done again.
        return


def say(sentence: str) -> None:
    """A line for the zygote's log."""
    os.write(2, f"vmcell-zygote {os.getpid()}: {sentence}\n".encode(errors="replace"))
