"""The split queue against a small reference, and every rule a guest can break."""

from __future__ import annotations

import struct
from collections import deque

import pytest
from fake_memory import FlippingMemory
from guest_driver import INDIRECT, NEXT, RAM_BYTES, WRITE, Buffer, GuestQueue
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from vmcell_protos.errors import GuestError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.queue import Chain, Queue, RingLayout

CAP = 1 << 20


def _queue(memory: GuestMemory, layout: RingLayout, **features: bool) -> Queue:
    wanted = {"indirect": True, "event_idx": True} | features
    return Queue(memory, layout, max_chain_bytes=CAP, **wanted)


@pytest.fixture
def guest(memory: GuestMemory) -> GuestQueue:
    return GuestQueue(memory, 8)


@pytest.fixture
def queue(memory: GuestMemory, guest: GuestQueue) -> Queue:
    return _queue(memory, guest.layout)


class QueueAgainstReference(RuleBasedStateMachine):
    """Buffers come out once, in order, as they were offered; and used ones go back as completed.

    The reference is a deque of what was offered and the notification rule of § 2.7.7.2 in its
    plain words: interrupt if the index the driver named was passed by this flush.
    """

    @initialize(size=st.sampled_from([1, 2, 8, 256]), event_idx=st.booleans())
    def set_up(self, size: int, event_idx: bool) -> None:
        self.memory = GuestMemory(2 << 20)
        self.guest = GuestQueue(self.memory, size, gpa=0x1000, buffers_gpa=0x10000)
        self.event_idx = event_idx
        self.queue = _queue(self.memory, self.guest.layout, event_idx=event_idx)
        self.offered: deque[Buffer] = deque()
        self.popped: list[Chain] = []
        self.completed: list[tuple[int, int]] = []
        self.published = 0
        self.named = 0
        self.suppressed = False

    @precondition(lambda self: self.guest.free)
    @rule(data=st.data(), indirect=st.booleans())
    def offer(self, data: st.DataObject, indirect: bool) -> None:
        limit = self.guest.size if indirect else min(len(self.guest.free), 5)
        pieces = data.draw(st.integers(1, min(limit, 5)))
        readable = data.draw(st.integers(0, pieces))
        lengths = [64] * pieces
        buffer = self.guest.offer(
            [bytes(n) for n in lengths[:readable]], lengths[readable:], indirect=indirect
        )
        self.offered.append(buffer)

    @rule()
    def pop(self) -> None:
        chain = self.queue.pop()
        if not self.offered:
            assert chain is None
            return
        expected = self.offered.popleft()
        assert chain is not None
        assert chain.head == expected.head
        assert list(chain.readable) == expected.readable
        assert list(chain.writable) == expected.writable
        assert chain.readable_bytes == 64 * len(expected.readable)
        assert chain.writable_bytes == 64 * len(expected.writable)
        self.popped.append(chain)

    @precondition(lambda self: self.popped)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        chain = self.popped.pop(data.draw(st.integers(0, len(self.popped) - 1)))
        written = data.draw(st.integers(0, 64))
        self.queue.complete(chain.head, written)
        self.completed.append((chain.head, written))

    @rule()
    def flush(self) -> None:
        old, self.published = self.published, self.published + len(self.completed)
        wanted = self.queue.flush()
        if self.event_idx:
            assert wanted == any(n % 65536 == self.named for n in range(old, self.published))
        else:
            assert wanted == (self.published > old and not self.suppressed)
        done = [(buffer.head, written) for buffer, written in self.guest.collect()]
        assert done == self.completed
        self.completed = []

    @rule(ahead=st.integers(-2, 3))
    def name_index(self, ahead: int) -> None:
        self.named = (self.published + ahead) % 65536
        gpa = self.guest.avail_gpa + 4 + 2 * self.guest.size
        self.memory.store16(gpa, self.named)

    @rule(suppressed=st.booleans())
    def suppress(self, suppressed: bool) -> None:
        self.suppressed = suppressed
        self.memory.store16(self.guest.avail_gpa, int(suppressed))

    @rule()
    def arm(self) -> None:
        assert self.queue.arm() == bool(self.offered)
        if self.event_idx:
            event = self.memory.load16(self.guest.used_gpa + 4 + 8 * self.guest.size)
            assert event == (self.guest.avail_index - len(self.offered)) & 0xFFFF
        else:
            assert self.memory.load16(self.guest.used_gpa) == 0

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()


QueueAgainstReference.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestQueueAgainstReference = QueueAgainstReference.TestCase


def test_indices_wrap_at_65536(memory: GuestMemory) -> None:
    guest = GuestQueue(memory, 2)
    queue = _queue(memory, guest.layout)
    for number in range(66_000):
        guest.next_buffer_gpa = guest.buffers_gpa
        buffer = guest.offer_spans(writable=[(guest.buffers_gpa, 4)])
        chain = queue.pop()
        assert chain is not None
        queue.complete(chain.head, 4)
        guest.want_interrupts()
        assert queue.flush(), number
        assert guest.collect() == [(buffer, 4)]
    assert queue.pop() is None


