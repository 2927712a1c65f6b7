"""Kubernetes' side of a real containerd, with the real shim binary and a fake guest.

The pod's network is real: a namespace, CNI's plugins, TAPs. Of the handlers, vmcell has a sandbox
container (1.6, and the default of 2.x), vmcell-shim is the same with `sandboxer = "shim"`.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from containerd_release import DEBIAN, NEWER, find_release
from cri.client import CriClient, Pod, wait_for
from private_containerd import IMAGE, PrivateContainerd
from shim_harness import wait_until

pytestmark = pytest.mark.root

SLEEP = ("sleep", "600")
SANDBOXES = [(DEBIAN, "vmcell"), (NEWER, "vmcell"), (NEWER, "vmcell-shim")]


@pytest.fixture(scope="module", params=SANDBOXES, ids="-".join)
def sandboxes(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(release, handler)"""
    release, handler = request.param
    return release, handler


@pytest.fixture(scope="module")
def daemon(
    sandboxes: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrivateContainerd]:
    release = find_release(sandboxes[0])
    containerd = PrivateContainerd(
        tmp_path_factory.mktemp("cri"), fake_guest=True, cri=True, release=release
    )
    containerd.start()
    try:
        containerd.import_image(namespace="k8s.io")
        yield containerd
    finally:
        containerd.kill()


@pytest.fixture
def cri(sandboxes: tuple[str, str], daemon: PrivateContainerd) -> Iterator[CriClient]:
    with CriClient(f"unix://{daemon.socket}", handler=sandboxes[1]) as client:
        client.wait_ready()
        yield client
    wait_until(lambda: daemon.leftovers() == [], f"an end of {daemon.leftovers()}")


@contextmanager
def running_pod(cri: CriClient, logs: Path, name: str = "pod") -> Iterator[Pod]:
    pod = cri.run_pod(cri.pod_config(name, log_directory=str(logs)))
    try:
        yield pod
    finally:
        cri.stop_pod(pod)
        cri.remove_pod(pod)


def test_version_and_image(cri: CriClient) -> None:
    assert cri.call("Version").runtime_name == "containerd"
    conditions = cri.call("Status").status.conditions
    ready = {row.type: row.status for row in conditions}
    assert ready["RuntimeReady"]
    assert ready["NetworkReady"]
    image = cri.messages.ImageSpec(image=IMAGE)
    assert IMAGE in cri.call("ImageStatus", image=image).image.repo_tags
    (listed,) = cri.call("ListImages").images
    assert listed.size > 0


def test_life_of_a_pod(cri: CriClient, tmp_path: Path) -> None:
    with running_pod(cri, tmp_path) as pod:
        status = cri.pod_status(pod)
        assert status.state == cri.messages.SANDBOX_READY
        assert status.network.ip.startswith("10.88.")
        script = "trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.05; done"
        container = cri.run(pod, "first", IMAGE, "sh", "-c", script)
        log = tmp_path / "first.log"
        wait_for(log.read_text, lambda text: "ready" in text, 20)
        done = cri.exec_sync(container, "sh", "-c", "echo out; echo err >&2; exit 7")
        assert (done.stdout, done.stderr, done.exit_code) == (b"out\n", b"err\n", 7)
        assert cri.stats(container).memory.usage_bytes.value == 65536
        limits = cri.messages.LinuxContainerResources(memory_limit_in_bytes=32 << 20)
        cri.call("UpdateContainerResources", container_id=container, linux=limits)
        second = cri.run(pod, "second", IMAGE, *SLEEP)
        cri.stop(container, 20)
        assert cri.status(container).exit_code == 4
        assert "stdout F bye" in log.read_text()
        cri.remove(container)
        assert cri.exec_sync(second, "echo", "alive").stdout == b"alive\n"
    assert not cri.call("ListPodSandbox").items
    assert not cri.call("ListContainers").containers


def test_a_killed_vmm_is_the_end_of_the_pod(cri: CriClient, tmp_path: Path) -> None:
    with running_pod(cri, tmp_path) as pod:
        container = cri.run(pod, "only", IMAGE, *SLEEP)
        info = cri.call("PodSandboxStatus", pod_sandbox_id=pod.id, verbose=True).info
        os.kill(vmm_of(info), signal.SIGKILL)
        assert cri.wait_exit(container, 20).exit_code == 137
        not_ready = cri.messages.SANDBOX_NOTREADY
        wait_for(lambda: cri.pod_status(pod).state, lambda state: state == not_ready, 20)


def test_a_killed_shim_takes_its_pod_along(
    cri: CriClient, daemon: PrivateContainerd, tmp_path: Path
) -> None:
    with running_pod(cri, tmp_path) as pod:
        container = cri.run(pod, "only", IMAGE, *SLEEP)
        info = cri.call("PodSandboxStatus", pod_sandbox_id=pod.id, verbose=True).info
        vmm = vmm_of(info)
        (shim,) = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and daemon.is_shim(command_line(entry))
        ]
        os.kill(shim, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{vmm}").exists(), "the VMM's end", 6)
        assert cri.wait_exit(container, 20).exit_code in (137, 255)
        not_ready = cri.messages.SANDBOX_NOTREADY
        wait_for(lambda: cri.pod_status(pod).state, lambda state: state == not_ready, 20)


def command_line(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_a_pod_survives_containerd(
    cri: CriClient, daemon: PrivateContainerd, tmp_path: Path
) -> None:
    """kill -9, a container that ends in the gap, a new daemon: all is known, nothing is lost."""
    go = tmp_path / "go"
    os.mkfifo(go)
    with running_pod(cri, tmp_path) as pod:
        kept = cri.run(pod, "kept", IMAGE, *SLEEP)
        gap = cri.run(pod, "gap", IMAGE, "sh", "-c", f"read line <{go}; echo after; exit 8")
        daemon.kill()
        go.write_text("go\n")
        daemon.start()
        cri.wait_ready()
        assert cri.wait_exit(gap, 20).exit_code == 8
        assert cri.pod_status(pod).state == cri.messages.SANDBOX_READY
        assert cri.status(kept).state == cri.messages.CONTAINER_RUNNING
        assert cri.exec_sync(kept, "echo", "alive").stdout == b"alive\n"


def test_pod_on_the_hosts_network_is_refused(cri: CriClient, tmp_path: Path) -> None:
    config = cri.pod_config("refused", log_directory=str(tmp_path))
    options = config.linux.security_context.namespace_options
    options.network = cri.messages.NamespaceMode.Value("NODE")
    with pytest.raises(grpc.RpcError) as caught:
        cri.run_pod(config)
    assert "a microVM has a network of its own" in caught.value.details()
    assert not cri.call("ListPodSandbox").items


def test_unknown_handler_is_named(cri: CriClient, tmp_path: Path) -> None:
    config = cri.pod_config("unknown", log_directory=str(tmp_path))
    with pytest.raises(grpc.RpcError) as caught:
        cri.call("RunPodSandbox", config=config, runtime_handler="no-such-handler")
    assert "no-such-handler" in caught.value.details()


def vmm_of(info: dict[str, str]) -> int:
    """By CRI's verbose status: its own for a sandbox container, else what the shim adds."""
    pid = int(info.get("vmm_pid", "0")) or int(json.loads(info["info"])["pid"])
    assert pid > 1, info
    return pid
