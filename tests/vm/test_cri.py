"""Pods as a kubelet makes them: containerd's CRI plugin in the dev VM, two containers in a microVM.

VMCELL_CRI_HANDLER=runc runs the same tests on runc's pods: what fails there is a wrong test.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cri.client import CriClient, Pod, wait_for
from cri.streams import STDERR, STDOUT
from dev_vm import SMALL, DevVm

pytestmark = pytest.mark.vm

SLEEP = ("sleep", "100000")
# In the VM, so that what watches files there sees them change.
VOLUMES = "/run/cri-volumes"
LOG_LINE_FIELDS = 4


@dataclass(frozen=True)
class TwoContainers:
    """A pod with a server and a client; `logs` is its log folder, on this host."""

    pod: Pod
    server: str
    client: str
    logs: Path


def log_folder(dev_vm: DevVm, name: str) -> tuple[str, Path]:
    """(path in the VM, path here) of a new folder for a pod's logs."""
    here = dev_vm.out / "pods" / name
    here.mkdir(parents=True, exist_ok=True)
    return f"/mnt/out/pods/{name}", here


@contextlib.contextmanager
def running_pod(cri: CriClient, dev_vm: DevVm, name: str, **settings: bool) -> Iterator[Pod]:
    """A pod that is stopped and removed with all its containers, as a kubelet does it."""
    inside, _ = log_folder(dev_vm, name)
    pod = cri.run_pod(cri.pod_config(name, log_directory=inside, **settings))
    try:
        yield pod
    finally:
        cri.stop_pod(pod)
        cri.remove_pod(pod)


@pytest.fixture(scope="module")
def pods_leave_nothing(dev_vm: DevVm) -> Iterator[None]:
    from vmcell_tools.leak_check import leaks

    before = dev_vm.inventory()
    yield
    assert not leaks(before, dev_vm.inventory())


@pytest.fixture(scope="module")
def two(cri: CriClient, dev_vm: DevVm, pods_leave_nothing: None) -> Iterator[TwoContainers]:
    """One pod for all tests that leave it as it is; a boot is what costs."""
    serve = (
        "mkdir /tmp/www && echo served >/tmp/www/index.html && echo started && echo warned >&2 && "
        "exec httpd -f -p 8080 -h /tmp/www"
    )
    with running_pod(cri, dev_vm, "two") as pod:
        server = cri.run(pod, "server", SMALL, "sh", "-c", serve)
        client = cri.run(pod, "client", SMALL, *SLEEP)
        yield TwoContainers(pod, server, client, log_folder(dev_vm, "two")[1])


def test_pod_is_ready_and_listed(cri: CriClient, two: TwoContainers) -> None:
    status = cri.pod_status(two.pod)
    assert status.state == cri.messages.SANDBOX_READY
    assert status.runtime_handler == cri.handler
    assert status.network.ip.startswith("10.88.")
    assert [row.id for row in cri.call("ListPodSandbox").items] == [two.pod.id]
    containers = {row.metadata.name: row for row in cri.call("ListContainers").containers}
    assert sorted(containers) == ["client", "server"]
    assert {row.state for row in containers.values()} == {cri.messages.CONTAINER_RUNNING}
    assert {row.pod_sandbox_id for row in containers.values()} == {two.pod.id}


def test_containers_share_what_a_pod_shares(cri: CriClient, two: TwoContainers) -> None:
    """The network, the host name and /dev/shm; not the processes, not the files."""
    fetch = "wget -q -O - http://127.0.0.1:8080/"
    wait_for(
        lambda: cri.exec_sync(two.client, "sh", "-c", fetch), lambda row: not row.exit_code, 30
    )
    assert cri.shell(two.client, fetch) == "served\n"
    ip = cri.pod_status(two.pod).network.ip
    for container in (two.server, two.client):
        assert cri.shell(container, "hostname") == "two\n"
        assert f"inet {ip}/" in cri.shell(container, "ip -4 addr show eth0")
    cri.shell(two.client, "echo shared >/dev/shm/mark; echo own >/tmp/mark")
    assert cri.shell(two.server, "cat /dev/shm/mark; ls /tmp") == "shared\nwww\n"
    assert "httpd" not in cri.shell(two.client, "ps")


def test_pod_is_reached_by_its_address(cri: CriClient, two: TwoContainers, dev_vm: DevVm) -> None:
    ip = cri.pod_status(two.pod).network.ip
    fetch = ("busybox", "wget", "-q", "-O", "-", f"http://{ip}:8080/")
    # Refused once in six runs, by whom is not known; a kubelet's probes ask again as well.
    done = wait_for(lambda: dev_vm.run(*fetch), lambda done: done.code == 0, 30)
    assert done.stdout == b"served\n", dev_vm.check("ip", "route", "get", ip)


def test_exec(cri: CriClient, two: TwoContainers) -> None:
    done = cri.exec_sync(two.client, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.stdout, done.stderr, done.exit_code) == (b"out\n", b"err\n", 7)
    assert cri.exec_sync(two.client, "cat").stdout == b"", "no stdin is its end"


