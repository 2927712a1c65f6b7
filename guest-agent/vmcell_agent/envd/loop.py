"""The event loop: one epoll, timers, deferred calls. Everything else in envd is called by it."""

from __future__ import annotations

import heapq
import itertools
import os
import select
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

READABLE = select.EPOLLIN | select.EPOLLRDHUP
WRITABLE = select.EPOLLOUT
# Reported whether asked for or not.
HUNG_UP = select.EPOLLHUP | select.EPOLLERR

# epoll_wait(2) counts milliseconds in an int; Connect's timeouts reach 116 days.
_LONGEST_WAIT_SECONDS = 86_400.0


def report_bug(where: str, error: BaseException) -> None:
    """One line on stderr: kind, text and the innermost lines of code, nothing of the request."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}:{code.co_name}")
        trace = trace.tb_next
    line = f"envd: bug in {where}: {type(error).__name__}: {error} at {' < '.join(places[::-1])}"
    with suppress(OSError):
        os.write(2, line.encode("utf-8", "replace") + b"\n")


def _call(callback: Callable[..., None], *arguments: int) -> None:
    try:
        callback(*arguments)
    except Exception as error:  # noqa: BLE001 - see Loop
        report_bug("a callback", error)


class Timer:
    """A call that will happen once; `cancel()` is idempotent and allowed after it happened."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Level-triggered epoll; a descriptor's callback gets the event mask.

    A callback must not block; `forget` a descriptor before closing it. What a callback raises is
    a bug: it is reported on stderr and the loop goes on, as pid 1's end is the sandbox's end.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._soon: deque[Callable[[], None]] = deque()
        self._stopped = False

    def watch(self, descriptor: int, events: int, callback: Callable[[int], None]) -> None:
        self._epoll.register(descriptor, events)
        self._callbacks[descriptor] = callback

    def change(self, descriptor: int, events: int) -> None:
        self._epoll.modify(descriptor, events)

    def forget(self, descriptor: int) -> None:
        """Watch no more; nothing happens when it is not watched."""
        if self._callbacks.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def soon(self, callback: Callable[[], None]) -> None:
        """Call it in the next turn, after other descriptors had theirs."""
        self._soon.append(callback)

    def stop(self) -> None:
        self._stopped = True

    def run(self) -> None:
        """Until `stop()`."""
        while not self._stopped:
            self._turn()

    def close(self) -> None:
        """After everything watched has been forgotten."""
        self._epoll.close()

    def _turn(self) -> None:
        for descriptor, mask in self._epoll.poll(self._wait_seconds()):
            callback = self._callbacks.get(descriptor)
            if callback is not None:
                _call(callback, mask)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                _call(timer.callback)
        for _ in range(len(self._soon)):
            _call(self._soon.popleft())

    def _wait_seconds(self) -> float:
        if self._soon:
            return 0
        # Cancelled timers at the front must not wake an idle machine.
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return -1
        return min(max(0.0, self._timers[0][0] - time.monotonic()), _LONGEST_WAIT_SECONDS)
