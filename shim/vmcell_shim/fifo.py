"""containerd's standard streams on the host: FIFOs and log files.

Rules (reference: shim-contract 3.1, containerd pkg/cio, kata #1659, #439, #11747):
every open is non-blocking; of stdout and stderr a read end is kept too, so that a reader that goes
away (a restart of containerd, a detached client) is no EPIPE for the workload; of stdin a write end
is kept, so that a detached client is no end of input: CloseIO closes it.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import termios
import threading
import time
from array import array

from vmcell_protos.errors import CallerError


class StdinFifo:
    """The reading side of a container's stdin. Owns its descriptors until close()."""

    def __init__(self, path: str) -> None:
        self.fd = _open_fifo(path, os.O_RDONLY)
        try:
            self._keep = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            os.close(self.fd)
            raise

    def end_input(self) -> None:
        """What is in the FIFO can still be read; then its end, once the client has closed too."""
        if self._keep >= 0:
            os.close(self._keep)
            self._keep = -1

    def close(self) -> None:
        self.end_input()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class OutputFifo:
    """The writing side of stdout or stderr. Owns its descriptors until close()."""

    is_pipe = True

    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        # The read end first: opening the write end needs a reader.
        self._keep = _open_fifo(path, os.O_RDONLY)
        try:
            self.fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            os.close(self._keep)
            raise

    def forget_reader(self) -> None:
        """From now on a client that is gone shows as EPIPE instead of a full pipe."""
        with self._lock:
            if self._keep >= 0:
                os.close(self._keep)
                self._keep = -1

    def wait_reader(self, timeout_s: float) -> None:
        """What is in the pipe lives as long as somebody has it open: a client that is still on its
        way to open it gets `timeout_s`. Returns at once when there is a reader or nothing to read.
        """
        self.forget_reader()
        unread = array("i", [0])
        fcntl.ioctl(self.fd, termios.FIONREAD, unread)
        poll = select.poll()
        poll.register(self.fd, 0)
        until = time.monotonic() + timeout_s
        # POLLERR on the writing end: no reader (pipe(7)). Nothing tells when one comes.
        while unread[0] and poll.poll(0) and time.monotonic() < until:
            time.sleep(0.01)

    def close(self) -> None:
        self.forget_reader()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class OutputFile:
    """A `file://` log: appended to, its parents made; both streams may share one."""

    is_pipe = False

    def __init__(self, path: str) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def forget_reader(self) -> None:
        """A file has no reader that could go away."""

    def wait_reader(self, timeout_s: float) -> None:
        """What is in a file stays there."""

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


Output = OutputFifo | OutputFile


def check_stdin(path: str) -> None:
    """Raises CallerError unless `path` is "" (no stream) or a FIFO; opens nothing."""
    try:
        if path and not stat.S_ISFIFO(os.stat(path).st_mode):
            raise CallerError(f"stdin {path} is there but is no FIFO")
    except OSError as error:
        raise CallerError(f"cannot open stdin {path}: {error}") from error


def open_stdin(path: str) -> StdinFifo | None:
    """None for "" (no stream). Raises CallerError."""
    if not path:
        return None
    try:
        return StdinFifo(path)
    except OSError as error:
        raise CallerError(f"cannot open stdin {path}: {error}") from error


def open_output(name: str, target: str) -> Output | None:
    """`target` as in Task.Create: "" (no stream), a FIFO's path or a URI. Raises CallerError."""
    if not target:
        return None
    scheme, separator, path = target.partition("://")
    if separator and scheme not in ("file", "fifo"):
        raise CallerError(
            f"{name} is {target!r}; logging by {scheme}:// is not in this version of vmcell, "
            "use a FIFO or file://",
            code="unimplemented",
        )
    try:
        if separator and scheme == "file":
            return OutputFile(path)
        return OutputFifo(path if separator else target)
    except OSError as error:
        raise CallerError(f"cannot open {name} {target}: {error}") from error


def _open_fifo(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileExistsError(f"{path} is there but is no FIFO")
    return fd
