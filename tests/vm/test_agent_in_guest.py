"""PID 1 in a guest of our own VMM: what a host's kernel cannot show about the agent."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from dev_vm import DevVm

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

PROGRAM = os.fspath(Path(__file__).parents[1] / "support" / "guest_session.py")
# busybox is 2 MB; a root that is not mapped by DAX would show in the page cache at once
MOST_CACHED_KIB = 1024


@pytest.fixture(scope="module")
def found(dev_vm: DevVm) -> dict[str, Any]:
    """What one session with one guest has shown."""
    config = tomllib.loads(dev_vm.check("cat", "/etc/vmcell/config.toml"))
    output = dev_vm.check(
        sys.executable, PROGRAM, config["kernel"], config["base_image"], timeout_s=500
    )
    result: dict[str, Any] = json.loads(output)
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


def test_shutdown_ends_the_machine_for_the_reason_it_was_asked(found: dict[str, Any]) -> None:
    assert found["ended"][0] == "guest_shutdown"
