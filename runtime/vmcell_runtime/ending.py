"""Why a machine ends. The first cause counts; what the kernel said decides what a reset means.

    what happened                                     kernel's last words    end reason
    reset line, triple fault, guest fault             a panic                guest_panic
    reset line                                        "Restarting system"    guest_shutdown
    reset line                                        none                   guest_reset
    triple fault                                      none, or "Restarting"  triple_fault
    an instruction that KVM cannot carry out          none, or "Restarting"  guest_fault
    nothing more for 5 s                              a panic                guest_panic
    nothing (without ACPI it stands still)            "Power down", halted   guest_shutdown

Only PID 1 of the guest's first namespace, our agent, can make the kernel say "Restarting system":
`reboot(2)` in a container ends that container's PID namespace only.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from vmcell_runtime.devices.console import LastWords
from vmcell_runtime.loop import EventLoop

PANIC_GRACE_NS = 5_000_000_000
_OWN_ENDS = ("guest_reset", "triple_fault", "guest_fault")


class End(NamedTuple):
    """One of `control.END_REASONS`, and a sentence or the kernel's own words."""

    reason: str
    detail: str


class Ending:
    """The one place where a machine's end is decided; stops `loop` when it is."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._cause: End | None = None
        self.words = LastWords(self._on_last_words)

    def end(self, reason: str, detail: str) -> None:
        """Ends the machine for `reason`, unless it has one; from any thread."""
        with self._lock:
            if self._cause is None:
                self._cause = End(reason, detail)
        self._loop.stop()

    @property
    def result(self) -> End:
        """Why the machine ended; ValueError while it has not."""
        if self._cause is None:
            raise ValueError("the machine has not ended")
        if self._cause.reason in _OWN_ENDS and self.words.panic:
            return End("guest_panic", self.words.panic)
        if self._cause.reason == "guest_reset" and self.words.orderly:
            return End("guest_shutdown", self.words.orderly)
        return self._cause

    def _on_last_words(self) -> None:
        # On a vCPU thread; timers belong to the loop's.
        if self.words.panic is not None:
            self._loop.call_soon(self._wait_for_reset)
        else:
            self.end("guest_shutdown", self.words.orderly or "")

    def _wait_for_reset(self) -> None:
        panic = self.words.panic or ""
        deadline_ns = time.monotonic_ns() + PANIC_GRACE_NS
        self._loop.call_at(deadline_ns, lambda: self.end("guest_panic", panic))
