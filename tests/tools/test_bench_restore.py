"""`vmcell bench restore` on whatever /dev/kvm is here."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from vmm_bench import descriptors

from vmcell_protos.errors import HostError
from vmcell_tools.bench import restore, zygote
from vmcell_tools.bench.qemu_microvm import missing_microvm
from vmcell_tools.bench.restore import PayloadMachines, bench_restore
from vmcell_tools.bench.zygote import private_zygote, wait_for_spare
from vmcell_tools.progress import Progress

pytestmark = pytest.mark.kvm
QUIET = Progress("bench", quiet=True)


def test_restore() -> None:
    before = (descriptors(), list(sys.path), os.environ["VMCELL_ZYGOTE"])
    report = bench_restore(3, 512, QUIET)
    assert (descriptors(), sys.path, os.environ["VMCELL_ZYGOTE"]) == before
    rows = [row.what.strip() for row in report.series]
    parts = ["build", "go on"]
    ours = ["restore", *parts, "restore, no spare", *parts, "boot", "fork"]
    peer = ["QEMU boot", "QEMU restore"]
    has_qemu = not any("QEMU" in note for note in report.notes)
    assert has_qemu == (missing_microvm() == ""), report.notes
    assert rows == ours + peer * has_qemu
    for row in report.series:
        assert (len(row.values), row.failures) == (3, []), report.lines()
        assert min(row.values) > 0
    for start in (0, 3):
        series = report.series[start : start + 3]
        for whole, first, second in zip(*(row.values for row in series), strict=True):
            assert whole == pytest.approx(first + second)
    assert [ratio.value is not None for ratio in report.ratios] == [True] * (3 + has_qemu)
    assert any("TAP" in note for note in report.notes) == (os.geteuid() != 0)


def test_a_vmm_that_no_zygote_forked_is_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMCELL_ZYGOTE", "")
    with ExitStack() as opened:
        machines = PayloadMachines(tmp_path, 64, opened)
        for measure in (machines.boot, machines.fork):
            with pytest.raises(HostError, match="zygote did not fork"):
                measure()


def test_a_restore_by_another_vmm_is_no_sample_of_the_spares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zygote has one, but another does it."""
    with ExitStack() as opened:
        path = opened.enter_context(private_zygote(tmp_path, spares=1))
        machines = PayloadMachines(tmp_path, 64, opened)
        machines.save()
        assert machines.restore_by_spare(path)
        monkeypatch.setattr(restore, "spares_of", lambda _path: [1])
        with pytest.raises(HostError, match="no spare VMM restored it"):
            machines.restore_by_spare(path)


def test_a_zygote_without_spares_is_no_measure_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with private_zygote(tmp_path, spares=0) as path:
        monkeypatch.setattr(zygote, "READY_WITHIN_S", 0.2)
        with pytest.raises(HostError, match="no spare VMM"):
            wait_for_spare(path)


def test_a_silent_guest_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "DEADLINE_S", 0.2)
    monkeypatch.setattr(restore, "TALK", b"\xeb\xfe")
    with ExitStack() as opened:
        machines = PayloadMachines(tmp_path, 64, opened)
        with pytest.raises(TimeoutError, match="said nothing"):
            machines.boot()
