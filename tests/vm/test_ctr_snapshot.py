"""`ctr containers checkpoint` and `restore --live`: a program in a real guest goes on elsewhere."""

from __future__ import annotations

import time

import pytest
from dev_vm import RUNTIME, SMALL, DevVm

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600), pytest.mark.usefixtures("nothing_left")]

# Each step is written with both clocks; the count itself is only in memory.
PROGRAM = (
    "i=0; while :; do i=$((i+1)); "
    "echo $i $(date +%s) $(cut -d' ' -f1 /proc/uptime) >> /steps; sleep 0.2; done"
)
# How long the clones have stood at least, of which their own clock may know a fraction.
STOOD_S = 10
IDENTITY = "cat /proc/sys/kernel/random/boot_id /etc/machine-id; head -c 16 /dev/urandom | xxd -p"


def steps(dev_vm: DevVm, name: str, count: int) -> list[list[str]]:
    """The lines the program has written in that container, once there are so many."""
    deadline = time.monotonic() + 120
    while True:
        rows = [line.split() for line in in_task(dev_vm, name, "cat", "/steps").splitlines()]
        if len(rows) >= count:
            return rows
        assert time.monotonic() < deadline, (rows[-3:], dev_vm.logs())


def in_task(dev_vm: DevVm, name: str, *words: str) -> str:
    exec_id = f"e{time.monotonic_ns()}"
    return dev_vm.check("ctr", "task", "exec", "--exec-id", exec_id, name, *words)


def test_a_program_goes_on_in_two_others(dev_vm: DevVm) -> None:
    names = ("source", "clone1", "clone2")
    reference = "docker.io/vmcell/saved:1"
    # Of equal specs containerd 1.6 keeps one, and then leaves out the rest of the checkpoint too.
    run = ("ctr", "run", "-d", "--runtime", RUNTIME, "--env", f"RUN={time.time_ns()}")
    dev_vm.check(*run, SMALL, "source", "sh", "-c", PROGRAM)
    try:
        before = len(steps(dev_vm, "source", 10))
        dev_vm.check("ctr", "containers", "checkpoint", "--task", "--image", "source", reference)
        after = len(steps(dev_vm, "source", before + STOOD_S * 5))
        restore = ("ctr", "containers", "restore", "--live")
        for name in names[1:]:
            dev_vm.check(*restore, name, reference)
        rows = {name: steps(dev_vm, name, after + 10) for name in names}
        for name, found in rows.items():
            expected = [str(number) for number in range(1, len(found) + 1)]
            assert [row[0] for row in found] == expected, name
        for name in names[1:]:
            _check_clocks(dev_vm, name, rows["source"], rows[name])
        identities = [in_task(dev_vm, name, "sh", "-c", IDENTITY).split() for name in names[1:]]
        for values in zip(*identities, strict=True):
            assert len(set(values)) == len(values), identities
    finally:
        for name in names:
            for words in (("task", "kill", "-s", "9"), ("task", "delete", "-f"), ("c", "rm")):
                dev_vm.run("ctr", *words, name)
        dev_vm.run("ctr", "images", "rm", "--sync", reference)


def _check_clocks(
    dev_vm: DevVm, name: str, source: list[list[str]], clone: list[list[str]]
) -> None:
    """The wall clock is right; the monotonic one has not noticed how long the clone stood."""
    before = int(dev_vm.check("date", "+%s"))
    inside = int(in_task(dev_vm, name, "date", "+%s"))
    assert before <= inside <= int(dev_vm.check("date", "+%s")), name
    first = next(at for at, row in enumerate(clone) if row != source[at])
    assert source[:first] == clone[:first], "up to the snapshot they are the same"
    stood_s = int(clone[first][1]) - int(clone[first - 1][1])
    passed_s = float(clone[first][2]) - float(clone[first - 1][2])
    # What it has noticed is its own way back to life, on an emulated processor.
    assert stood_s > STOOD_S - 2, (name, stood_s, passed_s)
    assert stood_s / 2 > passed_s >= 0, (name, stood_s, passed_s)
