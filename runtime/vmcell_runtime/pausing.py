"""Pause and resume of a machine, one wish after the other.

    RUNNING --pause: vCPUs are kicked--> PAUSING --the last one stands--> PAUSED
    PAUSED --resume--> RUNNING

Only the vCPUs stand still. The event loop goes on: requests the guest has made are completed, what
arrives for it is put into the buffers it has offered and then waits in the host as for any slow
guest, and interrupts are kept by the in-kernel irqchip. So nothing is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum, auto

from vmcell_runtime.clock import GuestClock, Time
from vmcell_runtime.loop import EventLoop
from vmcell_runtime.vcpu import VcpuThread


class State(Enum):
    """What the vCPUs of a machine do together."""

    RUNNING = auto()
    PAUSING = auto()
    PAUSED = auto()


class Pausing:
    """On the loop's thread. A wish that is true already is granted at once."""

    def __init__(
        self,
        loop: EventLoop,
        vcpus: Sequence[VcpuThread],
        clock: GuestClock,
        *,
        paused: bool = False,
    ) -> None:
        """`paused`: the vCPUs, which have not been started, stand still from the beginning."""
        self._loop = loop
        self._vcpus = vcpus
        self._clock = clock
        self._moving = 0
        self._wishes: deque[tuple[State, Callable[[], None]]] = deque()
        self._is_brief = False
        self.state = State.RUNNING
        if paused:
            self.state = State.PAUSED
            for vcpu in vcpus:
                vcpu.pause(_nobody_waits)

    @property
    def stopped_at(self) -> Time:
        """The guest's time while it is paused."""
        return self._clock.stopped_at

    def pause(self, done: Callable[[], None]) -> None:
        """Calls `done` once every vCPU stands still, between two instructions of the guest."""
        self._wish(State.PAUSED, done)

    def resume(self, done: Callable[[], None]) -> None:
        """Calls `done` once the vCPUs go on, with the guest's clock where it stood."""
        self._wish(State.RUNNING, done)

    def briefly(self, deed: Callable[[], None]) -> bool:
        """Calls `deed`, of some milliseconds, while every vCPU stands still, and lets them go on
        after it, whatever was wished meanwhile. The clock goes on: to the guest it is as if the
        host had been busy. False, and nothing happens, unless the machine runs and is to."""
        if self.state is not State.RUNNING or self._wishes:
            return False
        self._is_brief = True

        def do() -> None:
            self._wishes.appendleft((State.RUNNING, _nobody_waits))
            deed()

        self._wish(State.PAUSED, do)
        return True

    def _wish(self, wanted: State, done: Callable[[], None]) -> None:
        self._wishes.append((wanted, done))
        self._grant()

    def _grant(self) -> None:
        while self._wishes and self.state is not State.PAUSING:
            wanted, done = self._wishes[0]
            if wanted is not self.state:
                try:
                    self._begin(wanted)
                except BaseException:
                    self._wishes.popleft()  # refused; whoever asks next is not answered for it
                    raise
                continue
            self._wishes.popleft()
            done()

    def _begin(self, wanted: State) -> None:
        if wanted is State.PAUSED:
            self.state = State.PAUSING
            self._moving = len(self._vcpus)
            for vcpu in self._vcpus:
                vcpu.pause(lambda: self._loop.call_soon(self._one_stands))
            return
        if not self._is_brief:
            self._clock.start()
        self._is_brief = False
        self.state = State.RUNNING
        for vcpu in self._vcpus:
            vcpu.resume()

    def _one_stands(self) -> None:
        self._moving -= 1
        if not self._moving:
            if not self._is_brief:
                self._clock.stop()
            self.state = State.PAUSED
            self._grant()


def _nobody_waits() -> None:
    """For vCPUs that stand still before anybody asked."""
