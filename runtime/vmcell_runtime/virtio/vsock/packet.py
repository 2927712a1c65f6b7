"""The header of every vsock packet (virtio 1.2 § 5.10.6), in and out."""

from __future__ import annotations

import struct
from typing import NamedTuple

HOST_CID = 2
MAX_PAYLOAD_BYTES = 64 << 10

TYPE_STREAM = 1

OP_REQUEST = 1
OP_RESPONSE = 2
OP_RST = 3
OP_SHUTDOWN = 4
OP_RW = 5
OP_CREDIT_UPDATE = 6
OP_CREDIT_REQUEST = 7

SHUTDOWN_RECEIVE = 1  # the sender of the packet receives no more
SHUTDOWN_SEND = 2

EVENT_TRANSPORT_RESET = bytes(4)  # struct virtio_vsock_event, id 0, § 5.10.6.7

_HEADER = struct.Struct("<QQIIIHHIII")
HEADER_BYTES = _HEADER.size


class Header(NamedTuple):
    """One packet's header, as its sender sees source and destination."""

    source_cid: int
    destination_cid: int
    source_port: int
    destination_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    def encode(self) -> bytes:
        return _HEADER.pack(*self)


def decode(data: bytes) -> Header:
    """The header in exactly 44 bytes (struct.error otherwise)."""
    return Header(*_HEADER.unpack(data))


def reset_reply(header: Header) -> Header:
    """RST for a packet that belongs to no connection of ours."""
    return Header(
        source_cid=header.destination_cid,
        destination_cid=header.source_cid,
        source_port=header.destination_port,
        destination_port=header.source_port,
        length=0,
        type=TYPE_STREAM,
        op=OP_RST,
        flags=0,
        buf_alloc=0,
        fwd_cnt=0,
    )
