"""Pods: one fake VM, a pause container that runs nothing, members plugged in and out."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
from fake_share import FakeShare
from fake_vmm import FakeVmm
from shim_harness import Shim, refused

from vmcell_protos import task
from vmcell_protos.errors import VmcellError
from vmcell_protos.wellknown import Empty
from vmcell_shim import delete as delete_action

POD = "p1"
SANDBOX = {
    "io.kubernetes.cri.container-type": "sandbox",
    "io.kubernetes.cri.sandbox-id": POD,
    "io.kubernetes.cri.sandbox-memory": str(200 << 20),
    "io.kubernetes.cri.sandbox-cpu-quota": "150000",
    "io.kubernetes.cri.sandbox-cpu-period": "100000",
}
MEMBER = {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.sandbox-id": POD,
}


def start_pod(shim: Shim) -> int:
    pid = shim.create("/pause", container_id=POD, annotations=SANDBOX)
    assert shim.start(container_id=POD) == pid
    return pid


def member(shim: Shim, container_id: str, *args: str, **changes: Any) -> int:
    return shim.create(*args, container_id=container_id, annotations=MEMBER, **changes)


def vmm_of(shim: Shim) -> FakeVmm:
    handle = shim.registry.container(POD).guest._handle
    assert isinstance(handle, FakeVmm)
    return handle


def test_life_of_a_pod(shim: Shim) -> None:
    pid = start_pod(shim)
    vmm = vmm_of(shim)
    assert (vmm.config.vcpu_count, vmm.config.memory_mib) == (2, 296)
    assert len(vmm.config.pmem) == 1
    for name in ("a", "b"):
        assert member(shim, name, "/bin/sh", "-c", "exit 5") == pid
    assert len(vmm.plugged) == 4
    shim.start(container_id="a")
    assert shim.wait(container_id="a") == 5
    assert shim.delete(container_id="a").exit_status == 5
    assert len(vmm.plugged) == 2
    assert shim.state(container_id="b").status == task.TaskStatus_CREATED
    assert shim.state(container_id=POD).status == task.TaskStatus_RUNNING
    shim.kill(container_id="b")
    shim.delete(container_id="b")
    assert vmm.plugged == {}
    shim.kill(container_id=POD)
    assert shim.wait(container_id=POD) == 137
    assert shim.delete(container_id=POD).exit_status == 137
    assert shim.left_behind() == []
    assert not shim.registry.in_use
    shim.containerd.wait_topics(
        *("create", "start", "create", "create"),
        *("start", "exit", "delete", "exit", "delete", "exit", "delete"),
    )


def test_shared_namespaces_and_memory_reach_the_guest(shim: Shim) -> None:
    start_pod(shim)
    namespaces = [{"type": kind, "path": f"/proc/7/ns/{kind}"} for kind in ("ipc", "uts", "pid")]
    namespaces += [{"type": "network", "path": "/proc/7/ns/net"}, {"type": "mount"}]
    shm = {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind"]}
    member(shim, "a", "/bin/true", linux={"namespaces": namespaces}, mounts=[shm])
    record = shim.record()
    assert record["shared_namespaces"] == ["ipc", "uts", "pid"]
    assert record["spec"]["linux"]["namespaces"] == [{"type": "mount"}]
    assert record["spec"]["mounts"][0]["type"] == "vmcell-shm"
    assert record["lower_devices"] != ["pmem1"]


def test_the_end_of_the_pause_container_ends_all(shim: Shim) -> None:
    start_pod(shim)
    member(shim, "a", "/bin/sleep", "600")
    shim.start(container_id="a")
    shim.kill(15, container_id=POD)
    assert shim.wait(container_id=POD) == 0
    assert shim.wait(container_id="a") == 137
    shim.delete(container_id=POD)
    shim.delete(container_id="a")
    assert shim.left_behind() == []
    assert not shim.registry.in_use


def test_death_of_the_vm_ends_pause_and_members(shim: Shim) -> None:
    pid = start_pod(shim)
    member(shim, "a", "/bin/sleep", "600")
    shim.start(container_id="a")
    os.kill(pid, signal.SIGKILL)
    assert (shim.wait(container_id=POD), shim.wait(container_id="a")) == (137, 137)
    with refused("not_found"):
        shim.kill(container_id="a")
    shim.delete(container_id="a")
    shim.delete(container_id=POD)
    assert shim.left_behind() == []


def test_a_shim_leaves_with_the_last_member_of_a_dead_pod(shim: Shim) -> None:
    """containerd 2.x asks for the end once, when the sandbox container is deleted."""
    pid = start_pod(shim)
    member(shim, "a", "/bin/sleep", "600")
    member(shim, "b", "/bin/sleep", "600")
    shim.call("Shutdown", task.ShutdownRequest(id="a"), Empty)
    os.kill(pid, signal.SIGKILL)
    assert shim.wait(container_id=POD) == 137
    shim.delete(container_id=POD)
    shim.call("Shutdown", task.ShutdownRequest(id=POD), Empty)
    shim.wait(container_id="a")
    shim.delete(container_id="a")
    assert not shim.idle.is_set()
    shim.wait(container_id="b")
    shim.delete(container_id="b")
    assert shim.idle.is_set()


def test_a_pod_has_only_so_many_windows(shim: Shim) -> None:
    start_pod(shim)
    vmm = vmm_of(shim)
    for number in range(12):
        member(shim, f"m{number}", "/bin/true")
    with refused("resource_exhausted"):
        member(shim, "m12", "/bin/true")
    assert len(vmm.plugged) == 24
    shim.kill(container_id="m3")
    shim.delete(container_id="m3")
    member(shim, "m12", "/bin/true")
    assert len(vmm.plugged) == 24


def test_a_member_that_cannot_be_made_leaves_the_pod_as_it_was(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_pod(shim)
    with pytest.raises(VmcellError, match="devices"):
        member(shim, "a", "/bin/true", mounts=[{"destination": "/x", "type": "devices"}])
    assert vmm_of(shim).plugged == {}
    assert shim.state(container_id=POD).status == task.TaskStatus_RUNNING
    with refused("not_found"):
        shim.state(container_id="a")
    member(shim, "a", "/bin/true")


def test_hooks_of_a_member_are_refused(shim: Shim) -> None:
    start_pod(shim)
    with pytest.raises(VmcellError, match="hooks"):
        member(shim, "a", "/bin/true", hooks={"poststop": [{"path": "/bin/true"}]})


def test_pause_container_runs_nothing(shim: Shim) -> None:
    start_pod(shim)
    for request, method in (
        (task.ExecProcessRequest(id=POD, exec_id="e"), "Exec"),
        (task.PauseRequest(id=POD), "Pause"),
    ):
        with refused("failed_precondition"):
            shim.call(method, request, task.PidsResponse)
    with refused("not_found"):
        shim.call("Stats", task.StatsRequest(id=POD), task.StatsResponse)
    shim.kill(28, container_id=POD)
    assert shim.state(container_id=POD).status == task.TaskStatus_RUNNING


def test_a_stranger_is_refused(shim: Shim) -> None:
    start_pod(shim)
    with refused("failed_precondition"):
        shim.create("/bin/true", container_id="c9")
    other = {**MEMBER, "io.kubernetes.cri.sandbox-id": "p2"}
    with refused("failed_precondition"):
        shim.create("/bin/true", container_id="c9", annotations=other)
    with refused("failed_precondition"):
        shim.create("/pause", container_id="c9", annotations=SANDBOX)


def test_a_group_without_a_pause_container_ends_with_its_last_member(shim: Shim) -> None:
    group = {"io.containerd.runc.v2.group": "g"}
    for name in ("a", "b"):
        shim.create("/bin/sleep", "600", container_id=name, annotations=group)
    handle = shim.registry.container("b").guest._handle
    assert isinstance(handle, FakeVmm)
    assert (len(handle.config.pmem), handle.config.blk) == (1, ())
    pid = shim.state(container_id="b").pid
    for name in ("a", "b"):
        os.kill(pid, 0)
        shim.kill(container_id=name)
        shim.delete(container_id=name)
        # containerd runs it after every end.
        delete_action.delete(str(shim.directory / f"bundle-{name}"))
    assert not shim.registry.in_use
    assert shim.left_behind() == []


def test_delete_of_a_member_leaves_the_living_pod(shim: Shim) -> None:
    pid = start_pod(shim)
    member(shim, "a", "/bin/true")
    delete_action.delete(str(shim.directory / "bundle-a"))
    os.kill(pid, 0)
    assert (shim.directory / "run/test/p1/state.json").exists()
    assert not (shim.directory / "run/test/a").exists()


def test_delete_of_a_pod_takes_its_members_along(shim: Shim) -> None:
    """containerd 2.x runs no other one when the pod's shim has died."""
    start_pod(shim)
    member(shim, "a", "/bin/sleep", "600")
    member(shim, "gone", "/bin/true")
    shim.delete(container_id="gone")
    state = shim.directory / "run/test/p1/state.json"
    assert [path.name for path in state.parent.glob("member-*")] == ["member-a"]
    record = json.loads(state.read_text())
    record["shim"][1] -= 1  # as if another process had that pid by now
    state.write_text(json.dumps(record))
    delete_action.delete(str(shim.directory / "bundle-p1"))
    assert shim.wait(container_id=POD) == 137
    assert shim.left_behind() == []
    # And that of a member, as by 1.6, finds nothing to do.
    delete_action.delete(str(shim.directory / "bundle-a"))


def test_delete_of_a_member_takes_a_pod_without_shim_along(shim: Shim) -> None:
    pid = start_pod(shim)
    member(shim, "a", "/bin/true")
    state = shim.directory / "run/test/p1/state.json"
    record = json.loads(state.read_text())
    record["shim"][1] -= 1  # as if another process had that pid by now
    state.write_text(json.dumps(record))
    delete_action.delete(str(shim.directory / "bundle-a"))
    assert shim.wait(container_id=POD) == 137
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not (shim.directory / "run/test/p1").exists()


def test_live_directories_are_shared_and_taken_back(shim: Shim) -> None:
    start_pod(shim)
    data = shim.directory / "data"
    data.mkdir()
    bind = {"destination": "/data", "type": "bind", "source": str(data), "options": ["rbind", "rw"]}
    member(shim, "a", "/bin/true", mounts=[bind])
    share = shim.registry.container(POD).sandbox._share
    assert isinstance(share, FakeShare)
    assert share.sources == {0: (str(data), False)}
    (mount,) = shim.record()["spec"]["mounts"]
    assert (mount["type"], mount["source"]) == ("virtiofs", "0")
    shim.kill(container_id="a")
    shim.delete(container_id="a")
    assert share.sources == {}
