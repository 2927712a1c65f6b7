"""PID 1 in a guest of our own VMM: what a host's kernel cannot show about the agent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dev_vm import DevVm

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

PROGRAM = Path(__file__).parents[1] / "support/guest_session.py"
# busybox is 2 MB; a root that is not mapped by DAX would show in the page cache at once
MOST_CACHED_KIB = 1024


@pytest.fixture(scope="module")
def found(dev_vm: DevVm) -> dict[str, Any]:
    """What one session with one guest has shown."""
    result = dev_vm.report_of(PROGRAM, timeout_s=500)
    assert "error" not in result, f"{result['error']}\n{result['console']}"
    return result


def test_the_guest_is_the_machine_it_was_told_to_be(found: dict[str, Any]) -> None:
    kernel, hostname, seconds, cached, count = found["plain"]
    assert kernel.endswith("-vmcell")
    assert hostname == "cell"
    assert 1_900_000_000 <= int(seconds) < 1_900_000_600
    assert int(cached.split()[1]) <= MOST_CACHED_KIB
    assert int(count) == 4 << 20
    assert found["plain_status"] == 7


def test_standard_input_comes_back_whole(found: dict[str, Any]) -> None:
    assert found["echo_whole"]


def test_a_fork_bomb_stays_within_its_limit_and_dies_with_its_container(
    found: dict[str, Any],
) -> None:
    pids, limit = found["bomb_pids"]
    assert 58 <= pids <= limit == 60
    assert found["bombed_init"] == 137


def test_a_container_out_of_memory_loses_a_process_and_nothing_else(found: dict[str, Any]) -> None:
    assert found["hog"] == 137
    assert found["oom_kill"] == 1
    assert found["memory_limit_bytes"] == 48 << 20
    assert found["after_oom"] == ["alive\n", 0]


def test_containers_of_a_pod_share_what_they_are_to_share(found: dict[str, Any]) -> None:
    # the host has named the guest before, so the container's own "pod" counts no more
    assert found["pod"] == ["cell", "word", "2", "1", "pause", "served"]


def test_a_port_of_a_container_is_reached_over_vsock(found: dict[str, Any]) -> None:
    assert found["forwarded"] == "served\n"


def test_a_read_only_file_is_renewed(found: dict[str, Any]) -> None:
    assert found["renewed"] == ["2", "ro"]


def test_a_frozen_container_stands_still_and_can_be_killed(found: dict[str, Any]) -> None:
    assert found["frozen"]
    assert found["killed_frozen"] == 137


def test_the_news_of_an_oom_kill_comes_at_once_and_with_the_exit(found: dict[str, Any]) -> None:
    assert found["no_oom_yet"]
    assert found["oom_told"] == 1
    assert found["second_waits"]
    assert found["second_end"] == "not_found"
    assert found["oom_exit"] == [137, 1]


def test_limits_change_while_a_container_runs(found: dict[str, Any]) -> None:
    # memory.max memory.low pids.max cpu.max (two words) cpu.weight cpuset.cpus
    before = [str(32 << 20), str(8 << 20), "50", "50000", "100000", "79", "0"]
    assert found["limits"] == before
    assert found["refused"].startswith("invalid_argument: set cpuset.cpus to '0-77': ")
    after = [*before[:2], "max", "50000", "50000", *before[5:]]
    assert found["limits_after"] == after


def test_a_limit_below_what_is_used_takes_its_toll_and_does_not_hold_the_agent_up(
    found: dict[str, Any],
) -> None:
    assert found["lowered"] == ""
    assert found["lowered_end"] == [137, True]


def test_drivers_are_taken_off_and_bound_again(found: dict[str, Any]) -> None:
    assert found["attached"] == ["pmem1", "already_exists", "vda", "already_exists"]
    assert found["after_attach"] == "reborn\n"


def test_a_device_in_use_keeps_its_driver(found: dict[str, Any]) -> None:
    assert "pmem0 is mounted (EBUSY)" in found["detach of its own root"]
    assert "pmem1 is mounted (EBUSY)" in found["detach of busy"]
    assert found["detach of no disk"] == (
        "failed_precondition: window 3 holds a virtio device of type 19; only disks are detached"
    )


def test_shutdown_ends_the_machine_for_the_reason_it_was_asked(found: dict[str, Any]) -> None:
    assert found["ended"][0] == "guest_shutdown"
