"""The device thread's event loop: descriptors, timers and calls from other threads; no polling.

Facts about epoll that matter here: a descriptor closed while registered may go on reporting, so
`remove` comes before `close`; within one batch a callback may remove a descriptor that a later
event of the same batch names, so events without a callback are dropped; and a number closed and
opened again inside one batch can see one event too many, so callbacks use non-blocking descriptors
and take "nothing there" for an answer.

What was added as `urgent`, and calls from other threads, do not wait for a whole batch: when they
have waited for some milliseconds they come between two of its callbacks. So a guest that keeps all
its devices busy keeps its shim waiting for one of them at most.

An exception of a callback leaves `run`: what a device cannot handle ends the process.
"""

from __future__ import annotations

import heapq
import os
import select
import time
from collections import deque
from collections.abc import Callable

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
HANGUP = select.EPOLLHUP | select.EPOLLRDHUP | select.EPOLLERR

URGENT_NS = 2_000_000

Callback = Callable[[int], None]
"""Called with the epoll event mask."""


class Timer:
    """One pending `call_at`; `cancel` is idempotent and drops the function."""

    def __init__(self, deadline_ns: int, function: Callable[[], None]) -> None:
        self.deadline_ns = deadline_ns
        self._function: Callable[[], None] | None = function

    def cancel(self) -> None:
        self._function = None

    def fire(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()

    def __lt__(self, other: Timer) -> bool:
        return self.deadline_ns < other.deadline_ns


class Soon:
    """A call at the loop's next turn, one however often it is asked for until then; callable from
    any thread. A guest may ask for it faster than the loop turns."""

    def __init__(self, loop: EventLoop, function: Callable[[], None]) -> None:
        self._loop = loop
        self._function = function
        self._queued = False

    def __call__(self) -> None:
        if not self._queued:
            self._queued = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._queued = False  # before it looks: who asks from here on is answered anew
        self._function()


class EventLoop:
    """Owned and used by one thread; only `call_soon` and `stop` may be called from others."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._callbacks: dict[int, Callback] = {}
        self._urgent = select.poll()
        self._urgent_fds: set[int] = set()
        self._timers: list[Timer] = []
        self._soon: deque[Callable[[], None]] = deque()
        self._stopped = False
        self.add(self._wake_fd, self._drain_wake, urgent=True)

    def add(
        self, fd: int, callback: Callback, events: int = READABLE, *, urgent: bool = False
    ) -> None:
        """Calls `callback(events)` whenever `fd` is ready (level-triggered).

        An `urgent` one is asked again just before it is called, so it may be a blocking one.
        """
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback
        if urgent:
            self._urgent.register(fd, events)
            self._urgent_fds.add(fd)

    def modify(self, fd: int, events: int) -> None:
        """Changes what `fd` waits for; 0 leaves only errors and hang-up."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forgets `fd`, before it is closed; unknown ones are an error of ours (KeyError)."""
        del self._callbacks[fd]
        self._epoll.unregister(fd)
        if fd in self._urgent_fds:
            self._urgent_fds.remove(fd)
            self._urgent.unregister(fd)

    def call_soon(self, function: Callable[[], None]) -> None:
        """Runs `function` on the loop's thread at its next turn; callable from any thread."""
        self._soon.append(function)
        os.eventfd_write(self._wake_fd, 1)

    def call_at(self, deadline_ns: int, function: Callable[[], None]) -> Timer:
        """Runs `function` once `time.monotonic_ns()` reaches `deadline_ns`."""
        timer = Timer(deadline_ns, function)
        heapq.heappush(self._timers, timer)
        return timer

    def stop(self) -> None:
        """Makes `run` return after the batch in progress; callable from any thread."""
        self._stopped = True
        os.eventfd_write(self._wake_fd, 1)

    def run(self) -> None:
        """Dispatches until `stop`; a stop before `run` counts."""
        while not self._stopped:
            ready = self._epoll.poll(self._timeout_s())
            waiting = any(fd in self._urgent_fds for fd, _ in ready)
            looked_ns = 0 if waiting else time.monotonic_ns()
            for fd, events in ready:
                if time.monotonic_ns() - looked_ns > URGENT_NS:
                    self._run_urgent()
                    looked_ns = time.monotonic_ns()
                callback = self._callbacks.get(fd)
                if callback is not None and fd not in self._urgent_fds:
                    callback(events)
            self._run_timers()

    def close(self) -> None:
        """Closes the loop's own descriptors, not those added to it; idempotent."""
        if self._wake_fd >= 0:
            self._epoll.close()
            os.close(self._wake_fd)
            self._wake_fd = -1
            self._callbacks.clear()

    def _timeout_s(self) -> float:
        if not self._timers:
            return -1
        return max(0, self._timers[0].deadline_ns - time.monotonic_ns()) / 1e9

    def _run_timers(self) -> None:
        now_ns = time.monotonic_ns()
        while self._timers and self._timers[0].deadline_ns <= now_ns:
            heapq.heappop(self._timers).fire()

    def _run_urgent(self) -> None:
        for fd, events in self._urgent.poll(0):
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback(events)

    def _drain_wake(self, _events: int) -> None:
        os.eventfd_read(self._wake_fd)
        # Only what is queued now: a function that calls call_soon again must not starve the rest.
        for _ in range(len(self._soon)):
            self._soon.popleft()()
