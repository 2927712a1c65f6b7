"""Several containers in one microVM, pause, live directories, limits and crashes, by `ctr`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from dev_vm import RUNTIME, SMALL, DevVm, Result

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("nothing_left")]


def start(dev_vm: DevVm, name: str, *words: str, flags: tuple[str, ...] = ()) -> None:
    dev_vm.check("ctr", "run", "-d", "--runtime", RUNTIME, *flags, SMALL, name, *words)


def run_in(dev_vm: DevVm, name: str, script: str) -> Result:
    exec_id = f"e{uuid.uuid4().hex[:8]}"
    return dev_vm.run("ctr", "task", "exec", "--exec-id", exec_id, name, "sh", "-c", script)


def remove(dev_vm: DevVm, name: str) -> None:
    dev_vm.run("ctr", "task", "kill", "-s", "KILL", name)
    dev_vm.run("ctr", "task", "delete", "-f", name)
    dev_vm.run("ctr", "container", "delete", name)


@contextmanager
def container(dev_vm: DevVm, name: str, *words: str, flags: tuple[str, ...] = ()) -> Iterator[None]:
    start(dev_vm, name, *words, flags=flags)
    try:
        yield
    finally:
        remove(dev_vm, name)


def tasks(dev_vm: DevVm) -> dict[str, tuple[str, str]]:
    """Name → (pid, status) of every task."""
    rows = [line.split() for line in dev_vm.check("ctr", "task", "list").splitlines()[1:]]
    return {name: (pid, status) for name, pid, status in rows}


def test_members_of_a_group_share_a_microvm(dev_vm: DevVm) -> None:
    """One VMM, one network, files and processes apart; members come and go while it runs."""
    flags = ("--annotation", "io.containerd.runc.v2.group=pod")
    with container(dev_vm, "m1", "sleep", "600", flags=flags):
        with container(dev_vm, "m2", "sh", "-c", "touch /tmp/mine; exec sleep 601", flags=flags):
            listed = tasks(dev_vm)
            assert listed["m1"] == listed["m2"]
            served = run_in(dev_vm, "m2", "echo through | nc -l -p 8080 >/dev/null & sleep 0.5")
            assert served.code == 0, served.error_text
            seen = run_in(
                dev_vm, "m1", "nc 127.0.0.1 8080 </dev/null; ls /tmp; ps; ls /sys/block"
            ).text
            assert "through" in seen
            assert "mine" not in seen
            assert "sleep 601" not in seen
            assert seen.count("pmem") == 3
        assert tasks(dev_vm).keys() == {"m1"}
        assert run_in(dev_vm, "m1", "ls /sys/block").text.split().count("pmem2") == 0
        with container(dev_vm, "m3", "sleep", "602", flags=flags):
            assert tasks(dev_vm)["m3"] == tasks(dev_vm)["m1"]


def test_a_paused_microvm_stands_still(dev_vm: DevVm) -> None:
    """Nothing is written while it is paused, and its clock is right when it goes on."""
    log = "/run/ticks.log"
    loop = "while :; do date +%s; sleep 0.1; done"
    with container(dev_vm, "ticks", "sh", "-c", loop, flags=("--log-uri", f"file://{log}")):
        script = (
            "set -e; until [ -s LOG ]; do :; done; ctr task pause ticks; a=$(stat -c %s LOG); "
            "sleep 3; b=$(stat -c %s LOG); ctr task list; ctr task resume ticks; "
            "until [ $(stat -c %s LOG) -gt $b ]; do :; done; sleep 1; "
            "echo $a $b $(($(date +%s) - $(tail -1 LOG)))"
        ).replace("LOG", log)
        *listed, numbers = dev_vm.check("sh", "-c", script).splitlines()
        assert any("ticks" in line and "PAUSED" in line for line in listed)
        before, after, late_s = map(int, numbers.split())
        assert before == after
        assert abs(late_s) <= 2
        assert tasks(dev_vm)["ticks"][1] == "RUNNING"
    dev_vm.check("rm", log)


def test_a_live_directory_is_seen_both_ways(dev_vm: DevVm) -> None:
    mount = "type=bind,src=/run/live,dst=/data,options=rbind:rw"
    dev_vm.check("sh", "-c", "mkdir -p /run/live; echo from-host >/run/live/a")
    try:
        with container(dev_vm, "live", "sleep", "600", flags=("--mount", mount)):
            assert run_in(dev_vm, "live", "cat /data/a; echo from-guest >/data/b").text == (
                "from-host\n"
            )
            assert dev_vm.check("cat", "/run/live/b") == "from-guest\n"
            dev_vm.check("sh", "-c", "echo later >/run/live/c")
            assert run_in(dev_vm, "live", "cat /data/c").text == "later\n"
    finally:
        dev_vm.check("rm", "-r", "/run/live")


def test_a_copied_file_follows_its_source(dev_vm: DevVm) -> None:
    mount = "type=bind,src=/run/hosts.test,dst=/etc/hosts,options=rbind:ro"
    dev_vm.check("sh", "-c", "echo one >/run/hosts.test")
    try:
        with container(dev_vm, "copied", "sleep", "600", flags=("--mount", mount)):
            wait = "until grep -q two /etc/hosts; do sleep 0.1; done; cat /etc/hosts"
            dev_vm.check("sh", "-c", "echo two >/run/hosts.test")
            assert run_in(dev_vm, "copied", wait).text == "two\n"
    finally:
        dev_vm.check("rm", "/run/hosts.test")


def test_the_oom_killer_is_told_before_the_exit(dev_vm: DevVm) -> None:
    script = (
        "timeout 60 ctr events >/run/events.log & sleep 2; "
        f"ctr run --rm --runtime {RUNTIME} --memory-limit 33554432 {SMALL} oom "
        "sh -c 'tail /dev/zero'; echo status $?; sleep 1; kill %1; grep oom /run/events.log"
    )
    shown = dev_vm.check("bash", "-c", script)
    assert "status 137" in shown
    topics = [line.split()[5] for line in shown.splitlines() if " /tasks/" in line]
    assert topics.index("/tasks/oom") < topics.index("/tasks/exit")


def test_a_killed_shim_takes_its_vmm_along(dev_vm: DevVm) -> None:
    """The VMM is gone within a second, and containerd's delete says 137."""
    start(dev_vm, "orphan", "sleep", "600")
    try:
        state = json.loads(dev_vm.check("cat", "/run/vmcell/default/orphan/state.json"))
        shim, vmm = state["shim"][0], state["vmm"][0]
        script = (
            f"kill -9 {shim}; start=$(date +%s%N); while kill -0 {vmm} 2>/dev/null; do "
            "[ $(( $(date +%s%N) - start )) -gt 5000000000 ] && exit 9; done; "
            "echo $(( ($(date +%s%N) - start) / 1000000 ))"
        )
        assert int(dev_vm.check("sh", "-c", script)) < 1000
        events = dev_vm.run("ctr", "task", "delete", "-f", "orphan")
        assert "Traceback" not in events.error_text
    finally:
        remove(dev_vm, "orphan")
        # ctr makes them and removes them with the task it has in hand, which here was lost.
        dev_vm.run("sh", "-c", "rm -rf /run/containerd/fifo/*/orphan-*")
    assert "orphan" not in tasks(dev_vm)
