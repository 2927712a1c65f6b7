"""What threads had to wait for a processor on a machine that others use too, to be left out of a
latency.

Real-time priority instead makes it worse: who needs RCU, a lock of the kernel or the fair server's
turn then waits for 50 ms to a second behind processors that spin.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path


class Waits:
    """`waited_s` is how long threads that must act were runnable and did not run since it was made.

    `tasks` act one after the other. `vcpus` act beside each other and after them, so that what one
    of them waited while those ran is not the machine's doing.
    """

    def __init__(self, tasks: list[Path], vcpus: list[Path]) -> None:
        self._tasks, self._vcpus = tasks, vcpus
        self._start = {task: _ran_and_waited_ns(task) for task in (*tasks, *vcpus)}

    @property
    def waited_s(self) -> float:
        ran_ns = waited_ns = vcpu_ns = 0
        for task, (ran_before_ns, waited_before_ns) in self._start.items():
            ran_now_ns, waited_now_ns = _ran_and_waited_ns(task)
            if task in self._vcpus:
                vcpu_ns = max(vcpu_ns, waited_now_ns - waited_before_ns)
            else:
                ran_ns += ran_now_ns - ran_before_ns
                waited_ns += waited_now_ns - waited_before_ns
        return (waited_ns + max(0, vcpu_ns - ran_ns)) / 1e9


def waits_of_answer(pid: int, reader: int) -> Waits:
    """Of a call by this thread that the VMM `pid` carries out and answers to thread `reader`."""
    others = [name for name in os.listdir(f"/proc/{pid}/task") if name != str(pid)]
    return Waits(
        [_own(threading.get_native_id()), _own(reader), Path(f"/proc/{pid}/task/{pid}")],
        [Path(f"/proc/{pid}/task/{name}") for name in others],
    )


def waits_of_end() -> Waits:
    """Of this thread alone: what a VMM that ends has waited goes with it."""
    return Waits([_own(threading.get_native_id())], [])


def _own(thread: int) -> Path:
    return Path(f"/proc/self/task/{thread}")


def _ran_and_waited_ns(task: Path) -> tuple[int, int]:
    # Documentation/scheduler/sched-stats.rst: time on the processor, time waiting for it, runs
    ran, waited, _ = (task / "schedstat").read_text().split()
    return int(ran), int(waited)
