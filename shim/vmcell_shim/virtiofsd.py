"""Debian's virtiofsd: one process that serves one directory to one VMM, jailed as far as it goes.

It runs with the sandbox it brings: mount, pid and network namespaces of its own with the shared
directory as root, and nothing else of the host in sight; a seccomp filter; of root's capabilities
those that owning other users' files takes. It is started only where a directory is shared, serves
the one connection it was started with, and ends with it.

Two programs have this name. QEMU's, in C, was Debian 12's (qemu-system-common); the later one, in
Rust, is a package of its own. Both fork: the first process waits, the second serves.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
from contextlib import suppress

from vmcell_protos.errors import HostError
from vmcell_runtime.virtio.vhost_user import FrontEnd
from vmcell_shim.living import Living, identify, kill_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAMS = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
START_TIMEOUT_S = 20.0
KILL_TIMEOUT_S = 2.0
# Each file the guest's kernel remembers is open in the daemon; beyond this the guest gets EMFILE.
OPEN_FILES = 262_144
THREADS = 4
_LISTEN_FD = 3  # in the daemon
_LOG_BYTES = 16 << 10
_SOCKET = "virtiofsd.socket"
# No new device nodes and no file capabilities: a share is nodev and has no extended attributes.
_DROPPED = "-mknod:-setfcap"


def command(program: str, directory: str) -> list[str]:
    """The command line; `directory` becomes the daemon's root, descriptor 3 is where it listens."""
    # Not above what we may have ourselves: not every root may raise it, and the daemon then fails.
    open_files = min(OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    both = [f"--fd={_LISTEN_FD}", f"--thread-pool-size={THREADS}", f"--rlimit-nofile={open_files}"]
    if program.startswith("/usr/lib/qemu/"):
        options = [
            *(f"source={directory}", "sandbox=namespace", "cache=auto", "announce_submounts"),
            *("no_xattr", "no_posix_lock", "no_flock", f"modcaps={_DROPPED}", "log_level=warn"),
        ]
        return [program, *both, *(word for option in options for word in ("-o", option))]
    return [
        *(program, *both, f"--shared-dir={directory}", "--sandbox=namespace", "--seccomp=kill"),
        *("--cache=auto", "--announce-submounts", "--inode-file-handles=never"),
        *(f"--modcaps={_DROPPED}", "--log-level=warn"),
    ]


class Virtiofsd:
    """One running daemon. Owns its processes, and its socket's other end until that is taken.

    `helpers` are its processes, `server_pidfd` names the one whose mount namespace is the share.
    """

    def __init__(self, directory: str, *, programs: Sequence[str] = PROGRAMS) -> None:
        """Starts it and waits until it serves. HostError, and then nothing is left."""
        program = next((path for path in programs if os.path.exists(path)), None)
        if program is None:
            raise HostError(
                f"virtiofsd, which shares live directories, is at none of {', '.join(programs)}; "
                "install it (Debian 12: qemu-system-common, later: virtiofsd)",
                code="failed_precondition",
            )
        self.helpers: list[Living] = []
        self.server_pidfd = self._pidfd = -1
        self._log_fd = _bounded_log()
        listener, self._connection = _connected_pair(os.path.dirname(directory))
        try:
            with listener:
                pid = _spawn(command(program, directory), listener.fileno(), self._log_fd)
            self._pidfd = os.pidfd_open(pid)
            self.helpers.append(identify(pid))
            FrontEnd(self._connection).ask_features(START_TIMEOUT_S)
            server = _only_child(pid)
            self.server_pidfd = os.pidfd_open(server)
            self.helpers.append(identify(server))
        except (OSError, HostError) as error:
            self.kill()
            said = self.last_words
            self.close()
            raise HostError(f"virtiofsd did not start: {error}; it said: {said}") from error

    def take_connection(self) -> socket.socket:
        """The VMM's end of the socket, once, and the caller's to close as soon as the VMM has it:
        the daemon ends when the last copy is closed."""
        return socket.socket(fileno=self._connection.detach())

    def wait_end(self) -> None:
        """Returns when it has ended, and takes its wait status; for one thread."""
        with suppress(ChildProcessError):  # somebody else was first
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)

    @property
    def last_words(self) -> str:
        """What it has logged, as far as there was room."""
        return os.pread(self._log_fd, _LOG_BYTES, 0).rstrip(b"\0").decode(errors="replace").strip()

    def kill(self) -> bool:
        """SIGKILL; False if it has not ended soon: a file system it waits for does not answer."""
        return not kill_all(self.helpers, KILL_TIMEOUT_S)

    def close(self) -> None:
        """Kills it and forgets it; idempotent. Not while a thread is in `wait_end`."""
        if self._log_fd < 0:
            return
        self._connection.close()
        self.kill()
        if self._pidfd >= 0:
            with suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        for fd in (self._pidfd, self.server_pidfd, self._log_fd):
            if fd >= 0:
                os.close(fd)
        self._pidfd = self.server_pidfd = self._log_fd = -1


def _bounded_log() -> int:
    """A file that takes so many bytes, then fails: a guest can make a daemon talk without end."""
    fd = os.memfd_create("virtiofsd.log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _LOG_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd


def _connected_pair(directory: str) -> tuple[socket.socket, socket.socket]:
    """A listening socket with one connection waiting in it, and the other end of that connection.

    The daemons want to accept a connection. Nobody else can make one: the path is gone before the
    daemon starts, and lies in a directory of root's until then. By the descriptor of `directory`,
    because a socket's path has 107 bytes at most.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        path = f"/proc/self/fd/{folder}/{_SOCKET}"
        listener.bind(path)
        try:
            listener.listen(1)
            connection.connect(path)
        finally:
            os.unlink(path)
    except OSError as error:
        listener.close()
        connection.close()
        raise HostError(f"cannot make a socket in {directory}: {error}") from error
    finally:
        os.close(folder)
    return listener, connection


def _spawn(arguments: list[str], listen_fd: int, log_fd: int) -> int:
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, log_fd, 1),
        (os.POSIX_SPAWN_DUP2, log_fd, 2),
        (os.POSIX_SPAWN_DUP2, listen_fd, _LISTEN_FD),
    ]
    signals = [signal.SIGPIPE, signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    return os.posix_spawn(
        arguments[0], arguments, {}, file_actions=actions, setsid=True, setsigdef=signals
    )


def _only_child(pid: int) -> int:
    """The process that `pid` has forked; OSError if there is none, or more than one."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        children = file.read().split()
    if len(children) != 1:
        raise ChildProcessError(f"virtiofsd has {len(children)} child processes instead of one")
    return int(children[0])
