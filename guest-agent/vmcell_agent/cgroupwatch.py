"""An events file of a cgroup, followed through the loop.

The kernel wakes who polls such a file for POLLPRI whenever a counter in it changes (cgroup-v2.rst,
"memory.events", "cgroup.events"); reading it arms the next one.
"""

from __future__ import annotations

import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.eventloop import Loop

_READ_BYTES = 4096


class EventsFile:
    """Calls `changed` after each change. `close` is idempotent."""

    def __init__(self, loop: Loop, path: str, changed: Callable[[], None]) -> None:
        """A file that is not there (its controller is off) never changes."""
        self._loop = loop
        self._changed = changed
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._fd = -1
            return
        loop.watch(self._fd, select.EPOLLPRI, self._on_change)

    def _on_change(self, events: int) -> None:
        try:
            os.pread(self._fd, _READ_BYTES, 0)
        except OSError:  # ENODEV: the cgroup has been removed
            self.close()
            return
        self._changed()

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1
