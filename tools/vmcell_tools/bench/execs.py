"""How long a program takes that does nothing, in a running container: vmcell and runc by turns."""

from __future__ import annotations

from functools import partial

from vmcell_protos.errors import VmcellError
from vmcell_tools.bench.containers import RUNC, VMCELL, Containers, Target, opened
from vmcell_tools.bench.report import Report
from vmcell_tools.bench.samples import Series, sample
from vmcell_tools.progress import Progress

MEANING = "task exec of `true`: Exec sent → Wait has answered, no standard streams"
NAMES = {VMCELL: "vmcell", RUNC: "runc"}
BOUND = "at most 1.0"


def bench_exec(target: Target, count: int, progress: Progress) -> Report:
    """Raises HostError when containerd does not answer, CallerError for an unknown image."""
    report = Report(name="exec")
    with opened(target, "exec", report.notes) as containers:
        series = {runtime: report.add("exec", who, MEANING) for runtime, who in NAMES.items()}
        progress.step("starting a container of each")
        # The first of each is not counted: it brings the program into caches.
        running = {runtime for runtime in series if _is_up(containers, runtime, series[runtime])}
        progress.step("exec by turns")
        for turn in range(count):
            for runtime in NAMES:
                if runtime in running:
                    sample([series[runtime]], partial(_one, containers, runtime, turn))
            progress.count(turn + 1, count)
    report.compare("exec, vmcell to runc, p50", series[VMCELL], series[RUNC], BOUND)
    return report.finish()


def _is_up(containers: Containers, runtime: str, series: Series) -> bool:
    try:
        containers.start(containers.name(NAMES[runtime]), runtime)
        _one(containers, runtime, -1)
    except VmcellError as error:
        series.failures.append(f"no container to measure in: {error}")
        return False
    return True


def _one(containers: Containers, runtime: str, turn: int) -> tuple[float]:
    took_ms = containers.run_in(containers.name(NAMES[runtime]), ["true"], f"e{turn + 1}")
    return (took_ms,)
