"""What a dead device had in flight, against a driver that uses memory again as Linux does."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from guest_driver import BUFFERS_GPA, INDIRECT, NEXT, RAM_BYTES, WRITE, GuestQueue
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import GuestError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.queue import Chain, Queue
from vmcell_runtime.virtio.unanswered import LeftOver, left_over

SIZE = 8
RING: dict[str, Any] = {"max_chain_bytes": 4096, "indirect": True, "event_idx": True}
REQUEST_BYTES, TABLE_BYTES = 64, 32
TABLES_GPA = BUFFERS_GPA + 0x10000


@dataclass
class Request:
    head: int
    slot: int
    table: int
    number: int  # of all that were made available


@dataclass
class Simulation:
    """A driver and a device; heads, requests and tables freed last are used first, as in Linux."""

    memory: GuestMemory
    with_reply: bool = True
    queue: GuestQueue = field(init=False)
    used: int = 0
    made: int = 0
    heads: list[int] = field(default_factory=lambda: list(range(SIZE)))
    slots: list[int] = field(default_factory=lambda: list(range(SIZE)))
    tables: list[int] = field(default_factory=lambda: list(range(SIZE)))
    in_flight: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queue = GuestQueue(self.memory, SIZE)
        self.memory.write(self.queue.gpa, bytes(0x1000))
        self.memory.write(BUFFERS_GPA, bytes(0x20000))

    def ask(self) -> None:
        if not self.heads:
            return
        self.made += 1
        request = Request(self.heads.pop(), self.slots.pop(), self.tables.pop(), self.made)
        gpa = BUFFERS_GPA + REQUEST_BYTES * request.slot
        header = struct.pack("<IIQ24x", 40, 1, request.number)
        self.memory.write(gpa, header + bytes(16))
        table = struct.pack("<QIHH", gpa, 40, NEXT * self.with_reply, 1)
        table += struct.pack("<QIHH", gpa + 40, 16, WRITE, 0) if self.with_reply else b""
        table_gpa = TABLES_GPA + TABLE_BYTES * request.table
        self.memory.write(table_gpa, table)
        self.queue.write_descriptor(request.head, table_gpa, len(table), INDIRECT)
        self.queue.publish(request.head)
        self.in_flight.append(request)

    def write_reply(self, which: int) -> Request | None:
        """The device's half of an answer; the driver does not know of it yet."""
        if not self.in_flight:
            return None
        request = self.in_flight[which % len(self.in_flight)]
        if self.with_reply:
            reply = struct.pack("<IiQ", 16, 0, request.number)
            self.memory.write(BUFFERS_GPA + REQUEST_BYTES * request.slot + 40, reply)
        return request

    def answer(self, which: int) -> None:
        request = self.write_reply(which)
        if request is None:
            return
        slot_gpa = self.queue.used_gpa + 4 + 8 * (self.used % SIZE)
        self.memory.write(slot_gpa, struct.pack("<II", request.head, 16))
        self.used = (self.used + 1) & 0xFFFF
        self.memory.store16(self.queue.used_gpa + 2, self.used)
        self.in_flight.remove(request)
        self.heads.append(request.head)
        self.slots.append(request.slot)
        self.tables.append(request.table)

    def look(self) -> LeftOver:
        return left_over(self.memory, Queue(self.memory, self.queue.layout, **RING))

    @property
    def old(self) -> list[Request]:
        """In flight while at least `SIZE` others were made available."""
        return [request for request in self.in_flight if self.made - request.number >= SIZE]


@pytest.fixture(scope="module")
def ram() -> Iterator[GuestMemory]:
    """One for all examples: each simulation clears what it uses."""
    memory = GuestMemory(RAM_BYTES)
    yield memory
    memory.close()


steps = st.lists(st.one_of(st.none(), st.integers(0, SIZE - 1)), max_size=80)
"""None asks, a number answers one of those in flight."""


def play(simulation: Simulation, moves: list[int | None]) -> None:
    for move in moves:
        if move is None:
            simulation.ask()
        else:
            simulation.answer(move)


@given(steps)
def test_exactly_what_is_in_flight_is_found(ram: GuestMemory, moves: list[int | None]) -> None:
    simulation = Simulation(ram)
    play(simulation, moves)
    left = simulation.look()
    found = [chain.head for chain in left.chains]
    truth = {request.head for request in simulation.in_flight}
    young = truth - {request.head for request in simulation.old}
    # The certain ones come first, so nothing wrong is given back before them.
    assert set(found[: len(young)]) == young
    assert len(found) + left.missing == len(truth)
    assert len(set(found)) == len(found)
    assert (left.next_avail, left.used_index) == (simulation.made, simulation.used)
    if not simulation.old:
        assert not left.missing


@given(steps, st.integers(0, SIZE - 1))
def test_a_reply_that_was_not_given_back_counts(
    ram: GuestMemory, moves: list[int | None], which: int
) -> None:
    simulation = Simulation(ram)
    play(simulation, moves)
    simulation.write_reply(which)
    found = {chain.head for chain in simulation.look().chains}
    if len(simulation.in_flight) == 1 and simulation.made <= SIZE:
        assert found == {request.head for request in simulation.in_flight}
    assert len(found) <= len(simulation.in_flight)


@given(steps)
def test_requests_without_reply_are_found_in_order(
    ram: GuestMemory, moves: list[int | None]
) -> None:
    simulation = Simulation(ram, with_reply=False)
    play(simulation, [None if move is None else 0 for move in moves])
    found = {chain.head for chain in simulation.look().chains}
    assert found == {request.head for request in simulation.in_flight}


def test_indices_wrap(ram: GuestMemory) -> None:
    simulation = Simulation(ram)
    for _ in range(0x1_0000 + 3):
        simulation.ask()
        simulation.answer(0)
    simulation.ask()
    left = simulation.look()
    assert [chain.head for chain in left.chains] == [simulation.in_flight[0].head]
    assert (left.next_avail, left.used_index) == (4, 3)


def test_slots_written_over_while_we_look_do_not_count(ram: GuestMemory) -> None:
    simulation = Simulation(ram)
    play(simulation, [None, 0] * SIZE + [None])

    class Racing(Queue):
        """The driver goes on as soon as the first chain is looked at."""

        def walk(self, head: int) -> Chain:
            simulation.ask()
            return super().walk(head)

    (chain,) = left_over(ram, Racing(ram, simulation.queue.layout, **RING)).chains
    assert chain.head == simulation.in_flight[0].head


def test_more_in_flight_than_fits_is_the_guests_fault(ram: GuestMemory) -> None:
    simulation = Simulation(ram)
    simulation.memory.store16(simulation.queue.avail_gpa + 2, SIZE + 1)
    with pytest.raises(GuestError, match="9 buffers are in flight in a queue of 8"):
        simulation.look()


@given(st.binary(min_size=0x800, max_size=0x800))
def test_any_memory_gives_an_answer(ram: GuestMemory, noise: bytes) -> None:
    simulation = Simulation(ram)
    ram.write(simulation.queue.gpa, noise)
    simulation.memory.store16(simulation.queue.avail_gpa + 2, SIZE)
    simulation.memory.store16(simulation.queue.used_gpa + 2, 0)
    left = simulation.look()
    assert len(left.chains) + left.missing == SIZE
