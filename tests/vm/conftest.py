"""The vm lane: one dev VM for the whole run, and nothing may be left after any test."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from dev_vm import DevVm

from vmcell_tools.dev_service import UP, VMCELL, import_image
from vmcell_tools.leak_check import leaks
from vmcell_tools.progress import Progress


@pytest.fixture(scope="session")
def dev_vm() -> DevVm:
    """The dev VM, up, with both images imported; `make test-vm` takes it down again."""
    subprocess.run(UP, check=True, timeout=600)
    status = json.loads(subprocess.check_output([*VMCELL, "dev", "status", "--json"]))
    vm = DevVm(
        out=Path(status["out"]),
        api_url=f"http://127.0.0.1:{status['api_port']}",
        sandbox_url=f"http://127.0.0.1:{status['data_port']}",
    )
    with Progress("vm lane") as progress:
        import_image("small", ("default", "vmcell"), progress)
        import_image("base", ("vmcell",), progress)
    return vm


@pytest.fixture
def nothing_left(dev_vm: DevVm) -> Iterator[None]:
    """Fails the test when a process, mount, TAP, snapshot or file of a sandbox outlives it."""
    before = dev_vm.inventory()
    yield
    assert not leaks(before, dev_vm.inventory())


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure shows the guest's console and the shim's log."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    vm = getattr(item, "funcargs", {}).get("dev_vm")
    if report.failed and vm is not None:
        report.sections.append(("logs of the dev VM", vm.logs()))
