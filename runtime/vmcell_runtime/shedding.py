"""A guest that goes on from a snapshot gives back the pages that became its own for nothing.

A page that a restored guest writes to is copied for it, and a fifth of these copies soon hold what
the snapshot holds: reference counts that went up and down, locks, flags, and tables of the guest's
that the processor alone wrote to, as it does when it walks them. Some seconds after the guest went
on they are looked for while it runs, and looked at again and dropped while it stands still, which
takes milliseconds. Once for each time it goes on: there is no polling.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from vmcell_runtime.hotplug import HotPlug
from vmcell_runtime.loop import EventLoop, Timer
from vmcell_runtime.memory import GuestMemory, Span
from vmcell_runtime.pausing import Pausing
from vmcell_runtime.virtio.mmio import MmioTransport

# A guest has done by then what it does when it goes on; one on an emulated processor nearly so.
AFTER_NS = 5_000_000_000
# Less than this is not worth that the guest stands still.
LEAST_BYTES = 256 << 10


class Shedding:
    """On the loop's thread. Owns nothing."""

    def __init__(
        self,
        *,
        loop: EventLoop,
        memory: GuestMemory,
        pausing: Pausing,
        transports: Sequence[MmioTransport],
        hotplug: HotPlug,
    ) -> None:
        self._loop = loop
        self._memory = memory
        self._pausing = pausing
        self._transports = transports
        self._hotplug = hotplug
        self._timer: Timer | None = None

    def goes_on(self) -> None:
        """The guest goes on now, from a snapshot or after one was made."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._memory.has_image:
            self._timer = self._loop.call_at(time.monotonic_ns() + AFTER_NS, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._hotplug.plugged:  # devices that cannot be held, as when saving
            return
        spans = self._memory.as_in_image()
        if sum(length for _, length in spans) >= LEAST_BYTES:
            self._pausing.briefly(lambda: self._drop(spans))

    def _drop(self, spans: Sequence[Span]) -> None:
        """What the guest or a device has written to since it was looked at stays."""
        held: list[MmioTransport] = []
        try:
            for transport in self._transports:
                transport.save()  # from here on the device writes nothing
                held.append(transport)
            for gpa, length in self._memory.as_in_image(spans):
                self._memory.discard(gpa, length)
        finally:
            for transport in held:
                transport.go_on()
