"""The zygote's process: one interpreter per node with everything imported, for others to fork from.

It listens once it is warm, waits its turn where another one listens, and is renewed by executing
itself anew: after 100 forks or 10 minutes (children share its address layout and hash seed), on
SIGHUP, and when other code is installed. Meanwhile a fork of the old one serves the same socket,
unless its code is outdated. SIGTERM ends it; what it has forked lives on.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import sys
from contextlib import suppress

from vmcell_protos.errors import CallerError, HostError, VmcellError
from vmcell_protos.zygote import SOCKET_PATH, SOCKET_VARIABLE
from vmcell_shim.installed_code import InstalledCode
from vmcell_shim.listening import listen
from vmcell_shim.title import ROOM, Title

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_runtime.jail import EmptyRoot
    from vmcell_shim.zygote_loop import ZygoteLoop

# With what these import: all that a shim or a VMM may need in its life.
_EVERYTHING = (
    *("json", "traceback", "urllib.parse", "vmcell_protos.bootstrap", "vmcell_runtime.vmm"),
    *("vmcell_shim.delete", "vmcell_shim.info", "vmcell_shim.serve", "vmcell_shim.start"),
)
_INTERNED = 6000
_ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: list[str]) -> int:
    """Runs `argv`, the binary's own name and `zygote`; returns the exit status."""
    script = os.path.abspath(argv[0])
    command = [sys.executable, "-ISB", script, "zygote"]
    try:
        path = _socket_path()
        if argv[2:] and argv[-1] != ROOM:
            raise CallerError(f"zygote takes no arguments, and {argv[2:]} were given")
        if not argv[2:]:
            # Room for the command lines of children.
            os.execv(sys.executable, [*command, ROOM])
        title = Title()
        title.set(command, "vmcell-zygote")
        os.chdir("/")
        inherited = [int(word) for word in argv[2:-1]]
        return _live(path, command, inherited, title)
    except VmcellError as error:
        os.write(2, f"{error}\n".encode(errors="replace"))
        return 1


def _live(path: str, command: list[str], inherited: list[int], title: Title) -> int:
    """`inherited`: the listening socket and the stand-in's pipe, after a renewal."""
    code = InstalledCode(command[2])
    if not inherited:
        _wait_for_other(path)
    for name in _EVERYTHING:
        importlib.import_module(name)
    from vmcell_shim.spares import SIZES_VARIABLE, count_and_sizes, sizes_text
    from vmcell_shim.zygote_child import say
    from vmcell_shim.zygote_loop import CHANGED, STOP, ZygoteLoop

    code.watch_imported()
    if inherited:
        listener = socket.socket(fileno=inherited[0])
        for fd in inherited:
            os.set_inheritable(fd, False)
    else:
        listener = _listen(path)
    loop = ZygoteLoop(listener, code, title, _make_empty_root(), *count_and_sizes())
    _grow_intern_table()
    gc.collect()
    gc.freeze()
    for pipe in inherited[1:]:
        os.close(pipe)  # the stand-in has done its duty
    if not inherited:
        _notify("READY=1")
    say("renewed" if inherited else f"listens on {path}")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDINGS)
    while (why := loop.serve()) != STOP and os.path.exists(command[2]):
        os.environ[SIZES_VARIABLE] = sizes_text(loop.spare_sizes)
        try:
            _renew(loop, listener, command, stand_in=why != CHANGED)
        except OSError as error:
            say(f"cannot renew itself and goes on as it is: {error}")
    with suppress(FileNotFoundError):  # somebody has tidied /run
        os.unlink(path)
    return 0


def _make_empty_root() -> EmptyRoot | None:
    """What all VMMs of this zygote have for their root; None, and each makes its own, without."""
    from vmcell_runtime.jail import make_empty_root
    from vmcell_shim.zygote_child import say

    try:
        return make_empty_root()
    except HostError as error:
        say(f"its VMMs make their roots by themselves: {error}")
        return None


def _grow_intern_table() -> None:
    """Makes room for the strings that children intern: each would get a larger table of its own
    otherwise, 400 KiB of it."""
    for number in range(_INTERNED):
        sys.intern(f"room for {number}")


def _renew(
    loop: ZygoteLoop, listener: socket.socket, command: list[str], *, stand_in: bool
) -> None:
    """Executes the zygote anew. Raises OSError; returns when it has been told to end meanwhile."""
    # What comes from here on waits for the new one's handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
    if loop.is_stopping:
        return
    inherited = [listener.fileno()]
    if stand_in:
        inherited.append(_fork_stand_in(loop))
    try:
        for fd in inherited:
            os.set_inheritable(fd, True)
        os.execv(command[0], [*command, *map(str, inherited), ROOM])
    finally:
        for fd in inherited[1:]:
            os.close(fd)
        listener.set_inheritable(False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDINGS)


def _fork_stand_in(loop: ZygoteLoop) -> int:
    """A descriptor that the stand-in serves until it is closed, or the zygote dies. OSError."""
    until, end = os.pipe()
    if os.fork():
        os.close(until)
        return end
    try:
        os.close(end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDINGS)
        loop.stand_in(until)
    except BaseException:  # noqa: BLE001  there must be no second zygote
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _socket_path() -> str:
    path = os.environ.get(SOCKET_VARIABLE, SOCKET_PATH)
    if not path.startswith("/"):
        raise CallerError(f"{SOCKET_VARIABLE} is {path!r}; name the socket's absolute path")
    return path


def _listen(path: str) -> socket.socket:
    while True:
        listener = listen(path, socket.SOCK_SEQPACKET)
        if listener is not None:
            return socket.socket(fileno=listener.detach())
        _wait_for_other(path)


def _wait_for_other(path: str) -> None:
    """Returns when no zygote listens at `path` (any more)."""
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            try:
                other.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                return
            except OSError as error:
                raise HostError(f"cannot look at {path}: {error}; remove it") from error
            _notify("READY=1\nSTATUS=another zygote listens; waiting for its end")
            try:
                other.recv(1)
            except ConnectionResetError:
                continue


def _notify(state: str) -> None:
    """Tells systemd, or who else started this (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # It serves, whether anybody wants to know or not.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, suppress(OSError):
        sock.sendto(state.encode(), address)
