"""The file system device: what it hands to its daemon, and what it does without one."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from fake_back_end import RING_FEATURES, FakeBackEnd, answer, negotiation, started, stopped
from fuse_client import FORGET, HIPRIO, LOOKUP, REQUESTS, ROOT, FuseClient
from guest_driver import RAM_BYTES, GuestDriver
from turning_loop import TurningLoop

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.fs import Fs
from vmcell_runtime.virtio.vhost_user import FrontEnd

Made = tuple[Fs, FakeBackEnd, list[str]]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(RAM_BYTES, shared=True)
    yield memory
    memory.close()


@pytest.fixture
def call_fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def make(memory: GuestMemory, loop: TurningLoop, call_fd: int) -> Iterator[Callable[..., Made]]:
    """A device whose daemon has already said `said`."""
    with ExitStack() as made:

        def make_one(said: bytes = b"", tag: str = "vmcell") -> Made:
            back_end = FakeBackEnd()
            made.callback(back_end.close)
            back_end.say(said or negotiation())
            lines: list[str] = []
            front_end = FrontEnd(back_end.front)
            made.callback(front_end.close)
            device = Fs(memory, loop, front_end, call_fd, tag=tag, report=lines.append)
            back_end.heard()
            return device, back_end, lines

        yield make_one


@pytest.fixture
def start(
    memory: GuestMemory, loop: TurningLoop, make: Callable[..., Made]
) -> Iterator[Callable[[], tuple[GuestDriver, FakeBackEnd, list[str]]]]:
    """A driver that has set DRIVER_OK and whose daemon has taken the queues."""
    with ExitStack() as drivers:

        def start_one() -> tuple[GuestDriver, FakeBackEnd, list[str]]:
            device, back_end, lines = make()
            driver = GuestDriver(device, memory, loop)
            drivers.callback(driver.close)
            back_end.say(started())
            driver.start()
            return driver, back_end, lines

        yield start_one


def refused(client: FuseClient, opcode: int = LOOKUP) -> bool:
    with pytest.raises(OSError) as raised:
        client.call(opcode, ROOT, b"name\0")
    return raised.value.errno == errno.ENOTCONN


@pytest.mark.parametrize("tag", ["vmcell", "x" * 36])
def test_tag_and_queues_stand_in_the_configuration(
    make: Callable[..., Made], memory: GuestMemory, loop: TurningLoop, tag: str
) -> None:
    device, _, _ = make(tag=tag)
    driver = GuestDriver(device, memory, loop)
    assert driver.get(0x08) == 26
    space = b"".join(struct.pack("<I", driver.get(0x100 + offset)) for offset in range(0, 40, 4))
    assert space == tag.encode().ljust(36, b"\0") + struct.pack("<I", 1)
    driver.set(0x30, 2)
    assert driver.get(0x34) == 0, "there are two queues"
    driver.close()


def test_the_queues_are_handed_over_and_taken_back(
    start: Callable[[], tuple[GuestDriver, FakeBackEnd, list[str]]],
) -> None:
    driver, back_end, lines = start()
    got = back_end.heard()
    rows = [struct.unpack("<IIQQQQ", message.payload) for message in got if message.request == 9]
    for queue, row in zip(driver.queues, rows, strict=True):
        layout = queue.layout
        assert row[2:5] == (layout.descriptor_gpa, layout.device_gpa, layout.driver_gpa)
    kicks = [message.fds[0] for message in got if message.request == 12]
    driver.set(0x50, REQUESTS)
    # One comes from the transport: buffers may have been offered before DRIVER_OK.
    assert [os.eventfd_read(kick) for kick in kicks] == [1, 2]
    back_end.say(stopped() + started())
    driver.start()
    assert [message.request for message in back_end.heard()][:2] == [11, 11]
    back_end.say(stopped())
    driver.set(0x70, 0)
    assert not lines


def test_a_daemon_that_dies_leaves_nothing_unanswered(
    start: Callable[[], tuple[GuestDriver, FakeBackEnd, list[str]]], call_fd: int
) -> None:
    driver, back_end, lines = start()
    client = FuseClient(driver)
    client.send(LOOKUP, ROOT, b"first\0")
    client.send(LOOKUP, ROOT, b"second\0")
    driver.queues[HIPRIO].offer([struct.pack("<IIQ24x", 40, FORGET, 9)], indirect=True)
    assert not driver.queues[REQUESTS].collect()
    back_end.end.close()
    driver.loop.settle()
    done = driver.queues[REQUESTS].collect()
    replies = [struct.unpack_from("<IiQ", driver.queues[REQUESTS].contents(b)) for b, _ in done]
    assert sorted(replies) == [(16, -errno.ENOTCONN, 4), (16, -errno.ENOTCONN, 6)]
    assert [written for _, written in driver.queues[HIPRIO].collect()] == [0]
    assert os.eventfd_read(call_fd), "the guest is interrupted whatever the rings say"
    assert refused(client)
    assert refused(client)
    assert lines == [
        "virtio-fs: the vhost-user daemon has ended; the guest gets ENOTCONN from now on"
    ]
    assert not driver.needs_reset


def test_without_a_daemon_a_driver_may_begin_again(
    start: Callable[[], tuple[GuestDriver, FakeBackEnd, list[str]]],
) -> None:
    driver, back_end, lines = start()
    back_end.end.close()
    driver.loop.settle()
    for _ in range(3):
        driver.start()
        driver.loop.settle()
        assert refused(FuseClient(driver))
    driver.set(0x70, 0)
    driver.loop.settle()
    driver.set(0x50, REQUESTS)
    driver.loop.settle()
    assert len(lines) == 1


@pytest.mark.parametrize("said", [b"", answer(2, 1), answer(9), b"\xff" * 20])
def test_a_daemon_that_does_not_take_the_queues_is_replaced(
    make: Callable[..., Made], memory: GuestMemory, loop: TurningLoop, said: bytes
) -> None:
    device, back_end, lines = make()
    driver = GuestDriver(device, memory, loop)
    back_end.say(said)
    if not said:
        back_end.end.close()
    driver.start()
    loop.settle()
    assert refused(FuseClient(driver))
    assert len(lines) == 1
    driver.close()


def test_a_daemon_that_does_not_give_the_queues_back_is_given_up(
    start: Callable[[], tuple[GuestDriver, FakeBackEnd, list[str]]],
) -> None:
    driver, back_end, lines = start()
    back_end.say(answer(11, struct.pack("<II", 7, 7)))
    driver.set(0x70, 0)
    back_end.heard()
    assert back_end.end.recv(1) == b""
    driver.start()
    driver.loop.settle()
    assert refused(FuseClient(driver))
    assert len(lines) == 1


def test_a_hostile_driver_stops_only_this_device(
    start: Callable[[], tuple[GuestDriver, FakeBackEnd, list[str]]],
) -> None:
    driver, back_end, _ = start()
    driver.memory.store16(driver.queues[REQUESTS].avail_gpa + 2, 5000)
    back_end.end.close()
    driver.loop.settle()
    assert driver.needs_reset
    driver.start()
    driver.loop.settle()
    queue = driver.queues[REQUESTS]
    queue.offer([b"no FUSE header"], [64])
    driver.kick(REQUESTS)
    assert driver.needs_reset
    driver.start()
    driver.loop.settle()
    assert refused(FuseClient(driver))


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (negotiation(features=1 << 32 | 1 << 30), "lacks ring features"),
        (negotiation(protocol=0), "cannot acknowledge"),
    ],
)
def test_a_daemon_that_cannot_serve_is_refused_at_once(
    make: Callable[..., Made], said: bytes, sentence: str
) -> None:
    with pytest.raises(HostError, match=sentence):
        make(said)


def test_memory_must_be_shared(loop: TurningLoop, call_fd: int) -> None:
    memory = GuestMemory(RAM_BYTES)
    back_end = FakeBackEnd()
    front_end = FrontEnd(back_end.front)
    with pytest.raises(CallerError, match="can be shared"):
        Fs(memory, loop, front_end, call_fd, tag="a", report=print)
    front_end.close()
    back_end.close()
    memory.close()


def test_the_features_are_those_of_the_daemon(make: Callable[..., Made]) -> None:
    device, _, _ = make(negotiation(features=RING_FEATURES | 1 << 26))
    assert device.features == 1 << 28
