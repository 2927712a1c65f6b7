"""A child of the zygote: an invocation of the binary, or a VMM process.

It has to be what a program started in the ordinary way would be: own session, the caller's world
(vmcell_shim.caller), default signals, no descriptor but those that came with the request. It ends
by itself and never returns to the zygote's loop.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import sys
import threading
from typing import NamedTuple, NoReturn

from vmcell_protos.zygote import DONE, FORK_VMM, FORKED, REFUSED, TAKEN, Answer, encode_answer
from vmcell_runtime import vmm
from vmcell_runtime.jail import EmptyRoot
from vmcell_shim.actions import perform
from vmcell_shim.caller import Caller, World
from vmcell_shim.title import Title
from vmcell_shim.zygote_stub import CHILD_LIFE_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.zygote import Request

_EXIT_UNEXPECTED = 70  # EX_SOFTWARE
_FREE_FD = 10  # above all numbers that are given anew
_VMM_SOCKET_FD = 3
_VMM_ENVIRONMENT = {"LANG": "C.UTF-8"}


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
        _shed(connection, [*fds, *(roots or ())])
        if request.kind == FORK_VMM:
            _be_vmm(heritage, connection, fds, caller)
        else:
            _run(heritage, connection, request, fds, caller)
    except BaseException:  # noqa: BLE001  the interpreter's own way out is the zygote's
        # The VMM has put a hook of its own there, which ends the process.
        sys.excepthook(*sys.exc_info())
        os._exit(_EXIT_UNEXPECTED)
    os._exit(0)


def _shed(connection: socket.socket, fds: list[int]) -> None:
    """Nothing of the zygote's: descriptors, session, signals."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    low = 3
    for fd in sorted((connection.fileno(), *fds)):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))
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


def _be_vmm(heritage: Heritage, connection: socket.socket, fds: list[int], caller: int) -> None:
    if _take_over(heritage.world, connection, caller) is None:
        return
    _replace_environment({os.fsencode(k): os.fsencode(v) for k, v in _VMM_ENVIRONMENT.items()})
    heritage.title.set([sys.executable, "-ISB", "vmcell-vmm"], "vmcell-vmm")
    shim_end, log = map(_out_of_the_way, fds)
    root = heritage.empty_root
    if root is not None:
        root = EmptyRoot(*map(_out_of_the_way, root))
    pidfd = os.pidfd_open(os.getpid())
    _tell(connection, Answer(FORKED, number=os.getpid()), pidfd)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    connection.detach()
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(shim_end, _VMM_SOCKET_FD, inheritable=False)
    vmm.main(_VMM_SOCKET_FD, root)


def _out_of_the_way(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FREE_FD)


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