@settings(max_examples=300, deadline=None)
@given(
    table=st.lists(
        st.tuples(
            st.sampled_from([0, 0x1000, 0x20_0000, RAM_BYTES - 16, 2**40, 2**64 - 1]),
            st.sampled_from([0, 1, 16, 32, 64, 4096, CAP, 2**32 - 1]),
            st.integers(0, 7),
            st.integers(0, 10),
        ),
        min_size=8,
        max_size=8,
    ),
    heads=st.lists(st.integers(0, 10), min_size=1, max_size=8),
)
def test_whatever_stands_in_the_table_pop_gives_a_sane_chain_or_blames_the_guest(
    table: list[tuple[int, int, int, int]], heads: list[int]
) -> None:
    memory = GuestMemory(RAM_BYTES)
    guest = GuestQueue(memory, 8)
    for index, entry in enumerate(table):
        guest.write_descriptor(index, *entry)
        memory.write(0x20_0000 + 16 * index, struct.pack("<QIHH", *entry))
    queue = _queue(memory, guest.layout)
    for head in heads:
        guest.publish(head)
    try:
        while (chain := queue.pop()) is not None:
            assert len(chain.readable) + len(chain.writable) in range(1, 9)
            assert all(length for _, length in chain.readable + chain.writable)
            assert chain.readable_bytes == sum(length for _, length in chain.readable)
            assert chain.writable_bytes == sum(length for _, length in chain.writable)
            assert chain.readable_bytes + chain.writable_bytes <= CAP
    except GuestError:
        pass
    finally:
        memory.close()


@pytest.mark.parametrize("size", [0, 3, 6, 12, 257, 512, 32768, 65536])
def test_size_must_be_a_power_of_two_up_to_the_largest(memory: GuestMemory, size: int) -> None:
    with pytest.raises(GuestError, match="power of two"):
        RingLayout(size, 0x10000, 0x20000, 0x30000).check(memory, 256)


@pytest.mark.parametrize("size", [1, 2, 64, 256])
def test_rings_may_stand_at_the_very_end_of_ram(memory: GuestMemory, size: int) -> None:
    last = (RAM_BYTES - 6 - 8 * size) // 4 * 4
    RingLayout(size, 0x10000, 0x20000, last).check(memory, 256)
    with pytest.raises(GuestError, match="RAM"):
        RingLayout(size, 0x10000, 0x20000, last + 4).check(memory, 256)


@pytest.mark.parametrize(
    "layout",
    [
        RingLayout(8, 0x10008, 0x20000, 0x30000),
        RingLayout(8, 0x10000, 0x20001, 0x30000),
        RingLayout(8, 0x10000, 0x20000, 0x30002),
    ],
)
def test_rings_must_be_aligned(memory: GuestMemory, layout: RingLayout) -> None:
    with pytest.raises(GuestError, match="multiple of"):
        layout.check(memory, 256)


@pytest.mark.parametrize("gpa", [RAM_BYTES, 0xD000_0000, 2**40, 2**64 - 16])
@pytest.mark.parametrize("area", [0, 1, 2])
def test_rings_must_lie_in_ram(memory: GuestMemory, gpa: int, area: int) -> None:
    places = [0x10000, 0x20000, 0x30000]
    places[area] = gpa
    with pytest.raises(GuestError, match="RAM"):
        RingLayout(8, *places).check(memory, 256)


@pytest.mark.parametrize(
    "layout",
    [
        RingLayout(8, 0x10000, 0x10000, 0x30000),
        RingLayout(8, 0x10000, 0x1007E, 0x30000),
        RingLayout(8, 0x10000, 0x30000, 0x30014),
        RingLayout(8, 0x10000, 0x20000, 0x0FFBC),
    ],
)
def test_rings_must_not_overlap(memory: GuestMemory, layout: RingLayout) -> None:
    with pytest.raises(GuestError, match="overlap"):
        layout.check(memory, 256)


@pytest.mark.parametrize("jump", [9, 100, 32768, 65535])
def test_available_index_may_not_jump(memory: GuestMemory, queue: Queue, jump: int) -> None:
    memory.store16(GuestQueue(memory, 8).avail_gpa + 2, jump)
    with pytest.raises(GuestError, match="jumped"):
        queue.pop()


def test_head_in_flight_is_refused(queue: Queue, guest: GuestQueue) -> None:
    buffer = guest.offer(writable=[8])
    assert queue.pop() is not None
    guest.publish(buffer.head)
    with pytest.raises(GuestError, match="in flight"):
        queue.pop()


def _one(guest: GuestQueue, *entries: tuple[int, int, int, int]) -> None:
    for index, entry in enumerate(entries):
        guest.write_descriptor(index, *entry)
    guest.publish(0)


