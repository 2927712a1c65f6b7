"""Takes connections of the host's and reads what each says first: a header of fixed length.

A header that does not come within its deadline, and anything beyond the bound of connections that
have not said theirs, is closed.
"""

from __future__ import annotations

import socket

from vmcell_agent.eventloop import READABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.eventloop import Loop, Timer

MAX_UNNAMED = 64
HEADER_SECONDS = 10.0


class _Unnamed:
    """A connection whose header has not arrived yet."""

    __slots__ = ("connection", "header", "timer")

    def __init__(self, connection: socket.socket, timer: Timer) -> None:
        self.connection = connection
        self.timer = timer
        self.header = b""


class Door:
    """Owns the listener and unnamed connections; a named one belongs to `named`."""

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        accepts_peer: Callable[[object], bool],
        header_bytes: int,
        named: Callable[[socket.socket, bytes], None],
    ) -> None:
        """`accepts_peer` judges the peer's address (vsock: the host only); `named` gets each
        non-blocking connection with its header."""
        self._loop = loop
        self._listener = listener
        self._accepts_peer = accepts_peer
        self._header_bytes = header_bytes
        self._named = named
        self._unnamed: dict[int, _Unnamed] = {}
        listener.setblocking(False)
        loop.watch(listener.fileno(), READABLE, self._on_connection)

    def drop_unnamed(self) -> None:
        """Close every connection that has not said its header."""
        for fd in list(self._unnamed):
            self._drop(fd)

    def close(self) -> None:
        """Close the listener and every unnamed connection; idempotent."""
        self.drop_unnamed()
        if self._listener.fileno() >= 0:
            self._loop.unwatch(self._listener.fileno())
            self._listener.close()

    def _on_connection(self, events: int) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError:  # nobody there any more; EMFILE is kept away by the bounds on all tables
            return
        if len(self._unnamed) >= MAX_UNNAMED or not self._accepts_peer(address):
            connection.close()
            return
        connection.setblocking(False)
        fd = connection.fileno()
        timer = self._loop.call_later(HEADER_SECONDS, lambda: self._drop(fd))
        self._unnamed[fd] = _Unnamed(connection, timer)
        self._loop.watch(fd, READABLE, lambda _: self._on_header(fd))

    def _on_header(self, fd: int) -> None:
        unnamed = self._unnamed[fd]
        try:
            data = unnamed.connection.recv(self._header_bytes - len(unnamed.header))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        unnamed.header += data
        if not data:
            self._drop(fd)
        elif len(unnamed.header) == self._header_bytes:
            del self._unnamed[fd]
            unnamed.timer.cancel()
            self._loop.unwatch(fd)
            self._named(unnamed.connection, unnamed.header)

    def _drop(self, fd: int) -> None:
        unnamed = self._unnamed.pop(fd, None)
        if unnamed is not None:
            unnamed.timer.cancel()
            self._loop.unwatch(fd)
            unnamed.connection.close()
