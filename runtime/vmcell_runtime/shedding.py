"""A guest that goes on from a snapshot gives back the pages that became its own for nothing.

A page that a restored guest writes to is copied for it, and a fifth of these copies soon hold what
the snapshot holds: reference counts that went up and down, locks, flags, and tables of the guest's
that the processor alone wrote to, as it does when it walks them. Some seconds after the guest went
on they are looked for while it runs, and looked at again and dropped while it stands still, which
takes milliseconds; and once more a minute later. Then it is over: there is no polling.
"""

from __future__ import annotations

import time

from vmcell_runtime.loop import EventLoop, Timer
from vmcell_runtime.pausing import Pausing
from vmcell_runtime.saving import Saving

# A guest has soon done what it does when it goes on; a busy host's is not so quick.
AFTER_NS = (5_000_000_000, 60_000_000_000)
# Less than this is not worth that the guest stands still.
LEAST_BYTES = 256 << 10


class Shedding:
    """On the loop's thread. Owns nothing."""

    def __init__(self, loop: EventLoop, pausing: Pausing, saving: Saving) -> None:
        self._loop = loop
        self._pausing = pausing
        self._saving = saving
        self._timers: list[Timer] = []

    def goes_on(self) -> None:
        """The guest goes on now, perhaps from a snapshot or after one was made."""
        for timer in self._timers:
            timer.cancel()
        now = time.monotonic_ns()
        self._timers = [self._loop.call_at(now + after, self._look) for after in AFTER_NS]

    def _look(self) -> None:
        spans = self._saving.own_for_nothing()
        if sum(length for _, length in spans) >= LEAST_BYTES:
            self._pausing.briefly(lambda: self._saving.give_back(spans))
