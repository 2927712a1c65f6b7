"""A pump that is parked moves nothing and loses nothing, whatever happens to its ends meanwhile."""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmcell_agent.eventloop import Loop
from vmcell_agent.pump import CHUNK_BYTES, DRAINING, ENDED, MOVING, Pump

_SMALL_BUFFER = 4096  # so that a sink is full soon; the kernel makes a few KiB of it


class Ends:
    """A pipe that is pumped into a socket; `far` is that socket's other end."""

    def __init__(self, *, drain: bool = True) -> None:
        self.loop = Loop()
        self.source, self.writer = os.pipe2(os.O_NONBLOCK)
        self.near, self.far = self.new_pair()
        self.pump = Pump(
            self.loop,
            self.source,
            self.near.fileno(),
            end_sink=self.near.close,
            progressed=lambda: None,
            drain=drain,
        )

    @staticmethod
    def new_pair() -> tuple[socket.socket, socket.socket]:
        near, far = socket.socketpair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL_BUFFER)
        for end in (near, far):
            end.setblocking(False)
        return near, far

    def turn(self, rounds: int = 4) -> None:
        """Let the loop do what is due now."""
        for _ in range(rounds):
            self.loop.call_later(0, self.loop.stop)
            self.loop.run()

    def take(self) -> bytes:
        """All that `far` can read now."""
        taken = b""
        while select.select([self.far], [], [], 0)[0]:
            try:
                data = self.far.recv(1 << 16)
            except ConnectionResetError:
                break
            if not data:
                break
            taken += data
        return taken

    def give_new_sink(self) -> None:
        self.near, self.far = self.new_pair()
        self.pump.replace_sink(self.near.fileno(), self.near.close)

    def close(self) -> None:
        self.pump.close()
        if self.writer >= 0:
            os.close(self.writer)
        self.near.close()
        self.far.close()
        self.loop.close()


