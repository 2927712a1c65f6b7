"""Pause and resume as a table of wishes, and the clock in between; vCPUs are made up."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from turning_loop import TurningLoop

from vmcell_runtime.clock import GuestClock
from vmcell_runtime.kvm.vcpu import Vcpu
from vmcell_runtime.kvm.vm import Vm
from vmcell_runtime.pausing import Pausing, State
from vmcell_runtime.vcpu import VcpuThread


class MadeUpVcpu:
    """Stands when the test says so."""

    def __init__(self) -> None:
        self.asked: Callable[[], None] | None = None
        self.runs = True

    def pause(self, stands: Callable[[], None]) -> None:
        assert self.runs
        assert self.asked is None
        self.asked = stands

    def resume(self) -> None:
        assert not self.runs, "only one that stands is let go"
        self.runs = True

    def stand(self) -> None:
        stands, self.asked = self.asked, None
        if stands is not None:
            self.runs = False
            stands()


class MadeUpClock:
    def __init__(self, vcpus: list[MadeUpVcpu]) -> None:
        self.vcpus = vcpus
        self.goes = True

    def stop(self) -> None:
        assert self.goes
        assert not any(vcpu.runs for vcpu in self.vcpus), "read when all stand"
        self.goes = False

    def start(self) -> None:
        assert not self.goes
        assert not any(vcpu.runs for vcpu in self.vcpus), "set before any runs"
        self.goes = True


class Wishes(RuleBasedStateMachine):
    """Any order of wishes and of vCPUs that come to stand.

    What must hold: wishes are granted in their order, each when it is true, and the clock stands
    exactly while the machine is paused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loop = TurningLoop()
        self.vcpus = [MadeUpVcpu() for _ in range(3)]
        self.clock = MadeUpClock(self.vcpus)
        self.pausing = Pausing(
            self.loop,
            cast("list[VcpuThread]", self.vcpus),
            cast("GuestClock", self.clock),
        )
        self.made: list[State] = []
        self.granted = 0
        self.deeds_to_come = 0

    def grant(self, number: int, wanted: State) -> None:
        assert number == self.granted
        assert self.pausing.state is wanted
        self.granted += 1

    @rule(pause=st.booleans())
    def wish(self, pause: bool) -> None:
        wanted = State.PAUSED if pause else State.RUNNING
        done = partial(self.grant, len(self.made), wanted)
        self.made.append(wanted)
        (self.pausing.pause if pause else self.pausing.resume)(done)

    @rule()
    def do_a_brief_deed(self) -> None:
        runs = self.pausing.state is State.RUNNING
        assert self.pausing.briefly(self.deed) is runs
        self.deeds_to_come += runs

    def deed(self) -> None:
        assert not any(vcpu.runs for vcpu in self.vcpus)
        assert self.clock.goes, "to the guest it is no pause"
        self.deeds_to_come -= 1

    @rule(number=st.integers(0, 2))
    def one_stands(self, number: int) -> None:
        self.vcpus[number].stand()
        self.loop.settle()

    @invariant()
    def nothing_waits_but_for_vcpus(self) -> None:
        moving = any(vcpu.asked is not None for vcpu in self.vcpus)
        assert (self.pausing.state is State.PAUSING) is moving
        if not moving:
            assert self.deeds_to_come == 0
            assert self.granted == len(self.made)
            last = self.made[-1] if self.made else State.RUNNING
            assert self.pausing.state is last

    @invariant()
    def the_clock_stands_while_paused(self) -> None:
        paused = self.pausing.state is State.PAUSED
        assert self.clock.goes is not paused
        assert paused is not any(vcpu.runs for vcpu in self.vcpus)

    def teardown(self) -> None:
        self.loop.close()


Wishes.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestWishes = Wishes.TestCase


class HostTime:
    """A VM and its vCPUs on a host whose clocks the test turns."""

    def __init__(self, *, movable: bool, kvmclock_in_use: bool = True) -> None:
        self.now = 0
        self.movable = movable
        self.kvmclock_in_use = kvmclock_in_use
        self.clock_offset = 1000
        self.tsc_offsets = [7, 7, 9]
        self.told: list[int] = []

    def kvmclock_ns(self) -> int:
        return self.now + self.clock_offset

    def set_kvmclock_ns(self, value_ns: int) -> None:
        self.clock_offset = value_ns - self.now

    def readings(self) -> list[int]:
        return [self.kvmclock_ns(), *(3 * self.now + offset for offset in self.tsc_offsets)]


class HostVcpu:
    def __init__(self, host: HostTime, number: int) -> None:
        self.host, self.number = host, number

    def tsc(self) -> int:
        self.host.now += 1  # asking takes time too
        return 3 * self.host.now + self.host.tsc_offsets[self.number]

    def has_tsc_offset(self) -> bool:
        return self.host.movable

    def move_tsc(self, ticks: int) -> None:
        assert self.host.movable
        self.host.tsc_offsets[self.number] += ticks

    def tell_paused(self) -> bool:
        self.host.told.append(self.number)
        return self.host.kvmclock_in_use


def clock_of(host: HostTime) -> GuestClock:
    vcpus = [HostVcpu(host, number) for number in range(3)]
    return GuestClock(cast("Vm", host), cast("list[Vcpu]", vcpus))


def test_the_guests_clocks_go_on_where_they_stood() -> None:
    host = HostTime(movable=True)
    clock = clock_of(host)
    for _ in range(5):
        before = host.readings()
        clock.stop()
        host.now += int.from_bytes(os.urandom(4), "little")
        clock.start()
        passed = [after - was for was, after in zip(before, host.readings(), strict=True)]
        assert all(0 <= ticks < 20 for ticks in passed), (
            "never back, and by no more than asking takes"
        )
        assert len(set(passed[1:])) == 1, "the vCPUs' counters keep their distances"
    assert host.told == [0, 1, 2] * 5


def test_where_the_counter_cannot_be_moved_only_kvmclock_stands() -> None:
    host = HostTime(movable=False, kvmclock_in_use=False)
    clock = clock_of(host)
    before = host.readings()
    clock.stop()
    host.now += 1_000_000
    clock.start()
    after = host.readings()
    assert after[0] - before[0] < 20
    assert after[1] - before[1] > 3_000_000


def test_a_refused_wish_is_not_granted_to_the_next() -> None:
    vcpu = MadeUpVcpu()
    clock = MadeUpClock([vcpu])
    loop = TurningLoop()
    pausing = Pausing(
        loop, cast("list[VcpuThread]", [vcpu]), cast("GuestClock", clock), paused=True
    )
    vcpu.stand()
    granted: list[str] = []
    with pytest.raises(AssertionError):  # this clock goes already
        pausing.resume(partial(granted.append, "first"))
    clock.goes = False
    pausing.resume(partial(granted.append, "second"))
    assert (granted, pausing.state, vcpu.runs) == (["second"], State.RUNNING, True)
