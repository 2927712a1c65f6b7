"""What a client of the API waits for: a sandbox to be created, and to be rolled back."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from vmcell_protos.errors import VmcellError
from vmcell_tools.bench.containers import RUNC, Containers, Target, opened
from vmcell_tools.bench.report import Report
from vmcell_tools.bench.samples import Series, sample
from vmcell_tools.bench.service_client import ServiceClient
from vmcell_tools.progress import Progress

CREATE = "POST /v2/sandboxes sent → 201 read, one after the other, one connection"
RUN = "snapshot of the root to be prepared → task started, through containerd"
BOUND = "at most 0.5 in instructions, 1.0 in wall time"


def bench_create(
    client: ServiceClient,
    template: str,
    target: Target,
    *,
    count: int,
    save_s: float,
    progress: Progress,
) -> Report:
    """`count` creates of a template, by turns with starts of runc where containerd is there.

    The first sandbox is not counted, and `save_s` seconds pass after it: a node boots the first
    of a template and then saves one for those to come, which the API does not tell of. Raises
    CallerError when it cannot be made.
    """
    report = Report(name="create")
    create = report.add("create", "vmcell", f"{CREATE}; template {template}")
    kill = report.add("kill", "vmcell", "DELETE /sandboxes/{id} sent → answered")
    run = report.add("run", "runc", f"{RUN}; image {target.image}")
    progress.step(f"creating the first sandbox of {template}")
    client.kill(client.create(template))
    progress.step(f"leaving the node {save_s:g} s to save {template}")
    time.sleep(save_s)
    report.notes.append(f"the template had {save_s:g} s to be saved after its first sandbox")
    with ExitStack() as resources:
        containers = _peer(target, report, resources)
        progress.step("creating by turns")
        for turn in range(count):
            _create(client, template, create, kill)
            if containers is not None:
                name = containers.name(turn)
                sample([run], partial(_run_ms, containers, name))
                containers.discard(name)
            progress.count(turn + 1, count)
    report.compare("create of vmcell to run of runc, p50", create, run, BOUND)
    return report.finish()


def _peer(target: Target, report: Report, resources: ExitStack) -> Containers | None:
    """runc's containers, after one that is not counted; None, and a note, without containerd."""
    try:
        containers = resources.enter_context(opened(target, "run", report.notes))
        containers.start(containers.name("warm"), RUNC)
    except VmcellError as error:
        report.notes.append(f"left out: runc: {error}")
        return None
    containers.discard(containers.name("warm"))
    return containers


def _run_ms(containers: Containers, name: str) -> tuple[float]:
    marks = containers.start(name, RUNC)
    return ((marks[-1] - marks[0]) / 1e6,)


def _create(client: ServiceClient, template: str, create: Series, kill: Series) -> None:
    made: list[str] = []
    if sample([create], lambda: (_timed(lambda: made.append(client.create(template))),)):
        sample([kill], lambda: (_timed(lambda: client.kill(made[0])),))


def bench_rollback(client: ServiceClient, template: str, count: int, progress: Progress) -> Report:
    """`count` rollbacks of one sandbox to one snapshot. Raises CallerError when these cannot be
    made."""
    report = Report(name="rollback")
    snapshot = report.add("snapshot", "vmcell", "POST /sandboxes/{id}/snapshots sent → 201 read")
    rollback = report.add(
        "rollback",
        "vmcell",
        "POST /vmcell/sandboxes/{id}/rollback sent → answered: the restored agent answers, the old "
        "machine is kept as a point of undo",
    )
    progress.step(f"creating a sandbox of {template} and its snapshot")
    sandbox_id = client.create(template)
    saved: list[str] = []
    try:
        snapshot.values.append(_timed(lambda: saved.append(client.snapshot(sandbox_id))))
        progress.step("rolling back")
        for turn in range(count):
            sample([rollback], lambda: (_timed(lambda: client.rollback(sandbox_id, saved[0])),))
            progress.count(turn + 1, count)
    finally:
        client.kill(sandbox_id)
        for snapshot_id in saved:
            client.remove_snapshot(snapshot_id)
    return report.finish()


def _timed(call: Callable[[], object]) -> float:
    """Milliseconds."""
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) / 1e6
