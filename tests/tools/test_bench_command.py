"""The words of `vmcell bench`, what the shim's log says of snapshots, and QEMU as a peer."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmcell_protos.errors import HostError
from vmcell_tools.bench import qemu_microvm, restore
from vmcell_tools.bench.idle import last_mb
from vmcell_tools.bench.payload import CODE_GPA, TALK, elf, pvh_elf
from vmcell_tools.bench.report import Report
from vmcell_tools.bench.samples import Series
from vmcell_tools.bench.snapshot import Saved, saved_of
from vmcell_tools.cli import main
from vmcell_tools.cli_bench import bench
from vmcell_tools.progress import BAR_WIDTH, Progress

NAMES = ("start", "restore", "exec", "snapshot", "clone", "memory", "density", "create", "rollback")


def test_every_benchmark_has_its_words() -> None:
    assert set(bench.commands) == set(NAMES)
    for name in NAMES:
        done = CliRunner().invoke(bench, [name, "--help"])
        assert done.exit_code == 0
        assert "--json" in done.output
        assert "--count" in done.output


@pytest.mark.parametrize(
    "words",
    [
        ("restore", "-n", "0"),
        ("restore", "--memory-mib", "1"),
        ("clone", "--at-once", "0"),
        ("density", "-n", "many"),
        ("nothing",),
    ],
)
def test_wrong_words_are_refused(words: tuple[str, ...]) -> None:
    assert CliRunner().invoke(bench, words).exit_code == 2


def test_without_an_api_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMCELL_API_URL", raising=False)
    for name in ("create", "rollback"):
        done = CliRunner().invoke(main, ["bench", name])
        assert done.exit_code == 1
        assert "VMCELL_API_URL is not set" in done.output


def test_without_containerd_it_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bench", "exec", "--address", str(tmp_path / "none.sock")])
    assert done.exit_code == 1
    assert "looking up image docker.io/vmcell/small:latest" in done.output


def test_a_report_is_a_table_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(count: int, memory_mib: int, _: Progress) -> Report:
        report = Report(name="restore")
        report.add("restore", "vmcell", "from A to B").values += [float(count), float(memory_mib)]
        return report.finish()

    monkeypatch.setattr(restore, "bench_restore", measured)
    words = ["restore", "-n", "7", "--memory-mib", "256"]
    table = CliRunner().invoke(bench, words).output
    assert "restore: from A to B\n" in table
    assert "lane: " in table
    tree = json.loads(CliRunner().invoke(bench, [*words, "--json"]).stdout)
    assert tree["name"] == "restore"
    assert (tree["series"][0]["values"], tree["series"][0]["max"]) == ([7.0, 256.0], 256.0)


def test_counting_is_a_line_at_each_tenth(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("bench") as progress:
        progress.step("exec")
        for done in range(1, 101):
            progress.count(done, 100)
        progress.count(1, 0)
    lines = capfd.readouterr().err.splitlines()
    assert lines[1:3] == ["bench: exec: 10 of 100", "bench: exec: 20 of 100"]
    assert len(lines) == 12
    assert BAR_WIDTH > 0


def test_what_the_shim_says_of_a_snapshot() -> None:
    line = 'time="2026" level=info msg="c1 saved as {} in {} ms: {} KiB of memory" id=c1\n'
    log = line.format("s-1", "12.5", 8192) + line.format("s-10", "3.0", 0)
    assert saved_of(log, "s-10") == Saved(standing_ms=3.0, memory_kib=0)
    assert saved_of(log, "s-1") == Saved(standing_ms=12.5, memory_kib=8192)
    with pytest.raises(HostError, match="no line about snapshot s-2"):
        saved_of(log, "s-2")


def test_the_curve_ends_with_its_last_point() -> None:
    curve = Series(what="marginal", who="host", meaning="")
    assert last_mb(curve) is None
    curve.values += [3.0, 9.0, 7.5]
    assert last_mb(curve) == 7.5


def test_both_payloads_hold_the_same_code_at_the_same_place() -> None:
    for data, segments in ((elf(TALK), 1), (pvh_elf(TALK), 2)):
        entry, phoff = struct.unpack_from("<QQ", data, 24)
        size, count = struct.unpack_from("<HH", data, 54)
        assert (entry, count) == (CODE_GPA, segments)
        kind, _, offset, _, gpa, length, _, _ = struct.unpack_from("<IIQQQQQQ", data, phoff)
        assert (kind, gpa, data[offset : offset + length]) == (1, CODE_GPA, TALK)
    kind, _, offset, _, _, length, _, _ = struct.unpack_from("<IIQQQQQQ", data, phoff + size)
    note = data[offset : offset + length]
    assert (kind, note) == (4, struct.pack("<III4sI", 4, 4, 18, b"Xen", CODE_GPA))


def test_a_qemu_that_is_not_there_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert qemu_microvm.missing_microvm() == "qemu-system-x86_64 is not installed"
    program = tmp_path / "qemu-system-x86_64"
    program.write_text("#!/bin/sh\necho 'pc  Standard PC'\n")
    program.chmod(0o755)
    assert qemu_microvm.missing_microvm() == "qemu-system-x86_64 has no machine microvm"
    program.write_text("#!/bin/sh\necho 'microvm              microvm (i386)'\n")
    assert qemu_microvm.missing_microvm() == ""
    program.write_text("#!/bin/sh\necho 'cannot do that' >&2\nexit 1\n")
    qemu = qemu_microvm.QemuMicrovm(tmp_path, 64, [])
    with pytest.raises(HostError, match="QEMU ended: cannot do that"):
        qemu.boot()
