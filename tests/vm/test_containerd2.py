"""A containerd 2.x in the dev VM with real guests: ctr, CRI with and without a sandbox container.

What the versions have in common is tested with Debian's 1.6; here is what differs: the answers of
`start`, Task v3, the sandbox API, the mount list of 2.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import pytest
from cri.client import CriClient
from deep import one_in
from dev_vm import SMALL, DevVm
from second_containerd import CRI_PORT, HOME, NAMESPACE, STREAM_PORT, SecondContainerd

from vmcell_tools.dev_ssh import forward_port
from vmcell_tools.dev_vm import running_vm

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("nothing_left")]


def test_run_and_exit_status(second: SecondContainerd) -> None:
    done = second.run("c1", "sh", "-c", "uname -r; exit 7", flags=("--rm",))
    assert done.code == 7, done.error_text
    assert done.text.startswith("6.12")


@pytest.mark.deep
def test_exec_and_a_killed_shim(second: SecondContainerd, dev_vm: DevVm) -> None:
    """Task v3, by the file that containerd 2.x keeps; a shim that dies takes its VMM along."""
    started = second.run("c1", "sleep", "600", flags=("-d",))
    assert started.code == 0, started.error_text
    try:
        bundle = f"{HOME}/state/io.containerd.runtime.v2.task/{NAMESPACE}/c1"
        boot = json.loads(dev_vm.check("cat", f"{bundle}/bootstrap.json"))
        assert (boot["version"], boot["protocol"]) == (3, "ttrpc")
        done = second.ctr("task", "exec", "--exec-id", "e1", "c1", "sh", "-c", "cat; exit 5",
                          stdin=b"in")  # fmt: skip
        assert (done.code, done.stdout) == (5, b"in"), done.error_text
        state = json.loads(dev_vm.check("cat", f"/run/vmcell/{NAMESPACE}/c1/state.json"))
        script = (
            f"kill -9 {state['shim'][0]}; "
            f"timeout 10 sh -c 'while kill -0 {state['vmm'][0]} 2>/dev/null; do :; done'"
        )
        dev_vm.check("sh", "-c", script)
    finally:
        second.ctr("task", "delete", "-f", "c1")
        removed = second.ctr("container", "delete", "c1")
        dev_vm.run("sh", "-c", "rm -rf /run/containerd/fifo/*/c1-*")
    assert removed.code == 0, removed.error_text
    assert second.ctr("task", "list", "-q").stdout == b""


@pytest.fixture(scope="module")
def second_cri(second: SecondContainerd, dev_vm: DevVm) -> Iterator[CriClient]:
    vm = running_vm(dev_vm.name)
    ports = [forward_port(vm.directory, port) for port in (CRI_PORT, STREAM_PORT)]
    with CriClient(
        f"127.0.0.1:{ports[0]}", handler="vmcell", stream_address=f"127.0.0.1:{ports[1]}"
    ) as client:
        client.wait_ready()
        yield client


@pytest.mark.parametrize("handler", one_in(2, ["vmcell", "vmcell-shim"]))
def test_pod(second_cri: CriClient, dev_vm: DevVm, handler: str) -> None:
    cri = second_cri
    cri.handler = handler
    name = f"two-{handler}"
    (dev_vm.out / "pods" / name).mkdir(parents=True, exist_ok=True)
    config = cri.pod_config(name, log_directory=f"/mnt/out/pods/{name}")
    config.dns_config.servers.append("192.0.2.53")
    pod = cri.run_pod(config)
    try:
        serve = "echo served >/tmp/index.html; exec httpd -f -p 8080 -h /tmp"
        server = cri.run(pod, "server", SMALL, "sh", "-c", serve)
        client = cri.run(pod, "client", SMALL, "sleep", "100000")
        ip = cri.pod_status(pod).network.ip
        script = (
            "until wget -q -O - http://127.0.0.1:8080/; do sleep 0.2; done; hostname; "
            "cat /etc/hostname /etc/resolv.conf /proc/sys/net/ipv4/ip_unprivileged_port_start; "
            f"ip -4 addr show eth0 | grep -o 'inet {ip}/'"
        )
        shown = cri.shell(client, script).splitlines()
        assert shown == ["served", name, name, "nameserver 192.0.2.53", "0", f"inet {ip}/"]
        assert cri.stats(client).memory.working_set_bytes.value > 0
        answer = cri.port_forward(pod, 8080, b"GET / HTTP/1.0\r\n\r\n")
        assert answer.endswith(b"\r\n\r\nserved\n")
        cri.stop(server, 0)
        assert cri.status(server).exit_code == 137
        cri.remove(server)
    finally:
        cri.stop_pod(pod)
        cri.remove_pod(pod)
    with pytest.raises(grpc.RpcError):
        cri.pod_status(pod)
