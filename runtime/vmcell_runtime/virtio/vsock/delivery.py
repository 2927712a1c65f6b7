"""Packets into the guest's receive buffers: control packets first, then data in bursts.

A Linux guest gives buffers of 3776 bytes (6.12, VIRTIO_VSOCK_DEFAULT_RX_BUF_SIZE), one packet each.
So one `readv` takes from the host socket what fits many of them, and only the headers are written
one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from vmcell_protos.errors import GuestError
from vmcell_runtime.memory import GuestMemory, Span
from vmcell_runtime.virtio import spans
from vmcell_runtime.virtio.queue import Queue
from vmcell_runtime.virtio.spans import Spans
from vmcell_runtime.virtio.vsock import packet
from vmcell_runtime.virtio.vsock.connection import Connection
from vmcell_runtime.virtio.vsock.packet import Header

MAX_BURST_BUFFERS = 64

MakeHeader = Callable[[], Header]


class _Buffer(NamedTuple):
    """One receive buffer of the guest, cut into header and payload."""

    head: int
    header: Spans
    payload: Spans
    payload_bytes: int


class Delivery:
    """The receive queue. Buffers taken and not used are kept for the next packet."""

    def __init__(self, memory: GuestMemory, queue: Queue) -> None:
        self._memory = memory
        self._queue = queue
        self._spare: deque[_Buffer] = deque()
        self._control: deque[MakeHeader] = deque()

    @property
    def control_packets(self) -> int:
        return len(self._control)

    def post(self, make_header: MakeHeader) -> None:
        """Sends a packet without data as soon as there is a buffer; its header is made then."""
        self._control.append(make_header)

    def send_control(self) -> bool:
        """Sends what was posted; False if buffers ran out, and the queue is armed then."""
        while self._control:
            buffer = self._take()
            if buffer is None:
                return False
            header = self._control.popleft()()
            spans.write(self._memory, buffer.header, header.encode())
            self._queue.complete(buffer.head, packet.HEADER_BYTES)
        return True

    def receive(self, fd: int, connection: Connection, max_buffers: int) -> tuple[int, int] | None:
        """One burst from `fd` to the peer of `connection`, as far as its credit goes.

        (bytes read, bytes asked for), 0 read at end of file; None if there is no buffer, and the
        queue is armed then. BlockingIOError and ConnectionResetError as they come.
        """
        buffers: list[_Buffer] = []
        pieces: list[Span] = []
        room = connection.peer_room_bytes
        asked = 0
        while asked < room and len(buffers) < max_buffers:
            buffer = self._take()
            if buffer is None:
                break
            buffers.append(buffer)
            pieces += buffer.payload
            asked += buffer.payload_bytes
        if not buffers:
            return None
        if asked > room:
            pieces, asked = list(spans.split(tuple(pieces), room)[0]), room
        used = 0
        try:
            count = self._memory.readv(fd, pieces)
            used = self._fill(buffers, connection, count)
        finally:
            self._spare.extendleft(reversed(buffers[used:]))
        return count, asked

    def _fill(self, buffers: list[_Buffer], connection: Connection, count: int) -> int:
        """Puts headers before `count` bytes of data; how many buffers that took."""
        used = 0
        header, header_length = b"", 0
        while count:
            buffer = buffers[used]
            length = min(count, buffer.payload_bytes)
            if length != header_length:
                header = connection.header(packet.OP_RW, length=length).encode()
                header_length = length
            connection.note_sent(length)
            spans.write(self._memory, buffer.header, header)
            self._queue.complete(buffer.head, packet.HEADER_BYTES + length)
            count -= length
            used += 1
        return used

    def _take(self) -> _Buffer | None:
        if self._spare:
            return self._spare.popleft()
        chain = self._queue.pop()
        while chain is None:
            if not self._queue.arm():
                return None
            chain = self._queue.pop()
        if chain.writable_bytes <= packet.HEADER_BYTES:
            raise GuestError(f"a vsock receive buffer has only {chain.writable_bytes} bytes")
        length = chain.writable_bytes - packet.HEADER_BYTES
        if len(chain.writable) == 1:
            gpa = chain.writable[0][0]
            header: Spans = ((gpa, packet.HEADER_BYTES),)
            payload: Spans = ((gpa + packet.HEADER_BYTES, length),)
        else:
            header, payload = spans.split(chain.writable, packet.HEADER_BYTES)
        return _Buffer(chain.head, header, payload, length)
