"""What idle restored sandboxes cost the host in memory, and how many there can be at once.

Two definitions. A sandbox's own: PSS and private dirty pages of its shim and its VMM, the mappings
of guest RAM left out. Marginal: the fall of MemAvailable over all sandboxes, which has the guests'
own pages, the kernel's tables and everything else in it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from vmcell_api.node.memory_use import read_memory
from vmcell_tools.bench.clone import save_source
from vmcell_tools.bench.containers import Containers, Target, opened
from vmcell_tools.bench.machine import available_bytes
from vmcell_tools.bench.report import Ratio, Report
from vmcell_tools.bench.samples import Series, sample
from vmcell_tools.progress import Progress

MIB = 1 << 20
CURVE_POINTS = 10
ANSWER_WITHIN_S = 60.0  # a guest that has lost its way is a failure, and others are to be asked
PSS_MIB, DIRTY_MIB, MARGINAL_MB = 5, 3, 12
MARGINAL = "fall of MemAvailable since before the first sandbox ÷ sandboxes"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How many sandboxes, of what size, restored how many at a time."""

    count: int
    memory_mib: int
    at_once: int = 1


def bench_memory(target: Target, wanted: Wanted, progress: Progress) -> Report:
    """As many idle sandboxes at once, each looked at. Raises HostError when containerd does not
    answer, CallerError for an unknown image, VmcellError when no guest can be saved."""
    report = Report(name="memory")
    up = f"guest RAM left out, {wanted.count} sandboxes up"
    own = [
        report.add(what, who, f"{meaning} of {process}, {up}", "MiB")
        for process, who in (("shim + VMM", "sandbox"), ("the shim", "shim"), ("the VMM", "VMM"))
        for what, meaning in (("PSS", "PSS"), ("private dirty", "private dirty pages"))
    ]
    ram = report.add("guest RAM", "sandbox", "PSS of the mappings of guest RAM", "MiB")
    with opened(target, "mem", report.notes) as containers:
        names, marginal = _fill(report, containers, wanted, progress)
        progress.step("looking at each")
        for name in names:
            sample([*own, ram], partial(_own_mib, containers, name))
        progress.step("removing them")
    _hold(report, "PSS of shim + VMM, p50, to 5 MiB", own[0].p50, PSS_MIB)
    _hold(report, "private dirty of shim + VMM, p50, to 3 MiB", own[1].p50, DIRTY_MIB)
    _hold(report, "marginal at the end to 12 MB", last_mb(marginal), MARGINAL_MB)
    return report.finish()


def bench_density(target: Target, wanted: Wanted, progress: Progress) -> Report:
    """As many idle sandboxes at once, every one of which has to answer. Raises as bench_memory."""
    report = Report(name="density")
    answered = report.add(
        "exec", "each", f"`true` with all {wanted.count} up: Exec sent → Wait has answered"
    )
    with opened(target, "dense", report.notes) as containers:
        names, marginal = _fill(report, containers, wanted, progress)
        progress.step("asking each")
        for number, name in enumerate(names):
            sample([answered], partial(_answer, containers, name))
            progress.count(number + 1, len(names))
        told = (
            f"{len(answered.values)} of {wanted.count} sandboxes answered, "
            f"all of {len(names)} up at once"
        )
        report.notes.append(told)
        progress.note(f"{told}, p50 {answered.p50 or 0:.1f} ms")
        progress.step("removing them")
    _hold(report, "marginal at the end to 12 MB", last_mb(marginal), MARGINAL_MB)
    return report.finish()


def _fill(
    report: Report,
    containers: Containers,
    wanted: Wanted,
    progress: Progress,
) -> tuple[list[str], Series]:
    """The sandboxes that are up, and the marginal cost at each point of the curve, in MB."""
    meaning = f"root to be prepared → restored task started, {wanted.at_once} at a time"
    restored = report.add("restore", "sandbox", f"{meaning}; guest of {wanted.memory_mib} MiB")
    marginal = report.add("marginal", "host", MARGINAL, "MB")
    saved = save_source(containers, wanted.memory_mib, progress)

    def restore(name: str) -> tuple[float]:
        marks = containers.restore(name, saved, wanted.memory_mib)
        return ((marks[-1] - marks[0]) / 1e6,)

    # One that comes and goes: what the first of all brings into caches is nobody's own.
    restore(containers.name("warm"))
    containers.remove(containers.name("warm"))
    progress.step("restoring sandboxes")
    before = available_bytes()
    up: list[str] = []
    step = max(1, wanted.count // CURVE_POINTS)
    with ThreadPoolExecutor(max_workers=wanted.at_once) as pool:
        for first in range(1, wanted.count + 1, step):
            numbers = range(first, min(first + step, wanted.count + 1))
            names = [containers.name(number) for number in numbers]
            made = [pool.submit(sample, [restored], partial(restore, name)) for name in names]
            for name, one in zip(names, made, strict=True):
                if one.result():
                    up.append(name)
                else:
                    containers.discard(name)
            if up:
                fallen = before - available_bytes()
                marginal.values.append(fallen / len(up) / 1e6)
                point = (
                    f"MemAvailable with {len(up)} sandboxes: {fallen / 1e6:.1f} MB less, "
                    f"{fallen / len(up) / 1e6:.2f} MB each"
                )
                report.notes.append(point)
                # At once too: a machine that is filled to its end may not live to print a report.
                progress.note(point)
            progress.count(numbers[-1], wanted.count)
    return up, marginal


def _own_mib(containers: Containers, name: str) -> list[float]:
    """PSS and private dirty of both processes, of the shim, of the VMM; PSS of guest RAM."""
    rows = read_memory(containers.config.state_dir, containers.namespace, name)
    found: list[float] = []
    for names in (("shim", "vmm"), ("shim",), ("vmm",)):
        mine = [row.own for row in rows if row.name in names]
        found += [sum(one.pss for one in mine) / MIB, sum(one.private_dirty for one in mine) / MIB]
    return [*found, sum(row.guest_ram.pss for row in rows) / MIB]


def _answer(containers: Containers, name: str) -> tuple[float]:
    return (containers.run_in(name, ["true"], "answer", within_s=ANSWER_WITHIN_S),)


def last_mb(marginal: Series) -> float | None:
    """The curve's last point, with all sandboxes up."""
    return marginal.values[-1] if marginal.values else None


def _hold(report: Report, what: str, value: float | None, bound: float) -> None:
    report.ratios.append(Ratio(what=what, value=None if value is None else value / bound))
