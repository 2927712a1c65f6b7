"""A real Linux guest is saved while it computes, writes and talks, and goes on elsewhere.

VMCELL_SNAPSHOT_ROUNDS says how often; the lane does it twice for each shape.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from dev_vm import DevVm

ROUNDS = int(os.environ.get("VMCELL_SNAPSHOT_ROUNDS", "2"))
TIMEOUT_S = 600 + 100 * ROUNDS

# test_ctr_snapshot.py and e2b_clients/test_snapshots.py save and restore sandboxes as well.
pytestmark = [pytest.mark.vm, pytest.mark.deep, pytest.mark.timeout(TIMEOUT_S + 100)]

PROGRAM = Path(__file__).parents[1] / "support" / "linux_snapshot" / "host.py"
BALLAST = hashlib.sha256(
    b"".join(hashlib.sha256(n.to_bytes(8, "little")).digest() * 128 for n in range(2048))
).hexdigest()
WHOLE = {"ballast": BALLAST, "wrong_blocks": [], "chain": True}


@pytest.mark.parametrize(("path", "memory_mib"), [("kernel", 256), ("user", 4096)])
def test_all_sums_are_right(dev_vm: DevVm, path: str, memory_mib: int) -> None:
    found = dev_vm.report_of(PROGRAM, path, str(memory_mib), str(ROUNDS), timeout_s=TIMEOUT_S)
    assert len(found["rounds"]) == ROUNDS, found["console"]
    for row in found["rounds"]:
        assert row["audit"] == WHOLE, row
        # What was said and not taken before the end is lost with the stream, the work is not.
        assert row["step"] > row["before"], row
        assert 0 < row["monotonic_s"] < 3.0, "the clock stood still as long as the guest did"
    assert found["rounds"][1]["written_mib"] < found["rounds"][0]["written_mib"] / 2
    assert found["tcp_in_order"], found
    assert found["tcp_steps"] > 20
    assert found["clones"] == [WHOLE] * 3
    assert found["vhost_opened"] or path == "user"
