"""Port forwards: a connection of the host's, joined to a TCP port of the guest's own loopback.

The host dials and writes the port first, 2 bytes little-endian. 127.0.0.1 is tried, then ::1; a
port where nobody listens is a closed connection.

    CONNECTING --127.0.0.1 or ::1 answers--> JOINED --both directions have ended--> CLOSED
    CONNECTING --refused by both, deadline-> CLOSED
    JOINED --the host has closed altogether-> CLOSED

A half-close passes through in either direction. vsock shows whoever polls no difference between a
peer that has half closed and one that is gone; sending nothing does (EPIPE, af_vsock.c), so that is
tried whenever the state of a half-closed connection changes.
"""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress

from vmcell_agent.door import Door
from vmcell_agent.eventloop import WRITABLE
from vmcell_agent.pump import ENDED, Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.eventloop import Loop, Timer

HEADER_BYTES = 2
MAX_FORWARDS = 128
CONNECT_SECONDS = 5.0
_LOOPBACK = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


class PortDoor:
    """Owns the listener and every forward; `close` is idempotent."""

    def __init__(
        self, loop: Loop, listener: socket.socket, accepts_peer: Callable[[object], bool]
    ) -> None:
        """`accepts_peer` judges the peer's address (vsock: the host only)."""
        self._loop = loop
        self._forwards: set[_Forward] = set()
        self._door = Door(loop, listener, accepts_peer, HEADER_BYTES, self._on_named)

    def forget_host(self) -> None:
        """Close every connection of a host that is gone."""
        self._door.drop_unnamed()
        for forward in list(self._forwards):
            forward.close()

    def close(self) -> None:
        self._door.close()
        self.forget_host()

    def _on_named(self, connection: socket.socket, header: bytes) -> None:
        port = int.from_bytes(header, "little")
        if not port or len(self._forwards) >= MAX_FORWARDS:
            connection.close()
            return
        forward = _Forward(self._loop, connection, port, self._forwards.discard)
        self._forwards.add(forward)
        forward.connect()


class _Forward:
    """One connection and its way to the port."""

    def __init__(
        self,
        loop: Loop,
        host: socket.socket,
        port: int,
        closed: Callable[[_Forward], None],
    ) -> None:
        self._loop = loop
        self._host = host
        self._port = port
        self._closed = closed
        self._untried = list(_LOOPBACK)
        self._local: socket.socket | None = None
        self._inward: Pump | None = None
        self._outward: Pump | None = None
        self._host_state = -1  # a descriptor of its own, watched for changes of the host's end
        self._timer: Timer = loop.call_later(CONNECT_SECONDS, self.close)

    def connect(self) -> None:
        """Try the next address; without one left the forward is closed."""
        if self._local is not None:
            self._loop.unwatch(self._local.fileno())
            self._local.close()
            self._local = None
        while self._untried:
            family, address = self._untried.pop(0)
            try:
                local = socket.socket(family, socket.SOCK_STREAM)
            except OSError:  # a kernel without this family
                continue
            local.setblocking(False)
            try:
                local.connect((address, self._port))
            except BlockingIOError:
                pass
            except OSError:
                local.close()
                continue
            self._local = local
            self._loop.watch(local.fileno(), WRITABLE, self._on_connected)
            return
        self.close()

    def _on_connected(self, events: int) -> None:
        local = self._local
        assert local is not None
        if local.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.connect()
            return
        try:
            local.getpeername()
        except OSError:  # woken for nothing
            return
        self._timer.cancel()
        self._loop.unwatch(local.fileno())
        self._inward = self._pump(self._host, local)
        self._outward = self._pump(local, self._host)

    def _pump(self, source: socket.socket, sink: socket.socket) -> Pump:
        def half_close() -> None:
            with suppress(OSError):  # the other end was first
                sink.shutdown(socket.SHUT_WR)

        return Pump(
            self._loop,
            os.dup(source.fileno()),
            sink.fileno(),
            end_sink=half_close,
            progressed=self._changed,
            drain=False,
        )

    def _changed(self) -> None:
        if self._inward is None or self._outward is None or self._inward.state != ENDED:
            return
        if self._outward.state == ENDED:
            self.close()
        elif self._host_state < 0:
            self._host_state = os.dup(self._host.fileno())
            events = select.EPOLLRDHUP | select.EPOLLET  # the edge comes with each change
            self._loop.watch(self._host_state, events, self._on_host_state)

    def _on_host_state(self, events: int) -> None:
        try:
            self._host.send(b"")
        except OSError:
            events |= select.EPOLLHUP
        if events & (select.EPOLLHUP | select.EPOLLERR):
            self.close()

    def close(self) -> None:
        """Idempotent."""
        self._timer.cancel()
        pumps, self._inward, self._outward = (self._inward, self._outward), None, None
        for pump in pumps:
            if pump is not None:
                pump.close()
        if self._host_state >= 0:
            self._loop.unwatch(self._host_state)
            os.close(self._host_state)
            self._host_state = -1
        if self._local is not None:
            self._loop.unwatch(self._local.fileno())
            self._local.close()
            self._local = None
        self._host.close()
        self._closed(self)
