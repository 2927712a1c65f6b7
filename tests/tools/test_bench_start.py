"""What `vmcell bench start` makes of the shim's log and the client's marks."""

from __future__ import annotations

import pytest

from vmcell_protos.errors import HostError
from vmcell_tools.bench.start import PARTS, RUNC, VMCELL, Result, Sample, parts_of, rows_of

SECOND = 10**9
START = 1_795_411_528 * SECOND  # 2026-11-23T05:25:28Z
LOG = """time="2026-11-23T05:25:28.100000000Z" level=info msg="root images ('/x',), disk none" id=c
time="2026-11-23T05:25:28.150000000Z" level=info msg="booting c: 1 vCPUs, 512 MiB" id=c
time="2026-11-23T05:25:28.250000000Z" level=info msg="VMM 7 started" id=c
time="2026-11-23T05:25:29.250000000Z" level=info msg="guest 6.12 ready, agent 1, kernel booted \
in 400 ms" id=c
"""
MARKS = [START - 20, START - 10, START, START + SECOND * 3 // 2, START + 2 * SECOND]


def test_parts_add_up_to_create_and_start() -> None:
    parts = parts_of(LOG, MARKS)
    assert parts == {
        "containerd": 100.0,
        "shim": 50.0,
        "VMM": 100.0,
        "kernel": 400.0,
        "agent": 600.0,
        "container": 250.0,
        "start": 500.0,
    }
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == 2000.0


def test_a_log_that_is_cut_is_no_figure() -> None:
    with pytest.raises(HostError, match="no line for ready"):
        parts_of("\n".join(LOG.splitlines()[:3]), MARKS)


def test_rows_hold_medians_and_ratios() -> None:
    def result(runtime: str, factor: float, parts: dict[str, float]) -> Result:
        samples = [
            Sample(
                total_ms=n * factor,
                prepare_ms=1.0,
                record_ms=1.0,
                create_ms=n * factor,
                start_ms=1.0,
                parts=parts,
            )
            for n in (1, 2, 9)
        ]
        return Result(runtime=runtime, samples=samples, failures=0)

    rows = rows_of([result(VMCELL, 3, dict.fromkeys(PARTS, 5.0)), result(RUNC, 2, {})])
    assert rows[0] == ("prepare → started", "6.0", "4.0", "1.50")
    assert rows[-1] == ("    start", "5.0", "", "")