class ParkedPump(RuleBasedStateMachine):
    """Everything written is read at the far ends once and in order, over any number of parkings,
    broken connections and new ones."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = Ends()
        self.parked = self.broken = False
        self.written = self.received = b""

    @rule(size=st.sampled_from([1, 100, 5000, 20_000, 40_000]))
    def write(self, size: int) -> None:
        first = len(self.written)
        data = b"".join(b"%7d\n" % number for number in range(first, first + size))[:size]
        with suppress(BlockingIOError):
            self.written += data[: os.write(self.ends.writer, data)]

    @rule()
    def turn(self) -> None:
        before = self.ends.take() if self.parked and not self.broken else b""
        self.received += before
        self.ends.turn()
        if self.parked and not self.broken:
            assert self.ends.take() == b""

    @precondition(lambda self: not self.broken)
    @rule()
    def read(self) -> None:
        self.received += self.ends.take()

    @rule()
    def park(self) -> None:
        self.ends.pump.park()
        self.parked = True

    @precondition(lambda self: self.parked and not self.broken)
    @rule()
    def break_the_connection(self) -> None:
        self.received += self.ends.take()  # what has left the machine has left it
        self.ends.far.close()
        self.broken = True

    @precondition(lambda self: self.broken)
    @rule()
    def replace(self) -> None:
        self.ends.far.close()
        self.ends.give_new_sink()
        self.broken = False

    @precondition(lambda self: not self.broken)
    @rule()
    def go_on(self) -> None:
        self.ends.pump.go_on()
        self.parked = False

    @precondition(lambda self: not self.broken)
    @rule()
    def be_restored(self) -> None:
        """All of it in one step, so that it happens often with something pending."""
        self.park()
        self.break_the_connection()
        self.ends.turn()
        self.replace()
        self.go_on()

    @invariant()
    def nothing_is_lost_or_told_twice(self) -> None:
        assert self.ends.pump.state == MOVING
        assert self.ends.pump.dropped_bytes == 0
        assert self.written.startswith(self.received)

    def teardown(self) -> None:
        if self.broken:
            self.replace()
        self.ends.pump.go_on()
        os.close(self.ends.writer)
        self.ends.writer = -1
        for _ in range(2000):
            self.ends.turn(1)
            self.received += self.ends.take()
            if self.ends.pump.state == ENDED:
                break
        assert self.received + self.ends.take() == self.written
        assert self.ends.pump.state == ENDED
        self.ends.close()


TestParkedPump = ParkedPump.TestCase
TestParkedPump.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("drain", [True, False])
def test_a_broken_end_is_seen_only_when_the_pump_goes_on(drain: bool) -> None:
    ends = Ends(drain=drain)
    ends.pump.park()
    ends.far.close()
    os.write(ends.writer, b"x" * 10)
    ends.turn()
    assert ends.pump.state == MOVING
    ends.pump.go_on()
    ends.turn()
    assert ends.pump.state == (DRAINING if drain else ENDED)
    assert ends.pump.dropped_bytes == 10
    ends.close()


def test_pending_bytes_stay_when_the_reader_is_given_up_and_count_as_dropped() -> None:
    ends = Ends()
    os.write(ends.writer, b"x" * 60_000)
    ends.turn()  # the sink is full
    ends.pump.park()
    delivered = len(ends.take())
    ends.pump.give_up_sink()
    ends.turn()
    assert ends.pump.state == DRAINING
    assert delivered
    assert delivered + ends.pump.dropped_bytes == 60_000
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ends.near.fileno())
    ends.close()


def test_a_reader_that_comes_again_gets_what_is_written_from_then_on() -> None:
    ends = Ends()
    ends.far.close()
    os.write(ends.writer, b"nobody")
    ends.turn()
    assert ends.pump.state == DRAINING
    ends.pump.park()
    os.write(ends.writer, b"somebody")
    ends.turn()
    ends.give_new_sink()
    ends.pump.go_on()
    ends.turn()
    assert ends.take() == b"somebody"
    assert ends.pump.state == MOVING
    assert ends.pump.dropped_bytes == 6
    ends.close()


def test_input_goes_on_from_another_source_behind_what_is_pending() -> None:
    ends = Ends(drain=False)
    os.write(ends.writer, b"a" * 60_000)
    ends.turn()  # the sink is full
    ends.pump.park()
    os.close(ends.writer)
    source, ends.writer = os.pipe2(os.O_NONBLOCK)
    ends.pump.replace_source(source)
    os.write(ends.writer, b"b" * 100)
    taken = ends.take()
    ends.pump.go_on()
    while len(taken) < 60_100:
        ends.turn(1)
        taken += ends.take()
    assert taken == b"a" * 60_000 + b"b" * 100
    ends.close()


def test_the_end_of_input_waits_for_the_pump_to_go_on() -> None:
    ends = Ends(drain=False)
    os.write(ends.writer, b"last")
    ends.pump.park()
    ends.pump.finish_input()
    ends.turn()
    assert (ends.pump.state, ends.take()) == (MOVING, b"")
    ends.pump.go_on()
    ends.turn()
    assert (ends.pump.state, ends.take()) == (ENDED, b"last")
    ends.close()


def test_what_an_ended_program_owes_is_owed_by_a_parked_pump_too() -> None:
    ends = Ends()
    ends.pump.park()
    os.write(ends.writer, b"x" * 100)
    ends.pump.owe_what_is_written()
    ends.turn()
    assert not ends.pump.settled
    ends.pump.go_on()
    ends.turn()
    assert ends.pump.settled
    assert ends.take() == b"x" * 100
    ends.close()


def test_a_pump_that_has_ended_neither_parks_nor_goes_on() -> None:
    ends = Ends()
    ends.pump.close()
    ends.pump.park()
    ends.pump.go_on()
    ends.pump.give_up_sink()
    assert ends.pump.state == ENDED
    ends.close()


def test_a_parked_pump_stops_the_program_that_writes() -> None:
    ends = Ends()
    ends.pump.park()
    with suppress(BlockingIOError):
        while os.write(ends.writer, bytes(CHUNK_BYTES)):
            pass
    ends.turn()
    assert not select.select([], [ends.writer], [], 0)[1]
    ends.pump.go_on()
    ends.turn()
    assert select.select([], [ends.writer], [], 0)[1]
    ends.close()
