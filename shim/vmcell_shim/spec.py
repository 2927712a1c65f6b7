"""An OCI spec → the microVM to build and the spec its guest runs.

What the guest's kernel can provide goes to the guest unchanged (process, namespaces, cgroup,
tmpfs mounts); what means the host (bind mounts, network namespaces, devices, hooks) is translated
or refused with its own name. Source: OCI runtime-spec 1.1 config.md, config-linux.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

from vmcell_protos.agent import FileCopy
from vmcell_protos.errors import CallerError
from vmcell_shim.annotations import TapNetwork, parse_annotations
from vmcell_shim.binds import BindCopy, BindShare, plan_bind
from vmcell_shim.hooks import parse_hooks
from vmcell_shim.oci_json import take, take_rows, take_strings
from vmcell_shim.sandbox_network import NetworkPlan, plan_network
from vmcell_shim.sizing import MachineSize, machine_size, pod_resources

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.oci_json import Json

# Mount types the guest's kernel provides itself.
GUEST_MOUNTS = ("proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs")
SHARED_NAMESPACES = ("ipc", "uts", "pid")
_SHM_BYTES = 64 << 20
# What a spec carries that the guest needs; the rest stays on the host.
_GUEST_KEYS = ("ociVersion", "process", "root", "hostname", "domainname", "mounts", "linux")
# All copies and the spec travel in one ttrpc message of at most 4 MiB.
_COPIES_LIMIT_BYTES = 2 << 20


class LiveMount(NamedTuple):
    """A shared bind and its row among the guest's mounts, whose source is the share's number."""

    share: BindShare
    mount: Json


class _Mounts(NamedTuple):
    """What a spec's mounts become: rows for the guest, copies, live shares."""

    rows: list[Json]
    copies: list[BindCopy]
    shares: list[LiveMount]


@dataclass(frozen=True, kw_only=True)
class GuestPlan:
    """Everything a spec says about the VM and its guest. `root_path` as in the spec, "" if none.

    `size`, `hostname`, `network` and `sysctls` are the VM's; a pod's members have no say in them.
    `files` are the copies of `copies`, and what annotations add to them. `snapshot` is the id of
    the one to go on from, "" to boot.
    """

    size: MachineSize
    guest_spec: Json
    files: tuple[FileCopy, ...]
    copies: tuple[BindCopy, ...]
    shares: tuple[LiveMount, ...]
    init: str
    snapshot: str
    hostname: str
    network: NetworkPlan
    sysctls: dict[str, str]
    shared_namespaces: tuple[str, ...]
    root_path: str
    read_only_root: bool


def plan_guest(
    spec: Json, *, default_vcpus: int, default_memory_mib: int, in_pod: bool = False
) -> GuestPlan:
    """The plan for one container; raises CallerError with the field that cannot be served.

    `in_pod`: the microVM belongs to a pod, whose namespaces stand for those of the host that the
    spec names by path.
    """
    annotations = parse_annotations(spec)
    _refuse_host_things(spec, in_pod=in_pod)
    if not take(spec, "process", dict, {}) and not annotations.init:
        raise CallerError("config.json has no process; an OCI spec names what to run")
    namespaces, shared = _guest_namespaces(spec, in_pod=in_pod)
    mounts = _split_mounts(spec, in_pod=in_pod)
    files = [file for copy in mounts.copies for file in _files_of(copy)]
    if annotations.network and annotations.network.nameservers:
        files = [copy for copy in files if copy.destination != "/etc/resolv.conf"]
        files.append(_resolv_conf(annotations.network))
    return GuestPlan(
        size=machine_size(
            spec,
            annotations,
            default_vcpus=default_vcpus,
            default_memory_mib=default_memory_mib,
        ),
        guest_spec=_guest_spec(spec, mounts.rows, namespaces),
        copies=tuple(mounts.copies),
        shares=tuple(mounts.shares),
        files=tuple(files),
        init=annotations.init,
        snapshot=annotations.snapshot,
        hostname=take(spec, "hostname", str, ""),
        network=NetworkPlan() if in_pod else plan_network(spec, annotations.network),
        sysctls={},
        shared_namespaces=shared,
        root_path=take(spec, "root.path", str, ""),
        read_only_root=bool((spec.get("root") or {}).get("readonly", False)),
    )


def _refuse_host_things(spec: Json, *, in_pod: bool) -> None:
    if in_pod and any(parse_hooks(spec).values()):
        raise CallerError(
            "config.json has hooks; vmcell runs those of a container alone in its microVM and of a "
            "pod's sandbox, not of a pod's members",
            code="unimplemented",
        )
    if not take(spec, "linux", dict, {}):
        raise CallerError("config.json has no linux section; vmcell runs Linux containers")


