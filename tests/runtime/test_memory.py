"""Guest memory: whole ranges or GuestError, single-access words, files, pins, guards."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError, GuestError
from vmcell_runtime.memory import (
    HIGH_RAM_GPA,
    HUGE_PAGE_BYTES,
    LOW_RAM_LIMIT_BYTES,
    PAGE_BYTES,
    GuestMemory,
)

SMALL = 8 << 20
TWO_SLOTS = LOW_RAM_LIMIT_BYTES + (64 << 20)  # nothing is touched, so nothing is allocated


@pytest.fixture(scope="module")
def two_slots() -> Iterator[GuestMemory]:
    memory = GuestMemory(TWO_SLOTS)
    yield memory
    memory.close()


@pytest.fixture(params=["private", "shared"])
def small(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    memory = GuestMemory(SMALL, shared=request.param == "shared")
    yield memory
    memory.close()


def test_ram_above_3_gib_stands_at_4_gib(two_slots: GuestMemory) -> None:
    assert two_slots.ram_ranges == ((0, LOW_RAM_LIMIT_BYTES), (HIGH_RAM_GPA, 64 << 20))
    two_slots.write(HIGH_RAM_GPA, b"high")
    two_slots.write(LOW_RAM_LIMIT_BYTES - 3, b"low")
    assert two_slots.read(HIGH_RAM_GPA, 4) == b"high"
    assert two_slots.read(LOW_RAM_LIMIT_BYTES - 3, 3) == b"low"


def inside(gpa: int, length: int) -> bool:
    return any(
        start <= gpa and gpa + length <= start + size
        for start, size in ((0, LOW_RAM_LIMIT_BYTES), (HIGH_RAM_GPA, 64 << 20))
    )


EDGES = (0, LOW_RAM_LIMIT_BYTES, HIGH_RAM_GPA, HIGH_RAM_GPA + (64 << 20), 1 << 63, 1 << 64)
addresses = st.one_of(
    st.sampled_from(EDGES).flatmap(lambda edge: st.integers(edge - 20, edge + 20)),
    st.integers(-(1 << 65), 1 << 65),
)


@given(addresses, st.integers(0, 64))
def test_a_range_is_read_whole_or_not_at_all(two_slots: GuestMemory, gpa: int, length: int) -> None:
    if inside(gpa, length):
        assert len(two_slots.read(gpa, length)) == length
    else:
        with pytest.raises(GuestError):
            two_slots.read(gpa, length)
        with pytest.raises(GuestError):
            two_slots.write(gpa, bytes(length))
        with pytest.raises(GuestError):
            two_slots.readv(-1, [(gpa, length)])
        with pytest.raises(GuestError):
            two_slots.host_address(gpa, length)


@given(addresses, st.integers(-(1 << 64), -1))
def test_a_negative_length_is_no_range(two_slots: GuestMemory, gpa: int, length: int) -> None:
    with pytest.raises(GuestError):
        two_slots.read(gpa, length)


@given(addresses, st.sampled_from([(2, "16"), (4, "32"), (8, "64")]), st.integers(0))
def test_words_are_little_endian_aligned_and_inside(
    two_slots: GuestMemory, gpa: int, width: tuple[int, str], value: int
) -> None:
    size, bits = width
    value %= 1 << 8 * size
    load = getattr(two_slots, f"load{bits}")
    store = getattr(two_slots, f"store{bits}")
    if gpa % size or not inside(gpa, size):
        with pytest.raises(GuestError):
            load(gpa)
        with pytest.raises(GuestError):
            store(gpa, value)
        return
    store(gpa, value)
    assert load(gpa) == value
    assert two_slots.read(gpa, size) == value.to_bytes(size, "little")


def test_a_word_out_of_range_is_refused_not_wrapped(small: GuestMemory) -> None:
    small.store16(0, 7)
    with pytest.raises(ValueError):
        small.store16(0, 1 << 16)
    assert small.load16(0) == 7


def test_kernel_io_goes_straight_into_the_pieces(small: GuestMemory) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"0123456789")
        file.flush()
        assert small.preadv(file.fileno(), [(0x1000, 3), (0x5000, 4)], 2) == 7
        assert small.read(0x1000, 4) == b"234\0"
        assert small.read(0x5000, 5) == b"5678\0"
        assert small.preadv(file.fileno(), [(0x1000, 4)], 8) == 2, "the end of the file is short"
        assert small.pwritev(file.fileno(), [(0x5000, 2), (0x5002, 2)], 0) == 4
        assert os.pread(file.fileno(), 10, 0) == b"5678456789"
        assert small.preadv(file.fileno(), [], 0) == 0


def test_streams_go_through_pieces(small: GuestMemory) -> None:
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    try:
        small.write(0x2000, b"abcdef")
        assert small.writev(write_end, [(0x2000, 2), (0x2004, 2)]) == 4
        assert small.readv(read_end, [(0x3000, 1), (0x4000, 100)]) == 4
        assert small.read(0x3000, 1) + small.read(0x4000, 3) == b"abef"
        with pytest.raises(BlockingIOError):
            small.readv(read_end, [(0x3000, 1)])
    finally:
        os.close(read_end)
        os.close(write_end)


def test_one_bad_piece_stops_all_of_it(small: GuestMemory) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * 64)
        file.flush()
        with pytest.raises(GuestError):
            small.preadv(file.fileno(), [(0, 8), (SMALL - 1, 2)], 0)
        assert small.read(0, 8) == bytes(8)
        with pytest.raises(GuestError, match="at most 1024"):
            small.preadv(file.fileno(), [(0, 1)] * 1025, 0)


def test_a_file_window_is_a_read_only_slot_devices_cannot_touch(small: GuestMemory) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * HUGE_PAGE_BYTES)
        slot = small.map_file(file.fileno(), 1 << 30)
    assert slot == small.slots()[-1]
    assert (slot.number, slot.gpa, slot.length_bytes) == (1, 1 << 30, 2 * HUGE_PAGE_BYTES)
    assert slot.read_only
    for attempt in (lambda: small.read(1 << 30, 1), lambda: small.write(1 << 30, b"x")):
        with pytest.raises(GuestError):
            attempt()


@pytest.mark.parametrize("length", [1, 4096, 5000, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 1])
def test_behind_a_file_its_window_reads_as_zero(small: GuestMemory, length: int) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"\xaa" * length)
        file.flush()
        window_bytes = small.map_file(file.fileno(), 1 << 30).length_bytes
    assert window_bytes == (1 if length <= HUGE_PAGE_BYTES else 2) * HUGE_PAGE_BYTES
    slot = small.slots()[-1]
    assert slot.length_bytes == window_bytes
    seen = ctypes.string_at(slot.host_address, window_bytes)
    assert seen == b"\xaa" * length + bytes(window_bytes - length)


def test_a_window_shows_what_is_in_the_page_cache(small: GuestMemory) -> None:
    """One copy for all guests of a host: the window is the file, not a copy of it."""
    with tempfile.TemporaryFile() as file:
        file.truncate(5000)
        small.map_file(file.fileno(), 1 << 30)
        os.pwrite(file.fileno(), b"later", 4000)
    address = small.slots()[-1].host_address
    assert ctypes.string_at(address + 4000, 5) == b"later"


def test_an_empty_file_is_refused(small: GuestMemory) -> None:
    with tempfile.TemporaryFile() as file, pytest.raises(CallerError, match="0 bytes"):
        small.map_file(file.fileno(), 1 << 30)
    assert len(small.slots()) == 1


def test_windows_do_not_overlap_each_other_or_ram(small: GuestMemory) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * HUGE_PAGE_BYTES)
        small.map_file(file.fileno(), 1 << 30)
        for gpa in (0, SMALL - HUGE_PAGE_BYTES, (1 << 30) + HUGE_PAGE_BYTES, 4096):
            with pytest.raises(CallerError):
                small.map_file(file.fileno(), gpa)
    assert len(small.slots()) == 2


def test_a_window_that_ended_leaves_its_number_and_place(small: GuestMemory) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(HUGE_PAGE_BYTES)
        first, second = [small.map_file(file.fileno(), n << 30) for n in (1, 2)]
        assert (first.number, second.number) == (1, 2)
        small.unmap_file(first.number)
        assert [slot.number for slot in small.slots()] == [0, 2]
        third = small.map_file(file.fileno(), 1 << 30)
        assert third.number == 1
        assert [slot.gpa for slot in small.slots()] == [0, 1 << 30, 2 << 30]


def test_a_window_the_kernel_has_does_not_end(small: GuestMemory) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * HUGE_PAGE_BYTES)
        file.flush()
        slot = small.map_file(file.fileno(), 1 << 30)
    small.pin_window(slot.number)
    with pytest.raises(BufferError, match="slot 1"):
        small.unmap_file(slot.number)
    assert ctypes.string_at(slot.host_address, 1) == b"x"
    small.unpin_window(slot.number)
    small.unmap_file(slot.number)
    with pytest.raises(KeyError):
        small.unmap_file(slot.number)


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_discarded_pages_leave_the_host_and_read_as_zero(shared: bool) -> None:
    memory = GuestMemory(4 * SMALL, shared=shared)
    length = 2 * SMALL
    memory.write(SMALL - 100, b"\xff" * (length + 200))
    before = resident_bytes()
    memory.discard(SMALL, length)
    assert before - resident_bytes() > length - (1 << 20)
    for region in memory.shared_regions():
        assert os.fstat(region.fd).st_blocks * 512 < 1 << 20, "the file has a hole there"
    assert memory.read(SMALL, length) == bytes(length)
    assert memory.read(SMALL - 100, 100) + memory.read(SMALL + length, 100) == b"\xff" * 200
    memory.close()


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE_BYTES


@given(st.integers(-10, SMALL + 10), st.integers(-10, SMALL + 10))
def test_only_whole_pages_inside_a_range_are_discarded(start: int, length: int) -> None:
    memory = GuestMemory(SMALL)
    memory.write(0, b"\xff" * SMALL)
    if start < 0 or length < 0 or start + length > SMALL:
        with pytest.raises(GuestError):
            memory.discard(start, length)
        assert memory.read(0, SMALL) == b"\xff" * SMALL
    else:
        memory.discard(start, length)
        kept = [
            byte
            for page in range(0, SMALL, PAGE_BYTES)
            for byte in (memory.read(page, 1), memory.read(page + PAGE_BYTES - 1, 1))
        ]
        whole = [
            start <= page and page + PAGE_BYTES <= start + length
            for page in range(0, SMALL, PAGE_BYTES)
        ]
        assert [byte == b"\0" for byte in kept] == [gone for gone in whole for _ in range(2)]
    memory.close()


def test_memory_above_4_gib_is_discarded_too() -> None:
    memory = GuestMemory((3 << 30) + HUGE_PAGE_BYTES)
    gpa = 4 << 30
    memory.write(gpa, b"x" * 8192)
    memory.discard(gpa + 4096, 4096)
    assert memory.read(gpa + 4094, 4) == b"xx\0\0"
    with pytest.raises(GuestError):
        memory.discard((3 << 30) - 4096, 8192)
    memory.close()


def test_pinned_memory_does_not_close() -> None:
    memory = GuestMemory(SMALL)
    memory.pin()
    with pytest.raises(BufferError):
        memory.close()
    memory.write(0, b"still here")
    memory.unpin()
    memory.close()
    memory.close()
    with pytest.raises(GuestError):
        memory.read(0, 1)


def test_host_addresses_name_the_same_bytes(small: GuestMemory) -> None:
    small.write(0x1234, b"seen")
    assert ctypes.string_at(small.host_address(0x1234, 4), 4) == b"seen"
    assert small.slots()[0].host_address % HUGE_PAGE_BYTES == 0


@pytest.mark.parametrize("step", ["below", "above"])
def test_the_pages_beside_ram_kill_who_touches_them(small: GuestMemory, step: str) -> None:
    slot = small.slots()[0]
    address = slot.host_address - 1 if step == "below" else slot.host_address + slot.length_bytes
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.string_at(address, 1)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGSEGV


@pytest.mark.parametrize("size", [0, -PAGE_BYTES, PAGE_BYTES + 1])
def test_sizes_that_are_no_pages_are_refused(size: int) -> None:
    with pytest.raises(CallerError, match=str(size)):
        GuestMemory(size)


def test_shared_ram_is_the_same_bytes_in_the_file(two_slots: GuestMemory) -> None:
    memory = GuestMemory(TWO_SLOTS, shared=True)
    low, high = memory.shared_regions()
    assert (low.gpa, low.length_bytes) == (0, LOW_RAM_LIMIT_BYTES)
    assert (high.gpa, high.length_bytes) == (HIGH_RAM_GPA, 64 << 20)
    for region in (low, high):
        memory.write(region.gpa + 0x2345, b"ours")
        assert os.pread(region.fd, 4, region.offset + 0x2345) == b"ours"
        os.pwrite(region.fd, b"theirs", region.offset + region.length_bytes - 6)
        assert memory.read(region.gpa + region.length_bytes - 6, 6) == b"theirs"
        assert os.fstat(region.fd).st_blocks * 512 < 1 << 20, "only what was written takes space"
    memory.close()
    assert memory.shared_regions() == ()
    assert two_slots.shared_regions() == ()


def test_nobody_can_take_pages_of_shared_ram_away() -> None:
    memory = GuestMemory(SMALL, shared=True)
    (region,) = memory.shared_regions()
    for length in (0, SMALL << 1):
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, length)
    with pytest.raises(PermissionError):
        fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    memory.close()


def test_a_reserved_window_is_zeros_until_it_has_its_file(small: GuestMemory) -> None:
    slot = small.reserve_window(HUGE_PAGE_BYTES, 1 << 30)
    assert slot == small.slots()[-1]
    assert ctypes.string_at(slot.host_address, HUGE_PAGE_BYTES) == bytes(HUGE_PAGE_BYTES)
    small.pin_window(slot.number)  # a VM knows its address by then
    with tempfile.TemporaryFile() as file:
        file.write(b"\xaa" * 5000)
        file.flush()
        small.lay_file(slot.number, file.fileno())
    assert small.slots()[-1] == slot
    seen = ctypes.string_at(slot.host_address, HUGE_PAGE_BYTES)
    assert seen == b"\xaa" * 5000 + bytes(HUGE_PAGE_BYTES - 5000)
    small.unpin_window(slot.number)


def test_a_file_of_another_length_does_not_come_into_a_window(small: GuestMemory) -> None:
    slot = small.reserve_window(HUGE_PAGE_BYTES, 1 << 30)
    with tempfile.TemporaryFile() as file:
        for length, what in ((0, "0 bytes"), (HUGE_PAGE_BYTES + 1, "does not fit")):
            file.truncate(length)
            with pytest.raises(CallerError, match=what):
                small.lay_file(slot.number, file.fileno())
    assert ctypes.string_at(slot.host_address, 4096) == bytes(4096)
