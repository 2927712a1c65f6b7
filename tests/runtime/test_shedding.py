"""A restored guest's pages that are as in its snapshot: looked for, looked at again, dropped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from turning_loop import TurningLoop

from vmcell_runtime import shedding as shedding_module
from vmcell_runtime.clock import GuestClock
from vmcell_runtime.hotplug import HotPlug
from vmcell_runtime.memory import PAGE_BYTES, GuestMemory
from vmcell_runtime.pausing import Pausing, State
from vmcell_runtime.saving import Saving
from vmcell_runtime.shedding import LEAST_BYTES, Shedding
from vmcell_runtime.vcpu import VcpuThread
from vmcell_runtime.virtio.mmio import MmioTransport

RAM_BYTES = 4 << 20
ENOUGH = LEAST_BYTES // PAGE_BYTES


class MadeUp:
    """A vCPU that stands at once, a device, the clock and the spare windows; notes what happens."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.before_it_stands: Callable[[], None] = lambda: None
        self.plugged = 0

    def pause(self, stands: Callable[[], None]) -> None:
        self.before_it_stands()
        self.heard.append("stands")
        stands()

    def resume(self) -> None:
        self.heard.append("runs")

    def save(self) -> None:
        self.heard.append("held")

    def go_on(self) -> None:
        self.heard.append("let go")

    def stop(self) -> None:
        self.heard.append("clock stopped")

    def start(self) -> None:
        self.heard.append("clock started")


class Rig:
    """A machine of one vCPU and one device whose RAM began as an image, or as nothing."""

    def __init__(self, *, has_image: bool = True) -> None:
        self.image = os.memfd_create("image")
        os.ftruncate(self.image, RAM_BYTES)
        os.pwrite(self.image, b"saved" * PAGE_BYTES, 0)
        self.memory = GuestMemory(RAM_BYTES)
        if has_image:
            self.memory.lay_image(self.image)
        self.loop = TurningLoop()
        self.made_up = made_up = MadeUp()
        vcpus = cast("list[VcpuThread]", [made_up])
        self.pausing = Pausing(self.loop, vcpus, cast("GuestClock", made_up))
        nothing = cast("Any", None)  # what only a whole save looks at
        self.saving = Saving(
            vm=nothing,
            memory=self.memory,
            vcpus=[],
            processor=nothing,
            serial=nothing,
            cmos=nothing,
            transports=cast("list[MmioTransport]", [made_up]),
            hotplug=cast("HotPlug", made_up),
            pausing=self.pausing,
        )
        self.shedding = Shedding(self.loop, self.pausing, self.saving)

    def write_the_same(self, pages: int) -> None:
        for page in range(pages):
            gpa = page * PAGE_BYTES
            self.memory.write(gpa, self.memory.read(gpa, 1))

    def close(self) -> None:
        self.memory.close()
        self.loop.close()
        os.close(self.image)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(shedding_module, "AFTER_NS", (0,))
    rig = Rig()
    yield rig
    rig.close()


def own_bytes(rig: Rig) -> int:
    return sum(length for _, length in rig.memory.as_in_image())


def test_what_is_as_in_the_snapshot_goes_while_nobody_writes(rig: Rig) -> None:
    rig.write_the_same(ENOUGH)
    before = rig.memory.read(0, RAM_BYTES)
    rig.shedding.goes_on()
    rig.loop.advance_to_timers()
    assert rig.made_up.heard == ["stands", "held", "let go", "runs"], "and the clock went on"
    assert own_bytes(rig) == 0
    assert rig.memory.read(0, RAM_BYTES) == before
    assert not rig.loop._timers, "once for each time it goes on"


def test_what_is_written_before_the_guest_stands_stays(rig: Rig) -> None:
    rig.write_the_same(ENOUGH)
    rig.made_up.before_it_stands = lambda: rig.memory.write(3 * PAGE_BYTES + 7, b"late")
    rig.shedding.goes_on()
    rig.loop.advance_to_timers()
    assert rig.memory.read(3 * PAGE_BYTES + 7, 4) == b"late"
    assert own_bytes(rig) == 0


def test_for_little_the_guest_does_not_stand_still(rig: Rig) -> None:
    rig.write_the_same(ENOUGH - 1)
    rig.shedding.goes_on()
    rig.loop.advance_to_timers()
    assert rig.made_up.heard == []
    assert own_bytes(rig) == (ENOUGH - 1) * PAGE_BYTES


def test_a_machine_that_is_paused_meanwhile_stays_so(rig: Rig) -> None:
    rig.write_the_same(ENOUGH)
    rig.shedding.goes_on()
    rig.pausing.pause(lambda: None)
    rig.loop.advance_to_timers()
    assert rig.pausing.state is State.PAUSED
    assert rig.made_up.heard == ["stands", "clock stopped"]
    assert own_bytes(rig) == ENOUGH * PAGE_BYTES
    rig.shedding.goes_on()
    rig.pausing.resume(lambda: None)
    rig.loop.advance_to_timers()
    assert own_bytes(rig) == 0


def test_devices_that_came_later_are_not_written_under(rig: Rig) -> None:
    rig.write_the_same(ENOUGH)
    rig.made_up.plugged = 1
    rig.shedding.goes_on()
    rig.loop.advance_to_timers()
    assert rig.made_up.heard == []


def test_a_machine_without_a_snapshot_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shedding_module, "AFTER_NS", (0,))
    rig = Rig(has_image=False)
    try:
        rig.write_the_same(ENOUGH)
        rig.shedding.goes_on()
        rig.loop.advance_to_timers()
        assert rig.made_up.heard == []
    finally:
        rig.close()


def test_who_goes_on_twice_is_looked_at_once(rig: Rig) -> None:
    rig.shedding.goes_on()
    rig.shedding.goes_on()
    rig.write_the_same(ENOUGH)
    rig.loop.advance_to_timers()
    assert rig.made_up.heard.count("held") == 1, "the first one's timers are gone"
