"""What `vmcell dev up` reads off the VM's console while it boots."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vmcell_tools import dev_vm
from vmcell_tools.dev_state import DevVm, ProcessId
from vmcell_tools.dev_vm import SilentConsole, console_steps
from vmcell_tools.progress import Progress


def test_a_line_counts_when_it_is_whole(tmp_path: Path) -> None:
    """`ready` seen as `read` once left `up` waiting for its deadline."""
    log = tmp_path / "console.log"
    assert console_steps(log) == []
    text = b"[ 0.1] noise\r\nvmcell-dev: starting ssh\r\n[ 3.2] vmcell-dev: ready\r\n"
    expected: list[list[str]] = []
    for end in range(len(text) + 1):
        log.write_bytes(text[:end])
        steps = console_steps(log)
        if steps not in expected:
            expected.append(steps)
    assert expected == [[], ["starting ssh"], ["starting ssh", "ready"]]


def _vm(directory: Path) -> DevVm:
    (directory / "out").mkdir()
    return DevVm(
        name="t",
        directory=directory,
        qemu=ProcessId.of(os.getpid()),
        helpers=(),
        ssh_port=1,
        api_port=1,
        data_port=1,
        memory_mib=1024,
        accelerator="tcg",
        has_store=False,
        ready=False,
    )


def test_a_vm_that_says_nothing_is_told_from_a_slow_one(tmp_path: Path) -> None:
    vm = _vm(tmp_path)
    quiet = Progress("t", quiet=True)
    with pytest.raises(SilentConsole, match="says nothing"):
        dev_vm._wait_until_ready(vm, time.monotonic() + 60, time.monotonic() + 0.1, quiet)
    (vm.out_directory / "qemu.log").touch()
    second_start = time.monotonic() + 0.1
    with pytest.raises(dev_vm.HostError, match="the deadline passed") as raised:
        dev_vm._wait_until_ready(vm, second_start, second_start, quiet)
    assert not isinstance(raised.value, SilentConsole)
    vm.console_log.write_text("vmcell-dev: loading drivers\n")
    with pytest.raises(dev_vm.HostError, match="the deadline passed") as raised:
        dev_vm._wait_until_ready(vm, time.monotonic() + 0.3, time.monotonic() + 0.1, quiet)
    assert not isinstance(raised.value, SilentConsole)
