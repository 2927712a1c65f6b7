"""One epoll loop: descriptors to callbacks, and timers. Nothing polls; one thread owns it all.

A callback does one bounded piece of work and never blocks. Descriptors are level-triggered; who
closes a descriptor calls `unwatch` first, because a forked child may still hold a copy of it and
epoll forgets a file only with its last copy.
"""

from __future__ import annotations

import heapq
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
_BATCH = 64


class Timer:
    """A callback to come; `cancel` is idempotent."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due


class Loop:
    """`run` serves until `stop`; `close` gives the epoll descriptor back."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watches: dict[int, tuple[int, Callable[[int], None]]] = {}
        self._timers: list[Timer] = []
        self._running = False

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(ready events)` whenever `fd` is ready; replaces an earlier watch."""
        watch = self._watches.get(fd)
        if watch is None:
            self._epoll.register(fd, events)
        elif watch[0] != events:
            self._epoll.modify(fd, events)
        self._watches[fd] = (events, callback)

    def unwatch(self, fd: int) -> None:
        """Forget `fd`; nothing happens when it is not watched."""
        if self._watches.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call once after `seconds` on the monotonic clock."""
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def run(self) -> None:
        self._running = True
        while self._running:
            for fd, events in self._epoll.poll(self._seconds_to_next_timer(), _BATCH):
                watch = self._watches.get(fd)
                if watch is not None:
                    watch[1](events)
            self._fire_timers()

    def stop(self) -> None:
        """Let `run` return after the current round."""
        self._running = False

    def close(self) -> None:
        self._watches.clear()
        self._timers.clear()
        self._epoll.close()

    def _seconds_to_next_timer(self) -> float | None:
        while self._timers and self._timers[0].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, self._timers[0].due - time.monotonic())

    def _fire_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0].due <= now:
            timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
