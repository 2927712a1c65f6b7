"""Takes the host's stream connections and hands each to who expects its id.

The host dials and writes the id first, 8 bytes little-endian. An id nobody expects, a header that
does not come within its deadline and anything beyond the bound of waiting connections is closed.
"""

from __future__ import annotations

import socket

from vmcell_agent.eventloop import READABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.eventloop import Loop, Timer

HEADER_BYTES = 8
MAX_UNNAMED = 64
HEADER_SECONDS = 10.0


class _Unnamed:
    """A connection whose id has not arrived yet."""

    __slots__ = ("connection", "header", "timer")

    def __init__(self, connection: socket.socket, timer: Timer) -> None:
        self.connection = connection
        self.timer = timer
        self.header = b""


class StreamDoor:
    """Owns the listener and unnamed connections; a named one belongs to the expecting callback."""

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        accepts_peer: Callable[[object], bool],
    ) -> None:
        """`accepts_peer` judges the peer's address (vsock: the host only)."""
        self._loop = loop
        self._listener = listener
        self._accepts_peer = accepts_peer
        self._unnamed: dict[int, _Unnamed] = {}
        self._expected: dict[int, Callable[[socket.socket], None]] = {}
        listener.setblocking(False)
        loop.watch(listener.fileno(), READABLE, self._on_connection)

    def expect(self, stream_id: int, dialled: Callable[[socket.socket], None]) -> bool:
        """Call `dialled` once with the connection of that id; False when the id is taken."""
        if stream_id in self._expected:
            return False
        self._expected[stream_id] = dialled
        return True

    def forget(self, stream_id: int) -> None:
        """Expect that id no longer; nothing happens when it is not expected."""
        self._expected.pop(stream_id, None)

    def close(self) -> None:
        """Close the listener and every unnamed connection; idempotent."""
        for fd in list(self._unnamed):
            self._drop(fd)
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
            data = unnamed.connection.recv(HEADER_BYTES - len(unnamed.header))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        unnamed.header += data
        if not data:
            self._drop(fd)
        elif len(unnamed.header) == HEADER_BYTES:
            stream_id = int.from_bytes(unnamed.header, "little")
            dialled = self._expected.pop(stream_id, None)
            if dialled is None:
                self._drop(fd)
                return
            del self._unnamed[fd]
            unnamed.timer.cancel()
            self._loop.unwatch(fd)
            dialled(unnamed.connection)

    def _drop(self, fd: int) -> None:
        unnamed = self._unnamed.pop(fd, None)
        if unnamed is not None:
            unnamed.timer.cancel()
            self._loop.unwatch(fd)
            unnamed.connection.close()
