"""What a guest can make the host do at once, keep or write down: each bound, and what breaks it."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_back_end import FakeBackEnd, negotiation
from guest_driver import RAM_BYTES, GuestDriver, GuestQueue, Plug
from turning_loop import TurningLoop

from vmcell_protos.errors import GuestError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import net, queue, reporter
from vmcell_runtime.virtio.balloon import MAX_NUMBERS_BYTES, MAX_REPORT_BYTES, Balloon
from vmcell_runtime.virtio.blk import MAX_DATA_BYTES, Blk
from vmcell_runtime.virtio.device import VirtioDevice
from vmcell_runtime.virtio.fs import Fs
from vmcell_runtime.virtio.net import Net
from vmcell_runtime.virtio.pmem import Pmem
from vmcell_runtime.virtio.queue import BUDGET_CHAINS, BUDGET_NS, Chain, Queue
from vmcell_runtime.virtio.reporter import REPORT_WINDOW_NS, REPORTS_PER_WINDOW, Reporter
from vmcell_runtime.virtio.rng import Rng
from vmcell_runtime.virtio.vhost_user import FrontEnd
from vmcell_runtime.virtio.vsock.device import Vsock

MAC = bytes.fromhex("02c0ffee0001")


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now_ns = 1 << 40

    def monotonic_ns(self) -> int:
        return self.now_ns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(queue, "time", clock)
    monkeypatch.setattr(reporter, "time", clock)
    return clock


@pytest.fixture
def guest(memory: GuestMemory) -> GuestQueue:
    return GuestQueue(memory, 128)


@pytest.fixture
def ring(memory: GuestMemory, guest: GuestQueue) -> Queue:
    return Queue(memory, guest.layout, max_chain_bytes=4096, indirect=True, event_idx=True)


# Budgets of a wake


def test_no_chain_is_begun_after_the_time_of_a_wake(
    guest: GuestQueue, ring: Queue, clock: Clock
) -> None:
    for _ in range(5):
        guest.offer(writable=[8])
    seen: list[Chain] = []

    def slowly(chain: Chain) -> None:
        seen.append(chain)
        clock.now_ns += BUDGET_NS // 2

    assert ring.drain(slowly), "some are left"
    assert len(seen) == 2
    assert ring.drain(slowly)
    assert len(seen) == 4
    assert not ring.drain(slowly)
    assert len(seen) == 5


def test_a_wake_hands_out_64_chains(guest: GuestQueue, ring: Queue, clock: Clock) -> None:
    for _ in range(BUDGET_CHAINS + 1):
        guest.offer(writable=[8])
    seen: list[Chain] = []
    assert ring.drain(seen.append)
    assert len(seen) == BUDGET_CHAINS == 64
    assert not ring.drain(seen.append)
    assert len(seen) == BUDGET_CHAINS + 1


def test_a_full_queue_holds_nobody_else_up(
    memory: GuestMemory, loop: TurningLoop, plug: Plug, tmp_path: Path, clock: Clock
) -> None:
    """Between two wakes of a device that has always more to do, every other gets its turn."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    driver = plug(Blk(memory, os.open(disk, os.O_RDWR), read_only=False, serial="x"))
    driver.start()
    blk = driver.queues[0]
    for _ in range(80):
        blk.offer([struct.pack("<IIQ", 0, 0, 0)], [512, 1])
    driver.set(0x50, 0)
    loop.turn()
    done = len(blk.collect())
    assert done == 64, "the rest waits for the next turn"
    loop.settle()
    assert len(blk.collect()) == 16


# Limits before allocation: the largest buffer a device takes, and one byte more


def _device(kind: str, memory: GuestMemory, loop: TurningLoop, folder: Path) -> VirtioDevice:
    match kind:
        case "blk":
            path = folder / "disk"
            path.write_bytes(bytes(512))
            return Blk(memory, os.open(path, os.O_RDWR), read_only=False, serial="x")
        case "pmem":
            return Pmem(memory, 4 << 30, 2 << 20)
        case "rng":
            return Rng(memory)
        case "balloon":
            return Balloon(memory)
    return Vsock(memory, loop, 3)


# device → the queue, and the most bytes one buffer may say it has
LARGEST = {
    "blk": (0, MAX_DATA_BYTES + 17),
    "pmem": (0, 4096),
    "rng": (0, 64 << 10),
    "balloon": (0, MAX_REPORT_BYTES),
    "vsock": (1, (64 << 10) + 44),
}


