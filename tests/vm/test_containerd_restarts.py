"""Real guests made, used and killed while containerd is killed (-9) and started at random.

VMCELL_SOAK_CYCLES=200 is the long run; the default fits into two minutes of the software CPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from dev_vm import RUNTIME, SMALL, DevVm

CYCLES = int(os.environ.get("VMCELL_SOAK_CYCLES", "4"))
# A guest boots in some seconds on the software CPU; two are made at once.
CYCLE_S = 60
LINES = 40
PROGRAM = Path(__file__).resolve().parents[1] / "support/restart_soak.py"

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("nothing_left")]


@pytest.mark.timeout(300 + CYCLES * CYCLE_S)
@pytest.mark.deep
def test_no_byte_and_no_exit_is_lost(dev_vm: DevVm) -> None:
    settings = {
        "socket": "/run/containerd/containerd.sock",
        "daemon": ["containerd", "--config", "/etc/containerd/config.toml"],
        "log": "/mnt/out/containerd.log",
        "directory": "/run/restart-soak",
        "image": SMALL,
        "runtime": RUNTIME,
        "cycles": CYCLES,
        "shortest_s": 5.0,
        "longest_s": 10.0,
        "lines": LINES,
        "line_s": 0.05,
    }
    output = dev_vm.check(
        sys.executable, str(PROGRAM), json.dumps(settings), timeout_s=240 + CYCLES * CYCLE_S
    )
    report = json.loads(output)
    assert not report["failures"], "\n".join(report["failures"])
    assert report["cycles"] == report["exits_in_a_gap"] == CYCLES
    assert report["restarts"] >= 2
    # Two execs of each cycle, lines of 1000 bytes.
    assert report["bytes_read"] == CYCLES * 2 * LINES * 1000
    assert dev_vm.check("ls", "/run/restart-soak") == ""
