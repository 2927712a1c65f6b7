"""What a snapshot of a running guest costs, by how much it has written since the last one."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import partial

from vmcell_protos.errors import HostError
from vmcell_tools.bench.containers import MEMORY_ANNOTATION, Containers, Target, opened
from vmcell_tools.bench.report import Report
from vmcell_tools.bench.samples import Series, sample
from vmcell_tools.progress import Progress

MIB = 1 << 20
DIRTY_MIB = (0, 7, 100)
# What the shim logs of a snapshot (vmcell_shim.checkpoint).
_SAVED = re.compile(r"saved as (\S+) in ([0-9.]+) ms: ([0-9]+) KiB of memory")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What the shim says of one snapshot."""

    standing_ms: float
    memory_kib: int


def bench_snapshot(target: Target, count: int, memory_mib: int, progress: Progress) -> Report:
    """`count` snapshots for each of DIRTY_MIB. Raises HostError when containerd does not answer,
    CallerError for an unknown image, VmcellError when no guest starts."""
    report = Report(name="snapshot")
    with opened(target, "snap", report.notes) as containers:
        name = containers.name("source")
        progress.step("starting a guest and making its first snapshot, which is not counted")
        containers.start(name, annotations={MEMORY_ANNOTATION: str(memory_mib)})
        before = containers.name("first")
        containers.save(name, before)
        for dirty_mib in DIRTY_MIB:
            series = _series(report, dirty_mib, memory_mib)
            progress.step(f"snapshots after {dirty_mib} MiB written")
            for turn in range(count):
                saved = containers.name(f"{dirty_mib}-{turn}")
                if sample(series, partial(_one, containers, name, saved, dirty_mib)):
                    containers.remove_saved(before)
                    before = saved
                progress.count(turn + 1, count)
    return report.finish()


def _series(report: Report, dirty_mib: int, memory_mib: int) -> list[Series]:
    who = f"{dirty_mib} MiB written"
    guest = f"guest of {memory_mib} MiB, snapshot on the one before"
    return [
        report.add("stands still", who, f"vCPUs standing for the snapshot, by the shim; {guest}"),
        report.add("call", who, f"Checkpoint sent → answered, the snapshot whole on disk; {guest}"),
        report.add("memory", who, "guest memory that had to be written", "MiB"),
        report.add("allocated", who, "what the snapshot's files take on their disk", "MiB"),
    ]


def _one(
    containers: Containers, name: str, snapshot_id: str, dirty_mib: int
) -> tuple[float, float, float, float]:
    if dirty_mib:
        # Into the same pages each time: a file that is cut first would be given other ones.
        script = f"yes | head -c {dirty_mib * MIB} | dd of=/dev/shm/bench conv=notrunc bs=1M"
        containers.run_in(name, ["sh", "-c", script], f"w-{snapshot_id}")
    began = time.perf_counter_ns()
    containers.save(name, snapshot_id, drop_caches=False)
    took_ms = (time.perf_counter_ns() - began) / 1e6
    saved = saved_of(containers.shim_log(name), snapshot_id)
    allocated = containers.allocated_bytes(snapshot_id) / MIB
    return saved.standing_ms, took_ms, saved.memory_kib / 1024, allocated


def saved_of(log: str, snapshot_id: str) -> Saved:
    """The shim's line about a snapshot; HostError without one."""
    for found, milliseconds, kib in _SAVED.findall(log):
        if found == snapshot_id:
            return Saved(standing_ms=float(milliseconds), memory_kib=int(kib))
    raise HostError(f"the shim's log has no line about snapshot {snapshot_id}")
