"""Guests that the software CPU lost, and the one repetition of a test that met one.

A test that fails while one is lost (vmcell_tools.dev_faults), or in a dev VM that does not answer
any more, is run once more, in a new dev VM where it was that one, and says so; one that fails for
another reason, or again, has failed. On a CPU with hardware KVM nothing is repeated.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from vmcell_tools.dev_faults import faults, panics
from vmcell_tools.dev_service import VMCELL
from vmcell_tools.dev_state import load

ANSWER_S = 60
OWN_FAULT = "ended: triple_fault"


def run_once_or_twice(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """pytest's protocol for one test of the vm lane; False where it is not to be repeated."""
    out = _software_cpu_logs()
    if out is None:
        return False
    before = faults(out)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    # A panic between two tests fails the second.
    gone = panics(out)
    lost = (faults(out) - before) | gone
    said = [report.longreprtext for report in reports if report.failed]
    failed = bool(said)
    if any(OWN_FAULT in text for text in said):
        # A VMM that the test started without a shim: its log is in what the test says.
        lost |= {("now", "a guest without a shim")}
    if failed and not gone and not _answers():
        gone = {("now", "the dev VM, which does not answer")}
        lost |= gone
    if lost and failed:
        _say(item, f"{item.nodeid} is run again: the software CPU lost {sorted(lost)}")
        reports = _again(item, nextitem, gone=bool(gone)) or reports
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _again(
    item: pytest.Item, nextitem: pytest.Item | None, *, gone: bool
) -> list[pytest.TestReport]:
    """The reports of a second run; none when what the first one left cannot be taken down.

    What it left in a dev VM that is `gone` went with it.
    """
    try:
        # Fixtures that failed remember it until they are torn down.
        item.session._setupstate.teardown_exact(None)
    except Exception as failure:  # noqa: BLE001 - whatever a fixture raises, the first failure stands
        _say(item, f"{item.nodeid}: its fixtures did not go: {failure}")
        if not gone:
            return []
    if gone:
        _end_dev_vm()
    item._initrequest()  # type: ignore[attr-defined]  # as pytest's own rerun plugins do
    return runtestprotocol(item, nextitem=nextitem, log=False)


def _answers() -> bool:
    """Whether the dev VM runs a command within a minute, however busy it is."""
    command = [*VMCELL, "dev", "run", "--timeout", str(ANSWER_S), "--", "true"]
    try:
        return subprocess.run(command, capture_output=True, timeout=2 * ANSWER_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _end_dev_vm() -> None:
    """Its kernel has said its last; a QEMU that is there still would be taken for a living one."""
    subprocess.run([*VMCELL, "dev", "down"], check=True, timeout=120)


def _say(item: pytest.Item, text: str) -> None:
    reporter = item.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f"\n{text}")


def _software_cpu_logs() -> Path | None:
    """The share of the dev VM, alive or not, when it is on the software CPU."""
    vm = load(os.environ.get("VMCELL_DEV_NAME", "default"))
    return vm.out_directory if vm is not None and vm.accelerator != "kvm" else None
