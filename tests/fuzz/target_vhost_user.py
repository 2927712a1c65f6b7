"""Answers of a vhost-user daemon to a whole activation, from first question to stop.

Faces virtiofsd, which reads the guest's rings and is not trusted to behave. An exchange ends with
HostError or as agreed, never later than its deadline, and a daemon that was lost stays lost.
"""

from __future__ import annotations

import os
import socket
import struct

from supply import Supply

from vmcell_protos.errors import HostError
from vmcell_runtime.memory import SharedRegion
from vmcell_runtime.virtio import vhost_user_abi as wire
from vmcell_runtime.virtio.queue import RingLayout
from vmcell_runtime.virtio.vhost_user import FrontEnd, Ring

ALLOWED: tuple[type[Exception], ...] = (HostError,)
REACHES = (
    "vmcell_runtime.virtio.vhost_user:FrontEnd.negotiate",
    "vmcell_runtime.virtio.vhost_user:FrontEnd.start",
    "vmcell_runtime.virtio.vhost_user:FrontEnd.stop",
)
RINGS = 2


def one(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    front_end = FrontEnd(ours)
    try:
        # All the answers there will be, before the first question: none is waited for.
        theirs.setblocking(False)
        theirs.send(_answers(Supply(data)))
        theirs.shutdown(socket.SHUT_WR)
        _talk(front_end, fd)
    finally:
        lost = front_end.lost
        if lost:
            _is_lost(front_end, lost)
        front_end.close()
        theirs.close()
        os.close(fd)


def _talk(front_end: FrontEnd, fd: int) -> None:
    front_end.negotiate()
    layout = RingLayout(8, 0x1000, 0x2000, 0x3000)
    regions = [SharedRegion(0, 4096, fd, 0)]
    front_end.start(1 << 32, regions, [Ring(layout, fd, fd)] * RINGS)
    front_end.stop(RINGS)


def _is_lost(front_end: FrontEnd, reason: str) -> None:
    try:
        front_end.ask_features()
    except HostError as error:
        said = str(error)
    else:
        said = "it was asked again"
    assert said == reason


# The questions of `_talk` in order, with the right answers.
_EXPECTED = [
    (wire.GET_FEATURES, wire.F_PROTOCOL_FEATURES | 1 << 32),
    (wire.GET_PROTOCOL_FEATURES, wire.PROTOCOL_F_REPLY_ACK),
    (wire.SET_OWNER, 0),
    (wire.SET_FEATURES, 0),
    (wire.SET_MEM_TABLE, 0),
    *[
        (request, 0)
        for _ in range(RINGS)
        for request in (
            wire.SET_VRING_NUM,
            wire.SET_VRING_BASE,
            wire.SET_VRING_ADDR,
            wire.SET_VRING_CALL,
            wire.SET_VRING_KICK,
        )
    ],
    *[(wire.SET_VRING_ENABLE, 0)] * RINGS,
    *[(wire.GET_VRING_BASE, index) for index in range(RINGS)],
]


def _answers(supply: Supply) -> bytes:
    """Right until the input says otherwise: a byte for each answer, 0 for the right one."""
    stream = b""
    for request, value in _EXPECTED:
        wrong = supply.byte()
        header = [request, wire.FLAG_VERSION | wire.FLAG_REPLY, wire.ANSWER_BYTES]
        if wrong & 1:
            header[wrong >> 1 & 1] = supply.number(4)
        if wrong & 4:
            header[2] = supply.number(4)
        if wrong & 8:
            value = supply.number(8)
        stream += struct.pack("<III", *header) + wire.u64(value)
        if wrong & 16:
            return stream[: len(stream) - supply.byte() % 21]
        if wrong & 32:
            stream += supply.chunk(64)
    return stream


def seeds() -> dict[str, bytes]:
    return {"all-right": bytes(len(_EXPECTED)), "all-right-and-more": bytes(len(_EXPECTED) + 9)}
