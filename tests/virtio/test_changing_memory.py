"""What the machines' memory sees: reads by copy or by system call, ring words and their width.

The devices run on it in machines/; here are devices that break the rules, so that it is known to
see them. And that words of guest memory are never half of one value and half of another (MS5).
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Callable, Iterator

import pytest
from fake_memory import RacingMemory, WatchedMemory
from guest_driver import BUFFERS_GPA, RAM_BYTES, GuestQueue

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.queue import Queue

READS = 3_000_000


@pytest.fixture
def watched() -> Iterator[WatchedMemory]:
    memory = WatchedMemory(RAM_BYTES)
    yield memory
    memory.close()


@pytest.fixture
def ring(watched: WatchedMemory) -> GuestQueue:
    queue = GuestQueue(watched, 8)
    watched.set_rings([queue.layout])
    queue.offer([b"header"], [8])
    watched.watching = True
    return queue


def test_a_second_look_at_a_header_sees_something_else(
    watched: WatchedMemory, ring: GuestQueue
) -> None:
    assert watched.read(BUFFERS_GPA, 6) == b"header"
    assert watched.second_reads == 0
    assert watched.read(BUFFERS_GPA + 5, 2) == bytes([ord("r") ^ 0xFF, 0])
    assert watched.second_reads == 1


def test_a_descriptor_and_a_head_too(watched: WatchedMemory, ring: GuestQueue) -> None:
    watched.read(ring.gpa, 16)
    watched.read(ring.gpa, 16)
    assert watched.second_reads == 1
    head = watched.load16(ring.avail_gpa + 4)
    assert watched.load16(ring.avail_gpa + 4) != head
    assert watched.second_reads == 2


def test_what_the_driver_wrote_anew_may_be_read_anew(
    watched: WatchedMemory, ring: GuestQueue
) -> None:
    watched.read(BUFFERS_GPA, 6)
    watched.watching = False
    watched.write(BUFFERS_GPA, b"second")
    watched.watching = True
    assert watched.read(BUFFERS_GPA, 6) == b"second"
    assert watched.second_reads == 0


def test_what_was_checked_is_not_given_to_the_kernel_from_there(
    watched: WatchedMemory, ring: GuestQueue
) -> None:
    """A frame that was looked at and is then sent from guest memory may be another one."""
    fd = os.memfd_create("out", os.MFD_CLOEXEC)
    try:
        watched.read(BUFFERS_GPA, 6)
        watched.pwritev(fd, [(BUFFERS_GPA + 4, 8)], 0)
        assert watched.second_reads == 1
        watched.writev(fd, [(BUFFERS_GPA + 0x100, 8)])
        assert watched.second_reads == 1
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "act",
    [
        lambda m, q: m.read(q.avail_gpa, 4),
        lambda m, q: m.read(q.avail_gpa + 2, 2),
        lambda m, q: m.read(q.avail_gpa + 4, 16),
        lambda m, q: m.write(q.used_gpa + 2, b"\x01\x00"),
        lambda m, q: m.write(q.used_gpa + 4 + 8 * q.size, b"\x01\x00"),
        lambda m, q: m.write(q.used_gpa + 4, bytes(8 * q.size + 1)),
        lambda m, q: m.store16(q.avail_gpa + 2, 5),
        lambda m, q: m.write(q.gpa + 3, b"x"),
    ],
)
def test_ring_words_by_bytes_and_writes_to_the_drivers_part(
    watched: WatchedMemory, ring: GuestQueue, act: Callable[[WatchedMemory, GuestQueue], object]
) -> None:
    act(watched, ring)
    assert len(watched.faults) >= 1


def test_what_a_device_does_by_right_is_no_fault(watched: WatchedMemory, ring: GuestQueue) -> None:
    for _ in range(3):
        watched.load16(ring.avail_gpa + 2)
        watched.load16(ring.avail_gpa)
    watched.write(ring.used_gpa + 4, struct.pack("<II", 0, 8))
    watched.store16(ring.used_gpa + 2, 1)
    watched.store16(ring.used_gpa + 4 + 8 * ring.size, 1)
    assert not watched.faults
    assert not watched.second_reads


def test_a_second_vcpu_rewrites_what_was_read() -> None:
    memory = RacingMemory(RAM_BYTES)
    memory.write(0, b"abc")
    memory.racing = True
    assert memory.read(0, 3) == b"abc"
    memory.racing = False
    assert memory.read(0, 3) == bytes(byte ^ 0xFF for byte in b"abc")
    assert memory.raced == [(0, 3)]
    memory.close()


def _fork_writer(store: Callable[[int, int], None], values: tuple[int, int]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        while os.getppid() == parent:
            for _ in range(100_000):
                store(64, values[0])
                store(64, values[1])
    finally:
        os._exit(1)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("width", [2, 4, 8])
def test_no_word_is_ever_torn(width: int) -> None:
    """Another process stores two values in turn; three million loads see no third one."""
    memory = GuestMemory(1 << 20, shared=True)
    load = {2: memory.load16, 4: memory.load32, 8: memory.load64}[width]
    store = {2: memory.store16, 4: memory.store32, 8: memory.store64}[width]
    values = (0, (1 << 8 * width) - 1)
    writer = _fork_writer(store, values)
    try:
        seen = {load(64) for _ in range(READS)}
        while len(seen) < 2:  # a writer that was not given a processor yet
            seen.add(load(64))
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        memory.close()
    assert seen == set(values), f"torn: {sorted(seen)[:5]}"


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_lock_stands_between_publishing_and_looking(event_idx: bool) -> None:
    """x86-64 may take a load before an older store: without it a wish to be notified is lost (MS6).

    Two processors show that once in a great while, so it is the order of our steps that is tested.
    """
    steps: list[str] = []

    class Recorder(GuestMemory):
        def load16(self, gpa: int) -> int:
            steps.append("load")
            return super().load16(gpa)

        def store16(self, gpa: int, value: int) -> None:
            steps.append("store")
            super().store16(gpa, value)

    class Fence:
        def __enter__(self) -> None:
            steps.append("lock")

        def __exit__(self, *error: object) -> None:
            steps.append("unlock")

    memory = Recorder(RAM_BYTES)
    guest = GuestQueue(memory, 8)
    queue = Queue(memory, guest.layout, max_chain_bytes=64, indirect=False, event_idx=event_idx)
    queue._fence = Fence()  # type: ignore[assignment]  # a recording one
    guest.offer(writable=[8])
    chain = queue.pop()
    assert chain is not None
    queue.complete(chain.head, 0)
    for act in (queue.flush, queue.arm):
        steps.clear()
        act()
        assert steps == ["store", "lock", "unlock", "load"], act
    memory.close()
