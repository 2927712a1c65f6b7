"""containerd's standard streams on the host: FIFOs and log files.

Rules (reference: shim-contract 3.1, containerd pkg/cio, kata #1659, #439, #11747):
every open is non-blocking; of stdout and stderr a read end is kept too, so that a reader that goes
away (a restart of containerd, a detached client) is no EPIPE for the workload; of stdin a write end
is kept, so that a detached client is no end of input: CloseIO closes it. What is unread in a FIFO
vanishes with its last descriptor, so an output is held until somebody has it open again.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import termios
import threading
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
        self._given_up = False
        # The read end first: opening the write end needs a reader.
        self._keep = _open_fifo(path, os.O_RDONLY)
        try:
            self.fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            os.close(self._keep)
            raise

    def let_go(self) -> bool:
        """Nothing more will be written. True when it is closed; False while it holds what nobody
        is there to read: then linger() waits for a reader."""
        with self._lock:
            if not self._given_up and self._is_unread():
                self._forget_reader()
                if not self._has_reader():
                    return False
        self.close()
        return True

    def linger(self) -> None:
        """Waits until a client has opened the FIFO, who then has what is in it, or until
        give_up(); then closes it."""
        # Opening a write end blocks until there is a reader (fifo(7)), and nothing else tells.
        os.close(os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY))
        self.close()

    def give_up(self) -> None:
        """linger() ends now, or will not begin; what is unread is lost. From any thread."""
        with self._lock:
            self._given_up = True
            if self.fd >= 0 and self._keep < 0:
                self._keep = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_NONBLOCK)

    def close(self) -> None:
        with self._lock:
            self._forget_reader()
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1

    def _forget_reader(self) -> None:
        if self._keep >= 0:
            os.close(self._keep)
            self._keep = -1

    def _is_unread(self) -> bool:
        unread = array("i", [0])
        fcntl.ioctl(self.fd, termios.FIONREAD, unread)
        return bool(unread[0])

    def _has_reader(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, 0)
        # POLLERR on the writing end: no reader (pipe(7)).
        return not poll.poll(0)


class Sink:
    """An output that is always read: nobody has to be waited for. Owns `fd` until close()."""

    is_pipe: bool

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def let_go(self) -> bool:
        """What was written stays for whoever reads it."""
        self.close()
        return True

    def linger(self) -> None:
        """There is no reader to wait for."""

    def give_up(self) -> None:
        """There is no reader to wait for."""

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class OutputFile(Sink):
    """A `file://` log: appended to, its parents made; both streams may share one."""

    is_pipe = False

    def __init__(self, path: str) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # Without blocking, for the path may be a FIFO after all.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK
        super().__init__(os.open(path, flags, 0o644))


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


def scheme_of(target: str) -> str:
    """The scheme of a URI; "" for a plain path, which names a FIFO."""
    scheme, separator, _ = target.partition("://")
    return scheme if separator else ""


def path_of(name: str, uri: str) -> str:
    """The absolute path of a URI, percent-decoded, without its query. Raises CallerError.

    `name` is the stream's, for the error.
    """
    # Few containers have a URI, and the import takes longer than anything else in here.
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(uri)
    path = unquote(parts.path)
    if parts.netloc or not path.startswith("/") or "\0" in path:
        raise CallerError(
            f"{name} is {uri!r}, which names no absolute path; use {parts.scheme}:///path"
        )
    return path


def open_output(name: str, target: str) -> OutputFifo | OutputFile | None:
    """`target` as in Task.Create: "" (no stream), a FIFO's path, `fifo://` or `file://`.

    Raises CallerError, for an unknown scheme too.
    """
    if not target:
        return None
    scheme = scheme_of(target)
    if scheme not in ("", "file", "fifo"):
        raise CallerError(
            f"{name} is {target!r}; vmcell does not know {scheme}://, use a FIFO, file://, "
            "binary:// or binary-v2://",
            code="unimplemented",
        )
    path = path_of(name, target) if scheme else target
    try:
        return OutputFile(path) if scheme == "file" else OutputFifo(path)
    except OSError as error:
        raise CallerError(f"cannot open {name} {target}: {error}") from error


def _open_fifo(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileExistsError(f"{path} is there but is no FIFO")
    return fd
