"""Unix sockets that appear at their path listening, and never in place of one that answers.

Two processes may make the same socket at the same time: two containers of a pod, or a zygote's
child that was given up on and the direct path behind it. So a socket is bound under another name
and linked to its path once it listens; one of them wins, the other finds it. What is dead is
removed under a lock on the directory only.

Part of the path that every task create waits for: built-in modules only.
"""

from __future__ import annotations

import _socket
import errno
import os
import time

from vmcell_protos.errors import HostError

_BACKLOG = 512
_LOCK_TIMEOUT_S = 1.0
_LOCK_STEP_S = 0.005
_TRIES = 10


def listen(path: str, kind: int = _socket.SOCK_STREAM) -> _socket.socket | None:
    """A listening socket at `path` with mode 0600, or None when one answers there already.

    The socket's own name (getsockname) is not `path`. Raises HostError.
    """
    listener = _socket.socket(_socket.AF_UNIX, kind)
    try:
        os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
        published = _publish(listener, path, kind)
    except OSError as error:
        listener.close()
        raise HostError(f"cannot listen on {path}: {error}") from error
    except HostError:
        listener.close()
        raise
    if published:
        return listener
    listener.close()
    return None


def answers(path: str, kind: int = _socket.SOCK_STREAM) -> bool:
    """Whether a server listens on the socket at `path`; one with a full queue does."""
    probe = _socket.socket(_socket.AF_UNIX, kind)
    try:
        probe.setblocking(False)
        probe.connect(path)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        probe.close()
    return True


def remove_dead(path: str, kind: int = _socket.SOCK_STREAM) -> None:
    """Removes the socket at `path` unless it answers; no error where there is none. HostError."""
    try:
        directory = _lock(os.path.dirname(path))
        try:
            if not answers(path, kind):
                os.unlink(path)
        finally:
            os.close(directory)
    except FileNotFoundError:
        # Its server was first.
        return
    except OSError as error:
        raise HostError(f"cannot remove the dead socket {path}: {error}") from error


def _publish(listener: _socket.socket, path: str, kind: int) -> bool:
    temporary = os.path.join(os.path.dirname(path), f".{os.getpid()}")
    _bind(listener, temporary)
    try:
        listener.listen(_BACKLOG)
        for _ in range(_TRIES):
            try:
                os.link(temporary, path)
            except FileExistsError:
                if answers(path, kind):
                    return False
                remove_dead(path, kind)
            else:
                return True
    finally:
        os.unlink(temporary)
    raise OSError(f"dead sockets appeared there {_TRIES} times")


def _bind(listener: _socket.socket, temporary: str) -> None:
    umask = os.umask(0o177)
    try:
        try:
            listener.bind(temporary)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # From a process of this number that was killed half-way; only we have the number now.
            os.unlink(temporary)
            listener.bind(temporary)
    finally:
        os.umask(umask)


def _lock(directory: str) -> int:
    """A descriptor that holds the directory's lock until it is closed; raises OSError."""
    import fcntl

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise
            time.sleep(_LOCK_STEP_S)
        else:
            return fd
