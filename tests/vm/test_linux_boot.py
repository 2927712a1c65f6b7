"""The VMM boots our kernel: how it ends, on how many processors, with how few exits."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from dev_vm import DevVm

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PROGRAM = os.fspath(Path(__file__).parents[1] / "support" / "linux_boot.py")
NO_ROOT = "Kernel panic - not syncing: VFS: Unable to mount root fs"
# 170 for the probing of devices, the rest for the panic's own lines, two for each character.
MOST_EXITS = 2000


def boot(dev_vm: DevVm, vcpus: int, memory_mib: int, arguments: str, *more: str) -> dict[str, Any]:
    config = dev_vm.config()
    words = [config["kernel"], str(vcpus), str(memory_mib), arguments]
    images = [config[name] for name in more]
    output = dev_vm.check(sys.executable, PROGRAM, *words, *images, timeout_s=240)
    found: dict[str, Any] = json.loads(output)
    return found


def test_a_kernel_without_a_root_panics_and_we_know_why(dev_vm: DevVm) -> None:
    found = boot(dev_vm, 1, 128, "quiet")
    assert found["reason"] == "guest_panic", found["console"]
    assert found["detail"].startswith(NO_ROOT)
    assert NO_ROOT in found["console"]


def test_booting_is_quiet_on_the_exits(dev_vm: DevVm) -> None:
    counts = boot(dev_vm, 1, 128, "quiet")["counts"]
    assert counts["exit_io"] + counts["exit_mmio"] < MOST_EXITS, counts
    assert counts["unclaimed_port_reads"] + counts["unclaimed_memory_reads"] == 0, counts


def test_eight_processors_and_memory_on_both_sides_of_the_hole(dev_vm: DevVm) -> None:
    # clearcpuid: under QEMU's software CPU the kernel has much to say about XSAVE
    found = boot(dev_vm, 8, 4096, "loglevel=7 clearcpuid=xsave")
    console = found["console"]
    assert found["reason"] == "guest_panic", console
    assert "Brought up 1 node, 8 CPUs" in console, console
    usable = re.search(r"Memory: \d+K/(\d+)K available", console)
    assert usable is not None, console
    assert int(usable[1]) > 4000 << 10


def test_the_base_image_is_the_root_by_pmem(dev_vm: DevVm) -> None:
    root = "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro init=/no/such/program"
    found = boot(dev_vm, 2, 128, f"quiet {root}", "base_image")
    assert found["reason"] == "guest_panic", found["console"]
    assert "Requested init /no/such/program failed" in found["detail"]
