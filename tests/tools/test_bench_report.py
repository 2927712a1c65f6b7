"""Samples, their quantiles, what failed, and how a report says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import HostError
from vmcell_tools.bench.machine import Machine, available_bytes, lane_of, load_1m, this_machine
from vmcell_tools.bench.report import TITLES, Ratio, Report
from vmcell_tools.bench.samples import QUANTILES, Series, sample

MACHINE = Machine(
    kernel="6.1",
    cpu="EPYC",
    cpus=2,
    memory_mib=1024,
    kvm="pvm",
    lane="native",
    clock="wall",
    python="3.11",
    load_1m=1.5,
)


def series(*values: float) -> Series:
    return Series(what="boot", who="vmcell", meaning="from A to B", values=list(values))


def test_quantiles_are_nearest_ranks() -> None:
    hundred = series(*range(100, 0, -1))
    found = {name: hundred.quantile(share) for name, share in QUANTILES.items()}
    assert found == {"p50": 50, "p90": 90, "p99": 99}
    assert hundred.largest == 100
    assert (series(1, 2, 3, 4).p50, series(1, 2, 3).p50, series(7).quantile(0.99)) == (2, 2, 7)
    assert (series().p50, series().largest) == (None, None)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_was_measured_and_covers_its_share(values: list[float], share: float) -> None:
    found = series(*values).quantile(share)
    assert found in values
    covered = sum(value <= found for value in values)
    assert covered / len(values) >= share - 1e-9
    below = sum(value < found for value in values)
    assert below == 0 or below / len(values) < share + 1e-9


def test_a_failed_sample_is_counted_and_the_next_is_taken() -> None:
    both = [series(), series()]
    assert sample(both, lambda: (1.0, 2.0))

    def fail() -> tuple[float, float]:
        raise HostError("no room")

    assert not sample(both, fail)
    assert sample(both, lambda: (3.0, 4.0))
    assert [row.values for row in both] == [[1.0, 3.0], [2.0, 4.0]]
    assert [row.failures for row in both] == [["HostError: no room"]] * 2
    assert not sample(both, lambda: (1.0,))
    assert both[0].failures[1:] == ["ValueError: 1 values were measured for 2 series"]
    assert both[0].values == [1.0, 3.0]


def test_an_interrupt_ends_the_run() -> None:
    def interrupt() -> tuple[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample([series()], interrupt)


def test_the_report_says_what_was_measured_where() -> None:
    report = Report(name="boot", machine=MACHINE)
    ours = report.add("boot", "vmcell", "from A to B")
    theirs = report.add("boot", "runc", "from A to B")
    ours.values += [1.0, 2.0, 30.0]
    theirs.values += [4.0]
    theirs.failures += ["no room", "no room", "late"]
    report.compare("boot, vmcell to runc", ours, theirs, "at most 1.0")
    report.notes.append("left out: QEMU")
    assert len(TITLES) == len(report.rows()[0])
    assert report.rows() == [
        ("boot", "vmcell", "3", "0", "2.00", "30.00", "30.00", "30.00", "ms"),
        ("boot", "runc", "1", "3", "4.00", "4.00", "4.00", "4.00", "ms"),
    ]
    assert report.lines() == [
        "boot: from A to B",
        "ratio, boot, vmcell to runc: 0.50 (at most 1.0)",
        "failed, runc boot: 2 × no room",
        "failed, runc boot: 1 × late",
        "left out: QEMU",
        "machine: Linux 6.1, 2 × EPYC, 1024 MiB, Python 3.11",
        "lane: native; /dev/kvm: pvm; clock: wall",
        "load: 1.50 before, 0.00 after",
    ]
    tree = json.loads(json.dumps(report.json()))
    assert tree["machine"]["kvm"] == "pvm"
    assert tree["series"][0]["meaning"] == "from A to B"
    assert tree["series"][0]["values"] == [1.0, 2.0, 30.0]
    assert (tree["series"][1]["n"], tree["series"][1]["failure_count"]) == (1, 3)
    assert tree["ratios"][0]["value"] == 0.5


def test_what_was_not_measured_has_no_ratio() -> None:
    report = Report(name="boot", machine=MACHINE)
    empty = report.add("boot", "runc", "m")
    full = report.add("boot", "vmcell", "m")
    full.values.append(1.0)
    report.compare("to nothing", full, empty)
    report.compare("of nothing", empty, full)
    names = ("to nothing", "of nothing")
    assert report.ratios == [Ratio(what=name, value=None) for name in names]
    assert report.rows()[0] == ("boot", "runc", "0", "0", "–", "–", "–", "–", "ms")
    assert "ratio, to nothing: not measured" in report.lines()


@pytest.mark.parametrize(
    ("cpu", "command_line", "kvm", "lane", "clock"),
    [
        ("AMD EPYC", "quiet", "pvm", "native, kvm_pvm", "wall"),
        ("AMD EPYC", "quiet", "hardware", "native, /dev/kvm: hardware", "wall"),
        ("QEMU TCG CPU version 2.5+", "quiet", "hardware", "QEMU's software CPU", "wall"),
        ("QEMU TCG CPU", "a vmcell.accelerator=tcg", "hardware", "software CPU", "wall"),
        ("QEMU TCG CPU", "vmcell.accelerator=icount", "hardware", "counted", "instructions"),
        ("AMD EPYC", "vmcell.accelerator=kvm", "hardware", "dev VM on kvm", "wall"),
    ],
)
def test_lanes(cpu: str, command_line: str, kvm: str, lane: str, clock: str) -> None:
    found, ticks = lane_of(cpu, command_line, kvm)
    assert lane in found
    assert ticks == clock


def test_a_machine_is_read_from_its_files(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC 7\nflags\t\t: fpu svm\n",
        "proc/cmdline": "quiet\n",
        "proc/meminfo": "MemTotal:  2097152 kB\nMemAvailable:    1024 kB\n",
        "proc/loadavg": "0.75 0.50 0.25 1/100 99\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    machine = this_machine(str(tmp_path))
    assert (machine.cpu, machine.memory_mib, machine.kvm) == ("AMD EPYC 7", 2048, "missing")
    assert (machine.load_1m, load_1m(str(tmp_path))) == (0.75, 0.75)
    assert available_bytes(str(tmp_path)) == 1 << 20
