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
    metrics = sandbox.SandboxMetricsRequest(sandbox_id=POD)
    with pytest.raises(VmcellError, match="containers'"):
        call(shim, "SandboxMetrics", metrics, sandbox.SandboxMetricsResponse)
    shut_down(shim)


def test_a_boot_that_fails_leaves_nothing(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BEHAVIOUR", '{"refuse": "no KVM here"}')
    create(shim)
    with pytest.raises(VmcellError, match="no KVM here"):
        start(shim)
    assert status(shim).state == NOT_READY
    shut_down(shim)
    assert shim.left_behind() == []