def test_exec_of_a_missing_program(cri: CriClient, two: TwoContainers) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        cri.exec_sync(two.client, "/no/such/program")
    assert "/no/such/program" in caught.value.details()


def test_exec_with_a_timeout(cri: CriClient, two: TwoContainers) -> None:
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        cri.exec_sync(two.client, "sleep", "4242", timeout_s=2)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED, caught.value
    assert time.monotonic() - began < 30
    assert "4242" not in cri.shell(two.client, "ps")
    assert cri.status(two.client).state == cri.messages.CONTAINER_RUNNING


def test_exec_with_streams(cri: CriClient, two: TwoContainers) -> None:
    script = "read line; echo got $line; echo err >&2; exit 3"
    with cri.exec(two.client, "sh", "-c", script) as streams:
        streams.send(b"a line\n")
        assert streams.to_end() == 3
        assert (streams.output[STDOUT], streams.output[STDERR]) == (b"got a line\n", b"err\n")


def test_exec_with_a_terminal(cri: CriClient, two: TwoContainers) -> None:
    script = (
        'read line; until [ "$(stty size 2>/dev/null)" = "42 101" ]; do sleep 0.1; done; '
        "tty; exit 6"
    )
    with cri.exec(two.client, "sh", "-c", script, tty=True) as streams:
        streams.send(b"go\n")
        # What is typed comes back.
        streams.wait_for(STDOUT, b"go\r\n")
        streams.resize(101, 42)
        assert streams.to_end() == 6
        assert b"/dev/pts/" in streams.output[STDOUT]


def test_logs(two: TwoContainers) -> None:
    """<time> <stream> <tag> <text>, as kubelet reads them (CRI logging.md)."""
    path = two.logs / "server.log"
    lines = wait_for(lambda: path.read_text().splitlines(), lambda rows: len(rows) >= 2, 60)
    rows = [line.split(" ", LOG_LINE_FIELDS - 1) for line in lines]
    assert sorted(row[1:] for row in rows) == [
        ["stderr", "F", "warned"],
        ["stdout", "F", "started"],
    ]


def test_stats(cri: CriClient, two: TwoContainers) -> None:
    cri.shell(two.client, "i=0; while [ $i -lt 2000 ]; do i=$((i + 1)); done")
    stats = wait_for(
        lambda: cri.stats(two.client), lambda row: row.cpu.usage_core_nano_seconds.value, 60
    )
    assert stats.attributes.metadata.name == "client"
    assert 0 < stats.memory.working_set_bytes.value < 1 << 30


def test_port_forward(cri: CriClient, two: TwoContainers) -> None:
    request = b"GET / HTTP/1.0\r\n\r\n"
    answer = cri.port_forward(two.pod, 8080, request)
    assert answer.startswith(b"HTTP/1.")
    assert answer.endswith(b"\r\n\r\nserved\n")


def test_attach(cri: CriClient, two: TwoContainers) -> None:
    script = "while read line; do echo got $line; [ $line = end ] && exit 5; done"
    container = cri.run(two.pod, "attached", SMALL, "sh", "-c", script, stdin=True)
    with cri.attach(container) as streams:
        streams.send(b"first\n")
        streams.wait_for(STDOUT, b"got first\n")
    # A client that goes away is no end of input, for stdin_once is not set.
    with cri.attach(container) as streams:
        streams.send(b"end\n")
        streams.wait_for(STDOUT, b"got end\n")
    assert cri.wait_exit(container).exit_code == 5
    cri.remove(container)


def test_update(cri: CriClient, two: TwoContainers) -> None:
    limits = cri.messages.LinuxContainerResources(memory_limit_in_bytes=100 << 20)
    cri.call("UpdateContainerResources", container_id=two.client, linux=limits)
    assert cri.shell(two.client, "cat /sys/fs/cgroup/memory.max") == f"{100 << 20}\n"


def test_oom_kill_is_reported(cri: CriClient, two: TwoContainers) -> None:
    """Of one container; the other one does not notice."""
    hog = ("dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1")
    container = cri.run(two.pod, "hog", SMALL, *hog, memory_bytes=32 << 20)
    status = cri.wait_exit(container)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    cri.remove(container)
    assert cri.shell(two.client, "echo alive") == "alive\n"


def test_graceful_stop(cri: CriClient, two: TwoContainers) -> None:
    script = "trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.2; done"
    container = cri.run(two.pod, "graceful", SMALL, "sh", "-c", script)
    log = two.logs / "graceful.log"
    wait_for(lambda: log.read_text(), lambda text: "ready" in text, 60)
    assert cri.stop(container, 60) < 50
    status = cri.status(container)
    assert (status.state, status.exit_code) == (cri.messages.CONTAINER_EXITED, 4)
    assert "stdout F bye" in log.read_text(), "the last words are in the log"
    cri.remove(container)


def test_forced_stop(cri: CriClient, two: TwoContainers) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 0.2; done"
    container = cri.run(two.pod, "forced", SMALL, "sh", "-c", script)
    wait_for(lambda: (two.logs / "forced.log").read_text(), lambda text: "ready" in text, 60)
    assert cri.stop(container, 3) < 40
    assert cri.status(container).exit_code == 137
    cri.remove(container)


