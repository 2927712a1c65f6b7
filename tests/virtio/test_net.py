"""The network device: frames both ways, offloads, and what a guest can get wrong.

A datagram socket stands in for the TAP: one frame a datagram, header included, as the TAP has it.
What only a TAP can do (its ioctls, real frames) is in test_net_tap.py.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from fake_memory import FlippingMemory
from guest_driver import VERSION_1, GuestDriver, Plug
from turning_loop import TurningLoop

from vmcell_protos.errors import CallerError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import host_abi, net
from vmcell_runtime.virtio.net import Net

MAC = bytes.fromhex("02c0ffee0001")
PEER = bytes.fromhex("02c0ffee0002")
CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, HOST_TSO6 = 1, 2, 1 << 7, 1 << 11, 1 << 12
MRG_RXBUF = 1 << 15
RX, TX = 0, 1
RX_BYTES = 1536


@dataclass
class Cable:
    """The stand-in TAP, and what the device asked of it."""

    tap: socket.socket
    world: socket.socket
    requests: list[tuple[int, int]] = field(default_factory=list)

    def frames(self) -> list[bytes]:
        """Frames that came out, headers included."""
        found = []
        try:
            while True:
                found.append(self.world.recv(70_000))
        except BlockingIOError:
            return found


@pytest.fixture
def cable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cable]:
    tap, world = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (tap, world):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    cable = Cable(tap, world)

    def ioctl_bytes(fd: int, request: int, argument: bytes, what: str) -> bytes:
        cable.requests.append((request, struct.unpack("<i", argument)[0]))
        return argument

    def ioctl_number(fd: int, request: int, argument: int, what: str) -> None:
        cable.requests.append((request, argument))

    monkeypatch.setattr(net, "ioctl_bytes", ioctl_bytes)
    monkeypatch.setattr(net, "ioctl_number", ioctl_number)
    yield cable
    tap.close()
    world.close()


@pytest.fixture
def device(memory: GuestMemory, loop: TurningLoop, cable: Cable) -> Net:
    return Net(memory, loop, os.dup(cable.tap.fileno()), mac=MAC, mtu=1500)


@pytest.fixture
def driver(device: Net, plug: Plug) -> GuestDriver:
    driver = plug(device)
    driver.start()
    return driver


def _header(
    flags: int = 0, gso: int = 0, header: int = 0, size: int = 0, start: int = 0, offset: int = 0
) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso, header, size, start, offset, 0)


def _frame(payload: bytes = b"payload", source: bytes = MAC) -> bytes:
    return PEER + source + b"\x08\x00" + payload


def _fill(driver: GuestDriver, buffers: int, length: int = RX_BYTES) -> None:
    for _ in range(buffers):
        driver.queues[RX].offer(writable=[length])
    driver.kick(RX)


def _received(driver: GuestDriver) -> list[bytes]:
    """Frames the guest got, headers included, put together as num_buffers says."""
    queue = driver.queues[RX]
    pieces = [queue.contents(buffer)[:written] for buffer, written in queue.collect()]
    frames = []
    while pieces:
        count = struct.unpack_from("<H", pieces[0], 10)[0]
        frames.append(b"".join(pieces[:count]))
        del pieces[:count]
    return frames


def test_configuration(driver: GuestDriver, cable: Cable) -> None:
    read = driver.transport.read
    assert bytes(read(0x100 + n, 1) for n in range(6)) == MAC
    assert read(0x10A, 2) == 1500
    assert cable.requests[0] == (host_abi.TUNSETVNETHDRSZ, 12)


@pytest.mark.parametrize(
    ("features", "offloads"),
    [
        (0, 0),
        (GUEST_CSUM, 1),
        (GUEST_CSUM | GUEST_TSO4, 3),
        (GUEST_CSUM | GUEST_TSO4 | 1 << 8, 7),
        (GUEST_TSO4, 0),
    ],
)
def test_tap_leaves_undone_only_what_the_guest_can_take(
    device: Net, plug: Plug, cable: Cable, features: int, offloads: int
) -> None:
    plug(device).start(features)
    assert cable.requests[-1] == (host_abi.TUNSETOFFLOAD, offloads)


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_frame_to_the_world(driver: GuestDriver, cable: Cable, pieces: int) -> None:
    whole = _header() + _frame(bytes(range(200)))
    step = -(-len(whole) // pieces)
    driver.queues[TX].offer([whole[n : n + step] for n in range(0, len(whole), step)])
    driver.kick(TX)
    assert cable.frames() == [whole]
    assert driver.queues[TX].collect()[0][1] == 0


def test_64_kib_segment_with_checksum_left_to_the_host(driver: GuestDriver, cable: Cable) -> None:
    whole = _header(1, 1, 54, 1448, 34, 16) + _frame(bytes(65536 - 14))
    driver.queues[TX].offer(
        [whole[:4096], *(whole[n : n + 8192] for n in range(4096, 65548, 8192))]
    )
    driver.kick(TX)
    assert cable.frames() == [whole]


@pytest.mark.parametrize("source", [PEER, b"\xff" * 6, bytes(6)])
def test_foreign_source_address_is_dropped(
    driver: GuestDriver, device: Net, cable: Cable, source: bytes
) -> None:
    driver.queues[TX].offer([_header() + _frame(source=source)])
    driver.kick(TX)
    assert cable.frames() == []
    assert device.dropped_frames == 1
    assert len(driver.queues[TX].collect()) == 1
    assert not driver.needs_reset


def test_source_address_cannot_be_changed_after_the_look(
    flipping_memory: FlippingMemory, loop: TurningLoop, plug: Plug, cable: Cable
) -> None:
    device = Net(flipping_memory, loop, os.dup(cable.tap.fileno()), mac=MAC, mtu=1500)
    driver = plug(device, ram=flipping_memory)
    driver.start()
    flipping_memory.flip = True
    whole = _header() + _frame()
    driver.queues[TX].offer([whole])
    driver.kick(TX)
    assert cable.frames() == [whole]
    assert flipping_memory.second_reads == 0


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        _header()[:11],
        _header(),
        _header() + _frame()[:13],
        _header() + _frame(bytes(65541)),
        _header(1, 0, 0, 0, 20, 0) + _frame(b"seven b"),
        _header(1, 0, 0, 0, 0xFFFF, 0xFFFF) + _frame(),
        _header(1, 1, 54, 0, 14, 4) + _frame(bytes(100)),
        _header(1, 1, 5000, 1000, 14, 4) + _frame(bytes(100)),
        _header(0, 1, 54, 1000, 14, 4) + _frame(bytes(100)),
        _header(1, 2, 54, 1000, 14, 4) + _frame(bytes(100)),
        _header(1, 3, 54, 1000, 14, 4) + _frame(bytes(100)),
        _header(1, 5, 54, 1000, 14, 4) + _frame(bytes(100)),
        _header(1, 0x81, 54, 1000, 14, 4) + _frame(bytes(100)),
    ],
)
def test_senseless_frames_stop_the_device(driver: GuestDriver, cable: Cable, frame: bytes) -> None:
    driver.queues[TX].offer([frame[:100] or b"x", *([frame[100:]] if frame[100:] else [])])
    driver.kick(TX)
    assert driver.needs_reset
    assert cable.frames() == []


@pytest.mark.parametrize(
    ("features", "header"),
    [(0, _header(1, 0, 0, 0, 14, 2)), (CSUM | HOST_TSO6, _header(1, 1, 54, 1000, 14, 4))],
)
def test_offloads_not_negotiated_stop_the_device(
    device: Net, plug: Plug, cable: Cable, features: int, header: bytes
) -> None:
    driver = plug(device)
    driver.start(features)
    driver.queues[TX].offer([header + _frame(bytes(100))])
    driver.kick(TX)
    assert driver.needs_reset
    assert cable.frames() == []


def test_frames_from_the_world(driver: GuestDriver, cable: Cable) -> None:
    _fill(driver, 64)
    sent = [_header() + _frame(bytes([n]) * 100 * (n + 1)) for n in range(5)]
    for frame in sent:
        cable.world.send(frame)
    driver.loop.settle()
    got = _received(driver)
    assert [frame[:10] + frame[12:] for frame in got] == [f[:10] + f[12:] for f in sent]
    assert driver.irq.count >= 1


def test_large_segment_is_spread_over_buffers(driver: GuestDriver, cable: Cable) -> None:
    _fill(driver, 64)
    payload = os.urandom(65000)
    cable.world.send(_header(1, 1, 54, 1448, 34, 16) + _frame(payload))
    driver.loop.settle()
    [frame] = _received(driver)
    assert frame.endswith(payload)
    assert len(frame) == 12 + 14 + 65000


def test_without_room_the_tap_is_left_alone(driver: GuestDriver, cable: Cable) -> None:
    _fill(driver, 10)
    cable.world.send(_header() + _frame(b"waits"))
    assert not driver.loop.turn()
    assert _received(driver) == []
    _fill(driver, 60)
    assert [frame[26:] for frame in _received(driver)] == [b"waits"]


def test_flood_ends_with_a_live_device(driver: GuestDriver, cable: Cable) -> None:
    _fill(driver, 200)
    sent = received = 0
    for number in range(2000):
        try:
            cable.world.send(_header() + _frame(struct.pack("<I", number) * 300))
            sent += 1
        except BlockingIOError:
            driver.loop.settle()
            frames = _received(driver)
            received += len(frames)
            driver.queues[RX].next_buffer_gpa = driver.queues[RX].buffers_gpa
            _fill(driver, len(driver.queues[RX].free))
    driver.loop.settle()
    while frames := _received(driver):
        received += len(frames)
        _fill(driver, len(driver.queues[RX].free))
    assert received == sent
    driver.queues[TX].offer([_header() + _frame(b"alive")])
    driver.kick(TX)
    assert cable.frames()[-1].endswith(b"alive")


def test_driver_without_mergeable_buffers(device: Net, plug: Plug, cable: Cable) -> None:
    driver = plug(device)
    driver.start(GUEST_CSUM | VERSION_1)
    _fill(driver, 4)
    cable.world.send(_header() + _frame(bytes(1500)))
    driver.loop.settle()
    [frame] = _received(driver)
    assert len(frame) == 12 + 14 + 1500
    assert struct.unpack_from("<H", frame, 10) == (1,)


def test_buffer_too_short_for_a_frame_stops_the_device(
    device: Net, plug: Plug, cable: Cable
) -> None:
    driver = plug(device)
    driver.start(GUEST_CSUM | GUEST_TSO4)
    _fill(driver, 1)
    assert driver.needs_reset


def test_reset_and_again(driver: GuestDriver, cable: Cable) -> None:
    _fill(driver, 64)
    driver.set(0x70, 0)
    cable.world.send(_header() + _frame(b"meanwhile"))
    driver.loop.settle()
    driver.start()
    _fill(driver, 64)
    assert [frame[26:] for frame in _received(driver)] == [b"meanwhile"]


def test_deleted_tap_is_a_cable_pulled_out(driver: GuestDriver, cable: Cable) -> None:
    _fill(driver, 64)
    cable.world.close()
    cable.tap.close()
    driver.queues[TX].offer([_header() + _frame()])
    driver.kick(TX)
    assert not driver.needs_reset
    assert not driver.loop.turn()


@pytest.mark.parametrize(
    ("mac", "mtu"),
    [
        (b"\x01" + bytes(5), 1500),
        (b"\xff" * 6, 1500),
        (bytes(5), 1500),
        (MAC, 67),
        (MAC, 65536),
    ],
)
def test_settings_that_make_no_interface(
    memory: GuestMemory, loop: TurningLoop, cable: Cable, mac: bytes, mtu: int
) -> None:
    with pytest.raises(CallerError):
        Net(memory, loop, cable.tap.fileno(), mac=mac, mtu=mtu)
