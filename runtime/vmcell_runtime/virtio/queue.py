"""The split virtqueue over guest memory, seen from the device (virtio 1.2 § 2.7).

The guest may write to a ring at any time. So each index, each descriptor and each indirect table
is copied once, checked, and never looked at again; what `pop` returns is a copy that stays what it
was. Rules a guest can break raise GuestError, after which the queue is of no more use.

Order (x86-64): elements are stored before the index that publishes them, and the processor keeps
that order. It does not keep a store before a later load, so between publishing an index and
reading the other side's wish to be notified stands a lock's acquire and release, which is a locked
instruction.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from vmcell_protos.errors import GuestError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import abi
from vmcell_runtime.virtio.spans import Spans

BUDGET_CHAINS = 64
"""Chains handled at one wake, so that no queue holds the event loop for long."""

BUDGET_NS = 5_000_000
"""And none is begun later after a wake: some are long in links, some are megabytes for a disk."""

_unpack_descriptor = struct.Struct(abi.DESCRIPTOR_FORMAT).unpack_from
_pack_used = struct.Struct("<II").pack


class RingLayout(NamedTuple):
    """Where a queue lies, as frozen at DRIVER_OK: size in entries and three guest addresses."""

    size: int
    descriptor_gpa: int
    driver_gpa: int
    device_gpa: int

    def areas(self) -> tuple[tuple[int, int, int], ...]:
        """(gpa, bytes, alignment) of the descriptor table, available ring, used ring, § 2.7."""
        return (
            (self.descriptor_gpa, abi.DESCRIPTOR_BYTES * self.size, 16),
            (self.driver_gpa, 6 + 2 * self.size, 2),
            (self.device_gpa, 6 + abi.USED_ELEMENT_BYTES * self.size, 4),
        )

    def check(self, memory: GuestMemory, max_size: int) -> None:
        """GuestError unless the device can use a queue that lies so."""
        if not 1 <= self.size <= max_size or self.size & (self.size - 1):
            raise GuestError(f"queue size {self.size} is not a power of two up to {max_size}")
        areas = self.areas()
        for gpa, length, alignment in areas:
            if gpa % alignment:
                raise GuestError(f"ring address {gpa:#x} is not a multiple of {alignment}")
            memory.read(gpa, length)
        end = 0
        for gpa, length, _ in sorted(areas):
            if gpa < end:
                raise GuestError(f"ring areas of a queue overlap at {gpa:#x}")
            end = gpa + length


class Chain(NamedTuple):
    """One buffer of the guest: what the device may read, and what it may write."""

    head: int
    readable: Spans
    writable: Spans
    readable_bytes: int
    writable_bytes: int


class Queue:
    """One active queue. All calls under the transport's lock; it owns nothing.

    `max_chain_bytes` bounds one chain; `indirect` and `event_idx` are as negotiated.
    """

    def __init__(
        self,
        memory: GuestMemory,
        layout: RingLayout,
        *,
        max_chain_bytes: int,
        indirect: bool,
        event_idx: bool,
    ) -> None:
        self.layout = layout
        self._memory = memory
        self._size = layout.size
        self._max_chain_bytes = max_chain_bytes
        self._indirect = indirect
        self._event_idx = event_idx
        self._avail_flags_gpa = layout.driver_gpa
        self._avail_index_gpa = layout.driver_gpa + 2
        self._avail_ring_gpa = layout.driver_gpa + 4
        self._used_event_gpa = layout.driver_gpa + 4 + 2 * layout.size
        self._used_flags_gpa = layout.device_gpa
        self._used_index_gpa = layout.device_gpa + 2
        self._used_ring_gpa = layout.device_gpa + 4
        self._avail_event_gpa = layout.device_gpa + 4 + abi.USED_ELEMENT_BYTES * layout.size
        self._next_avail = 0
        self._seen_avail = 0
        self._used_index = 0
        self._completed: list[bytes] = []
        self._in_flight: set[int] = set()
        self._unpublished: set[int] = set()  # heads of `_completed`, which the guest still lacks
        self._fence = threading.Lock()

    @property
    def position(self) -> tuple[int, int]:
        """(next buffer to take, next to give back), as if nothing were in flight.

        True for whoever goes on with what this one took in the order of the ring.
        """
        taken = len(self._in_flight) + len(self._unpublished)
        return (self._next_avail - taken) & 0xFFFF, self._used_index

    def resume(self, next_avail: int, used_index: int, in_flight: Iterable[int]) -> None:
        """Goes on where another device stopped; `in_flight` are heads it took and this one has."""
        self._next_avail = self._seen_avail = next_avail
        self._used_index = used_index
        self._in_flight = set(in_flight)

    def pop(self) -> Chain | None:
        """The next buffer, checked and copied, or None.

        It is in flight until `complete`, and its head cannot come again before `flush`: so what is
        published at once is never more than the ring has entries.
        """
        if self._next_avail == self._seen_avail and not self._look():
            return None
        slot = self._next_avail & (self._size - 1)
        head = self._memory.load16(self._avail_ring_gpa + 2 * slot)
        if head in self._in_flight or head in self._unpublished:
            raise GuestError(f"descriptor {head} was made available while in flight")
        chain = self.walk(head)
        self._in_flight.add(head)
        self._next_avail = (self._next_avail + 1) & 0xFFFF
        return chain

    def complete(self, head: int, written_bytes: int) -> None:
        """Gives the chain of `head` back with so many bytes written; the guest sees it at `flush`.

        KeyError if it is not in flight: that is an error of ours.
        """
        self._in_flight.remove(head)
        self._unpublished.add(head)
        self._completed.append(_pack_used(head, written_bytes))

    def flush(self) -> bool:
        """Publishes what is complete; True if the guest wants an interrupt for it (§ 2.7.7.2)."""
        count = len(self._completed)
        if not count:
            return False
        slot = self._used_index & (self._size - 1)
        before_wrap = self._size - slot
        gpa = self._used_ring_gpa + abi.USED_ELEMENT_BYTES * slot
        self._memory.write(gpa, b"".join(self._completed[:before_wrap]))
        if count > before_wrap:
            self._memory.write(self._used_ring_gpa, b"".join(self._completed[before_wrap:]))
        self._completed.clear()
        self._unpublished.clear()
        old, new = self._used_index, (self._used_index + count) & 0xFFFF
        self._used_index = new
        self._memory.store16(self._used_index_gpa, new)
        self._order_store_before_load()
        if self._event_idx:
            used_event = self._memory.load16(self._used_event_gpa)
            return (new - used_event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not self._memory.load16(self._avail_flags_gpa) & abi.AVAIL_NO_INTERRUPT

    def arm(self) -> bool:
        """Asks to be notified of the next buffer; True if one came meanwhile (§ 2.7.10)."""
        if self._event_idx:
            self._memory.store16(self._avail_event_gpa, self._next_avail)
        else:
            self._memory.store16(self._used_flags_gpa, 0)
        self._order_store_before_load()
        return self._memory.load16(self._avail_index_gpa) != self._next_avail

    def disarm(self) -> None:
        """Asks for no notifications until `arm`; with event_idx not arming again is enough."""
        if not self._event_idx:
            self._memory.store16(self._used_flags_gpa, abi.USED_NO_NOTIFY)

    def drain(self, handle: Callable[[Chain], None], budget: int = BUDGET_CHAINS) -> bool:
        """Hands out buffers, up to `budget` of them and none after BUDGET_NS.

        True if some may be left, else the queue is armed.
        """
        self.disarm()
        deadline_ns = time.monotonic_ns() + BUDGET_NS
        while budget and time.monotonic_ns() < deadline_ns:
            chain = self.pop()
            if chain is not None:
                handle(chain)
                budget -= 1
            elif not self.arm():
                return False
        return True

    def has_news(self) -> bool:
        """Whether the driver has offered something since anybody looked; nothing is checked."""
        return self._memory.load16(self._avail_index_gpa) != self._seen_avail

    def _look(self) -> bool:
        index = self._memory.load16(self._avail_index_gpa)
        waiting = (index - self._next_avail) & 0xFFFF
        if waiting > self._size:
            raise GuestError(f"available index jumped by {waiting} in a queue of {self._size}")
        self._seen_avail = index
        return waiting > 0

    def walk(self, head: int) -> Chain:
        """The chain that begins at `head`, copied and checked, whoever has it now."""
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        readable_bytes = writable_bytes = 0
        table: bytes | None = None
        entries, index = self._size, head
        for _ in range(self._size + 1):
            if index >= entries:
                raise GuestError(f"descriptor index {index} is outside a table of {entries}")
            gpa, length, flags, follower = self._descriptor(table, index)
            if flags & abi.DESCRIPTOR_INDIRECT:
                table = self._indirect_table(gpa, length, flags, nested=table is not None)
                entries, index = length // abi.DESCRIPTOR_BYTES, 0
                continue
            if not length:
                raise GuestError(f"descriptor {index} has no length")
            if flags & abi.DESCRIPTOR_WRITE:
                writable.append((gpa, length))
                writable_bytes += length
            elif writable:
                raise GuestError(f"readable descriptor {index} follows a writable one")
            else:
                readable.append((gpa, length))
                readable_bytes += length
            if readable_bytes + writable_bytes > self._max_chain_bytes:
                raise GuestError(f"a chain is longer than {self._max_chain_bytes} bytes")
            if not flags & abi.DESCRIPTOR_NEXT:
                break
            index = follower
        else:
            raise GuestError(f"a chain has more links than its queue's {self._size} entries")
        if len(readable) + len(writable) > self._size:
            raise GuestError(f"a chain has more links than its queue's {self._size} entries")
        return Chain(head, tuple(readable), tuple(writable), readable_bytes, writable_bytes)

    def _descriptor(self, table: bytes | None, index: int) -> tuple[int, int, int, int]:
        offset = abi.DESCRIPTOR_BYTES * index
        if table is not None:
            return _unpack_descriptor(table, offset)
        gpa = self.layout.descriptor_gpa + offset
        return _unpack_descriptor(self._memory.read(gpa, abi.DESCRIPTOR_BYTES))

    def _indirect_table(self, gpa: int, length: int, flags: int, *, nested: bool) -> bytes:
        if not self._indirect or nested or flags & abi.DESCRIPTOR_NEXT:
            raise GuestError("an indirect descriptor was not negotiated, is nested or has a link")
        entries, rest = divmod(length, abi.DESCRIPTOR_BYTES)
        if rest or not 1 <= entries <= self._size:
            raise GuestError(f"an indirect table has {length} bytes in a queue of {self._size}")
        return self._memory.read(gpa, length)

    def _order_store_before_load(self) -> None:
        with self._fence:
            pass
