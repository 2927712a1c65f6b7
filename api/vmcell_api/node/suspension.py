"""Saving a sandbox's machine: to go on, or to end and be resumed later.

What the shim is asked for (docs/architecture.md, "Saved sandboxes"): one call that stops the vCPUs,
writes a snapshot and then lets them run on, or leaves them standing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from vmcell_api.node import sandbox_files
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.sandbox import (
    END_LABEL,
    PAUSED,
    PAUSING,
    RUNNING,
    SNAPSHOT_LABEL,
    STATE_LABEL,
    Sandbox,
    unix_ms_now,
)
from vmcell_api.node.snapshot_records import SnapshotRecord, SnapshotRecords
from vmcell_protos.errors import CallerError, HostError, VmcellError

log = logging.getLogger("vmcell.noded")

# A machine of many GiB on a slow disk.
SAVE_TIMEOUT_S = 300.0
RUN, STAND = "run", "pause"


class Suspension:
    """Saves machines and keeps the labels true meanwhile. The caller holds the sandbox's lock.

    `stands(sandbox, error)` is told of one that could not be let run on; it is tried again there.
    """

    def __init__(
        self,
        containerd: Containerd,
        records: SnapshotRecords,
        state_dir: str,
        *,
        stands: Callable[[Sandbox, VmcellError], None],
    ) -> None:
        self._containerd = containerd
        self._records = records
        self._state_dir = state_dir
        self._stands = stands

    def save(
        self,
        sandbox: Sandbox,
        snapshot_id: str,
        *,
        kind: str,
        then: str = RUN,
        expires_at_unix_ms: int = 0,
        drop_caches: bool = False,
        template_key: str = "",
    ) -> SnapshotRecord:
        """A snapshot of a running sandbox; then it runs on, or its vCPUs stand (`then` STAND).

        When it fails, nothing of the snapshot is left and the sandbox runs.
        """
        if sandbox.volume_mounts:
            raise CallerError(
                f"sandbox {sandbox.sandbox_id} has volumes, which are live directories of the "
                "host; a sandbox with volumes cannot be saved",
                code="failed_precondition",
            )
        record = SnapshotRecord(
            snapshot_id=snapshot_id,
            kind=kind,
            sandbox_id=sandbox.sandbox_id,
            template_id=sandbox.template_id,
            image=sandbox.image,
            chain_id=self._containerd.snapshot_parent(sandbox.container),
            vcpus=sandbox.vcpus,
            memory_mib=sandbox.memory_mib,
            created_at_unix_ms=unix_ms_now(),
            expires_at_unix_ms=expires_at_unix_ms,
            access_token=sandbox_files.access_token(self._state_dir, sandbox.container),
            environment=sandbox_files.environment(self._state_dir, sandbox.container),
            template_key=template_key,
        )
        self._records.reserve(record)
        options = {"snapshot_id": snapshot_id, "then": then, "drop_caches": drop_caches}
        try:
            self._containerd.checkpoint_task(
                sandbox.container, json.dumps(options).encode(), timeout_s=SAVE_TIMEOUT_S
            )
            if not self._records.is_whole(snapshot_id):
                raise HostError(
                    f"the shim saved {snapshot_id}, but it is not in noded's snapshot_dir; name "
                    "the directory of the shim's configuration",
                    code="internal",
                )
        except BaseException:
            self.run_on(sandbox)
            self._records.discard(snapshot_id)
            raise
        return record

    def begin(
        self, sandbox: Sandbox, snapshot_id: str, *, kind: str, expires_at_unix_ms: int = 0
    ) -> SnapshotRecord:
        """Saves a sandbox that is to end; its vCPUs stand then, and `call_off` is still possible.

        When it fails, the sandbox runs.
        """
        self._containerd.set_labels(sandbox.container, {STATE_LABEL: PAUSING})
        try:
            return self.save(
                sandbox,
                snapshot_id,
                kind=kind,
                then=STAND,
                expires_at_unix_ms=expires_at_unix_ms,
            )
        except BaseException:
            self._label_running(sandbox)
            raise

    def call_off(self, sandbox: Sandbox, record: SnapshotRecord) -> None:
        """Lets a sandbox run on that was to end; raises when it does not."""
        self._containerd.resume_task(sandbox.container)
        self._label_running(sandbox)
        self._records.discard(record.snapshot_id)

    def abandon(self, sandbox: Sandbox, record: SnapshotRecord) -> None:
        """Lets a sandbox run on of which nobody knows whether its labels say that it is paused.

        The snapshot goes only when they are known to say that it runs.
        """
        self.run_on(sandbox)
        if self._label_running(sandbox):
            self._records.discard(record.snapshot_id)

    def commit_pause(self, sandbox: Sandbox, record: SnapshotRecord) -> Sandbox:
        """Writes that the snapshot is the sandbox from now on; its machine may be ended."""
        paused = sandbox.in_state(PAUSED, snapshot_id=record.snapshot_id)
        paused = paused.ending_at(record.created_at_unix_ms)
        self.label_paused(paused)
        return paused

    def label_paused(self, paused: Sandbox) -> None:
        """Writes it again, where that may have been overwritten."""
        labels = paused.labels(PAUSED)
        changed = {name: labels[name] for name in (STATE_LABEL, SNAPSHOT_LABEL, END_LABEL)}
        self._containerd.set_labels(paused.container, changed)

    def run_on(self, sandbox: Sandbox) -> None:
        """Lets the task run, whether it stands or not; what fails is tried again."""
        try:
            self._containerd.resume_task(sandbox.container)
        except CallerError:
            return  # it runs, or is gone, which its end tells
        except HostError as error:
            self._stands(sandbox, error)

    def settle(self, sandbox: Sandbox) -> Sandbox:
        """A sandbox whose pause an earlier noded had begun and not finished: it runs on."""
        self.run_on(sandbox)
        self._label_running(sandbox)
        return sandbox.in_state(RUNNING)

    def _label_running(self, sandbox: Sandbox) -> bool:
        """Whether it is labelled; if not, the next noded lets it run on, which it does already."""
        try:
            self._containerd.set_labels(sandbox.container, {STATE_LABEL: RUNNING})
        except VmcellError as error:
            log.error("sandbox %s runs, but %s", sandbox.sandbox_id, error)
            return False
        return True
