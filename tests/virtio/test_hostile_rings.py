"""Every device against rings that are mostly right and sometimes nonsense.

What must hold: nothing but GuestError comes of it, the loop comes to rest, and the device writes
nowhere but into buffers that were offered as writable and into its used rings. And the same where
a second vCPU rewrites whatever the device has read, as soon as it has.
"""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fake_memory import RacingMemory
from guest_driver import GuestDriver, GuestQueue, Plug
from turning_loop import TurningLoop

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import net
from vmcell_runtime.virtio.balloon import Balloon
from vmcell_runtime.virtio.blk import Blk
from vmcell_runtime.virtio.device import VirtioDevice
from vmcell_runtime.virtio.net import Net
from vmcell_runtime.virtio.pmem import Pmem
from vmcell_runtime.virtio.rng import Rng
from vmcell_runtime.virtio.vsock.device import Vsock

RAM_BYTES = 4 << 20
ARENA_GPA, ARENA_BYTES = 0x20_0000, 0x1F_0000
MAC = bytes.fromhex("02c0ffee0001")
ROUNDS = 60
PAGE = 4096

Make = Callable[[GuestMemory, TurningLoop], VirtioDevice]
Header = Callable[[random.Random], bytes]


def _blk_header(rng: random.Random) -> bytes:
    kind = rng.choice([0, 1, 4, 8, 11, 13, 99])
    return struct.pack("<IIQ", kind, 0, rng.choice([0, 1, 7, 8, 2**64 - 1])) + (
        struct.pack("<QII", rng.randrange(10), rng.randrange(4), rng.randrange(3))
        if kind in (11, 13)
        else rng.choice([b"", bytes(512), bytes(100)])
    )


def _net_header(rng: random.Random) -> bytes:
    flags, gso = rng.choice([(0, 0), (1, 0), (1, 1), (1, 4), (0, 1), (3, 0x81)])
    head = struct.pack("<BBHHHHH", flags, gso, 54, rng.choice([0, 1448]), 14, 4, 0)
    return head + rng.choice([MAC, bytes(6)]) + MAC + rng.randbytes(rng.choice([0, 2, 60, 1500]))


def _vsock_header(rng: random.Random) -> bytes:
    data = rng.randbytes(rng.choice([0, 0, 10, 3000]))
    length = len(data) if rng.random() < 0.97 else rng.randrange(2**32)
    ports = rng.randrange(3), rng.choice([1024, 1024, 9])
    counters = rng.choice([0, 1000, 1 << 18, 2**32 - 1]), rng.choice([0, 0, 5])
    operation = rng.randrange(9), rng.randrange(4)
    return struct.pack("<QQIIIHHIII", 3, 2, *ports, length, 1, *operation, *counters) + data


def _balloon_header(rng: random.Random) -> bytes:
    pages = [rng.choice([0x300, 0x301, 0x3FF, 0x400, 2**32 - 1]) for _ in range(rng.randrange(4))]
    return struct.pack(f"<{len(pages)}I", *pages) + b"x" * (rng.random() < 0.05)


HEADERS: dict[str, Header] = {
    "balloon": _balloon_header,
    "rng": lambda rng: b"",
    "pmem": lambda rng: struct.pack("<I", rng.randrange(2)),
    "blk": _blk_header,
    "net": _net_header,
    "vsock": _vsock_header,
}


@pytest.fixture
def makers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Make]]:
    with ExitStack() as opened:
        tap, world = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (tap, world):
            end.setblocking(False)
            opened.callback(end.close)
        monkeypatch.setattr(net, "ioctl_bytes", lambda *_: b"")
        monkeypatch.setattr(net, "ioctl_number", lambda *_: None)
        path = tmp_path / "disk"
        path.write_bytes(bytes(8 * 512))

        def make_net(memory: GuestMemory, loop: TurningLoop) -> Net:
            for number in range(5):
                world.send(bytes(12) + bytes([number]) * 200)
            return Net(memory, loop, os.dup(tap.fileno()), mac=MAC, mtu=1500)

        def make_vsock(memory: GuestMemory, loop: TurningLoop) -> Vsock:
            device = Vsock(memory, loop, 3)
            for _ in range(5):
                ours, theirs = socket.socketpair()
                opened.callback(ours.close)
                ours.send(b"early" * 100)
                device.listen(1024, theirs)
            return device

        yield {
            "balloon": lambda memory, loop: Balloon(memory),
            "rng": lambda memory, loop: Rng(memory),
            "pmem": lambda memory, loop: Pmem(memory, 4 << 30, 2 << 20),
            "blk": lambda memory, loop: Blk(
                memory, os.open(path, os.O_RDWR), read_only=False, serial="x"
            ),
            "net": make_net,
            "vsock": make_vsock,
        }


