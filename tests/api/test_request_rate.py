"""The rate of a team's requests: exact, shared by processes, bounded in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_api.request_rate import BURST_S, RateExceeded, RequestRates


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _passes(rates: RequestRates, team: str, per_s: int, tries: int) -> int:
    passed = 0
    for _ in range(tries):
        try:
            rates.take(team, per_s)
        except RateExceeded:
            continue
        passed += 1
    return passed


def test_a_burst_then_the_rate(clock: Clock) -> None:
    rates = RequestRates(clock)
    assert _passes(rates, "one", 10, 100) == 20
    assert _passes(rates, "two", 10, 100) == 20, "teams are counted apart"
    clock.now += 0.5
    assert _passes(rates, "one", 10, 100) == 5
    clock.now += 60
    assert _passes(rates, "one", 10, 100) == 20
    rates.close()
    rates.close()


def test_what_is_refused_says_when_to_come_again(clock: Clock) -> None:
    rates = RequestRates(clock)
    for _ in range(2):
        rates.take("one", 1)
    with pytest.raises(RateExceeded, match="more than 1 requests") as caught:
        rates.take("one", 1)
    assert caught.value.retry_after_s == 1
    clock.now += caught.value.retry_after_s
    rates.take("one", 1)
    rates.close()


def test_polls_five_times_a_second_pass(clock: Clock) -> None:
    """What the SDK does while a template is built, beside a few more of its team."""
    rates = RequestRates(clock)
    for _ in range(5 * 600):
        for _ in range(4):
            rates.take("one", 100)
        clock.now += 0.2
    rates.close()


@given(st.lists(st.floats(0, 3), max_size=60), st.integers(1, 50))
def test_never_more_than_the_rate_allows(pauses: list[float], per_s: int) -> None:
    clock = Clock()
    rates = RequestRates(clock)
    started, passed = clock.now, 0
    for pause in pauses:
        clock.now += pause
        passed += _passes(rates, "one", per_s, 7)
        assert passed <= per_s * (clock.now - started + BURST_S) + 1e-3
    rates.close()


def _count(rates: RequestRates, answers: multiprocessing.SimpleQueue) -> None:
    answers.put(_passes(rates, "one", 50, 100))


def test_processes_share_one_limit(clock: Clock) -> None:
    rates = RequestRates(clock)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    workers = [context.Process(target=_count, args=(rates, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert sum(answers.get() for _ in workers) == 100
    rates.close()


def _hold(rates: RequestRates, ready: multiprocessing.SimpleQueue) -> None:
    with rates._locked():
        ready.put(True)
        signal.pause()


def test_a_worker_that_is_killed_in_it_holds_nobody_up(clock: Clock) -> None:
    rates = RequestRates(clock)
    context = multiprocessing.get_context("fork")
    ready = context.SimpleQueue()
    worker = context.Process(target=_hold, args=(rates, ready))
    worker.start()
    ready.get()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(30)
    rates.take("one", 1)
    rates.close()


def test_many_teams_take_no_more_memory(clock: Clock) -> None:
    rates = RequestRates(clock)
    for number in range(20_000):
        rates.take(f"team-{number}", 1)
    assert os.fstat(rates._file).st_size == 4096 * 24
    assert _passes(rates, "late", 10, 30) == 20
    rates.close()
