"""One clone of a snapshot against many at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from vmcell_tools.bench.containers import MEMORY_ANNOTATION, Containers, Target, opened
from vmcell_tools.bench.report import Ratio, Report
from vmcell_tools.bench.samples import Series, sample
from vmcell_tools.progress import Progress

ONE = "snapshot of the root to be prepared → restored task started, alone"
BOUND = "100 clones at most 40 × one"


def bench_clone(
    target: Target, count: int, many: int, at_once: int, memory_mib: int, progress: Progress
) -> Report:
    """`count` clones one after the other, then `many`, `at_once` of them at a time, each of which
    has to answer an exec. Raises HostError when containerd does not answer, CallerError for an
    unknown image, VmcellError when the guest that is cloned cannot be saved."""
    report = Report(name="clone")
    one = report.add("clone", "one at a time", f"{ONE}; guest of {memory_mib} MiB")
    each = report.add("clone", f"{at_once} at a time", one.meaning)
    alive = report.add("exec", "each of many", "`true` in a clone: Exec sent → Wait has answered")
    whole = report.add("all", f"{many} clones", "the first asked for → the last started", "ms")
    with opened(target, "clone", report.notes) as containers:
        saved = save_source(containers, memory_mib, progress)
        clone = partial(_clone, containers, saved, memory_mib)
        progress.step("clones one after the other")
        for turn in range(count):
            name = containers.name(f"one-{turn}")
            sample([one], partial(clone, name))
            containers.discard(name)
            progress.count(turn + 1, count)
        progress.step(f"{many} clones, {at_once} at a time")
        names = [containers.name(f"many-{number}") for number in range(many)]
        sample([whole], lambda: (_all(names, at_once, clone, each, progress),))
        for name in names:
            sample([alive], partial(_answers, containers, name))
        progress.step("removing the clones")
    value = whole.p50 / one.p50 if whole.p50 and one.p50 else None
    report.ratios.append(Ratio(what=f"{many} clones to one, p50", value=value, bound=BOUND))
    return report.finish()


def save_source(containers: Containers, memory_mib: int, progress: Progress) -> str:
    """A snapshot of a guest that waits, its caches dropped, and the guest gone. VmcellError."""
    progress.step("booting a guest and saving it")
    name, saved = containers.name("source"), containers.name("saved")
    containers.start(name, annotations={MEMORY_ANNOTATION: str(memory_mib)})
    containers.run_in(name, ["true"], "warm")
    containers.save(name, saved)
    containers.remove(name)
    return saved


def _clone(containers: Containers, saved: str, memory_mib: int, name: str) -> tuple[float]:
    marks = containers.restore(name, saved, memory_mib)
    return ((marks[-1] - marks[0]) / 1e6,)


def _all(names: list[str], at_once: int, clone: partial, each: Series, progress: Progress) -> float:
    began = time.perf_counter_ns()
    with ThreadPoolExecutor(max_workers=at_once) as pool:
        made = [pool.submit(sample, [each], partial(clone, name)) for name in names]
        for number, one in enumerate(made):
            one.result()
            progress.count(number + 1, len(names))
    return (time.perf_counter_ns() - began) / 1e6


def _answers(containers: Containers, name: str) -> tuple[float]:
    return (containers.run_in(name, ["true"], "answer"),)
