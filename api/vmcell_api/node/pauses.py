"""Pause and resume: a sandbox that is on disk alone, and back.

A pause is saving, then a word on the labels, then the end of the machine; until the word is written
whoever wants the sandbox calls the pause off. A resume restores under the same container, in a new
slot; until it has succeeded the labels say that the sandbox is paused.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from vmcell_api.node.build import MachineLife, SandboxBuilder
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.pool import Pool
from vmcell_api.node.registry import Entry, Registry
from vmcell_api.node.removal import Removals
from vmcell_api.node.sandbox import PAUSED, PAUSING, Sandbox
from vmcell_api.node.slots import SlotPool
from vmcell_api.node.snapshot_records import PAUSE, SnapshotRecord, SnapshotRecords, new_snapshot_id
from vmcell_api.node.suspension import Suspension
from vmcell_api.node.teardown import end_machine
from vmcell_protos.errors import CallerError, HostError, VmcellError

log = logging.getLogger("vmcell.noded")

MoveDeadline = Callable[[Entry, Sandbox, int], Sandbox]


@dataclass(frozen=True, kw_only=True)
class Pauses:
    """The two verbs; thread-safe. `move_deadline` only extends, in a place that is locked."""

    containerd: Containerd
    slots: SlotPool
    registry: Registry
    removals: Removals
    builder: SandboxBuilder
    pool: Pool
    snapshots: SnapshotRecords
    suspension: Suspension
    move_deadline: MoveDeadline

    def pause(self, sandbox_id: str) -> Sandbox:
        """Saves a sandbox and ends its machine.

        CallerError aborted when it is paused already, or when a resume called the pause off.
        """
        with self.registry.locked(sandbox_id) as (entry, sandbox):
            if sandbox.state == PAUSED:
                raise CallerError(f"sandbox {sandbox_id} is paused already", code="aborted")
            return self.pause_locked(entry, sandbox)

    def pause_locked(self, entry: Entry, sandbox: Sandbox) -> Sandbox:
        """The same in a place that is locked; when it fails, the sandbox runs."""
        sandbox_id = sandbox.sandbox_id
        entry.sandbox = sandbox.in_state(PAUSING)
        try:
            record = self.suspension.begin(sandbox, new_snapshot_id(PAUSE), kind=PAUSE)
            if entry.wanted and self._called_off(sandbox, record):
                raise CallerError(
                    f"sandbox {sandbox_id} runs on: a request called the pause off", code="aborted"
                )
            try:
                paused = self.suspension.commit_pause(sandbox, record)
            except BaseException:
                self.suspension.abandon(sandbox, record)
                raise
        except BaseException:
            entry.sandbox = sandbox
            raise
        self.registry.cancel_due(sandbox_id)
        entry.past_pids.add(entry.life.pid)
        entry.sandbox, entry.stuck = paused, sandbox.slot_number
        self.end_stuck_machine(entry, paused)
        log.info("sandbox %s is paused as %s", sandbox_id, record.snapshot_id)
        return paused

    def _called_off(self, sandbox: Sandbox, record: SnapshotRecord) -> bool:
        try:
            self.suspension.call_off(sandbox, record)
        except VmcellError as error:  # it is whole on disk: whoever wants it restores it
            log.error("sandbox %s does not run on: %s", sandbox.sandbox_id, error)
            return False
        log.info("sandbox %s runs on, its pause was called off", sandbox.sandbox_id)
        return True

    def end_stuck_machine(self, entry: Entry, sandbox: Sandbox) -> None:
        """Ends the machine of a paused sandbox in a locked place; what fails is tried again."""

        def again() -> None:
            with (
                contextlib.suppress(CallerError),
                self.registry.locked(sandbox.sandbox_id, state=PAUSED) as (locked, found),
            ):
                self._end_machine(locked, found)

        try:
            self._end_machine(entry, sandbox)
        except VmcellError as error:
            self.removals.try_later(sandbox.container, again, error)

    def _end_machine(self, entry: Entry, sandbox: Sandbox) -> None:
        if entry.stuck is None:
            return
        try:
            if entry.mislabelled:
                self.suspension.label_paused(sandbox)
                entry.mislabelled = False
            end_machine(
                self.containerd,
                self.slots,
                container_id=sandbox.container,
                slot_number=entry.stuck,
            )
        except CallerError as error:
            raise HostError(str(error), code="internal") from error
        entry.stuck = None

    def resume(self, sandbox_id: str, timeout_ms: int, *, by_request: bool) -> tuple[Sandbox, bool]:
        """(the sandbox running, whether this call restored it); a deadline further away stays.

        `timeout_ms` 0: as it was given at first. `by_request`: of its ports, which only wake a
        sandbox that says so; CallerError failed_precondition for another.
        """
        with self.registry.wanted(sandbox_id, by_request=by_request) as (entry, sandbox):
            timeout_ms = timeout_ms or sandbox.timeout_ms
            if sandbox.state == PAUSED:
                return self._wake(entry, sandbox, timeout_ms), True
            if by_request:
                return sandbox, False
            return self.move_deadline(entry, sandbox, timeout_ms), False

    def _wake(self, entry: Entry, sandbox: Sandbox, timeout_ms: int) -> Sandbox:
        """Restores a paused sandbox; when that fails it stays paused."""
        self._end_machine(entry, sandbox)
        with self.snapshots.in_use(sandbox.snapshot_id) as record:
            slot = self.pool.claim(sandbox.egress)
            entry.life = MachineLife()
            try:
                woken = self.builder.wake(sandbox, record, slot, entry.life, timeout_ms=timeout_ms)
            except BaseException:
                entry.past_pids.add(entry.life.pid)
                entry.stuck, entry.mislabelled = slot.number, True
                self.end_stuck_machine(entry, sandbox)
                raise
        entry.sandbox = woken
        self.registry.set_due(entry, sandbox_id=woken.sandbox_id, left_ms=timeout_ms)
        self.snapshots.discard(record.snapshot_id)
        log.info("sandbox %s runs again in %s", woken.sandbox_id, slot.tap)
        return woken
