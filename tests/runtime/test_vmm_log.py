"""The VMM's log: a guest can neither fill a disk with it nor be hurt by a full one."""

from __future__ import annotations

import os

import pytest

from vmcell_runtime.vmm import Reports


def test_reports_end_at_their_limit(capfd: pytest.CaptureFixture[str]) -> None:
    report = Reports(limit_bytes=1000)
    for number in range(1000):
        report(f"virtio device 2 stopped for the {number}. time")
    lines = capfd.readouterr().err.splitlines()
    assert sum(map(len, lines)) < 2000
    assert lines[0].endswith(": virtio device 2 stopped for the 0. time")
    assert "last report" in lines[-1]


def test_a_full_disk_is_no_error() -> None:
    kept, full = os.dup(2), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 2)
    try:
        Reports()("lost")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(full)