def test_container_that_ends_is_replaced(cri: CriClient, two: TwoContainers) -> None:
    """As restartPolicy does it: the next attempt beside the first, then the first is removed."""
    first = cri.run(two.pod, "again-0", SMALL, "sh", "-c", "exit 9")
    assert cri.wait_exit(first).exit_code == 9
    second = cri.run(two.pod, "again-1", SMALL, *SLEEP)
    cri.remove(first)
    assert cri.shell(second, "echo second") == "second\n"
    cri.stop(second, 0)
    cri.remove(second)


def test_config_map_is_refreshed(cri: CriClient, two: TwoContainers, dev_vm: DevVm) -> None:
    """kubelet writes a new folder and swaps the link `..data` (volume/util/atomic_writer.go)."""
    place = f"{VOLUMES}/config"
    dev_vm.check(
        "sh", "-c",
        f"mkdir -p {place}/..1 && echo one >{place}/..1/key && "
        f"ln -s ..1 {place}/..data && ln -s ..data/key {place}/key",
    )  # fmt: skip
    mounts = ((place, "/config", True),)
    container = cri.run(two.pod, "configured", SMALL, *SLEEP, mounts=mounts)
    assert cri.shell(container, "cat /config/key") == "one\n"
    assert cri.exec_sync(container, "touch", "/config/new").exit_code != 0
    dev_vm.check(
        "sh", "-c",
        f"mkdir {place}/..2 && echo two >{place}/..2/key && ln -s ..2 {place}/..tmp && "
        f"mv -T {place}/..tmp {place}/..data && rm -r {place}/..1",
    )  # fmt: skip
    wait_for(lambda: cri.shell(container, "cat /config/key"), lambda text: text == "two\n", 90)
    cri.stop(container, 0)
    cri.remove(container)
    dev_vm.check("rm", "-r", place)


def test_termination_log_is_written_back(cri: CriClient, two: TwoContainers, dev_vm: DevVm) -> None:
    path = f"{VOLUMES}/termination"
    dev_vm.check("sh", "-c", f"mkdir -p {VOLUMES} && : >{path}")
    mounts = ((path, "/dev/termination-log", False),)
    script = "echo last words >/dev/termination-log; exit 6"
    container = cri.run(two.pod, "last-words", SMALL, "sh", "-c", script, mounts=mounts)
    assert cri.wait_exit(container).exit_code == 6
    assert dev_vm.check("cat", path) == "last words\n"
    cri.remove(container)
    dev_vm.check("rm", path)


def test_shared_processes(cri: CriClient, dev_vm: DevVm, pods_leave_nothing: None) -> None:
    with running_pod(cri, dev_vm, "pids", shared_pids=True) as pod:
        cri.run(pod, "first", SMALL, "sleep", "4243")
        second = cri.run(pod, "second", SMALL, *SLEEP)
        assert "sleep 4243" in cri.shell(second, "ps")


def test_pod_that_is_stopped_takes_its_containers_along(
    cri: CriClient, dev_vm: DevVm, pods_leave_nothing: None
) -> None:
    inside, _ = log_folder(dev_vm, "stopped")
    pod = cri.run_pod(cri.pod_config("stopped", log_directory=inside))
    container = cri.run(pod, "only", SMALL, *SLEEP)
    created = cri.create(pod, "never-started", SMALL, *SLEEP)
    cri.stop_pod(pod)
    cri.stop_pod(pod)
    assert cri.pod_status(pod).state == cri.messages.SANDBOX_NOTREADY
    assert cri.status(container).exit_code == 137
    cri.remove_pod(pod)
    left = {row.id for row in cri.call("ListContainers").containers}
    assert not left & {container, created}


def test_pod_survives_containerd(
    cri: CriClient, dev_vm: DevVm, two: TwoContainers, restart_containerd: str
) -> None:
    """kill -9, a container that ends in the gap, a new daemon: all is known, nothing is lost."""
    script = "echo before; read line </tmp/go; echo after; exit 8"
    container = cri.run(two.pod, "gap", SMALL, "sh", "-c", f"mkfifo /tmp/go; {script}")
    log = two.logs / "gap.log"
    wait_for(lambda: log.read_text(), lambda text: "before" in text, 60)
    with cri.exec(container, "sh", "-c", "sleep 3; echo >/tmp/go; sleep 600") as streams:
        dev_vm.check("sh", "-c", restart_containerd, timeout_s=180)
        streams.close()
    cri.wait_ready()
    assert cri.wait_exit(container).exit_code == 8
    # runc's shim has closed its end by then, and the line is lost.
    if cri.handler != "runc":
        assert "stdout F after" in wait_for(log.read_text, lambda text: "after" in text, 60)
    assert cri.status(two.client).state == cri.messages.CONTAINER_RUNNING
    assert cri.shell(two.client, "echo alive") == "alive\n"
    cri.remove(container)
