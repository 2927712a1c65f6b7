"""Keeping the parts of the service alive: a part that ends is started again, within a bound.

A bound, because a part that cannot run (a port is taken, the store is gone) must end the service
with its words in the log, and not fill it for ever.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vmcell_api.child_processes import Child
from vmcell_protos.errors import HostError

RESTARTS = 10
WINDOW_S = 300.0
LONGEST_PAUSE_S = 5.0


class RestartBudget:
    """At most `RESTARTS` within `WINDOW_S`; the second within the window waits a little, and so on.

    Times are seconds of any clock that does not go back.
    """

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def pause_s(self, now_s: float) -> float | None:
        """Counts a restart at `now_s`: how long to wait before it, None for one too many."""
        while self._times and now_s - self._times[0] >= WINDOW_S:
            self._times.popleft()
        if len(self._times) >= RESTARTS:
            return None
        earlier = len(self._times)
        self._times.append(now_s)
        return 0.0 if not earlier else min(LONGEST_PAUSE_S, 0.1 * 2**earlier)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process of the service: how to start it, and how to see that it listens.

    `leftovers`: the signal for processes of its group that outlive it. SIGQUIT has nginx's workers
    stop listening and finish the streams they have; SIGKILL is for those with nothing to finish.
    `stops_within_s`: the time it has between SIGTERM and SIGKILL.
    """

    name: str
    start: Callable[[], Child]
    listens: Callable[[], bool]
    leftovers: signal.Signals | None = signal.SIGKILL
    stops_within_s: float = 20.0


class Supervised:
    """A part with its running child; the child ends with `stop`, not with this object."""

    def __init__(self, part: Part, say: Callable[[str], None]) -> None:
        self.part = part
        self._say = say
        self._budget = RestartBudget()
        self._child: Child | None = self._start()
        self._due_s = 0.0
        # Ended ones whose group goes on: not reaped, so that the group's number stays theirs.
        self._lingering: list[Child] = []

    @property
    def is_running(self) -> bool:
        """Whether its process is there; it may not listen yet."""
        return self._child is not None and self._child.status() is None

    def attend(self) -> None:
        """Starts it again when it has ended and its pause is over; HostError when it may not be."""
        if self._child is not None and (status := self._child.status()) is not None:
            self._leave(self._child)
            self._child = None
            pause_s = self._budget.pause_s(time.monotonic())
            ended = f"{self.part.name} ended with status {status}"
            if pause_s is None:
                raise HostError(
                    f"{ended}, {RESTARTS} times in {WINDOW_S:.0f} s; see its log above, then start "
                    "the service again"
                )
            self._say(f"{ended}; starting it again" + (f" in {pause_s:.1f} s" if pause_s else ""))
            self._due_s = time.monotonic() + pause_s
        if self._child is None and time.monotonic() >= self._due_s:
            self._child = self._start()

    def signal(self, number: int) -> None:
        """Signals its process, if there is one."""
        if self._child is not None:
            self._child.signal(number)

    def stop(self) -> None:
        """Ends it: SIGTERM, and SIGKILL for what does not end in time. Idempotent."""
        child, self._child = self._child, None
        if child is not None:
            child.signal(signal.SIGTERM)
            if not child.wait(self.part.stops_within_s):
                self._say(f"{self.part.name} did not end in time; killing it")
                child.signal(signal.SIGKILL)
                child.wait(self.part.stops_within_s)
            self._lingering.append(child)
        for ended in self._lingering:
            if self.part.leftovers is not None:
                ended.signal_group(signal.SIGKILL)
            ended.reap()
        self._lingering = []

    def _start(self) -> Child:
        child = self.part.start()
        self._say(f"{self.part.name} is process {child.pid}")
        return child

    def _leave(self, child: Child) -> None:
        """What an ended child left behind gets its signal."""
        if self.part.leftovers is not None:
            child.signal_group(self.part.leftovers)
        if self.part.leftovers in (None, signal.SIGKILL):
            child.reap()
        else:
            self._lingering.append(child)
