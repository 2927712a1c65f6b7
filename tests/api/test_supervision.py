"""Parts that end are started again, within a bound; what they leave behind is told."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_api import supervision
from vmcell_api.child_processes import Child, execute
from vmcell_api.supervision import (
    LONGEST_PAUSE_S,
    RESTARTS,
    WINDOW_S,
    Part,
    RestartBudget,
    Supervised,
)
from vmcell_protos.errors import HostError

PATIENCE_S = 30
# A leader with a worker of its group that tells its signals; both wait.
LEADER = """
import os, signal, sys, time
path = sys.argv[1]
def tell(number, frame):
    with open(path, "a") as file:
        file.write(f"{number}\\n")
if os.fork() == 0:
    signal.signal(signal.SIGQUIT, tell)
    with open(path, "a") as file:
        file.write(f"worker {os.getpid()}\\n")
while True:
    signal.pause()
"""


@given(st.lists(st.floats(0, 200), max_size=60))
def test_a_budget_is_kept_in_every_window(steps: list[float]) -> None:
    budget, now, granted = RestartBudget(), 0.0, []
    for step in steps:
        now += step
        pause = budget.pause_s(now)
        if pause is not None:
            assert 0 <= pause <= LONGEST_PAUSE_S
            granted.append(now)
        else:
            assert len([at for at in granted if now - at < WINDOW_S]) == RESTARTS
    for at in granted:
        assert len([one for one in granted if at <= one < at + WINDOW_S]) <= RESTARTS


def test_the_first_restart_is_at_once_and_the_next_ones_wait_longer() -> None:
    budget = RestartBudget()
    pauses = [budget.pause_s(0.0) for _ in range(RESTARTS + 1)]
    assert pauses[0] == 0.0
    assert pauses[-1] is None
    waits = [pause for pause in pauses if pause is not None]
    assert waits == sorted(waits)


def _until(condition: Callable[[], object], supervised: Supervised | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if supervised is not None:
            supervised.attend()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "told"
    path.write_text("")
    yield path
    for pid in _workers(path):  # those of a test that failed
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)


def _workers(path: Path) -> list[int]:
    return [int(line.split()[1]) for line in path.read_text().splitlines() if "worker" in line]


def _part(path: Path, leftovers: signal.Signals | None, started: list[Child]) -> Part:
    def start() -> Child:
        started.append(execute("it", [sys.executable, "-c", LEADER, str(path)]))
        return started[-1]

    return Part(name="it", start=start, listens=lambda: True, leftovers=leftovers)


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_killed_leader_is_replaced_and_its_workers_are_killed(told: Path) -> None:
    started: list[Child] = []
    words: list[str] = []
    supervised = Supervised(_part(told, signal.SIGKILL, started), words.append)
    _until(lambda: _workers(told))
    started[0].signal(signal.SIGKILL)
    _until(lambda: len(started) == 2, supervised)
    _until(lambda: _gone(_workers(told)[0]))
    assert words[1] == "it ended with status -9; starting it again"
    assert words[2] == f"it is process {started[1].pid}"
    _until(lambda: len(_workers(told)) == 2)
    supervised.stop()
    ended = [*_workers(told), *(child.pid for child in started)]
    _until(lambda: all(_gone(pid) for pid in ended))
    supervised.stop()


def test_workers_may_finish_and_end_with_the_service(told: Path) -> None:
    started: list[Child] = []
    supervised = Supervised(_part(told, signal.SIGQUIT, started), lambda words: None)
    _until(lambda: _workers(told))
    worker = _workers(told)[0]
    started[0].signal(signal.SIGKILL)
    _until(lambda: str(int(signal.SIGQUIT)) in told.read_text().splitlines(), supervised)
    assert not _gone(worker), "it may take its time"
    supervised.stop()
    _until(lambda: _gone(worker))


def test_the_bound_ends_it_in_words(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "LONGEST_PAUSE_S", 0.0)
    part = Part(name="it", start=lambda: execute("it", ["/bin/false"]), listens=lambda: True)
    supervised = Supervised(part, lambda words: None)
    with pytest.raises(HostError, match="it ended with status 1, 10 times"):
        _until(lambda: False, supervised)
    supervised.stop()


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(HostError, match="/no/such"):
        execute("it", ["/no/such"])
