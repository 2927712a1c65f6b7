"""Port and memory accesses of a vCPU to the whole board: PC devices and virtio windows.

Faces the guest. Accesses of every size at every offset in any order: each read fits its size, no
access raises but GuestError for a size that does not exist, and a reset leaves working devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from guest_driver import GuestDriver
from recorded_irq import RecordedIrq
from supply import Script, Supply
from turning_loop import TurningLoop

from vmcell_protos.errors import GuestError
from vmcell_runtime.bus import ACCESS_SIZES, Bus
from vmcell_runtime.devices.cmos import Cmos
from vmcell_runtime.devices.console import ConsoleLog, LastWords
from vmcell_runtime.devices.i8042 import I8042
from vmcell_runtime.devices.serial import Serial
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.balloon import Balloon
from vmcell_runtime.virtio.blk import Blk
from vmcell_runtime.virtio.device import VirtioDevice
from vmcell_runtime.virtio.pmem import Pmem
from vmcell_runtime.virtio.rng import Rng
from vmcell_runtime.virtio.vsock.device import Vsock

ALLOWED: tuple[type[Exception], ...] = ()
REACHES = (
    "vmcell_runtime.devices.serial:Serial._transmit",
    "vmcell_runtime.devices.cmos:Cmos.read",
    "vmcell_runtime.virtio.mmio:MmioTransport._write_queue_register",
)
RAM_BYTES = 4 << 20
WINDOW_BYTES = 0x1000
STEPS = 200
SIZES = (4, 4, 4, 1, 2, 8, 3, 0, 9)
PORTS = (*range(0x3F8, 0x400), 0x60, 0x64, 0x70, 0x71, 0x80, 0xCF8)
WORDS = (0, 1, 3, 11, 15, 64, 128, 0xFFFFFFFF, 16, 0x10_0000, 0x10_1000, 0x10_2000)
# Registers of virtio-mmio, § 4.2.2, and the first words of configuration space.
REGISTERS = (
    *(0x70, 0x30, 0x38, 0x44, 0x50, 0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4, 0x14, 0x24, 0x20),
    *(0x64, 0x60, 0x10, 0x34, 0xFC, 0xAC, 0xB0, 0x100, 0x104, 0x108, 0x110, 0x000),
)


def one(data: bytes) -> None:
    supply = Supply(data)
    with ExitStack() as opened:
        memory = GuestMemory(RAM_BYTES)
        opened.callback(memory.close)
        loop = TurningLoop()
        opened.callback(loop.close)
        drivers = [GuestDriver(device, memory, loop, 8) for device in _devices(memory, loop)]
        for driver in drivers:
            opened.callback(driver.close)
        ports, windows = _buses(drivers)
        for _ in range(STEPS):
            if not supply:
                break
            _step(supply, ports, windows, drivers, loop)
        loop.settle()
        for driver in drivers:
            driver.start()
            assert driver.get(0x70) in (15, 79), "a driver that begins anew finds a working device"


def _devices(memory: GuestMemory, loop: TurningLoop) -> list[VirtioDevice]:
    fd = os.memfd_create("disk", os.MFD_CLOEXEC)
    os.truncate(fd, 64 << 10)
    return [
        Rng(memory),
        Blk(memory, fd, read_only=False, serial="x"),
        Vsock(memory, loop, 3),
        Balloon(memory),
        Pmem(memory, 4 << 30, 2 << 20),
    ]


def _buses(drivers: list[GuestDriver]) -> tuple[Bus, Bus]:
    ports, windows = Bus(), Bus()
    words = LastWords(lambda: None)
    ports.add(0x3F8, 8, Serial(RecordedIrq(), ConsoleLog(None, words.line)))
    ports.add(0x60, 5, I8042(lambda: None))
    ports.add(0x70, 2, Cmos())
    for number, driver in enumerate(drivers):
        windows.add(number * WINDOW_BYTES, WINDOW_BYTES, driver.transport)
    return ports, windows


def _step(
    supply: Supply, ports: Bus, windows: Bus, drivers: list[GuestDriver], loop: TurningLoop
) -> None:
    step = supply.byte()
    size = supply.pick(SIZES)
    window = (step >> 4) % len(drivers)
    match step & 15:
        case 0 | 1 | 2 | 3 | 4:
            address = window * WINDOW_BYTES + supply.pick(REGISTERS)
            _access(lambda: windows.write(address, size, supply.pick(WORDS)))
        case 5:
            address = window * WINDOW_BYTES + supply.number(2) % (WINDOW_BYTES + 8)
            _access(lambda: windows.write(address, size, supply.number(size)))
        case 6 | 7:
            address = window * WINDOW_BYTES + supply.pick(REGISTERS)
            _read(windows, address, size)
        case 8:
            _read(windows, supply.number(4), size)
        case 9 | 10:
            port = supply.pick(PORTS)
            _access(lambda: ports.write(port, size, supply.number(size)))
        case 11:
            _read(ports, supply.pick(PORTS), size)
        case 12:
            drivers[window].negotiate()
        case 13:
            drivers[window].start()
        case 14:
            drivers[window].set(0x50, supply.byte())
        case _:
            loop.settle()


def _read(bus: Bus, address: int, size: int) -> None:
    def read() -> None:
        assert 0 <= bus.read(address, size) < 1 << 8 * size

    _access(read, legal=size in ACCESS_SIZES)


def _access(access: Callable[[], object], *, legal: bool = False) -> None:
    try:
        access()
    except GuestError:
        assert not legal


def seeds() -> dict[str, bytes]:
    walk = Script()
    for register, word in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 8), (3, 1), (0, 4), (4, 0)):
        walk.bytes(0x10, 0, register, word)
    serial = Script()
    for letter in b"Kernel panic - not syncing: x\n":
        serial.bytes(9, 3, 0, letter)
    return {
        "status-walk": bytes(walk),
        "serial-line": bytes(serial),
        "reads": bytes(Script().bytes(6, 0, 0, 0x16, 1, 16, 11, 3, 5, 11, 3, 8, 8, 0, 0, 0, 0, 0)),
        "started": bytes(Script().bytes(0x0D, 0, 0x1D, 0, 0x2D, 0, 0x1E, 0, 0, 15, 0)),
        "clock": bytes(Script().bytes(9, 3, 10, 4, 11, 3, 11)),
    }
