"""A real Linux guest whose devices come and go, that is paused, and that gives memory back.

One guest goes through all of it; each test looks at one part of what it and its host saw.
VMCELL_HOTPLUG_ROUNDS=100 goes on for longer; each size of image comes once in three.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from dev_vm import DevVm

PROGRAM = Path(__file__).parents[1] / "support" / "linux_hotplug" / "host.py"
ROUNDS = int(os.environ.get("VMCELL_HOTPLUG_ROUNDS", "3"))
pytestmark = [pytest.mark.vm, pytest.mark.timeout(600 + 10 * ROUNDS)]
CLOCKS = ("monotonic", "raw", "boottime", "realtime", "counter")


@pytest.fixture(scope="module")
def found(dev_vm: DevVm) -> dict[str, Any]:
    found = dev_vm.report_of(PROGRAM, str(ROUNDS), timeout_s=300 + 10 * ROUNDS)
    assert "failed" not in found, (found["failed"], found["console"])
    return found


def test_images_and_disks_come_and_go(found: dict[str, Any]) -> None:
    hotplug = found["hotplug"]
    assert hotplug["empty"] == {"errno": errno.ENODEV}, "an empty window can be looked at again"
    assert hotplug["wrong"] == []
    assert len(hotplug["round_s"]) == ROUNDS
    before, after = hotplug["open_files"]
    assert after == before


def test_devices_share_an_interrupt_line(found: dict[str, Any]) -> None:
    shared = found["shared"]
    first, second = (str(window) for window in shared["pair"])
    assert len(shared["lines"]["shared"]) == 1, "these two are on one line"
    assert shared["reads"] == {first: 300, second: 300}
    assert shared["left"] == {second: 100}, "a device unplugged while bound does not disturb it"
    assert shared["again"] == 2 << 20, "and its window is as good as before"


@pytest.mark.parametrize("part", ["pause", "pause_by_tsc"])
def test_a_pause_is_no_time_to_the_guest(found: dict[str, Any], part: str) -> None:
    pause = found[part]
    awake = pause["real"] - pause["paused"]
    assert pause["paused"] > 4
    assert pause["samples"] > 0
    for name in CLOCKS:
        # Twice two seconds would show; a slow machine's own seconds do not count.
        assert pause["passed"][name] < awake + 1, name


def test_the_kernel_complains_of_nothing(found: dict[str, Any]) -> None:
    _, began, text = found["console"].partition("nd_pmem namespace0.0")
    assert began
    for word in ("cut here", "lockup", "stall", "hung", "Call Trace", "I/O error"):
        assert word not in text, text[-4000:]


def test_the_balloon_gives_memory_to_the_host_and_back(found: dict[str, Any]) -> None:
    balloon = found["balloon"]
    assert balloon["full_mib"] > 200, "the guest has touched most of its 256 MiB"
    assert balloon["given_mib"] < balloon["full_mib"] - 80
    assert balloon["guest_full"]["MemFree"] - balloon["guest_given"]["MemFree"] > 100
    assert balloon["guest_again"]["MemFree"] > 170, "it has all of it again"
    assert balloon["again_mib"] > 200


def test_a_guest_in_need_takes_from_the_balloon(found: dict[str, Any]) -> None:
    after = found["balloon"]["after_squeeze"]
    assert after["wanted_mib"] == 192
    assert after["actual_mib"] < 150


def test_free_pages_go_back_without_being_asked_for(found: dict[str, Any]) -> None:
    assert 0 < found["balloon"]["report_s"] < 60
