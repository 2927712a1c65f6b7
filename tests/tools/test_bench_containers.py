"""The benchmarks of containers on a real containerd and shim, with a fake guest.

What they measure here says nothing; that they measure it all, count what fails and leave nothing
behind does. runc's containers fail, for the image has no program: a peer that cannot run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from private_containerd import IMAGE, PrivateContainerd
from shim_harness import wait_until

from vmcell_protos.errors import CallerError
from vmcell_tools.bench.clone import bench_clone
from vmcell_tools.bench.containers import Target
from vmcell_tools.bench.execs import bench_exec
from vmcell_tools.bench.idle import Wanted, bench_density, bench_memory
from vmcell_tools.bench.report import Report
from vmcell_tools.bench.samples import Series
from vmcell_tools.bench.snapshot import DIRTY_MIB, bench_snapshot
from vmcell_tools.bench.start import bench_start, rows_of
from vmcell_tools.progress import Progress

pytestmark = pytest.mark.root
QUIET = Progress("bench", quiet=True)
MEMORY_MIB = 128


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateContainerd]:
    containerd = PrivateContainerd(tmp_path_factory.mktemp("ctd"), fake_guest=True)
    containerd.start()
    try:
        containerd.import_image()
        yield containerd
    finally:
        containerd.kill()


@pytest.fixture
def target(daemon: PrivateContainerd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """Afterwards nothing of the benchmark is left."""
    monkeypatch.setenv("VMCELL_CONFIG", daemon.environment()["VMCELL_CONFIG"])
    yield Target(address=str(daemon.socket), image=IMAGE)
    wait_until(lambda: daemon.leftovers() == [], f"an end of {daemon.leftovers()}")
    for words in (("task", "list", "-q"), ("container", "list", "-q"), ("leases", "list", "-q")):
        assert daemon.ctr(*words).stdout == b"", words
    snapshots = daemon.ctr("snapshots", "list").stdout.decode().splitlines()
    assert not [line for line in snapshots if line.startswith("bench-")], snapshots
    assert list(Path(daemon.directory, "snapshots").glob("*")) == []


def of(report: Report, what: str, who: str) -> Series:
    (found,) = [row for row in report.series if (row.what, row.who) == (what, who)]
    return found


def all_taken(series: Series, count: int) -> bool:
    return len(series.values) == count and not series.failures and min(series.values) >= 0


def test_exec_goes_on_when_its_peer_cannot(target: Target) -> None:
    report = bench_exec(target, 3, QUIET)
    assert all_taken(of(report, "exec", "vmcell"), 3), report.lines()
    theirs = of(report, "exec", "runc")
    assert theirs.values == []
    assert len(theirs.failures) == 1
    assert "no container to measure in" in theirs.failures[0]
    assert [ratio.value for ratio in report.ratios] == [None]
    json.dumps(report.json())


def test_snapshot(target: Target) -> None:
    report = bench_snapshot(target, 2, MEMORY_MIB, QUIET)
    for dirty_mib in DIRTY_MIB:
        for what in ("stands still", "call", "memory", "allocated"):
            series = of(report, what, f"{dirty_mib} MiB written")
            assert all_taken(series, 2), (what, report.lines())
        assert min(of(report, "allocated", f"{dirty_mib} MiB written").values) > 0
    assert report.notes == []


def test_clone(target: Target) -> None:
    report = bench_clone(target, 2, 4, 2, MEMORY_MIB, QUIET)
    assert all_taken(of(report, "clone", "one at a time"), 2), report.lines()
    assert all_taken(of(report, "clone", "2 at a time"), 4)
    assert all_taken(of(report, "exec", "each of many"), 4)
    (whole,) = of(report, "all", "4 clones").values
    one = of(report, "clone", "one at a time").p50
    assert one is not None
    assert report.ratios[0].value == pytest.approx(whole / one)
    assert report.notes == []


def test_memory(target: Target) -> None:
    report = bench_memory(target, Wanted(count=3, memory_mib=MEMORY_MIB), QUIET)
    for what in ("PSS", "private dirty"):
        both = of(report, what, "sandbox")
        assert all_taken(both, 3), report.lines()
        shims, vmms = of(report, what, "shim"), of(report, what, "VMM")
        assert both.values == [sum(pair) for pair in zip(shims.values, vmms.values, strict=True)]
        assert min(shims.values) > 1
        assert min(vmms.values) > 1
    assert len(of(report, "marginal", "host").values) == 3
    assert [ratio.value is not None for ratio in report.ratios] == [True] * 3


def test_density(target: Target) -> None:
    report = bench_density(target, Wanted(count=25, memory_mib=MEMORY_MIB, at_once=4), QUIET)
    assert all_taken(of(report, "exec", "each"), 25), report.lines()
    assert "25 of 25 sandboxes answered, all of 25 up at once" in report.notes


def test_start_counts_what_fails(target: Target) -> None:
    ours, theirs = bench_start(target, 1, QUIET)
    # One more than asked for, which is not counted when it starts.
    assert (len(ours.samples), ours.failures) == (1, 0)
    assert (len(theirs.samples), theirs.failures) == (0, 2)
    for title, mine, other, ratio in rows_of([ours, theirs])[:5]:
        assert float(mine) >= 0, title
        assert (other, ratio) == ("–", "–")


def test_an_unknown_image_is_named(target: Target) -> None:
    unknown = Target(address=target.address, image="docker.io/vmcell/none:1")
    with pytest.raises(CallerError, match=r"docker\.io/vmcell/none:1"):
        bench_exec(unknown, 1, QUIET)
