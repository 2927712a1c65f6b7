"""The guest's time, which stands still while its vCPUs do.

Two counters make it: kvmclock, by which Linux knows the time, and the time stamp counter, by which
it measures it on most hosts. Both go on from where they stood, so CLOCK_MONOTONIC and every timer
of the guest know nothing of a pause; CLOCK_REALTIME is late by it until the agent is told the time.

A host kernel before 5.16 does not let the counter be moved: a guest whose clock source is `tsc`
then sees the pause as time that passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vmcell_runtime.kvm.vcpu import Vcpu
from vmcell_runtime.kvm.vm import Vm


class Time(NamedTuple):
    """What both counters showed when the vCPUs came to stand."""

    kvmclock_ns: int
    tsc: int


NEVER = Time(0, 0)


class GuestClock:
    """Owns nothing. `stop` and `start` while no vCPU is in the guest: they are free then."""

    def __init__(self, vm: Vm, vcpus: Sequence[Vcpu], stopped_at: Time = NEVER) -> None:
        """`stopped_at`: of a guest that stood still when it was saved."""
        self._vm = vm
        self._vcpus = vcpus
        self.stopped_at = stopped_at

    def stop(self) -> None:
        """Remembers what time it is."""
        self.stopped_at = Time(self._vm.kvmclock_ns(), self._vcpus[0].tsc())

    def start(self) -> None:
        """Makes it that time again, and tells the guest's lockup watchdogs of the pause."""
        # The clock first, as in `stop`: what passes between the two then passes for both.
        self._vm.set_kvmclock_ns(self.stopped_at.kvmclock_ns)
        if self._vcpus[0].has_tsc_offset():
            passed = self._vcpus[0].tsc() - self.stopped_at.tsc
            for vcpu in self._vcpus:
                # The same for all: counters that agreed go on agreeing.
                vcpu.move_tsc(-passed)
        for vcpu in self._vcpus:
            vcpu.tell_paused()
