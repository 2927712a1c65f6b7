"""How long it takes to start a container, beside runc in the same run, and which part takes it.

From a snapshot to be prepared to a started task, through containerd's gRPC as a client does it. The
parts of vmcell's share come from the shim's log, whose lines carry nanoseconds:

    containerd   Create sent → the shim has it, with the shim's own start
    shim         → the VMM is asked for: spec, root image, disk, cgroup
    VMM          → the vCPUs run
    kernel       → PID 1 of the guest starts (the guest's own clock)
    agent        → the agent has been configured
    container    → Create has answered
    start        Task.Start
"""

from __future__ import annotations

import calendar
import re
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

from vmcell_protos.errors import HostError, VmcellError
from vmcell_tools.bench.containers import RUNC, VMCELL, Containers, Target
from vmcell_tools.progress import Progress

PARTS = ("containerd", "shim", "VMM", "kernel", "agent", "container", "start")
_LINE = re.compile(r'time="([^"]+)\.(\d{9})Z" level=\w+ msg="([^"]*)"')
_BOOTED = re.compile(r"kernel booted in (\d+) ms")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One start, in milliseconds; `parts` is empty for a runtime that does not tell."""

    total_ms: float
    prepare_ms: float
    record_ms: float
    create_ms: float
    start_ms: float
    parts: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Result:
    """All samples of one runtime."""

    runtime: str
    samples: list[Sample]
    failures: int

    def p50(self, name: str) -> float | None:
        """The median of a field of Sample, or of one of its parts; None without a sample."""
        rows = [
            sample.parts[name] if name in sample.parts else getattr(sample, name)
            for sample in self.samples
        ]
        return statistics.median(rows) if rows else None


def bench_start(target: Target, count: int, progress: Progress) -> list[Result]:
    """`count` starts of each runtime, by turns, after one of each that is not counted.

    Raises HostError when containerd does not answer, CallerError for an unknown image.
    """
    containers = Containers(target, "start")
    try:
        samples: dict[str, list[Sample]] = {VMCELL: [], RUNC: []}
        failures = dict.fromkeys(samples, 0)
        progress.step("starting containers")
        for turn in range(count + 1):
            progress.count(turn, count)
            for runtime, rows in samples.items():
                try:
                    sample = _one(containers, runtime, containers.name(turn))
                except VmcellError as error:
                    failures[runtime] += 1
                    progress.note(f"{runtime}: {error}")
                    continue
                if turn:
                    rows.append(sample)
        return [
            Result(runtime=name, samples=rows, failures=failures[name])
            for name, rows in samples.items()
        ]
    finally:
        for sentence in containers.close():
            progress.note(sentence)


def _one(containers: Containers, runtime: str, name: str) -> Sample:
    try:
        marks = containers.start(name, runtime)
        parts = parts_of(containers.shim_log(name), marks) if runtime == VMCELL else {}
    finally:
        containers.remove(name)
    steps = [(after - before) / 1e6 for before, after in pairwise(marks)]
    return Sample(
        total_ms=(marks[-1] - marks[0]) / 1e6,
        prepare_ms=steps[0],
        record_ms=steps[1],
        create_ms=steps[2],
        start_ms=steps[3],
        parts=parts,
    )


def parts_of(log: str, marks: list[int]) -> dict[str, float]:
    """PARTS in milliseconds, from the shim's log and the client's times in ns. HostError when a
    line that has to be there is not."""
    found: dict[str, int] = {}
    booted_ms = 0
    for seconds, fraction, text in _LINE.findall(log):
        at = _unix_ns(seconds, fraction)
        for key, words in (("got", "root images"), ("asked", "booting "), ("runs", "VMM ")):
            if text.startswith(words) and key not in found and "ended" not in text:
                found[key] = at
        if match := _BOOTED.search(text):
            found["ready"] = at
            booted_ms = int(match[1])
    missing = {"got", "asked", "runs", "ready"} - found.keys()
    if missing:
        raise HostError(f"the shim's log has no line for {', '.join(sorted(missing))}")
    steps = (marks[2], found["got"], found["asked"], found["runs"], found["ready"], *marks[3:5])
    took = [(after - before) / 1e6 for before, after in pairwise(steps)]
    return {
        "containerd": took[0],
        "shim": took[1],
        "VMM": took[2],
        "kernel": float(booted_ms),
        "agent": took[3] - booted_ms,
        "container": took[4],
        "start": took[5],
    }


def _unix_ns(seconds: str, fraction: str) -> int:
    whole = time.strptime(seconds, "%Y-%m-%dT%H:%M:%S")
    return calendar.timegm(whole) * 10**9 + int(fraction)


def rows_of(results: list[Result]) -> list[tuple[str, ...]]:
    """The table: each phase of each runtime, vmcell's parts below."""
    by_name = {result.runtime: result for result in results}
    ours, theirs = by_name[VMCELL], by_name[RUNC]
    rows: list[tuple[str, ...]] = []
    for title, field in (
        ("prepare → started", "total_ms"),
        ("  snapshot prepared", "prepare_ms"),
        ("  container recorded", "record_ms"),
        ("  task created", "create_ms"),
        ("  task started", "start_ms"),
    ):
        mine, other = ours.p50(field), theirs.p50(field)
        ratio = f"{mine / other:.2f}" if mine and other else "–"
        rows.append((title, _cell(mine), _cell(other), ratio))
    rows += [(f"    {part}", _cell(ours.p50(part)), "", "") for part in PARTS]
    return rows


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
