"""Lines for the operator's log about what a guest did: at most 10 in 5 seconds from each device.

What goes on with it all day meets the log's own limit (`vmm.Reports`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

REPORTS_PER_WINDOW = 10
REPORT_WINDOW_NS = 5_000_000_000

Report = Callable[[str], None]
"""Takes one line for the operator's log."""


class Reporter:
    """`report`, as far as the limit lets it. One thread at a time."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._times_ns: list[int] = []

    def __call__(self, line: str) -> None:
        now_ns = time.monotonic_ns()
        self._times_ns = [t for t in self._times_ns if now_ns - t < REPORT_WINDOW_NS]
        if len(self._times_ns) < REPORTS_PER_WINDOW:
            self._times_ns.append(now_ns)
            self._report(line)
