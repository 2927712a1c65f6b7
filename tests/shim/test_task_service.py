"""The Task service end to end over ttrpc, with a fake guest that runs real processes."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from shim_harness import Shim, refused, wait_until

from vmcell_protos import task
from vmcell_protos.errors import VmcellError
from vmcell_protos.events import TaskExit, TaskStart
from vmcell_protos.metrics import Metrics
from vmcell_protos.wellknown import Empty
from vmcell_shim.process import Process
from vmcell_shim.stdio import Stdio, StreamOwner

OWNER = StreamOwner(namespace="test", container_id="c1", warn=print)


def test_life_of_a_container(shim: Shim) -> None:
    pid = shim.create("/bin/sh", "-c", "exit 7")
    assert shim.state().status == task.TaskStatus_CREATED
    assert shim.start() == pid
    assert shim.wait() == 7
    state = shim.state()
    assert (state.status, state.exit_status, state.pid) == (task.TaskStatus_STOPPED, 7, pid)
    assert shim.delete().exit_status == 7
    shim.containerd.wait_topics("create", "start", "exit", "delete")
    assert shim.left_behind() == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with refused("not_found"):
        shim.state()


def test_version_3_has_the_same_methods(shim: Shim) -> None:
    shim.create("/bin/true")
    request = task.ConnectRequest(id="c1")
    answer = shim.call("Connect", request, task.ConnectResponse, version=3)
    assert answer.shim_pid == os.getpid()
    assert answer.task_pid == shim.state().pid


def test_wait_may_come_before_start(shim: Shim) -> None:
    shim.create("/bin/sh", "-c", "exit 3")
    statuses: list[int] = []
    waiting = threading.Thread(target=lambda: statuses.append(shim.wait()))
    waiting.start()
    shim.start()
    waiting.join(20)
    assert statuses == [3]


def test_start_event_stands_before_the_exit_of_an_instant_process(shim: Shim) -> None:
    pid = shim.create("/bin/true")
    shim.start()
    shim.wait()
    shim.containerd.wait_topics("create", "start", "exit")
    start, end = (value for _, _, value in shim.containerd.events[1:])
    assert TaskStart.decode(start).pid == pid
    exited = TaskExit.decode(end)
    assert (exited.container_id, exited.id, exited.pid) == ("c1", "c1", pid)


def test_killed_vmm_ends_everything_with_137(shim: Shim) -> None:
    pid = shim.create("/bin/sleep", "600")
    shim.start()
    shim.add_exec("e1", "/bin/sleep", "600")
    shim.start("e1")
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert (shim.wait(), shim.wait("e1")) == (137, 137)
    assert time.monotonic() - began < 1.0
    with refused("not_found"):
        shim.kill()
    assert shim.delete().exit_status == 137
    assert shim.left_behind() == []


def test_vmm_death_before_start_stops_the_task(shim: Shim) -> None:
    pid = shim.create("/bin/true")
    os.kill(pid, signal.SIGKILL)
    assert shim.wait() == 137
    with refused("failed_precondition"):
        shim.start()
    shim.delete()
    shim.containerd.wait_topics("create", "exit", "delete")


def test_kill_of_a_created_task_stops_it(shim: Shim) -> None:
    shim.create("/bin/true")
    shim.kill(28)
    with refused("invalid_argument"):
        shim.kill(65)
    assert shim.state().status == task.TaskStatus_CREATED
    shim.kill(15)
    assert shim.wait() == 143
    shim.delete()
    shim.containerd.wait_topics("create", "exit", "delete")


def test_signal_reaches_the_process(shim: Shim) -> None:
    ready = os.open(shim.fifo("out"), os.O_RDONLY | os.O_NONBLOCK)
    script = "trap 'exit 4' TERM; echo ready; while :; do sleep 0.05; done"
    shim.create("/bin/sh", "-c", script, stdout=shim.fifo("out"))
    shim.start()
    poll = select.poll()
    poll.register(ready, select.POLLIN)
    assert poll.poll(20_000)
    os.close(ready)
    shim.kill(15)
    assert shim.wait() == 4


def test_exec(shim: Shim) -> None:
    shim.create("/bin/sleep", "600")
    shim.start()
    shim.add_exec("e1", "/bin/sh", "-c", "exit 5")
    with refused("already_exists"):
        shim.add_exec("e1", "/bin/true")
    assert shim.state("e1").status == task.TaskStatus_CREATED
    shim.start("e1")
    assert shim.wait("e1") == 5
    assert shim.delete("e1").exit_status == 5
    with refused("not_found"):
        shim.state("e1")
    shim.kill(9, everyone=True)
    assert shim.wait() == 137
    shim.delete()
    shim.containerd.wait_topics(
        "create", "start", "exec-added", "exec-started", "exit", "exit", "delete"
    )


def test_exec_of_a_created_task_waits_for_its_start(shim: Shim) -> None:
    """It is known from Exec on; a guest has nothing yet that it could run in."""
    shim.create("/bin/sleep", "600")
    shim.add_exec("e1", "/bin/sh", "-c", "echo from the exec; exit 5", stdout=shim.fifo("out"))
    shim.add_exec("e2", "/bin/true")
    with refused("already_exists"):
        shim.add_exec("e1", "/bin/true")
    with refused("failed_precondition"):
        shim.start("e1")
    assert shim.state("e1").status == task.TaskStatus_CREATED
    assert shim.delete("e2").exit_status == 137
    reader = os.open(shim.fifo("out"), os.O_RDONLY | os.O_NONBLOCK)
    try:
        shim.start()
        shim.start("e1")
        assert shim.wait("e1") == 5
        assert os.read(reader, 100) == b"from the exec\n"
    finally:
        os.close(reader)
    assert shim.delete("e1").exit_status == 5
    shim.containerd.wait_topics(
        "create", "exec-added", "exec-added", "start", "exec-started", "exit"
    )


def test_exec_that_the_guest_refuses_late_can_be_deleted(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BEHAVIOUR", json.dumps({"deny": ["AddProcess"]}))
    shim.create("/bin/sleep", "600")
    shim.add_exec("e1", "/bin/true")
    shim.start()
    with pytest.raises(VmcellError, match="no AddProcess for you"):
        shim.start("e1")
    assert shim.state("e1").status == task.TaskStatus_CREATED
    shim.delete("e1")
    with pytest.raises(VmcellError, match="no AddProcess for you"):
        shim.add_exec("e2", "/bin/true")
    with refused("not_found"):
        shim.state("e2")


def test_exec_with_a_client_that_does_not_read_has_an_exit_before_the_delete(shim: Shim) -> None:
    reader = os.open(shim.fifo("out"), os.O_RDONLY | os.O_NONBLOCK)
    try:
        shim.create("/bin/sh", "-c", "read line; exit 0", stdin=shim.fifo("in"))
        shim.start()
        shim.add_exec("e1", "/bin/sh", "-c", "cat /dev/zero", stdout=shim.fifo("out"))
        shim.start("e1")
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        assert poll.poll(20_000)
        Path(shim.fifo("in")).write_text("go\n")
        assert shim.wait() == 0
        shim.delete()
    finally:
        os.close(reader)
    shim.containerd.wait_topics(
        "create", "start", "exec-added", "exec-started", "exit", "exit", "delete"
    )
    exits = [TaskExit.decode(value) for _, _, value in shim.containerd.events[4:6]]
    assert [(row.id, row.exit_status) for row in exits] == [("c1", 0), ("e1", 137)]


def test_exit_is_published_before_anybody_is_told() -> None:
    order: list[str] = []
    process = Process("c1", "", Stdio(stdin="", stdout="", stderr="", terminal=False, owner=OWNER))

    def wait() -> None:
        process.wait_ended(20)
        order.append("told")

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert process.finish(0, lambda: order.append("published"))
    assert not process.finish(1, lambda: order.append("twice"))
    waiting.join(20)
    assert order == ["published", "told"]


def test_pids_are_never_empty(shim: Shim) -> None:
    pid = shim.create("/bin/sleep", "600")
    request = task.PidsRequest(id="c1")
    rows = shim.call("Pids", request, task.PidsResponse).processes
    assert [row.pid for row in rows] == [pid]
    shim.start()
    shim.add_exec("e1", "/bin/sleep", "600")
    rows = shim.call("Pids", request, task.PidsResponse).processes
    assert rows[1].info is not None
    assert task.ProcessDetails.decode(rows[1].info.value).exec_id == "e1"


def test_stats(shim: Shim) -> None:
    shim.create("/bin/sleep", "600")
    with refused("failed_precondition"):
        shim.call("Stats", task.StatsRequest(id="c1"), task.StatsResponse)
    shim.start()
    stats = shim.call("Stats", task.StatsRequest(id="c1"), task.StatsResponse).stats
    assert stats is not None
    assert stats.type_url == "io.containerd.cgroups.v2.Metrics"
    metrics = Metrics.decode(stats.value)
    assert metrics.memory is not None
    assert metrics.cpu is not None
    assert (metrics.memory.usage, metrics.memory.inactive_file) == (65536, 8192)
    assert metrics.cpu.usage_usec == 5000
    # nerdctl 2.3 takes it for granted.
    assert metrics.io is not None


def test_absent_methods_are_unimplemented(shim: Shim) -> None:
    with refused("unimplemented"):
        shim.call("Nonsense", task.PauseRequest(id="c1"), Empty)


def test_delete_of_a_running_task_is_refused(shim: Shim) -> None:
    shim.create("/bin/sleep", "600")
    shim.start()
    with refused("failed_precondition"):
        shim.delete()
    assert shim.state().status == task.TaskStatus_RUNNING


def test_shutdown_stays_while_a_task_lives(shim: Shim) -> None:
    shim.create("/bin/true")
    shim.call("Shutdown", task.ShutdownRequest(id="c1"), Empty)
    assert not shim.idle.is_set()
    shim.delete()
    shim.call("Shutdown", task.ShutdownRequest(id="c1"), Empty)
    assert shim.idle.is_set()


def test_second_container_is_refused(shim: Shim) -> None:
    shim.create("/bin/true")
    with refused("already_exists"):
        shim.create("/bin/true")
    with refused("failed_precondition"):
        shim.create("/bin/true", container_id="c2")
    assert shim.state().status == task.TaskStatus_CREATED


def test_failed_start_ends_the_task(shim: Shim) -> None:
    """`ctr run` deletes without a kill, which a client refuses for a created task."""
    shim.create("/no/such/program")
    with pytest.raises(VmcellError, match="/no/such/program"):
        shim.start()
    assert shim.state().status == task.TaskStatus_STOPPED
    assert shim.wait() == 127
    shim.delete()
    assert shim.left_behind() == []
    shim.containerd.wait_topics("create", "exit", "delete")


def test_state_answers_while_the_guest_boots(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BEHAVIOUR", json.dumps({"silent": ["Hello"]}))
    errors: list[VmcellError] = []

    def create() -> None:
        try:
            shim.create("/bin/true")
        except VmcellError as error:
            errors.append(error)

    creating = threading.Thread(target=create)
    creating.start()
    wait_until(lambda: _booting(shim), "the boot")
    began = time.monotonic()
    assert shim.state().status == task.TaskStatus_CREATED
    shim.call("Connect", task.ConnectRequest(id="c1"), task.ConnectResponse)
    assert time.monotonic() - began < 1.0
    shim.kill(9)
    creating.join(20)
    assert len(errors) == 1
    assert shim.left_behind() == []


def _booting(shim: Shim) -> bool:
    containers = list(shim.registry._containers.values())
    return bool(containers and containers[0].guest.pid)


FAILURES = {
    "refused by the VMM": ({"refuse": "/dev/kvm cannot run Linux"}, "/dev/kvm cannot run Linux"),
    "hangs up": (
        {"hang_up": "Hello", "console": "Kernel panic - not syncing\n"},
        "Kernel panic - not syncing",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failed_boot_leaves_nothing(shim: Shim, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    behaviour, word = FAILURES[name]
    monkeypatch.setenv("FAKE_BEHAVIOUR", json.dumps(behaviour))
    with pytest.raises(VmcellError, match=word):
        shim.create("/bin/true")
    assert shim.left_behind() == []
    assert not shim.registry.in_use
    assert shim.containerd.topics() == []


def test_surprise_in_create_leaves_nothing(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception nobody planned for, after the VM has been started."""

    def surprise(*_: object) -> None:
        raise RuntimeError("no more ids")

    logged: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: logged.append(args.exc_type))
    monkeypatch.setattr(Stdio, "declare", surprise)
    with refused("internal"):
        shim.create("/bin/true")
    assert shim.left_behind() == []
    assert not shim.registry.in_use
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    wait_until(lambda: logged == [RuntimeError], "the traceback")


