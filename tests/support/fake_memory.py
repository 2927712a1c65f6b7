"""Guest memory that misbehaves: what was read once has changed when it is read again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmcell_runtime.memory import GuestMemory, Span
from vmcell_runtime.virtio.queue import RingLayout


class FlippingMemory(GuestMemory):
    """Once `flip` is set, a byte that was copied out before comes out inverted.

    Ring indices are read again and again by right, so words (`load16`, …) do not flip; everything
    else the device may look at once only (safety rule MS7).
    """

    def __init__(self, ram_bytes: int) -> None:
        super().__init__(ram_bytes)
        self.flip = False
        self.second_reads = 0
        self._seen: set[int] = set()

    def read(self, gpa: int, length: int) -> bytes:
        data = super().read(gpa, length)
        if not self.flip:
            return data
        addresses = range(gpa, gpa + length)
        if self._seen.isdisjoint(addresses):
            self._seen.update(addresses)
            return data
        self.second_reads += 1
        return bytes(
            byte ^ 0xFF if address in self._seen else byte
            for address, byte in zip(addresses, data, strict=True)
        )


class WatchedMemory(GuestMemory):
    """Notes how a device treats memory that a guest shares, while `watching` is set.

    What was read once comes out inverted when it is read again, by a copy or by a system call, and
    counts in `second_reads`; so does an entry of an available ring. What is written anew may be
    read anew. `faults` are accesses to ring indices and flags in another way than one word at once
    (MS5), and writes to what belongs to the driver. `rings` are the queues in use.
    """

    def __init__(self, ram_bytes: int, *, shared: bool = False) -> None:
        super().__init__(ram_bytes, shared=shared)
        self.watching = False
        self.second_reads = 0
        self.faults: list[str] = []
        self._seen: set[int] = set()
        self._entries: set[int] = set()  # of available rings
        self._words: list[range] = []  # indices, flags and available rings
        self._drivers: list[range] = []  # what only the driver writes

    def set_rings(self, layouts: Iterable[RingLayout]) -> None:
        """From now on these are the queues."""
        self._seen.clear()
        self._entries.clear()
        self._words.clear()
        self._drivers.clear()
        for size, descriptors, driver, device in layouts:
            self._entries.update(range(driver + 4, driver + 4 + 2 * size, 2))
            end = device + 4 + 8 * size
            available = range(driver, driver + 6 + 2 * size)
            self._words += [available, range(device, device + 4), range(end, end + 2)]
            self._drivers += [available, range(descriptors, descriptors + 16 * size)]

    def read(self, gpa: int, length: int) -> bytes:
        data = super().read(gpa, length)
        if not self.watching or not length:
            return data
        addresses = range(gpa, gpa + length)
        if _meets(addresses, self._words):
            self.faults.append(f"{length} bytes at {gpa:#x} hold ring words and were copied")
        if self._seen.isdisjoint(addresses):
            self._seen.update(addresses)
            return data
        self.second_reads += 1
        return bytes(
            b ^ 0xFF if a in self._seen else b for a, b in zip(addresses, data, strict=True)
        )

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        super().write(gpa, data)
        addresses = range(gpa, gpa + len(data))
        if self.watching and _meets(addresses, self._words):
            self.faults.append(f"{len(data)} bytes at {gpa:#x} hold ring words and were copied")
        self._written(addresses)

    def load16(self, gpa: int) -> int:
        value = super().load16(gpa)
        if self.watching and gpa in self._entries:
            if gpa in self._seen:
                self.second_reads += 1
                return value ^ 1
            self._seen.add(gpa)
        return value

    def store16(self, gpa: int, value: int) -> None:
        super().store16(gpa, value)
        self._written(range(gpa, gpa + 2))

    def pwritev(self, fd: int, spans: Sequence[Span], offset: int) -> int:
        done = super().pwritev(fd, spans, offset)
        self._given_to_the_kernel(spans, done)
        return done

    def writev(self, fd: int, spans: Sequence[Span]) -> int:
        done = super().writev(fd, spans)
        self._given_to_the_kernel(spans, done)
        return done

    def preadv(self, fd: int, spans: Sequence[Span], offset: int) -> int:
        self._all_written(spans)
        return super().preadv(fd, spans, offset)

    def readv(self, fd: int, spans: Sequence[Span]) -> int:
        self._all_written(spans)
        return super().readv(fd, spans)

    def _written(self, addresses: range) -> None:
        if self.watching and _meets(addresses, self._drivers):
            self.faults.append(f"the device wrote to the driver's part at {addresses.start:#x}")
        if len(addresses) < len(self._seen):
            self._seen.difference_update(addresses)
        elif self._seen:
            self._seen = {address for address in self._seen if address not in addresses}

    def _all_written(self, spans: Sequence[Span]) -> None:
        for gpa, length in spans:
            self._written(range(gpa, gpa + length))

    def _given_to_the_kernel(self, spans: Sequence[Span], count: int) -> None:
        for gpa, length in spans:
            if not self.watching or count <= 0:
                return
            addresses = range(gpa, gpa + min(length, count))
            self.second_reads += not self._seen.isdisjoint(addresses)
            self._seen.update(addresses)
            count -= length


def _meets(addresses: range, ranges: Iterable[range]) -> bool:
    start, stop = addresses.start, addresses.stop
    return any(start < other.stop and other.start < stop for other in ranges)


class RacingMemory(GuestMemory):
    """A second vCPU that rewrites what a device has just read, while `racing` is set.

    Whatever is read by copy stands inverted in memory afterwards, so every later look at it sees
    something else. `raced` are the ranges that changed so.
    """

    def __init__(self, ram_bytes: int) -> None:
        super().__init__(ram_bytes)
        self.racing = False
        self.raced: list[Span] = []

    def read(self, gpa: int, length: int) -> bytes:
        data = super().read(gpa, length)
        if self.racing and length <= 4096:
            self.raced.append((gpa, length))
            super().write(gpa, bytes(byte ^ 0xFF for byte in data))
        return data
