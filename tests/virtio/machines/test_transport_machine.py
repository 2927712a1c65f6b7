"""The register window against a model of what a driver may do when (virtio 1.2 § 2.1, § 4.2)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from guest_driver import EVENT_IDX, VERSION_1
from recorded_irq import RecordedIrq
from step_machine import Choices, StepMachine, machine_test, step
from turning_loop import TurningLoop

from vmcell_protos.errors import GuestError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.device import Activation, PlainDevice
from vmcell_runtime.virtio.mmio import MmioTransport

RAM_BYTES = 0x4_0000
SIZES = (8, 16)
OFFERED = 1 << 5 | 1 << 28 | EVENT_IDX | VERSION_1
NEEDS_RESET, FAILED = 64, 128
WALK = {0: 1, 1: 3, 3: 11, 11: 15}
ADDRESSES = {
    0x80: (0, 0),
    0x84: (0, 32),
    0x90: (1, 0),
    0x94: (1, 32),
    0xA0: (2, 0),
    0xA4: (2, 32),
}
GOOD_RINGS = ((8, 0x1000, 0x2000, 0x3000), (16, 0x4000, 0x5000, 0x6000))


@dataclass(frozen=True)
class Ring:
    """What the driver wrote of one queue; `gpa` of descriptors, driver's and device's area."""

    size: int = 0
    ready: int = 0
    gpa: tuple[int, int, int] = (0, 0, 0)

    def usable(self, most: int) -> bool:
        if not self.ready or self.size not in (1, 2, 4, 8, 16) or self.size > most:
            return False
        lengths = (16 * self.size, 6 + 2 * self.size, 6 + 8 * self.size)
        areas = sorted(zip(self.gpa, lengths, strict=True))
        aligned = not (self.gpa[0] % 16 or self.gpa[1] % 2 or self.gpa[2] % 4)
        inside = all(gpa + length <= RAM_BYTES for gpa, length in areas)
        apart = all(a + n <= b for (a, n), (b, _) in itertools.pairwise(areas))
        return aligned and inside and apart


class Device(PlainDevice):
    """Two queues; `wrong` is raised by the next wake, `more` answers it."""

    device_id = 42
    features = 1 << 5 | 1 << 28
    queue_sizes = SIZES
    max_chain_bytes = 4096
    config = bytes(range(1, 13))

    def __init__(self) -> None:
        self.activation: Activation | None = None
        self.woken: list[int] = []
        self.wrong = self.closed = False

    def activate(self, activation: Activation) -> None:
        assert self.activation is None, "activated twice without a reset"
        self.activation = activation

    def process(self, queue_index: int) -> bool:
        assert self.activation is not None, "woken while it is not active"
        self.woken.append(queue_index)
        if self.wrong:
            self.wrong = False
            raise GuestError("the ring is nonsense")
        return False

    def reset(self) -> None:
        self.activation = None

    def close(self) -> None:
        self.closed = True


class TransportMachine(StepMachine):
    """A driver's walk and any other write; the model says what each may do."""

    def set_up(self, choices: Choices) -> None:
        self.memory = GuestMemory(RAM_BYTES)
        self.loop = TurningLoop()
        self.irq = RecordedIrq()
        self.device = Device()
        self.reports: list[str] = []
        report = self.reports.append
        self.transport = MmioTransport(self.device, self.memory, self.irq, self.loop, report)
        self.generation = 0
        self.clear()
        self.link = None

    def clear(self) -> None:
        self.status = self.features = self.select = self.half = self.driver_half = 0
        self.rings = [Ring(), Ring()]
        self.frozen: list[Ring] | None = None
        self.cause = 0

    # Writes, and what the model makes of them

    def set(self, offset: int, value: int, size: int = 4) -> None:
        self.transport.write(offset, size, value)
        if size != 4 or offset >= 0x100:
            if offset == 0x64:
                self.cause &= ~value
            return
        match offset:
            case 0x14:
                self.half = value
            case 0x24:
                self.driver_half = value
            case 0x30:
                self.select = value
            case 0x20 if self.status == 3 and self.driver_half < 2:
                shift = 32 * self.driver_half
                kept = self.features & ~(0xFFFF_FFFF << shift)
                self.features = kept | value << shift
            case 0x64:
                self.cause &= ~value
            case 0x70:
                self.set_status(value)
            case 0x38 | 0x44 | 0x80 | 0x84 | 0x90 | 0x94 | 0xA0 | 0xA4:
                self.set_ring(offset, value)

    def set_status(self, value: int) -> None:
        if value == 0:
            self.clear()
        elif self.status & (NEEDS_RESET | FAILED):
            return
        elif value == self.status | FAILED:
            self.status = value
        elif WALK.get(self.status) == value:
            if value == 11 and (self.features & ~OFFERED or not self.features & VERSION_1):
                return
            self.status = value
            if value == 15:
                if all(map(Ring.usable, self.rings, SIZES)):
                    self.frozen = list(self.rings)
                else:
                    self.status |= NEEDS_RESET
                    self.cause |= 2

    def set_ring(self, offset: int, value: int) -> None:
        if self.select > 1:
            return
        ring = self.rings[self.select]
        if self.status != 11:
            if offset == 0x44 and not value & 1 and ring.ready:
                self.frozen = None  # it takes the queue away, § 4.2.2.2
                self.rings[self.select] = replace(ring, ready=0)
            return
        if offset == 0x38:
            ring = replace(ring, size=value)
        elif offset == 0x44:
            ring = replace(ring, ready=value & 1)
        else:
            area, shift = ADDRESSES[offset]
            kept = ring.gpa[area] & ~(0xFFFF_FFFF << shift)
            gpa = [*ring.gpa]
            gpa[area] = kept | value << shift
            ring = replace(ring, gpa=(gpa[0], gpa[1], gpa[2]))
        self.rings[self.select] = ring

    def offer(self, index: int) -> None:
        """A buffer more in the available ring, if the device looks at it."""
        if self.frozen is not None:
            gpa = self.frozen[index].gpa[1] + 2
            self.memory.store16(gpa, self.memory.load16(gpa) + 1 & 0xFFFF)

    # Steps

    @step(3)
    def write_anything(self, choices: Choices) -> None:
        registers = [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x64, 0x70, 0xAC, *ADDRESSES]
        offset = choices.of(registers) if not choices.flag(4) else choices.below(0x1000)
        if offset == 0x50:
            return
        small = [0, 1, 2, 3, 4, 8, 11, 15, 16, 128, 139, 143, 0x1000, 0x2000]
        value = choices.of(small) if not choices.flag(4) else choices.below(1 << 32)
        self.set(offset, value, choices.of([4, 4, 4, 4, 1, 2]))

    @step(5)
    def walk(self, choices: Choices) -> None:
        follower = WALK.get(self.status, 0)
        if follower == 11:
            features = OFFERED if not choices.flag(8) else 1 << choices.below(40)
            for half in (0, 1):
                self.set(0x24, half)
                self.set(0x20, features >> 32 * half & 0xFFFF_FFFF)
        if follower or choices.flag(8):
            self.set(0x70, follower)

    @step(4)
    def place_rings(self, choices: Choices) -> None:
        for index, (size, *areas) in enumerate(GOOD_RINGS):
            self.set(0x30, index)
            self.set(0x38, size if not choices.flag(16) else choices.below(40))
            for offset, gpa in zip((0x80, 0x90, 0xA0), areas, strict=True):
                self.set(offset, gpa if not choices.flag(32) else RAM_BYTES - choices.below(128))
                self.set(offset + 4, 0)
            self.set(0x44, 1)

    @step(2)
    def begin(self, choices: Choices) -> None:
        """A driver that does all of it right."""
        self.set(0x70, 0)
        for status in (1, 3):
            self.set(0x70, status)
        for half in (0, 1):
            self.set(0x24, half)
            self.set(0x20, OFFERED >> 32 * half & 0xFFFF_FFFF)
        self.set(0x70, 11)
        for index, (size, *areas) in enumerate(GOOD_RINGS):
            self.set(0x30, index)
            self.set(0x38, size >> choices.below(3))
            for offset, gpa in zip((0x80, 0x90, 0xA0), areas, strict=True):
                self.set(offset, gpa + 16 * choices.below(4))
                self.set(offset + 4, 0)
            self.set(0x44, 1)
        self.set(0x70, 15)
        assert self.frozen is not None

    @step(2)
    def notify(self, choices: Choices) -> None:
        """Whichever queue is named, those with news are looked at; the device takes nothing."""
        index = choices.below(3)
        self.loop.settle()
        self.device.woken.clear()
        if choices.flag(2):
            self.offer(choices.below(2))
        rings = self.frozen or []
        expected = [n for n, ring in enumerate(rings) if self.memory.load16(ring.gpa[1] + 2)]
        if index > 1:
            expected = []
        wrong = self.device.wrong = bool(expected) and choices.flag(8)
        self.transport.write(0x50, 4, index)
        self.loop.settle()
        assert self.device.woken == (expected[:1] if wrong else expected)
        if wrong:
            self.frozen = None
            self.status |= NEEDS_RESET
            self.cause |= 2

    @step()
    def notify_and_reset(self, choices: Choices) -> None:
        """Work that was announced is not done after a reset."""
        self.loop.settle()
        self.device.woken.clear()
        index = choices.below(2)
        self.offer(index)
        self.transport.write(0x50, 4, index)
        self.set(0x70, 0)
        self.loop.settle()
        assert self.device.woken == []

    @step()
    def change_configuration(self, choices: Choices) -> None:
        if self.device.activation is not None:
            self.link = self.device.activation.link
        if self.link is not None:
            current = self.device.activation
            self.link.config_changed()
            if current is not None and current.link is self.link:
                self.generation += 1
                self.cause |= 2

    @step()
    def run_an_old_link(self, choices: Choices) -> None:
        """What a device of an earlier activation still wants to do is not done."""
        if self.link is not None:
            done: list[bool] = []
            running = self.device.activation is not None and (
                self.device.activation.link is self.link
            )
            assert self.link.run(lambda: done.append(True)) == running
            assert done == [True] * running

    @step(2)
    def read_anything(self, choices: Choices) -> None:
        size = choices.of([1, 2, 4, 8])
        assert 0 <= self.transport.read(choices.below(0x1000), size) < 1 << 8 * size

    @step()
    def close_it(self, choices: Choices) -> None:
        if choices.flag(16) and not self.device.closed:
            self.transport.close()
            self.device.activation = None  # the device let go of it as it closed
            self.transport.write(0x70, 4, 15)
            assert self.transport.read(0x08, 4) == 0
            assert self.device.closed
            self.loop.close()
            self.memory.close()
            self.set_up(choices)

    def check(self) -> None:
        read = self.transport.read
        assert read(0x70, 4) == self.status
        assert read(0xFC, 4) == self.generation
        ring = self.rings[self.select] if self.select < 2 else Ring()
        assert read(0x44, 4) == ring.ready
        assert read(0x34, 4) == (SIZES[self.select] if self.select < 2 else 0)
        assert read(0x10, 4) == (OFFERED >> 32 * self.half & 0xFFFF_FFFF if self.half < 2 else 0)
        assert read(0x60, 4) == self.cause
        activation = self.device.activation
        assert (activation is not None) == (self.frozen is not None)
        if activation is not None and self.frozen is not None:
            assert activation.features == self.features
            for queue, ring in zip(activation.queues, self.frozen, strict=True):
                assert queue.layout == (ring.size, *ring.gpa), "changed after DRIVER_OK"

    def tear_down(self) -> None:
        if hasattr(self, "transport"):
            self.loop.settle()
            self.transport.close()
            self.loop.close()
            self.memory.close()


test_transport = machine_test(TransportMachine, "transport")
