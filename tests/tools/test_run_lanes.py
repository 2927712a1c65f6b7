"""Lanes beside each other: logs whole, one failure fails all, ^C ends all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "support" / "run_lanes.py"
WITHIN_S = 60


def lanes(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, folder, *words],
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )


def test_both_logs_stand_whole_one_after_the_other(tmp_path: Path) -> None:
    """Each waits for the other by a FIFO, so they do run at the same time."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = lanes(
        tmp_path,
        f"a=seq -f a%.0f 20000; echo go > {fifo}; seq -f b%.0f 20000 >&2",
        f"c=read -r word < {fifo}; seq -f c%.0f 20000",
    )
    assert done.returncode == 0, done.stdout[-2000:]
    lines = done.stdout.splitlines()
    numbers = range(1, 20001)
    for name, expected in (
        ("a", [*(f"a{n}" for n in numbers), *(f"b{n}" for n in numbers)]),
        ("c", [f"c{n}" for n in numbers]),
    ):
        (begin,) = (n for n, line in enumerate(lines) if line.startswith(f"======== {name} lane"))
        end = lines.index(f"======== end of the {name} lane ========")
        assert lines[begin + 1 : end] == expected
        assert (tmp_path / f"{name}.log").read_text().splitlines() == expected
    assert lines[-2:] == ["a lane: passed: b20000", "c lane: passed: c20000"]


def test_a_failure_fails_all_and_ends_none(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = lanes(
        tmp_path,
        f"bad=exec 3<>{fifo}; echo wrong; exit 3",
        f"good=until [ -s {tmp_path}/bad.log ]; do sleep 0.1; done; sleep 1; echo right",
    )
    assert done.returncode == 1
    assert done.stdout.endswith(
        "bad lane: FAILED with status 3: wrong\ngood lane: passed: right\n"
    ), done.stdout


def test_the_last_lines_say_what_pytest_said(tmp_path: Path) -> None:
    bar = "=" * 20
    done = lanes(
        tmp_path,
        f"a=echo '{bar} test session starts {bar}'; "
        f"echo '{bar} 3 passed in 61.20s (0:01:01) {bar}'; "
        f"echo '{bar} 1 failed, 2 passed in 0.50s {bar}'; echo the end; exit 1",
    )
    assert done.stdout.endswith(
        "a lane: FAILED with status 1: 3 passed in 61.20s (0:01:01); 1 failed, 2 passed in 0.50s\n"
    ), done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_with_what_they_started(tmp_path: Path, number: signal.Signals) -> None:
    """A lane may clean up; its children get the signal too; nothing of it lives on."""
    waiting = "sleep 300 & echo $! > {0}/{1}.pid; trap 'echo {1} cleans up; exit 1' INT; wait"
    words = [f"{name}={waiting.format(tmp_path, name)}" for name in ("a", "b")]
    process = subprocess.Popen(
        [sys.executable, PROGRAM, tmp_path, *words], stdout=subprocess.PIPE, text=True
    )
    until = time.monotonic() + WITHIN_S
    files = [tmp_path / "a.pid", tmp_path / "b.pid"]
    while not all(file.exists() and file.read_text().strip() for file in files):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 128 + number
    assert "a cleans up" in output
    assert "b cleans up" in output
    for file in files:
        while Path("/proc", file.read_text().strip()).exists():
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.mark.parametrize("words", [[], ["a"], ["a=true", "a=true"]])
def test_wrong_words_are_named(tmp_path: Path, words: list[str]) -> None:
    done = lanes(tmp_path, *words)
    assert done.returncode == 2
    assert "NAME=COMMAND" in done.stdout
