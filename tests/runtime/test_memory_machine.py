"""Guest memory and its slots against a model: what a VM was given cannot go away under it (MS1)."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
from step_machine import Choices, StepMachine, machine_test, step

from vmcell_protos.errors import CallerError, GuestError
from vmcell_runtime.memory import HUGE_PAGE_BYTES, GuestMemory, Slot
from vmcell_runtime.page_map import PAGE_BYTES

RAM_BYTES = 64 << 10
PLACES = tuple((4 << 30) + n * HUGE_PAGE_BYTES for n in range(4))
ODD = (-1, -8, RAM_BYTES, RAM_BYTES - 1, 1 << 32, 1 << 63, 2**64 - 1, 2**64, 2**65)


class MemoryMachine(StepMachine):
    """A RAM of bytes, windows of files, and a kernel that has some of them.

    Whole ranges or GuestError; a slot the kernel has refuses to end; addresses stay where they are.
    """

    def set_up(self, choices: Choices) -> None:
        self.memory = GuestMemory(RAM_BYTES, shared=choices.flag())
        self.model = bytearray(RAM_BYTES)
        self.windows: dict[int, Slot] = {}
        self.kernels: set[int] = set()  # windows that the kernel has
        self.pins = 0
        self.ram_slot = self.memory.slots()[0]

    def _range(self, choices: Choices) -> tuple[int, int]:
        gpa = choices.below(RAM_BYTES) if not choices.flag(4) else choices.of(ODD)
        length = choices.of([0, 1, 2, 7, 8, 100, PAGE_BYTES, RAM_BYTES])
        return gpa, length

    @staticmethod
    def _inside(gpa: int, length: int) -> bool:
        return gpa >= 0 and gpa + length <= RAM_BYTES

    @step(4)
    def read(self, choices: Choices) -> None:
        gpa, length = self._range(choices)
        if self._inside(gpa, length):
            assert self.memory.read(gpa, length) == self.model[gpa : gpa + length]
        else:
            with pytest.raises(GuestError):
                self.memory.read(gpa, length)

    @step(4)
    def write(self, choices: Choices) -> None:
        gpa, length = self._range(choices)
        data = bytes([choices.below(256)]) * length
        if self._inside(gpa, length):
            self.memory.write(gpa, data)
            self.model[gpa : gpa + length] = data
        else:
            with pytest.raises(GuestError):
                self.memory.write(gpa, data)

    @step(4)
    def word(self, choices: Choices) -> None:
        gpa, _ = self._range(choices)
        width = choices.of([2, 4, 8])
        load = {2: self.memory.load16, 4: self.memory.load32, 8: self.memory.load64}[width]
        store = {2: self.memory.store16, 4: self.memory.store32, 8: self.memory.store64}[width]
        value = choices.below(1 << 8 * width)
        if not self._inside(gpa, width) or gpa % width:
            with pytest.raises(GuestError):
                load(gpa)
            with pytest.raises(GuestError):
                store(gpa, value)
            return
        assert load(gpa) == int.from_bytes(self.model[gpa : gpa + width], "little")
        store(gpa, value)
        self.model[gpa : gpa + width] = value.to_bytes(width, "little")
        with pytest.raises(ValueError, match="format"):
            store(gpa, 1 << 8 * width)

    @step(2)
    def discard(self, choices: Choices) -> None:
        gpa, length = self._range(choices)
        if not self._inside(gpa, length):
            with pytest.raises(GuestError):
                self.memory.discard(gpa, length)
            return
        self.memory.discard(gpa, length)
        first = -(-gpa // PAGE_BYTES) * PAGE_BYTES
        end = (gpa + length) // PAGE_BYTES * PAGE_BYTES
        self.model[first:end] = bytes(max(0, end - first))

    @step(2)
    def kernel_io(self, choices: Choices) -> None:
        """One bad piece, and nothing of it happens."""
        spans = [self._range(choices) for _ in range(3)]
        fd = os.memfd_create("file", os.MFD_CLOEXEC)
        try:
            if all(self._inside(*span) for span in spans):
                wanted = b"".join(bytes(self.model[g : g + n]) for g, n in spans)
                assert self.memory.pwritev(fd, spans, 0) == len(wanted)
                assert os.pread(fd, len(wanted) + 1, 0) == wanted
            else:
                with pytest.raises(GuestError):
                    self.memory.pwritev(fd, spans, 0)
                assert os.fstat(fd).st_size == 0
        finally:
            os.close(fd)

    @step(3)
    def map_window(self, choices: Choices) -> None:
        gpa = choices.of(PLACES)
        fd = os.memfd_create("image", os.MFD_CLOEXEC)
        os.truncate(fd, choices.of([1, PAGE_BYTES, HUGE_PAGE_BYTES]))
        taken = any(slot.gpa == gpa for slot in self.windows.values())
        try:
            if taken:
                with pytest.raises(CallerError):
                    self.memory.map_file(fd, gpa)
            else:
                slot = self.memory.map_file(fd, gpa)
                assert slot.read_only
                assert slot.number not in self.windows
                assert slot.number != self.ram_slot.number
                self.windows[slot.number] = slot
        finally:
            os.close(fd)

    @step(2)
    def unmap_window(self, choices: Choices) -> None:
        if not self.windows:
            return
        number = choices.of(sorted(self.windows))
        if number in self.kernels:
            with pytest.raises(BufferError):
                self.memory.unmap_file(number)
        else:
            self.memory.unmap_file(number)
            del self.windows[number]

    @step(2)
    def give_to_kernel(self, choices: Choices) -> None:
        free = sorted(set(self.windows) - self.kernels)
        if free:
            number = choices.of(free)
            self.memory.pin_window(number)
            self.kernels.add(number)

    @step(2)
    def take_from_kernel(self, choices: Choices) -> None:
        if self.kernels:
            number = choices.of(sorted(self.kernels))
            self.memory.unpin_window(number)
            self.kernels.remove(number)

    @step()
    def pin(self, choices: Choices) -> None:
        self.memory.pin()
        self.pins += 1

    @step()
    def unpin(self, choices: Choices) -> None:
        if self.pins:
            self.memory.unpin()
            self.pins -= 1

    @step()
    def close_while_pinned(self, choices: Choices) -> None:
        if self.pins:
            with pytest.raises(BufferError):
                self.memory.close()

    def check(self) -> None:
        slots = {slot.number: slot for slot in self.memory.slots()}
        assert slots == {0: self.ram_slot, **self.windows}, "an address moved, or a slot is lost"
        address = self.memory.host_address(8, 8)
        assert address == self.ram_slot.host_address + 8

    def finish(self) -> None:
        assert self.memory.read(0, RAM_BYTES) == self.model
        if self.pins:
            with pytest.raises(BufferError):
                self.memory.close()

    def tear_down(self) -> None:
        for _ in range(self.pins):
            self.memory.unpin()
        self.memory.close()
        self.memory.close()
        with pytest.raises(GuestError):
            self.memory.read(0, 1)


test_memory = machine_test(MemoryMachine, "memory")


def test_memory_nobody_closed_stays_where_it_is() -> None:
    """Dropped, as by a forgotten reference, while the kernel still has its address: no other
    object may come to stand there (the reproduction of MS1)."""
    memory = GuestMemory(1 << 20)
    [slot] = memory.slots()
    memory.write(0, b"the guest's")
    alive = weakref.ref(memory)
    del memory
    gc.collect()
    assert alive() is None
    start, end = slot.host_address, slot.host_address + slot.length_bytes
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(word, 16) for word in line.split()[0].split("-"))
        if first <= start and end <= last:
            break
    else:
        raise AssertionError("the memory is unmapped, and its address may be another's")
    others = [GuestMemory(1 << 20) for _ in range(8)]
    assert all(other.slots()[0].host_address != start for other in others)
    for other in others:
        other.close()