BUFFER = 0x20_0000


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(BUFFER, 8, NEXT, 0)], "more links"),
        ([(BUFFER, 8, NEXT, 1), (BUFFER, 8, NEXT, 0)], "more links"),
        ([(BUFFER, 8, NEXT, 8)], "outside a table"),
        ([(BUFFER, 0, 0, 0)], "no length"),
        ([(BUFFER, 8, NEXT, 1), (BUFFER, 0, 0, 0)], "no length"),
        ([(BUFFER, 8, WRITE | NEXT, 1), (BUFFER, 8, 0, 0)], "follows a writable"),
        ([(BUFFER, CAP + 1, 0, 0)], "longer than"),
        ([(BUFFER, CAP, NEXT, 1), (BUFFER, 1, WRITE, 0)], "longer than"),
        ([(BUFFER, 2**32 - 1, NEXT, 1), (BUFFER, 2**32 - 1, 0, 0)], "longer than"),
        ([(BUFFER, 32, INDIRECT | NEXT, 1), (BUFFER, 8, 0, 0)], "indirect"),
        ([(BUFFER, 24, INDIRECT, 0)], "indirect table"),
        ([(BUFFER, 0, INDIRECT, 0)], "indirect table"),
        ([(BUFFER, 16 * 9, INDIRECT, 0)], "indirect table"),
        ([(RAM_BYTES - 8, 16, INDIRECT, 0)], "RAM"),
    ],
)
def test_bad_chains(
    queue: Queue, guest: GuestQueue, entries: list[tuple[int, int, int, int]], message: str
) -> None:
    _one(guest, *entries)
    with pytest.raises(GuestError, match=message):
        queue.pop()


def test_head_outside_the_table(queue: Queue, guest: GuestQueue) -> None:
    guest.publish(8)
    with pytest.raises(GuestError, match="outside a table"):
        queue.pop()


def test_nested_indirect(memory: GuestMemory, queue: Queue, guest: GuestQueue) -> None:
    memory.write(BUFFER, struct.pack("<QIHH", BUFFER + 64, 16, INDIRECT, 0))
    _one(guest, (BUFFER, 16, INDIRECT, 0))
    with pytest.raises(GuestError, match="nested"):
        queue.pop()


def test_indirect_only_if_negotiated(memory: GuestMemory, guest: GuestQueue) -> None:
    queue = _queue(memory, guest.layout, indirect=False)
    guest.offer(writable=[8], indirect=True)
    with pytest.raises(GuestError, match="negotiated"):
        queue.pop()


def test_plain_links_then_an_indirect_table(
    memory: GuestMemory, queue: Queue, guest: GuestQueue
) -> None:
    memory.write(BUFFER, struct.pack("<QIHH", BUFFER + 64, 16, WRITE, 0))
    _one(guest, (BUFFER + 4096, 8, NEXT, 1), (BUFFER, 16, INDIRECT, 0))
    chain = queue.pop()
    assert chain == Chain(0, ((BUFFER + 4096, 8),), ((BUFFER + 64, 16),), 8, 16)


def test_longest_chain_is_as_long_as_the_queue(queue: Queue, guest: GuestQueue) -> None:
    guest.offer([b"x"] * 8)
    chain = queue.pop()
    assert chain is not None
    assert len(chain.readable) == 8


@pytest.fixture
def flipping_queue(flipping_memory: FlippingMemory) -> tuple[GuestQueue, Queue]:
    guest = GuestQueue(flipping_memory, 8)
    return guest, _queue(flipping_memory, guest.layout)


@pytest.mark.parametrize("indirect", [False, True])
def test_descriptors_are_copied_once(
    flipping_memory: FlippingMemory,
    flipping_queue: tuple[GuestQueue, Queue],
    indirect: bool,
) -> None:
    guest, queue = flipping_queue
    buffer = guest.offer([b"abc", b"de"], [7], indirect=indirect)
    flipping_memory.flip = True
    chain = queue.pop()
    assert flipping_memory.second_reads == 0
    assert chain is not None
    assert list(chain.readable + chain.writable) == buffer.readable + buffer.writable


def test_without_event_idx_notifications_are_suppressed_while_working(
    memory: GuestMemory, guest: GuestQueue
) -> None:
    queue = _queue(memory, guest.layout, event_idx=False)
    guest.offer(writable=[8])
    seen = []
    assert not queue.drain(lambda chain: seen.append(memory.load16(guest.used_gpa)))
    assert seen == [1]
    assert memory.load16(guest.used_gpa) == 0


def test_drain_stops_at_its_budget(queue: Queue, guest: GuestQueue) -> None:
    for _ in range(5):
        guest.offer(writable=[8])
    seen: list[Chain] = []
    assert queue.drain(seen.append, budget=3)
    assert len(seen) == 3
    assert not queue.drain(seen.append, budget=3)
    assert len(seen) == 5


def test_completing_what_is_not_in_flight_is_our_error(queue: Queue) -> None:
    with pytest.raises(KeyError):
        queue.complete(0, 0)
