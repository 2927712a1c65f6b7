"""CRI's configuration of a pod, as CreateSandbox has it, becomes the spec of a sandbox container.

The bytes are made by Google's protobuf from cri.proto, so the field numbers are checked too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cri.stubs import compiled
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError
from vmcell_protos.sandbox import CreateSandboxRequest
from vmcell_protos.wellknown import Any as AnyMessage
from vmcell_shim.annotations import NAMES, PREFIX
from vmcell_shim.cgroup_limits import parse_cgroups_path
from vmcell_shim.pod_config import pod_files, pod_spec
from vmcell_shim.spec import plan_pod

NETNS = "/proc/self/ns/net"


def request_of(data: bytes = b"", kind: str = "runtime.v1.PodSandboxConfig") -> Any:
    options = AnyMessage(type_url=kind, value=data)
    return CreateSandboxRequest(sandbox_id="p1", netns_path=NETNS, options=options)


def config(**fields: Any) -> Any:
    messages, _ = compiled()
    return messages.PodSandboxConfig(**fields)


def linux(**fields: Any) -> Any:
    messages, _ = compiled()
    return messages.LinuxPodSandboxConfig(**fields)


def test_what_a_pod_says_of_its_vm() -> None:
    messages, _ = compiled()
    limits = messages.LinuxContainerResources(
        cpu_period=100_000, cpu_quota=250_000, cpu_shares=512, memory_limit_in_bytes=512 << 20
    )
    pod = config(
        hostname="web",
        linux=linux(
            resources=limits,
            cgroup_parent="/kubepods/podX",
            sysctls={"net.ipv4.ping_group_range": "1 0", "kernel.shm_rmid_forced": "1"},
        ),
    )
    spec = pod_spec(request_of(pod.SerializeToString()))
    assert spec["hostname"] == "web"
    assert spec["linux"]["cgroupsPath"] == "/kubepods/podX/p1"
    assert spec["linux"]["namespaces"] == [{"type": "network", "path": NETNS}]
    assert spec["linux"]["sysctl"] == {
        "net.ipv4.ip_unprivileged_port_start": "0",
        "net.ipv4.ping_group_range": "1 0",
        "kernel.shm_rmid_forced": "1",
    }
    spec["linux"]["namespaces"] = [{"type": "network"}]
    plan = plan_pod(spec, default_vcpus=1, default_memory_mib=128)
    assert (plan.size.vcpus, plan.size.memory_mib, plan.hostname) == (3, 512 + 96, "web")


def test_systemds_form_of_a_cgroup() -> None:
    pod = config(linux=linux(cgroup_parent="/kubepods.slice/kubepods-podX.slice"))
    path = pod_spec(request_of(pod.SerializeToString()))["linux"]["cgroupsPath"]
    assert path == "kubepods-podX.slice:cri-containerd:p1"
    assert parse_cgroups_path(path) == "kubepods.slice/kubepods-podX.slice/cri-containerd-p1.scope"


def test_a_pod_on_the_hosts_network_has_no_namespace() -> None:
    messages, _ = compiled()
    options = messages.NamespaceOption(network=messages.NamespaceMode.Value("NODE"))
    context = messages.LinuxSandboxSecurityContext(namespace_options=options)
    pod = config(linux=linux(security_context=context))
    spec = pod_spec(request_of(pod.SerializeToString()))
    assert spec["linux"]["namespaces"] == []
    with pytest.raises(CallerError, match="a microVM has a network of its own"):
        plan_pod(spec, default_vcpus=1, default_memory_mib=128)


def test_a_pod_may_size_its_vm_and_name_nothing_of_the_host() -> None:
    given_ones = {PREFIX + name: "2" for name in NAMES} | {"nerdctl/network-namespace": "/x"}
    pod = config(annotations=given_ones)
    request = request_of(pod.SerializeToString())
    request.annotations = dict(given_ones)
    kept = pod_spec(request)["annotations"]
    assert kept == {f"{PREFIX}vcpus": "2", f"{PREFIX}memory-mib": "2"}


def test_files_that_containerd_leaves_to_the_shim() -> None:
    messages, _ = compiled()
    dns = messages.DNSConfig(
        servers=["192.0.2.53", "::1"], searches=["a", "b"], options=["ndots:5"]
    )
    pod = config(hostname="web", dns_config=dns)
    files = {row.destination: row.content for row in pod_files(request_of(pod.SerializeToString()))}
    assert files["/etc/hostname"] == b"web\n"
    assert files["/etc/resolv.conf"].splitlines() == [
        b"nameserver 192.0.2.53",
        b"nameserver ::1",
        b"search a b",
        b"options ndots:5",
    ]
    assert files["/etc/hosts"] == Path("/etc/hosts").read_bytes()
    plain = {row.destination: row.content for row in pod_files(request_of())}
    assert plain["/etc/resolv.conf"] == Path("/etc/resolv.conf").read_bytes()
    assert "/etc/hostname" not in plain


def test_no_configuration_is_a_pod_without_wishes() -> None:
    for request in (request_of(b"\x08\x01", "somebody.Else"), CreateSandboxRequest(sandbox_id="p")):
        spec = pod_spec(request)
        assert (spec["hostname"], spec["linux"]["cgroupsPath"]) == ("", "")


@given(st.binary(max_size=60))
def test_any_bytes_are_a_configuration_or_refused(data: bytes) -> None:
    try:
        spec = pod_spec(request_of(data))
    except CallerError:
        return
    assert isinstance(spec["hostname"], str)
