"""virtio-net frames and receive buffers, with a socket where the TAP would be.

Faces the guest, and whoever sends it frames. A frame that leaves has the guest's own source address
and a header that keeps the rules (V9); whatever else the guest says is dropped or stops the device.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import ExitStack
from unittest.mock import patch

from ring_attack import Pieces, attack, cut, host_script, offer_script
from supply import Script, Supply
from turning_loop import TurningLoop

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import net
from vmcell_runtime.virtio.net import Net

ALLOWED: tuple[type[Exception], ...] = ()
REACHES = (
    "vmcell_runtime.virtio.net:Net._transmit",
    "vmcell_runtime.virtio.net:Net._check_frame",
    "vmcell_runtime.virtio.net:Net._take_room",
    "vmcell_runtime.virtio.net:Net._fill",
)
MAC = bytes.fromhex("02c0ffee0001")
TX = 1
RX_LENGTHS = (1526, 4096, 12, 11, 65562, 1, 100, 20000)


def one(data: bytes) -> None:
    with ExitStack() as stack:
        # There is no TAP, so what only a TAP understands is not asked of the socket.
        stack.enter_context(patch.object(net, "ioctl_bytes", lambda *_: b""))
        stack.enter_context(patch.object(net, "ioctl_number", lambda *_: None))
        tap, world = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (tap, world):
            end.setblocking(False)
            stack.callback(end.close)

        def make(memory: GuestMemory, loop: TurningLoop, opened: ExitStack) -> Net:
            return Net(memory, loop, os.dup(tap.fileno()), mac=MAC, mtu=1500)

        def host(supply: Supply) -> None:
            frame = bytes(12) + supply.chunk(3000)
            try:
                world.send(frame)
            except BlockingIOError:
                world.recv(1 << 17)
            _check_what_left(world)

        attack(data, make, _pieces, host)
        _check_what_left(world)


def _check_what_left(world: socket.socket) -> None:
    while True:
        try:
            frame = world.recv(1 << 17)
        except BlockingIOError:
            return
        if not frame:
            return
        flags, gso, header_bytes, gso_size, start, offset, _ = struct.unpack_from("<BBHHHHH", frame)
        length = len(frame) - 12
        assert 14 <= length <= 14 + 4 + (64 << 10)
        assert frame[18:24] == MAC
        assert not flags & 1 or start + offset + 2 <= length
        assert gso in (0, 1, 4)
        assert not gso or (gso_size and header_bytes <= length and flags & 1)


def _pieces(supply: Supply, queue: int) -> Pieces:
    if queue != TX:
        return [], [supply.pick(RX_LENGTHS) for _ in range(1 + supply.byte() % 3)]
    if supply.byte() & 0x80:
        frame = supply.take(12)
    else:
        flags, gso = supply.pick([(0, 0), (1, 0), (1, 1), (1, 4)])
        frame = struct.pack("<BBHHHHH", flags, gso, 54, supply.number(2), 14, supply.byte(), 0)
    source = bytes(6) if supply.byte() & 0x80 else MAC
    return cut(frame + b"\xff" * 6 + source + supply.chunk(2000), supply), []


def _frame(flags: int, gso_size: int, body: bytes) -> Script:
    script = Script().bytes(0, flags).number(gso_size, 2).bytes(2, 0)
    return script.chunk(body).bytes(12, 40)


def seeds() -> dict[str, bytes]:
    arp = bytes.fromhex("0806 0001 0800 06 04 0001 02c0ffee0001 0a580003 000000000000 0a580002")
    segment = b"\x08\x00\x45" + bytes(100)
    return {
        "arp": bytes(offer_script(TX, _frame(0, 0, arp))),
        "checksum": bytes(offer_script(TX, _frame(1, 0, segment))),
        "segments": bytes(offer_script(TX, _frame(2, 1448, segment * 4))),
        "segments-indirect": bytes(offer_script(TX, _frame(3, 1428, segment * 4), indirect=True)),
        "receive": bytes(
            offer_script(0, bytes([2, 4, 0, 0])) + host_script(Script().chunk(b"\xff" * 6 + arp))
        ),
    }