@pytest.mark.parametrize("kind", sorted(LARGEST))
def test_a_buffer_beyond_the_limit_is_refused_before_a_byte_of_it_is_touched(
    kind: str,
    memory: GuestMemory,
    loop: TurningLoop,
    plug: Plug,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index, most = LARGEST[kind]
    driver = plug(_device(kind, memory, loop, tmp_path))
    for writable in (False, True):
        driver.start()
        queue_of_it = driver.queues[index]
        span = (RAM_BYTES - 8, most + 1)
        queue_of_it.offer_spans(*(((), [span]) if writable else ([span], ())))
        with monkeypatch.context() as patched:
            patched.setattr(memory, "write", lambda *_: pytest.fail("it wrote"))
            patched.setattr(os, "getrandom", lambda *_: pytest.fail("it made entropy"))
            driver.kick(index)
        assert driver.needs_reset
        assert f"longer than {most} bytes" in driver.reports[-1]


def test_page_numbers_of_a_balloon_have_a_limit_of_their_own(
    memory: GuestMemory, plug: Plug
) -> None:
    driver = plug(Balloon(memory))
    driver.start()
    driver.queues[0].offer([bytes(MAX_NUMBERS_BYTES)])
    driver.kick(0)
    assert not driver.needs_reset
    driver.queues[0].offer([bytes(MAX_NUMBERS_BYTES + 4)])
    driver.kick(0)
    assert driver.needs_reset


def test_room_for_a_frame_may_not_come_in_crumbs(
    memory: GuestMemory, loop: TurningLoop, plug: Plug, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1024 pieces are one call of the kernel; more are refused before all buffers are walked."""
    monkeypatch.setattr(net, "ioctl_bytes", lambda *_: b"")
    monkeypatch.setattr(net, "ioctl_number", lambda *_: None)
    tap = os.eventfd(0, os.EFD_NONBLOCK)
    driver = plug(Net(memory, loop, tap, mac=MAC, mtu=1500))
    driver.start()
    receive = driver.queues[0]
    crumbs = [(0x40_0000 + n, 1) for n in range(256)]
    table = b"".join(
        struct.pack("<QIHH", *crumb, 2 | (number < 255), number + 1)
        for number, crumb in enumerate(crumbs)
    )
    span = receive.place(table)
    for head in range(256):
        receive.write_descriptor(head, *span, 4)
        receive.publish(head)
    walks = []
    walk = Queue.walk
    monkeypatch.setattr(Queue, "walk", lambda self, head: walks.append(head) or walk(self, head))
    driver.kick(0)
    assert driver.needs_reset
    assert len(walks) == 5


# Heads


def test_a_head_comes_again_only_after_its_used_entry_is_published(
    memory: GuestMemory, guest: GuestQueue, ring: Queue
) -> None:
    buffer = guest.offer(writable=[8])
    chain = ring.pop()
    assert chain is not None
    ring.complete(chain.head, 0)
    guest.publish(buffer.head)
    with pytest.raises(GuestError, match="while in flight"):
        ring.pop()
    ring.flush()
    assert ring.pop() == chain


def test_one_head_over_and_over_writes_nothing_behind_the_used_ring(
    memory: GuestMemory, plug: Plug
) -> None:
    """A second vCPU that publishes one head faster than we come to the end of the ring."""
    driver = plug(Rng(memory), queue_size=1)
    driver.start()
    [entropy] = driver.queues
    entropy.write_descriptor(0, 0x40_0000, 4, 2)
    behind = entropy.used_gpa + 4 + 8 * entropy.size + 2
    memory.write(behind, b"\xee" * 256)
    load16 = memory.load16
    index = 0

    def racing(gpa: int) -> int:
        nonlocal index
        if gpa == entropy.avail_gpa + 2:
            index = min(index + 1, 40)
            return index
        return load16(gpa)

    memory.load16 = racing  # type: ignore[method-assign]  # the other vCPU
    driver.kick(0)
    assert memory.read(behind, 256) == b"\xee" * 256
    assert driver.needs_reset


def test_a_position_counts_what_is_done_and_not_published(guest: GuestQueue, ring: Queue) -> None:
    """Who goes on from a saved position must find every buffer that the guest has not back."""
    for _ in range(3):
        guest.offer(writable=[8])
    first, second = ring.pop(), ring.pop()
    assert first is not None
    assert second is not None
    assert ring.position == (0, 0)
    ring.complete(first.head, 0)
    assert ring.position == (0, 0)
    ring.flush()
    assert ring.position == (1, 1)


# What a fast guest leaves for a slow loop


@pytest.fixture
def calls(loop: TurningLoop, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What waits for the loop; it does not turn meanwhile, as while a disk is slow."""
    waiting: list[object] = []
    monkeypatch.setattr(loop, "call_soon", waiting.append)
    return waiting


def _reset_storm(driver: GuestDriver, rounds: int = 50) -> None:
    for _ in range(rounds):
        driver.start()
        driver.set(0x70, 0)
        driver.set(0x70, 0)


def test_resets_of_a_socket_device_do_not_pile_up(
    memory: GuestMemory, loop: TurningLoop, plug: Plug, calls: list[object]
) -> None:
    driver = plug(Vsock(memory, loop, 3))
    _reset_storm(driver)
    assert len(calls) == 1


def test_resets_of_a_network_device_do_not_pile_up(
    memory: GuestMemory,
    loop: TurningLoop,
    plug: Plug,
    calls: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(net, "ioctl_bytes", lambda *_: b"")
    monkeypatch.setattr(net, "ioctl_number", lambda *_: None)
    driver = plug(Net(memory, loop, os.eventfd(0, os.EFD_NONBLOCK), mac=MAC, mtu=1500))
    _reset_storm(driver)
    assert len(calls) == 1
    for call in list(calls):
        assert callable(call)
        call()
    driver.set(0x70, 0)
    assert len(calls) == 2, "what comes after it has run is not forgotten"


@pytest.fixture
def lost_fs(loop: TurningLoop) -> Iterator[tuple[GuestDriver, list[str]]]:
    """A directory whose daemon is gone: driver, and what it reports."""
    memory = GuestMemory(RAM_BYTES, shared=True)
    back_end = FakeBackEnd()
    back_end.say(negotiation())
    front_end = FrontEnd(back_end.front)
    call_fd = os.eventfd(0, os.EFD_NONBLOCK)
    lines: list[str] = []
    device = Fs(memory, loop, front_end, call_fd, tag="a", report=lines.append)
    back_end.heard()
    back_end.end.close()
    driver = GuestDriver(device, memory, loop)
    loop.settle()
    yield driver, lines
    driver.close()
    front_end.close()
    back_end.close()
    os.close(call_fd)
    memory.close()


def test_restarts_of_a_lost_directory_do_not_pile_up(
    lost_fs: tuple[GuestDriver, list[str]], calls: list[object]
) -> None:
    driver, _ = lost_fs
    _reset_storm(driver)
    assert len(calls) == 1


# Words for the log


def test_ten_lines_in_five_seconds(clock: Clock) -> None:
    lines: list[str] = []
    report = Reporter(lines.append)
    for second in range(20):
        for number in range(5):
            report(f"{second} {number}")
        clock.now_ns += 1_000_000_000
    assert REPORTS_PER_WINDOW == 10
    assert REPORT_WINDOW_NS == 5_000_000_000
    assert len(lines) == 40


def test_a_device_that_is_broken_again_and_again_says_so_ten_times(
    memory: GuestMemory, plug: Plug, clock: Clock
) -> None:
    driver = plug(Pmem(memory, 4 << 30, 2 << 20))
    for _ in range(100):
        driver.start()
        driver.queues[0].offer([b"x"])
        driver.kick(0)
        assert driver.needs_reset
    assert len(driver.reports) == 10


def test_a_lost_directory_says_what_it_did_not_find_ten_times(
    lost_fs: tuple[GuestDriver, list[str]], clock: Clock
) -> None:
    driver, lines = lost_fs
    for _ in range(100):
        driver.start()
        # Said to be made available, and no chain at all: each activation misses 100 of them.
        requests = driver.queues[1]
        requests.memory.store16(requests.avail_gpa + 2, 100)
        driver.loop.settle()
    missing = [line for line in lines if "were not found" in line]
    assert 0 < len(missing) <= 10
    assert len(lines) <= 10


# What the host gives less of than asked


def test_entropy_that_came_short_is_not_said_to_be_more(
    memory: GuestMemory, plug: Plug, monkeypatch: pytest.MonkeyPatch
) -> None:
    """getrandom(2): a signal may cut a read of more than 256 bytes short."""
    monkeypatch.setattr(os, "getrandom", lambda length: b"r" * min(length, 300))
    driver = plug(Rng(memory))
    driver.start()
    driver.queues[0].offer(writable=[200, 300])
    driver.kick(0)
    [(buffer, written)] = driver.queues[0].collect()
    assert written == 300
    assert driver.queues[0].contents(buffer) == b"r" * 300 + bytes(200)


def test_a_full_disk_is_the_guests_answer_not_our_end(
    memory: GuestMemory, plug: Plug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    driver = plug(Blk(memory, os.open(path, os.O_RDWR), read_only=False, serial="x"))
    driver.start()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    buffer = driver.queues[0].offer([struct.pack("<IIQ", 1, 0, 0), bytes(512)], [1])
    driver.kick(0)
    driver.queues[0].collect()
    assert driver.queues[0].contents(buffer) == b"\x01"
    assert not driver.needs_reset
