"""Logging programs: `binary://` and `binary-v2://` as stdout or stderr of a process.

The URI names a program and its arguments (`binary:///path?k=v&k2=v2` runs `path k v k2 v2`). Its
environment is CONTAINER_ID and CONTAINER_NAMESPACE and nothing else. It reads stdout from
descriptor 3 and stderr from 4, and says by one byte in 5, or by closing it, that it is ready (v2:
the byte is mandatory, so that a program that crashes at once is no ready one). One program takes
both streams of a process when both have the same URI.
Source: containerd pkg/process/io.go, runtime/v2/logging; reference: shim-contract 3.2.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import threading
import time

from vmcell_protos.errors import CallerError
from vmcell_shim.fifo import Sink, path_of, scheme_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMES = ("binary", "binary-v2")
READY_S = 10.0
# A program that ends by itself at the end of its input is not cut short by a signal.
EOF_S = 1.0
TERM_S = 12.0
_KILL_S = 5.0
# The program's descriptors are 3, 4 and 5; nothing that is handed to it may stand there before.
_FIRST_FREE_FD = 6


class LogPipe(Sink):
    """The end of a pipe to a logging program that the shim writes to. Owned until close()."""

    is_pipe = True

    def __init__(self, fd: int, on_close: Callable[[], None]) -> None:
        super().__init__(fd)
        self._on_close = on_close
        os.set_blocking(fd, False)

    def close(self) -> None:
        if self.fd >= 0:
            super().close()
            self._on_close()


class LogBinary:
    """One running logging program. It is ended once all its pipes are closed; close() waits."""

    def __init__(
        self,
        uri: str,
        streams: tuple[str, ...],
        *,
        container_id: str,
        namespace: str,
        warn: Callable[[str], None],
    ) -> None:
        """Starts it. `streams`: those of "stdout" and "stderr" that it gets; the other one has
        ended already. `warn` is told how it ended, when not well. Raises CallerError."""
        self._path, arguments = command_of(uri)
        self._needs_byte = scheme_of(uri) == "binary-v2"
        self._warn = warn
        self._lock = threading.Lock()
        self._ending: threading.Thread | None = None
        self._open = len(streams)
        environment = {"CONTAINER_ID": container_id, "CONTAINER_NAMESPACE": namespace}
        pipes = {name: os.pipe() for name in ("stdout", "stderr", "ready")}
        theirs = (pipes["stdout"][0], pipes["stderr"][0], pipes["ready"][1])
        try:
            self.pid, self._pidfd = _spawn([self._path, *arguments], environment, theirs)
        except OSError as error:
            for fd in (fd for pipe in pipes.values() for fd in pipe if fd not in theirs):
                os.close(fd)
            raise CallerError(f"cannot run the logging binary {self._path}: {error}") from error
        finally:
            for fd in theirs:
                os.close(fd)
        self._ready = pipes["ready"][0]
        self.pipes: dict[str, LogPipe] = {}
        for name in ("stdout", "stderr"):
            if name in streams:
                self.pipes[name] = LogPipe(pipes[name][1], self._closed_one)
            else:
                os.close(pipes[name][1])

    def wait_ready(self) -> None:
        """Returns once the program is ready; raises CallerError otherwise. Idempotent."""
        with self._lock:
            ready, self._ready = self._ready, -1
        if ready < 0:
            return
        try:
            word = _read_byte(ready, READY_S)
        finally:
            os.close(ready)
        if word is None:
            raise CallerError(
                f"the logging binary {self._path} was not ready within {READY_S:g} s; it has to "
                "write one byte to descriptor 5" + ("" if self._needs_byte else ", or close it"),
                code="deadline_exceeded",
            )
        if not word and (self._needs_byte or self._has_ended(0)):
            self._has_ended(EOF_S)
            raise CallerError(
                f"the logging binary {self._path} closed descriptor 5 and was not ready; see its "
                "own log",
                code="failed_precondition",
            )

    def close(self) -> None:
        """Closes what is open and waits until the program is gone. Idempotent."""
        for pipe in self.pipes.values():
            pipe.close()
        with self._lock:
            ending = self._ending
        if ending is not None:
            ending.join(EOF_S + TERM_S + _KILL_S)

    def _closed_one(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open:
                return
            self._ending = threading.Thread(target=self._end, name="end-logger", daemon=True)
            self._ending.start()

    def _end(self) -> None:
        """Its input has ended: so does the program, at last by force."""
        with self._lock:
            ready, self._ready = self._ready, -1
        if ready >= 0:
            os.close(ready)
        for number, timeout_s in ((0, EOF_S), (signal.SIGTERM, TERM_S), (signal.SIGKILL, _KILL_S)):
            if number:
                signal.pidfd_send_signal(self._pidfd, number)
            if self._has_ended(timeout_s):
                break
        else:
            self._warn(f"the logging binary {self._path} (pid {self.pid}) outlives SIGKILL")
            return
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pidfd)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, -signal.SIGTERM):
            how = f"status {code}" if code > 0 else f"signal {-code}"
            self._warn(f"the logging binary {self._path} ended with {how}")

    def _has_ended(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))


def command_of(uri: str) -> tuple[str, list[str]]:
    """The program's path and its arguments: each key of the query and its first value, in order.
    Raises CallerError."""
    from urllib.parse import parse_qsl, urlsplit

    path = path_of("the log URI", uri)
    pairs: dict[str, str] = {}
    for key, value in parse_qsl(urlsplit(uri).query, keep_blank_values=True):
        pairs.setdefault(key, value)
    arguments = [word for pair in pairs.items() for word in pair]
    if any("\0" in word for word in arguments):
        raise CallerError(f"the log URI {uri!r} has a null byte in its query")
    return path, arguments


def _spawn(
    command: list[str], environment: dict[str, str], fds: tuple[int, int, int]
) -> tuple[int, int]:
    """The pid and a pidfd of `command` with `fds` as 3, 4 and 5 and no other; raises OSError."""
    moved: list[int] = []
    try:
        for fd in fds:
            moved.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD))
        pid = os.posix_spawn(
            command[0],
            command,
            environment,
            file_actions=[
                *((os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)),
                *((os.POSIX_SPAWN_DUP2, fd, 3 + place) for place, fd in enumerate(moved)),
            ],
            setpgroup=0,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP],
        )
    finally:
        for fd in moved:
            os.close(fd)
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _read_byte(fd: int, timeout_s: float) -> bytes | None:
    """One byte, b"" at the end, None when neither came in time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    until = time.monotonic() + timeout_s
    while (left_s := until - time.monotonic()) > 0:
        if poll.poll(left_s * 1000):
            return os.read(fd, 1)
    return None
