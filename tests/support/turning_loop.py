"""The event loop, turned by the test itself instead of a thread."""

from __future__ import annotations

import time

from vmcell_runtime.loop import EventLoop


class TurningLoop(EventLoop):
    """`turn` runs what is ready now; nothing runs in between."""

    def turn(self) -> bool:
        """One batch without waiting; False if nothing was ready."""
        ready = self._epoll.poll(0)
        for fd, events in ready:
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback(events)
        self._run_timers()
        return bool(ready)

    def settle(self, limit: int = 10_000) -> None:
        """Turns until nothing is ready; a device that keeps the loop busy fails the test."""
        for _ in range(limit):
            if not self.turn():
                return
        raise AssertionError(f"the loop is still busy after {limit} turns")

    def advance_to_timers(self) -> None:
        """Waits for the next timer and runs it."""
        deadline_ns = min(timer.deadline_ns for timer in self._timers)
        time.sleep(max(0, deadline_ns - time.monotonic_ns()) / 1e9)
        self.turn()
        self.settle()
