"""Descriptor tables, available rings and indirect tables, as bytes, under one queue.

Faces the guest. A chain that comes out keeps every rule of V6 and is read once: no more links than
the queue has entries, no more bytes than the device allows, readable before writable, no head
twice in flight; else GuestError.
"""

from __future__ import annotations

import struct

from fake_memory import FlippingMemory
from supply import Script, Supply

from vmcell_protos.errors import GuestError
from vmcell_runtime.virtio.queue import Queue, RingLayout

ALLOWED: tuple[type[Exception], ...] = (GuestError,)
REACHES = (
    "vmcell_runtime.virtio.queue:Queue._indirect_table",
    "vmcell_runtime.virtio.queue:Queue.flush",
)
RAM_BYTES = 1 << 20
DESCRIPTORS, DRIVER, DEVICE, TABLES = 0x1_0000, 0x2_0000, 0x3_0000, 0x4_0000
MAX_CHAIN_BYTES = 1 << 16
SIZES = (1, 2, 4, 8, 16, 256)
PLACES = (TABLES, TABLES + 16, TABLES + 4096, DESCRIPTORS, RAM_BYTES - 8, 2**64 - 16)


def one(data: bytes) -> None:
    supply = Supply(data)
    memory = FlippingMemory(RAM_BYTES)
    try:
        size = supply.pick(SIZES)
        layout = RingLayout(size, DESCRIPTORS, DRIVER, DEVICE)
        layout.check(memory, 256)
        features = supply.byte()
        queue = Queue(
            memory,
            layout,
            max_chain_bytes=MAX_CHAIN_BYTES,
            indirect=bool(features & 1),
            event_idx=bool(features & 2),
        )
        for table in (DESCRIPTORS, TABLES, TABLES + 4096):
            memory.write(table, _table(supply, size))
        heads = supply.take(supply.byte() % (2 * size + 2))
        for slot, head in enumerate(heads[:size]):
            memory.store16(DRIVER + 4 + 2 * slot, head)
        memory.store16(DRIVER + 2, len(heads) if features & 4 else min(len(heads), size))
        memory.flip = True
        _drain(queue, size)
    finally:
        memory.close()


def _table(supply: Supply, size: int) -> bytes:
    rows = []
    for number in range(supply.byte() % (size + 1)):
        mode = supply.byte()
        if mode < 0x80:
            # Links to the next, ends at the last; writable ones last.
            flags = (0, 1, 2, 3, 4, 1, 3, 5)[mode % 8]
            length = (1, 16, 32, 64, 512, 4096, 16 * size, 0)[mode // 8 % 8]
            rows.append(struct.pack("<QIHH", supply.pick(PLACES), length, flags, number + 1))
        else:
            rows.append(supply.take(16).ljust(16, b"\0"))
    return b"".join(rows)


def _drain(queue: Queue, size: int) -> None:
    heads: set[int] = set()
    for _ in range(size + 1):
        chain = queue.pop()
        if chain is None:
            break
        assert chain.head not in heads
        heads.add(chain.head)
        assert 1 <= len(chain.readable) + len(chain.writable) <= size
        assert chain.readable_bytes == sum(length for _, length in chain.readable)
        assert chain.writable_bytes == sum(length for _, length in chain.writable)
        assert chain.readable_bytes + chain.writable_bytes <= MAX_CHAIN_BYTES
    else:
        raise AssertionError("more chains than the queue has entries")
    for head in heads:
        queue.complete(head, 1)
    queue.flush()
    queue.arm()
    assert queue.position == (len(heads), len(heads))


def _chain(*modes: int) -> Script:
    script = Script().bytes(len(modes))
    for mode in modes:
        script.bytes(mode, 0)
    return script


def seeds() -> dict[str, bytes]:
    empty = bytes(2)
    head = Script().bytes(3, 3)
    return {
        "one": bytes(head + _chain(0x28) + empty + bytes([1, 0])),
        "three-links": bytes(head + _chain(0x09, 0x2B, 0x0A) + empty + bytes([1, 0])),
        "two-chains": bytes(head + _chain(0x08, 0x2A) + empty + bytes([2, 0, 1])),
        "indirect": bytes(head + _chain(0x14) + _chain(0x21, 0x22) + bytes(1) + bytes([1, 0])),
        "whole-ring": bytes(head + _chain(*[0x08] * 8) + empty + bytes([8, *range(8)])),
    }
