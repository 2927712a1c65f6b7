"""Which requests a device left unanswered when it died: found in its rings and buffers.

A back-end that dies takes along its knowledge of which buffers it had taken. The rings keep the
last `size` buffers made available and the last `size` given back, and no more. Buffers come back in
any order, so the rings alone do not always tell; the answers do: a FUSE client clears the room for
a reply's header before it asks (fs/fuse/dev.c, fuse_request_alloc), so a request with a header of
zeros has had no answer. What lies behind a descriptor that is free may have been put to new use,
hence the other conditions.

A request that was outstanding while more than `size` others came and went is not found. All this
reads guest memory that the guest may change: it can mislead us about its own requests only.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import NamedTuple

from vmcell_protos.errors import GuestError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import abi, spans
from vmcell_runtime.virtio.queue import Chain, Queue

FUSE_IN_HEADER = struct.Struct("<IIQ24x")  # length, opcode, unique (<linux/fuse.h>)
FUSE_OUT_HEADER = struct.Struct("<IiQ")  # length, error, unique


class LeftOver(NamedTuple):
    """Where a device stood: indices of the next buffer to take and to give back, and what it had.

    `chains` are safe to give back in this order; `missing` is how many could not be told.
    """

    next_avail: int
    used_index: int
    chains: tuple[Chain, ...]
    missing: int


def left_over(memory: GuestMemory, queue: Queue) -> LeftOver:
    """What the device has not given back of what the driver had made available up to now."""
    layout = queue.layout
    next_avail = memory.load16(layout.driver_gpa + 2)
    used_index = memory.load16(layout.device_gpa + 2)
    count = (next_avail - used_index) & 0xFFFF
    if count > layout.size:
        raise GuestError(f"{count} buffers are in flight in a queue of {layout.size}")
    if not count:
        return LeftOver(next_avail, used_index, (), 0)
    # How long ago, in buffers, each head was last made available, and last given back.
    made, times_made = _history(memory, layout.driver_gpa + 4, 2, next_avail, layout.size)
    given, times_given = _history(
        memory, layout.device_gpa + 4, abi.USED_ELEMENT_BYTES, used_index, layout.size
    )
    # The driver may have gone on meanwhile and written over the oldest slots.
    overwritten = (memory.load16(layout.driver_gpa + 2) - next_avail) & 0xFFFF
    certain: list[Chain] = []
    possible: list[Chain] = []
    claimed: set[int] = set()
    for head, age in made.items():
        if age >= layout.size - overwritten:
            continue
        # A buffer is made available no later than it is given back: this one has come back.
        if head in given and age - given[head] >= count:
            continue
        try:
            chain = queue.walk(head)
            answered = _answered(memory, chain, claimed)
        except GuestError:
            continue  # free, and what lies behind it is no chain any more
        if answered is False:
            certain.append(chain)
        elif answered is None:
            possible.append(chain)
    possible.sort(key=lambda chain: times_given[chain.head] - times_made[chain.head])
    chains = (certain + possible)[:count]
    return LeftOver(next_avail, used_index, tuple(chains), count - len(chains))


def _history(
    memory: GuestMemory, ring_gpa: int, entry_bytes: int, index: int, size: int
) -> tuple[dict[int, int], Counter[int]]:
    """What a ring still has: head → entries since its last one, youngest first; how often each.

    A head is the first 16 bits of an entry, loaded once and at once: its writer may still be there.
    """
    ages: dict[int, int] = {}
    times: Counter[int] = Counter()
    for age in range(size):
        head = memory.load16(ring_gpa + (index - 1 - age) % size * entry_bytes)
        ages.setdefault(head, age)
        times[head] += 1
    return ages, times


def _answered(memory: GuestMemory, chain: Chain, claimed: set[int]) -> bool | None:
    """Whether a reply stands in the chain, None where that cannot be told.

    `claimed` collects where replies of younger requests go; what points there too is not a request
    any more.
    """
    if chain.readable_bytes < FUSE_IN_HEADER.size:
        return True
    if not chain.writable_bytes:
        return None  # a request without a reply, such as FUSE_FORGET
    head, _ = spans.split(chain.writable, min(FUSE_OUT_HEADER.size, chain.writable_bytes))
    gpa = head[0][0]
    if gpa in claimed:
        return True
    claimed.add(gpa)
    header = spans.read(memory, head)
    if not any(header):
        return False
    # The reply is written, and was perhaps not given back any more.
    return None if header[8:16] == _unique(memory, chain) else True


def _unique(memory: GuestMemory, chain: Chain) -> bytes:
    head, _ = spans.split(chain.readable, FUSE_IN_HEADER.size)
    return spans.read(memory, head)[8:16]
