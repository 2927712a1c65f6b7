"""A real Linux guest with live host directories: both ways, read-only, after the daemon's end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dev_vm import DevVm

# test_ctr_pod.py has a live directory of a container as well.
pytestmark = [pytest.mark.vm, pytest.mark.deep, pytest.mark.timeout(600)]

PROGRAM = Path(__file__).parents[1] / "support" / "linux_share" / "host.py"


@pytest.fixture(scope="module")
def found(dev_vm: DevVm) -> dict[str, Any]:
    """One guest that goes through everything; the tests look at what it found."""
    found = dev_vm.report_of(PROGRAM, timeout_s=540)
    assert "lost" in found, found
    return found


def test_files_are_the_same_on_both_sides(found: dict[str, Any]) -> None:
    look = found["look"]
    assert look["hello"] == "hello from the host"
    assert look["big"] == found["big"], "10 MB from the host"
    assert look["answer"] == found["answer"], "10 MB to the host"
    assert found["owned"] == [1234, 5678, 0o640]


def test_read_only_holds_on_the_host_too(found: dict[str, Any]) -> None:
    look = found["look"]
    refused = "Read-only file system"
    assert look["fixed"] == "hello below"
    assert look["refused"] == refused
    # The guest's root has made its own mount writable: the host's still is not.
    assert "rw" in look["mounts"]["/fixed"].split(",")
    assert (look["refused_writable"], look["refused_below"], look["unlink"]) == (refused,) * 3
    assert found["fixed_has"] == ["below", "hello"]


def test_mounts_have_the_options_of_the_spec(found: dict[str, Any]) -> None:
    mounts = found["look"]["mounts"]
    assert {"nosuid", "nodev", "rw"} <= set(mounts["/live"].split(","))
    assert found["look"]["devices"] == 3, "inode numbers of different disks are told apart"


def test_a_change_on_the_host_arrives(found: dict[str, Any]) -> None:
    change = found["change"]
    assert change["after"] == "changed while the guest had it cached"
    assert change["stale_s"] < 10


def test_directories_come_and_go_while_the_guest_runs(found: dict[str, Any]) -> None:
    assert found["late"] == found["big"]
    assert "No such file" in str(found["removed"])


def test_a_single_file_is_shared(found: dict[str, Any]) -> None:
    assert found["file"] == found["big"]


def test_the_daemons_death_is_an_error_and_not_a_hang(found: dict[str, Any]) -> None:
    lost = found["lost"]
    gone = "Transport endpoint is not connected"
    assert lost["guest"]["waiting"] == 107, "what was in flight has ended"
    assert (lost["guest"]["open"], lost["guest"]["new"]) == (gone, gone)
    assert lost["guest"]["all_s"] < 10
    assert lost["end"].startswith("virtiofsd has ended")
    assert lost["alive"][0] == 1
    assert "error" in lost["alive"][1]


def test_the_vmm_outlives_the_daemon(found: dict[str, Any]) -> None:
    assert found["exit"]["reason"] == "guest_panic", "its PID 1 has ended, and not before"
    assert found["left"] == []
