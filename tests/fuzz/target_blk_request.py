"""virtio-blk requests over a small disk.

Faces the guest. Whatever a request says ends in an answer or a stopped device; the disk keeps its
length, and what the guest may not write stays as it was.
"""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack

from ring_attack import Pieces, attack, cut, offer_script
from supply import Script, Supply
from turning_loop import TurningLoop

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.blk import Blk

ALLOWED: tuple[type[Exception], ...] = ()
REACHES = (
    "vmcell_runtime.virtio.blk:Blk._read",
    "vmcell_runtime.virtio.blk:Blk._write",
    "vmcell_runtime.virtio.blk:Blk._flush",
    "vmcell_runtime.virtio.blk:Blk._get_id",
    "vmcell_runtime.virtio.blk:Blk._discard",
    "vmcell_runtime.virtio.blk:Blk._write_zeroes",
    "vmcell_runtime.virtio.queue:Queue._indirect_table",
)
SECTORS = 64
KINDS = (0, 1, 4, 8, 11, 13, 2, 99)
SECTOR_NUMBERS = (0, 1, 8, SECTORS - 1, SECTORS, 2**32, 2**55, 2**64 - 1)
LENGTHS = (512, 1024, 4096, 1, 20, 100, 0, 32768)
CONTENT = bytes(range(256)) * 2 * SECTORS


def one(data: bytes) -> None:
    supply = Supply(data)
    read_only = bool(supply.byte() & 1)
    fd = os.memfd_create("disk")
    try:
        os.write(fd, CONTENT)

        def make(memory: GuestMemory, loop: TurningLoop, opened: ExitStack) -> Blk:
            flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
            return Blk(
                memory, os.open(f"/proc/self/fd/{fd}", flags), read_only=read_only, serial="fuzz"
            )

        attack(supply.rest(), make, _pieces)
        assert os.fstat(fd).st_size == len(CONTENT)
        assert not read_only or os.pread(fd, len(CONTENT), 0) == CONTENT
    finally:
        os.close(fd)


def _pieces(supply: Supply, _queue: int) -> Pieces:
    kind = supply.pick(KINDS)
    header = struct.pack("<IIQ", kind, 0, supply.pick(SECTOR_NUMBERS))
    if kind in (11, 13):
        header += struct.pack("<QII", supply.pick(SECTOR_NUMBERS), supply.number(4), supply.byte())
        header += supply.take(supply.byte() % 17)
    elif kind == 1:
        header += CONTENT[: supply.pick(LENGTHS)]
    readable = cut(header, supply)
    writable = [supply.pick(LENGTHS) for _ in range(supply.byte() % 4)]
    return readable, [length for length in [*writable, supply.byte() % 3] if length]


def _script(*requests: Script) -> bytes:
    return bytes([0]) + b"".join(requests)


def seeds() -> dict[str, bytes]:
    read = offer_script(0, bytes([0, 1, 0, 1, 0, 1]))
    write = offer_script(0, bytes([1, 2, 0, 16, 0, 1]))
    zeroes = Script().bytes(5, 0, 1).number(8, 4).bytes(1, 0, 0, 0, 1)
    return {
        "read": _script(read),
        "read-indirect": _script(offer_script(0, bytes([0, 1, 0, 1, 0, 1]), indirect=True)),
        "write-then-flush": _script(write, offer_script(0, bytes([2, 0, 0, 0, 1]))),
        "serial": _script(offer_script(0, bytes([3, 0, 0, 1, 4, 1]))),
        "write-zeroes": _script(offer_script(0, zeroes)),
        "discard": _script(offer_script(0, Script().bytes(4, 0).number(8, 4).bytes(0, 0, 0, 0, 1))),
        "read-only": b"\x01" + write + read,
    }
