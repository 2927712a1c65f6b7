"""A driver of one device whose every step the input chooses: mostly valid chains, kicks, registers.

As Cloud Hypervisor's block fuzzer does it: rings that are right almost always and wrong now and
then, so that the device's own parser is reached. What must hold of every device: whatever the
guest does ends at its device (no exception reaches the loop or a vCPU thread), and the loop comes
to rest.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from guest_driver import RAM_BYTES, GuestDriver, GuestQueue
from supply import Script, Supply
from turning_loop import TurningLoop

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.device import VirtioDevice

STEPS = 48
QUEUE_SIZE = 16
OFFER, OFFER_INDIRECT, KICK, HOST = range(4)
# More valid chains than anything else.
_STEPS = (OFFER, OFFER, OFFER, KICK, KICK, HOST, *range(11))
_BUFFERS_BYTES = 0x20_0000
_SIZES = (4, 4, 4, 1, 2, 8)

# What a target offers: the pieces it reads, and the lengths of those it writes.
Pieces = tuple[list[bytes], list[int]]
MakeDevice = Callable[[GuestMemory, TurningLoop, ExitStack], VirtioDevice]
MakePieces = Callable[[Supply, int], Pieces]
HostStep = Callable[[Supply], None]


def attack(
    data: bytes,
    make_device: MakeDevice,
    make_pieces: MakePieces,
    on_host: HostStep = lambda _: None,
) -> None:
    """One story: the device is new, its driver does as the input says, everything is closed."""
    supply = Supply(data)
    with ExitStack() as opened:
        memory = GuestMemory(RAM_BYTES)
        opened.callback(memory.close)
        loop = TurningLoop()
        opened.callback(loop.close)
        driver = GuestDriver(make_device(memory, loop, opened), memory, loop, QUEUE_SIZE)
        opened.callback(driver.close)
        driver.start()
        for _ in range(STEPS):
            if not supply:
                break
            _step(supply, driver, make_pieces, on_host)
        for index in range(len(driver.queues)):
            driver.kick(index)


def _step(supply: Supply, driver: GuestDriver, make_pieces: MakePieces, on_host: HostStep) -> None:
    step = supply.pick(_STEPS)
    number = supply.byte() % len(driver.queues)
    queue = driver.queues[number]
    match step:
        case 0 | 1:
            _offer(queue, *make_pieces(supply, number), indirect=step == OFFER_INDIRECT)
        case 2:
            driver.kick(number)
        case 3:
            on_host(supply)
            driver.loop.settle()
        case 4:
            numbers = supply.byte() % QUEUE_SIZE, supply.number(8), supply.number(4)
            queue.write_descriptor(*numbers, supply.byte() % 8, supply.number(2))
        case 5:
            queue.publish(supply.byte() % (QUEUE_SIZE + 2))
        case 6:
            driver.memory.store16(queue.avail_gpa + 2, supply.number(2))
        case 7:
            driver.transport.write(supply.number(2) % 0x1000, supply.pick(_SIZES), supply.number(4))
        case 8:
            driver.transport.read(supply.number(2) % 0x1000, supply.pick(_SIZES))
        case 9:
            driver.start()
        case 10:
            driver.start(features=0)


def _offer(
    queue: GuestQueue, readable: list[bytes], writable: list[int], *, indirect: bool
) -> None:
    pieces = len(readable) + len(writable)
    if not 0 < pieces <= QUEUE_SIZE:
        return
    if len(queue.free) < pieces:
        # As a driver that forgets what it has given away.
        queue.free = list(range(queue.size))
        queue.in_flight.clear()
    room = sum(len(data) for data in readable) + sum(writable) + 64 * (pieces + 1) + 16 * pieces
    if queue.next_buffer_gpa - queue.buffers_gpa + room > _BUFFERS_BYTES:
        queue.next_buffer_gpa = queue.buffers_gpa
    if room < _BUFFERS_BYTES:
        queue.offer(readable, writable, indirect=indirect)


def cut(data: bytes, supply: Supply) -> list[bytes]:
    """A buffer in one to three pieces: a driver may cut a header anywhere."""
    first = supply.byte()
    if not 0 < first < len(data):
        return [data] if data else []
    second = first + supply.byte()
    return [piece for piece in (data[:first], data[first:second], data[second:]) if piece]


def offer_script(queue: int, pieces: bytes, *, indirect: bool = False) -> Script:
    """A seed's step: `pieces` as the target's `make_pieces` reads them, then a kick."""
    kick = _STEPS.index(KICK)
    offer = len(_STEPS) - 11 + OFFER_INDIRECT if indirect else 0
    return Script(bytes([offer, queue]) + pieces + bytes([kick, queue]))


def host_script(arguments: bytes) -> Script:
    return Script(bytes([_STEPS.index(HOST), 0]) + arguments)