def test_time_for_the_image_is_not_time_for_the_boot(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = shim.directory / "bin/mkfs.erofs"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\nsleep 2.5\nexec {shutil.which("mkfs.erofs")} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("VMCELL_BOOT_TIMEOUT_S", "2")
    shim.create("/bin/true")
    shim.start()
    assert shim.wait() == 0


def test_file_system_that_fails_is_one_sentence(shim: Shim) -> None:
    (shim.directory / "cache").write_text("no directory")
    with pytest.raises(VmcellError, match=r"cannot create c1: .*Not a directory"):
        shim.create("/bin/true")
    assert shim.left_behind() == []
    assert not shim.registry.in_use


def test_boot_deadline_is_the_clients(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BEHAVIOUR", json.dumps({"silent": ["Hello"], "console": "early\n"}))
    with pytest.raises(VmcellError):
        shim.create("/bin/true", timeout_s=1.0)
    wait_until(lambda: not shim.registry.in_use, "the roll-back")
    assert shim.left_behind() == []


def test_agent_that_hangs_up_later_loses_its_vm(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BEHAVIOUR", json.dumps({"hang_up": "ContainerStats"}))
    shim.create("/bin/sleep", "600")
    shim.start()
    with pytest.raises(VmcellError):
        shim.call("Stats", task.StatsRequest(id="c1"), task.StatsResponse)
    assert shim.wait() == 137


def test_guest_that_refuses_the_kill_is_killed(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmcell_shim.signals.ANSWER_S", 0.2)
    monkeypatch.setenv("FAKE_BEHAVIOUR", json.dumps({"deny": ["SignalProcess"]}))
    shim.create("/bin/sleep", "600")
    shim.start()
    with pytest.raises(VmcellError, match="no SignalProcess for you"):
        shim.kill(9)
    assert shim.wait() == 137


def test_created_task_with_a_disk_is_deleted_at_once(shim: Shim) -> None:
    shim.create("/bin/true")
    shim.registry._containers["c1"]._saves_writes = True
    began = time.monotonic()
    shim.delete()
    assert time.monotonic() - began < 1.0
    assert shim.left_behind() == []


def test_exit_status_of_a_lying_guest_is_one_byte(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BEHAVIOUR", json.dumps({"exit_status": 4_000_000_000}))
    shim.create("/bin/true")
    shim.start()
    assert shim.wait() == 255


BAD_SPECS = {
    "99": {"annotations": {"io.vmcell.vcpus": "99"}},
    "0 vCPUs": {"annotations": {"io.vmcell.vcpus": "0"}},
    "1 MiB": {"annotations": {"io.vmcell.memory-mib": "1"}},
    "hooks.createContainer": {"hooks": {"createContainer": [{"path": "/bin/true"}]}},
    "/var/run/netns/x": {
        "linux": {"namespaces": [{"type": "network", "path": "/var/run/netns/x"}]}
    },
}


@pytest.mark.parametrize("word", BAD_SPECS)
def test_bad_spec_is_one_sentence(shim: Shim, word: str) -> None:
    with pytest.raises(VmcellError, match=word):
        shim.create("/bin/true", **BAD_SPECS[word])
    assert shim.left_behind() == []
    assert not shim.registry.in_use


def test_malformed_spec(shim: Shim) -> None:
    bundle = shim.bundle(["/bin/true"])
    (bundle / "config.json").write_text('{"process": ')
    request = task.CreateTaskRequest(id="c1", bundle=str(bundle))
    with pytest.raises(VmcellError, match="not valid JSON"):
        shim.call("Create", request, task.CreateTaskResponse)
    assert not shim.registry.in_use


def test_missing_configuration(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMCELL_CONFIG", str(shim.directory / "absent.toml"))
    with pytest.raises(VmcellError, match="vmcell setup"):
        shim.create("/bin/true")
