"""Spare windows: what is plugged in is found, what is unplugged is gone to the last descriptor."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from recorded_irq import RecordedIrq
from turning_loop import TurningLoop

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.hotplug import HotPlug, SparePlace
from vmcell_runtime.kvm.vm import Vm
from vmcell_runtime.memory import HUGE_PAGE_BYTES, GuestMemory, Slot
from vmcell_runtime.virtio.window import SpareWindow

GIB = 1 << 30
FIRST = 5
WINDOWS = 4
PMEM, BLK = 27, 2


class RecordedVm:
    """Notes what KVM would have; refuses what it would refuse."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.slots: dict[int, Slot] = {}
        self.ioeventfds: dict[tuple[int, int | None], int] = {}
        self.refusing = False
        self.refusing_ioeventfds = False

    def add_slot(self, slot: Slot) -> None:
        if self.refusing:
            raise HostError("KVM_SET_USER_MEMORY_REGION failed: Cannot allocate memory")
        assert slot.number not in self.slots
        self.memory.pin_window(slot.number)
        self.slots[slot.number] = slot

    def remove_slot(self, slot: Slot) -> None:
        assert self.slots.pop(slot.number) == slot
        self.memory.unpin_window(slot.number)

    def add_ioeventfd(self, fd: int, gpa: int, length: int, value: int | None) -> None:
        assert length == 4
        assert (gpa, value) not in self.ioeventfds
        os.fstat(fd)
        if self.refusing_ioeventfds:
            raise HostError("KVM_IOEVENTFD failed: No space left on device")
        self.ioeventfds[gpa, value] = fd

    def remove_ioeventfd(self, fd: int, gpa: int, length: int, value: int | None) -> None:
        os.fstat(fd)
        assert self.ioeventfds.pop((gpa, value)) == fd


class Bench:
    """A HotPlug of four windows over a recorded VM."""

    def __init__(self, address_bits: int = 40) -> None:
        self.memory = GuestMemory(64 << 20)
        self.loop = TurningLoop()
        self.vm = RecordedVm(self.memory)
        self.windows = {FIRST + n: SpareWindow() for n in range(WINDOWS)}
        self.reports: list[str] = []
        self.hotplug = HotPlug(
            vm=cast("Vm", self.vm),
            memory=self.memory,
            loop=self.loop,
            report=self.reports.append,
            places={
                number: SparePlace(window, 0xD0000000 + number * 4096, RecordedIrq())
                for number, window in self.windows.items()
            },
            address_bits=address_bits,
        )

    def device_id(self, number: int) -> int:
        return self.windows[number].read(8, 4)

    def close(self) -> None:
        self.hotplug.close()
        self.hotplug.close()
        self.loop.close()
        self.memory.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = descriptors()
    bench = Bench()
    yield bench
    bench.close()
    assert descriptors() == before, "every descriptor was given back"


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def mapped_files() -> int:
    return Path("/proc/self/maps").read_text().count("hotplug-image")


def open_images() -> int:
    folder = Path("/proc/self/fd")
    links = [os.readlink(folder / name) for name in descriptors() if (folder / name).is_symlink()]
    return sum("hotplug-image" in link for link in links)


def image(length: int = HUGE_PAGE_BYTES, flags: int = os.O_RDWR) -> int:
    """The descriptor of a file without a name left, for the taker to close."""
    with tempfile.NamedTemporaryFile(prefix="hotplug-image") as file:
        file.truncate(length)
        return os.open(file.name, flags)


def test_an_image_is_mapped_and_let_go_of(bench: Bench) -> None:
    bench.hotplug.plug_pmem(FIRST, image(3 * HUGE_PAGE_BYTES))
    assert open_images() == 0, "the mapping needs none"
    assert bench.device_id(FIRST) == PMEM
    assert mapped_files() == 1
    [slot] = bench.vm.slots.values()
    assert (slot.number, slot.gpa, slot.length_bytes) == (1, 4 * GIB, 3 * HUGE_PAGE_BYTES)
    words = [bench.windows[FIRST].read(0x100 + 4 * n, 4) for n in range(4)]
    assert words == [0, 1, 3 * HUGE_PAGE_BYTES, 0]
    assert list(bench.vm.ioeventfds) == [(0xD0005050, None)]
    bench.hotplug.unplug(FIRST)
    assert bench.device_id(FIRST) == 0
    assert not bench.vm.slots
    assert not bench.vm.ioeventfds
    assert mapped_files() == open_images() == 0
    assert len(bench.memory.slots()) == 1


def test_a_disk_is_closed_with_its_window(bench: Bench) -> None:
    bench.hotplug.plug_blk(FIRST + 1, image(4096), read_only=False)
    assert bench.device_id(FIRST + 1) == BLK
    assert open_images() == 1
    bench.hotplug.unplug(FIRST + 1)
    assert open_images() == 0
    assert bench.device_id(FIRST + 1) == 0


