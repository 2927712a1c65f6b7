"""containerd's sandbox API over ttrpc: a pod's VM without a sandbox container."""

from __future__ import annotations

import os
import signal
import threading
from typing import TypeVar

import pytest
from shim_harness import DEADLINE_S, Shim

from vmcell_protos import sandbox
from vmcell_protos.errors import VmcellError
from vmcell_protos.metrics import Metrics
from vmcell_protos.wellknown import Empty
from vmcell_protos.wire import Message
from vmcell_shim.sandbox_service import NOT_READY, READY, SERVICE

M = TypeVar("M", bound=Message)
POD = "p1"
MEMBER = {"io.kubernetes.cri.sandbox-id": POD, "io.kubernetes.cri.container-type": "container"}


def call(shim: Shim, method: str, request: Message, answer: type[M]) -> M:
    return shim.client.call(SERVICE, method, request, answer, DEADLINE_S)


def create(shim: Shim) -> None:
    bundle = shim.directory / "pod"
    bundle.mkdir()
    request = sandbox.CreateSandboxRequest(sandbox_id=POD, bundle_path=str(bundle))
    call(shim, "CreateSandbox", request, Empty)


def start(shim: Shim) -> int:
    request = sandbox.StartSandboxRequest(sandbox_id=POD)
    return call(shim, "StartSandbox", request, sandbox.StartSandboxResponse).pid


def status(shim: Shim, *, verbose: bool = False) -> sandbox.SandboxStatusResponse:
    request = sandbox.SandboxStatusRequest(sandbox_id=POD, verbose=verbose)
    return call(shim, "SandboxStatus", request, sandbox.SandboxStatusResponse)


def wait(shim: Shim) -> sandbox.WaitSandboxResponse:
    request = sandbox.WaitSandboxRequest(sandbox_id=POD)
    return call(shim, "WaitSandbox", request, sandbox.WaitSandboxResponse)


def shut_down(shim: Shim) -> None:
    request = sandbox.ShutdownSandboxRequest(sandbox_id=POD)
    call(shim, "ShutdownSandbox", request, Empty)


def test_life_of_a_sandbox(shim: Shim) -> None:
    create(shim)
    assert status(shim).state == NOT_READY
    pid = start(shim)
    call(shim, "PingSandbox", sandbox.PingRequest(sandbox_id=POD), Empty)
    answer = call(
        shim, "Platform", sandbox.PlatformRequest(sandbox_id=POD), sandbox.PlatformResponse
    )
    assert answer.platform is not None
    assert (answer.platform.os, answer.platform.architecture) == ("linux", "amd64")
    assert shim.create("/bin/sh", "-c", "exit 4", annotations=MEMBER) == pid
    shim.start()
    assert shim.wait() == 4
    shim.delete()
    told = status(shim, verbose=True)
    assert (told.pid, told.state, told.info["vcpus"]) == (pid, READY, "1")
    waiting = threading.Thread(target=wait, args=(shim,))
    waiting.start()
    request = sandbox.StopSandboxRequest(sandbox_id=POD, timeout_secs=5)
    call(shim, "StopSandbox", request, Empty)
    waiting.join(DEADLINE_S)
    assert not waiting.is_alive()
    assert status(shim).state == NOT_READY
    shut_down(shim)
    assert shim.idle.wait(DEADLINE_S)
    assert shim.left_behind() == []


def test_members_have_the_pods_files_where_nothing_is_mounted(shim: Shim) -> None:
    create(shim)
    start(shim)
    own = shim.directory / "hosts"
    own.write_text("127.0.0.1 own\n")
    mount = {"destination": "/etc/hosts", "type": "bind", "source": str(own), "options": ["bind"]}
    shim.create("/bin/true", annotations=MEMBER, mounts=[mount])
    files = shim.record()["files"]
    assert sorted(files) == ["/etc/hosts", "/etc/resolv.conf"]
    shim.delete()
    shut_down(shim)


def test_a_dead_vm_is_not_ready(shim: Shim) -> None:
    create(shim)
    os.kill(start(shim), signal.SIGKILL)
    assert wait(shim).exit_status == 137
    assert status(shim).state == NOT_READY
    shut_down(shim)


def test_refusals(shim: Shim) -> None:
    with pytest.raises(VmcellError, match="does not exist"):
        start(shim)
    with pytest.raises(VmcellError, match="no method"):
        call(shim, "Dance", sandbox.PingRequest(sandbox_id=POD), Empty)
    create(shim)
    request = sandbox.CreateSandboxRequest(sandbox_id="p2", bundle_path="/")
    with pytest.raises(VmcellError, match="already"):
        call(shim, "CreateSandbox", request, Empty)
    shut_down(shim)


def test_metrics_are_those_of_its_running_containers(shim: Shim) -> None:
    create(shim)
    start(shim)
    assert cpu_and_memory(shim) == (0, 0)
    for name in ("c1", "c2", "never-started"):
        shim.create("/bin/sleep", "600", container_id=name, annotations=MEMBER)
    for name in ("c1", "c2"):
        shim.start(container_id=name)
    assert cpu_and_memory(shim) == (2 * 5000, 2 * 65536)
    shim.kill(container_id="c1")
    shim.wait(container_id="c1")
    assert cpu_and_memory(shim) == (5000, 65536)
    with pytest.raises(VmcellError, match="p2 does not exist"):
        metrics_of(shim, "p2")
    for name in ("c1", "never-started"):
        shim.delete(container_id=name)
    shim.kill(container_id="c2")
    shim.wait(container_id="c2")
    shim.delete(container_id="c2")
    shut_down(shim)
    assert shim.left_behind() == []


def metrics_of(shim: Shim, name: str = POD) -> sandbox.Metric:
    request = sandbox.SandboxMetricsRequest(sandbox_id=name)
    metric = call(shim, "SandboxMetrics", request, sandbox.SandboxMetricsResponse).metrics
    assert metric is not None
    return metric


def cpu_and_memory(shim: Shim) -> tuple[int, int]:
    metric = metrics_of(shim)
    assert metric.id == POD
    assert metric.data is not None
    assert metric.timestamp is not None
    numbers = Metrics.decode(metric.data.value)
    assert numbers.cpu is not None
    assert numbers.memory is not None
    return numbers.cpu.usage_usec, numbers.memory.usage


def test_a_boot_that_fails_leaves_nothing(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BEHAVIOUR", '{"refuse": "no KVM here"}')
    create(shim)
    with pytest.raises(VmcellError, match="no KVM here"):
        start(shim)
    assert status(shim).state == NOT_READY
    shut_down(shim)
    assert shim.left_behind() == []
