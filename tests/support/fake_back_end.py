"""The back-end of a vhost-user connection whose answers a test writes down beforehand."""

from __future__ import annotations

import array
import os
import socket
import struct
from dataclasses import dataclass, field

RING_FEATURES = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28
ACK = 1 << 3
STEPS_OF_TWO_QUEUES = [2, 5, *[8, 10, 9, 13, 12] * 2, 18, 18]


def answer(request: int, payload: int | bytes = 0, flags: int = 5) -> bytes:
    """One message from back-end to front-end."""
    body = struct.pack("<Q", payload) if isinstance(payload, int) else payload
    return struct.pack("<III", request, flags, len(body)) + body


def negotiation(features: int = RING_FEATURES, protocol: int = ACK) -> bytes:
    """Every answer up to SET_OWNER."""
    return answer(1, features) + answer(15, protocol) + answer(3)


def started() -> bytes:
    """Every answer to handing over two queues."""
    return b"".join(answer(request) for request in STEPS_OF_TWO_QUEUES)


def stopped() -> bytes:
    return answer(11, struct.pack("<II", 0, 7)) + answer(11, struct.pack("<II", 1, 7))


@dataclass
class Got:
    """One message of the front-end."""

    request: int
    flags: int
    payload: bytes
    fds: list[int]


@dataclass
class FakeBackEnd:
    """Owns its end of the connection and the descriptors that came; `front` is the other end."""

    front: socket.socket = field(init=False)
    end: socket.socket = field(init=False)
    fds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.front, self.end = socket.socketpair()

    def say(self, data: bytes) -> None:
        self.end.sendall(data)

    def heard(self) -> list[Got]:
        """What the front-end has said since the last call."""
        data, fds = b"", []
        self.end.setblocking(False)
        while True:
            try:
                piece, control, _, _ = self.end.recvmsg(1 << 16, socket.CMSG_SPACE(4 * 16))
            except BlockingIOError:
                break
            if not piece:
                break
            data += piece
            for _, _, words in control:
                numbers = array.array("i")
                numbers.frombytes(words)
                fds += list(numbers)
        self.fds += fds
        return self._messages(data, fds)

    def _messages(self, data: bytes, fds: list[int]) -> list[Got]:
        found = []
        while data:
            request, flags, size = struct.unpack_from("<III", data)
            payload, data = data[12 : 12 + size], data[12 + size :]
            count = struct.unpack_from("<I", payload)[0] if request == 5 else request in (12, 13)
            found.append(Got(request, flags, payload, fds[:count]))
            fds = fds[count:]
        return found

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self.end.close()