def test_images_take_turns_at_addresses(bench: Bench) -> None:
    for number in range(FIRST, FIRST + 3):
        bench.hotplug.plug_pmem(number, image())
    assert [slot.gpa // GIB for slot in bench.vm.slots.values()] == [4, 5, 6]
    bench.hotplug.unplug(FIRST + 1)
    bench.hotplug.plug_pmem(FIRST + 3, image())
    assert bench.vm.slots[2].gpa == 5 * GIB


@pytest.mark.parametrize("number", [0, FIRST - 1, FIRST + WINDOWS, 2**16 - 1])
def test_other_windows_are_refused(bench: Bench, number: int) -> None:
    for attempt in (
        lambda: bench.hotplug.plug_pmem(number, image()),
        lambda: bench.hotplug.plug_blk(number, image(), read_only=False),
        lambda: bench.hotplug.unplug(number),
    ):
        with pytest.raises(CallerError, match=f"window {number} is not a spare one.*: 5 to 8"):
            attempt()


def test_a_full_window_is_refused_and_kept(bench: Bench) -> None:
    bench.hotplug.plug_blk(FIRST, image(4096), read_only=False)
    for attempt in (
        lambda: bench.hotplug.plug_pmem(FIRST, image()),
        lambda: bench.hotplug.plug_blk(FIRST, image(), read_only=False),
    ):
        with pytest.raises(CallerError, match="window 5 has a device already") as raised:
            attempt()
        assert raised.value.code == "already_exists"
    assert bench.device_id(FIRST) == BLK


def test_an_empty_window_is_not_unplugged(bench: Bench) -> None:
    with pytest.raises(CallerError, match="window 5 is empty") as raised:
        bench.hotplug.unplug(FIRST)
    assert raised.value.code == "not_found"


def test_an_empty_image_changes_nothing(bench: Bench) -> None:
    with pytest.raises(CallerError, match="0 bytes; give a regular file"):
        bench.hotplug.plug_pmem(FIRST, image(0))
    assert bench.device_id(FIRST) == 0
    assert mapped_files() == open_images() == 0
    bench.hotplug.plug_pmem(FIRST, image())


def test_a_disk_opened_otherwise_changes_nothing(bench: Bench) -> None:
    with pytest.raises(CallerError, match="O_RDONLY"):
        bench.hotplug.plug_blk(FIRST, image(4096), read_only=True)
    with pytest.raises(CallerError, match="O_RDWR"):
        bench.hotplug.plug_blk(FIRST, image(4096, os.O_RDONLY), read_only=False)
    assert bench.device_id(FIRST) == 0


def test_what_is_no_file_changes_nothing(bench: Bench) -> None:
    for plug in (
        bench.hotplug.plug_pmem,
        lambda number, fd: bench.hotplug.plug_blk(number, fd, read_only=True),
    ):
        reader, writer = os.pipe()
        os.close(writer)
        with pytest.raises(CallerError, match=r"0 bytes; give a regular file|a disk has no end"):
            plug(FIRST, reader)
    with pytest.raises(HostError, match="mapping a pmem image failed: Permission denied"):
        bench.hotplug.plug_pmem(FIRST, image(flags=os.O_WRONLY))
    assert bench.device_id(FIRST) == 0


def test_what_kvm_refuses_is_not_left_mapped(bench: Bench) -> None:
    bench.vm.refusing = True
    with pytest.raises(HostError, match="Cannot allocate"):
        bench.hotplug.plug_pmem(FIRST, image())
    assert mapped_files() == open_images() == 0
    assert bench.device_id(FIRST) == 0


def test_without_notifications_everything_is_undone(bench: Bench) -> None:
    bench.vm.refusing_ioeventfds = True
    for plug in (
        bench.hotplug.plug_pmem,
        lambda number, fd: bench.hotplug.plug_blk(number, fd, read_only=False),
    ):
        with pytest.raises(HostError, match="No space left"):
            plug(FIRST, image())
        assert bench.device_id(FIRST) == 0
        assert not bench.vm.slots
        assert mapped_files() == open_images() == 0
    bench.vm.refusing_ioeventfds = False
    bench.hotplug.plug_pmem(FIRST, image())
    assert bench.device_id(FIRST) == PMEM


def test_addresses_end_where_the_processor_ends() -> None:
    bench = Bench(address_bits=33)
    for number in range(FIRST, FIRST + 4):
        bench.hotplug.plug_pmem(number, image())
    bench.hotplug.unplug(FIRST + 3)
    with pytest.raises(CallerError, match="33 address bits") as raised:
        bench.hotplug.plug_pmem(FIRST + 3, image(GIB + HUGE_PAGE_BYTES))
    assert raised.value.code == "resource_exhausted"
    bench.close()


class Windows(RuleBasedStateMachine):
    """Any order of plugging: windows, slots and notifications are those of what is plugged in."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.inside: dict[int, int] = {}

    @rule(number=st.integers(FIRST, FIRST + WINDOWS - 1), kind=st.sampled_from([PMEM, BLK]))
    def plug(self, number: int, kind: int) -> None:
        try:
            if kind == PMEM:
                self.bench.hotplug.plug_pmem(number, image())
            else:
                self.bench.hotplug.plug_blk(number, image(), read_only=False)
        except CallerError:
            assert number in self.inside
        else:
            assert number not in self.inside
            self.inside[number] = kind

    @rule(number=st.integers(FIRST, FIRST + WINDOWS - 1))
    def unplug(self, number: int) -> None:
        try:
            self.bench.hotplug.unplug(number)
        except CallerError:
            assert number not in self.inside
        else:
            del self.inside[number]

    @rule(
        number=st.integers(FIRST, FIRST + WINDOWS - 1),
        offset=st.sampled_from([0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x70]),
        value=st.sampled_from([0, 1, 3, 11, 15]),
    )
    def guest_writes(self, number: int, offset: int, value: int) -> None:
        self.bench.windows[number].write(offset, 4, value)
        self.bench.loop.settle()

    @invariant()
    def everything_agrees(self) -> None:
        for number in self.bench.windows:
            assert self.bench.device_id(number) == self.inside.get(number, 0)
        images = sum(kind == PMEM for kind in self.inside.values())
        assert len(self.bench.vm.slots) == images
        assert len(self.bench.vm.ioeventfds) == len(self.inside)
        assert set(self.bench.memory.slots()[1:]) == set(self.bench.vm.slots.values())

    def teardown(self) -> None:
        self.bench.close()


Windows.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestWindows = Windows.TestCase
