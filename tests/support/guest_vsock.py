"""The guest's side of the socket device: packets in and out over its rings, as Linux sends them."""

from __future__ import annotations

import struct
from typing import NamedTuple

from guest_driver import GuestDriver, GuestQueue

GUEST_CID = 3
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
NO_RECEIVE, NO_SEND = 1, 2
LINUX_RX_BYTES = 3776  # VIRTIO_VSOCK_DEFAULT_RX_BUF_SIZE of Linux 6.12
BUF_ALLOC = 256 << 10


class Packet(NamedTuple):
    """A packet the device sent."""

    host_port: int
    guest_port: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    data: bytes


class GuestVsock:
    """Rings filled as Linux fills them; keeps count of the bytes each stream got."""

    def __init__(
        self, driver: GuestDriver, *, buffers: int = 32, buffer_bytes: int = LINUX_RX_BYTES
    ) -> None:
        self.driver = driver
        self.buffer_bytes = buffer_bytes
        self.forwarded: dict[tuple[int, int], int] = {}
        self.fill(buffers)

    @property
    def rx(self) -> GuestQueue:
        return self.driver.queues[0]

    @property
    def tx(self) -> GuestQueue:
        return self.driver.queues[1]

    def fill(self, buffers: int) -> None:
        """Gives the device so many receive buffers."""
        for _ in range(buffers):
            self.rx.offer(writable=[self.buffer_bytes])
        self.driver.kick(0)

    def send(
        self, op: int, host_port: int, guest_port: int, data: bytes = b"", **fields: int
    ) -> None:
        """`offer`, and the device has dealt with it."""
        self.tx.next_buffer_gpa = self.tx.buffers_gpa
        self.offer(op, host_port, guest_port, data, **fields)
        self.driver.kick(1)
        self.tx.collect()

    def offer(
        self,
        op: int,
        host_port: int,
        guest_port: int,
        data: bytes = b"",
        *,
        flags: int = 0,
        buf_alloc: int = BUF_ALLOC,
        source_cid: int = GUEST_CID,
        destination_cid: int = 2,
        kind: int = 1,
        length: int = -1,
    ) -> None:
        """One packet; header and data are pieces of their own, as Linux has it."""
        header = struct.pack(
            "<QQIIIHHIII",
            source_cid,
            destination_cid,
            guest_port,
            host_port,
            len(data) if length < 0 else length,
            kind,
            op,
            flags,
            buf_alloc,
            self.forwarded.get((host_port, guest_port), 0) & 0xFFFF_FFFF,
        )
        self.tx.offer([header, data] if data else [header])

    def receive(self, *, refill: bool = True) -> list[Packet]:
        """What the device has sent since; data counts as taken by the guest's program."""
        packets = []
        for buffer, written in self.rx.collect():
            raw = self.rx.contents(buffer)[:written]
            fields = struct.unpack_from("<QQIIIHHIII", raw)
            source_cid, destination_cid, host_port, guest_port, length = fields[:5]
            kind, op, flags, buf_alloc, fwd_cnt = fields[5:]
            assert (source_cid, destination_cid, kind) == (2, GUEST_CID, 1)
            assert written == 44 + length
            key = host_port, guest_port
            self.forwarded[key] = self.forwarded.get(key, 0) + length
            data = raw[44:]
            packets.append(Packet(host_port, guest_port, op, flags, buf_alloc, fwd_cnt, data))
            if refill:
                self.rx.offer_spans(writable=buffer.writable)
        if packets and refill:
            self.driver.kick(0)
        return packets

    def receive_all(self) -> list[Packet]:
        """Everything the device sends while buffers are given back at once."""
        packets: list[Packet] = []
        while more := self.receive():
            packets += more
        return packets
