"""What the state machines of all virtio devices share: a machine, a driver, and what must hold."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod

from fake_memory import WatchedMemory
from guest_driver import RAM_BYTES, GuestDriver, GuestQueue
from step_machine import Choices, StepMachine, step
from turning_loop import TurningLoop

from vmcell_runtime.virtio.device import VirtioDevice

INDIRECT_DESC, EVENT_IDX = 1 << 28, 1 << 29
SENTINEL = 0xEE


class DeviceMachine(StepMachine, ABC):
    """A device behind its window, and a driver that starts it again whenever it likes.

    Everywhere: nothing but GuestError stops a device, nothing is read twice, ring words are
    accessed at once, the device writes nowhere but where it may, and gives nothing back twice
    (`GuestQueue.collect` has no such buffer then). A driver without EVENT_IDX is interrupted for
    whatever came back.
    """

    shared = False
    queue_sizes = (0, 4, 16)

    @abstractmethod
    def make(self, choices: Choices) -> VirtioDevice:
        """The device, new."""

    def forget(self) -> None:
        """The driver has reset the device: nothing is in flight any more."""

    def set_up(self, choices: Choices) -> None:
        self.memory = WatchedMemory(RAM_BYTES, shared=self.shared)
        self.loop = TurningLoop()
        self.fds: list[int] = []
        self.device = self.make(choices)
        self.driver = GuestDriver(self.device, self.memory, self.loop)
        self.start(choices)

    def start(self, choices: Choices) -> None:
        """The walk to DRIVER_OK, with or without each of the ring's features."""
        self.forget()
        features = self.driver.offered()
        for feature in (INDIRECT_DESC, EVENT_IDX):
            if choices.flag():
                features &= ~feature
        self.features = features
        self.driver.queue_size = choices.of(self.queue_sizes)
        self.driver.start(self.adjust(features, choices))
        self.memory.set_rings([queue.layout for queue in self.driver.queues])
        self.settle()

    def adjust(self, features: int, choices: Choices) -> int:
        """What the driver makes of them."""
        return features

    @property
    def indirect(self) -> bool:
        return bool(self.features & INDIRECT_DESC)

    def settle(self) -> None:
        """The device works until it rests, and is watched."""
        used, interrupts = self._used(), self.driver.irq.count
        self.memory.watching = True
        try:
            self.loop.settle()
        finally:
            self.memory.watching = False
        if self._used() != used and not self.features & EVENT_IDX and not self.device.in_kernel:
            assert self.driver.irq.count > interrupts, "buffers came back and nobody was told"

    def _used(self) -> list[int]:
        return [self.memory.load16(queue.used_gpa + 2) for queue in self.driver.queues]

    def kick(self, index: int) -> None:
        self.driver.set(0x50, index)
        self.settle()

    def room(self, queue: GuestQueue, length: int, gpa: int) -> tuple[int, int]:
        """Room for the device to write to, with a byte on each side that it must leave alone."""
        self.memory.write(gpa - 1, bytes([SENTINEL]) * (length + 2))
        return gpa, length

    def check_room(self, span: tuple[int, int]) -> bytes:
        """What stands there now."""
        gpa, length = span
        around = self.memory.read(gpa - 1, length + 2)
        assert around[0] == around[-1] == SENTINEL, "the device wrote beside its buffer"
        return around[1:-1]

    def cut(self, data: bytes, choices: Choices, limit: int = 4) -> list[bytes]:
        """The same bytes in pieces, as a driver may lay them out."""
        pieces = []
        while len(pieces) < limit - 1 and len(data) > 1 and choices.flag():
            place = 1 + choices.below(len(data) - 1)
            pieces.append(data[:place])
            data = data[place:]
        return [*pieces, data]

    @step()
    def restart(self, choices: Choices) -> None:
        self.start(choices)

    @step()
    def reset_only(self, choices: Choices) -> None:
        """Work that is announced and a reset before it is done."""
        self.driver.set(0x50, choices.below(len(self.driver.queues)))
        self.driver.set(0x70, 0)
        self.settle()
        self.start(choices)

    @step()
    def write_registers(self, choices: Choices) -> None:
        """Queues cannot be moved under a running device."""
        self.driver.set(0x30, choices.below(4))
        for offset in (0x38, 0x80, 0x90, 0xA0, 0x20):
            self.driver.set(offset, choices.below(1 << 16))

    @step()
    def notify_all(self, choices: Choices) -> None:
        for index in range(len(self.driver.queues)):
            self.kick(index)

    def breaks(self, index: int, sentence: str, choices: Choices) -> None:
        """What was offered last must stop the device, with this said; the driver begins again."""
        self.kick(index)
        assert self.driver.needs_reset, "the device went on"
        if len(self.driver.reports) < 10:  # the rest is not said
            assert sentence in self.driver.reports[-1], self.driver.reports
        self.start(choices)

    def check(self) -> None:
        assert not self.memory.faults, self.memory.faults
        assert not self.memory.second_reads
        assert not self.driver.needs_reset

    def tear_down(self) -> None:
        if hasattr(self, "driver"):
            self.driver.close()
        for fd in getattr(self, "fds", []):
            os.close(fd)
        self.loop.close()
        self.memory.close()
