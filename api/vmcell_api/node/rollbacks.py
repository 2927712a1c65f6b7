"""Rollback: a snapshot of a sandbox restored beside it, and swapped when it answers.

What the sandbox was before is kept as a snapshot of its own, the undo point, for a while. Undoing
is rolling back to that, which makes another one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from vmcell_api.node import sandbox_files
from vmcell_api.node.build import MachineLife, SandboxBuilder
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.pool import Pool
from vmcell_api.node.registry import Registry
from vmcell_api.node.removal import Removals
from vmcell_api.node.sandbox import RUNNING, Sandbox, unix_ms_now
from vmcell_api.node.snapshot_records import UNDO, SnapshotRecord, SnapshotRecords, new_snapshot_id
from vmcell_api.node.suspension import Suspension
from vmcell_protos.errors import CallerError

log = logging.getLogger("vmcell.noded")


@dataclass(frozen=True, kw_only=True)
class Rollbacks:
    """The verb; thread-safe."""

    containerd: Containerd
    state_dir: str
    registry: Registry
    removals: Removals
    builder: SandboxBuilder
    pool: Pool
    snapshots: SnapshotRecords
    suspension: Suspension

    def rollback(
        self, sandbox_id: str, snapshot_id: str, *, undo_life_ms: int
    ) -> tuple[Sandbox, SnapshotRecord]:
        """(the sandbox as the snapshot has it, the undo point).

        When it fails, the sandbox runs as before. CallerError not_found for a snapshot that is none
        of this sandbox.
        """
        with (
            self.registry.locked(sandbox_id, state=RUNNING) as (entry, sandbox),
            self.snapshots.in_use(snapshot_id) as record,
        ):
            if record.sandbox_id != sandbox_id:
                raise CallerError(
                    f"snapshot {snapshot_id} is none of sandbox {sandbox_id}", code="not_found"
                )
            beside, life = self._restore(sandbox, record)
            try:
                undo = self._save_undo_point(sandbox, undo_life_ms)
            except BaseException:
                self.removals.remove(beside.container, beside.slot_number)
                raise
            try:
                self.containerd.set_labels(beside.container, beside.labels(RUNNING))
            except BaseException:
                self.removals.remove(beside.container, beside.slot_number)
                self.suspension.call_off(sandbox, undo)
                raise
            self.registry.note_container(beside)
            entry.past_pids.add(entry.life.pid)
            entry.sandbox, entry.life = beside, life
            self.removals.remove(sandbox.container, sandbox.slot_number)
            log.info("sandbox %s is rolled back to %s", sandbox_id, snapshot_id)
            return beside, undo

    def _save_undo_point(self, sandbox: Sandbox, life_ms: int) -> SnapshotRecord:
        """The sandbox's vCPUs stand afterwards."""
        expires = unix_ms_now() + life_ms
        return self.suspension.begin(
            sandbox, new_snapshot_id(UNDO), kind=UNDO, expires_at_unix_ms=expires
        )

    def _restore(self, sandbox: Sandbox, record: SnapshotRecord) -> tuple[Sandbox, MachineLife]:
        """A second machine of the sandbox, in another slot; it is not the sandbox yet."""
        token = sandbox_files.access_token(self.state_dir, sandbox.container)
        slot, life = self.pool.claim(sandbox.egress), MachineLife()
        generation = sandbox.generation + 1
        beside = replace(
            sandbox,
            container_id=f"{sandbox.sandbox_id}-{generation}",
            generation=generation,
            slot_number=slot.number,
            address=slot.guest_address,
        )
        try:
            return self.builder.restore_beside(beside, record, slot, life, token), life
        except BaseException:
            self.removals.remove(beside.container, slot.number)
            raise
