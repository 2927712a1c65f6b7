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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.agent import Streams
    from vmcell_shim.guest import Guest
    from vmcell_shim.oci_json import Json
    from vmcell_shim.snapshot_store import OpenSnapshot
    from vmcell_shim.spec import GuestPlan


def check_alike(saved: OpenSnapshot, container_id: str, terminal: bool, *, in_pod: bool) -> None:
    """CallerError unless a container with such streams can go on from the snapshot."""
    if in_pod:
        raise CallerError(
            f"{container_id} of a pod cannot go on from snapshot {saved.id}: a snapshot is of a "
            "whole microVM; run it alone",
            code="unimplemented",
        )
    if terminal != saved.manifest.terminal:
        there, here = ("with", "without") if saved.manifest.terminal else ("without", "with")
        raise CallerError(
            f"snapshot {saved.id} is of a container {there} a terminal, and {container_id} is to "
            f"run {here} one",
            code="failed_precondition",
        )


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
