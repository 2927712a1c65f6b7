"""Lanes and their needs. A missing need fails the test that has it; nothing is skipped, but for
what needs a containerd that Go has to compile (tests/support/containerd_release.py).

`make test` runs the lanes one after the other with `-m`; a plain `pytest` runs the plain lane.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow, not wrong; what hangs is ended by pytest's timeout.
settings.register_profile("vmcell", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vmcell")

LANES = ("kvm", "vm", "root")
# This machine's zygote, if it has one, is no part of a test; those of the zygote name their own.
os.environ["VMCELL_ZYGOTE"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `-m` only the plain lane is run, so that `pytest` works anywhere."""
    if config.option.markexpr:
        return
    chosen = [item for item in items if not any(item.get_closest_marker(m) for m in LANES)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Names the need that is missing, instead of whatever would fail first without it."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.fail("needs root; run it with sudo", pytrace=False)
    if item.get_closest_marker("kvm") and not Path("/dev/kvm").exists():
        pytest.fail("needs /dev/kvm; run it inside the dev VM: vmcell dev run", pytrace=False)
