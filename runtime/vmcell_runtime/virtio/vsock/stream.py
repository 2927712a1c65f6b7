"""A vsock connection joined to a stream socket of the host.

Guest bytes go straight from guest pages into the socket; only what the socket does not take is
copied, and the connection's credit bounds that. All on the event loop's thread.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable

from vmcell_protos.errors import VmcellError
from vmcell_runtime.loop import READABLE, WRITABLE, Callback, EventLoop, Timer
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import spans
from vmcell_runtime.virtio.spans import Spans
from vmcell_runtime.virtio.vsock.connection import Connection

FIRST_BURST_BUFFERS = 4
LAST_READS = 16
LAST_READ_BYTES = 64 << 10

OnResult = Callable[[VmcellError | None], None]
"""Told once how a host-initiated connection went: None when the guest accepted it."""


class Stream:
    """Owns `sock` and makes it non-blocking; `on_ready` gets the epoll events of it."""

    def __init__(
        self, connection: Connection, key: tuple[int, int], sock: socket.socket, loop: EventLoop
    ) -> None:
        sock.setblocking(False)
        self.connection = connection
        self.key = key
        self.burst_buffers = FIRST_BURST_BUFFERS
        self.out_of_credit = False
        self.credit_update_queued = False
        self.deaf = False
        self.on_ready: Callback | None = None
        self.on_result: OnResult | None = None
        self.connect_timer: Timer | None = None
        self._sock = sock
        self._loop = loop
        self._watched: int | None = None
        self._pending = bytearray()
        self._end_when_flushed = False
        self._close_when_flushed = False
        self._ended = False

    @property
    def fd(self) -> int:
        return self._sock.fileno()

    @property
    def closed(self) -> bool:
        return self._sock.fileno() < 0

    def deliver(self, memory: GuestMemory, payload: Spans, length: int) -> None:
        """Takes `length` bytes from guest pages; what the host cannot take yet is kept."""
        if self.deaf:
            self.connection.hand_on(length)
            return
        taken = 0
        if not self._pending:
            try:
                taken = memory.writev(self.fd, payload)
            except BlockingIOError:
                taken = 0
            except (BrokenPipeError, ConnectionResetError):
                self.drop_pending()
                self.connection.hand_on(length)
                return
        self.connection.hand_on(taken)
        if taken < length:
            self._pending += spans.read(memory, spans.split(payload, taken)[1])

    def flush(self) -> None:
        """Writes what is kept, as far as the socket takes it, and ends it if that was all."""
        try:
            while self._pending:
                with memoryview(self._pending) as view:
                    taken = self._sock.send(view)
                del self._pending[:taken]
                self.connection.hand_on(taken)
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self.drop_pending()
        if self._close_when_flushed:
            self.close()
        elif self._end_when_flushed and not self._ended:
            self._ended = True
            self._shut(socket.SHUT_WR)

    def drop_pending(self) -> None:
        """The host side takes no more: nothing is kept for it, now or later."""
        self.deaf = True
        self.connection.hand_on(len(self._pending))
        self._pending.clear()

    def end_writes(self) -> None:
        """The host side sees end of file after all that is kept."""
        self._end_when_flushed = True
        self.flush()

    def stop_reads(self) -> None:
        """The host side can write no more."""
        self._shut(socket.SHUT_RD)

    def close_when_flushed(self) -> None:
        """Closes the socket once the host side has all that is kept."""
        self._close_when_flushed = True
        self.flush()

    def watch(self, *, read: bool) -> None:
        """Registers for what is awaited: bytes to read if `read`, room for what is kept.

        Waiting for nothing still hears of a hang-up, unless the host side is known to be gone.
        """
        if self.closed or self.on_ready is None:
            return
        wanted: int | None = (READABLE if read else 0) | (WRITABLE if self._pending else 0)
        if not wanted and self.deaf:
            wanted = None
        if wanted == self._watched:
            return
        if wanted is None:
            self._loop.remove(self.fd)
        elif self._watched is None:
            self._loop.add(self.fd, self.on_ready, wanted)
        else:
            self._loop.modify(self.fd, wanted)
        self._watched = wanted

    def flush_until(self, deadline_ns: int) -> None:
        """Waits for the host side to take what is kept, up to a time of `monotonic_ns`."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        while self._pending and (left_ns := deadline_ns - time.monotonic_ns()) > 0:
            poll.poll(left_ns / 1e6)
            self.flush()

    def close(self) -> None:
        """Closes the socket at once; idempotent. The host side sees a clean end of file."""
        if self.closed:
            return
        if self._watched is not None:
            self._loop.remove(self.fd)
            self._watched = None
        self._shut(socket.SHUT_RDWR)
        # A unix socket closed with bytes unread gives its peer ECONNRESET instead of the end.
        try:
            for _ in range(LAST_READS):
                if not self._sock.recv(LAST_READ_BYTES):
                    break
        except OSError:
            pass
        self._sock.close()

    def _shut(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError:
            self.deaf = True  # already disconnected: nobody is there to be told