def plan_pod(spec: Json, *, default_vcpus: int, default_memory_mib: int) -> GuestPlan:
    """The plan for a pod's microVM from the spec of its sandbox container, which runs nothing.

    Raises CallerError.
    """
    annotations = parse_annotations(spec)
    resources = {"linux": {"resources": pod_resources(spec)}}
    size = machine_size(
        resources,
        annotations,
        default_vcpus=default_vcpus,
        default_memory_mib=default_memory_mib,
    )
    sysctls = take(spec, "linux.sysctl", dict, {})
    for name, value in sysctls.items():
        if not isinstance(value, str):
            raise CallerError(f"linux.sysctl {name} is {value!r}; it must be a string")
    return GuestPlan(
        size=size,
        guest_spec={},
        files=(),
        copies=(),
        shares=(),
        init="",
        snapshot="",
        hostname=take(spec, "hostname", str, ""),
        network=plan_network(spec, annotations.network),
        sysctls=sysctls,
        shared_namespaces=(),
        root_path="",
        read_only_root=True,
    )


def _guest_namespaces(spec: Json, *, in_pod: bool) -> tuple[list[Json], tuple[str, ...]]:
    """The namespaces to make in the guest, and those it shares with its pod; outside of a pod one
    that exists on the host is refused by its path."""
    namespaces, shared = [], []
    for row in take_rows(spec, "linux.namespaces"):
        kind, path = take(row, "type", str, ""), take(row, "path", str, "")
        if path and in_pod and kind in SHARED_NAMESPACES:
            shared.append(kind)
            continue
        if path and kind != "network":
            raise CallerError(
                f"linux.namespaces asks to join the {kind} namespace {path}; "
                "a microVM cannot join a namespace of the host",
                code="unimplemented",
            )
        if kind != "network":
            namespaces.append({"type": kind})
    # The VM is the network namespace: the guest's own holds eth0, or only loopback.
    return namespaces, tuple(shared)


def _split_mounts(spec: Json, *, in_pod: bool) -> _Mounts:
    found = _Mounts([], [], [])
    copied_bytes = 0
    for mount in take_rows(spec, "mounts"):
        kind = take(mount, "type", str, "")
        destination = take(mount, "destination", str, "")
        options = take_strings(mount, "options")
        if not destination.startswith("/") or ".." in destination.split("/"):
            raise CallerError(f"mounts: destination {destination!r} is no absolute, plain path")
        if in_pod and destination == "/dev/shm" and kind in ("bind", "tmpfs"):
            found.rows.append(_shared_memory(mount))
        elif kind in ("bind", "rbind") or "bind" in options or "rbind" in options:
            bind = plan_bind(mount)
            if isinstance(bind, BindCopy) and copied_bytes + bind.size_bytes <= _COPIES_LIMIT_BYTES:
                copied_bytes += bind.size_bytes
                found.copies.append(bind)
                continue
            if isinstance(bind, BindCopy):
                bind = BindShare(bind.source, destination, bind.read_only, tuple(options))
            row = {"destination": destination, "type": "virtiofs", "options": options}
            found.rows.append(row)
            found.shares.append(LiveMount(bind, row))
        elif kind in GUEST_MOUNTS:
            found.rows.append(mount)
        else:
            raise CallerError(
                f"mount {destination} has type {kind!r}; known are bind, {', '.join(GUEST_MOUNTS)}"
            )
    return found


def _files_of(bind: BindCopy) -> list[FileCopy]:
    """A bind's copies as CreateContainer wants them: the destination read-only after all else."""
    files = list(bind.files)
    if bind.read_only:
        top = files[0]
        last = FileCopy(
            destination=top.destination,
            mode=top.mode,
            uid=top.uid,
            gid=top.gid,
            content=top.content,
            directory=top.directory,
            read_only=True,
        )
        files = [*files, last] if top.directory else [last]
    return files


def _shared_memory(mount: Json) -> Json:
    """The pod's one /dev/shm; the host's, which CRI binds, has its size in statvfs."""
    size_bytes = 0
    source = take(mount, "source", str, "")
    if source.startswith("/") and os.path.isdir(source):
        status = os.statvfs(source)
        size_bytes = status.f_blocks * status.f_frsize
    options = [f"size={size_bytes or _SHM_BYTES}"]
    return {
        "destination": "/dev/shm",
        "type": "vmcell-shm",
        "source": "shm",
        "options": ["nosuid", "nodev", "noexec", *options],
    }


def _guest_spec(spec: Json, mounts: list[Json], namespaces: list[Json]) -> Json:
    guest = {key: spec[key] for key in _GUEST_KEYS if key in spec}
    guest["mounts"] = mounts
    guest["linux"] = {**spec["linux"], "namespaces": namespaces}
    return guest


def _resolv_conf(network: TapNetwork) -> FileCopy:
    content = "".join(f"nameserver {address}\n" for address in network.nameservers)
    return FileCopy(destination="/etc/resolv.conf", mode=0o644, content=content.encode())