class Attacker:
    """Fills one queue; remembers where the device may write."""

    def __init__(self, rng: random.Random, queue: GuestQueue, header: bytes) -> None:
        self.rng = rng
        self.queue = queue
        self.writable: list[tuple[int, int]] = [
            (queue.used_gpa, 6 + 8 * queue.size),
        ]
        pieces = self._pieces(header)
        heads = rng.sample(range(queue.size), len(pieces)) if len(pieces) <= queue.size else []
        for number, (gpa, length, flags) in enumerate(pieces):
            if not heads:
                break
            follower = heads[(number + 1) % len(heads)] if rng.random() < 0.99 else 0xFFFF
            last = number == len(pieces) - 1 and rng.random() < 0.99
            queue.write_descriptor(heads[number], gpa, length, flags | (not last), follower)
        queue.publish(heads[0] if heads and rng.random() < 0.99 else rng.randrange(0x10000))

    def _pieces(self, header: bytes) -> list[tuple[int, int, int]]:
        pieces = []
        while header:
            part = header[: self.rng.choice([len(header), 1, 16, 44])]
            header = header[len(part) :]
            gpa = self._place(len(part))
            if gpa + len(part) <= RAM_BYTES:
                self.queue.memory.write(gpa, part)
            pieces.append((gpa, len(part), 0))
        for _ in range(self.rng.randrange(4)):
            length = self.rng.choice([1, 4, 20, 512, 1536, 3776, PAGE])
            gpa = self._place(length)
            self.writable.append((gpa, length))
            pieces.append((gpa, length, 2))
        if self.rng.random() < 0.02:
            self.rng.shuffle(pieces)
        return pieces or [(self._place(8), self.rng.choice([0, 8]), 0)]

    def _place(self, length: int) -> int:
        if self.rng.random() < 0.01:
            return self.rng.choice([RAM_BYTES - length + 1, RAM_BYTES, 1 << 40, 2**64 - 1])
        return ARENA_GPA + self.rng.randrange(ARENA_BYTES - length)


def _check_writes(memory: GuestMemory, before: bytes, writable: list[tuple[int, int]]) -> None:
    after = memory.read(0, RAM_BYTES)
    for page in range(0, RAM_BYTES, PAGE):
        if before[page : page + PAGE] == after[page : page + PAGE]:
            continue
        for gpa in range(page, page + PAGE):
            if before[gpa] != after[gpa]:
                allowed = any(start <= gpa < start + length for start, length in writable)
                assert allowed, f"the device wrote to {gpa:#x}"


@pytest.mark.parametrize("kind", sorted(HEADERS))
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("racing", [False, True])
def test_device_survives_and_writes_only_where_it_may(
    kind: str, seed: int, racing: bool, makers: dict[str, Make], loop: TurningLoop, plug: Plug
) -> None:
    rng = random.Random(f"{kind} {seed}")
    memory = RacingMemory(RAM_BYTES) if racing else GuestMemory(RAM_BYTES)
    try:
        driver = plug(makers[kind](memory, loop), queue_size=32, ram=memory)
        _attack(rng, driver, memory, HEADERS[kind])
        driver.close()
    finally:
        memory.close()


def _attack(
    rng: random.Random, driver: GuestDriver, memory: GuestMemory, make_header: Header
) -> None:
    served = 0
    restart = True
    writable: list[tuple[int, int]] = []
    for _ in range(ROUNDS):
        if restart or driver.needs_reset:
            driver.start()
            writable.clear()
        attacks = [
            Attacker(rng, queue, make_header(rng) if number or len(driver.queues) == 1 else b"")
            for number, queue in enumerate(driver.queues)
            for _ in range(rng.randrange(3))
        ]
        for attack in attacks:
            writable += attack.writable
        before = memory.read(0, RAM_BYTES)
        if isinstance(memory, RacingMemory):
            memory.racing = True
        for index in range(len(driver.queues)):
            driver.kick(index)
        if isinstance(memory, RacingMemory):
            memory.racing = False
            writable += memory.raced
            memory.raced.clear()
        _check_writes(memory, before, writable)
        served += sum(memory.load16(queue.used_gpa + 2) for queue in driver.queues)
        restart = rng.random() < 0.1
    assert served > 0, "the device never served a buffer: the attack is all nonsense"
