"""An OCI spec → the microVM to build and the spec its guest runs.

What the guest's kernel can provide goes to the guest unchanged (process, namespaces, cgroup,
tmpfs mounts); what means the host (bind mounts, network namespaces, devices, hooks) is translated
or refused with its own name. Source: OCI runtime-spec 1.1 config.md, config-linux.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from vmcell_protos.agent import FileCopy
from vmcell_protos.errors import CallerError
from vmcell_shim.annotations import Annotations, TapNetwork, parse_annotations
from vmcell_shim.binds import copies_of_bind
from vmcell_shim.oci_json import take, take_rows, take_strings
from vmcell_shim.sizing import MachineSize, machine_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.oci_json import Json

# Mount types the guest's kernel provides itself.
GUEST_MOUNTS = ("proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs")
# What a spec carries that the guest needs; the rest stays on the host.
_GUEST_KEYS = ("ociVersion", "process", "root", "hostname", "domainname", "mounts", "linux")
# All copies and the spec travel in one ttrpc message of at most 4 MiB.
_COPIES_LIMIT_BYTES = 2 << 20


@dataclass(frozen=True, kw_only=True)
class GuestPlan:
    """Everything a spec says about the VM and its guest. `root_path` as in the spec, "" if none."""

    size: MachineSize
    spec_json: bytes
    files: tuple[FileCopy, ...]
    init: str
    hostname: str
    network: TapNetwork | None
    root_path: str
    read_only_root: bool


def plan_guest(spec: Json, *, default_vcpus: int, default_memory_mib: int) -> GuestPlan:
    """The plan for one container; raises CallerError with the field that cannot be served."""
    annotations = parse_annotations(spec)
    _refuse_host_things(spec)
    if not take(spec, "process", dict, {}) and not annotations.init:
        raise CallerError("config.json has no process; an OCI spec names what to run")
    mounts, files = _split_mounts(spec)
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
        spec_json=_guest_spec(spec, mounts, annotations),
        files=tuple(files),
        init=annotations.init,
        hostname=take(spec, "hostname", str, ""),
        network=annotations.network,
        root_path=take(spec, "root.path", str, ""),
        read_only_root=bool((spec.get("root") or {}).get("readonly", False)),
    )


def _refuse_host_things(spec: Json) -> None:
    for name, hooks in take(spec, "hooks", dict, {}).items():
        if hooks:
            raise CallerError(
                f"config.json has hooks.{name}; OCI hooks are not run by this version of vmcell",
                code="unimplemented",
            )
    if not take(spec, "linux", dict, {}):
        raise CallerError("config.json has no linux section; vmcell runs Linux containers")


def _guest_namespaces(spec: Json, annotations: Annotations) -> list[Json]:
    """The namespaces to make in the guest; one that exists on the host is refused by its path."""
    namespaces = []
    for row in take_rows(spec, "linux.namespaces"):
        kind, path = take(row, "type", str, ""), take(row, "path", str, "")
        if path and not (kind == "network" and annotations.network):
            raise CallerError(
                f"linux.namespaces asks to join the {kind} namespace {path}; "
                "a microVM cannot join a namespace of the host",
                code="unimplemented",
            )
        if kind != "network":
            namespaces.append({"type": kind})
    # The VM is the network namespace: the guest's own holds eth0, or only loopback.
    return namespaces


def _split_mounts(spec: Json) -> tuple[list[Json], list[FileCopy]]:
    mounts: list[Json] = []
    files: list[FileCopy] = []
    for mount in take_rows(spec, "mounts"):
        kind = take(mount, "type", str, "")
        destination = take(mount, "destination", str, "")
        options = take_strings(mount, "options")
        if not destination.startswith("/") or ".." in destination.split("/"):
            raise CallerError(f"mounts: destination {destination!r} is no absolute, plain path")
        if kind in ("bind", "rbind") or "bind" in options or "rbind" in options:
            files.extend(copies_of_bind(mount))
        elif kind in GUEST_MOUNTS:
            mounts.append(mount)
        else:
            raise CallerError(
                f"mount {destination} has type {kind!r}; known are bind, {', '.join(GUEST_MOUNTS)}"
            )
    if sum(len(copy.content) for copy in files) > _COPIES_LIMIT_BYTES:
        raise CallerError(
            f"the bind mounts hold more than {_COPIES_LIMIT_BYTES} bytes together; "
            "only small files are copied into the guest"
        )
    return mounts, files


def _guest_spec(spec: Json, mounts: list[Json], annotations: Annotations) -> bytes:
    guest = {key: spec[key] for key in _GUEST_KEYS if key in spec}
    guest["mounts"] = mounts
    guest["linux"] = {**spec["linux"], "namespaces": _guest_namespaces(spec, annotations)}
    return json.dumps(guest, separators=(",", ":")).encode()


def _resolv_conf(network: TapNetwork) -> FileCopy:
    content = "".join(f"nameserver {address}\n" for address in network.nameservers)
    return FileCopy(destination="/etc/resolv.conf", mode=0o644, content=content.encode())
