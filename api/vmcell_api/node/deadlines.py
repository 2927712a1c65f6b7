"""A thread that calls back when a deadline has come, on the monotonic clock.

A step of the wall clock therefore ends no sandbox early or late.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Deadlines:
    """Deadlines by key; `expired(key)` is called once per deadline, from the timer's thread."""

    def __init__(self, expired: Callable[[str], None]) -> None:
        self._expired = expired
        self._due: dict[str, float] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; deadlines that have not come stay unserved."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def set(self, key: str, due_monotonic_s: float) -> None:
        """Sets or moves the deadline of `key`."""
        with self._changed:
            self._due[key] = due_monotonic_s
            self._changed.notify()

    def cancel(self, key: str) -> None:
        """Forgets the deadline of `key`."""
        with self._changed:
            self._due.pop(key, None)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._stopping:
                    return
                now = time.monotonic()
                come = [key for key, due in self._due.items() if due <= now]
                for key in come:
                    del self._due[key]
                if not come:
                    wait_s = min(self._due.values()) - now if self._due else None
                    self._changed.wait(wait_s)
                    continue
            for key in come:
                self._expired(key)
