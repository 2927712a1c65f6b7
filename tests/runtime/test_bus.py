"""The bus: every access reaches the one device that claims all of it, or nobody."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import GuestError
from vmcell_runtime.bus import Bus


class Recorder:
    """Answers its own number and notes what it was asked."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return self.number

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))


ranges = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), max_size=8)


@given(ranges, st.integers(0, 240), st.sampled_from([1, 2, 4, 8]))
def test_an_access_goes_to_the_range_that_holds_all_of_it(
    wanted: list[tuple[int, int]], address: int, size: int
) -> None:
    bus, taken = Bus(), []
    for number, (start, length) in enumerate(wanted):
        overlap = any(start < end and begin < start + length for begin, end, _ in taken)
        device = Recorder(number)
        if overlap:
            with pytest.raises(ValueError):
                bus.add(start, length, device)
        else:
            bus.add(start, length, device)
            taken.append((start, start + length, device))
    owner = [row for row in taken if row[0] <= address and address + size <= row[1]]
    value = bus.read(address, size)
    bus.write(address, size, 5)
    if owner:
        start, _, device = owner[0]
        assert value == device.number
        assert device.seen == [(address - start, size), (address - start, size, 5)]
        assert (bus.unclaimed_reads, bus.unclaimed_writes) == (0, 0)
    else:
        assert value == (1 << 8 * size) - 1
        assert (bus.unclaimed_reads, bus.unclaimed_writes) == (1, 1)
        assert all(not device.seen for _, _, device in taken)


@pytest.mark.parametrize("size", [3, 5, 6, 7])
def test_pieces_of_an_access_across_two_pages_reach_nobody(size: int) -> None:
    bus, device = Bus(), Recorder(0)
    bus.add(0, 16, device)
    assert bus.read(0, size) == (1 << 8 * size) - 1
    bus.write(0, size, 1)
    assert (device.seen, bus.unclaimed_reads, bus.unclaimed_writes) == ([], 1, 1)


@pytest.mark.parametrize("size", [0, 9, 16, -1])
def test_sizes_no_access_has_are_the_guests_fault(size: int) -> None:
    bus = Bus()
    with pytest.raises(GuestError, match=str(size)):
        bus.read(0, size)
    with pytest.raises(GuestError):
        bus.write(0, size, 0)


@pytest.mark.parametrize("length", [0, -1])
def test_an_empty_range_is_a_bug_of_ours(length: int) -> None:
    with pytest.raises(ValueError):
        Bus().add(0, length, Recorder(0))
