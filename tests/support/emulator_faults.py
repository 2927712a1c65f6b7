"""Guests that the software CPU lost, and the one repetition of a test that met one.

Under QEMU's software CPU a Linux in a microVM ends now and then, about once in a hundred boots,
with a triple fault that no test asked for (docs/dev-vm.md, "What the software CPU gets wrong"). A
test that fails while that happens is run once more, and says so; one that fails for another reason,
or again, has failed. On a CPU with hardware KVM nothing is repeated.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from vmcell_protos.errors import HostError
from vmcell_tools.dev_vm import running_vm

_FAULT = re.compile(r'time="([^"]+)" [^\n]*VMM (\d+) ended: triple_fault')


def faults(out: Path) -> set[tuple[str, str]]:
    """(time, VMM's pid) of each guest that ended so, by the logs in the dev VM's share."""
    found: set[tuple[str, str]] = set()
    for log in out.rglob("*.log"):
        found |= set(_FAULT.findall(log.read_text(errors="replace")))
    return found


def run_once_or_twice(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """pytest's protocol for one test of the vm lane; False where it is not to be repeated."""
    out = _software_cpu_logs()
    if out is None:
        return False
    before = faults(out)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    lost = faults(out) - before
    if lost and any(report.failed for report in reports):
        _say(item, f"{item.nodeid} is run again: the software CPU lost guests {sorted(lost)}")
        reports = _again(item, nextitem) or reports
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _again(item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
    """The reports of a second run; none when what the first one left cannot be taken down."""
    try:
        # Fixtures that failed remember it until they are torn down.
        item.session._setupstate.teardown_exact(None)
    except Exception as failure:  # noqa: BLE001 - whatever a fixture raises, the first failure stands
        _say(item, f"{item.nodeid} is not run again: its fixtures did not go: {failure}")
        return []
    item._initrequest()  # type: ignore[attr-defined]  # as pytest's own rerun plugins do
    return runtestprotocol(item, nextitem=nextitem, log=False)


def _say(item: pytest.Item, text: str) -> None:
    reporter = item.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f"\n{text}")


def _software_cpu_logs() -> Path | None:
    """The share of the dev VM, when it is up and on the software CPU."""
    try:
        vm = running_vm("default")
    except HostError:
        return None
    return vm.out_directory if vm.accelerator != "kvm" else None
