"""The guest's side of virtio: rings written as a driver would, and the register walk.

Written from the specification and not with the device's code, so that both can be wrong only in
different ways.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from recorded_irq import RecordedIrq
from turning_loop import TurningLoop

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.device import VirtioDevice
from vmcell_runtime.virtio.mmio import MmioTransport
from vmcell_runtime.virtio.queue import RingLayout

NEXT, WRITE, INDIRECT = 1, 2, 4
EVENT_IDX = 1 << 29
VERSION_1 = 1 << 32
RAM_BYTES = 16 << 20
RINGS_GPA = 0x10_0000
BUFFERS_GPA = 0x20_0000


@dataclass
class Buffer:
    """One buffer the driver offered: where its pieces lie."""

    head: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]


@dataclass
class GuestQueue:
    """A driver's view of one split queue of `size` entries whose rings start at `gpa`."""

    memory: GuestMemory
    size: int
    gpa: int = RINGS_GPA
    buffers_gpa: int = BUFFERS_GPA
    avail_index: int = 0
    used_index: int = 0
    free: list[int] = field(default_factory=list)
    in_flight: dict[int, tuple[Buffer, list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(self.size))
        self.next_buffer_gpa = self.buffers_gpa

    @property
    def avail_gpa(self) -> int:
        return self.gpa + 16 * self.size

    @property
    def used_gpa(self) -> int:
        return (self.avail_gpa + 6 + 2 * self.size + 3) // 4 * 4

    @property
    def layout(self) -> RingLayout:
        return RingLayout(self.size, self.gpa, self.avail_gpa, self.used_gpa)

    def place(self, data: bytes) -> tuple[int, int]:
        """Puts `data` into fresh guest memory; (gpa, length)."""
        span = self.room(len(data))
        self.memory.write(span[0], data)
        return span

    def room(self, length: int) -> tuple[int, int]:
        """Fresh guest memory; (gpa, length)."""
        gpa = self.next_buffer_gpa
        self.next_buffer_gpa += (length + 63) // 64 * 64
        return gpa, length

    def write_descriptor(
        self, index: int, gpa: int, length: int, flags: int = 0, follower: int = 0
    ) -> None:
        entry = struct.pack("<QIHH", gpa, length, flags, follower)
        self.memory.write(self.gpa + 16 * index, entry)

    def publish(self, head: int) -> None:
        """Makes a chain available, whatever its descriptors say."""
        self.memory.store16(self.avail_gpa + 4 + 2 * (self.avail_index % self.size), head)
        self.avail_index = (self.avail_index + 1) & 0xFFFF
        self.memory.store16(self.avail_gpa + 2, self.avail_index)

    def offer(
        self,
        readable: Sequence[bytes] = (),
        writable: Sequence[int] = (),
        *,
        indirect: bool = False,
    ) -> Buffer:
        """A buffer of these pieces, linked and published."""
        read_spans = [self.place(data) for data in readable]
        write_spans = [self.room(length) for length in writable]
        return self.offer_spans(read_spans, write_spans, indirect=indirect)

    def offer_spans(
        self,
        readable: Sequence[tuple[int, int]] = (),
        writable: Sequence[tuple[int, int]] = (),
        *,
        indirect: bool = False,
    ) -> Buffer:
        pieces = [(span, 0) for span in readable] + [(span, WRITE) for span in writable]
        taken = [self.free.pop(0) for _ in range(1 if indirect else len(pieces))]
        if indirect:
            table = b"".join(
                struct.pack("<QIHH", *span, flags | NEXT * (not last), number + 1)
                for number, (span, flags) in enumerate(pieces)
                for last in [number == len(pieces) - 1]
            )
            self.write_descriptor(taken[0], *self.place(table), INDIRECT)
        else:
            for number, (span, flags) in enumerate(pieces):
                last = number == len(pieces) - 1
                follower = 0 if last else taken[number + 1]
                self.write_descriptor(taken[number], *span, flags | NEXT * (not last), follower)
        buffer = Buffer(taken[0], list(readable), list(writable))
        self.in_flight[buffer.head] = buffer, taken
        self.publish(buffer.head)
        return buffer

    def collect(self) -> list[tuple[Buffer, int]]:
        """Buffers the device has given back, with how many bytes it says it wrote."""
        done = []
        index = self.memory.load16(self.used_gpa + 2)
        while self.used_index != index:
            slot = self.used_index % self.size
            entry = self.memory.read(self.used_gpa + 4 + 8 * slot, 8)
            head, written = struct.unpack("<II", entry)
            buffer, taken = self.in_flight.pop(head)
            self.free += taken
            done.append((buffer, written))
            self.used_index = (self.used_index + 1) & 0xFFFF
        return done

    def contents(self, buffer: Buffer) -> bytes:
        """What stands in the writable part of a buffer."""
        return b"".join(self.memory.read(gpa, length) for gpa, length in buffer.writable)

    def want_interrupts(self) -> None:
        """With EVENT_IDX: interrupt at the next used buffer."""
        self.memory.store16(self.avail_gpa + 4 + 2 * self.size, self.used_index)


class GuestDriver:
    """Drives one device through its register window and rings of a fresh machine of 16 MiB."""

    def __init__(
        self, device: VirtioDevice, memory: GuestMemory, loop: TurningLoop, queue_size: int = 0
    ) -> None:
        self.device = device
        self.memory = memory
        self.loop = loop
        self.irq = RecordedIrq()
        self.reports: list[str] = []
        self.transport = MmioTransport(device, memory, self.irq, loop, self.reports.append)
        self.queue_size = queue_size
        self.queues: list[GuestQueue] = []

    def get(self, offset: int) -> int:
        return self.transport.read(offset, 4)

    def set(self, offset: int, value: int) -> None:
        self.transport.write(offset, 4, value)

    def offered(self) -> int:
        self.set(0x14, 0)
        low = self.get(0x10)
        self.set(0x14, 1)
        return low | self.get(0x10) << 32

    def negotiate(self, features: int | None = None) -> None:
        """RESET to FEATURES_OK; all that is offered unless told otherwise."""
        self.set(0x70, 0)
        self.set(0x70, 1)
        self.set(0x70, 3)
        accepted = self.offered() if features is None else features | VERSION_1
        for half in (0, 1):
            self.set(0x24, half)
            self.set(0x20, accepted >> 32 * half & 0xFFFF_FFFF)
        self.set(0x70, 11)

    def start(self, features: int | None = None) -> None:
        """The whole walk to DRIVER_OK, with rings of their own for each queue."""
        self.negotiate(features)
        self.queues = []
        for index in range(len(self.device.queue_sizes)):
            self.set(0x30, index)
            size = self.queue_size or self.get(0x34)
            queue = GuestQueue(
                self.memory,
                min(size, self.get(0x34)),
                RINGS_GPA + 0x8000 * index,
                BUFFERS_GPA + 0x40_0000 * index,
            )
            self.memory.write(queue.gpa, bytes(0x8000))
            self.queues.append(queue)
            self.place_queue(queue.layout)
        self.set(0x70, 15)

    def place_queue(self, layout: RingLayout) -> None:
        """Writes the registers of the selected queue."""
        self.set(0x38, layout.size)
        for offset, gpa in (
            (0x80, layout.descriptor_gpa),
            (0x90, layout.driver_gpa),
            (0xA0, layout.device_gpa),
        ):
            self.set(offset, gpa & 0xFFFF_FFFF)
            self.set(offset + 4, gpa >> 32)
        self.set(0x44, 1)

    def kick(self, index: int) -> None:
        """Notifies a queue and lets the device work until it rests."""
        self.set(0x50, index)
        self.loop.settle()

    @property
    def needs_reset(self) -> bool:
        return bool(self.get(0x70) & 64)

    def close(self) -> None:
        self.loop.settle()
        self.transport.close()


Plug = Callable[..., GuestDriver]
"""`plug(device, queue_size=0, ram=None)`: the driver of a device just plugged in."""
