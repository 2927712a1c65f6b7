"""Addresses to devices, for ports and for memory-mapped windows.

A device sees offsets into its own range. What no device answers reads as all ones and swallows
writes, as on a PC's bus, and is counted.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Protocol

from vmcell_protos.errors import GuestError

ACCESS_SIZES = (1, 2, 4, 8)
MAX_ACCESS_BYTES = 8


class BusDevice(Protocol):
    """What stands behind a range. Called by vCPU threads: several at once, and it may not wait."""

    def read(self, offset: int, size: int) -> int:
        """The value of `size` bytes at `offset`; never longer than `size` bytes."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Takes the `size` bytes of `value`."""


class Bus:
    """Ranges in ascending order; filled before the vCPUs start, only read afterwards."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, BusDevice]] = []
        self.unclaimed_reads = 0
        self.unclaimed_writes = 0

    def add(self, start: int, length: int, device: BusDevice) -> None:
        """Claims [start, start + length); ValueError if any of it is taken."""
        place = bisect_right(self._starts, start)
        before = self._ranges[place - 1] if place else None
        after = self._ranges[place] if place < len(self._ranges) else None
        if length <= 0 or (before and before[1] > start) or (after and after[0] < start + length):
            raise ValueError(f"bus range {start:#x} of {length} bytes is taken or empty")
        self._starts.insert(place, start)
        self._ranges.insert(place, (start, start + length, device))

    def read(self, address: int, size: int) -> int:
        """What a guest's load of `size` bytes returns; GuestError for sizes KVM does not report."""
        found = self._find(address, size)
        if found is None:
            self.unclaimed_reads += 1
            return (1 << 8 * size) - 1
        return found[1].read(address - found[0], size)

    def write(self, address: int, size: int, value: int) -> None:
        """A guest's store of `size` bytes."""
        found = self._find(address, size)
        if found is None:
            self.unclaimed_writes += 1
            return
        found[1].write(address - found[0], size, value)

    def _find(self, address: int, size: int) -> tuple[int, BusDevice] | None:
        if not 1 <= size <= MAX_ACCESS_BYTES:
            raise GuestError(f"an access of {size} bytes at {address:#x}; 1 to 8 exist")
        if size not in ACCESS_SIZES:
            return None  # a piece of an access across two pages: no device has such registers
        place = bisect_right(self._starts, address) - 1
        if place < 0:
            return None
        start, end, device = self._ranges[place]
        return (start, device) if address + size <= end else None
