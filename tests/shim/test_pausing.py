"""Pause, Resume, Update and OOM reports, for a container alone and in a pod."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from fake_vmm import FakeVmm
from shim_harness import Shim, refused

from vmcell_protos import task
from vmcell_protos.errors import CallerError, HostError, VmcellError
from vmcell_protos.wellknown import Any, Empty
from vmcell_shim.guest import Guest
from vmcell_shim.sizing import memory_of_update

Json = dict[str, object]
RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
ENDLESS = ("/bin/sh", "-c", "while :; do sleep 0.01; done")


def pause(shim: Shim) -> None:
    shim.call("Pause", task.PauseRequest(id="c1"), Empty)


def resume(shim: Shim) -> None:
    shim.call("Resume", task.ResumeRequest(id="c1"), Empty)


def update(shim: Shim, resources: Json, type_url: str = RESOURCES) -> None:
    value = Any(type_url=type_url, value=json.dumps(resources).encode())
    shim.call("Update", task.UpdateTaskRequest(id="c1", resources=value), Empty)


def alone(shim: Shim) -> None:
    shim.create(*ENDLESS)
    shim.start()


def in_a_group(shim: Shim) -> None:
    shim.create(*ENDLESS, annotations={"io.containerd.runc.v2.group": "g"})
    shim.start()


@pytest.mark.parametrize("begin", [alone, in_a_group])
def test_pause_and_resume(shim: Shim, begin: Callable[[Shim], None]) -> None:
    begin(shim)
    pause(shim)
    assert shim.state().status == task.TaskStatus_PAUSED
    for call in (pause, lambda shim: shim.add_exec("e1", "/bin/true")):
        with refused("failed_precondition"):
            call(shim)
    resume(shim)
    assert shim.state().status == task.TaskStatus_RUNNING
    with refused("failed_precondition"):
        resume(shim)
    shim.kill()
    assert shim.wait() == 137
    shim.delete()
    shim.containerd.wait_topics("create", "start", "paused", "resumed", "exit", "delete")


@pytest.mark.parametrize("begin", [alone, in_a_group])
def test_a_paused_container_can_be_killed(shim: Shim, begin: Callable[[Shim], None]) -> None:
    begin(shim)
    pause(shim)
    shim.kill(9)
    assert shim.wait() == 137
    shim.delete()
    assert shim.left_behind() == []


@pytest.mark.parametrize("error", [HostError("x", code="deadline_exceeded"), CallerError("x")])
@pytest.mark.parametrize("stuck", ["vmm", "agent"])
def test_a_paused_container_that_does_not_go_on_can_be_killed(
    shim: Shim, monkeypatch: pytest.MonkeyPatch, stuck: str, error: VmcellError
) -> None:
    real = Guest.call

    def call(guest: Guest, method: str, *row: object) -> object:
        if method == "ConfigureGuest":
            raise error
        return real(guest, method, *row)

    def go_on(_: FakeVmm) -> None:
        raise error

    alone(shim)
    pause(shim)
    if stuck == "vmm":
        monkeypatch.setattr(FakeVmm, "resume", go_on)
    else:
        monkeypatch.setattr(Guest, "call", call)
    shim.kill(9)
    assert shim.wait() == 137
    shim.delete()
    assert shim.left_behind() == []


def test_a_signal_to_a_paused_vm_arrives_when_it_goes_on(shim: Shim) -> None:
    alone(shim)
    pause(shim)
    shim.kill(15)
    assert shim.state().status == task.TaskStatus_PAUSED
    resume(shim)
    assert shim.wait() == 143


def test_death_of_a_paused_vm(shim: Shim) -> None:
    alone(shim)
    pause(shim)
    shim.registry.container("c1").guest.kill()
    assert shim.wait() == 137
    shim.delete()
    assert shim.left_behind() == []


def test_update_reaches_the_guest_and_gives_memory_back(shim: Shim) -> None:
    alone(shim)
    handle = shim.registry.container("c1").guest._handle
    assert isinstance(handle, FakeVmm)
    update(shim, {"memory": {"limit": 64 << 20}, "cpu": {"quota": 50000, "period": 100000}})
    assert handle.balloon_mib == 512 - 64 - 96
    update(shim, {"cpu": {"shares": 512}})
    assert handle.balloon_mib == 512 - 64 - 96
    update(shim, {"memory": {"limit": -1}})
    assert handle.balloon_mib == 0


@pytest.mark.parametrize(
    ("resources", "word"),
    [
        ({"memory": {"limit": 4 << 30}}, "512 MiB"),
        ({"cpu": {"quota": 300000, "period": 100000}}, "3 vCPUs"),
        ({"memory": {"limit": "much"}}, "memory.limit"),
    ],
)
def test_update_beyond_the_vm_is_refused(shim: Shim, resources: Json, word: str) -> None:
    alone(shim)
    with pytest.raises(VmcellError, match=word):
        update(shim, resources)


def test_update_of_something_else_is_refused(shim: Shim) -> None:
    alone(shim)
    with pytest.raises(VmcellError, match="LinuxResources"):
        update(shim, {}, "windows.WindowsResources")


def test_memory_of_update_says_nothing_without_a_limit() -> None:
    assert memory_of_update({}, vcpus=1, memory_mib=512) is None
    assert memory_of_update({"memory": {"limit": 1 << 62}}, vcpus=1, memory_mib=512) == 512


def test_oom_is_told_before_the_exit(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BEHAVIOUR", json.dumps({"oom": True}))
    shim.create("/bin/sh", "-c", "kill -9 $$")
    shim.start()
    assert shim.wait() == 137
    shim.delete()
    shim.containerd.wait_topics("create", "start", "oom", "exit", "delete")
