"""vsock packets of a guest, between host programs that talk, listen and hang up.

Faces the guest. Credit, lengths and states are as it says they are, or its streams end; no host
program sees bytes that no packet brought, and there are never more than MAX_STREAMS streams.
"""

from __future__ import annotations

import socket
import struct
from contextlib import ExitStack

from ring_attack import Pieces, attack, cut, host_script, offer_script
from supply import Script, Supply
from turning_loop import TurningLoop

from vmcell_protos.errors import VmcellError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.vsock.device import Vsock

ALLOWED: tuple[type[Exception], ...] = ()
REACHES = (
    "vmcell_runtime.virtio.vsock.mux:Mux.dial",
    "vmcell_runtime.virtio.vsock.mux:Mux._accept",
    "vmcell_runtime.virtio.vsock.mux:Mux._on_data",
    "vmcell_runtime.virtio.vsock.mux:Mux._pump",
    "vmcell_runtime.virtio.vsock.mux:Mux._post_credit",
    "vmcell_runtime.virtio.vsock.mux:Mux._refuse",
    "vmcell_runtime.virtio.vsock.delivery:Delivery.receive",
    "vmcell_runtime.virtio.vsock.stream:Stream.end_writes",
)
CID, PORTS = 3, (1024, 1025, 9, 1 << 30)
RX, TX = 0, 1
BUFFERS = (1536, 4096, 44, 43, 65580, 1, 100)
CREDITS = (1 << 18, 0, 1000, 2**32 - 1, 1)
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)


def one(data: bytes) -> None:
    with ExitStack() as stack:
        ends: list[socket.socket] = []
        devices: list[Vsock] = []

        def pair() -> socket.socket:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            stack.callback(ours.close)
            ends.append(ours)
            return theirs

        def make(memory: GuestMemory, loop: TurningLoop, opened: ExitStack) -> Vsock:
            device = Vsock(memory, loop, CID)
            devices.append(device)
            for _ in range(3):
                device.listen(PORTS[0], pair())
            return device

        def host(supply: Supply) -> None:
            _host_step(supply, devices[0], ends, pair)

        attack(data, make, _pieces, host)


def _host_step(supply: Supply, device: Vsock, ends: list[socket.socket], pair: object) -> None:
    step = supply.byte() % 6
    end = supply.pick(ends)
    if step == 0 and callable(pair) and len(ends) < 8:
        device.connect(supply.pick(PORTS), pair(), _told)
    elif step == 1 and callable(pair) and len(ends) < 8:
        device.listen(supply.pick(PORTS), pair())
    else:
        try:
            if step == 2:
                end.send(supply.chunk(4000))
            elif step == 3:
                end.recv(1 << 16)
            elif step == 4:
                end.shutdown(socket.SHUT_WR)
            else:
                end.close()
        except OSError:
            return  # its stream has ended, or nothing is there to read


def _told(error: VmcellError | None) -> None:
    assert error is None or str(error)


def _pieces(supply: Supply, queue: int) -> Pieces:
    if queue != TX:
        return [], [supply.pick(BUFFERS) for _ in range(1 + supply.byte() % 2)]
    payload = supply.chunk(3000)
    wrong = supply.byte()
    fields = [
        *(CID, 2, supply.pick(PORTS), supply.pick(PORTS), len(payload), 1),
        *(supply.byte() % 9, supply.byte() % 4, supply.pick(CREDITS), supply.number(2)),
    ]
    if wrong > 0xF0:
        fields[wrong % 10] = supply.number((8, 8, 4, 4, 4, 2, 2, 4, 4, 4)[wrong % 10])
    return cut(struct.pack("<QQIIIHHIII", *fields) + payload, supply), []


def _packet(op: int, payload: bytes = b"", *, port: int = 0, flags: int = 0) -> Script:
    script = Script().chunk(payload).bytes(0, 1, port, op, flags, 0).number(0, 2).bytes(0)
    return offer_script(TX, bytes(script))


def seeds() -> dict[str, bytes]:
    buffers = b"".join(offer_script(RX, bytes([1, 1, 1])) for _ in range(4))
    talk = _packet(REQUEST) + _packet(RW, b"hello" * 20)
    say = host_script(Script().bytes(2, 0).chunk(b"answer"))
    dial = host_script(Script().bytes(0, 0, 1))
    return {
        "talk": bytes(buffers + talk + say),
        "shutdown": bytes(buffers + talk + _packet(SHUTDOWN, flags=3)),
        "ended": bytes(buffers + talk + _packet(SHUTDOWN, flags=2) + _packet(SHUTDOWN, flags=1)),
        "half-close": bytes(buffers + talk + host_script(bytes([4, 0])) + _packet(RST)),
        "dialled": bytes(
            buffers + dial + _packet(RESPONSE, port=3) + _packet(CREDIT_REQUEST, port=3)
        ),
        "refused": bytes(buffers + _packet(REQUEST, port=2)),
        "hung-up": bytes(talk + host_script(bytes([5, 0])) + _packet(RW, b"more")),
        "credit": bytes(buffers + talk + _packet(CREDIT_UPDATE) + say),
    }
