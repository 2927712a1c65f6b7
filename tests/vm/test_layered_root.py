"""Layers as containerd has them, in a guest: unconverted, of any length, DAX, several of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from dev_vm import DevVm
from source_tree import ROOT

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

PROGRAM = Path(__file__).parents[1] / "support/layered_guest.py"
# The blob that was read is 8 MiB; without DAX it would be in the guest's page cache.
MOST_CACHED_KIB = 2048


@pytest.fixture(scope="module")
def found(dev_vm: DevVm) -> dict[str, Any]:
    """What one session with one guest has shown."""
    result = dev_vm.report_of(PROGRAM, timeout_s=300)
    assert "error" not in result, f"{result['error']}\n{result['console']}"
    return result


def test_the_layers_are_one_root(found: dict[str, Any]) -> None:
    assert found["lowers"] == ["3.erofs", "2.erofs", "1.erofs"], "none was converted"
    who, *names = found["seen"]
    assert who == "the second layer"
    assert "middle" in names
    assert "gone" not in names
    assert found["status"] == 0, found["errors"]


def test_unpadded_images_are_read_without_the_guests_page_cache(found: dict[str, Any]) -> None:
    *_, count, cached = found["seen"]
    assert int(count) == 8 << 20
    assert int(cached.split()[1]) <= MOST_CACHED_KIB


def test_writes_are_where_a_commit_looks_for_them(found: dict[str, Any]) -> None:
    """containerd mounts the file for writes and reads its directory `upper`."""
    assert found["ended"][0] == "guest_shutdown"
    assert found["written"] == "kept\n"
    assert "Type: character special" in found["removed"], "a whiteout"


@pytest.mark.deep
def test_the_pods_cgroup_on_cgroup_v2(dev_vm: DevVm) -> None:
    """The tests of the root lane, which a build machine may run on v1 only."""
    tests = os.fspath(ROOT / "tests/shim/test_cgroup.py")
    words = [sys.executable, "-m", "pytest", "-q", "--rootdir", os.fspath(ROOT)]
    words += ["-p", "no:cacheprovider", "-m", "root", tests]
    assert "passed" in dev_vm.check(*words, timeout_s=300)
