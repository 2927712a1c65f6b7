"""`ctr containers checkpoint` and `restore --live`: a program in a real guest goes on elsewhere."""

from __future__ import annotations

import itertools
import time

import pytest
from dev_vm import RUNTIME, SMALL, DevVm

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600), pytest.mark.usefixtures("nothing_left")]

# Steps are counted in memory and on the disk, and told with both clocks.
PROGRAM = (
    "i=0; while :; do i=$((i+1)); echo $i >> /count; "
    "echo $i $(date +%s.%N) $(cut -d' ' -f1 /proc/uptime); sleep 0.2; done"
)
IDENTITY = "cat /proc/sys/kernel/random/boot_id /etc/machine-id; head -c 16 /dev/urandom | xxd -p"


def lines(dev_vm: DevVm, name: str) -> list[list[str]]:
    path = dev_vm.out / name
    text = path.read_text() if path.exists() else ""
    return [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_lines(dev_vm: DevVm, name: str, count: int) -> list[list[str]]:
    deadline = time.monotonic() + 120
    while len(found := lines(dev_vm, name)) < count:
        assert time.monotonic() < deadline, (found[-3:], dev_vm.logs())
        time.sleep(0.2)
    return found


def in_task(dev_vm: DevVm, name: str, *words: str) -> str:
    exec_id = f"e{time.monotonic_ns()}"
    return dev_vm.check("ctr", "task", "exec", "--exec-id", exec_id, name, *words)


def test_a_program_goes_on_in_two_others(dev_vm: DevVm) -> None:
    names = ("source", "clone1", "clone2")
    for name in names:
        (dev_vm.out / name).unlink(missing_ok=True)
    reference = "docker.io/vmcell/saved:1"
    dev_vm.check(
        *("ctr", "run", "-d", "--runtime", RUNTIME, "--env", f"RUN={time.time_ns()}"),
        *("--log-uri", "file:///mnt/out/source", SMALL, "source", "sh", "-c", PROGRAM),
    )
    try:
        wait_lines(dev_vm, "source", 10)
        dev_vm.check("ctr", "containers", "checkpoint", "--task", "--image", "source", reference)
        told = len(lines(dev_vm, "source"))
        wait_lines(dev_vm, "source", told + 10)
        restore = "; ".join(
            f"setsid ctr containers restore --live {name} {reference} >/mnt/out/{name} 2>&1 &"
            for name in names[1:]
        )
        dev_vm.check("sh", "-c", restore.replace("&;", "&"))
        at_save = wait_lines(dev_vm, "clone1", 10)[0]
        wait_lines(dev_vm, "clone2", 10)
        _check_steps(dev_vm, names, int(at_save[0]))
        _check_clocks(dev_vm, names)
        identities = [in_task(dev_vm, name, "sh", "-c", IDENTITY).split() for name in names[1:]]
        for values in zip(*identities, strict=True):
            assert len(set(values)) == len(values), identities
    finally:
        for name in names:
            for words in (("task", "kill", "-s", "9"), ("task", "delete", "-f"), ("c", "rm")):
                dev_vm.run("ctr", *words, name)
        dev_vm.run("ctr", "images", "rm", "--sync", reference)


def _check_steps(dev_vm: DevVm, names: tuple[str, ...], first: int) -> None:
    """Each goes on by itself from the same step, and none has lost or repeated one."""
    for name in names:
        steps = [int(row[0]) for row in lines(dev_vm, name)]
        begin = 1 if name == "source" else first
        assert steps == list(range(begin, begin + len(steps))), name
        counted = in_task(dev_vm, name, "cat", "/count").split()
        assert counted == [str(n) for n in range(1, len(counted) + 1)], name


def _check_clocks(dev_vm: DevVm, names: tuple[str, ...]) -> None:
    """Wall clocks are right; the monotonic one has not noticed how long a clone stood still."""
    for name in names[1:]:
        script = "date +%s.%N"
        before = float(dev_vm.check("date", "+%s.%N"))
        inside = float(in_task(dev_vm, name, "sh", "-c", script))
        after = float(dev_vm.check("date", "+%s.%N"))
        assert before - 0.1 <= inside <= after + 0.1, name
        rows = lines(dev_vm, name)
        walls = [float(row[1]) for row in rows]
        ups = [float(row[2]) for row in rows]
        steps = [
            (up - up_before) - (wall - wall_before)
            for up_before, up, wall_before, wall in zip(
                ups, ups[1:], walls, walls[1:], strict=False
            )
        ]
        assert all(up_before <= up for up_before, up in itertools.pairwise(ups)), name
        assert max(map(abs, steps[2:])) < 0.5, (name, steps)
        source = next(row for row in lines(dev_vm, "source") if row[0] == rows[0][0])
        assert abs(float(source[2]) - ups[0]) < 5.0, "the clone's clock stood while it did"
