"""The agent's own log: lines to the kernel's ring buffer, at a bounded rate.

A guest's kernel log reaches the host through the serial console, which is slow and kept small; a
container that makes the agent talk must not drown it. Ten lines in five seconds, then a count.
"""

from __future__ import annotations

import os
import time

KMSG = "/dev/kmsg"
_LINES, _WINDOW_SECONDS = 10, 5.0
_LINE_BYTES = 800  # the kernel refuses records over about 1,000 bytes


class KernelLog:
    """Writes to KMSG; without it (a test, an early failure) lines are dropped."""

    def __init__(self) -> None:
        try:
            self._fd = os.open(KMSG, os.O_WRONLY | os.O_CLOEXEC | os.O_APPEND)
        except OSError:
            self._fd = -1
        self._window_start = 0.0
        self._lines = 0
        self._dropped = 0

    def write(self, text: str) -> None:
        now = time.monotonic()
        if now - self._window_start >= _WINDOW_SECONDS:
            self._window_start, self._lines = now, 0
        if self._lines >= _LINES or self._fd < 0:
            self._dropped += 1
            return
        self._lines += 1
        dropped = f" ({self._dropped} lines dropped before)" if self._dropped else ""
        self._dropped = 0
        # control characters from a container must not reach the console as such
        printable = ascii(text)[1:-1][:_LINE_BYTES]
        line = f"<6>vmcell-agent: {printable}{dropped}\n"
        try:
            os.write(self._fd, line.encode())
        except OSError:
            self._dropped += 1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
