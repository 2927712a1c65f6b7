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
import json
import re
import statistics
import subprocess
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vmcell_api.node import oci_image
from vmcell_api.node.containerd import Containerd
from vmcell_protos.errors import HostError
from vmcell_shim.config import load_config
from vmcell_tools.progress import Progress

NAMESPACE = "default"
VMCELL, RUNC = "io.containerd.vmcell.v2", "io.containerd.runc.v2"
PARTS = ("containerd", "shim", "VMM", "kernel", "agent", "container", "start")
CALL_TIMEOUT_S = 600.0
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

    def p50(self, name: str) -> float:
        """The median of a field of Sample, or of one of its parts."""
        rows = [
            sample.parts[name] if name in sample.parts else getattr(sample, name)
            for sample in self.samples
        ]
        return statistics.median(rows)


def bench_start(image: str, count: int, progress: Progress) -> list[Result]:
    """`count` starts of each runtime, by turns, after one of each that is not counted.

    Raises HostError when containerd does not answer, CallerError for an unknown image.
    """
    containerd = Containerd(
        "/run/containerd/containerd.sock", namespace=NAMESPACE, snapshotter="overlayfs"
    )
    try:
        parent, spec = _chain_id(containerd, image), _spec()
        samples: dict[str, list[Sample]] = {VMCELL: [], RUNC: []}
        failures = dict.fromkeys(samples, 0)
        for turn in range(count + 1):
            progress.step(f"start {turn} of {count}")
            for runtime, rows in samples.items():
                try:
                    sample = _one(containerd, runtime, image, parent, spec, f"bench-{turn}")
                except HostError as error:
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
        containerd.close()


def _one(
    containerd: Containerd, runtime: str, image: str, parent: str, spec: bytes, name: str
) -> Sample:
    lease = f"lease-{name}"
    containerd.create_lease(lease, {})
    marks = [time.time_ns()]
    try:
        mounts = containerd.prepare_snapshot(name, parent=parent, labels={}, lease=lease)
        marks.append(time.time_ns())
        containerd.create_container(
            name, image=image, labels={}, runtime=runtime, spec=spec, lease=lease
        )
        marks.append(time.time_ns())
        containerd.create_task(name, mounts, timeout_s=CALL_TIMEOUT_S)
        marks.append(time.time_ns())
        containerd.start_task(name, timeout_s=CALL_TIMEOUT_S)
        marks.append(time.time_ns())
        parts = _parts(name, marks) if runtime == VMCELL else {}
    finally:
        _remove(containerd, name, lease)
    steps = [(after - before) / 1e6 for before, after in pairwise(marks)]
    return Sample(
        total_ms=(marks[-1] - marks[0]) / 1e6,
        prepare_ms=steps[0],
        record_ms=steps[1],
        create_ms=steps[2],
        start_ms=steps[3],
        parts=parts,
    )


def _remove(containerd: Containerd, name: str, lease: str) -> None:
    waiting = containerd.wait_task(name)
    containerd.kill_task(name)
    waiting.result(timeout=CALL_TIMEOUT_S)
    containerd.delete_task(name)
    containerd.delete_container(name)
    containerd.remove_snapshot(name)
    containerd.delete_lease(lease)


def _parts(name: str, marks: list[int]) -> dict[str, float]:
    """What the shim's log says of a start that is still running."""
    path = Path(load_config().state_dir) / NAMESPACE / name / "shim.log"
    return parts_of(path.read_text(), marks)


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


def _chain_id(containerd: Containerd, image: str) -> str:
    target = containerd.image_target(image)
    manifest = target.digest
    data = containerd.read_blob(manifest)
    if target.media_type in oci_image.INDEX_TYPES:
        manifest = oci_image.manifest_digest(data, image)
        data = containerd.read_blob(manifest)
    config = containerd.read_blob(oci_image.config_digest(data, image))
    return oci_image.parse_config(config, image).chain_id


def _spec() -> bytes:
    """What `ctr run` gives a container, with a program that waits."""
    text = subprocess.run(["ctr", "oci", "spec"], capture_output=True, check=True).stdout
    spec = json.loads(text)
    spec["process"].update(args=["/bin/sleep", "600"], terminal=False)
    spec["linux"].pop("seccomp", None)
    return json.dumps(spec).encode()


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
        rows.append((title, f"{mine:.1f}", f"{other:.1f}", f"{mine / other:.2f}"))
    rows += [(f"    {part}", f"{ours.p50(part):.1f}", "", "") for part in PARTS]
    return rows
