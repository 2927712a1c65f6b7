"""Latencies of a process on a machine that others use too: it goes before them while one looks.

What the threads had to wait for a processor all the same is told, so that it can be left out: Linux
gives ordinary threads 50 ms of each second before real-time ones (the fair server, since 6.12), and
real-time scheduling may not be allowed.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ONE_AT_A_TIME = os.path.join(tempfile.gettempdir(), f"vmcell-own-processor-{os.getuid()}")
_VCPUS, _MAIN, _LOOKING = 1, 2, 3  # priorities: who only computes comes last


class Waits:
    """`waited_s` is how long the threads that must act were runnable and did not run."""

    def __init__(self, tasks: list[Path]) -> None:
        self._tasks = tasks
        self._start_ns = self._sum_ns()

    @property
    def waited_s(self) -> float:
        return (self._sum_ns() - self._start_ns) / 1e9

    def _sum_ns(self) -> int:
        # Documentation/scheduler/sched-stats.rst: time on the processor, time waiting for it, runs
        return sum(int((task / "schedstat").read_text().split()[1]) for task in self._tasks)


@contextmanager
def before_others(pid: int, own_threads: list[int], *, ends: bool = False) -> Iterator[Waits]:
    """Inside the block the threads of `pid` and `own_threads` are served before all others.

    Only for a moment: nobody else runs meanwhile. If `pid` `ends` in it, its waits are not known.
    """
    with open(_ONE_AT_A_TIME, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        others = [int(name) for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid]
        ranks = {
            **dict.fromkeys(others, _VCPUS),
            pid: _MAIN,
            **dict.fromkeys(own_threads, _LOOKING),
        }
        acting = [
            Path(f"/proc/self/task/{thread}") for thread in own_threads[: 1 if ends else None]
        ]
        acting += [] if ends else [Path(f"/proc/{pid}/task/{pid}")]
        try:
            for thread, rank in ranks.items():
                os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(rank))
        except PermissionError:
            # Then the vCPUs' threads may be what everybody waits for.
            acting += [] if ends else [Path(f"/proc/{pid}/task/{thread}") for thread in others]
        try:
            yield Waits(acting)
        finally:
            for thread in ranks:
                try:
                    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
                except (ProcessLookupError, PermissionError):
                    continue
