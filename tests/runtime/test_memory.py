"""Guest memory: whole ranges or GuestError, single-access words, files, pins, guards."""

from __future__ import annotations

import ctypes
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


@pytest.fixture
def small() -> Iterator[GuestMemory]:
    memory = GuestMemory(SMALL)
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
        assert small.map_file(file.fileno(), 1 << 30) == 2 * HUGE_PAGE_BYTES
    slot = small.slots()[-1]
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
        window_bytes = small.map_file(file.fileno(), 1 << 30)
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
