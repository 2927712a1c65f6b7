"""The event loop: descriptors, timers in order, calls from other threads, no lost wake-up."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from vmcell_runtime.loop import READABLE, URGENT_NS, WRITABLE, EventLoop, Soon

SECOND_NS = 1_000_000_000


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    # A test that hangs ends here and then fails by its own asserts.
    loop.call_at(time.monotonic_ns() + 10 * SECOND_NS, loop.stop)
    yield loop
    loop.close()
    loop.close()


def test_readiness_reaches_the_callback_until_removed(loop: EventLoop) -> None:
    ours, theirs = socket.socketpair()
    got: list[bytes] = []

    def on_ready(events: int) -> None:
        assert events & READABLE
        got.append(ours.recv(1))
        if got[-1] == b"c":
            loop.remove(ours.fileno())
            loop.stop()

    with ours, theirs:
        loop.add(ours.fileno(), on_ready)
        theirs.send(b"abcd")
        loop.run()
        assert got == [b"a", b"b", b"c"]
        with pytest.raises(KeyError):
            loop.remove(ours.fileno())


def test_modify_changes_what_is_waited_for(loop: EventLoop) -> None:
    ours, theirs = socket.socketpair()
    seen: list[int] = []

    def on_ready(events: int) -> None:
        seen.append(events)
        loop.modify(ours.fileno(), READABLE)
        theirs.send(b"x") if len(seen) == 1 else loop.stop()

    with ours, theirs:
        loop.add(ours.fileno(), on_ready, WRITABLE)
        loop.run()
    assert seen == [WRITABLE, READABLE]


def test_a_callback_may_remove_a_descriptor_that_is_ready_too(loop: EventLoop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    calls: list[int] = []

    def remove_other(other: int) -> None:
        calls.append(other)
        pairs[1 - other][0].recv(1)
        loop.remove(pairs[other][0].fileno())
        loop.call_soon(loop.stop)

    for number, (ours, theirs) in enumerate(pairs):
        loop.add(ours.fileno(), lambda _events, other=1 - number: remove_other(other))
        theirs.send(b"x")
    loop.run()
    for pair in pairs:
        for sock in pair:
            sock.close()
    assert len(calls) == 1, "the removed one was not called"


def test_calls_from_other_threads_all_run_on_the_loops_thread(loop: EventLoop) -> None:
    done: list[int] = []

    def call() -> None:
        for _ in range(500):
            loop.call_soon(lambda: done.append(threading.get_ident()))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()

    def finish_when_all(_events: int = 0) -> None:
        if len(done) == 2000:
            loop.stop()
        else:
            loop.call_soon(finish_when_all)

    loop.call_soon(finish_when_all)
    loop.run()
    for thread in threads:
        thread.join(10)
    assert done == [threading.get_ident()] * 2000


def test_timers_fire_in_order_of_their_deadlines_and_not_early(loop: EventLoop) -> None:
    start_ns = time.monotonic_ns()
    fired: list[tuple[str, int]] = []

    def note(name: str) -> None:
        fired.append((name, time.monotonic_ns() - start_ns))

    loop.call_at(start_ns + 30_000_000, lambda: (note("late"), loop.stop()))
    loop.call_at(start_ns + 10_000_000, lambda: note("early"))
    cancelled = loop.call_at(start_ns + 15_000_000, lambda: note("never"))
    loop.call_at(start_ns - 1, lambda: note("past"))
    cancelled.cancel()
    cancelled.cancel()
    loop.run()
    assert [name for name, _ in fired] == ["past", "early", "late"]
    assert fired[1][1] >= 10_000_000
    assert fired[2][1] >= 30_000_000


def test_a_stop_before_run_counts(loop: EventLoop) -> None:
    loop.stop()
    loop.run()


def test_what_a_callback_raises_leaves_run(loop: EventLoop) -> None:
    loop.call_soon(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        loop.run()


def test_an_idle_loop_costs_no_processor_time(loop: EventLoop) -> None:
    start_ns = time.monotonic_ns()
    loop.call_at(start_ns + SECOND_NS // 4, loop.stop)
    before_ns = time.thread_time_ns()
    loop.run()
    assert time.thread_time_ns() - before_ns < SECOND_NS // 50


def test_a_hang_up_is_seen_without_asking(loop: EventLoop) -> None:
    ours, theirs = socket.socketpair()
    seen: list[int] = []
    with ours:
        loop.add(ours.fileno(), lambda events: (seen.append(events), loop.stop()), 0)
        theirs.close()
        loop.run()
    assert seen[0] & select.EPOLLHUP


def test_closing_the_loop_leaves_added_descriptors_open(loop: EventLoop) -> None:
    read_end, write_end = os.pipe()
    loop.add(read_end, lambda _events: None)
    loop.close()
    os.write(write_end, b"x")
    assert os.read(read_end, 1) == b"x"
    os.close(read_end)
    os.close(write_end)


def test_what_is_urgent_does_not_wait_for_a_whole_batch(loop: EventLoop) -> None:
    order: list[str] = []
    pairs = [socket.socketpair() for _ in range(4)]
    asked, asker = socket.socketpair()

    def busy(ours: socket.socket) -> None:
        ours.recv(1)
        order.append("busy")
        if len(order) == 1:
            asker.send(b"?")
            loop.call_soon(lambda: order.append("call"))
        deadline_ns = time.monotonic_ns() + 2 * URGENT_NS
        while time.monotonic_ns() < deadline_ns:
            pass
        if order.count("busy") == len(pairs):
            loop.stop()

    def answer(_events: int) -> None:
        asked.recv(1)  # blocks for ever if nobody asks
        order.append("answer")

    for ours, theirs in pairs:
        loop.add(ours.fileno(), lambda _events, ours=ours: busy(ours))
        theirs.send(b"x")
    loop.add(asked.fileno(), answer, urgent=True)
    loop.run()
    assert sorted(order[1:3]) == ["answer", "call"]
    assert order[3:] == ["busy"] * 3
    loop.remove(asked.fileno())
    for sock in (asked, asker, *(end for pair in pairs for end in pair)):
        sock.close()


def test_asked_for_often_it_is_done_once(loop: EventLoop) -> None:
    done: list[int] = []

    def act() -> None:
        done.append(len(done))
        if len(done) == 1:
            soon()  # while it acts: that is another one
        else:
            loop.stop()

    soon = Soon(loop, act)
    for _ in range(1000):
        soon()
    assert len(loop._soon) == 1
    loop.run()
    assert done == [0, 1]
