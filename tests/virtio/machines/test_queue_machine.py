"""The split queue against a reference, with a driver that keeps the rules and one that does not."""

from __future__ import annotations

from collections import deque

import pytest
from fake_memory import WatchedMemory
from guest_driver import Buffer, GuestQueue
from step_machine import Choices, StepMachine, machine_test, step

from vmcell_protos.errors import GuestError
from vmcell_runtime.virtio.queue import Chain, Queue

RINGS, BUFFERS, RAM_BYTES = 0x1000, 0x8000, 0x1_0000
PIECE = 64
CAP = 16 * PIECE


class QueueMachine(StepMachine):
    """Buffers come out once, in order, as offered; used ones go back as completed.

    The reference is a deque of what was offered, and the notification rule of § 2.7.7.2 in its
    plain words: interrupt if the index the driver named was passed by this flush.
    """

    def set_up(self, choices: Choices) -> None:
        self.memory = WatchedMemory(RAM_BYTES)
        self.size = choices.of([1, 2, 4, 8, 16])
        self.event_idx, self.indirect = choices.flag(), choices.flag()
        self.guest = GuestQueue(self.memory, self.size, gpa=RINGS, buffers_gpa=BUFFERS)
        self.memory.set_rings([self.guest.layout])
        self.start = choices.of([0, 65530, 65535])
        self.queue = self._new_queue()
        self.queue.resume(self.start, self.start, ())
        self.guest.avail_index = self.guest.used_index = self.start
        self.memory.store16(self.guest.avail_gpa + 2, self.start)
        self.memory.store16(self.guest.used_gpa + 2, self.start)
        self.offered: deque[Buffer] = deque()
        self.popped: list[Chain] = []
        self.completed: list[tuple[int, int]] = []
        self.published = self.taken = 0
        self.named = self.start
        self._name(self.start)
        self.suppressed = False

    def _new_queue(self) -> Queue:
        return Queue(
            self.memory,
            self.guest.layout,
            max_chain_bytes=CAP,
            indirect=self.indirect,
            event_idx=self.event_idx,
        )

    @step(4)
    def offer(self, choices: Choices) -> None:
        if not self.guest.free:
            return
        indirect = self.indirect and choices.flag()
        limit = self.size if indirect else len(self.guest.free)
        pieces = 1 + choices.below(min(limit, 5))
        readable = choices.below(pieces + 1)
        spans = [(BUFFERS + PIECE * n, PIECE) for n in range(pieces)]
        # An indirect table of its own for each head.
        self.guest.next_buffer_gpa = BUFFERS + 0x1000 + 0x100 * self.guest.free[0]
        offer = self.guest.offer_spans
        self.offered.append(offer(spans[:readable], spans[readable:], indirect=indirect))

    @step(4)
    def pop(self, choices: Choices) -> None:
        with self._watched():
            chain = self.queue.pop()
        self._expect(chain)

    def _expect(self, chain: Chain | None) -> None:
        if not self.offered:
            assert chain is None
            return
        expected = self.offered.popleft()
        assert chain is not None
        assert chain.head == expected.head
        assert list(chain.readable) == expected.readable
        assert list(chain.writable) == expected.writable
        assert chain.readable_bytes == PIECE * len(expected.readable)
        assert chain.writable_bytes == PIECE * len(expected.writable)
        self.popped.append(chain)
        self.taken += 1

    @step(4)
    def complete(self, choices: Choices) -> None:
        if self.popped:
            chain = self.popped.pop(choices.below(len(self.popped)))
            written = choices.below(1 << 16)
            self.queue.complete(chain.head, written)
            self.completed.append((chain.head, written))

    @step(3)
    def flush(self, choices: Choices) -> None:
        old, self.published = self.published, self.published + len(self.completed)
        with self._watched():
            wanted = self.queue.flush()
        if self.event_idx:
            passed = [(self.start + n) % 65536 for n in range(old, self.published)]
            assert wanted == (self.named in passed)
        else:
            assert wanted == (self.published > old and not self.suppressed)
        done = [(buffer.head, written) for buffer, written in self.guest.collect()]
        assert done == self.completed
        self.completed = []

    @step(2)
    def drain(self, choices: Choices) -> None:
        budget = choices.below(4)
        seen: list[Chain] = []
        with self._watched():
            more = self.queue.drain(seen.append, budget)
        assert len(seen) <= budget
        for chain in seen:
            self._expect(chain)
        assert more or not self.offered

    @step()
    def name_index(self, choices: Choices) -> None:
        self._name((self.start + self.published + choices.below(6) - 2) % 65536)

    def _name(self, index: int) -> None:
        self.named = index
        self.memory.store16(self.guest.avail_gpa + 4 + 2 * self.size, index)

    @step()
    def suppress(self, choices: Choices) -> None:
        self.suppressed = choices.flag()
        self.memory.store16(self.guest.avail_gpa, int(self.suppressed))

    @step(2)
    def arm(self, choices: Choices) -> None:
        with self._watched():
            assert self.queue.arm() == bool(self.offered)
        if self.event_idx:
            event = self.memory.load16(self.guest.used_gpa + 4 + 8 * self.size)
            assert event == (self.start + self.taken) & 0xFFFF
        else:
            assert self.memory.load16(self.guest.used_gpa) == 0

    @step()
    def go_on_elsewhere(self, choices: Choices) -> None:
        """Another process takes over at the position, where nothing is in flight."""
        if not self.popped and not self.completed:
            position = self.queue.position
            self.queue = self._new_queue()
            self.queue.resume(*position, ())

    @step()
    def offer_again(self, choices: Choices) -> None:
        """A head that is in flight or not published yet, once more."""
        heads = [chain.head for chain in self.popped] + [head for head, _ in self.completed]
        if heads and not self.offered and len(self.guest.free) < self.size:
            self._break(choices.of(heads), "in flight")

    @step()
    def offer_nonsense(self, choices: Choices) -> None:
        if not self.offered:
            self._break(self.size + choices.below(0x10000 - self.size), "outside a table")

    @step()
    def jump(self, choices: Choices) -> None:
        if not self.offered:
            index = self.memory.load16(self.guest.avail_gpa + 2)
            jumped = (index + self.size + 1 + choices.below(0xFFFF - self.size)) & 0xFFFF
            self.memory.store16(self.guest.avail_gpa + 2, jumped)
            with pytest.raises(GuestError, match="jumped"):
                self.queue.pop()
            self.memory.store16(self.guest.avail_gpa + 2, index)

    def _break(self, head: int, sentence: str) -> None:
        """The guest is told so each time, and what was right stays right."""
        index = self.guest.avail_index
        self.guest.publish(head)
        for _ in range(2):
            with pytest.raises(GuestError, match=sentence):
                self.queue.pop()
        self.guest.avail_index = index
        self.memory.store16(self.guest.avail_gpa + 2, index)
        self.queue._seen_avail = index

    def _watched(self) -> _Watch:
        return _Watch(self.memory)

    def check(self) -> None:
        assert not self.memory.faults
        assert not self.memory.second_reads
        position = (self.start + self.published) & 0xFFFF
        assert self.queue.position == (position, position)

    def tear_down(self) -> None:
        self.memory.close()


class _Watch:
    def __init__(self, memory: WatchedMemory) -> None:
        self._memory = memory

    def __enter__(self) -> None:
        self._memory.watching = True

    def __exit__(self, *error: object) -> None:
        self._memory.watching = False


test_queue = machine_test(QueueMachine, "queue")
