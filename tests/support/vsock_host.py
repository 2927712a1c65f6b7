"""The host's programs at the other ends of the socket device's streams, and how they look."""

from __future__ import annotations

import socket
from collections.abc import Callable

from guest_driver import GuestDriver
from guest_vsock import Packet

from vmcell_protos.errors import VmcellError
from vmcell_runtime.virtio.vsock.device import Vsock

PORT, GUEST_PORT = 1024, 40_000

Join = Callable[[], socket.socket]
"""A new stream that the guest dialled and the host took: the host's end."""


class Host:
    """The host's programs: their ends of the sockets given to the device."""

    def __init__(self, device: Vsock, driver: GuestDriver) -> None:
        self.device = device
        self.driver = driver
        self.results: list[VmcellError | None] = []
        self.ends: list[socket.socket] = []

    def pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.ends.append(ours)
        return ours, theirs

    def listen(self, port: int = PORT) -> socket.socket:
        ours, theirs = self.pair()
        self.device.listen(port, theirs)
        return ours

    def connect(self, port: int = 1025, **kwargs: int) -> socket.socket:
        ours, theirs = self.pair()
        self.device.connect(port, theirs, self.results.append, **kwargs)
        self.driver.loop.settle()
        return ours

    def settle(self) -> None:
        self.driver.loop.settle()


def ops_of(packets: list[Packet]) -> list[int]:
    return [packet.op for packet in packets]


def data_of(packets: list[Packet]) -> bytes:
    return b"".join(packet.data for packet in packets)


def drain(sock: socket.socket) -> bytes:
    """All that can be read now."""
    pieces = []
    try:
        while piece := sock.recv(1 << 20):
            pieces.append(piece)
    except BlockingIOError:
        pass
    return b"".join(pieces)


def at_end(sock: socket.socket) -> bool:
    """The next read is a clean end of file."""
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
