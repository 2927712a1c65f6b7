"""A real containerd killed and started again while containers are used; the guests are fakes.

The same with real guests is in the vm lane, for longer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from private_containerd import IMAGE, RUNTIME, PrivateContainerd
from restart_soak import Settings, Soak
from shim_harness import wait_until

pytestmark = pytest.mark.root


@pytest.fixture
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateContainerd]:
    daemon = PrivateContainerd(tmp_path_factory.mktemp("soak"), fake_guest=True)
    daemon.start()
    try:
        daemon.import_image()
        yield daemon
    finally:
        daemon.kill()


def test_nothing_is_lost(
    containerd: PrivateContainerd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in containerd.environment().items():
        monkeypatch.setenv(name, value)
    settings = Settings(
        socket=str(containerd.socket),
        daemon=containerd.command,
        log=str(containerd.log),
        directory=str(tmp_path),
        image=IMAGE,
        runtime=RUNTIME,
        cycles=int(os.environ.get("VMCELL_SOAK_CYCLES", "8")),
        shortest_s=0.5,
        longest_s=3.0,
        line_s=0.03,
    )
    soak = Soak(settings)
    try:
        report = soak.run()
    finally:
        soak.daemon.kill()
    assert not report.failures, "\n".join(report.failures)
    assert report.cycles == report.exits_in_a_gap == settings.cycles
    assert report.restarts >= 3
    containerd.start()
    wait_until(lambda: containerd.leftovers() == [], "the end of all shims")
    assert list(tmp_path.iterdir()) == []
