"""A guest that was saved goes on as another container: name, streams, files, limits.

All that is asked here the guest's agent does while the container's processes stand still; they run
when the guest is told to wake.
"""

from __future__ import annotations

import json
import time

from vmcell_protos.agent import (
    AdoptContainerRequest,
    AdoptContainerResponse,
    CopyFilesRequest,
    UpdateContainerRequest,
)
from vmcell_protos.errors import CallerError
from vmcell_protos.wellknown import Empty
from vmcell_shim.oci_json import take
from vmcell_shim.sizing import MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB, MIN_VCPUS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.agent import Streams
    from vmcell_protos.task import CreateTaskRequest
    from vmcell_shim.guest import Guest
    from vmcell_shim.oci_json import Json
    from vmcell_shim.snapshot_store import OpenSnapshot
    from vmcell_shim.spec import GuestPlan


def check_alike(
    saved: OpenSnapshot, request: CreateTaskRequest, plan: GuestPlan, *, in_pod: bool
) -> None:
    """CallerError unless the container that is asked for can go on from the snapshot."""
    size = saved.manifest
    if not (
        MIN_VCPUS <= size.vcpus <= MAX_VCPUS and MIN_MEMORY_MIB <= size.memory_mib <= MAX_MEMORY_MIB
    ):
        raise CallerError(
            f"snapshot {saved.id} is of {size.vcpus} vCPUs and {size.memory_mib} MiB; a microVM "
            f"has {MIN_VCPUS} to {MAX_VCPUS} and {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB"
        )
    if plan.shares:
        raise CallerError(
            f"{request.id} cannot go on from snapshot {saved.id} with live directories; leave "
            "its bind mounts of directories out",
            code="unimplemented",
        )
    if in_pod:
        raise CallerError(
            f"{request.id} of a pod cannot go on from snapshot {saved.id}: a snapshot is of a "
            "whole microVM; run it alone",
            code="unimplemented",
        )
    if request.terminal != saved.manifest.terminal:
        there, here = ("with", "without") if saved.manifest.terminal else ("without", "with")
        raise CallerError(
            f"snapshot {saved.id} is of a container {there} a terminal, and {request.id} is to "
            f"run {here} one",
            code="failed_precondition",
        )


def check_interfaces(saved: OpenSnapshot, count: int) -> None:
    """CallerError unless the container has as many network interfaces as the snapshot."""
    there = len(saved.manifest.macs)
    if count != there:
        raise CallerError(
            f"snapshot {saved.id} has {there} network interfaces and the container {count}; give "
            "it a network of as many",
            code="failed_precondition",
        )


def name_cgroup(spec: Json, container_id: str) -> None:
    """A checkpoint brings the spec of the container that was saved along, whose cgroup is named
    like that one and may be in use still; this one's is named like itself. CallerError."""
    path = take(spec, "linux.cgroupsPath", str, "")
    if path:
        # "/parent/name", or systemd's "slice:prefix:name".
        parent = path[: max(path.rfind("/"), path.rfind(":")) + 1]
        spec["linux"]["cgroupsPath"] = parent + container_id


def adopt(
    guest: Guest,
    saved: OpenSnapshot,
    container_id: str,
    streams: Streams,
    plan: GuestPlan,
    spec: Json,
    deadline: float,
) -> None:
    """The container that was saved is `container_id`, with the files and limits of this spec.

    `deadline` in time.monotonic() seconds. Raises VmcellError.
    """
    request = AdoptContainerRequest(
        container_id=saved.manifest.container_id,
        new_container_id=container_id,
        streams=streams,
    )
    left_s = deadline - time.monotonic()
    found = guest.call("AdoptContainer", request, AdoptContainerResponse, left_s)
    if not found.running:
        raise CallerError(
            f"the process of snapshot {saved.id} had ended when it was made",
            code="failed_precondition",
        )
    if plan.files:
        files = CopyFilesRequest(container_id=container_id, files=list(plan.files))
        guest.call("CopyFiles", files, Empty, deadline - time.monotonic())
    resources = take(spec, "linux.resources", dict, {})
    if resources:
        limits = UpdateContainerRequest(
            container_id=container_id, resources_json=json.dumps(resources).encode()
        )
        guest.call("UpdateContainer", limits, Empty, deadline - time.monotonic())
