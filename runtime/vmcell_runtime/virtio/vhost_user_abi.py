"""Messages of the vhost-user protocol as bytes; no I/O.

A message is a header of three little-endian words (request, flags, payload size) and its payload;
descriptors travel beside it. Of what a back-end may send, only answers to questions of ours are
asked for here, and each of them carries eight bytes: what differs is a HostError.

Source: QEMU docs/interop/vhost-user.rst, "Message Specification" and "Front-end message types".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmcell_protos.errors import HostError
from vmcell_runtime.memory import SharedRegion
from vmcell_runtime.virtio.queue import RingLayout

HEADER = struct.Struct("<III")
FLAGS_MASK = 0xF
FLAG_VERSION = 1
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3

GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
SET_MEM_TABLE = 5
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
SET_VRING_ENABLE = 18

F_PROTOCOL_FEATURES = 1 << 30
PROTOCOL_F_REPLY_ACK = 1 << 3
MAX_REGIONS = 8  # what every back-end takes without CONFIGURE_MEM_SLOTS

ANSWER_BYTES = 8
_U64 = struct.Struct("<Q")
_VRING_STATE = struct.Struct("<II")  # index, number
_VRING_ADDR = struct.Struct("<IIQQQQ")  # index, flags, descriptors, used, available, log
_REGIONS = struct.Struct("<II")  # count, padding
_REGION = struct.Struct("<QQQQ")  # guest address, size, front-end's address, offset into the file


def encode(request: int, payload: bytes = b"", *, need_reply: bool = False) -> bytes:
    """One message to the back-end."""
    flags = FLAG_VERSION | (FLAG_NEED_REPLY if need_reply else 0)
    return HEADER.pack(request, flags, len(payload)) + payload


def check_answer_header(request: int, header: bytes) -> None:
    """HostError unless `header` (12 bytes) begins the answer to `request`."""
    said, flags, size = HEADER.unpack(header)
    if said != request or flags & FLAGS_MASK & ~FLAG_NEED_REPLY != FLAG_VERSION | FLAG_REPLY:
        raise HostError(
            f"the vhost-user back-end answered request {request} with request {said}, "
            f"flags {flags:#x}"
        )
    if size != ANSWER_BYTES:
        raise HostError(
            f"the vhost-user back-end answered request {request} with {size} bytes, not 8"
        )


def u64(value: int) -> bytes:
    """The payload that is one number: features, an acknowledgement, a queue's index."""
    return _U64.pack(value)


def read_u64(payload: bytes) -> int:
    """The number in an answer's eight bytes."""
    (value,) = _U64.unpack(payload)
    return int(value)


def vring_state(index: int, number: int) -> bytes:
    """Payload of SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE and GET_VRING_BASE."""
    return _VRING_STATE.pack(index, number)


def read_vring_state(payload: bytes) -> tuple[int, int]:
    """(queue index, number) of the answer to GET_VRING_BASE."""
    index, number = _VRING_STATE.unpack(payload)
    return index, number


def vring_addresses(index: int, layout: RingLayout) -> bytes:
    """Payload of SET_VRING_ADDR.

    Addresses here are the front-end's own. We name guest addresses as ours, here as in
    `memory_table`, so a back-end learns nothing of this process.
    """
    return _VRING_ADDR.pack(
        index, 0, layout.descriptor_gpa, layout.device_gpa, layout.driver_gpa, 0
    )


def memory_table(regions: Sequence[SharedRegion]) -> bytes:
    """Payload of SET_MEM_TABLE; the descriptors of the regions travel along in their order."""
    if not 1 <= len(regions) <= MAX_REGIONS:
        raise ValueError(f"{len(regions)} regions of memory; a back-end takes 1 to {MAX_REGIONS}")
    rows = [_REGION.pack(row.gpa, row.length_bytes, row.gpa, row.offset) for row in regions]
    return _REGIONS.pack(len(regions), 0) + b"".join(rows)
