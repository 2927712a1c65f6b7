"""What containerd and the files say of sandboxes: what noded finds when it starts."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, field

from vmcell_api.egress import OPEN, Egress
from vmcell_api.node import sandbox_files
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.sandbox import (
    PAUSED,
    PAUSING,
    RUNNING,
    SANDBOX_LABEL,
    Sandbox,
    from_labels,
    unix_ms_now,
)
from vmcell_api.node.snapshot_records import SnapshotRecords
from vmcell_api.node.teardown import LEASE_PREFIX
from vmcell_api.volumes.names import VolumeMount
from vmcell_protos.errors import HostError
from vmcell_protos.pb.containerd import types_pb2

log = logging.getLogger("vmcell.noded")

# containerd does not list a task without a shim. UNKNOWN is a shim that was slow to answer: its
# sandbox ends by an event or its deadline.
ENDED = (None, types_pb2.STOPPED)
STANDING = (types_pb2.PAUSED, types_pb2.PAUSING)


@dataclass(kw_only=True)
class Survey:
    """`standing`: ids of sandboxes whose vCPUs may have been stopped for a save.

    `machines`: ids of paused sandboxes that still have a task. `doomed`: containers to remove, with
    their slots. `mounts`: the volumes of every container.
    """

    whole: list[Sandbox] = field(default_factory=list)
    standing: set[str] = field(default_factory=set)
    machines: set[str] = field(default_factory=set)
    doomed: dict[str, int | None] = field(default_factory=dict)
    mounts: dict[str, tuple[VolumeMount, ...]] = field(default_factory=dict)

    def taken_slots(self) -> dict[int, Egress]:
        """The numbers of slots in use, and what they may reach."""
        taken = {
            sandbox.slot_number: sandbox.egress
            for sandbox in self.whole
            if sandbox.state != PAUSED or sandbox.sandbox_id in self.machines
        }
        for number in self.doomed.values():
            if number is not None:
                taken.setdefault(number, OPEN)
        return taken


def survey(containerd: Containerd, snapshots: SnapshotRecords, state_dir: str) -> Survey:
    """Every sandbox and every trace of one; raises HostError when containerd does not answer."""
    states = containerd.task_states()
    found = Survey()
    rows: dict[str, list[Sandbox]] = defaultdict(list)
    for container in containerd.containers():
        labels = dict(container.labels)
        if SANDBOX_LABEL not in labels:
            continue
        try:
            sandbox = from_labels(labels, container.image, container.id)
        except HostError as error:
            log.error("%s", error)
            found.doomed[container.id] = None
            continue
        rows[sandbox.sandbox_id].append(sandbox)
        found.mounts[container.id] = sandbox.volume_mounts
    for own in rows.values():
        # The last that is whole: an earlier one was to go when a rollback had made it.
        own.sort(key=lambda row: row.generation, reverse=True)
        chosen = next((row for row in own if _is_whole(row, states, snapshots)), None)
        if chosen is not None:
            found.whole.append(chosen)
            if chosen.state == PAUSED:  # its task, if there is one, was to be ended
                if chosen.container in states:
                    found.machines.add(chosen.sandbox_id)
            elif chosen.state == PAUSING or states.get(chosen.container) in STANDING:
                found.standing.add(chosen.sandbox_id)
        for row in own:
            if row is not chosen:
                # A paused one has no slot, and the number on its label may be another's now.
                has_slot = row.state != PAUSED or row.container in states
                found.doomed[row.container] = row.slot_number if has_slot else None
    known = {sandbox.container for sandbox in found.whole}
    for container_id in _traces(containerd, state_dir) - known:
        found.doomed.setdefault(container_id, None)
    return found


def _is_whole(sandbox: Sandbox, states: dict[str, int], snapshots: SnapshotRecords) -> bool:
    if sandbox.state == PAUSED:
        if snapshots.is_whole(sandbox.snapshot_id):
            return True
        log.error(
            "sandbox %s is lost: its snapshot %s is gone", sandbox.sandbox_id, sandbox.snapshot_id
        )
        return False
    if sandbox.state not in (RUNNING, PAUSING) or states.get(sandbox.container) in ENDED:
        return False
    return sandbox.pause_on_timeout or sandbox.end_at_unix_ms > unix_ms_now()


def _traces(containerd: Containerd, state_dir: str) -> set[str]:
    """Ids of containers of which a snapshot, a lease or files are there."""
    snapshots = {info.name for info in containerd.snapshots() if SANDBOX_LABEL in info.labels}
    leases = {
        lease.removeprefix(LEASE_PREFIX)
        for lease in containerd.lease_ids()
        if lease.startswith(LEASE_PREFIX)
    }
    return snapshots | leases | set(sandbox_files.present(state_dir))
