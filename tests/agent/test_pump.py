"""One direction of a stream: order, back-pressure, both kinds of end."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_agent.eventloop import READABLE, Loop
from vmcell_agent.pump import CHUNK_BYTES, DRAINING, ENDED, MOVING, Pump


class Bench:
    """A loop with one pump from a pipe to a socket; `far` is the other end of the socket."""

    def __init__(self, *, drain: bool = True) -> None:
        self.loop = Loop()
        source, self.writer = os.pipe2(os.O_NONBLOCK)
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.far.settimeout(5)
        self.pump = Pump(
            self.loop,
            source,
            self.near.fileno(),
            end_sink=self.near.close,
            progressed=lambda: None,
            drain=drain,
        )

    def until(self, condition: Callable[[], bool]) -> None:
        """Run the loop until `condition` holds; fails after five seconds."""
        deadline = self.loop.call_later(5, self.loop.stop)

        def check() -> None:
            if condition():
                self.loop.stop()
            else:
                self.loop.call_later(0.001, check)

        check()
        if not condition():
            self.loop.run()
        deadline.cancel()
        assert condition()

    def close(self) -> None:
        self.pump.close()
        for fd in (self.writer,):
            if fd >= 0:
                os.close(fd)
        self.near.close()
        self.far.close()
        self.loop.close()

    def end_source(self) -> None:
        os.close(self.writer)
        self.writer = -1


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@given(st.lists(st.binary(min_size=1, max_size=3000), max_size=8))
def test_bytes_arrive_in_order_and_the_end_last(parts: list[bytes]) -> None:
    bench = Bench()
    for part in parts:
        os.write(bench.writer, part)
    bench.end_source()
    bench.until(lambda: bench.pump.state == ENDED)
    received = b""
    while data := bench.far.recv(1 << 16):
        received += data
    assert received == b"".join(parts)
    bench.close()


def test_a_stuck_sink_stops_the_source_and_nothing_is_lost(bench: Bench) -> None:
    sent = 0
    chunk = b"x" * CHUNK_BYTES

    def fill() -> bool:
        """True once neither pipe nor socket takes more."""
        nonlocal sent
        try:
            sent += os.write(bench.writer, chunk)
        except BlockingIOError:
            return not select.select([], [bench.near], [], 0)[1]
        return False

    bench.until(fill)
    assert bench.pump.state == MOVING
    bench.end_source()
    received = 0

    def drain() -> bool:
        nonlocal received
        while select.select([bench.far], [], [], 0)[0] and (data := bench.far.recv(1 << 20)):
            received += len(data)
        return bench.pump.state == ENDED

    bench.until(drain)
    drain()
    assert received == sent


def test_output_is_dropped_after_the_reader_has_gone(bench: Bench) -> None:
    bench.far.close()
    os.write(bench.writer, b"a" * 1000)
    bench.until(lambda: bench.pump.state == DRAINING)
    os.write(bench.writer, b"b" * 500)
    bench.until(lambda: bench.pump.dropped_bytes == 1500)
    bench.end_source()
    bench.until(lambda: bench.pump.state == ENDED)


def test_input_ends_when_the_program_has_closed_it() -> None:
    bench = Bench(drain=False)
    bench.far.close()
    os.write(bench.writer, b"a")
    bench.until(lambda: bench.pump.state == ENDED)
    bench.close()


def test_finish_input_hands_over_what_is_there(bench: Bench) -> None:
    os.write(bench.writer, b"a" * 50_000)
    bench.pump.finish_input()
    bench.until(lambda: bench.pump.state == ENDED)
    received = b""
    while data := bench.far.recv(1 << 16):
        received += data
    assert len(received) == 50_000


def test_what_was_written_before_the_end_is_owed(bench: Bench) -> None:
    os.write(bench.writer, b"a" * 10)
    bench.pump.owe_what_is_written()
    assert not bench.pump.settled
    bench.until(lambda: bench.pump.settled)
    assert bench.pump.state == MOVING  # the writing end is still open
    assert bench.far.recv(100) == b"a" * 10


def test_the_loop_forgets_cancelled_timers_and_keeps_order() -> None:
    loop = Loop()
    seen: list[int] = []
    cancelled = loop.call_later(0, lambda: seen.append(0))
    cancelled.cancel()
    loop.call_later(0.002, lambda: (seen.append(2), loop.stop())[0])
    loop.call_later(0.001, lambda: seen.append(1))
    loop.run()
    assert seen == [1, 2]
    loop.close()


def test_a_descriptor_forgotten_within_a_round_is_not_called() -> None:
    loop = Loop()
    pairs = [socket.socketpair(), socket.socketpair()]
    calls: list[int] = []

    def once(index: int) -> Callable[[int], None]:
        def called(events: int) -> None:
            calls.append(index)
            for near, _ in pairs:
                loop.unwatch(near.fileno())
            loop.stop()

        return called

    for index, (near, far) in enumerate(pairs):
        far.send(b"x")
        loop.watch(near.fileno(), READABLE, once(index))
    loop.run()
    assert len(calls) == 1
    for pair in pairs:
        for end in pair:
            end.close()
    loop.close()
