"""config.json with its annotations, exec processes, limits, cgroup paths, mounts, and pod configs.

Faces whoever may talk to containerd, and authors of images. What the shim makes of a spec names no
path of the host that the spec did not name as a mount, stays within the limits of a VM, and is read
by the guest's agent too; else CallerError.
"""

from __future__ import annotations

import json
from typing import Any

from json_input import expand
from supply import Supply

from vmcell_agent.ocispec import parse_spec
from vmcell_protos import sandbox, task
from vmcell_protos.errors import CallerError
from vmcell_protos.wellknown import Any as AnyMessage
from vmcell_shim.annotations import NAMES, PREFIX
from vmcell_shim.cgroup_limits import host_limits, parse_cgroups_path
from vmcell_shim.hooks import hook_state
from vmcell_shim.oci_json import parse_object, take, take_rows
from vmcell_shim.pod_config import pod_files, pod_spec
from vmcell_shim.rootfs import parse_mounts
from vmcell_shim.sizing import MAX_MEMORY_MIB, MAX_VCPUS, memory_of_update
from vmcell_shim.spec import plan_guest, plan_pod

ALLOWED: tuple[type[Exception], ...] = (CallerError,)
REACHES = (
    "vmcell_shim.spec:plan_pod",
    "vmcell_agent.ocispec:parse_spec",
    "vmcell_shim.rootfs:_list_source",
    "vmcell_shim.rootfs:_overlay_source",
    "vmcell_shim.binds:plan_bind",
    "vmcell_shim.sizing:memory_of_update",
    "vmcell_shim.annotations:_network",
    "vmcell_shim.cgroup_limits:host_limits",
    "vmcell_shim.pod_config:pod_files",
)
SPEC, MEMBER, UPDATE, POD, ROOT = range(5)
# Sources of mounts are looked at on the host; the fuzzer shall not choose among all of its files.
SOURCES = ("/etc/hosts", "/usr/share/doc", "/dev/null", "/nowhere")


def one(data: bytes) -> None:
    supply = Supply(data)
    mode = supply.byte() % 5
    document = supply.rest()
    if mode in (SPEC, MEMBER):
        _spec(parse_object(expand(document), "config.json"), in_pod=mode == MEMBER)
    elif mode == UPDATE:
        limits = parse_object(expand(document), "the resources")
        memory_mib = memory_of_update(limits, vcpus=2, memory_mib=512)
        assert memory_mib is None or 0 < memory_mib <= 512
    elif mode == POD:
        _pod(document)
    else:
        _root(document)


def _spec(spec: dict[str, Any], *, in_pod: bool) -> None:
    for row in take_rows(spec, "mounts"):
        if isinstance(row.get("source"), str) and row["source"] not in SOURCES:
            row["source"] = SOURCES[len(row["source"]) % len(SOURCES)]
    plan = plan_guest(spec, default_vcpus=1, default_memory_mib=512, in_pod=in_pod)
    assert 1 <= plan.size.vcpus <= MAX_VCPUS
    assert 64 <= plan.size.memory_mib <= MAX_MEMORY_MIB
    parse_cgroups_path(take(spec, "linux.cgroupsPath", str, ""))
    host_limits(spec, guest_memory_mib=plan.size.memory_mib, sandbox=False)
    hook_state(spec, "c1", "/bundle", "")
    for number, live in enumerate(plan.shares):
        live.mount["source"] = str(number)
    guest_spec = json.dumps(plan.guest_spec, separators=(",", ":")).encode()
    parsed = parse_spec(guest_spec, needs_args=not plan.init)
    assert parsed is not None


def _pod(document: bytes) -> None:
    config = AnyMessage(type_url="runtime.v1.PodSandboxConfig", value=document)
    request = sandbox.CreateSandboxRequest(sandbox_id="p1", options=config)
    spec = pod_spec(request)
    for name in take(spec, "annotations", dict, {}):
        # Of our own prefix only what a pod may say of itself.
        short = name.removeprefix(PREFIX)
        assert short == name or short in ("vcpus", "memory-mib")
    parse_cgroups_path(spec["linux"]["cgroupsPath"])
    plan = plan_pod(spec, default_vcpus=1, default_memory_mib=512)
    assert 1 <= plan.size.vcpus <= MAX_VCPUS
    pod_files(request)


def _root(document: bytes) -> None:
    request = task.CreateTaskRequest.decode(document)
    parse_mounts(request.rootfs, "/usr", False)


def _document(**changes: Any) -> bytes:
    spec: dict[str, Any] = {
        "ociVersion": "1.1.0",
        "process": {"args": ["sh"], "cwd": "/", "env": ["A=b"], "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network"}],
            "resources": {"cpu": {"quota": 100000, "period": 100000}, "memory": {"limit": 1 << 28}},
            "cgroupsPath": "/kubepods/c1",
        },
    }
    return json.dumps({**spec, **changes}, separators=(",", ":")).encode()


def seeds() -> dict[str, bytes]:
    values = {"vcpus": "2", "memory-mib": "512", "init": "envd", "snapshot": "s1"}
    values |= {"net.tap": "tap0", "net.mac": "02:00:00:00:00:01", "net.address": "10.88.0.3/31"}
    values |= {"net.gateway": "10.88.0.2", "net.nameservers": "1.1.1.1,fd00::1"}
    assert set(values) == set(NAMES)
    annotations = {PREFIX + name: value for name, value in values.items()}
    binds = [
        {"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts", "options": ["ro"]},
        {"destination": "/d", "type": "bind", "source": "/usr/share/doc", "options": ["rbind"]},
        {"destination": "/tmp", "type": "tmpfs", "options": ["size=1m", "nosuid"]},
    ]
    pod = sandbox.PodSandboxConfig(
        hostname="pod",
        annotations={PREFIX + "vcpus": "2"},
        dns_config=sandbox.DNSConfig(servers=["1.1.1.1"], searches=["a.b"], options=["ndots:2"]),
        linux=sandbox.LinuxPodSandboxConfig(cgroup_parent="/kubepods.slice"),
    )
    overlay = task.CreateTaskRequest(
        rootfs=[task.Mount(type="overlay", options=["lowerdir=/usr:/etc", "upperdir=/etc"])]
    )
    blocks = task.CreateTaskRequest(
        rootfs=[
            task.Mount(type="erofs", source="/etc/hosts", options=["ro"]),
            task.Mount(type="format/overlay", options=["lowerdir={{ mount 0 }}"]),
        ]
    )
    return {
        "plain": b"\0" + _document(),
        "annotated": b"\0" + _document(annotations=annotations),
        "binds": b"\0" + _document(mounts=binds),
        "member": b"\x01" + _document(),
        "update": b'\x02{"cpu":{"quota":100000,"period":100000},"memory":{"limit":268435456}}',
        "pod": b"\x03" + pod.encode(),
        "overlay": b"\x04" + overlay.encode(),
        "erofs": b"\x04" + blocks.encode(),
        "deep": b"\0" + _document(annotations={"x": "@[40"}),
        "limits": b"\0"
        + _document(
            linux={
                "namespaces": [{"type": "network"}],
                "resources": {"unified": {"memory.high": "1"}, "pids": {"limit": 5}},
            }
        ),
    }
